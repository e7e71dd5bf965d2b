"""The kinds of codec, audio, text and image encoder that a spec or recipe can name: `{name: wan_vae, path: ...}`, the first
without a name; `my_file:Thing` is a class of the user's own file (teachers.resolve).

An entry is `module:Config`: a frozen dataclass that knows how to load what it describes.
"""

from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from teachers.resolve import Registry

CODECS = Registry(
    kind="codec",
    group="codecs",
    entries={
        "eigen": "teachers.codecs.linear:CodecConfig",
        "wan_vae": "teachers.codecs.wan_vae:WanVAEConfig",
        "taehv": "teachers.codecs.taehv:TAEHVConfig",
        "conv": "teachers.codecs.convolutional:ConvCodecConfig",
        "dc_ae": "teachers.codecs.dc_ae:DCAEConfig",
    },
    methods={"load": "def load(self, folder: Path, height: int, width: int) -> Codec"},
)
AUDIO_ENCODERS = Registry(
    kind="audio encoder",
    group="audio_encoders",
    entries={
        "log_mel": "teachers.encoders.small:AudioConfig",
        "wav2vec2": "teachers.encoders.wav2vec:Wav2VecConfig",
        "whisper": "teachers.encoders.whisper:WhisperConfig",
        "none": "teachers.encoders.small:NoAudioConfig",
    },
    methods={
        "dim": "def dim(self, samples_per_frame: int) -> int",
        "load": "def load(self, samples_per_frame: int) -> AudioEncoder",
    },
)
TEXT_ENCODERS = Registry(
    kind="text encoder",
    group="text_encoders",
    entries={
        "bpe": "teachers.encoders.small:TextConfig",
        "umt5": "teachers.encoders.umt5:UMT5Config",
        "none": "teachers.encoders.small:NoTextConfig",
    },
    methods={"load": "def load(self, folder: Path) -> Text"},
)

IMAGE_ENCODERS = Registry(
    kind="image encoder",
    group="image_encoders",
    entries={
        "wan": "teachers.encoders.image:WanImageConfig",
        "wan_speakers": "teachers.encoders.speakers:SpeakersConfig",
        "s2v": "teachers.encoders.anchors:AnchorsConfig",
        "regions": "teachers.encoders.speakers:RegionsConfig",
        "still": "teachers.encoders.still:StillConfig",
    },
    methods={"load": "def load(self) -> ImageEncoder"},
)


class Module(Protocol):
    """What every part has of torch's Module."""

    def to(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self) -> Any: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class Geometry(Protocol):
    """`stride` pixel frames become one latent frame, `patch` x `patch` pixels one cell of `channels`."""

    @property
    def stride(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def channels(self) -> int: ...


class Codec(Module, Protocol):
    """Video [B, 3, T, H, W] in [-1, 1], T = 1 + stride (F - 1), <-> latents [B, C, F, H/patch, W/patch], whole or streaming.

    Dubbing also needs `encode_chunk(video, state=None)` as `teachers.codecs.streamed.StreamedCodec` has it, and reads
    `encode_ahead`, 0 where there is none. A gradient through the decoder (`teachers.codecs.streamed.pull_back`) needs a
    `decode_chunk` that records a graph of latents which ask for it, and whose state is a tuple of tensors.
    """

    @property
    def config(self) -> Geometry: ...
    def encode(self, video: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def decode_chunk(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


class CodecKind(Geometry, Protocol):
    """Config of a codec. Weights of a `fitted` one lie in the student's folder, of others at their path."""

    @property
    def fitted(self) -> bool: ...
    def load(self, folder: Path, height: int, width: int) -> Codec: ...


class AudioEncoder(Module, Protocol):
    """Sound at 16 kHz -> rows [.., T, dim], one a pixel frame, of samples -lookback .. +lookahead around it; `of_clip` for
    bidirectional networks, where they take something else."""

    dim: int
    lookback: int
    lookahead: int

    def __call__(self, audio: Tensor, first: int = 0, last: int | None = None) -> Tensor: ...
    def rows(self, window: Tensor, first: int, last: int) -> Tensor: ...
    def of_clip(self, audio: Tensor, num_frames: int) -> Tensor | None: ...


class AudioEncoderKind(Protocol):
    """Config of an audio encoder; `dim`: numbers of a row, for that many samples a frame."""

    def dim(self, samples_per_frame: int) -> int: ...
    def load(self, samples_per_frame: int) -> AudioEncoder: ...


class ImageEncoder(Module, Protocol):
    """The reference image [N, 3, H, W] in [-1, 1] -> its features by name, over `num_frames` latent frames where they run with
    them; `codec` is that of the latents."""

    def __call__(self, image: Tensor, codec: Codec, num_frames: int) -> dict[str, Tensor]: ...


class ImageEncoderKind(Protocol):
    """Config of an image encoder: `gives`, names among teachers.conditions.OF_IMAGE; their `sizes` without a batch for latents of a
    codec; `dim`: numbers of an image token, 0 without."""

    @property
    def dim(self) -> int: ...
    @property
    def gives(self) -> tuple[str, ...]: ...
    def sizes(self, stride: int, channels: int, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]: ...
    def load(self) -> ImageEncoder: ...


class Text(Module, Protocol):
    """Texts -> token features [B, L, D], zero where padded."""

    def __call__(self, text: list[str]) -> Tensor: ...
    def count(self, text: str) -> int: ...


class TextEncoderKind(Protocol):
    """Config of a text encoder of `max_tokens` tokens and width `dim`."""

    fitted: ClassVar[bool]

    @property
    def dim(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    def load(self, folder: Path) -> Text: ...

"""The static facts of a student, stored in its checkpoint."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from students.history import History, HistoryNoise
from students.schedule import Schedule
from teachers import flow, registry
from teachers.conditions import OF_IMAGE, taken
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, Scales
from teachers.networks.kind import NETWORKS as TEACHER_NETWORKS
from teachers.networks.kind import Dims
from teachers.registry import AudioEncoderKind, CodecKind, TextEncoderKind
from teachers.resolve import Registry, label

NETWORKS = Registry(
    kind="student network",
    group="student_networks",
    entries={
        **TEACHER_NETWORKS.ours,
        "midas": "students.networks.midas_net:MidasConfig",
        "windowed": "students.networks.windowed:WindowedConfig",
    },
    methods=TEACHER_NETWORKS.methods,
    base=TEACHER_NETWORKS.base,
)
"""The kinds of network that a student can be, the first without a name."""


Step = Literal["renoise", "ode"]
"""How x0 gets to the next sigma: with fresh noise (Self Forcing), or along the ODE from where it came (Euler; LiveAvatar)."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The student part of a recipe: chunk length in latent frames, denoising steps with the teacher's shift, history and
    schedule. `network` null: the teacher's made causal; a kind of its own starts from no weights of the teacher. `guidance`: the
    guidance scales that are embedded, from `init` on, in the place of those of trajectories and distill. `times`, `step`: as in
    `Spec`. `grid`: that of the steps (teachers.flow.sigma_grid); trajectories have even ones."""

    chunk_frames: int
    num_steps: int
    history: History = field(default_factory=History)
    schedule: Schedule = field(default_factory=Schedule)
    history_noise: HistoryNoise | None = None
    network: Any = field(default=None, metadata={"kinds": NETWORKS})
    guidance: EmbeddedScales | None = None
    first_sigmas: tuple[float, ...] = ()
    first_chunks: int = 1
    times: tuple[float, ...] = ()
    step: Step = "renoise"
    grid: flow.Grid = "even"

    def __post_init__(self):
        levels = (*self.first_sigmas, 0.0)
        if self.first_sigmas and (levels[0] != 1.0 or any(a <= b for a, b in itertools.pairwise(levels))):
            raise UserError(
                f"student.first_sigmas: got {list(self.first_sigmas)}; start at 1.0 and go down, without the 0"
            )


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Geometry, context and clock of a student; everything that a sampler has to know besides weights."""

    height: int
    width: int
    fps: Fraction
    chunk_frames: int
    sigmas: tuple[float, ...]
    horizon_frames: int  # latent frames of the training clips
    history: History
    network: Any = field(metadata={"kinds": NETWORKS})
    codec: CodecKind = field(metadata={"kinds": registry.CODECS})
    audio: AudioEncoderKind = field(metadata={"kinds": registry.AUDIO_ENCODERS})
    text: TextEncoderKind = field(metadata={"kinds": registry.TEXT_ENCODERS})
    image: Any = field(default=None, metadata={"kinds": registry.IMAGE_ENCODERS})  # of the reference image
    first_sigmas: tuple[float, ...] = ()  # of the first chunks, where they take other steps
    first_chunks: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    history_noise: HistoryNoise | None = None
    pose_dim: int = 0  # numbers of a pose row, one a pixel frame; 0: the student takes no pose
    speakers: int = 1  # 2: another speaker's audio too, beside its own voice
    format: int = 1
    guidance: EmbeddedScales | None = None  # the guidance scales that are embedded
    step: Step = "renoise"
    times: tuple[float, ...] = ()
    """What the network is conditioned on in the place of 1000 sigma, a number for each of `sigmas`: weights that were trained at
    rounded times (LiveTalk's: 1000, 936, 832, 624) while noise and x0 have the sigmas themselves."""

    def __post_init__(self):
        if self.times and (len(self.times) != len(self.sigmas) or self.first_sigmas or not _falls(self.times)):
            raise UserError(
                f"student.times: got {list(self.times)}; give one for each of the {len(self.sigmas)} denoising steps, going down "
                "from at most 1000, and no first_sigmas"
            )
        check_image(self.network, self.image)
        if self.speakers not in (1, 2):
            raise UserError(f"speakers: got {self.speakers}; a student takes one voice, or its own and another one's")
        roll = self.history.anchors_roll
        if roll and (roll < self.horizon_frames or roll % self.chunk_frames):
            raise UserError(
                f"student.history.anchors_roll: got {roll}; give whole chunks of {self.chunk_frames}, at least the "
                f"{self.horizon_frames} latent frames of a training clip, in which anchors stay"
            )
        if self.horizon_frames % self.chunk_frames:
            raise UserError(
                f"student.chunk_frames: a clip needs a whole number of chunks: got {self.horizon_frames} latent frames "
                f"with chunk_frames={self.chunk_frames}"
            )
        if self.schedule.forwards(len(self.sigmas)) == len(self.sigmas):
            return
        history = self.history
        if history.commit != "clean" or any(part.window == 0 for part in history.parts):
            raise UserError(
                f"student.history: got commit={history.commit}, window={history.window}; chunks in flight together "
                "want commit: clean and a window from 1"
            )
        if self.first_sigmas:
            raise UserError("student.first_sigmas: chunks in flight together take the same steps; remove it")

    @property
    def audio_dim(self) -> int:
        """Numbers of an audio row, one row a pixel frame, all speakers side by side."""
        return self.speakers * self.audio.dim(self.samples_per_frame)

    @cached_property
    def samples_per_frame(self) -> int:
        """16 kHz audio samples of one pixel frame."""
        samples = SAMPLE_RATE / self.fps
        if samples.denominator != 1:
            raise UserError(f"fps {self.fps} does not divide {SAMPLE_RATE} Hz; use 25/2, 16, 20 or 25")
        return samples.numerator

    @property
    def num_chunks(self) -> int:
        """Chunks of a training clip."""
        return self.horizon_frames // self.chunk_frames

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        return self.codec.channels, self.height // self.codec.patch, self.width // self.codec.patch

    @property
    def dims(self) -> Dims:
        """The sizes of a network that codec, encoders and data decide."""
        return Dims(
            latent_channels=self.codec.channels,
            stride=self.codec.stride,
            text_dim=self.text.dim,
            audio_dim=self.audio_dim,
            pose_dim=self.pose_dim,
            speakers=self.speakers,
            image_dim=0 if self.image is None else self.image.dim,
        )

    @property
    def takes_image(self) -> bool:
        """Whether a stream begins with a reference image: as its frame 0, or as features of it."""
        return self.network.reference or any(name in OF_IMAGE for name in taken(self.network))

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of a latent frame in tokens."""
        _, height, width = self.latent_size
        return height // self.network.patch, width // self.network.patch

    def steps(self, chunk: int) -> tuple[float, ...]:
        """The denoising steps of chunk number `chunk`, sigmas going down, 0 left out."""
        return self.first_sigmas if self.first_sigmas and chunk < self.first_chunks else self.sigmas

    def conditioned(self, sigma: Tensor) -> Tensor:
        """The sigmas that the network is conditioned on [..] for those that latents have [..]: the same, but for `times`."""
        given = sigma
        for own, time in zip(self.sigmas, self.times, strict=False):
            given = torch.where(sigma == own, time / 1000.0, given)
        return given

    def scales(self, guidance: Scales | None) -> dict[str, float] | None:
        """The guidance scales that a stream is conditioned on by name: those of `guidance`, the others as served; UserError for one
        that was not trained, or where the student embeds none."""
        if self.guidance is not None:
            return self.guidance.check({} if guidance is None else guidance)
        if guidance is not None:
            raise UserError(f"guidance: got {guidance}, this student embeds none; remove it")
        return None

    @property
    def nfe_per_chunk(self) -> int | float:
        """Network evaluations for one chunk, the context pass included where the history has one of its own, and on average that
        of the memory's refinement: 1 / refine_every."""
        every = self.history.refine_every
        refined = 1 / every if every else 0
        if self.schedule.depth > 1:
            return self.schedule.forwards(len(self.sigmas)) + refined
        return len(self.sigmas) + (self.history.commit == "clean" and self.network.context_pass) + refined

    def pixel_frames(self, chunk: int) -> tuple[int, int]:
        """First and past-the-end pixel frame of a chunk: 1 + stride (n - 1) frames in chunk 0, stride n in every other; chunk 0
        brings the lead's frame, where there is one."""
        stride, n, lead = self.codec.stride, self.chunk_frames, self.network.lead

        def start(k: int) -> int:
            return 0 if k == 0 else 1 + stride * (k * n - 1 + lead)

        return start(chunk), start(chunk + 1)


def check_image(network: Any, image: Any) -> None:
    """UserError where a network takes features of the reference image that the image encoder does not give."""
    given = () if image is None else image.gives
    lacking = [name for name in taken(network) if name in OF_IMAGE and name not in given]
    if lacking:
        raise UserError(
            f"data.image: {label(network)} takes {', '.join(lacking)} of the reference image, "
            f"{'which this image encoder does not give' if given else 'and there is no image encoder'}; give data.image.name one "
            f"of {', '.join(registry.IMAGE_ENCODERS)}"
        )


LARGEST = {
    **{"layers": 1000, "patch": 256, "stride": 64, "max_tokens": 8192, "chunk_frames": 1024},
    **{"height": 16384, "width": 16384, "channels": 4096},
}
"""Of the whole numbers of a spec whose names end so; others are at most 2**20. No student is near them: what is beyond asks for
memory, not for a picture."""


def check_sizes(part: Any, key: str = "", layers: int = LARGEST["layers"]) -> None:
    """UserError for a number of a spec, or of a part of it, beyond LARGEST, or for more layers."""
    for own in fields(part):
        value, name = getattr(part, own.name), f"{key}{own.name}"
        if is_dataclass(value):
            check_sizes(value, f"{name}.", layers)
        most = next((most for end, most in (LARGEST | {"layers": layers}).items() if own.name.endswith(end)), 2**20)
        listed = value if isinstance(value, tuple) else (value,)
        largest = max((abs(item) for item in listed if isinstance(item, int | Fraction)), default=0)
        if largest > most or len(listed) > 4096:
            shown = len(listed) if isinstance(value, tuple) and len(listed) > 4096 else value
            raise UserError(f"{name}: got {shown}, at most {most} can be; fix spec.json, or get the student again")
        if own.name in ("height", "width") and isinstance(value, int) and value < 1:
            raise UserError(f"{name}: got {value}, at least 1 is needed; fix spec.json, or get the student again")


def _falls(times: Sequence[float]) -> bool:
    """Whether network times go down within 1000 .. 0."""
    return all(1000.0 >= a > b >= 0.0 for a, b in itertools.pairwise((*times, 0.0)))


def student_sigmas(num_steps: int, shift: float, grid: flow.Grid = "even") -> tuple[float, ...]:
    """The student's sigmas, 1 first and 0 left out."""
    return flow.sigma_grid(num_steps, shift, grid)[:-1]

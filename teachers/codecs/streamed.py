"""What codecs share that work on a stream chunk by chunk."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.errors import UserError
from teachers.registry import Geometry

DecoderState = tuple[Tensor, ...]  # cached past of a streaming decoder, an immutable value; () where it needs none
EncoderState = tuple[Tensor, ...]  # the same of an encoder
DecodeChunk = Callable[[Tensor, Any], tuple[Tensor, DecoderState]]  # a codec's `decode_chunk`


class StreamedCodec(nn.Module):
    """A codec whose whole encode and decode are those of a stream of one chunk.

    `encode_ahead`: pixel frames after a latent's own that its encoding reads.
    """

    config: Any
    encode_ahead: int = 0

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c f y x"]:
        """A whole clip [B, 3, T, H, W] in [-1, 1], T = 1 + stride (F - 1), -> latents [B, C, F, h, w]; an image is a clip of one
        frame. Raises UserError for other shapes."""
        return self.encode_chunk(video)[0]

    def encode_chunk(
        self, video: Float[Tensor, "b 3 t h w"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "b c f y x"], EncoderState]:
        """The next frames of a stream -> latents, and the state for the frames after them. Without a state the stream starts, with
        1 + stride (F - 1) frames and `encode_ahead` more; after it come stride F. A state is never written in place. Raises
        UserError for other shapes."""
        raise NotImplementedError

    def decode(self, latents: Float[Tensor, "b c f y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Latents [B, C, F, h, w] of a whole clip -> pixels [B, 3, T, H, W] in [-1, 1]. Raises UserError for other shapes."""
        return self.decode_chunk(latents)[0]

    def decode_chunk(
        self, latents: Float[Tensor, "b c f y x"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderState]:
        """The next latents of a stream -> pixels, and the state for the chunk after it; without a state the stream starts, and
        its first latent gives one pixel frame, not `stride`. A state is never written in place, so a stream can resume from any
        earlier one. Raises UserError for other shapes."""
        raise NotImplementedError

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def check_video(video: Tensor, config: Geometry, begins: bool = True) -> None:
    """UserError unless video is floats [B, 3, T, H, W], T = 1 + stride (F - 1), or where no stream `begins` with it stride F, H and
    W multiples of patch."""
    stride, patch, shape = config.stride, config.patch, list(video.shape)
    is_video = len(shape) == 5 and all(shape) and shape[1] == 3 and (shape[2] - begins) % stride == 0
    if not is_video or shape[3] % patch or shape[4] % patch or not video.is_floating_point():
        frames = f"1 + {stride} (F - 1)" if begins else f"{stride} F"
        expected = f"floats [B, 3, {frames}, {patch} h, {patch} w] in [-1, 1]"
        raise UserError(f"video: got {video.dtype} {shape}, the codec takes {expected}")


def check_latents(latents: Tensor, config: Geometry, state: DecoderState | None) -> None:
    """UserError unless latents are floats [B, C, F, h, w] and the state, if any, is of a stream of that B, h and w."""
    shape = list(latents.shape)
    if len(shape) != 5 or not all(shape) or shape[1] != config.channels or not latents.is_floating_point():
        raise UserError(f"latents: got {latents.dtype} {shape}, the codec takes floats [B, {config.channels}, F, h, w]")
    if state is not None and (not state or [len(state[0]), *state[0].shape[-2:]] != [shape[0], *shape[3:]]):
        cached = list(state[0].shape) if state else "empty"
        raise UserError(f"state: it is {cached}, the latents are {shape}; pass the state of the same stream")


def pull_back(
    decode_chunk: DecodeChunk,
    latents: Float[Tensor, "b c f y x"],
    gradient: Callable[[Float[Tensor, "b 3 t h w"]], Float[Tensor, "b 3 t h w"]],
    chunk: int,
) -> Float[Tensor, "b c f y x"]:
    """d f(decode(latents)) / d latents of a codec, where `gradient(video)` is df / d video of whole clips.

    The clips are decoded without a graph and kept; then `chunk` latent frames at a time are decoded again, the last ones first, and
    the gradient of the decoder's state goes on to the chunk before (reverse mode over the stream). Exact, with the graph of one
    chunk and the states between chunks in memory. States are tuples of tensors."""
    parts, states, pixels = latents.detach().split(chunk, dim=2), [], []
    state: DecoderState | None = None
    with torch.no_grad():
        for part in parts:
            states.append(state)
            video, state = decode_chunk(part, state)
            pixels.append(video)
    slopes = gradient(torch.cat(pixels, dim=2)).split([video.shape[2] for video in pixels], dim=2)
    found: list[Tensor] = []
    behind: Sequence[Tensor | None] = ()
    for part, before, slope in zip(reversed(parts), reversed(states), reversed(slopes), strict=True):
        own, *behind = _pull_back_chunk(decode_chunk, part, before, slope, behind)
        found.insert(0, torch.zeros_like(part) if own is None else own)
    return torch.cat(found, dim=2)


def _pull_back_chunk(
    decode_chunk: DecodeChunk,
    latents: Tensor,
    state: DecoderState | None,
    slope: Tensor,
    behind: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of a chunk's latents and of the state before it, from those of its pixels and of the state `behind` it."""
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        before = None if state is None else tuple(x.detach().requires_grad_() for x in state)
        video, after = decode_chunk(leaf, before)
        if not video.requires_grad:
            raise UserError("codec: its decode_chunk records no graph of the latents; let it run without no_grad")
        pairs = [(video, slope), *zip(after, behind or [None] * len(after), strict=True)]
        used = [(x, g.to(x)) for x, g in pairs if g is not None and x.requires_grad]
        outputs, given = zip(*used, strict=True)
        return torch.autograd.grad(outputs, (leaf, *(before or ())), given, allow_unused=True)

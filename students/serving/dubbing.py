"""Dubbing: a film stays as it is, but for a region around the mouth, which the student draws to other sound.

After each denoising step the latents outside the region are the film's own (blended latent diffusion, Avrahami et al. 2206.02779;
RePaint, Lugmayr et al. 2201.09865, without its repeated steps), so that the noise of the next step is added to them, and they enter
the context. Of the decoded frames the region alone is taken, with a soft edge: every other pixel is the film's, bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from students.serving.overlap import to_device
from students.spec import Spec
from teachers.codecs.linear import to_float
from teachers.codecs.streamed import EncoderState
from teachers.errors import UserError
from teachers.media.streams import Stream
from teachers.registry import Codec

MOST_WAITING_SECONDS = 60  # of a film that no step has read yet; its frames are held as pixels
EDGE = 0.2  # of the region's shorter side, within it, over which the drawn picture fades into the film's


@dataclass(frozen=True)
class Kept:
    """A film's latents [B, C, n, h, w], and where (bool [B, 1, n, h, w]) they stay."""

    latents: Tensor
    where: Tensor

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 [B, C, m, h, w] of the first m frames, with the film's latents where they stay."""
        frames = x0.shape[2]
        return torch.where(self.where[:, :, :frames], self.latents[:, :, :frames].to(x0.dtype), x0)

    @staticmethod
    def join(rows: Sequence["Kept | None"]) -> "Kept | None":
        """Those of several streams, all dubbed or none, as rows of a batch."""
        given = [row for row in rows if row is not None]
        if not given:
            return None
        return Kept(torch.cat([row.latents for row in given]), torch.cat([row.where for row in given]))


class FilmInput:
    """A film as it is pushed: frames uint8 [T, H, W, 3] of the student's size and rate, and of each the region that is drawn.

    A region is a box (left, top, right, bottom) in fractions of the frame. Behind its end a film's last frame is held.
    """

    def __init__(self, spec: Spec, codec: Codec):
        if not hasattr(codec, "encode_chunk"):
            raise UserError(
                f"film: the codec {type(codec).__name__} has no encode_chunk, so it cannot encode a stream; "
                "use a student with another codec"
            )
        self.spec, self.codec = spec, codec
        self.ahead: int = getattr(codec, "encode_ahead", 0)
        self.frames = Stream((spec.height, spec.width, 3), dtype=torch.uint8)
        self.regions = Stream((4,))

    def check(self, frames: Tensor, region: Tensor | None) -> Tensor:
        """The regions [T, 4] of pushed frames; UserError for what is no film of this student."""
        size = (self.spec.height, self.spec.width, 3)
        if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != size:
            got = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
            raise UserError(f"film: got {got}; frames are uint8 [T, {size[0]}, {size[1]}, 3], scale them first")
        if region is None:
            raise UserError(
                "region is missing: give the box (left, top, right, bottom) that is drawn anew, in fractions"
            )
        boxes = torch.as_tensor(region).float()
        if tuple(boxes.shape) not in ((4,), (len(frames), 4)) or not torch.isfinite(boxes).all():
            raise UserError(f"region: got {tuple(boxes.shape)}; it is a box of 4 finite numbers, or one a frame")
        boxes = boxes.expand(len(frames), 4)
        if not (boxes[:, :2] < boxes[:, 2:]).all():
            raise UserError("region: a box is (left, top, right, bottom), the latter two larger; swap them")
        waiting = self.frames.end - self.frames.start + len(frames)
        if waiting > MOST_WAITING_SECONDS * self.spec.fps:
            raise UserError(
                f"film: {float(waiting / self.spec.fps):.0f} s of it would wait to be drawn, at most {MOST_WAITING_SECONDS} are "
                "kept; step between pushes"
            )
        return boxes

    def push(self, frames: Tensor, boxes: Tensor) -> None:
        """Append frames with the regions that `check` gave."""
        self.frames.push(frames)
        self.regions.push(boxes)

    def missing(self, stop: int) -> int:
        """Frames that are needed before those up to number `stop` can be drawn."""
        return max(0, stop + self.ahead - self.frames.end)

    def hold(self, stop: int) -> None:
        """Make up with the last frame what is missing."""
        count = self.missing(stop)
        self.push(*(self._read(stream, stream.end, stream.end + count) for stream in (self.frames, self.regions)))

    def cut(self, frame: int) -> None:
        """Drop all frames from number `frame` on."""
        self.frames.cut(frame)
        self.regions.cut(frame)

    def forget(self, frame: int) -> None:
        """Free the frames before number `frame`, but for the one that may be held."""
        for stream in (self.frames, self.regions):
            stream.forget(min(frame, stream.end) - 1)

    def held(self) -> dict[str, Tensor]:
        """All that has come and is still needed, by name."""
        return {
            "film": self.frames.read(self.frames.start, self.frames.end),
            "regions": self.regions.read(self.regions.start, self.regions.end),
        }

    def restore(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `held` gave, whose first frame has number `start`."""
        self.frames, self.regions = (
            Stream(stream.row_shape, start, stream.dtype) for stream in (self.frames, self.regions)
        )
        self.push(tensors["film"].cpu(), tensors["regions"].cpu())

    def kept(
        self, chunk: int, stop: int, state: EncoderState | None, device: torch.device
    ) -> tuple[Kept, EncoderState]:
        """What stays of the film in a chunk and those in flight behind it, up to frame number `stop`, and the encoder's state after
        the chunk itself; `state` is that before it."""
        start, own = self.spec.pixel_frames(chunk)
        lead = self.spec.network.lead if chunk == 0 else 0
        latents, after = self._encode(start, own, state, device)
        parts = [latents[:, :, lead:]]
        if stop > own:
            parts.append(self._encode(own, stop, after, device)[0])
        drawn = self._weights(start, stop).gt(0).float()[None, None]
        if chunk == 0:  # its first frame is a latent of its own
            drawn = torch.cat([drawn[:, :, :1].expand(-1, -1, self.spec.codec.stride - 1, -1, -1), drawn], dim=2)
        size = self.spec.codec.stride, self.spec.codec.patch, self.spec.codec.patch
        where = F.max_pool3d(drawn, size)[:, :, lead:] == 0
        return Kept(torch.cat(parts, dim=2), to_device(where, device)), after

    def blend(self, start: int, frames: Tensor) -> Tensor:
        """Drawn frames uint8 [t, H, W, 3] from number `start` on, in the film."""
        stop = start + len(frames)
        return blend(self._read(self.frames, start, stop), frames, self._weights(start, stop))

    def _encode(
        self, start: int, stop: int, state: EncoderState | None, device: torch.device
    ) -> tuple[Tensor, EncoderState]:
        first = start + self.ahead if start else 0
        pixels = to_device(self._read(self.frames, first, stop + self.ahead), device)
        return self.codec.encode_chunk(to_float(pixels).permute(3, 0, 1, 2)[None], state)  # pyright: ignore

    def _weights(self, start: int, stop: int) -> Tensor:
        return weights(self._read(self.regions, start, stop), self.spec.height, self.spec.width)

    @staticmethod
    def _read(stream: Stream, begin: int, end: int) -> Tensor:
        """Rows begin..end-1, behind the end the last one."""
        rows = stream.read(begin, min(end, max(begin, stream.end)))
        if len(rows) == end - begin:
            return rows
        last = stream.read(stream.end - 1, stream.end)
        return torch.cat([rows, last.expand(end - begin - len(rows), *last.shape[1:])])


def weights(boxes: Tensor, height: int, width: int) -> Tensor:
    """How much of each pixel is drawn [T, H, W], of regions [T, 4]: 0 outside and at the edge, 1 well within."""
    left, top, right, bottom = boxes.unbind(1)
    edge = EDGE * torch.minimum((right - left) * width, (bottom - top) * height)

    def ramp(low: Tensor, high: Tensor, count: int) -> Tensor:
        places = torch.arange(count) + 0.5
        inside = torch.minimum(places - low[:, None] * count, high[:, None] * count - places)
        return (inside / edge[:, None].clamp(min=1e-6)).clamp(0, 1)

    return ramp(top, bottom, height)[:, :, None] * ramp(left, right, width)[:, None]


def blend(film: Tensor, drawn: Tensor, share: Tensor) -> Tensor:
    """Frames uint8 [T, H, W, 3] of a film with `share` [T, H, W] of the drawn ones; where that is 0 the film's, bit for bit."""
    share = share[..., None]
    return torch.where(share > 0, film.float().lerp(drawn.float(), share).round().to(torch.uint8), film)

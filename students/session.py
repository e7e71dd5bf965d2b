"""The chunked sampler: push audio, get frames. One step function, the same that training folds (causal_wan.denoise_chunk)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from students.causal_wan import denoise_chunk
from students.checkpoint import Bundle
from teachers.codecs import to_uint8
from teachers.conditions import Conditions, pack_audio
from teachers.errors import UserError
from teachers.flow import keyed_generator


@dataclass(frozen=True)
class Chunk:
    """Finished frames uint8 [t, H, W, 3]; `first_frame` counts from the start of the stream; seconds of each part of the work."""

    index: int
    first_frame: int
    frames: Tensor
    seconds: dict[str, float]


def chunk_noise(spec, seed: int, chunk: int, step: int, batch: int = 1) -> Tensor:
    """Noise [B, C, n, h, w] of one denoising step: a function of (seed, chunk, step), never of call order."""
    channels, height, width = spec.latent_size
    rng = keyed_generator(seed, "session", chunk, step)
    return torch.randn(batch, channels, spec.chunk_frames, height, width, generator=rng)


class Session:
    """One stream of one avatar. Any split of the same audio into pushes gives the same frames.

    reference [3, H, W] in [-1, 1] is frame 0. Memory is bounded: the context by the student's History, the audio by what the
    next chunk still needs.
    """

    def __init__(self, bundle: Bundle, reference: Tensor, text: str, seed: int = 0):
        spec = bundle.spec
        if reference.shape != (3, spec.height, spec.width):
            raise UserError(
                f"reference image: got {tuple(reference.shape)}, the student draws {(3, spec.height, spec.width)}"
            )
        self.bundle, self.spec, self.seed = bundle, spec, seed
        self.device = next(bundle.student.parameters()).device
        with torch.inference_mode():
            self.reference = bundle.codec.encode(reference[None, :, None].float())
            self.text = bundle.text([text])
            self.state = bundle.student.open(self.text.to(self.device))
        self.pending: tuple[Tensor, Conditions] | None = None  # the finished chunk that is not in the context yet
        self.chunk = 0
        self.samples = torch.zeros(0)
        self.dropped = 0  # samples in front of the buffer that nothing needs any more
        self.closed = False
        self.end_frame: int | None = None

    def push(self, audio: Tensor) -> None:
        """Append 16 kHz mono samples [S] in [-1, 1]."""
        if self.closed:
            raise UserError("push after close: this session takes no more audio; open another")
        if audio.ndim != 1 or not torch.isfinite(audio).all():
            raise UserError(
                f"audio must be finite samples [S]: got shape {tuple(audio.shape)}; mix down and clean it first"
            )
        self.samples = torch.cat([self.samples, audio.detach().float().cpu()])

    def close(self) -> None:
        """No more audio: what is left plays to its end, padded with silence to a whole chunk."""
        self.closed = True
        total = self.dropped + len(self.samples)
        self.end_frame = -(-total // self.spec.samples_per_frame)

    def ready(self) -> bool:
        """Whether the next chunk's audio is there (or the session is closed and the chunk begins before its end)."""
        start, stop = self.spec.pixel_frames(self.chunk)
        if self.end_frame is not None:
            return start < self.end_frame
        return self.dropped + len(self.samples) >= stop * self.spec.samples_per_frame + self.bundle.ears.margin

    def _conditions(self) -> Conditions:
        """The next chunk's conditions from the buffered audio."""
        spec, ears = self.spec, self.bundle.ears
        start, stop = spec.pixel_frames(self.chunk)
        per_frame = spec.samples_per_frame
        begin, end = start * per_frame - ears.margin, stop * per_frame + ears.margin
        window = self.samples[max(begin - self.dropped, 0) : end - self.dropped]
        left = torch.zeros(max(0, -begin))
        window = torch.cat([left, window])
        window = torch.nn.functional.pad(window, (0, end - begin - len(window)))
        rows = ears(torch.nn.functional.pad(window, (per_frame - ears.margin, 0)), 1, stop - start + 1)[None]
        stride = spec.codec.stride
        audio = pack_audio(rows, stride) if self.chunk == 0 else rows.unflatten(1, (-1, stride))
        return Conditions(text=self.text, audio=audio, reference=self.reference).to(self.device)

    def step(self) -> Chunk | None:
        """The next chunk, or None while its audio is not there: denoise, decode and hand over; the commit follows at the next
        step, off the first frame's path."""
        with torch.inference_mode():
            return self._step() if self.ready() else None

    def _step(self) -> Chunk:
        student, spec, index = self.bundle.student, self.spec, self.chunk
        clock = [time.perf_counter()]
        if self.pending is not None:
            self.state = student.commit(self.state, *self.pending)
        clock.append(time.perf_counter())
        conditions = self._conditions()
        clock.append(time.perf_counter())

        def noise(step: int) -> Tensor:
            return chunk_noise(spec, self.seed, index, step).to(self.device)

        x0 = denoise_chunk(student, self.state, conditions, noise, spec.sigmas)
        clock.append(time.perf_counter())
        pixels = self.bundle.codec.decode(x0, first=index == 0)
        frames = to_uint8(pixels)[0].permute(1, 2, 3, 0).cpu().contiguous()
        clock.append(time.perf_counter())
        self.pending = (x0, conditions)
        self.chunk += 1
        self._forget()
        parts = ("commit", "encode", "denoise", "decode")
        seconds = {name: b - a for name, a, b in zip(parts, clock[:-1], clock[1:], strict=True)}
        return Chunk(index, spec.pixel_frames(index)[0], frames, seconds)

    def _forget(self) -> None:
        """Drop audio that no later chunk hears."""
        keep_from = max(
            0, self.spec.pixel_frames(self.chunk)[0] * self.spec.samples_per_frame - self.bundle.ears.margin
        )
        drop = min(max(0, keep_from - self.dropped), len(self.samples))
        self.samples = self.samples[drop:].clone()
        self.dropped += drop

    def frames(self) -> Iterator[Chunk]:
        """Every chunk that the pushed audio allows."""
        while (chunk := self.step()) is not None:
            yield chunk

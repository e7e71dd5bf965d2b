"""The chunk-causal student: the teacher's network, its context a value.

Serving (`denoise`, `commit`) and training (`denoise_clip`) run the same blocks; who sees whom comes from one History.
A chunk's gradient never reaches earlier chunks through the context: `commit` runs without gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from students.spec import Spec
from teachers import flow
from teachers.conditions import Conditions
from teachers.wan import AvatarTransformer, KeyValue, Span, Time, rotate, to_x0, with_reference


@dataclass(frozen=True)
class State:
    """The context of a stream: per visible chunk the un-rotated keys and values of each block, and `past`, the same made ready
    (concatenated, keys rotated to their place in the window) for chunk number `chunk`. `text` and `times` are read once for all
    steps without gradient, which hear the text that `open` was given, whatever their conditions say: another text is another
    `open`."""

    chunk: int = 0
    kept: tuple[tuple[int, tuple[KeyValue, ...]], ...] = ()
    past: tuple[KeyValue, ...] | None = None
    past_frames: int = 0
    text: tuple[KeyValue, ...] | None = None  # cross-attention keys and values
    times: Mapping[float, Time] = field(default_factory=dict)  # of the spec's sigmas and the history's level


class CausalWan(nn.Module):
    """Student contract of the design: open, plan, denoise, commit, and denoise_clip for training."""

    def __init__(self, net: AvatarTransformer, spec: Spec):
        super().__init__()
        self.net, self.spec = net, spec

    def open(self, text: Tensor | None = None) -> State:
        """The empty context; the reference is frame 0 of chunk 0. Text features [B, L, D] are read once for the stream."""
        with torch.no_grad():
            like = next(self.parameters())
            times = {
                s: self.net.read_time(like.new_full((1, 1), s)) for s in (*self.spec.sigmas, self.spec.history.level)
            }
        return State(text=None if text is None else self.net.read_text(text), times=times)

    def plan(self, state: State, conditions: Conditions) -> None:
        """A diffusion transformer plans nothing."""

    def _known(self, chunk: int) -> tuple[int, ...]:
        return (0,) if chunk == 0 else ()

    def forward(self, state: State, x: Tensor, sigma: Tensor | float, conditions: Conditions):
        known = self._known(state.chunk)
        x, inputs = with_reference(x, conditions, known)
        # A step with gradient reads text and time itself: what was read without gradient would cut those layers off.
        grad = torch.is_grad_enabled()
        text = conditions.text if state.text is None or grad else state.text
        level = sigma if isinstance(sigma, Tensor) else torch.full((x.shape[0],), sigma, device=x.device, dtype=x.dtype)
        time = level if grad or isinstance(sigma, Tensor) else state.times.get(sigma, level)
        out, cache = self.net(inputs, time, text, conditions.audio, past=state.past, past_frames=state.past_frames)
        return to_x0(out, x, level, conditions, self.net.config.prediction, known), cache

    def denoise(self, state: State, plan: None, x: Tensor, sigma: Tensor | float, conditions: Conditions) -> Tensor:
        """x [B, C, n, H, W] of the state's chunk at sigma ([B], or one number) -> x0; conditions are those of its frames."""
        return self(state, x, sigma, conditions)[0]

    @torch.no_grad()
    def commit(self, state: State, x0: Tensor, conditions: Conditions) -> State:
        """Put a finished chunk into the context at the history's level and return the state of the next chunk."""
        _, cache = self(state, x0.detach(), self.spec.history.level, conditions)
        chunk = state.chunk + 1
        see = self.spec.history.visible(chunk)
        kept = tuple(item for item in (*state.kept, (state.chunk, tuple(cache))) if item[0] in see)
        return self._ready(replace(state, chunk=chunk, kept=kept))

    def _ready(self, state: State) -> State:
        if not state.kept:
            return replace(state, past=None, past_frames=0)
        _, height, width = self.spec.latent_size
        patch, frames = self.net.config.patch, self.spec.chunk_frames * len(state.kept)
        turns = self.net.turns(0, frames, height // patch, width // patch)
        past = []
        for block in range(len(self.net.blocks)):
            keys = torch.cat([cache[block][0] for _, cache in state.kept], dim=1)
            values = torch.cat([cache[block][1] for _, cache in state.kept], dim=1)
            past.append((rotate(keys, turns), values))
        return replace(state, past=tuple(past), past_frames=frames)

    def denoise_clip(self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None) -> Tensor:
        """All chunks at once, for training: x [B, C, F, H, W], sigma [B, num_chunks] -> x0.

        With `clean` each chunk sees the clean earlier chunks (teacher forcing), as a stream does; without it the noisy ones
        (diffusion forcing).
        """
        n, frames = self.spec.chunk_frames, x.shape[2]
        if frames % n:
            raise ValueError(f"a clip needs a whole number of chunks: got {frames} latent frames with chunk_frames={n}")
        chunks = frames // n
        shown = sigma.repeat_interleave(n, dim=1)
        x, inputs = with_reference(x, conditions)
        audio, spans = conditions.audio, []
        see = [tuple((j * n, (j + 1) * n) for j in self.spec.history.visible(i)) for i in range(chunks)]
        offset = 0
        if clean is not None:
            _, context = with_reference(clean, conditions)
            inputs = torch.cat([context, inputs], dim=2)
            audio = torch.cat([audio, audio], dim=1)
            level = torch.full_like(shown, self.spec.history.level)
            spans = [Span(i * n, (i + 1) * n, see[i]) for i in range(chunks)]
            shown, offset = torch.cat([level, shown], dim=1), frames
        spans += [Span(offset + i * n, offset + (i + 1) * n, see[i]) for i in range(chunks)]
        out, _ = self.net(inputs, shown, conditions.text, audio, spans=spans)
        out = out[:, :, offset:]
        return to_x0(out, x, sigma.repeat_interleave(n, dim=1), conditions, self.net.config.prediction, (0,))


def denoise_chunk(student, state, conditions: Conditions, noise, sigmas, exit_step: int | None = None) -> Tensor:
    """The step that serving iterates and training folds: K denoising steps of one chunk, fresh noise between them.

    noise(i) [B, C, n, H, W] is the noise of step i; x0 is re-noised to the next sigma (the stochastic few-step sampler of
    Self Forcing). Only the step `exit_step` (default the last) runs with gradient, and its x0 is returned.
    """
    last = len(sigmas) - 1 if exit_step is None else exit_step
    plan = student.plan(state, conditions)
    x = noise(0)
    for i in range(last + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
            x0 = student.denoise(state, plan, x, sigmas[i], conditions)
        if i < last:
            x = flow.add_noise(x0, noise(i + 1), sigmas[i + 1])
    return x0

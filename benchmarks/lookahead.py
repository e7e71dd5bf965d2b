"""How far a stream's wav2vec2 features are from those of the whole clip, by look-ahead: `deviation_table(audio_encoder, audio)`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.encoders.small import SAMPLE_RATE
from teachers.encoders.wav2vec import Wav2Vec


@torch.no_grad()
def deviation_table(
    audio_encoder: Wav2Vec, audio: Float[Tensor, " samples"], lookaheads: Sequence[int] = (0, 2, 4, 8, 16, 32)
) -> str:
    """Markdown: distance of a stream's rows from `whole` for some look-aheads in frames; audio [S], all else as in `audio_encoder`.

    Relative L2 of a row is |streamed - whole| / |whole|; against the spread, the same over |whole - its mean row|,
    which excludes what all rows have in common. The last line is a reference: whole's own rows half a clip away.
    """
    num_frames = -(-audio.shape[-1] // audio_encoder.samples_per_frame)
    whole = audio_encoder.whole(audio, num_frames)
    spread = (whole - whole.mean(dim=0)).norm(dim=-1)
    lines = [
        "| look-ahead | relative L2: mean | worst row | cosine: mean | worst row | against the spread: mean |",
        "|---|---|---|---|---|---|",
    ]

    def add(name: str, rows: Tensor) -> None:
        distance = (rows - whole).norm(dim=-1)
        relative = distance / whole.norm(dim=-1)
        cosine = nn.functional.cosine_similarity(rows, whole, dim=-1)
        numbers = f"{relative.mean():.3f} | {relative.max():.3f} | {cosine.mean():.4f} | {cosine.min():.4f}"
        lines.append(f"| {name} | {numbers} | {(distance / spread).mean():.2f} |")

    for frames in lookaheads:
        config = replace(audio_encoder.config, lookahead_frames=frames)
        streamed = Wav2Vec(audio_encoder.model, config, audio_encoder.samples_per_frame, audio_encoder.normalise)
        milliseconds = 1000 * frames * audio_encoder.samples_per_frame / SAMPLE_RATE
        add(f"{frames} frames, {milliseconds:.0f} ms", streamed(audio, 0, num_frames))
    add("(another row)", whole.roll(num_frames // 2, dims=0))
    return "\n".join(lines)

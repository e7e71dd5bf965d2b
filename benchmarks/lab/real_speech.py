"""How well the mouth of a student of the drawn world follows recordings of real speech.

    python benchmarks/lab/real_speech.py RUN --audio WAV ... [--image docs/portrait.png] [--text "a person talks"] [--seeds 0 1 2]
        [--normalise]

RUN is a finished run: its student draws a video of each recording, whose mouth its extractors read. It is compared with two
signals of the sound: its loudness in dB, at -50 at least, and the opening that the audio probe predicts from
it. A row for each recording and seed: the correlation at offset 0, and the offset in frames at which it is greatest (positive: the
mouth is late). With --normalise each band of a recording's features is brought to the mean and the deviation that it has in the
world's own sound, over the whole recording (cepstral mean and variance normalisation). A script, not a test; it writes nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.recipe import load_recipe
from eval.embedded.extractors import Probes
from eval.metrics.sync import correlation
from eval.report.tables import grid
from students import AvatarPipeline
from teachers import media
from teachers.encoders.small import LogMel, Rows

QUIET = -50.0  # dB
MAX_LAG = 4  # frames
WORLD_CLIPS = 96  # whose sound the moments are taken from


def padded(sound: Tensor, length: int) -> Tensor:
    """The first `length` samples of sound [S], silence behind its end."""
    return torch.nn.functional.pad(sound, (0, max(0, length - len(sound))))[:length]


def loudness(sound: Tensor) -> Tensor:
    """dB of the RMS of each frame's samples, of sound [T, n]: [T], QUIET at least."""
    return (10 * sound.double().square().mean(1).clamp_min(1e-12).log10()).clamp_min(QUIET)


def follows(opening: Tensor, signal: Tensor) -> tuple[float, int]:
    """r of a mouth's opening [T] and a signal [T] at offset 0, and the offset in frames, positive where the mouth is late, at which
    it is greatest. Frame 0, the given portrait, does not count."""
    opening, signal = opening[1:], signal[1:]
    count = len(opening)
    at = {
        lag: correlation(opening[max(lag, 0) : count + min(lag, 0)], signal[max(-lag, 0) : count - max(lag, 0)])
        for lag in range(-MAX_LAG, MAX_LAG + 1)
    }
    return at[0], max(sorted(at, key=abs), key=lambda lag: at[lag])


def moments(rows: Tensor, bands: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [bands] of each band of log-mel rows [.., A]."""
    columns = rows.unflatten(-1, (-1, bands)).flatten(0, -2)
    return columns.mean(0), columns.std(0)


class Normalised(Rows):
    """A log-mel encoder whose bands, which have the moments `own` in a recording, have the moments `wanted`."""

    def __init__(self, encoder: LogMel, own: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]):
        super().__init__(encoder.samples_per_frame)
        self.encoder, self.own, self.wanted = encoder, own, wanted
        self.dim, self.lookback, self.lookahead = encoder.dim, encoder.lookback, encoder.lookahead

    def rows(self, window: Tensor, first: int, last: int) -> Tensor:
        (mean, std), (wanted_mean, wanted_std) = self.own, self.wanted
        bands = self.encoder.rows(window, first, last).unflatten(-1, (-1, len(mean)))
        return ((bands - mean) / std.clamp_min(1e-3) * wanted_std + wanted_mean).flatten(-2)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--audio", type=Path, nargs="+", required=True)
    parser.add_argument("--image", type=Path, default=Path("docs/portrait.png"))
    parser.add_argument("--text", default="a person talks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--normalise", action="store_true", help="the bands of each recording's features")
    args = parser.parse_args(words)
    pipe = AvatarPipeline.from_pretrained(args.run / "student")
    probes, per_frame = Probes.load(args.run / "stages" / "extractors"), pipe.bundle.spec.samples_per_frame
    as_made, lines = pipe.audio_encoder, []
    if args.normalise:
        world = load_recipe(args.run / "recipe.yaml").data.open().draw(0, "speech", WORLD_CLIPS)
        wanted = moments(as_made(world.voice), as_made.config.num_mels)
    for file in args.audio:
        sound = media.read_audio(file)
        if args.normalise:
            pipe.audio_encoder = Normalised(as_made, moments(as_made(sound), as_made.config.num_mels), wanted)
        for seed in args.seeds:
            generator = torch.Generator().manual_seed(seed)
            picture = Image.open(args.image)
            film = pipe(image=picture, audio=sound, prompt=args.text, generator=generator, output_type="pt")
            video = torch.as_tensor(film.frames)  # [T, H, W, 3]
            mouth = probes.read(video.permute(3, 0, 1, 2)[None]).mouth[0, :, 0]
            whole = padded(sound, len(video) * per_frame)
            predicted = probes.mouth_from_audio(pipe.audio_encoder(whole)[None])[0, :, 0]
            signals = (loudness(whole.unflatten(0, (len(video), -1))), predicted)
            cells = [f"{r:.3f} at 0, best at {lag}" for r, lag in (follows(mouth, signal) for signal in signals)]
            lines.append([file.name, str(seed), str(len(video)), *cells])
    print("\n".join(grid(["recording", "seed", "frames", "loudness", "opening predicted from the sound"], lines)))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())

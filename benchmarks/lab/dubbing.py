"""How well a student of the drawn world dubs: clips whose lower face it draws to the sound of other clips.

    python benchmarks/lab/dubbing.py RUN [--clips 64] [--region 0.2 0.5 0.8 1] [--out DIR]

RUN is a finished run with its student and extractors; clips are drawn anew, each with the sound of the next. A row for each: the
film itself, dubbed, and drawn freely from its first frame. `new` and `old`: pooled correlation of the mouth with that of the new
and of the film's own sound (eval.metrics.sync); `place`: of the head's with the film's; `identity`: distance of each
frame's from the film's (extractors); `edge`: mean step of grey levels over the region's border. With --out the first four films
side by side: the film, dubbed, drawn freely.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.recipe import load_recipe
from eval.embedded.extractors import Probes, Reading
from eval.metrics.sync import correlation, mouth_sync
from eval.report.tables import grid
from students import Session, load_student
from students.weights.checkpoint import Bundle
from teachers import media

COLUMNS = ("new", "old", "place", "identity", "edge")


def drawn(bundle: Bundle, film: Tensor, sound: Tensor, text: str, region: Tensor | None) -> Tensor:
    """Frames uint8 [T, H, W, 3] to a sound [S], of the film [T, H, W, 3] outside the region, or of its first frame alone."""
    first = film[0].permute(2, 0, 1) / 127.5 - 1
    session = Session(bundle, first, text, drop=("pose",), film=region is not None)
    session.push(sound)
    if region is not None:
        session.push(film=film, region=region)
    session.close()
    return torch.cat([chunk.frames for chunk in session.frames()])[: len(film)]


def edge(video: Tensor, region: Tensor) -> float:
    """Mean absolute step of levels over the region's upper border and its sides, of video [N, 3, T, H, W]."""
    height, width = video.shape[-2:]
    left, top, right = (
        round(float(region[0]) * width),
        round(float(region[1]) * height),
        round(float(region[2]) * width),
    )
    x = video.float()
    steps = [(x[..., top, left:right] - x[..., top - 1, left:right]).abs().mean()]
    steps += [(x[..., top:, at] - x[..., top:, at - 1]).abs().mean() for at in (left, right) if 0 < at < width]
    return float(torch.stack(steps).mean())


def row(probes: Probes, video: Tensor, real: Reading, sounds: tuple[Tensor, Tensor], region: Tensor) -> list[float]:
    """`COLUMNS` of a video [N, 3, T, H, W]; `real` is the film's reading, `sounds` the mouths [N, T, 2] of new and old sound."""
    seen = probes.read(video)
    place = [
        correlation(seen.labels[name][:, 1:].flatten(), real.labels[name][:, 1:].flatten())
        for name in ("head_x", "head_y")
    ]
    apart = (seen.identity - real.identity).norm(dim=-1).mean() / real.identity.norm(dim=-1).mean()
    return [
        *(mouth_sync(seen.mouth, sound)["sync"] for sound in sounds),
        sum(place) / 2,
        float(apart),
        edge(video, region),
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--region", type=float, nargs=4, default=[0.2, 0.5, 0.8, 1.0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    recipe, bundle = load_recipe(args.run / "recipe.yaml"), load_student(args.run / "student")
    probes, region = Probes.load(args.run / "stages" / "extractors"), torch.tensor(args.region)
    clips = recipe.data.open().draw(recipe.eval.condition_seed, "dubbing", args.clips)
    films, sounds = clips.video.permute(0, 2, 3, 4, 1), clips.voice.roll(1, 0)
    length = films.shape[1] * bundle.spec.samples_per_frame
    predicted = [
        probes.mouth_from_audio(torch.stack([bundle.audio_encoder(one[:length]) for one in each]))
        for each in (sounds, clips.voice)
    ]
    real, table, videos = probes.read(clips.video), [], {"the film": clips.video}
    for name, where in (("dubbed", region), ("drawn freely", None)):
        made = [drawn(bundle, *given, where) for given in zip(films, sounds, clips.text, strict=True)]
        videos[name] = torch.stack(made).permute(0, 4, 1, 2, 3)
    for name, video in videos.items():
        table.append(
            [name, *(f"{value:.3f}" for value in row(probes, video, real, (predicted[0], predicted[1]), region))]
        )
    print("\n".join(grid(["", *COLUMNS], table)))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for i in range(min(4, args.clips)):
            side = torch.cat([video[i].permute(1, 2, 3, 0) for video in videos.values()], dim=2)
            media.write_video(args.out / f"{i}.mp4", side, bundle.spec.fps, sounds[i], upscale=4)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())

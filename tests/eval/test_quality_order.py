"""Known damage to clips of the embedded world: each kind moves the measures that are for it, the right way.

`python -m pytest -s tests/eval/test_quality_order.py` prints the table. Features are of small random networks and of two
linear towers fitted here: the numbers compare with nothing else.
"""

import io
from dataclasses import dataclass
from functools import partial

import av
import pytest
import torch
from torch.nn import functional as F

from distill.data.procedural import render
from distill.data.source import Clips
from eval.embedded.extractors import blur
from eval.frechet import frechet_distance
from eval.metrics.lip_sync import sync_scores
from eval.metrics.motion import sharpness_energies
from eval.metrics.quality import failure_rates, flickers, measure, slope, window_colour
from eval.metrics.seam import seam_jump
from eval.mfcc import mfcc, to_int16
from eval.networks.syncnet import windows_of
from tests.support.tiny import FRAME_LABELS, rng

pytestmark = pytest.mark.slow

FRAMES, CHUNK, NUM = 60, 12, 16
WORLD = render.WorldConfig(resolution=32, fps="25", num_frames=FRAMES)
COLUMNS = (
    *("fid", "fvd", "sync_c", "sync_d", "distance_at_zero", "offset_frames", "motion_energy", "flicker", "sharpness"),
    *("black", "frozen", "flash", "seam", "colour_slope"),
)


class LinearTowers:
    """Lips and sound -> the mouth's opening and width in 5 frames, by ridge regression on clips with known mouths."""

    def __init__(self, clips: Clips):
        mouth = torch.stack([clips.labels[name] for name in ("mouth_open", "mouth_width")], dim=2).double()
        self.mean, self.std = mouth.mean((0, 1)), mouth.std((0, 1))
        mouth = (mouth - self.mean) / self.std
        seen = torch.cat([self._pixels(clip.transpose(0, 1)) for clip in clips.video])
        self.lips = self._fit(seen, mouth.flatten(0, 1), 1.0)
        num = windows_of(FRAMES, FRAMES * 640)
        from_audio = torch.cat([self._sound(mfcc(to_int16(sound)), num) for sound in clips.audio])
        spoken = torch.cat([x.unfold(0, 5, 1)[:num].flatten(1) for x in mouth])
        self.audio_encoder = self._fit(from_audio, spoken, 30.0)

    @staticmethod
    def _pixels(faces: torch.Tensor) -> torch.Tensor:
        small = (faces[:, :, 15:31, 6:26].double() / 255).mean(1).flatten(1)
        return F.pad(small - small.mean(1, keepdim=True), (0, 1), value=1.0)

    @staticmethod
    def _sound(rows: torch.Tensor, num: int) -> torch.Tensor:
        windows = rows.unfold(0, 20, 4)[:num].flatten(1)
        return F.pad((windows - windows.mean(0)) / 10, (0, 1), value=1.0)

    @staticmethod
    def _fit(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
        return torch.linalg.solve(x.mT @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y)

    def features(self, faces, rows, num_windows):
        lips = (self._pixels(faces) @ self.lips).unfold(0, 5, 1)[:num_windows].flatten(1)
        return lips, self._sound(rows, num_windows) @ self.audio_encoder


class RandomFeatures:
    """Frames and clips through two fixed random convolutions."""

    def __init__(self):
        self.first, self.second = (
            torch.randn(shape, generator=rng(9)) / 5 for shape in ((16, 3, 5, 5), (24, 16, 3, 3))
        )

    def __call__(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> frames [N, T, 24], clips [N, 48] (what is seen, and how unsteadily it changes)."""
        flat = video.float().div(127.5).sub(1).transpose(1, 2).flatten(0, 1)
        maps = F.conv2d(F.conv2d(flat, self.first, stride=2).relu(), self.second, stride=2).relu()
        frames = maps.mean((2, 3)).unflatten(0, video.shape[:1] + video.shape[2:3])
        return frames, torch.cat((frames.mean(1), frames.diff(n=2, dim=1).abs().mean(1)), dim=1)


@dataclass(frozen=True)
class Scene:
    video: torch.Tensor
    still_mouth: torch.Tensor
    audio: torch.Tensor
    real: tuple[torch.Tensor, torch.Tensor]
    features: RandomFeatures
    towers: LinearTowers


def conditions(num: int, generator: torch.Generator) -> render.SceneParameters:
    """Of one framing, as linear towers read the mouth at fixed places, and one hair, so that motion stands out."""
    asked = render.draw_conditions(WORLD, num, generator)
    asked.identity[:, 7:10] = 0.5
    asked.identity[:, 22] = 0.3
    return asked


@pytest.fixture(scope="module")
def scene() -> Scene:
    towers = LinearTowers(render.make_clips(WORLD, conditions(32, rng(1)), rng(2)))
    asked = conditions(NUM, rng(3))
    clips = render.make_clips(WORLD, asked, rng(4))
    held = {name: clips.labels[name] for name in FRAME_LABELS}
    held |= {name: torch.full((NUM, FRAMES), value) for name, value in (("mouth_open", 0.2), ("mouth_width", 0.5))}
    features = RandomFeatures()
    real = features(render.make_clips(WORLD, asked, rng(5)).video)  # the same people and words, moving otherwise
    return Scene(clips.video, render.render(WORLD.size, asked.identity, held), clips.audio, real, features, towers)


def h264(video: torch.Tensor, crf: int, scale: int = 4) -> torch.Tensor:
    """Each clip, enlarged (x264 does not repeat itself on tiny pictures), through libx264 in memory and back."""
    large = video.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    decoded = torch.stack([_h264(clip, crf) for clip in large]).float()
    return F.avg_pool3d(decoded, (1, scale, scale)).round().to(torch.uint8)


def _h264(clip: torch.Tensor, crf: int) -> torch.Tensor:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[2], clip.shape[3], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in clip.permute(1, 2, 3, 0).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(3, 0, 1, 2)


def black(video: torch.Tensor) -> torch.Tensor:
    out = video.clone()
    out[:, :, [17, 18, 41]] = 0
    return out


def blurred(video: torch.Tensor) -> torch.Tensor:
    return blur(video.float().flatten(1, 2)).round().to(torch.uint8).unflatten(1, (3, FRAMES))


def dropped(video: torch.Tensor) -> torch.Tensor:
    """Every third frame is lost and the one before it is shown again."""
    index = torch.arange(FRAMES)
    return video[:, :, torch.where(index % 3 == 2, index - 1, index)]


def shortened(video: torch.Tensor) -> torch.Tensor:
    """Every third frame is lost and the film is shorter for it."""
    return video[:, :, torch.arange(FRAMES) % 3 != 2]


def shuffled(video: torch.Tensor) -> torch.Tensor:
    return video[:, :, torch.randperm(FRAMES, generator=rng(6))]


def times(video: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return (video.float() * gain).clamp(0, 255).round().to(torch.uint8)


def drifting(video: torch.Tensor) -> torch.Tensor:
    """Red grows by 30 percent along the clip, blue falls by 30."""
    ramp = torch.linspace(0, 0.3, FRAMES)
    return times(video, torch.stack((1 + ramp, torch.ones(FRAMES), 1 - ramp))[:, :, None, None])


def flickering(video: torch.Tensor) -> torch.Tensor:
    return times(video, (1 + 0.04 * (-1.0) ** torch.arange(FRAMES))[:, None, None])


def seamed(video: torch.Tensor) -> torch.Tensor:
    """Every other chunk is 6 percent darker."""
    return times(video, (1 - 0.06 * (torch.arange(FRAMES) // CHUNK % 2))[:, None, None])


def late(audio: torch.Tensor, num_frames: int = 3) -> torch.Tensor:
    return F.pad(audio, (num_frames * 640, 0))[:, : audio.shape[1]]


def swapped(audio: torch.Tensor) -> torch.Tensor:
    return audio.roll(1, 0)


PICTURES = {
    "frozen mouth": None,
    "black frames (3 of 60)": black,
    "blur": blurred,
    "H.264 at crf 48": partial(h264, crf=48),
    "dropped frames (every third, held)": dropped,
    "dropped frames (every third, shorter)": shortened,
    "shuffled frames": shuffled,
    "colour drift": drifting,
    "flicker (4 %)": flickering,
    "seams (6 %)": seamed,
}
SOUNDS = {"sound 3 frames late": late, "sound of another clip": swapped}

WORSE = {  # what each damage must do, against the ground truth: + more, - less
    "frozen mouth": "fid+ fvd+ sync_c- distance_at_zero+ motion_energy-",
    "black frames (3 of 60)": "fid+ fvd+ black+ flash+ motion_energy+ flicker+",
    "blur": "fid+ fvd+ sharpness-",
    "H.264 at crf 48": "fid+ fvd+ sharpness- sync_c- sync_d+",
    "dropped frames (every third, held)": "fvd+ frozen+ flicker+",
    "dropped frames (every third, shorter)": "fvd+ motion_energy+ sync_c- sync_d+ distance_at_zero+",
    "shuffled frames": "fvd+ motion_energy+ flicker+ sync_c- sync_d+ distance_at_zero+",
    "colour drift": "fid+ fvd+ colour_slope+",
    "flicker (4 %)": "fvd+ flicker+ motion_energy+",
    "seams (6 %)": "fvd+ seam+",
    "sound 3 frames late": "distance_at_zero+ offset_frames-",
    "sound of another clip": "sync_c- sync_d+ distance_at_zero+",
}


def sync(scene: Scene, video: torch.Tensor, audio: torch.Tensor) -> dict[str, float]:
    num = windows_of(video.shape[2], audio.shape[1])
    rows = [
        sync_scores(*scene.towers.features(clip.transpose(0, 1), mfcc(to_int16(sound)), num))
        for clip, sound in zip(video, audio, strict=True)
    ]
    names = ("sync_c", "sync_d", "distance_at_zero")
    means = {name: sum(getattr(row, name) for row in rows) / len(rows) for name in names}
    return means | {"offset_frames": float(torch.tensor([row.offset_frames for row in rows]).median())}


def score(scene: Scene, video: torch.Tensor, audio: torch.Tensor) -> dict[str, float]:
    seen, moving = scene.features(video)
    return {
        "fid": frechet_distance(seen, scene.real[0]),
        "fvd": frechet_distance(moving, scene.real[1]),
        **sync(scene, video, audio),
        **measures(video),
    }


def measures(video: torch.Tensor) -> dict[str, float]:
    """What needs no network."""
    frames = measure(video)
    drift = window_colour(frames, CHUNK).mean(0).tolist()
    return {
        "motion_energy": float(frames.change.mean()),
        "flicker": float(flickers(frames).mean()),
        "sharpness": float(sharpness_energies(video).mean()),
        **{name: float(rate.mean()) for name, rate in failure_rates(frames).items()},
        "seam": seam_jump(frames, list(range(CHUNK, video.shape[2], CHUNK)))[0],
        "colour_slope": slope(drift),
    }


def table_of(rows: dict[str, dict[str, float]]) -> str:
    """The table as markdown."""
    lines = ["| damage | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:.3g}" for column in COLUMNS) + " |" for name, row in rows.items()
    ]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def table(scene: Scene) -> dict[str, dict[str, float]]:
    rows = {"ground truth": score(scene, scene.video, scene.audio)}
    for name, damage in PICTURES.items():
        video = scene.still_mouth if damage is None else damage(scene.video)
        rows[name] = score(scene, video, scene.audio)
    for name, damage in SOUNDS.items():
        rows[name] = rows["ground truth"] | sync(scene, scene.video, damage(scene.audio))
    print("\n" + table_of(rows))
    return rows


@pytest.mark.parametrize("damage", WORSE)
def test_damage_moves_the_measures_that_are_for_it(table, damage: str):
    truth, row = table["ground truth"], table[damage]
    for expected in WORSE[damage].split():
        name, sign = expected[:-1], 1 if expected[-1] == "+" else -1
        change = sign * (row[name] - truth[name])
        assert change > max(0.05 * abs(truth[name]), 1e-3), f"{damage}: {name} {truth[name]:.4g} -> {row[name]:.4g}"


def test_measures_stay_where_they_are_not_meant(table):
    truth = table["ground truth"]
    for name in ("black", "flash", "frozen"):
        assert truth[name] < 0.02, name  # a face may rest for a moment
    assert table["shuffled frames"]["fid"] == pytest.approx(truth["fid"], rel=1e-6)
    assert table["shuffled frames"]["sharpness"] == pytest.approx(truth["sharpness"], rel=0.05)
    assert table["seams (6 %)"]["flicker"] < 2 * truth["flicker"] < table["flicker (4 %)"]["flicker"]
    assert table["colour drift"]["seam"] == pytest.approx(truth["seam"], rel=0.1)
    late = table["sound 3 frames late"]
    assert late["offset_frames"] == truth["offset_frames"] - 3 == -3
    assert late["sync_c"] == pytest.approx(truth["sync_c"], rel=0.15), "Sync-C ignores a constant offset"


def test_sync_orders_as_it_must(table):
    """In sync > late by 3 frames (at lag 0) and frozen and another's sound."""
    rows = ("ground truth", "sound 3 frames late", "sound of another clip")
    scores = [table[name]["sync_c"] for name in rows]
    assert scores[0] >= 0.9 * scores[1] > 1.5 * scores[2]
    assert table["frozen mouth"]["sync_c"] < 0.5 * scores[0]

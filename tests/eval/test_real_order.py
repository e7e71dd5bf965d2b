"""Known damage to two real talking films: what each kind moves, and whether sync finds what was done to the sound.

`AVATAR_DISTILL_REAL=DIR python -m pytest -s -n 0 tests/eval/test_real_order.py` prints the table; DIR holds talk_man_25fps.mp4 and
talk_woman_25fps.mp4. Features are random, and the two towers of sync are fitted to these very films: they stand for a trained
network and show that pictures, sound and lags meet, not that a network is good. The numbers compare with nothing else.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from torch.nn import functional as F

from eval.frechet import frechet_distance
from eval.metrics.lip_sync import sync_scores
from eval.mfcc import mfcc, to_int16
from eval.networks.syncnet import windows_of
from teachers.media.sound import read_audio
from tests.eval.test_quality_order import (
    FRAMES,
    RandomFeatures,
    black,
    blurred,
    drifting,
    dropped,
    h264,
    late,
    measures,
    seamed,
    shuffled,
    table_of,
)

FILMS = Path(os.environ.get("AVATAR_DISTILL_REAL", "-"))
SIDE, PARTS = 64, 16
FACES = {"man": (250, 150, 510), "woman": (430, 560, 380)}  # left, top, side in the film
MOUTHS = {"man": (20, 35, 30, 25), "woman": (7, 24, 44, 32)}  # left, top, width, height of 64 x 64
SAMPLES = 640  # a frame
pytestmark = pytest.mark.skipif(not FILMS.is_dir(), reason="AVATAR_DISTILL_REAL names no folder of films")


def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The face uint8 [T, 3, 64, 64] and the sound [S] of a film."""
    left, top, side = FACES[name]
    path, frames = FILMS / f"talk_{name}_25fps.mp4", []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))[top : top + side, left : left + side]
            frames.append(F.adaptive_avg_pool2d(pixels.permute(2, 0, 1).float(), SIDE).round().to(torch.uint8))
    return torch.stack(frames), read_audio(path)


def clips_of(film: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] -> [N, 3, 60, H, W]"""
    num = len(film) // FRAMES
    return film[: num * FRAMES].unflatten(0, (num, FRAMES)).transpose(1, 2)


class Towers:
    """Lips and sound -> the two directions in which they agree best in one film (canonical correlation of main components)."""

    def __init__(self, clips: torch.Tensor, sound: torch.Tensor, mouth: tuple[int, int, int, int]):
        self.mouth = mouth
        lips, audio = self._windows(clips, sound)
        (self.lips, x), (self.audio_encoder, y) = self._components(lips), self._components(audio)
        left, _, right = torch.linalg.svd(x.mT @ y)
        self.turn = left[:, :2], right.mT[:, :2]

    @staticmethod
    def _components(rows: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        mean = rows.mean(0)
        _, scale, parts = torch.linalg.svd(rows - mean, full_matrices=False)
        basis = parts[:PARTS].mT / scale[:PARTS] * len(rows) ** 0.5
        return (mean, basis), (rows - mean) @ basis

    def _windows(self, clips: torch.Tensor, sound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        film = clips.transpose(1, 2).flatten(0, 1)
        left, top, width, height = self.mouth
        seen = film[:, :, top : top + height, left : left + width].double().mean(1).flatten(1)
        num = windows_of(len(film), len(sound))
        rows = mfcc(to_int16(sound)).double().unfold(0, 20, 4)[:num].flatten(1)
        return seen.unfold(0, 5, 1)[:num].flatten(1), rows

    def scores(self, clips: torch.Tensor, sound: torch.Tensor) -> dict[str, float]:
        rows = zip(self._windows(clips, sound), (self.lips, self.audio_encoder), self.turn, strict=True)
        found = sync_scores(*((x - mean) @ basis @ turn for x, (mean, basis), turn in rows))
        return {name: getattr(found, name) for name in ("sync_c", "sync_d", "distance_at_zero", "offset_frames")}


@dataclass(frozen=True)
class Scene:
    clips: dict[str, torch.Tensor]
    sounds: dict[str, torch.Tensor]
    towers: dict[str, Towers]
    features: RandomFeatures
    real: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def scene() -> Scene:
    films = {name: read(name) for name in FACES}
    clips = {name: clips_of(film) for name, (film, _) in films.items()}
    sounds = {name: films[name][1][: len(clip) * FRAMES * SAMPLES] for name, clip in clips.items()}
    towers = {name: Towers(clip, sounds[name], MOUTHS[name]) for name, clip in clips.items()}
    features = RandomFeatures()
    others = torch.cat([clips_of(film[FRAMES // 2 :]) for film, _ in films.values()])  # half a clip later
    return Scene(clips, sounds, towers, features, features(others))


def held_mouth(clips: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mouth of each clip's first frame, all along it."""
    found = {}
    for name, video in clips.items():
        left, top, width, height = MOUTHS[name]
        found[name] = video.clone()
        part = (..., slice(top, top + height), slice(left, left + width))
        found[name][part] = video[:, :, :1][part]
    return found


PICTURES = {
    "frozen mouth": None,
    "black frames (3 of 60)": black,
    "blur": blurred,
    "H.264 at crf 48": partial(h264, crf=48),
    "every third frame lost, held": dropped,
    "shuffled frames": shuffled,
    "colour drift": drifting,
    "seams 6 %": seamed,
}
WORSE = {
    "frozen mouth": "fid+ fvd+ sync_c- sync_d+ distance_at_zero+ motion_energy-",
    "black frames (3 of 60)": "fid+ fvd+ black+ flash+ motion_energy+ flicker+",
    "blur": "fid+ fvd+ sharpness-",
    "H.264 at crf 48": "fid+ fvd+ sharpness- sync_d+",
    "every third frame lost, held": "frozen+ flicker+ seam+",  # FVD of random features hardly sees it
    "shuffled frames": "fvd+ motion_energy+ flicker+ sync_c- sync_d+ distance_at_zero+",
    "colour drift": "fid+ fvd+ colour_slope+",
    "seams 6 %": "fvd+ seam+",
    "sound 3 frames late": "distance_at_zero+",
    "sound of another clip": "sync_c- sync_d+ distance_at_zero+",
}


def sync(scene: Scene, clips: dict[str, torch.Tensor], sounds: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the two films."""
    rows = [scene.towers[name].scores(clips[name], sounds[name]) for name in clips]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@pytest.fixture(scope="module")
def table(scene: Scene) -> dict[str, dict[str, float]]:
    rows = {}
    for name, damage in {"ground truth": lambda x: x, **PICTURES}.items():
        clips = held_mouth(scene.clips) if damage is None else {key: damage(x) for key, x in scene.clips.items()}
        video = torch.cat(list(clips.values()))
        seen, moving = scene.features(video)
        distances = {"fid": frechet_distance(seen, scene.real[0]), "fvd": frechet_distance(moving, scene.real[1])}
        rows[name] = distances | sync(scene, clips, scene.sounds) | measures(video)
    man, woman = scene.sounds["man"], scene.sounds["woman"]
    others = {"man": torch.cat((woman, woman))[: len(man)], "woman": man[: len(woman)]}
    delayed = {name: late(sound[None])[0] for name, sound in scene.sounds.items()}
    for name, sounds in (("sound 3 frames late", delayed), ("sound of another clip", others)):
        rows[name] = rows["ground truth"] | sync(scene, scene.clips, sounds)
    print("\n" + table_of(rows))
    return rows


@pytest.mark.parametrize("damage", WORSE)
def test_damage_moves_the_measures_that_are_for_it(table, damage: str):
    truth, row = table["ground truth"], table[damage]
    for expected in WORSE[damage].split():
        name, sign = expected[:-1], 1 if expected[-1] == "+" else -1
        change = sign * (row[name] - truth[name])
        assert change > max(0.03 * abs(truth[name]), 1e-4), f"{damage}: {name} {truth[name]:.4g} -> {row[name]:.4g}"


def test_shuffled_frames_have_the_fid_of_the_truth(table):
    assert table["shuffled frames"]["fid"] == pytest.approx(table["ground truth"]["fid"], rel=1e-6)


@pytest.mark.parametrize("name", FACES)
def test_in_sync_is_better_than_late_and_than_another_sound_and_delays_are_found(scene, name: str):
    own, clips = scene.sounds[name], scene.clips[name]
    scores = {delay: scene.towers[name].scores(clips, late(own[None], delay)[0]) for delay in (0, 1, 3, 8)}
    already = scores[0]["offset_frames"]  # of the film itself
    assert abs(already) <= 1
    assert {delay: row["offset_frames"] - already for delay, row in scores.items()} == {0: 0, 1: -1, 3: -3, 8: -8}
    early = torch.cat((own[3 * SAMPLES :], torch.zeros(3 * SAMPLES)))
    assert scene.towers[name].scores(clips, early)["offset_frames"] - already == 3
    other = scene.sounds["man" if name == "woman" else "woman"]
    swapped = scene.towers[name].scores(clips, torch.cat((other, other))[: len(own)])
    assert scores[0]["distance_at_zero"] < scores[3]["distance_at_zero"] < 0.9 * swapped["distance_at_zero"]
    assert scores[3]["sync_c"] > 2 * swapped["sync_c"]

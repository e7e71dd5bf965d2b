"""Sets of clips to score, cards and untrained extractors for the tests of `distill eval`."""

import json
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
import yaml

from distill.cli import main
from distill.scoring.clip_io import write_clip
from eval.cards import Card, from_plain, load_card
from eval.embedded.extractors import AudioProbe, ClipProbe, FrameProbe, Probes
from eval.networks.loaded import Networks
from students.weights.checkpoint import save_student
from tests.eval.metrics.test_lip_sync import Code, coded
from tests.support.media.films import number_of
from tests.support.tiny import FRAME_LABELS, a_bundle, rng, some_sound

FPS = Fraction(25, 2)
FRAMES, SIDE = 15, 16


def a_clip(seed: int, frames: int = FRAMES, side: int = SIDE) -> torch.Tensor:
    """uint8 [3, T, H, W] that moves."""
    still = torch.rand(3, 1, side, side, generator=rng(seed, 1))
    moving = torch.rand(3, frames, side, side, generator=rng(seed, 2))
    return (255 * (0.7 * still + 0.3 * moving)).byte()


def a_set(folder: Path, names=("a", "b", "c", "d", "e"), seed: int = 0, frames: int = FRAMES, fps=FPS, **other) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        sound = some_sound(round(frames * 16000 / fps), number)
        clip = a_clip(seed + number, frames, other.get("side", SIDE))
        write_clip(folder / f"{name}.safetensors", clip, fps, sound, "a person nods")
    return folder


def a_card(path: Path, base: str = "strict", **changes) -> str:
    """A card as a file; changes are `key=value`, `clips__key=value` or `metric__key=value`."""
    values = load_card(base).plain()
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            (values if part == "clips" else values["metrics"])[part][name] = value
        else:
            values[part] = value
    path.write_text(yaml.safe_dump(values))
    return str(path)


def probes(folder: Path) -> Path:
    """Untrained extractors as a run keeps them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        labels = len(FRAME_LABELS)
        frame, clip, audio_probe = FrameProbe(labels, 4, 14), ClipProbe(labels, 4), AudioProbe(80)
    scales = {"label_mean": torch.zeros(labels), "label_std": torch.ones(labels)}
    scales |= {"audio_mean": torch.zeros(80), "audio_std": torch.ones(80)}
    Probes(frame, clip, audio_probe, tuple(FRAME_LABELS), scales).save(folder)
    return folder


def report_of(out: Path) -> dict:
    return json.loads((out / "eval.json").read_text())


def numbers(report: dict) -> dict:
    return {
        (row, name): score["mean"]
        for row, values in report["rows"].items()
        for name, score in values["metrics"].items()
        if score["mean"] is not None
    }


def evaluated(out: Path, *words) -> dict:
    assert main(["eval", "--out", str(out), *map(str, words)]) in (0, 3)
    return report_of(out)


def refused_in_one_line(capsys, out: Path, *words) -> str:
    """The one line of the error; the exit is 2 and no report is left."""
    capsys.readouterr()
    assert main(["eval", "--out", str(out), *map(str, words)]) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if "distill:" in line]
    assert len(message) == 1
    assert not list(out.glob("eval.*"))
    assert "Traceback" not in message[0]
    return message[0]


def a_run(folder: Path) -> Path:
    """A finished run: an untrained student and untrained extractors, of which sync was not admitted."""
    save_student(folder / "student", a_bundle(), "# card")
    probes(folder / "stages" / "extractors")
    admitted = dict.fromkeys(("fid", "kid", "fvd", "identity"), True) | {"sync": False}
    (folder / "stages" / "extractors" / "fingerprint.json").write_text(json.dumps({"metrics": {"admitted": admitted}}))
    return folder


class Frames(Networks):
    """Stand-ins of the published networks: small fixed functions of what they are given."""

    seen: list = []  # noqa: RUF012

    @cached_property
    def inception(self):
        class Network:
            @staticmethod
            def features(frames, batch_size, variant):
                del batch_size
                Frames.seen.append((tuple(frames.shape), variant))
                cells = torch.nn.functional.adaptive_avg_pool2d(frames.float() / 255, 2)
                return cells.flatten(1) * (1 if variant == "tf1" else 2)

        return Network()

    @cached_property
    def i3d(self):
        class Network:
            @staticmethod
            def features(videos, batch_size, variant):
                del batch_size
                Frames.seen.append((tuple(videos.shape), variant))
                return videos.float().div(255).mean((3, 4)).std(2) * (1 if variant == "stylegan_v" else 2)

        return Network()

    @cached_property
    def dinov2(self):
        class Network:
            @staticmethod
            def features(frames, batch_size):
                del batch_size
                return torch.nn.functional.adaptive_avg_pool2d(frames.float() / 255, 2).flatten(1)

        return Network()

    @cached_property
    def syncnet(self):
        return Code()


def films_with_sound(folder: Path, delays=(0, 2, -3, 0)) -> Path:
    """Films whose brightness and sound carry one code, FFV1 and 16-bit sound beside them."""
    folder.mkdir(parents=True)
    for number, delay in enumerate(delays):
        frames, samples = coded(delay, seed=3 + number)
        wide = torch.cat((frames, torch.zeros_like(frames)), 3)
        write_clip(folder / f"f{number}.safetensors", wide.transpose(0, 1), Fraction(25), samples / 32768)
    boxes = {f"f{number}": [6, 6, 18, 18] for number in range(len(delays))}
    (folder / "faces.json").write_text(json.dumps(boxes))
    return folder


def rule(**changes) -> Card:
    values = load_card("livetalk").plain()
    values["clips"] |= {"num": None, "frames": None, "fps": None, "size": None, "retime": "refuse", "fit": "refuse"}
    values["clips"] |= changes
    return from_plain(values)


def numbers_of(video: torch.Tensor) -> list[int]:
    return [number_of(frame.numpy()) for frame in video.permute(1, 2, 3, 0)]

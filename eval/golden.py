"""Golden numbers: do the published weights, read by our code, give what their authors print?

`distill doctor --golden` runs both checks and keeps the outcome beside the weights, with the sha256 of every file; a report of
`distill eval` shows it, and nothing where the files are others.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from eval.frechet import frechet_distance
from eval.metrics.lip_sync import MAX_LAG, LipSync, sync_scores
from eval.mfcc import mfcc, to_int16
from eval.networks.weights import REGISTRY, locate, weights_folder
from teachers.errors import UserError
from teachers.media.film import read_video
from teachers.media.sound import read_audio

FILE = "golden.json"
CHECKS = {"SyncNet example": "syncnet", "FVD vector": "i3d"}
"""Name -> the published network that it checks."""
SYNC_OFFSET, SYNC_D, SYNC_C, SYNC_WITHIN = 3, 5.353, 10.021, 0.02
"""README of joonson/syncnet_python, demo_syncnet.py on example.avi: offset, min dist, confidence."""
FVD, FVD_WITHIN = 151.25648, 1.0
"""README of JunyaoHu/common_metrics_on_video_quality: 8 videos of 30 frames of 64 x 64, all zeros against all ones, covariance over
N - 1, method "styleganv". That method reads `i3d_torchscript.pt` from the address in `eval.networks.weights`, but no public
source prints the sha256 of the file it used; the README allows 1 between versions of torch."""


@dataclass(frozen=True)
class Golden:
    """One check. `passed` is None where weights are missing; `found` says what was measured or what is missing."""

    name: str
    expected: str
    found: str
    passed: bool | None
    sha256: tuple[str, ...]


def run() -> list[Golden]:
    """Both checks, remembered beside the weights where that folder can be written."""
    results = [
        _check("SyncNet example", ("syncnet", "syncnet_example"), _syncnet),
        _check("FVD vector", ("i3d",), _fvd),
    ]
    done = [asdict(result) for result in results if result.passed is not None]
    if done:
        try:
            (weights_folder() / FILE).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        except OSError:
            return results  # weights may lie in a folder that is read only; then no report shows it
    return results


def remembered() -> dict[str, dict[str, Any]]:
    """Results of the last run, name -> expected, found, passed, for files that are those of `eval.networks.weights`; else empty."""
    try:
        rows = json.loads((weights_folder() / FILE).read_text(encoding="utf-8"))
        known = {weights.sha256 for weights in REGISTRY.values()}
        return {
            row["name"]: {key: row[key] for key in ("expected", "found", "passed")}
            for row in rows
            if set(row["sha256"]) <= known
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _check(name: str, weights: tuple[str, ...], measure: Callable[[], tuple[str, str, bool]]) -> Golden:
    for file in weights:
        try:
            locate(file)
        except UserError as error:
            return Golden(name, "", str(error), None, ())
    expected, found, passed = measure()
    return Golden(name, expected, found, passed, tuple(REGISTRY[file].sha256 for file in weights))


def _syncnet() -> tuple[str, str, bool]:
    """The example as the demo reads it: whole frames through JPEG of ffmpeg's default quality; and without JPEG, for comparison."""
    from eval.networks.syncnet import SyncNet

    path = locate("syncnet_example")
    frames, _ = read_video(path)
    sound, network = to_int16(read_audio(path)), SyncNet.load()
    published, ours = (_sync_of(network, video, sound) for video in (through_jpeg(frames), frames))
    passed = (
        published.offset_frames == SYNC_OFFSET
        and abs(published.sync_d - SYNC_D) <= SYNC_WITHIN
        and abs(published.sync_c - SYNC_C) <= SYNC_WITHIN
    )
    found = f"{_words(published)}; without JPEG {_words(ours)}"
    return f"{SYNC_OFFSET} / {SYNC_D} / {SYNC_C} within {SYNC_WITHIN}", found, passed


def _words(scores: LipSync) -> str:
    return f"{scores.offset_frames} / {scores.sync_d:.3f} / {scores.sync_c:.3f}"


def _sync_of(network: Any, frames: Tensor, sound: Tensor) -> LipSync:
    """Frames uint8 [T, 224, 224, 3] as they are: the example is a face crop already."""
    num_windows = min(len(frames), len(sound) // 640) - 5
    lip, audio = network.features(frames.permute(0, 3, 1, 2), mfcc(sound), num_windows)
    return sync_scores(lip, audio, MAX_LAG)


def through_jpeg(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] written and read as `ffmpeg -f image2` does without options: mjpeg 4:2:0 at 200 kbit/s, 25 fps."""
    height, width = frames.shape[1:3]
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.bit_rate, encoder.thread_count = 200_000, 1
    packets = []
    for number, pixels in enumerate(frames.numpy()):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format="yuvj420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    shown = []
    for packet in packets:
        decoder: Any = av.CodecContext.create("mjpeg", "r")
        shown += [frame.to_ndarray(format="rgb24") for frame in [*decoder.decode(packet), *decoder.decode(None)]]
    return torch.from_numpy(np.stack(shown))


def _fvd() -> tuple[str, str, bool]:
    from eval.networks.i3d import I3D

    network = I3D.load()
    zeros, ones = (
        network.features(torch.full((8, 3, 30, 64, 64), level, dtype=torch.uint8), variant="common_metrics")
        for level in (0, 255)
    )
    value = frechet_distance(zeros, ones, ddof=1)
    return f"{FVD:.3f} within {FVD_WITHIN:g}", f"{value:.3f}", math.isfinite(value) and abs(value - FVD) <= FVD_WITHIN

"""Scores of a clip's quality as a condition that need no model weights; higher is better in each.

None of them is a quality by itself: they order clips of one kind and detect broken ones; set thresholds by looking at the pages.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from distill.data.curate.face import Box, locate
from distill.data.curate.lips import mouth_motion, sync
from distill.data.prepare.page import spaced
from teachers.media.sound import SAMPLE_RATE

VERSION = 2  # of the formulas: scores of another version are computed again
SCORES = {
    "sharpness": "1 - the blur of Crete et al. 2007, median over the sampled frames",
    "exposure": "share of well-exposed light (Mertens et al. 2007), the worst sampled frame",
    "cleanness": "1 - the share of a block grid in the differences of neighbouring pixels",
    "resolution": "pixels of the source for one of the clip, across or down, the fewer; at most 1",
    "face": "confidence of the detected face; 1 where the user provides it",
    "face_size": "height of the face, brow to chin, as a fraction of the frame's",
    "face_centring": "1 - twice the distance of the face's middle from the frame's, across",
    "speech": "active share of the time (ITU-T P.56)",
    "speech_rhythm": "share of the loudness's variation at 2 to 8 Hz, the syllables",
    "sync": "correlation of the mouth's motion with the voice's, -1 to 1, at delays below the threshold of detection",
    "motion_text": "share of motion words among words of motion and of appearance",
}
SAMPLE_SECONDS = Fraction(1, 2)  # between the frames that are sampled at full resolution
NUM_FACE_FRAMES = 8  # of the sampled frames in which the face is searched, evenly spaced
SMALL_SIDE = 256  # short side of the frames that are kept for motion
GRID = 8  # pixels of the blocks of JPEG and MPEG
SILENCE_DBFS = -60.0  # an active level below it is silence
BLOCK_SECONDS = 0.005  # of the sound's envelope
SMOOTH_SECONDS, HANGOVER_SECONDS, MARGIN_DB = 0.03, 0.2, 15.9  # ITU-T P.56, method B
MOTION = """talk speak say said sing whisper shout chat smil laugh grin frown chuckl pout grimac smirk nod shak tilt turn lean bow
    sway rais lift lower mov motion gestur gesticulat wav point clap shrug reach blink wink squint glanc gaz look star open clos
    purs part breath sigh yawn walk step danc jump ris swing express animat energetic liv quick slow rhythmic"""
APPEARANCE = """wear wore dress cloth shirt sweater coat jacket suit tie scarf hat glass jewel earring hair beard mustach skin blond
    brunett bald tall slim young old elder beauti handsom attractiv black white red blue green grey gray brown pink yellow
    background wall room studio window sofa chair tabl kitchen garden tree sky photo photograph portrait imag pictur light colour
    color backdrop scen indoor outdoor"""
ENDING = "(?:[a-z]?(?:e|es|s|ed|d|ing|ingly|ly|y|ies|ied|ion|ions|ment|ments|ive|ively|ful|en))?"


@dataclass
class FrameStatistics:
    """What scoring accumulates over a clip's frames."""

    small: list[Tensor] = field(default_factory=list)  # uint8 [h, w], every frame
    colour: list[Tensor] = field(default_factory=list)  # uint8 [h, w, 3], the sampled frames
    sharp: list[float] = field(default_factory=list)
    light: list[float] = field(default_factory=list)
    profiles: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def score(
    frames: Iterable[np.ndarray],
    fps: Fraction,
    sound: np.ndarray | None,
    text: str,
    scale: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1)),
    box: Box | None = None,
) -> tuple[dict[str, Any], UInt8[Tensor, "h w 3"]]:
    """Scores by name, with `sync_offset_ms` and `face_box`, and a representative frame, uint8 [h, w, 3].

    frames: uint8 [H, W, 3] each; sound: float32 [S] at 16 kHz, None without; box: the face where it is known
    scale: pixels of the clip for one of its source, across and down. A score that has nothing to measure is None.
    Raises ValueError for a clip without frames.
    """
    statistics = _frame_statistics(frames, fps)
    small = torch.stack(statistics.small)
    motion = sum(((b.float() - a.float()).abs() for a, b in pairwise(small)), torch.zeros(()))
    change = (motion / max(1, len(small) - 1)).expand(small.shape[1:])
    box = box or locate(torch.stack(spaced(statistics.colour, NUM_FACE_FRAMES)), change)
    scores: dict[str, Any] = dict.fromkeys(SCORES)
    scores["sharpness"] = float(np.median(statistics.sharp))
    scores["exposure"] = min(statistics.light)
    profiles = [torch.stack(profile).mean(0) for profile in zip(*statistics.profiles, strict=True)]
    scores["cleanness"] = 1 - max(
        blockiness(profile, GRID * factor)
        for profile, own in zip(profiles, scale, strict=True)
        for factor in {1.0, float(own)}
    )
    scores["resolution"] = float(min(1, *(1 / factor for factor in scale)))
    scores["face"], scores["face_box"] = 0.0, None
    if box is not None:
        scores["face"], scores["face_box"] = box.confidence, [box.x, box.y, box.width, box.height]
        scores["face_size"] = box.height
        scores["face_centring"] = max(0.0, 1 - 2 * abs(box.x + box.width / 2 - 0.5))
    samples = np.zeros(0, np.float32) if sound is None else sound
    scores["speech"], scores["speech_rhythm"] = speech_activity(samples), speech_rhythm(samples)
    scores["sync"], scores["sync_offset_ms"] = None, None
    if box is not None and sound is not None:
        scores["sync"], scores["sync_offset_ms"] = sync(mouth_motion(small, box), sound, fps)
    scores["motion_text"] = motion_text(text)
    return scores, statistics.colour[len(statistics.colour) // 2]


def _frame_statistics(frames: Iterable[np.ndarray], fps: Fraction) -> FrameStatistics:
    """Accumulate over all frames; every SAMPLE_SECONDS one is also measured at full resolution."""
    statistics, every = FrameStatistics(), max(1, round(SAMPLE_SECONDS * fps))
    for number, pixels in enumerate(frames):
        frame = torch.from_numpy(np.ascontiguousarray(pixels))
        height, width = frame.shape[:2]
        ratio = min(1.0, SMALL_SIDE / min(height, width))
        size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        small = frame.permute(2, 0, 1)[None]
        if size != (height, width):
            small = F.interpolate(small, size, mode="bilinear", align_corners=False, antialias=True)
        colour = small[0].permute(1, 2, 0)
        statistics.small.append(luma(colour).round().byte())
        if number % every == 0:
            light = luma(frame)
            statistics.colour.append(colour.contiguous())
            statistics.sharp.append(sharpness(light))
            statistics.light.append(exposure(light))
            statistics.profiles.append((differences(light), differences(light.mT)))
    if not statistics.small:
        raise ValueError("a clip needs at least one frame")
    return statistics


def luma(pixels: UInt8[Tensor, "h w 3"]) -> Float[Tensor, "h w"]:
    """Luma float32 [h, w], 0 to 255, of pixels uint8 [h, w, 3] (ITU-R BT.601)."""
    return pixels.float() @ torch.tensor([0.299, 0.587, 0.114])


def sharpness(light: Float[Tensor, "h w"]) -> float:
    """1 - blur of light [h, w]: the relative loss of neighbour differences under a 9-tap box filter, the worse of both directions.

    Crete, Dolmiere, Ladret, Nicolas, "The blur effect" (SPIE 2007), eqs. 1-8. A uniform image is 0.
    """

    def kept(x: Tensor) -> float:
        smooth = F.avg_pool2d(F.pad(x[None, None], (4, 4, 0, 0), mode="replicate"), (1, 9), 1)[0, 0]
        plain, blurred = (y.diff(dim=1).abs() for y in (x, smooth))
        total = float(plain.sum())
        return float((plain - blurred).clamp_min(0).sum()) / total if total > 0 else 0.0

    return min(kept(light), kept(light.mT.contiguous())) if min(light.shape) > 4 else 0.0


def exposure(light: Float[Tensor, "h w"]) -> float:
    """Mean of exp(-(v - 0.5)^2 / (2 * 0.2^2)) over light [h, w] as v in 0..1 (Mertens, Kautz, Van Reeth 2007, sec. 3.1)."""
    return float(torch.exp(-((light / 255 - 0.5) ** 2) / 0.08).mean())


def differences(light: Float[Tensor, "h w"]) -> Float[Tensor, " w-1"]:
    """Mean |difference| of neighbours across, for each column of light [h, w] but the last: [w - 1]."""
    return light.diff(dim=1).abs().mean(0).double()


def blockiness(profile: Float[Tensor, " n"], period: float) -> float:
    """Share of a grid of `period` pixels in a profile of differences [n], 0 to 1, whatever its phase.

    The root of the power at the grid's frequencies k / period above that beside them, over the mean (after Wang, Bovik and Evans,
    ICIP 2000, who look for the same peaks); a fractional period is a grid that was scaled with its image.
    """
    num, mean = len(profile), float(profile.mean())
    if period <= 2 or num < 4 * period or mean <= 0:
        return 0.0
    window = torch.hann_window(num, periodic=False, dtype=torch.float64)
    place, flat = torch.arange(num, dtype=torch.float64), (profile - mean) * window

    def power(frequency: float) -> float:
        phase = 2 * math.pi * frequency * place
        return float((flat * phase.cos()).sum() ** 2 + (flat * phase.sin()).sum() ** 2) * (2 / float(window.sum())) ** 2

    total = 0.0
    for number in range(1, math.floor(period / 2) + 1):
        beside = [power(number / period + step / num) for step in (-6, -5, -4, 4, 5, 6)]
        total += max(0.0, power(number / period) - max(beside))
    return min(1.0, math.sqrt(total) / mean)


def speech_activity(sound: np.ndarray) -> float:
    """Share of the time in which sound [S] at 16 kHz is active: ITU-T P.56, method B, its envelope taken every 5 ms.

    It separates sound from pauses, not speech from music or noise (see `speech_rhythm`); a level below -60 dBFS is silence.
    """
    size = round(BLOCK_SECONDS * SAMPLE_RATE)
    blocks = sound[: len(sound) // size * size].reshape(-1, size).astype(np.float64)
    energy = float((blocks**2).mean()) if len(blocks) else 0.0
    if energy <= 0:
        return 0.0
    keep = math.exp(-BLOCK_SECONDS / SMOOTH_SECONDS)
    once, twice, envelope = 0.0, 0.0, np.empty(len(blocks))
    for number, value in enumerate(np.abs(blocks).mean(1)):
        once = keep * once + (1 - keep) * value
        twice = keep * twice + (1 - keep) * once
        envelope[number] = twice
    hangover = np.ones(1 + round(HANGOVER_SECONDS / BLOCK_SECONDS))
    best = 0.0
    for level in np.arange(-90.0, 0.0, 0.5):  # dB of the threshold, from the lowest on
        active = np.convolve(envelope >= 10 ** (level / 20), hangover)[: len(envelope)] > 0
        share = float(active.mean())
        if share == 0 or 10 * math.log10(energy / share) - level <= MARGIN_DB:
            break
        best = share
    return best if best > 0 and 10 * math.log10(energy / best) >= SILENCE_DBFS else 0.0


def speech_rhythm(sound: np.ndarray) -> float:
    """Share of the variation of the loudness between 0.5 and 20 Hz that lies at 2 to 8 Hz, where syllables are.

    After the 4 Hz modulation energy of Scheirer and Slaney (ICASSP 1997), of one band. Speech has about half or more.
    """
    size = SAMPLE_RATE // 100
    blocks = sound[: len(sound) // size * size].reshape(-1, size).astype(np.float64)
    if len(blocks) < 100:
        return 0.0
    loudness = np.sqrt((blocks**2).mean(1))
    power = np.abs(np.fft.rfft((loudness - loudness.mean()) * np.hanning(len(loudness)))) ** 2
    hertz = np.fft.rfftfreq(len(loudness), 0.01)
    total = power[(hertz >= 0.5) & (hertz <= 20)].sum()
    return float(power[(hertz >= 2) & (hertz <= 8)].sum() / total) if total > 1e-9 else 0.0


def motion_text(text: str) -> float:
    """Share of motion words (speech, expressions, gestures) among these and appearance words, 0 without any.

    LiveTalk (2512.23576) rewrites prompts to be motion-focused; its measure is unpublished, this one counts English word stems.
    """
    words = re.findall(r"[a-z]+", text.lower())
    moving, looking = (sum(bool(pattern.fullmatch(word)) for word in words) for pattern in _PATTERNS)
    return moving / (moving + looking) if moving else 0.0


_PATTERNS = [re.compile(f"(?:{'|'.join(stems.split())}){ENDING}") for stems in (MOTION, APPEARANCE)]

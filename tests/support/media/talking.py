"""A drawn talking head: skin, hair, eyes, a mouth that opens with the loudness of speech-like sound, and damaged copies of it."""

import io
from fractions import Fraction
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RATE, FPS = 16000, Fraction(25)
HEIGHT, WIDTH = 192, 160
FACE = (54, 40, 106, 116)  # left, top, right, bottom of the drawn skin


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Sound float32 [S] at 16 kHz: syllables of noise, about five a second, in phrases with pauses."""
    rng = np.random.default_rng(seed)
    num = round(seconds * RATE)
    times, envelope = np.arange(num) / RATE, np.zeros(num)
    at = 0.1
    while at < seconds:
        for _ in range(rng.integers(3, 8)):
            length = rng.uniform(0.12, 0.26)
            envelope += rng.uniform(0.4, 1.0) * np.exp(-(((times - at - length / 2) / (length / 3)) ** 2))
            at += length
        at += rng.uniform(0.25, 0.6)
    return (0.2 * envelope * rng.standard_normal(num).clip(-3, 3) / 3).astype(np.float32)


def film(sound: np.ndarray, fps: Fraction = FPS, across: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] under the sound; the head is moved `across` pixels to the right and sways."""
    num = round(len(sound) * fps / RATE)
    edges = [round(number * RATE / fps) for number in range(num + 1)]
    loud = np.array([np.sqrt(np.square(sound[a:b]).mean()) for a, b in pairwise(edges)])
    texture = np.random.default_rng(seed).normal(0, 7, (HEIGHT, WIDTH, 1))
    return [_drawn(min(1.0, loud[t] / 0.05), across + 2 * np.sin(t / 9), np.sin(t / 13), texture) for t in range(num)]


def _drawn(opening: float, dx: float, dy: float, texture: np.ndarray) -> np.ndarray:
    image = Image.new("RGB", (WIDTH, HEIGHT), (96, 120, 150))
    draw = ImageDraw.Draw(image)

    def ellipse(left: float, top: float, right: float, bottom: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse((left + dx, top + dy, right + dx, bottom + dy), fill=colour)

    left, top, right, bottom = FACE
    ellipse(left - 8, top - 14, right + 8, bottom - 10, (50, 35, 28))
    draw.rectangle((66 + dx, bottom - 12 + dy, 94 + dx, bottom + 24), fill=(196, 142, 116))
    draw.rectangle((30 + dx / 2, bottom + 18, 130 + dx / 2, HEIGHT), fill=(60, 70, 90))
    ellipse(left, top, right, bottom, (214, 160, 132))
    for eye in (67, 93):
        ellipse(eye - 8, 66, eye + 8, 74, (70, 50, 42))
        ellipse(eye - 8, 59, eye + 8, 63, (60, 42, 34))
    ellipse(77, 74, 83, 88, (222, 172, 144))
    ellipse(69, 97 - 1, 91, 101 + 11 * opening, (110, 50, 48))
    smooth = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float64)
    return (smooth + texture).round().clip(0, 255).astype(np.uint8)


def blurred(frame: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(2.5)))


def jpeg(frame: np.ndarray, quality: int = 10) -> np.ndarray:
    output = io.BytesIO()
    Image.fromarray(frame).save(output, "JPEG", quality=quality)
    return np.array(Image.open(output))


def shifted(sound: np.ndarray, seconds: float) -> np.ndarray:
    """The sound later by `seconds`, its end in front."""
    return np.roll(sound, round(seconds * RATE))

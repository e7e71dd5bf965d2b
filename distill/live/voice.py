"""Text to speech with nothing downloaded: a small formant voice, and espeak-ng or any other program through its command line.

The formant voice is a source-filter synthesiser with the vowels of `distill.data.procedural.speech`, on which the embedded student
was trained: letters become vowels, closures, hisses and pauses on a 100 Hz grid. It is made for lips, not for understanding.
"""

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO

import numpy as np
import torch
from torch import Tensor

from distill.data.procedural.speech import HOP, N_FFT, SAMPLE_RATE, VOWELS
from teachers.errors import UserError
from teachers.media.streams import Resampler

PIECE = SAMPLE_RATE // 10
LEVEL = 0.1  # RMS
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = {"ee": "i", "ea": "i", "oo": "u", "ou": "u", "ai": "e", "ay": "e", "au": "o", "oa": "o", "y": "i"}
HISSES, CLOSURES = set("fvszxjhc"), set("pbmtdkgqn")
PAUSES = {",": 18, ";": 22, ":": 22, ".": 32, "!": 32, "?": 32, "\n": 32}
ESPEAK = "espeak-ng"
ESPEAK_COMMAND = (ESPEAK, "--stdin", "--stdout", "-v", "en", "-s", "150", "-b", "1")
MAX_PART = 2**16  # bytes of a part of a WAV file before its samples


def syllables(text: str) -> list[tuple[str, int]]:
    """Sounds and their length in 10 ms: a vowel's letter, "hiss", "closed" or "rest"."""
    text = re.sub(r"\d", lambda found: f" {DIGITS[int(found[0])]} ", text.lower())
    out: list[tuple[str, int]] = []
    for word, mark in re.findall(r"([^\W_]+)|([,;:.!?\n])", text):
        if mark:
            out.append(("rest", PAUSES[mark]))
            continue
        word = re.sub(r"(?<=[aeiouy])([^aeiouy])e$", r"\1", word)
        for part in re.findall(r"ee|ea|oo|ou|ai|ay|au|oa|.", word):
            if (vowel := LETTERS.get(part, part)) in VOWELS:
                out.append((vowel, 16))
            elif part in HISSES:
                out.append(("hiss", 7))
            else:
                out.append(("closed", 6 if part in CLOSURES else 3))
        if not any(sound in VOWELS for sound, _ in out[-len(word) :]):
            out.append(("e", 14))
        out.append(("rest", 4))
    return out


def formant_voice(text: str, pitch: float = 125.0) -> Iterator[Tensor]:
    """Sound [n] at 16 kHz, piece by piece; a clause is made at once."""
    clause: list[tuple[str, int]] = []
    for sound, ticks in [*syllables(text), ("rest", 32)]:
        clause.append((sound, ticks))
        if (sound == "rest" and ticks > 4) or sum(length for _, length in clause) > 200:
            if any(name != "rest" for name, _ in clause):
                yield from torch.from_numpy(_clause(clause, pitch)).split(PIECE)
            clause = []


def _smooth(x: np.ndarray, ticks: int) -> np.ndarray:
    window = np.hanning(ticks + 2)[1:-1]
    return np.convolve(np.pad(x, (ticks // 2, ticks - 1 - ticks // 2), mode="edge"), window / window.sum(), "valid")


def _clause(sounds: list[tuple[str, int]], pitch: float) -> np.ndarray:
    """One clause, float32 [S]."""
    names = [name for name, ticks in sounds for _ in range(ticks)]
    count = len(names)
    samples = count * HOP
    voiced = np.array([name in VOWELS for name in names], np.float64)
    hissed = np.array([name == "hiss" for name in names], np.float64)
    table, last = np.zeros((count, 3)), next((name for name in names if name in VOWELS), "e")
    for i, name in enumerate(names):
        last = name if name in VOWELS else last
        table[i] = VOWELS[last][0]
    formants = np.stack([_smooth(table[:, i], 7) for i in range(3)], axis=1)
    place = np.linspace(0, 1, samples)
    tone = pitch * (1.1 - 0.2 * place + 0.05 * np.sin(2 * np.pi * 2.3 * np.arange(samples) / SAMPLE_RATE))
    pulses = np.exp(-12.0 * (np.cumsum(tone / SAMPLE_RATE) % 1.0)) - 0.083
    noise = np.random.default_rng(count).standard_normal(samples)
    freqs = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    response = sum(
        level / (1 + ((freqs - formants[:, i]) / width) ** 2)
        for i, (width, level) in enumerate(((90.0, 1.0), (120.0, 0.6), (170.0, 0.3)))
    ) * np.exp(-freqs / 5000.0)
    hiss = np.exp(-(((freqs - 5000.0) / 1500.0) ** 2)) * 0.17

    def shaped(signal: np.ndarray, gain: np.ndarray) -> Tensor:
        spectrum = torch.stft(torch.from_numpy(signal), N_FFT, HOP, window=window, return_complex=True)
        return spectrum[:, :count] * torch.from_numpy(gain)

    window = torch.hann_window(N_FFT, dtype=torch.float64)
    spoken = shaped(pulses, response * _smooth(voiced, 5)) + shaped(noise, hiss * _smooth(hissed, 3))
    speech = torch.istft(spoken, N_FFT, HOP, window=window, length=samples).numpy()
    loud = np.sqrt(np.mean(speech[np.repeat(voiced, HOP) > 0] ** 2)) if voiced.any() else 1.0
    return np.clip(speech * LEVEL / max(loud, 1e-6), -1, 1).astype(np.float32)


def has_espeak() -> bool:
    return shutil.which(ESPEAK) is not None


def espeak_voice(text: str) -> Iterator[Tensor]:
    """The same by espeak-ng."""
    return command_voice(ESPEAK_COMMAND, text)


def command_voice(command: Sequence[str], text: str) -> Iterator[Tensor]:
    """The same by a program that reads the text from its standard input and writes a WAV file (s16) to its standard output, read as
    it speaks; leading silence is left out. UserError where it writes none."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(text.encode("utf-8", "replace"))
                process.stdin.close()
            found = _read_head(process.stdout)
            if found is None:
                raise UserError(f"{command[0]} wrote no WAV file of 16 bits (exit status {process.wait(5)})")
            rate, channels = found
            resampler, silent = Resampler(rate, SAMPLE_RATE), True
            while block := process.stdout.read(rate // 10 * 2 * channels):
                whole = torch.frombuffer(
                    bytearray(block[: len(block) // (2 * channels) * 2 * channels]), dtype=torch.int16
                )
                piece = resampler.push(whole.view(-1, channels).float().mean(1) / 32768)
                if silent:
                    loud = (piece.abs() > 0.01).nonzero()
                    if len(loud) == 0:
                        continue
                    piece, silent = piece[int(loud[0]) :], False
                yield piece
            yield resampler.finish()
        finally:
            process.kill()


def _read_head(file: IO[bytes]) -> tuple[int, int] | None:
    """Rate and channels of a WAV file of 16 bits, read up to its samples; None for anything else."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    found = None
    while len(part := file.read(8)) == 8 and part[:4] != b"data":
        content = file.read(min(int.from_bytes(part[4:], "little"), MAX_PART))
        if part[:4] == b"fmt " and len(content) >= 16:
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content)
            found = (rate, channels) if (bits, kind in (1, 0xFFFE)) == (16, True) else None
    if found is None or part[:4] != b"data" or not (8000 <= found[0] <= 192_000 and 1 <= found[1] <= 8):
        return None
    return found

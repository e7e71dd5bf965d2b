"""Voices from outside: a program, and a class of one's own."""

import io
import re
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.live import voice
from distill.live.talkers import Command, load_talker
from teachers.errors import UserError

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
SPEAK = """
import sys, wave, array
rate, channels, words = int(sys.argv[1]), int(sys.argv[2]), sys.stdin.read().split()
with wave.open("said.wav", "wb") as out:
    out.setparams((channels, 2, rate, 0, "NONE", ""))
    out.writeframes(bytes(2 * channels * rate // 10))
    tone = [8000 * ((i // channels // (rate // 400)) % 2 * 2 - 1) for i in range(channels * rate // 10)]
    out.writeframes(array.array("h", tone * len(words)).tobytes())
sys.stdout.buffer.write(open("said.wav", "rb").read())
"""


def a_program(folder: Path, code: str, *words: str) -> str:
    (folder / "speak.py").write_text(code)
    return " ".join(["cmd:" + sys.executable, str(folder / "speak.py"), *words])


@pytest.mark.parametrize(("rate", "channels"), [(22050, 1), (48000, 2), (16000, 1)])
def test_a_programs_wav_file_is_heard_at_16_khz_without_its_leading_silence(tmp_path, monkeypatch, rate, channels):
    monkeypatch.chdir(tmp_path)
    talker = load_talker(a_program(tmp_path, SPEAK, str(rate), str(channels)))
    assert isinstance(talker, Command)
    assert talker.name == Path(sys.executable).name
    sound = torch.cat(list(talker.conversation().turn("three short words; $(touch x)")))
    assert len(sound) == pytest.approx(5 * 1600, abs=200)
    assert abs(float(sound[10])) > 0.1
    spectrum = torch.fft.rfft(sound[1600:4800] * torch.hann_window(3200)).abs()
    assert int(spectrum.argmax()) * 5 == pytest.approx(200, abs=10)
    assert [file.name for file in tmp_path.iterdir() if file.name not in ("speak.py", "said.wav")] == []


@pytest.mark.parametrize(
    "code", ["", "print('hello')", "raise SystemExit(3)", "import sys; sys.stdout.write('RIFF....WAVE')"]
)
def test_a_program_that_writes_no_sound_is_one_line(tmp_path, code):
    with pytest.raises(UserError, match=r"wrote no WAV file of 16 bits \(exit status [013]\)"):
        list(load_talker(a_program(tmp_path, code)).conversation().turn("words " * 10))


def test_only_wav_of_16_bits_is_read():
    def head(width: int, rate: int = 16000) -> bytes:
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((1, width, rate, 0, "NONE", ""))
            out.writeframes(bytes(100))
        return file.getvalue()

    good = head(2)
    listed = good[:12] + b"LIST\x04\x00\x00\x00abcd" + good[12:]
    assert voice._read_head(io.BytesIO(good)) == voice._read_head(io.BytesIO(listed)) == (16000, 1)
    rng = np.random.default_rng(0)
    broken = [head(1), head(3), head(2, 100), good[:30], b"", rng.bytes(200), good[:36] + b"datb" + good[40:44]]
    assert [voice._read_head(io.BytesIO(data)) for data in broken] == [None] * len(broken)


def test_the_guides_own_voice_speaks_and_mistakes_in_its_file_are_named(tmp_path, monkeypatch):
    (block,) = [
        one
        for one in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
        if "my_voice.py" in one
    ]
    (tmp_path / "my_voice.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    talker = load_talker("my_voice:Hum")
    assert (talker.name, talker.model, talker.takes_speech) == ("hum", "", True)
    assert len(torch.cat(list(talker.conversation().turn("two words")))) == 8 * 1600
    (tmp_path / "broken_voice.py").write_text(block.replace("return Humming()", "return Hoarse()"))
    with pytest.raises(UserError, match=r"broken_voice\.py:\d+: NameError"):
        load_talker("broken_voice:Hum")
    for name, words in (
        ("no_voice:Hum", "no_voice"),
        ("my_voice:Ham", "no class 'Ham'"),
        ("cmd:no-such-program --x", "no such program"),
        ("cmd:'", "No closing quotation"),
        ("cmd:", "no such program"),
    ):
        with pytest.raises(UserError, match=words):
            load_talker(name)

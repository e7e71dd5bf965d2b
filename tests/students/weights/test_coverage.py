"""What a student cannot draw is named, and refused where that is asked: pictures and words outside its training data."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.commands.sample.inputs import check_coverage
from distill.data.procedural import render
from distill.live.client import Client
from distill.live.scheduler import Engine
from distill.live.server import Options
from distill.live.talkers import Echo
from students.serving.pipeline import AvatarPipeline
from students.weights.checkpoint import load_student, save_student
from students.weights.coverage import FILE, Coverage, load_coverage
from teachers.codecs.linear import CodecConfig, EigenCodec, to_float
from teachers.errors import UserError
from tests.support import tiny
from tests.support.live.serving import a_puppet, running

SIZE = 32
TEXTS = ["A person nods, smiling", "someone isn't happy"]
RNG = np.random.default_rng(0)


def drawn(num: int, seed: int) -> torch.Tensor:
    """First frames uint8 [N, 3, 32, 32] of the procedural world."""
    config, rng = render.WorldConfig(resolution=SIZE, num_frames=1, variety=0.4), torch.Generator().manual_seed(seed)
    return render.make_clips(config, render.draw_conditions(config, num, rng), rng).video[:, :, 0]


@pytest.fixture(scope="module")
def codec():
    return EigenCodec(CodecConfig(channels=12), SIZE, SIZE).fit(to_float(drawn(96, 0))[:, :, None])


@pytest.fixture(scope="module")
def coverage(codec):
    return Coverage.fit(drawn(96, 0), drawn(16, 1), TEXTS, codec)


def photo() -> torch.Tensor:
    """Natural statistics: noise whose spectrum falls with the frequency."""
    spectrum = np.fft.fft2(RNG.normal(size=(3, SIZE, SIZE))) / (
        0.02 + np.hypot(*np.meshgrid(*[np.fft.fftfreq(SIZE)] * 2))
    )
    picture = np.fft.ifft2(spectrum).real
    return torch.from_numpy((128 + 50 * picture / picture.std()).clip(0, 255).astype(np.uint8))


def pair() -> torch.Tensor:
    """Two faces side by side."""
    both = torch.cat(list(drawn(2, 2)), dim=2).float()
    return torch.nn.functional.interpolate(both[None], (SIZE, SIZE), mode="area")[0].byte()


UNLIKE = {
    "photo": photo,
    "noise": lambda: torch.from_numpy(RNG.integers(0, 255, (3, SIZE, SIZE)).astype(np.uint8)),
    "blocks": lambda: torch.from_numpy(RNG.integers(0, 255, (3, 8, 8)).astype(np.uint8).repeat(4, 1).repeat(4, 2)),
    "white": lambda: torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8),
    "grey": lambda: torch.full((3, SIZE, SIZE), 128, dtype=torch.uint8),
    "two faces": pair,
    "upside down": lambda: drawn(1, 2)[0].flip(1),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_picture_outside_the_training_data_is_named_with_both_numbers(kind, coverage, codec):
    line = coverage.unlike(to_float(UNLIKE[kind]()), codec)
    assert line is not None
    found, own = (
        float(word) for word in line.partition(": ")[2].replace(" dB", "").partition(" (")[0].split(", its own ")
    )
    assert found < own - 5
    assert own in [round(median, 1) for median, _ in coverage.own.values()]


def test_pictures_like_the_training_data_pass(coverage, codec):
    lines = [coverage.unlike(to_float(picture), codec) for picture in drawn(40, 3)]
    assert sum(line is not None for line in lines) <= 2


def test_words_of_no_training_text_are_named(coverage):
    assert coverage.unknown_words("a PERSON isn't smiling; nods!") is None
    assert coverage.unknown_words("") is None
    assert ": fox, juggles;" in coverage.unknown_words("a fox juggles, a fox nods")
    assert "and 3 more" in coverage.unknown_words("b c d e f g h i j k l")


def test_it_lies_in_the_students_folder_and_a_damaged_one_is_one_line(tmp_path, coverage, codec):
    save_student(tmp_path / "s", replace(tiny.a_bundle(), coverage=coverage), "# A card\n")
    read = load_student(tmp_path / "s").coverage
    assert (read.own, read.words) == (coverage.own, coverage.words)
    one = to_float(pair())
    assert read.levels(one, codec) == pytest.approx(coverage.levels(one, codec), abs=0.05)
    data = (tmp_path / "s" / FILE).read_bytes()
    for broken in (data[:40], b"", data.replace(b'\\"own\\"', b'\\"owm\\"'), b"{" + data[1:]):
        (tmp_path / FILE).write_bytes(broken)
        with pytest.raises(UserError, match=r"^damaged student: [^\n]*coverage.safetensors"):
            load_coverage(tmp_path / FILE)
    assert load_coverage(tmp_path / "none") is None
    assert tiny.a_bundle().unlike(tiny.a_portrait(), "anything") == []


@pytest.fixture
def narrow():
    """A coverage that holds nothing but grey pictures and two texts, of 16 x 16 pixels."""
    grey = torch.randint(126, 130, (12, 3, 16, 16), generator=tiny.rng(1)).byte()
    return Coverage.fit(grey, grey[:4], TEXTS, tiny.fitted_codec())


def test_sample_and_pipeline_warn_and_refuse(narrow, capsys):
    bundle = replace(tiny.a_bundle(), coverage=narrow)
    args = argparse.Namespace(image=Path("a.png"), strict=False)
    check_coverage(bundle, tiny.a_portrait(), ["a person nods", "a fox nods"], args)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": the ")[2].split()[0] for line in lines] == ["picture", "text"]
    assert "fox" in lines[1]
    args.strict = True
    with pytest.raises(UserError, match=r"^a\.png: the picture is unlike what this student was trained on: "):
        check_coverage(bundle, tiny.a_portrait(), ["a person nods"], args)
    pipe = AvatarPipeline(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text, narrow)
    pipe.set_progress_bar_config(disable=True)
    sound = tiny.some_sound(1280)
    with pytest.warns(UserWarning, match="unlike what this student was trained on"):
        pipe(tiny.a_portrait(), sound, "a person nods")
    with pytest.raises(UserError, match="fox"):
        pipe(torch.zeros(3, 16, 16), sound, "a fox nods", strict=True)


@pytest.mark.parametrize(("strict", "kind"), [(False, "note"), (True, "error")])
def test_the_page_warns_or_refuses(narrow, strict, kind):
    bundle = replace(a_puppet(), codec=tiny.fitted_codec(), coverage=narrow)
    with running(Engine(bundle, Echo(), 2, 2), [tiny.a_portrait()], Options(strict=strict)) as address:
        client = Client(f"ws://{address}/live")
        client.send(type="open", portrait=0, text="a fox nods")
        client.until(lambda: any(m["type"] == kind and "unlike" in m["message"] for m in client.messages), 20.0)
        if not strict:
            client.until(lambda: client.epoch > 0, 20.0)
        client.close()
    said = [message["message"] for message in client.messages if message["type"] == kind]
    assert strict or any("unlike" in line and "fox" in line for line in said)
    assert (client.epoch == 0) == strict, "a refused stream is not opened"

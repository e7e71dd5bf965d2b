"""What a session is given: a mistake is one line and changes nothing; threads may share it; any weight tells students apart."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from students.serving import checked, draw
from students.serving.session import Chunk, Session
from students.weights.checkpoint import Bundle
from teachers.errors import UserError
from tests.support.tiny import a_bundle, a_portrait, some_sound

PER_FRAME = 1280


@pytest.fixture(scope="module")
def bundle():
    return a_bundle()


def a_session(bundle, portrait=None, **options) -> Session:
    return Session(bundle, a_portrait() if portrait is None else portrait, "a person nods", **options)


@pytest.mark.parametrize(
    ("portrait", "words"),
    [
        (a_portrait().clone().index_fill_(1, torch.tensor([3]), float("nan")), r"must be finite: got NaN"),
        (a_portrait().mul(float("inf")), r"must be finite: got NaN"),
        ((a_portrait() + 1) * 127.5, r"must lie in \[-1, 1\]: got [\d.]+ to [\d.]+; for 0\.\.255 divide by 127\.5"),
        (((a_portrait() + 1) * 127.5).byte(), r"must be floats \(3, 16, 16\) in \[-1, 1\]: got torch\.uint8"),
        (a_portrait().numpy(), r"must be floats \(3, 16, 16\) in \[-1, 1\]: got ndarray"),
        (a_portrait()[:, :8], r"got \(3, 8, 16\), the student draws \(3, 16, 16\)"),
    ],
)
def test_a_portrait_that_is_none(bundle, portrait, words):
    with pytest.raises(UserError, match=rf"^reference image:? {words}[^\n]*$"):
        a_session(bundle, portrait)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1.5}, r"seed: got 1\.5; it is a whole number"),
        ({"seed": -1}, r"seed: got -1; it is a whole number from 0"),
        ({"seed": None}, r"seed: got None"),
        ({"lead": 2.5}, r"session: lead: got 2\.5"),
        ({"drop": "audio"}, r"session: got [^\n]*drop='audio'"),
        ({"conditions": {"mood": [1.0]}}, r"\S*"),
    ],
)
def test_options_that_are_none(bundle, options, words):
    with pytest.raises(UserError, match=rf"^{words}[^\n]*$"):
        a_session(bundle, **options)


def test_input_that_is_none_changes_nothing(bundle, monkeypatch):
    one = a_session(bundle)
    one.push(some_sound(5 * PER_FRAME), rate=np.int64(16000))
    for act, words in (
        (lambda: one.push([0.0] * 100), r"audio must be a tensor of samples: got list"),
        (lambda: one.push(torch.zeros(100), rate=16000.5), r"audio rate: got 16000\.5 Hz"),
        (lambda: one.push(torch.zeros(3600 * 16000)), r"push: 3600 s of input would wait [^\n]* step between pushes"),
        (lambda: one.push(torch.zeros(3600 * 8000), rate=8000), r"push: 3600 s of input would wait"),
        (lambda: one.set(3), r"text must be a string: got int"),
        (lambda: one.set("a" * 200_000), r"text of 200000 characters"),
        (lambda: one.set("a \udcff b"), r"text has half of a character \(position 2\)"),
        (lambda: one.set("a", at=1.5), r"text at chunk: got 1\.5"),
        (lambda: one.played(float("nan")), r"played: got nan"),
        (lambda: one.interrupt(0.5), r"played: got 0\.5"),
    ):
        with pytest.raises(UserError, match=rf"^{words}"):
            act()
    monkeypatch.setattr(draw, "MOST_EVENTS", 3)
    for at in (4, 5, 6, 6):
        one.set("someone smiles", at=at)
    with pytest.raises(UserError, match=r"^change at chunk 7: 3 changes wait already"):
        one.set("someone smiles", at=7)
    assert one.inputs.audio.end == 5 * PER_FRAME
    assert len(one.events) == 3
    assert checked.whole("n", np.int32(4), 0) == 4


def test_threads_share_a_session(bundle):
    """Pushes of one thread, steps of two: the frames are those of one thread."""
    sound = some_sound(60 * PER_FRAME)
    alone, shared, found = a_session(bundle), a_session(bundle), []
    alone.push(sound)

    def push() -> None:
        for piece in sound.split(700):
            shared.push(piece)
        shared.close()

    def draw() -> None:
        while True:
            chunk = shared.step()
            if isinstance(chunk, Chunk):
                found.append(chunk)
            elif chunk.reason == "end":
                return

    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(draw), pool.submit(push), pool.submit(draw)]:
            job.result()
    alone.close()
    frames = torch.cat([chunk.frames for chunk in sorted(found, key=lambda chunk: chunk.index)])
    assert torch.equal(frames, torch.cat([chunk.frames for chunk in alone.frames()]))


@pytest.mark.parametrize("part", ["net", "codec", "audio", "text", "spec"])
def test_a_fingerprint_is_of_every_weight(part, monkeypatch):
    """The last number of the last tensor of each part."""
    first = a_bundle()
    bundle = Bundle(first.student, first.codec, first.audio_encoder, first.text)
    if part == "spec":
        before = first.fingerprint
        monkeypatch.setattr(bundle.student, "spec", replace(bundle.spec, horizon_frames=16))
        assert bundle.fingerprint != before
        return
    module = {"net": bundle.student.net, "codec": bundle.codec, "audio": torch.nn.Linear(3, 3), "text": bundle.text}[
        part
    ]
    if part == "audio":  # log-mel has no weights
        bundle = replace(bundle, audio_encoder=module)
    else:
        assert bundle.fingerprint == first.fingerprint
    before = bundle.fingerprint
    tensor = list(module.state_dict().values())[-1]
    kept = tensor.clone()
    tensor.view(-1)[-1] += 0.001
    try:
        assert replace(bundle).fingerprint != before
    finally:
        tensor.copy_(kept)

"""The input of a session: the same file whole, streamed and prepared, what a chunk waits for, and a state that goes on."""

import json

import numpy as np
import pytest
import torch

from students.schedule import Schedule
from students.serving.inputs import SessionInputs, Starved
from teachers import media
from teachers.media.sound import read_sound
from tests.support.tiny import a_bundle, make_spec, randn, rng
from tests.teachers.media.test_media import encode_audio

PER_FRAME = 1280


def some_inputs(drop=(), **changes) -> SessionInputs:
    return SessionInputs(make_spec(**changes), a_bundle().audio_encoder, drop)


def conditions(inputs: SessionInputs, chunk: int):
    return inputs.conditions(chunk, torch.zeros(1, 5, 16), None, None)


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100, 48000])
def test_a_file_is_the_same_whole_streamed_and_prepared(tmp_path, rate):
    """Bit for bit, samples and features, with peaks beyond full scale."""
    noise = np.convolve(np.random.default_rng(rate).standard_normal(3 * rate), np.ones(5) / 2, "same")
    path = encode_audio(tmp_path / "a.wav", "pcm_f32le", "flt", rate, [noise.astype(np.float32)])
    whole = media.read_audio(path)
    streamed, at_once = some_inputs(), some_inputs()
    at_once.push(whole, None, 16000, None)
    reader = media.AudioReader(path)
    sound = torch.cat(list(reader))
    cuts = torch.randint(0, len(sound), (30,), generator=rng(1)).sort().values.tolist()
    for start, stop in zip([0, *cuts], [*cuts, len(sound)], strict=True):
        streamed.push(sound[start:stop], None, reader.rate, None)
    for inputs in (streamed, at_once):
        inputs.close()
    assert whole.abs().max() == 1
    assert len(whole) == 48000
    assert torch.equal(streamed.audio.read(0, streamed.audio.end), whole)
    assert torch.equal(read_sound(path, 0, len(whole)).samples, whole)
    assert torch.equal(read_sound(path, 30001, 16000).samples, whole[30001:46001])
    for chunk in range(3):
        assert torch.equal(conditions(streamed, chunk).audio, conditions(at_once, chunk).audio)


def test_a_chunk_waits_for_just_what_it_needs():
    inputs = some_inputs(pose_dim=3)
    needs = inputs.spec.pixel_frames(1)[1] * PER_FRAME + inputs.encoder.lookahead
    inputs.push(torch.zeros(needs - 1), None, 16000, None)
    assert inputs.missing(0) == Starved("pose", 3)
    assert inputs.missing(1) == Starved("audio", 1)
    inputs.push(torch.zeros(1), torch.zeros(5, 3), 16000, None)
    assert inputs.missing(0) is None
    assert inputs.missing(1) == Starved("pose", 2)
    inputs.fill(1)
    assert (inputs.missing(1), inputs.pose.end, inputs.audio.end) == (None, 7, needs)
    assert some_inputs(drop=("audio",)).missing(3) is None


def test_what_is_filled_in_is_silence_and_the_last_pose():
    inputs = some_inputs(pose_dim=3)
    inputs.push(torch.ones(100), randn(2, 3, seed=1), 16000, None)
    inputs.fill(0)
    assert inputs.missing(0) is None
    assert inputs.audio.read(0, inputs.audio.end).sum() == 100
    assert torch.equal(inputs.pose.read(1, 3), randn(2, 3, seed=1)[1:].expand(2, -1))


def test_chunks_in_flight_need_input_until_a_closed_stream_ends():
    inputs = some_inputs(schedule=Schedule(depth=3))
    start = inputs.spec.pixel_frames(0)[0]
    assert inputs.span(0) == (start, inputs.spec.pixel_frames(2)[1])
    inputs.push(torch.zeros(7 * PER_FRAME), None, 16000, None)
    inputs.close()
    assert inputs.span(0) == (start, inputs.spec.pixel_frames(1)[1])
    assert [inputs.ended(chunk) for chunk in (0, 1, 2)] == [False, False, True]


def test_what_no_chunk_needs_is_forgotten_and_what_is_cut_comes_anew():
    inputs = some_inputs(pose_dim=3)
    for number in range(40):
        inputs.push(randn(PER_FRAME, seed=number).clamp(-1, 1), randn(1, 3, seed=number), 16000, None)
    before = conditions(inputs, 3)
    inputs.forget(3)
    assert inputs.audio.start > 9 * PER_FRAME
    after = conditions(inputs, 3)
    assert torch.equal(before.audio, after.audio)
    assert torch.equal(before.pose, after.pose)
    inputs.close()
    inputs.cut(30)
    assert (inputs.audio.end, inputs.pose.end, inputs.closed) == (30 * PER_FRAME, 30, False)


def test_a_state_goes_on_in_the_middle_of_a_resampled_stretch():
    sound = 0.3 * randn(44100, seed=4)
    whole, first = some_inputs(), some_inputs()
    whole.push(sound, None, 44100, None)
    first.push(sound[:9000], None, 44100, None)
    first.push(sound[9000:20011], None, 44100, None)
    first.forget(2)
    facts, tensors = first.state()
    second = some_inputs()
    second.restore(json.loads(json.dumps(facts)), {name: value.clone() for name, value in tensors.items()})
    second.push(sound[20011:], None, 44100, None)
    for inputs in (whole, second):
        inputs.close()
    start = second.audio.start
    assert start > 0
    assert torch.equal(second.audio.read(start, 16000), whole.audio.read(start, 16000))
    assert (second.audio.end, second.closed) == (16000, True)

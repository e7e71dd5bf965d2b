"""What a student was not made or trained for is refused by name, and nothing else is."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from students.history import History, HistoryNoise
from students.schedule import Schedule
from students.serving.pipeline import AvatarPipeline
from students.serving.session import Session
from students.weights import checkpoint
from students.weights.checkpoint import load_student, save_student
from teachers.errors import UserError
from tests.support.tiny import MIDAS, a_bundle, a_portrait, make_spec, some_sound


def one_line(words: str, call, *given, **options) -> None:
    with pytest.raises(UserError, match=words) as error:
        call(*given, **options)
    assert "\n" not in str(error.value)


def edited(folder, **changes) -> None:
    """spec.json as a hand edits it; dotted names with __."""
    values = json.loads((folder / "spec.json").read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = values
        for part in outer:
            place = place[part]
        place[last] = value
    (folder / "spec.json").write_text(json.dumps(values))


def test_pose_without_the_pose_sense_changes_nothing():
    sound, films = some_sound(12 * 1280), []
    for disturbed in (False, True):
        session = Session(a_bundle(), a_portrait(), "a person nods")
        if disturbed:
            one_line(r"^pose: this student takes none", session.push, audio=sound, pose=torch.zeros(12, 2))
        session.push(sound)
        films.append(torch.cat([chunk.frames for chunk in session.frames()]))
    assert torch.equal(*films)


def test_there_is_one_stream_of_sound():
    """Two channels are one sound; a second speaker is refused and not silently ignored."""
    session = Session(a_bundle(), a_portrait(), "a person nods")
    one_line(r"^other: this student takes one speaker", session.push, audio=torch.zeros(100), other=torch.zeros(100))
    one_line(r"^audio must be float samples \[S\] or \[channels, S\]", session.push, audio=torch.zeros(2, 1, 100))
    assert session.inputs.audio.end == 0


@pytest.mark.parametrize("level", [0.401, 0.5, 0.15, -0.1])
def test_a_bucket_that_training_never_draws_has_no_embedding(level):
    noise = HistoryNoise(buckets=5, most=0.4)
    assert noise.bucket(torch.tensor([0.0, 0.1, 0.4])).tolist() == [0, 1, 4]
    with pytest.raises(ValueError, match=r"^history noise: got sigmas \[[^\n]*the buckets end at 0\.4$"):
        noise.bucket(torch.tensor([0.1, level]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"history_noise": {"buckets": 21, "most": 0.4, "p_clean": 0.1}},
            r"history_noise\.buckets: got 21; .*20 embed",
        ),
        ({"history__level": 0.3}, r"^student\.history.*level=0\.3.*level: 0\.0"),
        ({"schedule__depth": 3}, r"^student\.history, student\.schedule: .*depth=3.*depth: 1"),
        ({"history__commit": "same_level"}, r"commit=same_level"),
    ],
)
def test_a_midas_folder_that_asks_for_another_sampler(tmp_path, changes, words):
    save_student(tmp_path, a_bundle(network=MIDAS, chunk_frames=1, history_noise=HistoryNoise(buckets=5)), "card")
    load_student(tmp_path)
    edited(tmp_path, **changes)
    one_line(words, load_student, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule__depth": 2}, r"student\.schedule\.depth: 3 denoising steps are no multiple of 2 chunks in flight"),
        ({"schedule__depth": 0}, r"student\.schedule\.depth: got 0"),
        ({"chunk_frames": 3}, r"student\.chunk_frames: .*whole number of chunks"),
        ({"sampler": "ddim"}, r"unknown key 'sampler'.*spec\.json"),
    ],
)
def test_a_schedule_that_does_not_fit(tmp_path, changes, words):
    save_student(tmp_path, a_bundle(), "card")
    edited(tmp_path, **changes)
    one_line(words, load_student, tmp_path)


def test_a_pipeline_takes_no_steps(tmp_path):
    save_student(tmp_path, a_bundle(), "card")
    one_line(r"from_pretrained: got scheduler; it takes folder", AvatarPipeline.from_pretrained, tmp_path, scheduler=1)
    pipe = AvatarPipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_inference_steps"):
        pipe(a_portrait(), some_sound(1280), num_inference_steps=8)


@pytest.fixture
def weights(tmp_path):
    """The weights of a student, with what training fixed."""
    save_student(tmp_path, a_bundle(), "card")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file, metadata=checkpoint._header(make_spec()))
    return file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigmas": (1.0, 0.5, 0.25)}, r"sigmas is \[1, 0\.5, 0\.25\] in spec\.json, \[1, 0\.8571, 0\.6\] in "),
        ({"sigmas": (1.0, 0.857)}, r"sigmas is \[1, 0\.857\]"),
        ({"first_sigmas": (1.0,), "first_chunks": 1}, r"first_sigmas is \[1\] in spec\.json, \[\] in "),
        ({"schedule": Schedule(depth=3)}, r"schedule\.depth is 3 in spec\.json, 1 in "),
        ({"chunk_frames": 4}, r"chunk_frames is 4 in spec\.json, 2 in "),
        ({"history": History(sinks=1, window=2, level=0.1)}, r"history\.level is 0\.1 in spec\.json, 0 in "),
        ({"history": History(sinks=1, window=2, commit="same_level")}, r'history\.commit is "same_level"'),
        ({"history_noise": HistoryNoise()}, r"history_noise is .*20.* in spec\.json, null in "),
    ],
)
def test_weights_say_which_sampler_they_were_trained_for(weights, changes, words):
    one_line(
        f"^student not trained for this sampler: {words}",
        checkpoint.check_sampler,
        replace(make_spec(), **changes),
        weights,
    )


def test_the_trained_sampler_and_another_window_are_served(weights, tmp_path):
    checkpoint.check_sampler(make_spec(), weights)
    checkpoint.check_sampler(make_spec(History(sinks=2, window=1, memory=1)), weights)
    bundle = load_student(tmp_path)  # the header changes no weight
    assert bundle.fingerprint == a_bundle().fingerprint
    save_file(load_file(weights), weights)
    checkpoint.check_sampler(replace(make_spec(), sigmas=(1.0, 0.5)), weights)  # of earlier exports nothing is known
    weights.write_bytes(b"no weights")
    checkpoint.check_sampler(make_spec(), weights)
    one_line(r"^damaged weights: .*model\.safetensors", load_student, tmp_path)


def test_a_folder_edited_by_hand_is_refused(tmp_path):
    save_student(tmp_path, a_bundle(), "card")
    load_student(tmp_path)
    edited(tmp_path, schedule__depth=3)
    one_line(
        r"^student not trained for this sampler: schedule\.depth is 3 in spec\.json, 1 in ", load_student, tmp_path
    )
    edited(tmp_path, schedule__depth=1, sigmas=[1.0, 0.5])
    one_line(r"sigmas is \[1, 0\.5\]", load_student, tmp_path)


def test_what_weights_say_does_not_change_their_bytes(weights, tmp_path):
    """Safetensors writes two entries of metadata in either order, one in one."""
    assert len(checkpoint._header(make_spec())) == 1
    for name in ("a", "b"):
        save_file(load_file(weights), tmp_path / name, metadata=checkpoint._header(make_spec()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == weights.read_bytes()

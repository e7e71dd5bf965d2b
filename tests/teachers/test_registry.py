"""Kinds of codec, audio and text encoder in recipes and specs: read by name, written back, loaded from where their path says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.spec import Spec
from students.weights.checkpoint import load_student, save_student
from teachers.codecs.linear import CodecConfig
from teachers.codecs.wan_vae import WanVAEConfig
from teachers.config import convert, to_plain
from teachers.encoders.small import NoAudioConfig
from teachers.encoders.umt5 import UMT5Config
from teachers.encoders.wav2vec import Wav2VecConfig
from teachers.errors import UserError
from tests.support.tiny import a_bundle, make_spec, some_sound


def test_a_spec_names_its_kinds_and_reads_back(tmp_path):
    spec = replace(
        make_spec(),
        codec=WanVAEConfig(path=tmp_path),
        audio=Wav2VecConfig(path=tmp_path, features=32),
        text=UMT5Config(path=tmp_path, dim=24),
    )
    plain = to_plain(spec)
    assert [plain[part]["name"] for part in ("codec", "audio", "text")] == ["wan_vae", "wav2vec2", "umt5"]
    assert convert(Spec, plain) == spec
    assert spec.audio_dim == 32
    own = to_plain(make_spec())
    assert "name" not in own["codec"], "the embedded kinds stay as older students have them"
    assert convert(Spec, own) == make_spec()


def test_an_unknown_kind_is_refused_with_the_nearest():
    plain = to_plain(make_spec())
    plain["codec"] = {"name": "wan_vea", "path": "x"}
    with pytest.raises(UserError, match=r"codec\.name.*did you mean 'wan_vae'"):
        convert(Spec, plain)
    plain["codec"] = {"name": "wan_vae", "pth": "x"}
    with pytest.raises(UserError, match=r"unknown key 'codec\.pth'"):
        convert(Spec, plain)


def test_there_is_no_audio_without_an_encoder():
    audio_encoder = NoAudioConfig().load(640)
    assert audio_encoder(torch.zeros(2, 1500)).shape == (2, 3, 0)
    assert (audio_encoder.dim, audio_encoder.lookback, audio_encoder.lookahead) == (0, 0, 0)


def test_a_missing_path_and_another_geometry_are_one_line(tmp_path):
    with pytest.raises(UserError, match="wav2vec2: no path"):
        Wav2VecConfig().load(640)
    with pytest.raises(UserError, match="no Wan VAE"):
        WanVAEConfig(path=tmp_path / "nothing").load(tmp_path, 32, 32)


def text_to_video_bundle():
    network = replace(make_spec().network, reference=False)
    return a_bundle(prediction="velocity", network=network, audio=NoAudioConfig())


def test_a_text_to_video_student_streams_and_comes_back(tmp_path):
    bundle = text_to_video_bundle()
    with pytest.raises(UserError, match="draws from text alone"):
        Session(bundle, torch.zeros(3, bundle.spec.height, bundle.spec.width), "a person nods")

    def film(bundle):
        session = Session(bundle, None, "a person nods", seed=3)
        session.push(audio=some_sound(8000))
        session.close()
        return torch.cat([chunk.frames for chunk in session.frames()])

    first = film(bundle)
    assert len(first) == 7
    save_student(tmp_path / "student", bundle, "card")
    assert torch.equal(film(load_student(tmp_path / "student")), first)


def test_the_first_frame_of_text_to_video_is_drawn_not_given():
    bundle = text_to_video_bundle()
    frames = []
    for seed in (1, 2):
        session = Session(bundle, None, "a person nods", seed=seed)
        session.push(audio=some_sound(8000))
        frames.append(session.step().frames[0])
    assert not torch.equal(*frames)


def test_a_session_of_text_to_video_is_saved(tmp_path):
    bundle = text_to_video_bundle()
    session = Session(bundle, None, "a person nods", seed=3)
    session.push(audio=some_sound(16000))
    session.step()
    save_session(session, tmp_path / "s.safetensors")
    again = load_session(bundle, tmp_path / "s.safetensors")
    assert torch.equal(session.step().frames, again.step().frames)


def test_an_eigen_codec_is_fitted_and_others_are_not():
    assert CodecConfig().fitted
    assert not WanVAEConfig(path=Path("x")).fitted

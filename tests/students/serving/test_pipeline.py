"""diffusers' habit over the session: the same frames, the same folder."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from students.serving.pipeline import AvatarPipeline
from students.serving.session import Session
from students.weights.checkpoint import load_student, save_student
from teachers.errors import UserError
from tests.students.serving.test_session import PER_FRAME, film, play
from tests.support.tiny import a_bundle, a_portrait, randn, some_sound


@pytest.fixture
def folder(tmp_path):
    save_student(tmp_path / "student", a_bundle(), "# A card\n")
    return tmp_path / "student"


def test_a_call_is_a_session(folder):
    pipe, sound = AvatarPipeline.from_pretrained(folder), some_sound(9 * PER_FRAME - 300)
    assert isinstance(pipe, DiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    out = pipe(image=a_portrait(), audio=sound, prompt="a person nods", generator=generator, output_type="pt")
    expected = film(play(load_student(folder), sound, seed=3))[:9]
    assert torch.equal(out.frames, expected)
    assert torch.equal(out.audio, sound)
    assert out.fps == 12.5
    again = pipe(a_portrait(), sound.numpy(), "a person nods", torch.Generator().manual_seed(4), output_type="np")
    assert again.frames.shape == (9, 16, 16, 3)
    assert (again.frames != out.frames.numpy()).any()


def test_a_call_with_two_voices_and_directions():
    bundle = a_bundle(speakers=2, pose_dim=3)
    pipe = AvatarPipeline(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text)
    pipe.set_progress_bar_config(disable=True)
    own, other, pose = some_sound(9 * PER_FRAME), some_sound(9 * PER_FRAME, 5), randn(4, 3, seed=2).clamp(-1, 1)
    out = pipe(a_portrait(), own, "a person nods", output_type="pt", other=other.numpy(), pose=pose)
    session = Session(bundle, a_portrait(), "a person nods")
    session.push(audio=own, other=other, pose=torch.cat([pose, pose[-1:].expand(20, -1)]))
    session.close()
    assert torch.equal(out.frames, film(session.frames())[:9])
    assert torch.equal(out.audio, own)
    free = pipe(a_portrait(), own, "a person nods", output_type="pt").frames
    assert not torch.equal(free, out.frames)
    with pytest.raises(UserError, match=r"^pose must be finite rows"):
        pipe(a_portrait(), own, pose=torch.zeros(4, 2))


def test_pictures_in_pictures_out(folder):
    pipe = AvatarPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    frames = pipe(image=picture, audio=some_sound(4800).expand(2, -1), prompt="", sampling_rate=48000).frames
    assert [frame.size for frame in frames] == [(16, 16), (16, 16)]


def test_the_folder_comes_back(folder, tmp_path):
    AvatarPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert load_student(tmp_path / "again").fingerprint == load_student(folder).fingerprint


def test_types_and_devices_are_given_as_in_diffusers(folder):
    pipe = AvatarPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, device_map="balanced")
    assert (pipe.dtype, pipe.to("cpu").device) == (torch.bfloat16, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    sound = some_sound(9 * PER_FRAME)
    narrow = pipe(a_portrait(), sound, "a person nods", output_type="pt").frames.float()
    gap = (narrow - film(play(load_student(folder), sound))[:9].float()).abs()
    assert 0 < gap.mean() < 1.5, "grey levels of 255"
    assert pipe.to(dtype=torch.float32).dtype == torch.float32


def test_mistakes_are_one_line(folder, tmp_path):
    pipe = AvatarPipeline.from_pretrained(folder)
    for call, says in [
        (lambda: pipe(a_portrait(), torch.zeros(0)), "audio is empty"),
        (lambda: pipe(a_portrait(), torch.zeros(99), output_type="gif"), "output_type: got 'gif'"),
        (lambda: AvatarPipeline.from_pretrained(tmp_path / "none"), "no student"),
        (lambda: AvatarPipeline.from_pretrained(folder, torch_dtype=torch.float16), "torch_dtype: got torch.float16"),
        (lambda: AvatarPipeline.from_pretrained(folder, device_map="tpu"), "device tpu cannot be used"),
        (lambda: AvatarPipeline.from_pretrained(folder, variant="fp8"), "from_pretrained: got variant"),
        (lambda: pipe.to("cuda:99"), "device cuda:99 cannot be used"),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*{says}[^\n]*$"):
            call()

"""A teacher from weights in a published layout: it denoises as the network that `convert` makes of them, and samples by Euler."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from teachers import Conditions, Guidance, UserError, load_teacher
from teachers.flow import sigma_grid
from teachers.networks.kind import AvatarTeacher
from teachers.teacher import Teacher
from tests.support.checkpoints import AVATAR, STEM, assert_equal, convert, load_network, put_lora, put_wan
from tests.support.tiny import a_teacher, randn, some_conditions, some_latents


def a_clip(batch: int = 1):
    """Conditions of a clip for AVATAR, and noise."""
    conditions = Conditions(
        text=randn(batch, 5, AVATAR.text_dim, seed=1),
        audio=randn(batch, 3, 4, AVATAR.audio_in // 4, seed=2),
        reference=randn(batch, 4, 1, 4, 4, seed=3),
    )
    return conditions, randn(batch, 4, 3, 4, 4, seed=4)


@pytest.mark.parametrize("layout", ["wan", "ours", "lora"])
def test_weights_in_any_layout_give_the_same_teacher(tmp_path, layout):
    base = put_wan(tmp_path / "wan", exact=False)
    lora = put_lora(tmp_path / "lora")
    convert(lora, tmp_path / "ours", "ours", base=base, widen=False)
    network = AvatarTeacher(load_network(tmp_path / "ours")).eval()
    if layout == "wan":
        convert(tmp_path / "ours", tmp_path / "again", "wan")
    teacher = {
        "ours": lambda: load_teacher(tmp_path / "ours"),
        "wan": lambda: load_teacher(tmp_path / "again"),
        "lora": lambda: load_teacher(str(lora), base=str(base)),
    }[layout]()
    conditions, x = a_clip()
    sigma = torch.tensor([0.6])
    with torch.no_grad():
        expected = network.denoise(x, sigma, conditions)
    assert_equal(teacher.denoiser.state_dict(), network.state_dict())
    assert torch.allclose(teacher.denoiser.denoise(x, sigma, conditions), expected, atol=1e-5)
    assert expected.abs().max() > 0.1
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())


def test_bf16_keeps_what_has_to_be_fp32(tmp_path):
    convert(put_wan(tmp_path / "wan", exact=False), tmp_path / "ours", "ours", widen=True)
    teacher = load_teacher(tmp_path / "ours", dtype=torch.bfloat16)
    types = {name: p.dtype for name, p in teacher.denoiser.named_parameters()}
    assert {torch.bfloat16, torch.float32} == set(types.values())
    assert types["net.proj_out.weight"] == torch.bfloat16
    assert all(kind == torch.float32 for name, kind in types.items() if "time_embedder" in name or "norm2" in name)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    convert(put_wan(tmp_path / "wan", exact=False), tmp_path / "ours", "ours", widen=True)
    tensors = load_file(tmp_path / "ours" / STEM)
    del tensors["proj_out.bias"]
    save_file(tensors, tmp_path / "ours" / STEM)
    with pytest.raises(UserError, match=r"weights do not fit: .*missing proj_out\.bias"):
        load_teacher(tmp_path / "ours")
    with pytest.raises(UserError, match=r"no weights: .*nowhere"):
        load_teacher(tmp_path / "nowhere")


def test_a_clip_is_the_guided_euler_solution_from_noise():
    teacher, conditions, noise = Teacher(a_teacher()), some_conditions(1), some_latents(1)
    guidance = Guidance(text=3.0, audio=2.0)
    x, grid = noise, sigma_grid(4, 5.0)
    with torch.no_grad():
        for sigma, following in pairwise(grid):
            level = torch.full((1,), sigma)
            full, text, nothing = (
                teacher.denoiser.denoise(x, level, c)
                for c in (conditions, conditions.drop("audio"), conditions.drop("text", "audio"))
            )
            x0 = nothing + 3 * (text - nothing) + 2 * (full - text)
            x = x + (following - sigma) / sigma * (x - x0)
    found = teacher.sample(conditions, noise, num_steps=4, shift=5.0, guidance=guidance)
    assert torch.allclose(found, x, atol=1e-5)
    assert not torch.allclose(found, teacher.sample(conditions, noise, num_steps=4), atol=1e-2), (
        "guidance is off by default"
    )
    assert len(list(teacher.states(conditions, noise, num_steps=4, shift=5.0, guidance=guidance))) == 5

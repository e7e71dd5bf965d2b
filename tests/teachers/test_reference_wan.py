"""The avatar DiT against an independent one, written from the equations (tests/teachers/reference/wan.py)."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teachers import flow
from teachers.conditions import Conditions, pack_rows
from teachers.networks.kind import AvatarTeacher
from teachers.networks.wan import NetworkConfig, build_network, with_reference
from tests.support.tiny import NETWORK, TEXT, randn, randomise
from tests.teachers.reference.wan import Reference, sinusoids

CHANNELS, STRIDE, AUDIO, F, H, W = 4, 4, 20, 3, 4, 6
PER_FRAME = torch.tensor([[0.0, 0.55, 1.0], [0.3, 0.72, 0.13]])
ONE = torch.tensor([[0.9], [0.4]]).expand(2, F)
CASES = [(prediction, sigma) for prediction in ("velocity", "reference") for sigma in ("one", "per frame")]


def a_net(prediction: str = "velocity", audio_at: tuple[int, ...] = (0, 1), **dims):
    """Two layers of two heads over 2 x 3 tokens a frame: time, rows and columns turn differently."""
    reference = dims.pop("reference", True)
    config = NetworkConfig(**NETWORK, audio_blocks=audio_at, prediction=prediction, reference=reference)
    given = {"latent_channels": CHANNELS, "stride": STRIDE, "text_dim": TEXT, "audio_dim": AUDIO}
    return randomise(build_network(config, **given | dims))


def some_inputs():
    """Noise, text, audio rows of pixel frames and the reference's latent; not one of them is zero."""
    x, image = randn(2, CHANNELS, F, H, W, seed=1), randn(2, CHANNELS, 1, H, W, seed=4)
    return x, randn(2, 5, TEXT, seed=2), randn(2, 1 + STRIDE * (F - 1), AUDIO, seed=3), image


def conditions(text, rows, image) -> Conditions:
    return Conditions(text=text, audio=pack_rows(rows, STRIDE), reference=image)


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert expected.abs().mean() > 0.1
    return float((out - expected).abs().max() / max(1.0, float(expected.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize(("prediction", "levels"), CASES)
def test_network_and_teacher_are_the_equations(prediction, levels, monkeypatch):
    sigma, (x, text, rows, image) = PER_FRAME if levels == "per frame" else ONE, some_inputs()
    net = a_net(prediction)
    reference = Reference(net.state_dict(), 2, (0, 1))
    assert step_distance(net, reference, x, sigma, text, rows, image) <= 1e-5

    # the network's own fp32 islands, its rope tables too
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    net = a_net(prediction).double()
    reference = Reference(net.state_dict(), 2, (0, 1))
    given = [tensor.double() for tensor in (x, sigma, text, rows, image)]
    assert step_distance(net, reference, *given) <= 1e-11


def step_distance(net, reference, x, sigma, text, rows, image) -> float:
    """Of the network's raw output and of the teacher's x0, with one sigma a clip where it is one."""
    level = sigma[:, 0] if (sigma == sigma[:, :1]).all() else sigma
    inputs, given = reference.see(x, image), conditions(text, rows, image)
    raw = reference(inputs, sigma, text, rows)
    out, _ = net(inputs, level, text, given.audio)
    if net.prediction == "velocity":
        x0 = inputs[:, :CHANNELS] - sigma[:, None, :, None, None] * raw
    else:
        x0 = image + raw
    x0 = torch.cat([image, x0[:, :, 1:]], dim=2)
    return max(distance(out, raw), distance(AvatarTeacher(net).denoise(x, level, given), x0))


@torch.no_grad()
@pytest.mark.parametrize("part", ["sigma", "text", "rows", "image"])
def test_the_reference_depends_on_every_part(part):
    """So agreement with it says something of every part."""
    net, (x, text, rows, image) = a_net(), some_inputs()
    reference = Reference(net.state_dict(), 2, (0, 1))

    def run(sigma, text, rows, image):
        return reference(reference.see(x, image), sigma, text, rows)

    given = {"sigma": ONE, "text": text, "rows": rows, "image": image}
    assert (run(**given | {part: given[part].flip(0)}) - run(**given)).abs().mean() > 1e-2


@torch.no_grad()
def test_audio_is_added_before_the_chosen_blocks_alone():
    net, (x, text, rows, image) = a_net(audio_at=(1,)), some_inputs()
    reference = Reference(net.state_dict(), 2, (1,))
    assert step_distance(net, reference, x, ONE, text, rows, image) <= 1e-5
    early = replace(reference, audio_at=(0,))
    inputs = reference.see(x, image)
    assert (early(inputs, ONE, text, rows) - reference(inputs, ONE, text, rows)).abs().mean() > 1e-2


@torch.no_grad()
def test_plain_wan_is_the_equations_without_audio_and_reference():
    net, (x, text, _, _) = a_net(audio_at=None, audio_dim=0, reference=False), some_inputs()
    out, _ = net(x, PER_FRAME, text)
    assert distance(out, Reference(net.state_dict(), 2, ())(x, PER_FRAME, text)) <= 1e-5


@torch.no_grad()
def test_the_clean_reference_is_written_over_frame_0_before_the_step_and_after():
    net, (x, text, rows, image) = a_net(), some_inputs()
    teacher, given = AvatarTeacher(net), conditions(text, rows, image)
    seen, gave = [], []
    net.patch_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.register_forward_hook(lambda _, inputs, out: gave.append(out[0]))
    x0 = teacher.denoise(x, ONE[:, 0], given)
    noisy, shown, mask = seen[0].split([CHANNELS, CHANNELS, 1], dim=1)
    assert torch.equal(noisy[:, :, :1], image), "the network sees the reference's frame noisy"
    assert torch.equal(noisy[:, :, 1:], x[:, :, 1:])
    assert all(torch.equal(shown[:, :, [i]], image) for i in range(F))
    assert mask.amax((0, 1, 3, 4)).tolist() == mask.amin((0, 1, 3, 4)).tolist() == [0.0, 1.0, 1.0]
    assert torch.equal(x0[:, :, :1], image)
    assert gave[0][:, :, :1].abs().mean() > 0.1, "the network gives it back itself: the second write shows nothing"
    assert torch.equal(with_reference(x, given)[1], Reference({}, 2, ()).see(x, image))


@torch.no_grad()
def test_a_trajectory_is_the_published_sampler(monkeypatch):
    """Its states differ from ours in frame 0 alone, on the way: there ours is on the straight path to the reference."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    net = a_net().double()
    x, text, rows, image = (tensor.double() for tensor in some_inputs())
    grid, given = flow.sigma_grid(6, 5.0), conditions(text, rows, image)
    *_, last = flow.solve(lambda x, sigma: AvatarTeacher(net).denoise(x, sigma, given), x, grid)
    reference = Reference(net.state_dict(), 2, (0, 1))
    assert distance(last, reference.sample(x, list(grid), text, rows, image)) <= 1e-11
    assert torch.allclose(last[:, :, :1], image, atol=1e-12)


@pytest.mark.parametrize("time", [0.0, 19.69, 936.0, 1000.0])
def test_sinusoids_of_the_time_are_in_fp64(time):
    """As in Wan's own code; diffusers' are of fp32 angles, 4e-5 off at a time near 1000."""
    own, times = a_net().condition_embedder.timesteps_proj, torch.tensor([time])
    assert (own(times) - sinusoids(times, own.num_channels)).abs().max() <= 6e-8
    assert own(times.double()).dtype == torch.float64


def test_the_reference_shares_no_code_with_the_networks():
    tree = ast.parse((Path(__file__).with_name("reference") / "wan.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name
        for node in imports
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert names == {"math", "collections.abc", "dataclasses", "itertools", "torch"}

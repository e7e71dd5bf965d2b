"""The real sizes of the recipes on a GPU that is none: one or two layers at full width, and a line through them to the full depth.

No device or type error, no value that the host waits for, and a peak that fits the card that the recipe is for.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import methods
from distill.compose import RECIPES
from distill.data.latents import ConditionEncoders
from distill.pipeline.evaluation.clip_sets import generated_at_once
from distill.pipeline.generate import student_clips, teacher_clips
from distill.planning.estimate import job_of
from distill.planning.job import batch_on, networks_on, shallow
from distill.recipe import load_recipe, spec_of
from teachers.conditions import Conditions
from teachers.flow import keyed_generator
from tests.support.fake_cuda import GIB, fake_cuda

CARD = 79 * GIB
LIVETALK = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere"])
SPEC, JOB = spec_of(LIVETALK), job_of(LIVETALK)


def some(num: int) -> tuple[Tensor, Conditions]:
    """Latents and conditions of clips of the recipe's size."""
    batch = batch_on(replace(JOB, at_once=num), "clips", "cuda")
    assert batch.x0 is not None
    return batch.x0, batch.conditions


class OnDisk:
    """Conditions of as many clips as the recipe validates on, as `StoredConditions` gives them."""

    num_rows, device = 2 * LIVETALK.eval.num_conditions, torch.device("cuda")

    def index(self, rows: Tensor) -> Conditions:
        return some(len(rows))[1]


def at_depth(run: Any, depth: int) -> float:
    """Peak bytes of run(layers) at `depth` layers, on the line through one and two."""
    one, two = run(1), run(2)
    return one + (depth - 1) * (two - one)


def test_encoders_take_all_clips_in_pieces():
    """256 clips of a training set, or 192 of a validation, take the memory of one, 7.4 GiB; two at once would take 13.8."""
    from diffusers import AutoencoderKLWan

    from teachers.codecs.wan_vae import WanVAE

    with fake_cuda() as gpu, torch.no_grad():
        with torch.device("cuda"):
            vae = WanVAE(AutoencoderKLWan())
        gpu.weigh(vae)
        none: Any = None
        encoders = ConditionEncoders(vae, none, none, device=torch.device("cuda"))
        video = torch.empty(2, 3, 81, 512, 512, dtype=torch.uint8)
        latents = encoders.encode(video)
        assert latents.shape == (2, 16, 21, 64, 64)
        assert latents.device.type == "cpu"
        shown = encoders.decode(latents)
        assert shown.shape == video.shape
        assert (shown.dtype, shown.device.type) == (torch.uint8, "cpu")
    assert not gpu.waits
    assert gpu.peak < 8 * GIB


def test_a_validation_generates_as_many_clips_at_once_as_fit():
    batch = generated_at_once(LIVETALK, SPEC)

    def peak(layers: int) -> float:
        with fake_cuda() as gpu, torch.inference_mode():
            student = networks_on(shallow(JOB, layers), "init", "cuda")["student"].eval()
            gpu.weigh(student)
            size = (OnDisk.num_rows, SPEC.codec.channels, SPEC.chunk_frames, *SPEC.latent_size[1:])
            with torch.autocast("cuda", dtype=torch.bfloat16):
                made = student_clips(student, OnDisk(), lambda *_: torch.empty(size), batch, torch.arange(batch))
            assert made.device.type == "cuda"
        assert not gpu.waits
        return gpu.peak

    assert at_depth(peak, SPEC.network.num_layers) < 16 * GIB


def test_a_solution_of_the_teacher_fits_beside_nothing():
    solved = replace(JOB, trajectories=replace(LIVETALK.trajectories, role="teacher"))

    def peak(layers: int) -> float:
        with fake_cuda() as gpu, torch.inference_mode():
            net = networks_on(shallow(solved, layers), "trajectories", "cuda")["teacher"]
            gpu.weigh(net)
            x0, conditions = some(1)
            teacher_clips(net, conditions, x0, (1.0, 0.5), LIVETALK.trajectories.guidance, 1)
        assert not gpu.waits
        return gpu.peak

    assert at_depth(peak, LIVETALK.teacher.network.num_layers) < 0.65 * CARD


@pytest.mark.parametrize(("slot", "role"), [("init", "student"), ("distill", "fake_score"), ("distill", "student")])
def test_a_loss_waits_for_nothing_and_fits(slot, role):
    """Forward, checkpointed, in bf16; weights as the recipe's engine shards them are the planner's."""

    def peak(layers: int) -> float:
        with fake_cuda() as gpu:
            job = shallow(JOB, layers)
            roles = networks_on(job, slot, "cuda")
            method: Any = methods.build(getattr(LIVETALK, slot).method, roles, (*SPEC.sigmas, 0.0))
            if slot == "distill":
                method._exits = lambda start, count, shared: [len(SPEC.sigmas) - 1] * count
            for name, net in roles.items():
                net.requires_grad_(name == role)
                gpu.weigh(net)
            weights = gpu.live
            batch = batch_on(job, slot, "cuda")
            rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = method.loss(role, batch, rng, shared)
            assert loss.value.dtype == torch.float32
        assert not gpu.waits
        return gpu.peak - weights

    assert at_depth(peak, SPEC.network.num_layers) < 0.6 * CARD

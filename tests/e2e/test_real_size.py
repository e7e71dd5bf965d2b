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
from distill.planning.job import Job, batch_on, meta_networks, networks_on, shallow
from distill.planning.live_bytes import LiveBytes, OnMeta
from distill.planning.trace import clip_costs
from distill.recipe import load_recipe, spec_of
from students.serving.optimize import cast
from teachers.conditions import Conditions
from teachers.flow import keyed_generator
from tests.support.fake_cuda import GIB, fake_cuda

CARD = 79 * GIB
LIVETALK = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere"])
SPEC, JOB = spec_of(LIVETALK), job_of(LIVETALK)
RECIPE_OF = {
    "14B to 1.3B": LIVETALK,
    "14B to 14B": load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere", "machine=livetalk_14b_8x80gb"]),
    "LoRA of 1.3B": load_recipe(RECIPES / "omniavatar_one_gpu.yaml", ["teacher.path=anywhere"]),
}


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
            cast(student.net, torch.bfloat16)
            gpu.weigh(student)
            weights = gpu.live
            size = (OnDisk.num_rows, SPEC.codec.channels, SPEC.chunk_frames, *SPEC.latent_size[1:])
            with torch.autocast("cuda", dtype=torch.bfloat16):
                made = student_clips(student, OnDisk(), lambda *_: torch.empty(size), batch, torch.arange(batch))
            assert made.device.type == "cuda"
        assert not gpu.waits
        return gpu.peak - weights

    found = at_depth(peak, SPEC.network.num_layers)
    assert found < 12 * GIB
    _, planned = clip_costs(JOB, "student")
    assert found == pytest.approx(planned, rel=0.1)


def test_a_solution_of_the_teacher_fits_beside_nothing():
    solved = replace(JOB, trajectories=replace(LIVETALK.trajectories, role="teacher"))

    def peak(layers: int) -> float:
        with fake_cuda() as gpu, torch.inference_mode():
            net = networks_on(shallow(solved, layers), "trajectories", "cuda")["teacher"]
            gpu.weigh(net)
            weights = gpu.live
            x0, conditions = some(1)
            teacher_clips(net, conditions, x0, (1.0, 0.5), LIVETALK.trajectories.guidance, 1)
        assert not gpu.waits
        return gpu.peak - weights

    found, (_, planned) = at_depth(peak, LIVETALK.teacher.network.num_layers), clip_costs(JOB, "teacher", 48)
    assert found < 8 * GIB
    assert found == pytest.approx(planned, rel=0.1)


def planned_forward(job: Job, slot: str, role: str) -> float:
    """Bytes but for weights at the peak of a loss's forward, as the planner counts them on the meta device."""
    nets, batch, live = meta_networks(job, slot, checkpointing=True), batch_on(job, slot), LiveBytes()
    for net in nets.values():
        live.weigh(net)
    rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
    method = methods.build(job.stages[slot].method, nets, (*job.spec.sigmas, 0.0))
    with OnMeta(shared), live:
        live.count(x for x in (*batch.conditions.features.values(), batch.x0, batch.states) if x is not None)
        loss = method.loss(role, batch, rng, shared)
    assert loss.value.requires_grad
    return max(live.points.values())


@pytest.mark.parametrize(
    ("name", "slot", "role", "gib"),
    [
        ("14B to 1.3B", "init", "student", 14),  # with keys and values that nobody asks for 25
        ("14B to 1.3B", "distill", "fake_score", 47),
        ("14B to 1.3B", "distill", "student", 47),
        ("14B to 14B", "init", "student", 70),
        ("14B to 14B", "distill", "student", 70),
        ("LoRA of 1.3B", "distill", "student", 47),
    ],
)
def test_a_loss_waits_for_nothing_and_takes_what_is_planned(name, slot, role, gib):
    """Forward, checkpointed, in bf16, over weights in bf16 as FSDP2 gathers them; shards of weights are the planner's. A line
    through one and two blocks is above the truth, for both alike."""
    recipe = RECIPE_OF[name]
    whole = job_of(recipe)

    def peak(layers: int) -> float:
        with fake_cuda() as gpu:
            job = shallow(whole, layers)
            roles = networks_on(job, slot, "cuda")
            method: Any = methods.build(getattr(recipe, slot).method, roles, (*SPEC.sigmas, 0.0))
            if slot == "distill":
                method._exits = lambda start, count, shared: [len(SPEC.sigmas) - 1] * count
            for name, net in roles.items():
                cast(net.net, torch.bfloat16)
                for p in net.parameters():
                    p.requires_grad_(p.requires_grad and name == role)
                gpu.weigh(net)
            weights = gpu.live
            batch = batch_on(job, slot, "cuda")
            rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = method.loss(role, batch, rng, shared)
            assert loss.value.dtype == torch.float32
        assert not gpu.waits
        return gpu.peak - weights

    depth = whole.spec.network.num_blocks
    found = at_depth(peak, depth)
    assert found < gib * GIB
    planned = at_depth(lambda layers: planned_forward(shallow(whole, layers), slot, role), depth)
    print(f"{name} {slot}.{role}: simulated {found / GIB:.2f}, planned {planned / GIB:.2f} GiB")
    assert found == pytest.approx(planned, rel=0.1)

"""The real sizes of the recipes on a GPU that is none: the bodies of the stages at full width, with two blocks, beside the plan.
The plan's lines along the depth are tested elsewhere.

No device or type error, no value that the host waits for, a peak that is the planned one and fits the card that the recipe is for.
Each fault that once made a run of this size impossible is planted, and seen.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from distill.commands import devices
from distill.commands.bench import SHAPES, random_student
from distill.compose import RECIPES
from distill.data.encoders import ConditionEncoders
from distill.pipeline import artifacts, pretrained
from distill.pipeline.evaluation.clip_sets import generated_at_once
from distill.pipeline.generate import student_clips, teacher_clips
from distill.planning.job import Job, batch_on, job_of, networks_on, shallow
from distill.planning.trace import clip_costs
from distill.recipe import load_recipe, spec_of
from students.networks.causal_wan import CausalWan
from students.serving import inputs, session
from students.serving.optimize import cast as cast_network
from students.serving.session import Session
from teachers.codecs import wan_vae
from teachers.conditions import Conditions
from teachers.networks.wan import NetworkConfig
from tests.support.sizes.fake_cuda import GIB, FakeGPU, fake_cuda
from tests.support.sizes.fake_ranks import fake_ranks
from tests.support.sizes.real_size import (
    BLOCKS,
    CARD,
    cut,
    fake_mesh,
    job,
    loss_phases,
    planned_peak,
    planned_phases,
    rank_peak,
    recipe,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]

ONE_CARD = ("livetalk", "self_forcing", "omniavatar_one_gpu")
ODD = 0.1 * GIB
"""Tables, conditions and noise, which do not grow with the depth."""


def some(given: Job, num: int) -> tuple[Tensor, Conditions]:
    """Latents and conditions of clips of the recipe's size."""
    batch = batch_on(replace(given, at_once=num), "clips", "cuda")
    assert batch.x0 is not None
    return batch.x0, batch.conditions


class OnDisk:
    """Conditions of as many clips as the recipe validates on, as `StoredConditions` gives them."""

    device = torch.device("cuda")

    def __init__(self, given: Job, num_rows: int):
        self.given, self.num_rows = given, num_rows

    def index(self, rows: Tensor) -> Conditions:
        return some(self.given, len(rows))[1]


# Encoding and decoding: data, extractors, health, validation, evaluate -------------------------------------------------


def coded(decode: bool = True) -> FakeGPU:
    """Two clips of 81 frames through Wan's VAE, there and back, as every stage does it."""
    height = width = 512
    from diffusers import AutoencoderKLWan

    with fake_cuda() as gpu, torch.no_grad():
        with torch.device("cuda"):
            vae = wan_vae.WanVAE(AutoencoderKLWan())
        gpu.weigh(vae)
        none: Any = None
        encoders = ConditionEncoders(vae, none, none, device=torch.device("cuda"))
        video = torch.empty(2, 3, 81, height, width, dtype=torch.uint8)
        found = encoders.encode(video)
        assert found.shape == (2, 16, 21, height // 8, width // 8)
        assert found.device.type == "cpu"
        if decode:
            shown = encoders.decode(found)
            assert shown.shape == video.shape
            assert (shown.dtype, shown.device.type) == (torch.uint8, "cpu")
    return gpu


def test_encoders_take_all_clips_in_pieces():
    """256 clips of a training set, or 192 of a validation, take the memory of one."""
    gpu = coded()
    assert not gpu.waits
    assert gpu.peak < 8 * GIB


def test_clips_that_are_encoded_at_once_are_seen(monkeypatch):
    """Finding 1 of an earlier reading: two clips already take 8 GiB to encode, 256 would take 950."""
    monkeypatch.setattr("distill.data.encoders.clips_at_once", lambda *_: 10**6)
    assert coded(decode=False).peak > 7.5 * GIB


# Clips that are generated: trajectories, health, validation, evaluate ---------------------------------------------------


def rolled_out(given: Job, batch: int, num_rows: int) -> float:
    """Bytes but for weights of a rollout of `batch` of the clips that a stage asks for."""
    with fake_cuda() as gpu, torch.inference_mode():
        student = networks_on(given, "init", "cuda")["student"].eval()
        cast_network(student.net, torch.bfloat16)
        gpu.weigh(student)
        weights, spec = gpu.live, given.spec
        gpu.peak = weights
        size = (batch, spec.codec.channels, spec.chunk_frames, *spec.latent_size[1:])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            rows = torch.arange(batch)
            made = student_clips(student, OnDisk(given, num_rows), lambda _: lambda *__: torch.empty(size), batch, rows)
        assert made.device.type == "cuda"
    assert not gpu.waits
    return gpu.peak - weights


@pytest.mark.parametrize("name", ["livetalk", "self_forcing"])  # omniavatar_one_gpu's student is livetalk's
def test_a_rollout_takes_what_is_planned(name):
    """Of health, validation and evaluate: as many clips at once as fit, one at these sizes."""
    given, small = recipe(name), cut(name)
    assert generated_at_once(given, small.spec) == small.at_once == 1
    found = rolled_out(small, 1, 2 * given.eval.num_conditions)
    assert found == pytest.approx(clip_costs(small, "student")[1], rel=0.02, abs=ODD)
    assert clip_costs(job(name), "student")[1] < 13 * GIB


def test_a_batch_of_48_clips_is_seen():
    """Finding 3: `eval.batch_size` clips at once are more than any card has."""
    many = {"at_once": 48}
    small = replace(cut("livetalk"), **many)
    assert rolled_out(small, 48, 192) == pytest.approx(clip_costs(small, "student")[1], rel=0.1)
    assert clip_costs(replace(job("livetalk"), **many), "student")[1] > 3 * CARD


def solved(given: Job, role: str) -> float:
    """Bytes but for weights of one guided step of `role`, as trajectories, health and evaluation run it."""
    assert given.trajectories is not None
    given = replace(given, trajectories=replace(given.trajectories, role=role))
    with fake_cuda() as gpu, torch.inference_mode():
        net = networks_on(given, "trajectories", "cuda")[role]
        assert net.net.compute_dtype == torch.bfloat16, "finding 8: in fp32 it takes 8 times as long"
        gpu.weigh(net)
        weights, (x0, conditions) = gpu.live, some(given, 1)
        gpu.peak = weights
        teacher_clips(net, conditions, lambda _: x0, (1.0, 0.5), given.trajectories.guidance, 1)
    assert not gpu.waits
    return gpu.peak - weights


@pytest.mark.parametrize("name", ONE_CARD)
def test_a_solution_takes_what_is_planned(name):
    """A guided step of the teacher, and of what solves the trajectories, in the type that it is held in."""
    small = cut(name)
    assert small.trajectories is not None
    for role in dict.fromkeys(("teacher", small.trajectories.role)):
        stage = "clips" if role == "teacher" else "trajectories"
        assert solved(small, role) == pytest.approx(clip_costs(small, role, 48, stage)[1], rel=0.02, abs=ODD)
        assert clip_costs(job(name), role, 48, stage)[1] < 8 * GIB


def test_trajectories_in_fp32_are_seen():
    """Finding 8: a recipe that says no precision for its solver."""
    words = ["teacher.path=anywhere", "base.precision=fp32"]
    given = job_of(load_recipe(RECIPES / "livetalk.yaml", words))
    with pytest.raises(AssertionError, match="finding 8"):
        solved(shallow(given, 1), "base")


# Networks of a training stage -------------------------------------------------------------------------------------------


def frozen_teacher(monkeypatch) -> tuple[int, int]:
    """(Bytes of the teacher whole, bytes at the peak while one rank of eight makes what it trains against)."""
    config, folder = recipe("livetalk"), cast(Any, SimpleNamespace(stage_dir=Path))
    config = replace(config, teacher=replace(config.teacher, network=config.teacher.network.shallow(2 * BLOCKS)))
    none, plain = cast(Any, None), pretrained.outline
    with fake_ranks(8), fake_mesh(config.engine, 8) as rank, fake_cuda("cpu") as gpu:

        def outline(*given: Any, **named: Any) -> Any:
            net = plain(*given, **named)
            gpu.peak = (
                gpu.live
            )  # its parameters are fake CPU tensors for a moment, where they would be on the meta device
            return net

        for place in (artifacts, pretrained):
            monkeypatch.setattr(place, "fill_given", lambda *_, **__: None)
            monkeypatch.setattr(place, "outline", outline)
        made = artifacts.Artifacts(config, rank, spec_of(config), none, folder, none)
        net = made.frozen("teacher")
        gpu.weigh(net)
    sizes = [p.numel() * p.element_size() for p in net.parameters()]
    return sum(sizes), gpu.peak


def test_a_teacher_is_born_in_shards(monkeypatch):
    """An eighth of it, and of two of its four blocks at a time what is gathered."""
    whole, peak = frozen_teacher(monkeypatch)
    assert peak < 0.6 * whole


def test_a_second_whole_teacher_is_seen(monkeypatch):
    """Finding 5: it was made whole, copied, and the copy cut into shards."""
    monkeypatch.setattr(artifacts.Artifacts, "shards", False)
    whole, peak = frozen_teacher(monkeypatch)
    assert peak > 1.9 * whole


# Losses: init, distill ---------------------------------------------------------------------------------------------------

LOSSES = [  # the last two are LoRAs
    ("livetalk", "init", "student"),
    ("livetalk", "distill", "fake_score"),
    ("livetalk", "distill", "student"),
    ("livetalk 14B to 14B", "init", "student"),
    ("livetalk 14B to 14B", "distill", "student"),
    ("self_forcing", "init", "student"),
    ("omniavatar_one_gpu 24 GB", "init", "student"),
    ("omniavatar_one_gpu 24 GB", "distill", "student"),
]


@pytest.mark.parametrize(("name", "slot", "role"), LOSSES)
def test_a_loss_waits_for_nothing_and_takes_what_is_planned(name, slot, role):
    """Every phase of its forward pass on the device."""
    small = cut(name)
    found, waits = loss_phases(small, slot, role)
    planned = planned_phases(small, slot, role)[:-1]
    assert not waits
    assert len(found) == len(planned)
    assert max(abs(a - b) for a, b in zip(found, planned, strict=True)) < ODD


@pytest.mark.parametrize(
    ("name", "slot", "role"),
    [
        ("livetalk", "distill", "student"),
        ("livetalk", "distill", "fake_score"),
        ("livetalk 14B to 14B", "init", "student"),
        ("omniavatar_one_gpu 24 GB", "init", "student"),
    ],
)
def test_a_rank_holds_what_is_planned(name, slot, role):
    """The backward pass too, under the engine of the recipe: in shards on 8 GPUs, or whole on one. All of them, at any depth:
    `python -m tests.support.sizes.real_size NAME`."""
    found, planned = rank_peak(name, slot, role), planned_peak(name, slot, role)
    print(f"{name} {slot}.{role}: simulated {found / GIB:.2f}, planned {planned / GIB:.2f} GiB")
    assert found == pytest.approx(planned, rel=0.06)


def test_keys_that_nothing_reads_are_seen(monkeypatch):
    """Finding 17: the init stage kept the keys and values of every block, some 0.25 GiB each."""
    run, small = CausalWan._run, cut("livetalk")
    planned = planned_phases(small, "init", "student")[:-1]

    def kept(self: CausalWan, *given: Any, **named: Any) -> Any:
        return run(self, *given, **(named | {"keep": True}))

    monkeypatch.setattr(CausalWan, "_run", kept)
    assert max(loss_phases(small, "init", "student")[0]) > max(planned) + 0.2 * GIB


# A stream ----------------------------------------------------------------------------------------------------------------


def served(monkeypatch) -> set[tuple[str, torch.dtype]]:
    """Where the matrices of a student are, and in which type, that a command has loaded on a machine with a GPU."""
    shape = replace(SHAPES["livetalk"], network=NetworkConfig(num_layers=1, audio_blocks=(0,)))
    parser = argparse.ArgumentParser()
    devices.add_arguments(parser)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "device_name", str)
    with fake_cuda():
        bundle = random_student(shape, torch.device("cpu"), torch.float32)
        monkeypatch.setattr("students.weights.checkpoint.load_student", lambda _: bundle)
        net = devices.load(Path("nowhere"), parser.parse_args([])).student.net
        return {(p.device.type, p.dtype) for p in net.blocks.parameters() if p.ndim == 2}


def test_commands_serve_on_the_gpu(monkeypatch):
    assert served(monkeypatch) == {("cuda", torch.bfloat16)}


def test_a_student_that_stays_on_the_cpu_is_seen(monkeypatch):
    """Finding 7: what a command had loaded was served as it came, on one CPU in fp32."""
    monkeypatch.setattr(devices.optimize, "prepare", lambda bundle, *_: bundle)
    assert served(monkeypatch) == {("cpu", torch.float32)}


def streamed(blocks: int, lead: int, monkeypatch) -> tuple[float, float]:
    """Bytes on the device after each of a stream's chunks but for weights, when its context is full: at most, and at rest."""
    for module, name in ((inputs, "checked_sound"), (session, "check_reference")):
        monkeypatch.setattr(module, name, lambda *given: given[1])  # fake tensors have no values to check
    shape = replace(SHAPES["livetalk"], network=NetworkConfig(num_layers=blocks, audio_blocks=(0,)))
    with fake_cuda() as gpu:
        bundle = random_student(shape, torch.device("cuda"), torch.bfloat16)
        gpu.weigh(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text)
        weights, spec = gpu.live, bundle.spec
        stream = Session(bundle, torch.zeros(3, spec.height, spec.width), "a person nods", lead=lead)
        gpu.waits.clear()
        made = 0
        while made <= (spec.history.capacity or 0) + lead:
            stream.push(audio=torch.zeros(16_000))
            for _ in stream.frames():
                stream.played(stream.point.frame)
                made += 1
            gpu.peak = gpu.live
        stream.settle()
        assert sum(gpu.waits.values()) == made, "for its frames alone"
        return gpu.peak - weights, gpu.live - weights


def test_a_stream_holds_its_context_twice_and_what_can_be_taken_back(monkeypatch):
    """Each block: rotated, in buffers for as many chunks as are seen; un-rotated, those and one for each point that `interrupt` can
    return to; and keys and values of the text."""
    spec = SHAPES["livetalk"].spec
    chunk = 2 * 2 * spec.network.num_heads * spec.network.head_dim * 3 * 1024  # bf16 keys and values of 3 x 1024 tokens
    text = 2 * 2 * 512 * 1536
    capacity = spec.history.capacity
    assert capacity is not None
    for lead in (1, 3):
        one, two = (streamed(blocks, lead, monkeypatch)[1] for blocks in (1, 2))
        assert two - one == pytest.approx((capacity + capacity + lead) * chunk + text, rel=0.03)

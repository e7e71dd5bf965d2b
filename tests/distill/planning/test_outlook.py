"""What `distill plan` foretells of a stage: FLOPs against closed forms, depth, hours, bytes, overrides, the command."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from distill.cli import Parser
from distill.commands import plan as command
from distill.compose import RECIPES
from distill.planning import report
from distill.planning import trace as tracing
from distill.planning.codec import CodecCosts
from distill.planning.estimate import GIB, Plan, make_plan
from distill.planning.job import Job, job_of
from distill.planning.live_bytes import LiveBytes
from distill.planning.outlook import (
    FP32_SLOWER,
    Part,
    Rates,
    StageOutlook,
    copied_bytes,
    host_bytes,
    memory,
    outlook,
    warnings,
)
from distill.planning.trace import DEPTHS, clip_costs, step_costs
from distill.recipe import Recipe, load_recipe, spec_of
from students.history import History
from teachers.codecs.wan_vae import WanVAE
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, GuidanceRange
from tests.distill.planning.test_estimate import a_job, a_plan
from tests.support.tiny import make_spec

RATES = Rates(tflops=1e-12 / 3600, mfu=1.0)  # one FLOP an hour


def a_stage(**changes) -> StageOutlook:
    facts = {"name": "distill", "parts": (), "beside": {}}
    return StageOutlook(**(facts | changes))


# FLOPs ----------------------------------------------------------------------------------------------------------------


class Wan:
    """Closed forms of a Wan DiT: (FLOPs of its matrices, of its attention) of queries that see so many keys; 2 a multiply-add."""

    def __init__(self, kind: Any, text: int = 512):
        self.kind, self.text, self.width = kind, text, kind.num_heads * kind.head_dim

    def forward(self, tokens: int, pairs: float) -> tuple[float, float]:
        width, text = self.width, self.text
        matrices = 2 * tokens * width * (4 * width + 2 * width + 2 * self.kind.ffn_dim) + 2 * text * width * 2 * width
        return self.kind.num_layers * matrices, self.kind.num_layers * 4 * width * (pairs + tokens * text)


def total(counts: Sequence[tuple[float, float]], trained: bool = False) -> float:
    """Trained: forward, forward again (checkpointing), and a backward of two times the matrices; of attention two and a half times,
    as flash kernels compute their scores again."""
    matrices, attention = (sum(part) for part in zip(*counts, strict=True))
    return 4 * matrices + 4.5 * attention if trained else matrices + attention


@cache
def planned(name: str) -> tuple[Recipe, Job, Plan]:
    """A recipe at its real size."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["teacher.path=anywhere"])
    job = job_of(recipe)
    return recipe, job, make_plan(job)


@pytest.mark.slow
@pytest.mark.long
def test_flops_of_livetalk_follow_from_its_matrices():
    """Within 10 %, all three; the plan has the small parts too, time, audio and the embeddings."""
    _, livetalk, plan = planned("livetalk")
    spec, method = livetalk.spec, livetalk.stages["distill"].method
    small, large = Wan(spec.network), Wan(livetalk.networks["teacher"])
    chunk = spec.chunk_frames * spec.token_grid[0] * spec.token_grid[1]
    tokens, n = chunk * spec.num_chunks, spec.num_chunks
    seen = [len(spec.history.visible(j)) + 1 for j in range(n)]

    solved = 16_000 * 48 * 2 * total([small.forward(tokens, tokens**2)])
    flops, _ = clip_costs(livetalk, "base", 48, "trajectories")
    assert 16_000 * flops == pytest.approx(solved, rel=0.1)
    assert 16_000 * flops == pytest.approx(2.17e20, rel=0.1)  # counted on fake tensors, with another tool

    init = plan.costs["init"]
    clip = small.forward(2 * tokens, 2 * sum(seen) * chunk**2)  # noisy chunks, and the clean ones that they see
    assert init.flops["student"] == pytest.approx(total([clip], trained=True), rel=0.1)
    assert init.updates == {"student": 20_000}

    dmd = plan.costs["distill"]
    calls = [small.forward(chunk, count * chunk**2) for count in seen]
    rollout = 2.5 * total(calls) + total(calls[:-1])  # two and a half steps in the mean, and commits
    whole = small.forward(tokens, tokens**2)
    fake = rollout + total([whole], trained=True)
    student = rollout + total(calls, trained=True) - total(calls) + total([whole])
    student += 2 * total([large.forward(tokens, tokens**2)])
    assert dmd.flops["fake_score"] == pytest.approx(fake, rel=0.1)
    assert dmd.flops["student"] == pytest.approx(student, rel=0.1)
    assert dmd.updates == {"student": 1000, "fake_score": 5000}
    assert method.fake_updates == 5
    print(f"{16_000 * flops:.3g} {20_000 * 64 * init.flops['student']:.3g} "
          f"{64 * sum(dmd.updates[role] * dmd.flops[role] for role in dmd.flops):.3g}")  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", ["init", "distill"])
def test_flops_along_a_line_are_those_of_the_whole_depth(stage):
    network = replace(make_spec().network, num_layers=6, audio_blocks=(0,))
    other = replace(network, num_layers=4)
    job = a_job(make_spec(network=network), stage=stage, networks={"teacher": other}, checkpointing=True)
    for role, found in step_costs(job, stage).flops.items():
        _, whole, *_ = tracing._micro_step(job, stage, role)
        assert found == pytest.approx(whole, rel=2e-3)


def test_flops_along_a_line_have_every_window_of_a_cycle():
    network = replace(make_spec().network, num_layers=8, audio_blocks=(0,))
    spec = make_spec(History(sinks=0, window=(0, 0, 3)), network=network)
    job = a_job(spec, stage="init", networks={})
    for role, found in step_costs(job, "init").flops.items():
        assert found == pytest.approx(tracing._micro_step(job, "init", role)[1], rel=2e-3)


def test_a_cycle_of_windows_saves_flops_and_memory_on_livetalks_shape():
    """A step of a served stream by the closed form, and 1.3 times fewer FLOPs where four of five blocks see one chunk back."""
    recipe = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere"])

    def costs(window: int | tuple[int, ...]) -> tuple[float, int]:
        history = replace(recipe.student.history, sinks=0, window=window)
        found = tracing.stream_costs(job_of(replace(recipe, student=replace(recipe.student, history=history))))
        assert found is not None
        return found

    spec = spec_of(recipe)
    chunk = spec.chunk_frames * spec.token_grid[0] * spec.token_grid[1]
    (whole, kept), (cycle, less) = costs(4), costs((1, 1, 1, 1, 4))
    matrices, attention = Wan(spec.network).forward(chunk, 5 * chunk**2)
    text = spec.network.num_layers * (4 * spec.network.feature_width**2 * 512)  # read once a stream
    assert whole == pytest.approx(matrices - text + attention, rel=0.01)
    assert kept == 2 * 4 * chunk * spec.network.kv_per_token * 2
    assert 5 * 4 * less == (4 * 1 + 4) * kept
    assert 1.3 < whole / cycle < 1.4


@pytest.mark.slow
def test_flops_along_a_line_have_every_audio_injector():
    """S2V's three of nine blocks, where a line through one and two blocks would have one."""
    job = job_of(load_recipe(RECIPES / "s2v.yaml", ["size=tiny"]))
    kind: Any = replace(job.spec.network, num_layers=9, inject_after=(0, 4, 8))
    job = replace(job, spec=replace(job.spec, network=kind), networks=dict.fromkeys(job.networks, kind))
    found = step_costs(job, "init").flops["student"]
    _, whole, *_ = tracing._micro_step(job, "init", "student")
    assert found == pytest.approx(whole, rel=2e-3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("switches", [(), ("checkpointing",)])
def test_memory_along_a_line_is_that_of_the_whole_depth(switches):
    """Within 6 %, and 20 where whole gradients meet what checkpointing keeps in the middle of the backward pass, which two points
    miss."""
    job = a_job(make_spec(network=replace(make_spec().network, num_layers=2 * DEPTHS[1] + 4)))
    for role in ("student", "fake_score"):
        found = tracing.trace(job, "distill", role, *switches)
        whole = tuple(sorted(tracing._live(job, "distill", role, *switches).points.items()))
        assert len(found) == 2 < len(whole)
        for each, off in ((0, 0.06), (4, 0.2)):  # bytes of a gradient that is held
            peak, expected = (max(held * each + other for held, other in points) for points in (found, whole))
            assert peak == pytest.approx(expected, rel=off)


# Hours and bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "ranks", "hours"), [(0, 4, 25.0), (5, 4, 40.0), (1, 4, 100.0), (5, 1, 100.0), (3, 8, 100 / 3)]
)
def test_ranks_share_work_in_whole_jobs(jobs, ranks, hours):
    part = Part(name="one", flops=100, precision="bf16", jobs=jobs)
    assert a_stage(parts=(part,)).hours(ranks, RATES) == pytest.approx(hours)
    slow = replace(part, precision="fp32")
    assert a_stage(parts=(part, slow)).hours(ranks, RATES) == pytest.approx(hours * (1 + FP32_SLOWER))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["livetalk", "self_forcing"])
def test_no_rank_waits_long_for_another_and_every_stage_fits_its_card(name):
    """The longest job is one clip of the 14B teacher, of which two ranks compute a branch each. Of a card of 80 GB 79 GiB are of
    use."""
    recipe, job, plan = planned(name)
    stages, engine = outlook(plan, job, recipe), report.engine_of(recipe)
    peaks = {
        stage.name: memory(plan, stage, engine[0], ranks, engine[1])["peak"] for stage in stages for ranks in (64, 8)
    }
    assert {stage: size / GIB for stage, size in peaks.items() if size > 79 * GIB} == {}
    assert {"extractors", "trajectories", "init", "distill", "evaluate"} <= {stage.name for stage in stages}
    waits = {
        f"{stage.name}: {part.name} on {ranks}": part.wait(ranks, Rates())
        for stage in stages for part in stage.parts for ranks in (1, 8, 64)
    }  # fmt: skip
    assert {what: seconds for what, seconds in waits.items() if seconds > 60 * 5} == {}
    assert max(waits.values()) > 60, "one clip of the teacher"


@pytest.mark.slow
@pytest.mark.long
def test_a_recipe_without_trajectories_is_planned():
    """LiveAvatar's sigmas are on no grid of its teacher, from which it learns no solutions."""
    job = job_of(load_recipe(RECIPES / "liveavatar.yaml", ["size=tiny"]))
    plan = make_plan(job)
    assert not job.solves
    assert {update.stage for update in plan.updates} == {"init", "distill"}
    assert (plan.trajectories, plan.trajectory_forwards) == (0, 0)


def test_what_is_alive_beside_counts():
    """The peak is that of an update or of clips, over all else."""
    plan = a_plan(((0, 9000),))
    stage = a_stage(beside={"encoders": 100}, clips=7000)
    ddp = memory(plan, stage, "ddp", 4)
    assert ddp["peak"] == ddp["update"] + 100
    large = replace(stage, clips=1e9)
    assert memory(plan, large, "ddp", 4)["clips"] == 1e9 + 32_000 + 8000 + 16_000 + 4000
    alone = replace(stage, clips=0, made={"student": (4000, 2e9), "teacher": (32_000, 1e9)})
    assert memory(plan, alone, "ddp", 4)["clips"] == 2e9 + 4000
    apart = replace(alone, made={"teacher": (32_000, 1e9)})
    assert memory(plan, apart, "ddp", 4, ("offload teacher",))["clips"] == 1e9 + 4 * 1100
    assert [host_bytes(plan, replace(stage, host=(10, 1)), "ddp", ranks) for ranks in (1, 8, 64)] == [11, 81, 81]
    waits = host_bytes(plan, replace(apart, host=(10, 1)), "ddp", 64, ("offload teacher",))
    assert waits == 8 * (10 + 32_000) + 1
    copied = [
        [copied_bytes(replace(stage, copied=64), kind, ranks) for ranks in (1, 8, 64)] for kind in ("ddp", "fsdp2")
    ]
    assert copied == [[64, 64, 64], [64, 64, 8]], "rank 0's, or what the machine's ranks store"


def test_overrides_are_the_fewest_that_make_it_fit():
    plan = a_plan(((0, 40 * GIB),), count=GIB)
    shipped = report.Shipped((a_stage(beside={"encoders": GIB}),), RATES, "ddp", ())
    ask = {limit: report.overrides(plan, shipped, 1, limit) for limit in (101, 100, 65, 64, 4)}
    saved, streamed = ["engine.checkpointing=true"], ["engine.checkpointing=true", "engine.offload=[teacher]"]
    assert ask == {101: [], 100: saved, 65: saved, 64: streamed, 4: None}
    away = ["engine.kind=fsdp2", "engine.checkpointing=true", "engine.offload=[teacher,student,fake_score]"]
    assert report.overrides(plan, shipped, 1, 7) == away
    sharded = report.overrides(plan, shipped, 64, 20)
    assert sharded == ["engine.kind=fsdp2", "engine.checkpointing=true"]
    text = report.as_text(plan, "name", [1], [], 4, shipped)
    assert "does not fit into 4 GiB as shipped: distill 101.0; take more GPUs, smaller batches or networks" in text


def test_a_large_network_in_fp32_is_warned_of():
    slow = Part(name="base", flops=1, precision="fp32", parameters=14 * 10**8, key="base.precision")
    stages = [a_stage(name="trajectories", parts=(slow,)), a_stage(parts=(replace(slow, parameters=10**9),))]
    (line,) = warnings(stages)
    assert line.startswith("warning: trajectories: base, 1.4e9 parameters, in fp32, 8.4 times slower")
    assert line.endswith("; set base.precision=bf16")
    assert not list(warnings([a_stage(parts=(replace(slow, precision="bf16"),))]))


@pytest.mark.parametrize("name", ["livetalk", "self_forcing"])
def test_shipped_trajectories_are_solved_in_bf16(name):
    base = load_recipe(RECIPES / f"{name}.yaml", ["teacher.path=anywhere"]).base
    assert base is not None
    assert base.precision == "bf16"


@pytest.mark.parametrize(
    ("scales", "passes"),
    [
        (EmbeddedScales(both=GuidanceRange()), 2),
        (EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange()), 3),
    ],
    ids=["one scale", "two scales"],
)
def test_trajectories_under_drawn_scales_take_the_flops_of_their_passes(scales, passes):
    """Whatever the recipe's own guidance, which the teacher's clips of the report take."""
    job = job_of(load_recipe(RECIPES / "guided_avatar.yaml", ["trajectories.guidance={text: 2.0, audio: 2.0}"]))
    own = clip_costs(job, "teacher", 1, "clips")[0] / 2
    job = replace(job, spec=replace(job.spec, guidance=scales))
    assert clip_costs(job, "teacher", 1, "trajectories")[0] == passes * own


@pytest.mark.slow
def test_drawn_conditions_cost_the_encoding_and_the_bytes_of_a_portrait():
    """Beside films, whose number a folder alone says, and in their place."""
    recipe, job, plan = planned("livetalk")
    drawn = ("data.name=conditions", "data.path=x", "data.portraits=x", "data.speech=x", "data.num_drawn=1000")

    def data(*words: str) -> StageOutlook:
        return outlook(plan, job, load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere", *drawn, *words]))[0]

    beside, alone, some = data(), data("data.train_on_films=false"), data("data.world.num_train=12")
    copies, frame = 1 + recipe.data.mirror, math.prod(job.spec.latent_size)
    assert alone.disk_per_clip == some.disk_per_clip == 0
    film = (some.disk - alone.disk) / 12
    assert beside.disk_per_clip == film
    assert film - alone.disk / 1000 == 2 * copies * frame * (job.spec.horizon_frames - 1)
    with torch.device("meta"):
        vae = WanVAE(AutoencoderKLWan())
    with LiveBytes() as one:
        vae.encode(torch.empty(1, 3, 1, 64, 64, device="meta"))
    portrait = one.flops * job.spec.height * job.spec.width / 64**2
    assert beside.flops == alone.flops == pytest.approx(1000 * copies * portrait)
    assert some.flops - alone.flops > 12 * copies * 20 * portrait


# The command ----------------------------------------------------------------------------------------------------------


def run_plan(*words) -> int:
    parser = Parser(prog="distill plan")
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["scratch_avatar", "flowact_avatar", "midas_duplex"])
def test_every_stage_has_its_numbers(name, tmp_path, capsys):
    words = ("preset=smoke", "--gpus", "1,2", "--dollars-per-gpu-hour", "3", "--json", tmp_path / "plan.json")
    assert run_plan(RECIPES / f"{name}.yaml", *words) == 0
    text, numbers = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert text.count("fits as shipped into 80 GiB") == 2
    assert "as a LoRA" not in text
    assert numbers["overrides"] == {"1": [], "2": []}
    for count in ("1", "2"):
        stages = numbers["stages"][count]
        trained = {"scratch_avatar": ["teacher"], "flowact_avatar": [], "midas_duplex": ["teacher", "ar_teacher"]}[name]
        assert list(stages) == ["data", "extractors", *trained, "trajectories", "init", "distill", "evaluate"]
        for stage, found in stages.items():
            assert found["dollars"] == pytest.approx(3 * int(count) * found["hours"])
            assert f"\n{stage}" in text
            if stage not in ("data", "extractors"):
                assert found["flops"] > 0
                assert found["memory_bytes"]["peak"] > 0
    assert numbers["rates"] == {"tflops": 989.0, "mfu": 0.4, "dollars": 3.0}
    assert numbers["ranks"] == {"1": {}, "2": {}}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--mfu", "0"], "--mfu must be above 0: got 0.0"),
        (["--mfu", "40"], "--mfu is a share of the GPU's speed, at most 1: got 40.0"),
        (["--tflops", "nan"], "--tflops must be above 0: got nan"),
        (["--dollars-per-gpu-hour", "-2"], "--dollars-per-gpu-hour must be above 0: got -2.0"),
    ],
)
def test_a_wrong_rate_is_one_line(words, line):
    with pytest.raises(UserError) as error:
        run_plan(RECIPES / "scratch_avatar.yaml", *words)
    assert line in str(error.value)


@pytest.mark.slow
def test_batches_that_do_not_divide_are_named(tmp_path, capsys):
    words = ("init.train.global_batch=8", "init.train.batch_size=8", "--gpus", "3", "--json", tmp_path / "plan.json")
    assert run_plan(RECIPES / "scratch_avatar.yaml", "preset=smoke", *words) == 0
    assert "no multiple of" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["overrides"] == {"3": None}


def test_a_codec_that_is_not_wans_costs_nothing():
    assert vars(CodecCosts()) == dict.fromkeys(
        ("encode", "decode", "encode_bytes", "decode_bytes", "encode_portrait"), 0
    )
    assert make_plan(a_job(make_spec())).costs["distill"].updates == {"student": 4, "fake_score": 40}

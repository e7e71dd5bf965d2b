"""The plan: closed forms against real networks, peaks against the measured memory of real updates, tables, one-line errors."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from distill.methods import dmd, flow_matching, ode_init
from distill.methods.rollout import draw_noise
from distill.pipeline import trajectories
from distill.planning import report
from distill.planning.estimate import (
    ENGINES,
    GIB,
    OFFLOAD,
    Plan,
    Update,
    context_bytes,
    make_plan,
    num_parameters,
    offloaded_bytes,
    peak_bytes,
    rank_bytes,
    split_blocks,
    suggest_fix,
    trajectory_bytes,
)
from distill.planning.job import Job, meta_networks
from distill.planning.trace import StepCosts, forwards
from distill.recipe import MethodStage, TrajectoriesConfig
from distill.training.config import OptimizerConfig, TrainConfig
from students.history import History
from students.schedule import advance
from students.spec import Spec, student_sigmas
from teachers.codecs.linear import CodecConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.files import load_tensors
from teachers.guidance import EmbeddedScales, Guidance, GuidanceRange
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import Ranks, a_student, a_teacher, a_train_set, make_spec, some_conditions

BIG = NetworkConfig(num_layers=40, num_heads=40, head_dim=128, ffn_dim=13824)
SMALL = NetworkConfig(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960)
ROLES = ("teacher", "student", "fake_score")


def a_job(spec: Spec, batch: int = 2, stage: str = "distill", method=None, accumulation: int = 1, **changes) -> Job:
    optimizers = {role: OptimizerConfig(lr=1e-5) for role in ROLES}
    train = TrainConfig(num_steps=4, batch_size=batch, accumulation=accumulation, optimizers=optimizers)
    default = {"distill": dmd.Config(exit_step="last"), "init": ode_init.Config(), "teacher": flow_matching.Config()}
    facts = {
        "spec": spec,
        "stages": {stage: MethodStage(method=method or default[stage], train=train)},
        "trajectories": TrajectoriesConfig(num_pairs=10, num_steps=12),
        "precision": "fp32",
    }
    return Job(**(facts | changes))


# Counts ---------------------------------------------------------------------------------------------------------------


def test_parameters_are_the_published_ones_and_no_weight_is_made():
    """On the meta device; the 14B network by name and shape is tests/teachers/checkpoints/test_layouts.py's."""
    nets = meta_networks(livetalk(), "distill")
    assert {role: num_parameters(net) for role, net in nets.items()} == {
        "student": 1_421_187_232,
        "fake_score": 1_421_187_232,
        "teacher": 14_293_426_336,
    }
    assert {t.device.type for net in nets.values() for t in (*net.parameters(), *net.buffers())} == {"meta"}
    assert [role for role, net in nets.items() if num_parameters(net, trained=True)] == ["student", "fake_score"]


def test_two_blocks_and_what_is_in_none():
    nets = meta_networks(a_job(make_spec(network=replace(make_spec().network, num_layers=5))), "distill")
    for net in nets.values():
        blocks = {name: p.numel() for name, p in net.named_parameters() if name.startswith("net.blocks.")}
        two = sum(count for name, count in blocks.items() if name.startswith(("net.blocks.0.", "net.blocks.1.")))
        assert split_blocks(net) == (two, num_parameters(net) - sum(blocks.values()))
        assert two > 0


def test_lora_trains_its_adapters_alone():
    """By hand: rank r on a matrix [out, in] is r (in + out); four of each attention, two of the MLP."""
    job = a_job(make_spec(), lora={"fake_score": 4})
    config = job.spec.network
    width = config.num_heads * config.head_dim
    per_rank = config.num_layers * (8 * 2 * width + 2 * (width + config.ffn_dim))
    plan = make_plan(job)
    assert plan.lora["fake_score"] == 4 * per_rank
    assert plan.lora["student"] == 128 * per_rank
    update = next(update for update in plan.updates if update.name == "distill.fake_score")
    assert max(held for held, _ in update.points[()]) == 4 * per_rank
    assert max(held for held, _ in update.points["checkpointing", "lora"]) == 4 * per_rank
    parts = rank_bytes(plan, update, "ddp", 1)
    assert parts["gradients"] == 4 * 4 * per_rank
    assert parts["fake_score moments"] == 8 * 4 * per_rank
    assert parts["fake_score weights"] == 4 * (plan.parameters["fake_score"] + 4 * per_rank)
    assert parts["student average"] == 4 * plan.parameters["student"]
    both = rank_bytes(plan, update, "ddp", 1, ("checkpointing", "lora"))
    assert both["student average"] == 4 * 128 * per_rank
    assert both["student moments"] == 8 * 128 * per_rank


@pytest.mark.parametrize(
    "history",
    [
        *(History(sinks=1, window=2), History(sinks=0, window=None), History(sinks=1, window=1, commit="same_level")),
        *(History(sinks=1, window=(0, 3)), History(sinks=0, window=(1, 2))),
    ],
)
def test_the_context_is_what_the_last_state_holds(history):
    student, given = a_student(history), some_conditions(3)
    n, spec = student.spec.chunk_frames, student.spec
    noise = draw_noise(student, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = student.open(given.text)
        for j in range(spec.num_chunks - 1):
            part = given.frames(j * n, (j + 1) * n)
            x0, steps = advance(student, state, part, lambda _, i, j=j: noise(j, i), spec.sigmas)
            state = student.commit(state, x0, part, steps)
    kept = [t for entry in state.cached for t in (*entry.keys, *entry.values)]
    context_kv = [t for blocks in state.context_kv for pair in blocks for t in pair]
    whole, half = (context_bytes(a_job(spec, batch=3, precision=name), "distill") for name in ("fp32", "bf16"))
    assert whole == 2 * half == sum(t.numel() * t.element_size() for t in (*kept, *context_kv))


@pytest.mark.parametrize(
    ("scales", "passes"),
    [
        pytest.param(None, 3, marks=pytest.mark.slow),
        pytest.param(EmbeddedScales(both=GuidanceRange()), 2, marks=pytest.mark.slow),
        (EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange()), 3),
    ],
    ids=["the recipe's", "one scale", "two scales"],
)
def test_trajectories_are_as_large_as_their_files(tmp_path, scales, passes):
    """Of students that are conditioned on their guidance with as many passes as those scales take."""
    config = TrajectoriesConfig(num_pairs=10, num_steps=6, batch_size=4, guidance=Guidance(text=2.0, audio=3.0))
    spec = (
        make_spec()
        if scales is None
        else make_spec(guidance=scales, network=replace(make_spec().network, guidance=len(scales.names)))
    )
    engine: Any = Ranks()
    metrics = trajectories.make(
        lambda _: a_teacher(),
        *("abc", a_train_set(), config, spec.sigmas),
        seed=0,
        folder=tmp_path,
        engine=engine,
        scales=scales,
    )
    assert metrics["nfe"] == 6 * passes
    files = (load_tensors(file) for file in tmp_path.glob("*.safetensors"))
    tensors = [t for file in files for name, t in file.items() if name != "guidance"]
    assert trajectory_bytes(spec, 10) == sum(t.numel() * t.element_size() for t in tensors)
    plan = make_plan(a_job(spec, trajectories=config))
    assert (plan.trajectories, plan.trajectory_forwards) == (trajectory_bytes(spec, 10), metrics["nfe"])


@pytest.mark.parametrize(
    ("stage", "method", "history", "expected"),
    [
        ("teacher", flow_matching.Config(), History(), {"teacher": 1}),
        ("init", ode_init.Config(), History(), {"student": 1}),
        (
            "distill",
            dmd.Config(exit_step="last", fake_updates=3, guidance=Guidance(text=3.0, audio=2.0)),
            History(),
            {"student": 4 * (4 * 3 + 3), "teacher": 3, "fake_score": 3 + 1},
        ),
        (
            "distill",
            dmd.Config(exit_step="random", fake_updates=2, guidance=Guidance(text=2.0, audio=2.0)),
            History(),
            {"student": 3 * (4 * 2 + 3), "teacher": 2, "fake_score": 2 + 1},
        ),
        (
            "distill",
            dmd.Config(exit_step="last", fake_updates=1),
            History(commit="same_level"),
            {"student": 2 * (4 * 3), "teacher": 1, "fake_score": 1 + 1},
        ),
    ],
)
def test_forwards_of_a_step(stage, method, history, expected):
    """By hand: 4 chunks of 3 steps, random exits after 2 in the mean, a context pass after every chunk but the last."""
    job = a_job(make_spec(history), stage=stage, method=method)
    assert forwards(job, stage) == expected


# Bytes a rank ---------------------------------------------------------------------------------------------------------


def a_plan(points=((0, 0),), precision="fp32", accumulation=1, count=1000, batch=None, **changes) -> Plan:
    """One stage that trains `student` and `fake_score` against `teacher`, the update of `student`."""
    traced = {(): tuple(points), ("checkpointing",): ((0, 0),), ("checkpointing", "lora"): ((0, 0),)}
    train = TrainConfig(num_steps=1, batch_size=1, accumulation=accumulation, global_batch=batch)
    trained = ("student", "fake_score")
    update = Update(stage="distill", role="student", trained=trained, frozen=("teacher",), train=train, points=traced)
    facts = {
        "precision": precision,
        "bucket_mib": 0,
        "parameters": dict.fromkeys(trained, count) | {"teacher": 8 * count},
        "lora": dict.fromkeys(ROLES, count // 100),
        "blocks": dict.fromkeys(trained, count // 5) | {"teacher": count},
        "outside": dict.fromkeys(ROLES, count // 10),
        "updates": (update,),
    }
    return Plan(**(facts | changes))


@pytest.mark.parametrize(
    ("engine", "expected", "peak"),
    [  # weights, masters, average, moments, gradients of 1000 trained elements on 4 ranks; and what else is at the peak
        ("ddp", (4000, 0, 4000, 8000, 4000), 0),
        ("zero1", (4000, 1000, 1000, 2000, 4000), 1000),
        ("zero2", (4000, 1000, 1000, 2000, 1000), 1000),
        ("zero3", (1000, 0, 1000, 2000, 1000), 1000 + 1000 + 4 * 8000),
        ("fsdp2", (1000, 0, 1000, 2000, 1000), 4 * (1000 + 3 * 100)),
    ],
)
def test_every_part_of_every_engine(engine, expected, peak):
    """By hand. Beside the table: the fake score without an average, the frozen teacher of 8000 elements; and of zero a flattened
    copy of the gradients, of zero3 the fake score's gradients and as much as a network in one piece, of fsdp2 two blocks."""
    plan = a_plan()
    parts = rank_bytes(plan, plan.updates[0], engine, 4)
    names = ("student weights", "student masters", "student average", "student moments", "gradients")
    assert tuple(parts.get(name, 0) for name in names) == expected
    assert "fake_score average" not in parts
    assert parts["fake_score moments"] == parts["student moments"]
    assert "teacher moments" not in parts
    assert parts["teacher weights"] == 8 * 4000 / (4 if engine in ("zero3", "fsdp2") else 1)
    weights, masters, average, moments, gradients = expected
    rest = 2 * (weights + masters + moments) + average + gradients + parts["teacher weights"]
    assert parts["peak"] == rest + peak


def test_offload_takes_what_is_in_parts_to_the_host():
    plan = a_plan()
    for engine in ENGINES:
        parts = rank_bytes(plan, plan.updates[0], engine, 4, OFFLOAD)
        plain = rank_bytes(plan, plan.updates[0], engine, 4)
        for name in ("student average", "student moments", "student masters"):
            assert parts.get(name, 0) == (plain.get(name, 0) if engine == "ddp" else 0)
        kept = 0 if engine in ("zero3", "fsdp2") else 1
        for name in ("student weights", "gradients"):
            assert parts[name] == kept * plain[name], (engine, name)
        streamed = 4 * (plan.blocks["teacher"] + plan.outside["teacher"])  # two blocks, and what is outside of them
        assert 0 < streamed < plain["teacher weights"] or not kept
        assert parts["teacher weights"] == kept * streamed
        alone = rank_bytes(plan, plan.updates[0], engine, 4, ("offload teacher",))
        assert {**alone, "teacher weights": 0, "peak": 0} == {**plain, "teacher weights": 0, "peak": 0}
        assert alone["teacher weights"] == parts["teacher weights"]
        waits = offloaded_bytes(plan, plan.updates[0], engine, 4, ("offload teacher",))
        assert waits == plain["teacher weights"] - alone["teacher weights"]
    waits = offloaded_bytes(plan, plan.updates[0], "fsdp2", 4, OFFLOAD)
    assert waits == (8000 * 4 + 1000 * (2 * 4 + 2 * 8 + 4 + 4)) / 4


def test_ranks_that_share_shards_hold_more_than_all_together():
    plan = replace(a_plan(), shard_ranks=2)
    parts = {ranks: rank_bytes(plan, plan.updates[0], "fsdp2", ranks) for ranks in (1, 2, 8)}
    assert [found["student moments"] for found in parts.values()] == [8000, 4000, 4000]
    assert parts[8] == parts[2]


def test_what_is_gathered_once_is_held_whole():
    plan = a_plan(precision="bf16")
    whole = rank_bytes(replace(plan, gather_once=True), plan.updates[0], "fsdp2", 4)
    assert whole["gathered"] == 2 * (2 * 900 + 4 * 100) + 2 * plan.blocks["teacher"] + 4 * plan.outside["teacher"]


def test_half_precision_copies_gathers_and_holds_the_teacher():
    plan = a_plan(precision="bf16", half=frozenset({"teacher"}))
    ddp, zero2, fsdp2 = (rank_bytes(plan, plan.updates[0], engine, 4) for engine in ("ddp", "zero2", "fsdp2"))
    assert ddp["bf16 copies"] == zero2["bf16 copies"] == 2 * 1000
    assert "bf16 copies" not in fsdp2
    assert (ddp["student weights"], ddp["teacher weights"], fsdp2["teacher weights"]) == (4000, 16000, 4000)
    assert fsdp2["gathered"] == 2 * 1000 + 2 * 100 + 2 * 4 * 100


def test_what_a_micro_step_does_not_call_is_not_gathered():
    """The teacher, in an update of the fake score."""
    calls = {"student": frozenset({"student", "fake_score"})}
    costs = StepCosts(forwards={}, calls=calls, flops={}, updates={}, exchanges={})
    plan = a_plan(precision="bf16", costs={"distill": costs})
    found = rank_bytes(plan, plan.updates[0], "fsdp2", 4)
    assert found["gathered"] == 2 * plan.blocks["student"] + 2 * 4 * 100
    assert found["teacher weights"] == 8000


def test_activations_and_gradients_meet_only_as_they_do():
    """Held (0, 9000), then (100, 5000), then (1000, 10): 4 bytes a gradient element; accumulation holds all of both, of FSDP2
    in shards."""
    points = ((0, 9000), (100, 5000), (1000, 10))
    peaks = [rank_bytes(plan, plan.updates[0], "ddp", 1)["peak"] for plan in (a_plan(), a_plan(points))]
    assert peaks == [32000 + 8000 + 16000 + 4000 + rest for rest in (4000, 9000)]
    more = a_plan(points, accumulation=2)
    assert rank_bytes(more, more.updates[0], "ddp", 1)["peak"] == peaks[1] + 4000
    once, twice = (
        rank_bytes(plan, plan.updates[0], "fsdp2", 4)["gradients"] for plan in (a_plan(), a_plan(accumulation=2))
    )
    assert (once, twice) == (1000, 1000)


def test_a_global_batch_sets_the_micro_steps():
    plan = a_plan(((0, 9000),), batch=8)
    peaks = [rank_bytes(plan, plan.updates[0], "ddp", ranks)["peak"] for ranks in (4, 8)]
    assert peaks[0] - peaks[1] == 4000
    text = report.as_text(plan, "name", [3, 4], ["ddp"], 80.0)
    assert "train.global_batch: 8 is no multiple of 3" in text
    assert "micro-steps an update: distill 2" in text


def test_switches_and_the_first_that_fits():
    """Two roles of 1 GiB elements and a teacher of 8: weights 40 GiB, moments 16, an average 4, gradients 4, activations 40."""
    plan = a_plan(((0, 40 * GIB),), count=GIB)
    assert peak_bytes(plan, "ddp", 1) / GIB == 60 + 40
    assert peak_bytes(plan, "ddp", 1, ("checkpointing",)) / GIB == 60 + 4
    assert peak_bytes(plan, "ddp", 1, ("checkpointing", "lora")) / GIB == pytest.approx(40 + 0.01 * 32, rel=1e-3)
    assert suggest_fix(plan, "ddp", 1, 100 * GIB) == ()
    assert suggest_fix(plan, "ddp", 1, 64 * GIB) == ("checkpointing",)
    assert suggest_fix(plan, "ddp", 1, 63 * GIB) == ("checkpointing", "offload teacher")
    assert peak_bytes(plan, "ddp", 1, ("checkpointing", "offload teacher")) / GIB == pytest.approx(64 - 27.6)
    assert suggest_fix(plan, "ddp", 1, 36 * GIB) == ("checkpointing", "lora", "offload teacher")
    assert suggest_fix(replace(plan, adapted=frozenset({"student"})), "ddp", 1, 20 * GIB) is None
    assert suggest_fix(plan, "ddp", 1, 4 * GIB) is None
    assert peak_bytes(plan, "zero2", 8, ("offload student", "offload fake_score")) / GIB == 40 + 40
    assert suggest_fix(plan, "zero2", 8, 44.5 * GIB) == ("checkpointing",)  # 40 + 0.5 + 2 + 1, and two of gradients
    assert suggest_fix(plan, "zero2", 8, 44 * GIB) == ("checkpointing", "offload teacher")
    assert suggest_fix(plan, "zero2", 8, 13 * GIB) == ("checkpointing", *OFFLOAD)


def livetalk() -> Job:
    """LiveTalk (2512.23576): OmniAvatar 14B as real score, 1.3B student and fake score, 512 x 512, 7 chunks of 3 latents,
    4 steps, effective guidance 6, five fake-score updates to one of the student, a batch of 1 a GPU, 64 in all."""
    spec = Spec(
        height=512,
        width=512,
        fps=Fraction(16),
        chunk_frames=3,
        sigmas=student_sigmas(4, 5.0),
        horizon_frames=21,
        history=History(sinks=0, window=None),
        network=SMALL,
        codec=CodecConfig(stride=4, patch=8, channels=16),
        audio=AudioConfig(num_mels=10752, hop=1000, window=1000),
        text=TextConfig(dim=4096, max_tokens=512),
    )
    score = OptimizerConfig(lr=8e-7, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)
    train = {"batch_size": 1, "ema_decay": 0.99}
    ode = {"student": OptimizerConfig(lr=4e-5, betas=(0.9, 0.999))}
    six = Guidance(text=6.0, audio=6.0)
    return Job(
        spec=spec,
        networks={"teacher": BIG},
        half=frozenset({"teacher"}),
        stages={
            "init": MethodStage(method=ode_init.Config(), train=TrainConfig(num_steps=20_000, optimizers=ode, **train)),
            "distill": MethodStage(
                method=dmd.Config(guidance=six, fake_updates=5, shift=5.0),
                train=TrainConfig(
                    num_steps=1000, optimizers={"student": replace(score, lr=4e-6), "fake_score": score}, **train
                ),
            ),
        },
        trajectories=TrajectoriesConfig(num_pairs=16_000, num_steps=48, shift=5.0, guidance=six, batch_size=1),
        precision="bf16",
    )


def shallow(job: Job, student: int, teacher: int) -> Job:
    """The same widths with fewer blocks."""
    spec = replace(job.spec, network=replace(job.spec.network, num_layers=student))
    return replace(job, spec=spec, networks={"teacher": replace(BIG, num_layers=teacher)})


@pytest.mark.slow
def test_the_table_of_livetalk(capsys):
    """ZeRO-3 and FSDP2 on 1, 4, 8 and 64 GPUs; a fifteenth of the blocks, for time."""
    plan = make_plan(shallow(livetalk(), 2, 3))
    assert plan.trajectories == pytest.approx(16_000 * 13.76e6, rel=1e-3)
    assert plan.forwards["distill"] == {"student": 6 * (7 * 2.5 + 6), "teacher": 2.0, "fake_score": 6.0}
    assert plan.context["distill"] == 2 * 6 * 2 * 2 * 3 * 1024 * 1536 * 2
    print(report.as_text(plan, "livetalk", [1, 4, 8, 64], ["zero3", "fsdp2"], 80.0))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("ZeRO-3     FSDP2") for line in lines) == 4
    student = next(update for update in plan.updates if update.name == "distill.student")
    for engine in ("zero3", "fsdp2"):
        peaks = [rank_bytes(plan, student, engine, n, ("checkpointing",))["peak"] for n in (1, 4, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)
    one, many = (rank_bytes(plan, student, "fsdp2", n, ("checkpointing",)) for n in (1, 64))
    assert one["teacher weights"] == 2 * plan.parameters["teacher"] == 64 * many["teacher weights"]
    saved = 2 * plan.parameters["teacher"] + 28 * plan.parameters["student"]  # two times 12 bytes, an average of 4
    assert one["peak"] - many["peak"] == pytest.approx(63 / 64 * saved, rel=0.05)

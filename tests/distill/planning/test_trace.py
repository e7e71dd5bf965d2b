"""Traces of an update on the meta device: live bytes, checkpointing, rollouts and trajectories."""

from dataclasses import replace

import pytest
import torch

from distill.methods import dmd, dmd_reward, dmd_reward_gradient
from distill.methods.rewards import Reward
from distill.planning.codec import PullBack
from distill.planning.estimate import (
    context_bytes,
    make_plan,
    rank_bytes,
)
from distill.planning.job import batch_on, meta_networks
from distill.planning.live_bytes import LiveBytes, OnMeta
from distill.planning.trace import trace
from distill.recipe import TrajectoriesConfig
from eval.metrics.sync import Sync
from students.history import History
from students.spec import student_sigmas
from tests.distill.planning.test_estimate import a_job
from tests.support.tiny import make_spec

# What is alive --------------------------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_a_known_graph():
    """tanh keeps its output; what nothing needs is freed; gradients are counted apart from the rest."""
    net = torch.nn.Linear(10, 10, bias=False, device="meta")
    x = torch.empty(50, 10, device="meta")
    row = 50 * 10 * 4
    with LiveBytes() as live:
        live.weigh(net)
        live.count([x])
        y = net(x).tanh()
        assert max(live.points.values()) == 3 * row  # x, net(x) while tanh is computed, y
        for _ in range(3):
            _ = y.detach() + 1  # comes and goes
        assert max(live.points.values()) == 3 * row
        (y * y).sum().backward()
    assert set(live.points) == {0, 100}
    assert live.points[100] <= live.points[0]


def test_attention_needs_no_matrix_of_all_pairs():
    q = torch.empty(1, 2, 3000, 8, device="meta")
    with OnMeta(), LiveBytes() as live:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert max(live.points.values()) < 10 * q.numel() * 4


def test_shapes_are_remembered_only_where_memory_is_new():
    """The second pass comes from memory and gives the same bytes; views, outputs in place and other types do not."""
    x = torch.empty(4, 6, device="meta")
    found = []
    for _ in range(2):
        with LiveBytes() as live:
            live.count([x])
            y = torch.mm(x, x.t())
            z = torch.ops.aten._unsafe_view(y, [2, 8]).transpose(0, 1)  # its schema does not say that it shares
            z.add_(1)
            pair = torch.cat([y, y]).half(), (y > 0)
            assert z.untyped_storage()._cdata == y.untyped_storage()._cdata
            assert (pair[0].dtype, pair[1].dtype) == (torch.float16, torch.bool)
            assert (z.shape, z.stride()) == ((8, 2), (1, 8))
            found.append(max(live.points.values()))
    assert found == [96 + 64 + 128 + 64] * 2  # x, y, both y, as halves


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "init", "distill"])
def test_checkpointing_saves_activations_and_no_gradient(stage):
    spec = make_spec(network=replace(make_spec().network, num_layers=6))
    job, role = a_job(spec, stage=stage), {"teacher": "teacher"}.get(stage, "student")
    plain, saved = dict(trace(job, stage, role)), dict(trace(job, stage, role, "checkpointing"))
    assert max(saved.values()) < 0.7 * max(plain.values())
    assert max(plain) == max(saved) == make_plan(job).parameters[role]


@pytest.mark.slow
def test_activations_follow_the_batch_and_half_precision_halves_some():
    spec = make_spec()
    one, two = (dict(trace(a_job(spec, batch=b), "distill", "student")) for b in (8, 16))
    assert max(two.values()) == pytest.approx(2 * max(one.values()), rel=0.15)
    half = dict(trace(a_job(spec, batch=8, precision="bf16"), "distill", "student"))
    assert 0.4 * max(one.values()) < max(half.values()) < 0.95 * max(one.values())


@pytest.mark.slow
@pytest.mark.parametrize(("weighs", "roles"), [("student", {"student"}), ("fake_score", {"student", "fake_score"})])
def test_decoding_for_rewards_is_alive_beside_the_rollout(weighs, roles):
    """Its bytes are at the peak of the updates that decode, for as many clips as are decoded at once."""
    reward = Reward(metric=Sync(max_lag=4, sound="own"))
    method = dmd_reward.Config(rewards={"sync": reward}, exit_step="last", weighs=weighs)
    job = a_job(make_spec(), method=method)
    for role in ("student", "fake_score"):
        plain, decoding = (
            max(size for _, size in trace(replace(job, decode_bytes=each), "distill", role)) for each in (0.0, 2.0**30)
        )
        batch = job.stages["distill"].train.batch_size
        assert (decoding > batch * 2**30) == (role in roles)
        assert decoding == plain or role in roles


@pytest.mark.slow
def test_a_gradient_through_the_decoder_is_alive_beside_the_rollout():
    """Of one clip of the batch at a time."""
    reward = Reward(metric=Sync(max_lag=4, sound="own"))
    method = dmd_reward_gradient.Config(rewards={"sync": reward}, exit_step="last")
    job = replace(a_job(make_spec(), method=method), decode_bytes=2.0**20)
    plain, pulled = (
        max(size for _, size in trace(replace(job, pull_back=PullBack(each)), "distill", "student"))
        for each in (0.0, 2.0**30)
    )
    assert plain < 2**30 < pulled < 2**31


@pytest.mark.slow
def test_steps_without_gradient_leave_nothing_behind():
    """So a trace takes two denoising steps for all, but for a same_level history, which keeps the context of each."""
    job = a_job(make_spec(sigmas=student_sigmas(5, 3.0)))
    nets, live = meta_networks(job, "distill"), LiveBytes()
    for net in nets.values():
        live.weigh(net)
    method, batch = dmd.build(job.stages["distill"].method, nets), batch_on(job, "distill")
    with OnMeta(), live:
        method.loss("student", batch, torch.Generator(), torch.Generator()).value.backward()
    short = max(size for _, size in trace(job, "distill", "student"))
    assert short == max(live.points.values())
    few, many = (
        max(
            size
            for _, size in trace(
                a_job(make_spec(History(commit="same_level"), sigmas=student_sigmas(n, 3.0))), "distill", "student"
            )
        )
        for n in (2, 5)
    )
    assert many > 1.2 * few


def test_the_longest_rollout_is_planned():
    few, many = (
        a_job(make_spec(History(sinks=0, window=None)), method=dmd.Config(exit_step="last", rollout_chunks=n))
        for n in (4, 9)
    )
    peaks = [max(size for _, size in trace(job, "distill", "student")) for job in (few, many)]
    assert peaks[1] > 1.2 * peaks[0]
    assert context_bytes(many, "distill") == 8 / 3 * context_bytes(few, "distill")


@pytest.mark.slow
def test_solving_trajectories_is_planned_too():
    """One guided forward of the teacher at the batch of the trajectories, nothing trained."""
    spec = make_spec()
    plans = [
        make_plan(a_job(spec, trajectories=TrajectoriesConfig(num_pairs=10, num_steps=6, batch_size=b)))
        for b in (8, 16)
    ]
    one, two = (next(u for u in plan.updates if u.stage == "trajectories") for plan in plans)
    assert (one.role, one.trained, one.frozen) == ("teacher", (), ("teacher",))
    assert two.activations() == pytest.approx(2 * one.activations(), rel=0.05)
    parts = rank_bytes(plans[0], one, "ddp", 4)
    assert parts["teacher weights"] == 4 * plans[0].parameters["teacher"]
    assert parts["peak"] == parts["teacher weights"] + one.activations()
    assert rank_bytes(plans[0], one, "ddp", 4, ("checkpointing", "lora")) == parts

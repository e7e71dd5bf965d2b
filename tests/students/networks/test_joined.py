"""Streams of different ages as rows of one batch: of every network that a causal student has, each row as it is alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from students.history import History
from students.networks.causal_wan import CausalWan
from students.schedule import Schedule
from students.student import Joined
from teachers.conditions import Conditions
from teachers.networks import spans
from teachers.networks.kind import RaggedPast
from tests.students.networks.test_causal_longcat import a_longcat_student
from tests.students.networks.test_causal_longcat import inputs as longcat_inputs
from tests.students.networks.test_causal_talk import a_talk_student
from tests.students.networks.test_causal_talk import inputs as talk_inputs
from tests.support.faults import around
from tests.support.tiny import MIDAS, a_bundle, a_student, some_conditions, some_latents

NETWORKS: dict[str, Callable] = {
    "wan": lambda **history: (a_student(History(**history)), some_conditions(), some_latents()),
    "infinitetalk, two speakers": lambda **history: (a_talk_student(2, **history), *talk_inputs(2)[:2]),
    "longcat, two speakers": lambda **history: (a_longcat_student(2, **history), *longcat_inputs(2)[:2]),
}
HISTORIES = {
    "window": {"sinks": 1, "window": 2},
    "all": {"sinks": 1, "window": None},
    "same_level": {"sinks": 1, "window": 2, "commit": "same_level"},
    "cycle": {"sinks": 1, "window": (1, 3)},
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def make(request):
    return NETWORKS[request.param]


def part(given: Conditions, row: int, chunk: int, n: int) -> Conditions:
    return given.index(slice(row, row + 1)).frames(chunk * n, chunk * n + n)


def grown(student: CausalWan, given: Conditions, latents: Tensor, row: int, chunks: int):
    """The state of a stream after so many chunks, in fixed buffers as a session has them."""
    n = student.spec.chunk_frames
    state = student.open(given.text[row : row + 1], cache="inplace")
    for chunk in range(chunks):
        now, x = part(given, row, chunk, n), latents[row : row + 1, :, chunk * n : chunk * n + n]
        plan = student.plan(state, now)
        steps = [student.denoise(state, plan, x, s, now, i)[1] for i, s in enumerate(student.spec.sigmas)]
        state = student.commit(state, x, now, steps, plan)
    return state


def step(student: CausalWan, state, now: Conditions, x: Tensor):
    """x0 of each denoising step, and the context entry that a commit makes."""
    plan, out, steps = student.plan(state, now), [], []
    for i, s in enumerate(student.spec.sigmas):
        x0, made = student.denoise(state, plan, x, s, now, i)
        out.append(x0)
        steps.append(made)
    after = student.commit(state, out[-1], now, steps, plan)
    return torch.stack(out), after


@torch.no_grad()
@pytest.mark.parametrize("history", list(HISTORIES))
@pytest.mark.parametrize("ages", [(1, 3), (3, 1), (2, 2), (0, 0)], ids=str)
def test_every_row_is_what_it_is_alone(make, history, ages, monkeypatch):
    student, given, latents = make(**HISTORIES[history])
    n, rows, padded = student.spec.chunk_frames, (0, 1), []
    around(monkeypatch, RaggedPast, "before", lambda original, *given: padded.append(1) or original(*given))
    states = [grown(student, given, latents, row, ages[row]) for row in rows]
    now = [part(given, row, ages[row], n) for row in rows]
    x = [latents[row : row + 1, :, -n:] for row in rows]
    # all rows alone first, from states of their own: a joined step must not need them to be fresh
    alone = [step(student, grown(student, given, latents, row, ages[row]), now[row], x[row]) for row in rows]
    assert student.batch_key(ages[0]) == student.batch_key(ages[1])
    out, after = step(student, student.join(states), Conditions.join_rows(now), torch.cat(x))
    assert isinstance(after, Joined)
    assert bool(padded) == (ages[0] != ages[1])
    size = max(1.0, float(out.abs().max()))
    assert (out[:, 0] - out[:, 1]).abs().max() > 0.05 * size, "the same twice proves nothing"
    for row, (wanted, state) in enumerate(alone):
        assert (out[:, row] - wanted[:, 0]).abs().max() <= 2e-5 * size
        made, entry = after.rows[row].cached[-1], state.cached[-1]
        assert made.chunk == entry.chunk == ages[row]
        for ours, theirs in zip((*made.keys, *made.values), (*entry.keys, *entry.values), strict=True):
            assert (ours - theirs).abs().max() <= 2e-5 * max(1.0, float(theirs.abs().max()))
            assert ours.untyped_storage().nbytes() == ours.nbytes, "a row keeps the memory of the others"


FAULTS = {
    "the first row's positions for all": (
        spans.SpanTransformer, "rope_tables",
        lambda original, net, first, *rest: original(net, first if isinstance(first, int) else first[0], *rest),
    ),
    "padding is seen": (
        RaggedPast, "before",
        lambda original, past, key, value: (*original(past, key, value)[:2], past.lengths.max().expand(2) + key.shape[1]),
    ),
    "the chunk's own keys behind the padding": (
        RaggedPast, "before",
        lambda original, past, *own: original(past._replace(lengths=past.lengths.max().expand(2)), *own),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_comparison_sees_planted_faults(make, fault, monkeypatch):
    owner, name, change = FAULTS[fault]
    around(monkeypatch, owner, name, change)
    with pytest.raises(AssertionError, match="2e-05"):
        test_every_row_is_what_it_is_alone(make, "window", (1, 3), monkeypatch)


def rows_of_keys(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, seqused_k):
    """`torch.nn.attention.varlen.varlen_attn`, which runs on CUDA alone, by its documentation."""
    out = []
    for i, used in enumerate(seqused_k.tolist()):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]][:used] for x in (key, value))
        assert len(q) <= max_q
        assert cu_seq_k[i + 1] - cu_seq_k[i] <= max_k
        weights = torch.einsum("qhd,khd->hqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


def test_attention_of_variable_length_is_attention_under_a_mask(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", rows_of_keys)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, n, 2, 8, generator=generator) for n in (4, 9, 9))
    seen = torch.tensor([9, 4, 6])
    masked = spans.attend(query, key, value, seen, None)
    assert (spans.attend_varlen(query, key, value, seen) - masked).abs().max() < 1e-6
    assert (spans.attend(query, key, value, None, None) - masked).abs().amax(dim=(1, 2, 3))[1:].min() > 1e-2
    assert spans.HAS_VARLEN


def test_students_say_why_their_streams_cannot_be_joined():
    assert a_student().one_by_one == ""
    assert "diagonal" in a_bundle(History(sinks=1, window=1), schedule=Schedule(depth=3)).student.one_by_one
    assert a_bundle(network=MIDAS).student.one_by_one
    absolute = replace(a_student().spec.history, positions="absolute")
    student = a_student(absolute)
    assert student.batch_key(2) != student.batch_key(3)

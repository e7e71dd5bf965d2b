"""The plan where ranks share sequences: closed forms of what they exchange, and their parts of memory, FLOPs and hours.

livetalk's real sizes, networks of one block.
"""

from dataclasses import replace
from functools import cache
from math import prod

import pytest

from distill.compose import RECIPES
from distill.planning.estimate import Update, context_bytes
from distill.planning.job import Job, job_of, shallow
from distill.planning.outlook import Part, Rates
from distill.planning.trace import clip_costs, step_costs, trace
from distill.recipe import load_recipe
from teachers.errors import UserError
from teachers.networks.kind import NetworkKind

pytestmark = pytest.mark.slow

RANKS, BF16 = 4, 2


@cache
def job(ranks: int = RANKS) -> Job:
    words = ["teacher.path=anywhere", "distill.method.exit_step=last", f"engine.sequence_parallel={ranks}"]
    return shallow(job_of(load_recipe(RECIPES / "livetalk.yaml", words)), 1)


def bytes_of(net: NetworkKind, frames: int) -> tuple[int, int]:
    """What a rank sends in a pass over so many latent frames: in the block, queries, keys, values and the result; the output."""
    spec, width = job().spec, net.num_heads * net.head_dim
    own = BF16 * frames * prod(spec.token_grid) // RANKS
    return 4 * own * width * (RANKS - 1) // RANKS, own * spec.codec.channels * net.patch**2 * (RANKS - 1)


def test_what_an_init_step_exchanges():
    """Clean and noisy frames side by side; the block forward, again in the backward pass, and back."""
    block, out = bytes_of(job().spec.network, 2 * job().spec.horizon_frames)
    assert step_costs(job(), "init").exchanges == {"student": (2 + 1 + 2 + 2, 3 * block + out)}
    plain = replace(job(), checkpointing=False)
    assert step_costs(plain, "init").exchanges == {"student": (2 + 1 + 2, 2 * block + out)}


def test_what_a_dmd_step_exchanges():
    """A rollout: every step of every chunk, and a commit of all but the last; then the scores. Last steps come back."""
    spec, guided = job().spec, job().stages["distill"].method.guidance.passes
    student, teacher = spec.network, job().networks["teacher"]
    assert teacher.num_heads == 40
    assert student.num_heads == 12
    passes = spec.num_chunks * (len(spec.sigmas) + 1) - 1
    chunk, clip = bytes_of(student, spec.chunk_frames), bytes_of(student, spec.horizon_frames)
    real = bytes_of(teacher, spec.horizon_frames)
    found = step_costs(job(), "distill").exchanges
    assert found["fake_score"] == (3 * passes + 7, passes * sum(chunk) + 3 * clip[0] + clip[1])
    calls = 3 * (passes + 1 + guided) + 4 * spec.num_chunks
    sent = passes * sum(chunk) + 2 * spec.num_chunks * chunk[0] + sum(clip) + guided * sum(real)
    assert found["student"] == (calls, sent)


def test_ranks_hold_and_compute_their_part():
    alone, shared = job(1), job()
    one, two = step_costs(alone, "init"), step_costs(shared, "init")
    assert one.forwards == two.forwards
    assert one.exchanges == {"student": (0, 0)}
    assert 0.25 <= two.flops["student"] / one.flops["student"] < 0.27, "text is read by all"
    assert context_bytes(shared, "distill") * RANKS == context_bytes(alone, "distill")
    whole, part = (clip_costs(given, "student") for given in (alone, shared))
    assert 1.0 <= part[0] / whole[0] < 1.05, "of all ranks"
    assert part[1] < 0.4 * whole[1]
    peaks = [max(size for _, size in trace(given, "init", "student")) for given in (alone, shared)]
    assert 0.25 < peaks[1] / peaks[0] < 0.4, "conditions and latents are whole on all"


def test_batches_are_those_of_groups():
    train = job().stages["init"].train
    update = Update(stage="init", role="student", trained=("student",), train=train, together=RANKS, points={})
    assert [update.micro_steps(ranks) for ranks in (4, 8, 64)] == [64, 32, 4]
    with pytest.raises(UserError, match=r"engine.sequence_parallel: 6 GPUs are no multiple of 4"):
        update.micro_steps(6)


def test_hours_of_jobs_that_are_shared():
    rates = Rates(tflops=1.0, mfu=1.0)
    part = Part(name="clips", flops=80e12, precision="bf16", jobs=8, together=2)
    assert [part.seconds(ranks, rates) for ranks in (2, 4, 8, 16)] == [40, 20, 10, 5]
    assert part.seconds(12, rates) == 10, "six groups, eight jobs"
    assert (part.wait(8, rates), part.wait(12, rates)) == (0, 5)
    assert Part(name="updates", flops=80e12, precision="bf16", together=2).seconds(8, rates) == 10

"""Batches of a step among ranks: who can share a sequence, and which overrides let a number of GPUs divide them."""

from collections.abc import Sequence

from distill.planning.estimate import Plan
from distill.planning.job import Job
from teachers.errors import UserError


def sharing(job: Job) -> tuple[int, ...]:
    """2, 4, .. ranks that could share each of the job's sequences, more than do."""
    found, tokens = [], job.spec.token_grid[0] * job.spec.token_grid[1]
    for ranks in (2**i for i in range(1, 7)):
        try:
            for kind in (job.spec.network, *job.networks.values()):
                kind.check_sequence(ranks, tokens)
        except UserError:
            continue
        found += [ranks] if ranks > job.together and ranks % job.together == 0 else []
    return tuple(found)


def whole_batches(plan: Plan, sharing: Sequence[int], count: int) -> list[str]:
    """Overrides, each alone, with which `count` GPUs can take a step together where the recipe's batches do not divide: ranks that
    share each clip, which changes no result, or larger batches."""
    sizes = {
        update.stage: (update.train.global_batch, update.train.batch_size)
        for update in plan.updates
        if update.train and update.train.global_batch
    }

    def divide(groups: int) -> bool:
        return all(whole % (each * groups) == 0 for whole, each in sizes.values())

    fits = [n for n in sharing if count % n == 0 and divide(count // n)]
    found = [f"engine.sequence_parallel={fits[0]}"] if fits else []
    if count % plan.together:
        return found
    changed = []
    for stage, (whole, each) in sizes.items():
        step = each * count // plan.together
        if whole % step:
            changed.append(f"{stage}.train.global_batch={-(-whole // step) * step}")
    return found + ([" ".join(changed)] if changed else [])

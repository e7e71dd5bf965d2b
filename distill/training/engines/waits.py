"""How long a rank waits for others: one limit for every process group, whoever made it."""

from datetime import timedelta

import torch.distributed as dist


def limit_waits(minutes: float) -> None:
    """Give every process group of this process a timeout. torch makes those of a mesh, and DeepSpeed its own, with the default of
    their backend, of which NCCL's is ten minutes: less than a large checkpoint takes on a slow disk."""
    of_torch = dist.distributed_c10d
    set_timeout = getattr(dist, "set_timeout", None) or of_torch._set_pg_timeout
    for group in of_torch._world.pg_map:
        if dist.get_backend(group) != "fake":
            set_timeout(timedelta(minutes=minutes), group)

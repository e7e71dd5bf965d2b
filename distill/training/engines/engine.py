"""What accelerate owns: processes, device, precision, reductions; and generators keyed by meaning, never global.

Which engine runs (`engine.kind`, or accelerate's own flags) is decided here; how each holds a role is in `distill.training.role`.
"""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from distill.training.config import EngineConfig
from distill.training.engines.waits import limit_waits
from distill.training.lifecycle.launcher import (
    check_launcher,
    check_world_size,
    hidden_flags,
    requested_processes,
    right_command,
)
from distill.training.lifecycle.signals import end_with_parent
from distill.training.lifecycle.watch import SETTLE_SECONDS, watch
from distill.training.role import DistributedRole, Kind, MakeOptimizer
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.guidance import AnyGuidance, SharedGuidance
from teachers.machine import multiplies_bf16
from teachers.networks.kind import networks_in
from teachers.networks.sequence import SequenceGroup


class Engine:
    """One process among `world_size` equal ones, which hold trained roles as `kind` says.

    Raises UserError when the launcher asked for another number of processes, or for another engine or precision, than the
    one that would run. `threads` sets torch's CPU threads of this process, shared among the local processes.
    """

    def __init__(self, config: EngineConfig, threads: int | None = None):
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(os.getppid())
        self.config = config
        self.requested = requested_processes(os.environ)
        self.kind: Kind = check_launcher(os.environ, config)
        on_cpu = not torch.cuda.is_available()
        if "WORLD_SIZE" not in os.environ:
            check_world_size(self.requested, 1, on_cpu)
        timeout = timedelta(minutes=config.timeout_minutes)
        if self.requested > 1 and set(config.offload) - {"teacher"} and not on_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # shards in the host's memory are reduced there
            dist.init_process_group("cuda:nccl,cpu:gloo", timeout=timeout)
        with hidden_flags(os.environ):
            self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
        self.device = torch.device("cpu") if on_cpu else self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.rank == 0
        check_world_size(self.requested, self.world_size, on_cpu)
        if self.world_size > 1 and not dist.is_initialized():
            raise UserError(
                f"{self.world_size} processes without a process group: launcher; {right_command(2, on_cpu)}"
            )
        for name in ("shard_ranks", "sequence_parallel"):
            share = getattr(config, name) or 1
            if self.world_size % (min(share, self.world_size) if name == "shard_ranks" else share):
                raise UserError(f"engine.{name}: {self.world_size} processes are no multiple of {share}; change one")
        together = config.sequence_parallel
        self.data_rank, self.data_ranks = self.rank // together, self.world_size // together
        self.is_group_main = self.rank % together == 0  # which writes what its group has made
        self.sequence = self._sequence_group() if together > 1 else None
        self._branch_groups: dict[int, Any] = {}
        self._watch = watch(self) if self.world_size > 1 else None
        self._alone = self.kind != "ddp" and not dist.is_initialized()
        if self._alone:  # the libraries want a group of one, and DeepSpeed a LOCAL_RANK
            os.environ["LOCAL_RANK"] = "0"
            dist.init_process_group("gloo" if on_cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        if threads is not None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size)
            torch.set_num_threads(max(1, threads // local))

    def _sequence_group(self) -> SequenceGroup:
        together = self.config.sequence_parallel
        return SequenceGroup(together, self.rank % together, self._neighbours(together))

    def _neighbours(self, together: int) -> Any:
        """This rank's process group of so many neighbouring ones; every rank calls it."""
        shape, names = (self.world_size // together, together), ("group", "member")
        group = init_device_mesh(self.device.type, shape, mesh_dim_names=names).get_group("member")
        limit_waits(self.config.timeout_minutes)
        return group

    def split(self, net: nn.Module) -> Any:
        """`net`, whose networks share sequences with the other ranks of our group, where there are any."""
        for network in networks_in(net) if self.sequence is not None else ():
            network.kind.split_sequence(network, self.sequence)
        return net

    @contextmanager
    def sharing_branches(self, guidance: AnyGuidance) -> Iterator[AnyGuidance]:
        """Inside, as many neighbouring ranks as the guidance has branches make each clip together, a branch each, under the
        guidance that this gives; not where ranks do not divide, or share sequences already. Every rank enters."""
        together = guidance.passes
        if together == 1 or self.world_size % together or self.sequence is not None:
            yield guidance
            return
        if together not in self._branch_groups:
            self._branch_groups[together] = self._neighbours(together)
        before = self.data_rank, self.data_ranks, self.is_group_main
        self.data_rank, self.data_ranks = self.rank // together, self.world_size // together
        self.is_group_main = self.rank % together == 0
        try:
            yield SharedGuidance(guidance, self.rank % together, self._branch_groups[together])
        finally:
            self.data_rank, self.data_ranks, self.is_group_main = before

    def apart(self) -> AbstractContextManager:
        """Inside, this rank computes whole sequences by itself."""
        return nullcontext() if self.sequence is None else self.sequence.apart()

    @property
    def description(self) -> str:
        """What runs, for people: processes, engine, device, precision and threads of each."""
        count = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        threads = f"{torch.get_num_threads()} threads each"
        shared = f", {self.config.sequence_parallel} a sequence" if self.sequence is not None else ""
        slow = self.config.precision == "bf16" and self.device.type == "cpu" and not multiplies_bf16()
        hint = " (slow on this CPU; engine.precision=auto would be fp32)" if slow else ""
        return f"{count}{shared}, {self.kind}, {self.device.type}, {self.config.precision}{hint}, {threads}"

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` (what pickles) on every rank: for decisions that all have to take alike."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def in_turns(self, own: Sequence[Any], num: int) -> list[Any]:
        """All `num` values (what pickles), of which each rank has those of its turns: rank, rank + world_size, ..."""
        parts: list[Any] = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, own)
        return [parts[i % self.world_size][i // self.world_size] for i in range(num)]

    def share(self, num: int) -> Tensor:
        """The rows of `num` that are this rank's (and its sequence group's), every rank as many: some twice, where they do not
        divide. See `all_rows`."""
        return torch.arange(self.data_rank, -(-num // self.data_ranks) * self.data_ranks, self.data_ranks) % num

    def missing(self, files: Sequence[Path], apart: bool = False) -> list[int]:
        """Those of the files, by number, that are this rank's (and, but for `apart`, its sequence group's) to make: every so
        many-th of those that are not there, as rank 0 sees it now. Every rank calls it."""
        found = self.from_main([i for i, file in enumerate(files) if not file.is_file()] if self.is_main else None)
        return found[self.rank :: self.world_size] if apart else found[self.data_rank :: self.data_ranks]

    def all_rows(self, own: Tensor, num: int) -> Tensor:
        """What every rank has of the rows that `share(num)` gave it [n, ...] -> that of all rows [num, ...], on the CPU."""
        if self.world_size == 1:
            return own.cpu()
        found = []
        for row in own.to(self.device).contiguous():
            parts = [torch.empty_like(row) for _ in range(self.world_size)]
            dist.all_gather(parts, row)
            found += [part.cpu() for part in parts[:: self.world_size // self.data_ranks]]
        return torch.stack(found[:num])

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in place; summed in fp32 (fp64 stays), bucket by bucket.

        Every process gives the same shapes in the same order.
        """
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors, self.config.bucket_mib * 2**20):
            wide = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
            flat = torch.cat([tensor.detach().to(wide).flatten() for tensor in bucket])
            dist.all_reduce(flat)
            flat /= self.world_size
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.detach().copy_(mean.view_as(tensor))

    def freeze(self, net: nn.Module) -> nn.Module:
        """The frozen network that a stage trains against: a copy in shards where the engine shards weights, else `net`.

        Every rank must call a sharded network, together; so `net` itself stays whole for work that ranks do apart.
        """
        if self.kind not in ("fsdp2", "zero3"):
            return net
        net = copy.deepcopy(net).requires_grad_(False)
        if self.kind == "fsdp2":
            from distill.training.engines import fsdp

            fsdp.shard(self, net, offload="teacher" in self.config.offload)
        else:
            from distill.training.engines import zero

            zero.partition(self, net, "teacher" in self.config.offload)
        return net

    def generator(
        self, seed: int, *keys: int | str, shared: bool = False, device: str | None = None
    ) -> torch.Generator:
        """A generator of (seed, keys, data rank), or of (seed, keys) alone if `shared`; on our device by default."""
        rank = 0 if shared else self.data_rank
        return keyed_generator(seed, *keys, rank, device=torch.device(device or self.device))

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast, or nothing with precision fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def settle(self) -> None:
        """After an error that may be the end of another rank: time for what watches the ranks to say so and to end this one."""
        if self._watch is not None:
            time.sleep(SETTLE_SECONDS)

    def close(self, failed: bool = False) -> None:
        """Leave the process group; the barrier before is what keeps gloo from aborting at exit. Where this rank has `failed`
        it waits for none: others may be anywhere, and notice its end."""
        if failed and self._watch is not None:
            self._watch.failed()  # now: at the exit it would be after every thread's end, and one may wait for another rank
            return
        self.accelerator.wait_for_everyone()
        if self._watch is not None:
            self._watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._alone:
            del os.environ["LOCAL_RANK"]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()


def _buckets(tensors: Sequence[Tensor], num_bytes: int) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.numel() * max(4, tensor.element_size())
        if not buckets or room < size or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            room = num_bytes
        buckets[-1].append(tensor)
        room -= size
    return buckets


def make_role(
    engine, kind: Kind, net: nn.Module, make: MakeOptimizer, clip: float, accumulation: int, offload: bool = False
) -> DistributedRole:
    """`net` as a trained role of an engine of this kind; with `offload` its parts are in the host's memory. Sharding changes `net`
    in place."""
    if kind == "ddp":
        from distill.training.engines.ddp import DDPRole

        return DDPRole(engine, net, make, clip, accumulation)
    if kind == "fsdp2":
        from distill.training.engines.fsdp import FSDP2Role

        return FSDP2Role(engine, net, make, clip, accumulation, offload)
    from distill.training.engines.zero import ZeRORole

    return ZeRORole(engine, int(kind[-1]), net, make, clip, accumulation, offload)

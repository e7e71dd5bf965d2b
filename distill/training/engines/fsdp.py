"""FSDP2 (torch's fully_shard): each rank keeps its rows of every weight, gradient and moment, gathered block by block.

With bf16 the blocks are gathered in bf16 and the rest of the network in fp32; shards and reductions are fp32. What a block
owns directly (Wan's scale_shift_table, which is read outside its block) is replicated.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from distill.training.engines.waits import limit_waits
from distill.training.role import COUNT, WEIGHT, MakeOptimizer, Piece, Rows, trained, whole
from teachers.checkpoints.weights import own_rows

READS = ("read_text", "read_time", "read_audio", "read_image", "read", "look")
"""What the networks compute of their conditions outside their forward, where fully_shard's hooks do not see it."""


def mesh_of(engine) -> DeviceMesh:
    """All ranks in a row; with `engine.shard_ranks` the replicas by the ranks that share one's shards."""
    together = min(engine.config.shard_ranks or engine.world_size, engine.world_size)
    if together == engine.world_size:
        return init_device_mesh(engine.device.type, (together,), mesh_dim_names=("shard",))
    shape = (engine.world_size // together, together)
    mesh = init_device_mesh(engine.device.type, shape, mesh_dim_names=("replicate", "shard"))
    limit_waits(engine.config.timeout_minutes)
    return mesh


def shard(
    engine,
    net: nn.Module,
    keep: bool = False,
    fill: Callable[[nn.Module], None] | None = None,
    offload: bool = False,
) -> FSDPModule:
    """Shard `net` in place over the ranks, block by block, and return its root: the transformer in it, else `net` itself.

    The blocks are the modules that the transformer's `_no_split_modules` names. With `keep` they stay gathered once they are,
    until `reshard`; with `offload` the shards are in the host's memory. A network on the meta device gets its shards on ours, and
    fill(net) writes the values, so that no rank holds it whole. One that is in shards already stays as it is.
    """
    if isinstance(_parts(net)[0], FSDPModule):
        return cast(FSDPModule, _parts(net)[0])
    mesh = mesh_of(engine)
    where = CPUOffloadPolicy(pin_memory=engine.device.type == "cuda") if offload else OffloadPolicy()
    bf16 = torch.bfloat16 if engine.config.precision == "bf16" else None
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # outputs are views that are never written to
    root, blocks = _parts(net)
    owned = {p for block in blocks for p in block.parameters(recurse=False)}
    for module in (*blocks, root):
        narrow = bf16 if module is not root else None
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": policy,
            "offload_policy": where,
            "ignored_params": owned,
        }
        fully_shard(module, reshard_after_forward=False if keep else None, **options)
        cast(FSDPModule, module).set_reshard_after_backward(not keep, recurse=False)
        _gather_for_reads(module, keep)
    if fill is not None:
        _allocate(net, engine, offload)
        fill(net)
    for p in (p for block in blocks for p in block.parameters(recurse=False) if not isinstance(p, DTensor)):
        p.data = p.data.to(engine.device)
    for module in (root, *blocks):  # now: what is first gathered in inference mode cannot be used in training
        cast(FSDPModule, module).unshard()
        cast(FSDPModule, module).reshard()
    return cast(FSDPModule, root)


def _allocate(net: nn.Module, engine, offload: bool) -> None:
    """Memory for parameters on the meta device; buffers, which are not on it, keep their values."""
    buffers = [(module, name, x) for module in net.modules() for name, x in module._buffers.items() if x is not None]
    net.to_empty(device="cpu" if offload else engine.device)
    for module, name, x in buffers:
        module._buffers[name] = x.to(engine.device)


def reshard(root: FSDPModule) -> None:
    """Let go of all gathered weights."""
    for module in cast(nn.Module, root).modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gather_for_reads(module: nn.Module, keep: bool) -> None:
    """Gather an FSDPModule's own weights around its READS; unless they are to `keep`, reshard them where they were sharded.

    Not torch's register_fsdp_forward_method: the networks call READS within their forward too, and its post-forward hook would
    reshard the weights in the middle of it.
    """
    sharded = cast(FSDPModule, module)
    owner = next(m for m in module.modules() if any(isinstance(p, DTensor) for p in m.parameters(recurse=False)))
    name = next(name for name, p in owner.named_parameters(recurse=False) if isinstance(p, DTensor))

    def gathered(read: Callable) -> Callable:
        @functools.wraps(read)
        def wrapper(*args):
            is_sharded = isinstance(owner.get_parameter(name), DTensor)
            if is_sharded:
                sharded.unshard()
            try:
                return read(*args)
            finally:
                if is_sharded and not keep:
                    sharded.reshard()

        return wrapper

    for verb in READS:
        if hasattr(module, verb):
            setattr(module, verb, gathered(getattr(module, verb)))


def _parts(net: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    for root in net.modules():
        if names := getattr(root, "_no_split_modules", None):
            return root, [module for module in root.modules() if type(module).__name__ in names]
    return net, []


class FSDP2Role:
    """`DistributedRole` in FSDP2 shards."""

    def __init__(
        self, engine, net: nn.Module, make: MakeOptimizer, clip: float, accumulation: int, offload: bool = False
    ):
        self.engine, self.clip, self.accumulation = engine, clip, accumulation
        self.root = shard(engine, net, keep=engine.config.gather_once, offload=offload)
        reshard(self.root)  # a validation before training may have left it gathered
        self.params = trained(net)
        self.optimizer = make([{"params": group} for group in self._groups(self.params.values()) if group])

    def _groups(self, tensors) -> tuple[list, list]:
        """(sharded, replicated) tensors: no kernel takes both."""
        tensors = list(tensors)
        return [x for x in tensors if isinstance(x, DTensor)], [x for x in tensors if not isinstance(x, DTensor)]

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        self.root.reshard()  # a pass without gradient leaves it gathered, with parameters that require none
        with self.engine.autocast():
            return compute()

    def backward(self, value: Tensor, last: bool) -> None:
        self.root.set_requires_all_reduce(last)  # over replicas; whole gradients are kept by nobody
        (value / self.accumulation).backward()

    def step(self, rate: float) -> Tensor:
        groups = self._groups(p for p in self.params.values() if p.grad is not None)
        self.engine.all_reduce_mean([p.grad for p in groups[1]])
        norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in groups if group]
        full = [x.full_tensor() if isinstance(x, DTensor) else x for x in norms]
        norm = torch.stack([x.to(self.engine.device) for x in full]).square().sum().sqrt()
        if torch.isfinite(norm):
            for group in filter(None, groups):
                nn.utils.clip_grads_with_norm_(group, self.clip, norm.to(group[0].device))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter((name, local(p)) for name, p in self.params.items())

    def sync_from_master(self) -> None:
        reshard(self.root)

    def release(self) -> None:
        reshard(self.root)

    def pieces(self, what: str, parts: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        for name, p in self.params.items():
            value = parts[name] if parts is not None else p if what == WEIGHT else self.optimizer.state[p].get(what)
            if value is None:
                continue
            if what == COUNT or not isinstance(p, DTensor):
                if self.engine.is_main:
                    yield Piece.whole(name, value)
            elif _is_first(p) and (rows := local(value)).numel():
                yield Piece(name, p.shape, own_rows(p).start * p.shape[1:].numel(), rows.flatten())

    def load_full_state(self, what: str, full: Mapping[str, Rows], parts: Mapping[str, Tensor] | None = None) -> None:
        for name, value in full.items():
            p = self.params[name]
            if parts is not None:
                parts[name].copy_(_part(value, p))
            elif what == WEIGHT:
                local(p).copy_(_part(value, p))
            elif what == COUNT:
                self.optimizer.state[p][what] = whole(value).to(p.device, torch.float32, copy=True)
            else:
                moment = torch.zeros_like(p)
                local(moment).copy_(_part(value, p))
                self.optimizer.state[p][what] = moment


def _is_first(p: DTensor) -> bool:
    """Whether this rank is in the first of the groups that hold the same rows."""
    place = p.device_mesh.get_coordinate()
    assert place is not None
    return not any(at for at, kind in zip(place, p.placements, strict=True) if isinstance(kind, Replicate))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _part(full: Rows, like: Tensor) -> Tensor:
    """This rank's rows of a full tensor."""
    return full[own_rows(like)] if isinstance(like, DTensor) else whole(full)

"""DeepSpeed's ZeRO (2020, 1910.02054): optimizer state (1), gradients (2) and weights (3) in partitions, one engine a role.

DeepSpeed keeps a rank's fp32 weights and moments in flat tensors; a `FlatSlice` states which part of a parameter is where in them.
ZeRO-2 and 3 reduce gradients in every micro-step, since no rank keeps them all; DeepSpeed refuses to skip it.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.training.engines.waits import limit_waits
from distill.training.role import COUNT, WEIGHT, MakeOptimizer, Piece, Rows, elements, trained, whole

PERSISTENT = 100_000
"""ZeRO-3 replicates parameters of up to this many elements; tables that are read outside their own module have to be."""


class ZeROModule(nn.Module):
    """DeepSpeed hooks one forward of a module: that of the loss."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


@dataclass(frozen=True)
class FlatSlice:
    """Elements [start, start + count) of a flattened parameter lie at `offset` of the flat tensor number `flat`."""

    flat: int
    offset: int
    start: int
    count: int


class ZeRORole:
    """`DistributedRole` in ZeRO's partitions."""

    def __init__(
        self, engine, stage: int, net: nn.Module, make: MakeOptimizer, clip: float, accumulation: int, offload: bool
    ):
        self.engine, self.stage, self.accumulation = engine, stage, accumulation
        net.to(engine.device)
        self.params = trained(net)
        config = settings(engine, stage, offload)
        config |= {"gradient_clipping": clip, "gradient_accumulation_steps": accumulation}
        optimizer = make(list(self.params.values()))
        self.deepspeed = initialize(engine, model=ZeROModule(net), optimizer=optimizer, config=config)
        self.zero: Any = self.deepspeed.optimizer
        self.slices = {name: self._slice(p) for name, p in self.params.items()}

    @property
    def flats(self) -> list[Tensor]:
        """This rank's fp32 weights."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _slice(self, p: Any) -> FlatSlice | None:
        if self.stage == 3:
            flat, offset, length = self.zero.grad_position[self.zero.get_param_id(p)]
            start = dist.get_rank() * length
            return FlatSlice(flat, offset, start, max(0, min(length, p.ds_numel - start)))
        if p._hp_mapping is None:
            return None
        high, low = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
        return FlatSlice(p._hp_mapping.param_group_index, high.start, low.start, low.numel)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        with self.engine.autocast():
            return self.deepspeed(compute)

    def backward(self, value: Tensor, last: bool) -> None:
        self.deepspeed.backward(value)
        if not last:
            self.deepspeed.step()  # counts the micro-step

    def step(self, rate: float) -> Tensor:
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        return torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter((str(i), flat.detach()) for i, flat in enumerate(self.flats))

    @torch.no_grad()
    def sync_from_master(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.checkpoint_event_prologue()
        for i in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(i)
        self.zero.checkpoint_event_epilogue()

    def release(self) -> None:
        """DeepSpeed lets go by itself."""

    def _source(self, what: str, parts: Mapping[str, Tensor] | None) -> list[Tensor | None]:
        """The flat tensors of `what`; None for moments before the first step."""
        if parts is not None:
            return [parts[str(i)] for i in range(len(self.flats))]
        if what == WEIGHT:
            return [flat.detach() for flat in self.flats]
        return [self.zero.optimizer.state[flat].get(what) for flat in self.flats]

    def pieces(self, what: str, parts: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        source = self._source(what, parts)
        if source[0] is None:
            return
        for name, p in self.params.items():
            if what == COUNT:
                if self.engine.is_main:
                    yield Piece.whole(name, source[0])
            elif (own := self.slices[name]) is not None and own.count and (flat := source[own.flat]) is not None:
                yield Piece(name, self._shape(p), own.start, flat[own.offset : own.offset + own.count])

    def _shape(self, p: Any) -> torch.Size:
        return p.ds_shape if self.stage == 3 else p.shape

    def load_full_state(self, what: str, full: Mapping[str, Rows], parts: Mapping[str, Tensor] | None = None) -> None:
        if parts is None and what != WEIGHT:
            for flat in self.flats:
                state = self.zero.optimizer.state[flat]
                if what == COUNT:
                    state[what] = max(whole(x).float() for x in full.values()).to(flat.device, copy=True)
                elif what not in state:
                    state[what] = torch.zeros_like(flat.detach())
        if what == COUNT:
            return
        into = self._source(what, parts)
        for name, value in full.items():
            if (piece := self.slices[name]) is not None and (flat := into[piece.flat]) is not None:
                part = elements(value, self._shape(self.params[name]), piece.start, piece.count)
                flat[piece.offset : piece.offset + piece.count].copy_(part)


def settings(engine, stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of one role, without what its optimizer adds."""
    elements = engine.config.bucket_mib * 2**20 // 4
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": engine.device.type == "cuda",
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "stage3_param_persistence_threshold": PERSISTENT,
        "memory_efficient_linear": False,  # it replaces torch's linear for the whole process
    }
    if offload:
        pinned = {"device": "cpu", "pin_memory": engine.device.type == "cuda"}
        zero |= {"offload_optimizer": pinned} | ({"offload_param": pinned} if stage == 3 else {})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # not used: batches are the loop's
        "steps_per_print": 2**62,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if engine.config.precision == "bf16":  # no module is "safe": parameters and reductions stay fp32
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["torch_autocast"] = autocast
    return config


def initialize(engine, **options: Any) -> Any:
    """A DeepSpeedEngine in our process group. DeepSpeed's shared-memory kernel for CPUs takes minutes to compile; gloo is used."""
    if engine.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed_engine = deepspeed.initialize(dist_init_required=False, **options)[0]
    limit_waits(engine.config.timeout_minutes)
    if deepspeed_engine.zero_optimization_stage() == 3:
        _replicate_tables(deepspeed_engine)
    return deepspeed_engine


def _replicate_tables(deepspeed_engine: Any) -> None:
    """Gather, permanently, what a module with children owns itself (Wan's scale_shift_table): it is read outside its forward.

    DeepSpeed releases persistent parameters after their module's pass until it knows the order of modules, external ones never.
    """
    for module in deepspeed_engine.module.modules():
        for p in module.parameters(recurse=False) if list(module.children()) else ():
            p.is_external_param = True
    if persistent := deepspeed_engine.optimizer.persistent_parameters:
        persistent[0].all_gather(persistent)


def partition(engine, net: nn.Module, offload: bool) -> None:
    """Partition a frozen network in place, as ZeRO-3 does with a trained one; its forward gathers what it needs."""
    net.to(engine.device)
    initialize(engine, model=net, config=settings(engine, 3, offload))

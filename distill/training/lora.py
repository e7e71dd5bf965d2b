"""LoRA roles (2106.09685): student and fake score as adapters over one set of frozen weights, by peft.

    W x  ->  W x + alpha / rank * B A x        A random, B zero: a fresh adapter changes nothing

A role is a network of its own modules whose frozen parameters are the backbone's very tensors. Which adapter a pass sees is thus
decided by the network that is called, never by a switch: neither the second forward of a checkpointed block nor a pass without
gradient can see another role's, and the backbone itself, called as it is, is the teacher where that is the same network.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from students.serving.optimize import DTYPES
from students.serving.optimize import cast as cast_network
from students.weights.adapter import HINT, Adapter, targeted
from teachers.checkpoints.strict import check_shapes, shapes_of
from teachers.errors import UserError
from teachers.flow import keyed_generator

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""OmniAvatar's q, k, v, o, ffn.0, ffn.2: every matrix of both attentions and of the MLP."""
ENGINES = ("ddp", "zero1", "zero2")
"""Those that leave weights whole. The others cut every role's frozen weights into shards of its own."""


@dataclass(frozen=True, kw_only=True)
class LoraRoles:
    """Student and fake score are trained as LoRAs of `rank` and scale alpha / rank on the linear maps that end in one of `targets`;
    the modules `full` are trained whole, in fp32 copies. `export`: a self-contained student, or its adapter and where its base is.
    `scale`: by which the trained student's adapter is multiplied when that is done with training, for export and report.

    The defaults are OmniAvatar's, which trains patch_embedding, audio_proj and audio_cond_projs whole (2506.18866).
    """

    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = TARGETS
    full: tuple[str, ...] = ()
    export: Literal["merged", "adapter"] = "merged"
    scale: float = 1.0

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0.0:
            raise UserError(f"lora: got rank {self.rank} and alpha {self.alpha}; both must be above 0")
        if not self.targets:
            raise UserError("lora.targets: names no module; remove it for every matrix of a block")
        if self.scale != 1.0 and self.full:
            raise UserError(
                f"lora.scale: got {self.scale}, but {self.full[0]} is trained whole; empty lora.full, or remove it"
            )

    def adapter(self, tensors: Mapping[str, Tensor], scale: float = 1.0) -> Adapter:
        """These tensors as an adapter of this kind, times `scale`."""
        return Adapter(rank=self.rank, alpha=self.alpha * scale, targets=self.targets, full=self.full, tensors=tensors)


def check(held: str, computes: str, engine: str) -> None:
    """UserError where the backbone's precision is not the engine's, or an engine would cut the shared weights to pieces."""
    if engine not in ENGINES:
        raise UserError(
            f"lora: {engine} shards weights, which LoRA roles share; use engine=ddp, zero1 or zero2, or remove lora"
        )
    if held != computes:
        raise UserError(
            f"lora: the shared network is held in precision {held}, engine.precision is {computes}; set both to one value"
        )


def make_backbone(net: Any, precision: str) -> Any:
    """`net`, frozen, with its matrices in the type that they are multiplied in."""
    cast_network(net, DTYPES[precision])
    return net.requires_grad_(False)


def adapt(backbone: Any, config: LoraRoles, seed: int, role: str) -> Any:
    """A network over the backbone's own tensors with a fresh fp32 adapter, a function of (seed, role); its adapter and the modules
    of `config.full`, which are copies, require gradients. UserError for modules that the network does not have."""
    from peft import LoraConfig

    chosen = targeted(backbone, config.targets, config.full)
    own = {id(p) for name in config.full for p in backbone.get_submodule(name).parameters()}
    shared: dict[int, Any] = {id(x): x for x in (*backbone.parameters(), *backbone.buffers()) if id(x) not in own}
    shared |= {id(cache): cache for cache in backbone.kind.shared_caches(backbone)}
    net = copy.deepcopy(backbone, shared)
    with torch.random.fork_rng(devices=[]):
        peft = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))  # pyright: ignore[reportArgumentType]
        net.add_adapter(peft)
    for name in config.full:
        net.get_submodule(name).requires_grad_(True)
    for p in trained(net).values():
        p.data = p.data.float()
    rng, tensors = keyed_generator(seed, "lora", role), trained(net)
    for name, linear in chosen.items():
        # under autocast peft's copy of the input in fp32 would be cast back at once, and kept for each map
        net.get_submodule(name).cast_input_dtype_enabled = False
        down = tensors[f"{name}.lora_A.weight"]
        bound = linear.in_features**-0.5  # peft's: He's uniform with a = sqrt(5)
        down.data.copy_((2 * torch.rand(down.shape, generator=rng) - 1) * bound)
    return net.train()


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of an adapted network, under the names of an adapter's file."""
    return {stored_name(name): p for name, p in net.named_parameters() if p.requires_grad}


def stored_name(name: str) -> str:
    """A trained parameter's name without the name that peft gives an adapter."""
    for side in ("lora_A", "lora_B"):
        name = name.replace(f".{side}.default.", f".{side}.")
    return name


@torch.no_grad()
def load(net: Any, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Fill what is trained of an adapted network; UserError that lists what does not fit."""
    own = trained(net)
    check_shapes(shapes_of(tensors), shapes_of(own), source, HINT)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)

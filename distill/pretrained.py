"""Networks that are given: weights on disk in any published layout, in the place of training a teacher here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights

from distill.train import TrainConfig
from students.adapter import digest
from students.spec import Spec
from teachers.convert import fill_network
from teachers.errors import UserError
from teachers.wan import AvatarTransformer, NetworkConfig, build_network

__all__ = ["TeacherStage", "digest", "load_given", "network_dims"]


@dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """A network, and where its weights come from: `path` (any layout of `distill convert`), or `method` and `train`, by which it
    is trained here (from `path`, if that is given too).

    `wan`: the Wan weights that a LoRA in `path` (OmniAvatar) was trained over. `widen`: consent to reference and mask channels
    that start at zero. `precision` is that of a frozen network's matrices.
    """

    network: NetworkConfig
    path: Path | None = None
    wan: Path | None = None
    widen: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    method: Any = field(default=None, metadata={"named": "distill.methods"})
    train: TrainConfig | None = None

    def __post_init__(self):
        if self.path is None and (self.method is None or self.train is None):
            raise UserError(
                "no weights of the teacher: give teacher.path=FOLDER (Wan, OmniAvatar, diffusers, Self-Forcing or ours), or "
                "teacher.method and teacher.train to train one here"
            )

    @property
    def is_trained(self) -> bool:
        """Whether the stage trains the network, and so has weights of its own."""
        return self.method is not None and self.train is not None


def network_dims(spec: Spec) -> dict[str, int]:
    """The sizes of a network that the spec's codec, ears and text encoder decide."""
    return {
        "latent_channels": spec.codec.channels,
        "stride": spec.codec.stride,
        "text_dim": spec.text.dim,
        "audio_dim": spec.audio_dim,
        "pose_dim": spec.pose_dim,
    }


def load_given(stage: TeacherStage, spec: Spec, device: torch.device, frozen: bool = True) -> AvatarTransformer:
    """The network of `stage.path` on `device`; one that is not `frozen` is fp32. UserError where the weights do not fit."""
    assert stage.path is not None
    with init_empty_weights():
        net: Any = build_network(stage.network, **network_dims(spec))
    dtype = torch.bfloat16 if frozen and stage.precision == "bf16" else torch.float32
    kept = set(net._keep_in_fp32_modules or ())
    for name, parameter in list(net.named_parameters()):
        wide = kept & set(name.split("."))
        made = torch.empty(parameter.shape, dtype=torch.float32 if wide else dtype, device=device)
        module, _, own = name.rpartition(".")
        setattr(net.get_submodule(module), own, torch.nn.Parameter(made))
    fill_network(net, stage.path, base=stage.wan, widen=stage.widen)
    return net.to(device)

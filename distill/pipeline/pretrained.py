"""Networks that are given: weights on disk in any published layout, in the place of training a teacher here."""

from typing import Any

import torch
from accelerate import init_empty_weights

from distill.recipe import TeacherStage
from students.spec import Spec
from students.weights.adapter import digest
from teachers.checkpoints.convert import fill_network
from teachers.networks.wan import AvatarTransformer, build_network
from teachers.teacher import allocate

__all__ = ["TeacherStage", "digest", "load_given", "network_dims"]


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
    allocate(net, dtype, device)
    fill_network(net, stage.path, base=stage.wan, widen=stage.widen)
    return net.to(device)

"""Networks that are given: weights on disk in any published layout, in the place of training a teacher here."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from distill.recipe import Recipe, TeacherStage, spec_of
from students.spec import Spec
from students.weights.adapter import HINT, digest
from teachers.checkpoints.convert import fill_network
from teachers.checkpoints.strict import check_shapes, load_strict, shapes_of
from teachers.errors import UserError
from teachers.files import load_tensors
from teachers.networks.kind import AvatarTeacher
from teachers.resolve import label
from teachers.teacher import Teacher, allocate

__all__ = ["OURS", "digest", "load_given"]

OURS = "model.safetensors"
"""The file of a network that has no published layout, in the folder of its weights."""


def load_given(stage: TeacherStage, spec: Spec, device: torch.device, frozen: bool = True) -> Any:
    """The network of `stage.path` on `device`: any published layout where its kind has some, else model.safetensors under the
    network's own names. One that is not `frozen` is fp32. UserError where the weights do not fit."""
    assert stage.path is not None
    with init_empty_weights():
        net = stage.network.new(spec.dims)
    dtype = torch.bfloat16 if frozen and stage.precision == "bf16" else torch.float32
    allocate(net, dtype, device)
    if stage.network.layouts:
        fill_network(net, stage.path, base=stage.wan, widen=stage.widen)
        return net.to(device)
    if stage.wan is not None or stage.widen:
        raise UserError(f"teacher.wan, widen: {label(stage.network)} has no published layout; remove them")
    file = stage.path if stage.path.is_file() else stage.path / OURS
    if not file.is_file():
        raise UserError(f"no weights: {file}; give teacher.path a folder that holds {OURS}, or that file")
    tensors = load_tensors(file)
    if device.type == "meta":  # an outline is only checked
        check_shapes(shapes_of(tensors), shapes_of(net.state_dict()), file, HINT)
    else:
        load_strict(net, tensors, file, HINT)
    return net.to(device)


def load_teacher(recipe: Recipe, device: torch.device | str = "cpu") -> Teacher:
    """The teacher of a recipe on `device`; UserError where its run has none yet, or where weights do not fit."""
    spec, device = spec_of(recipe), torch.device(device)
    if not recipe.teacher.is_trained:
        return Teacher(AvatarTeacher(load_given(recipe.teacher, spec, device)))
    file = Path(recipe.run_dir) / "stages" / "teacher" / "model.safetensors"
    if not file.is_file():
        raise UserError(f"no teacher yet: {file}; run the recipe first, or give its run_dir=")
    net = recipe.teacher.network.new(spec.dims)
    load_strict(net, load_tensors(file), file, HINT)
    return Teacher(AvatarTeacher(net.to(device)))

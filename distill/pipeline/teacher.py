"""A recipe's teacher, ready to sample: given weights, or those that the recipe's run has trained."""

from pathlib import Path

import torch

from distill.pipeline.pretrained import load_given
from distill.recipe import Recipe, spec_of
from students.weights.adapter import HINT
from teachers.checkpoints.strict import load_strict
from teachers.errors import UserError
from teachers.files import load_tensors
from teachers.networks.kind import AvatarTeacher
from teachers.teacher import Teacher


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

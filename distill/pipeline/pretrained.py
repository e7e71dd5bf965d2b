"""Networks that are given: weights on disk in any published layout, in the place of training a teacher here."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from distill.pipeline import record
from distill.recipe import Recipe, TeacherStage, spec_of
from students.spec import Spec
from students.weights.adapter import HINT, digest
from students.weights.checkpoint import Bundle
from teachers.checkpoints.convert import fill_network
from teachers.checkpoints.strict import check_finite, check_shapes, load_strict, shapes_of
from teachers.checkpoints.weights import copy_rows, read_safetensors
from teachers.config import to_plain
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors
from teachers.networks.kind import AvatarTeacher
from teachers.resolve import label
from teachers.teacher import Teacher, allocate

__all__ = ["OURS", "digest", "load_given"]

META = torch.device("meta")
OURS = "model.safetensors"
"""The file of a network that has no published layout, in the folder of its weights."""


def write_config(folder: Path, network: Any, spec: Spec) -> None:
    """config.json beside weights that were trained here, so that the folder can be given to another recipe (`teacher.path`,
    `base.path`) and to `distill convert`."""
    known = {**to_plain(network), "stride": spec.codec.stride, "speakers": spec.speakers}
    atomic_write(folder / "config.json", json.dumps(known, indent=1) + "\n")


def load_given(stage: TeacherStage, spec: Spec, device: torch.device, frozen: bool = True) -> Any:
    """The network of `stage.path` on `device`. One that is not `frozen` is fp32. UserError where the weights do not fit."""
    net = outline(stage, spec, device, frozen)
    fill_given(net, stage)
    return net.to(device)


def outline(stage: TeacherStage, spec: Spec, device: torch.device = META, frozen: bool = True) -> Any:
    """The network of a stage in the types that it is held in, its parameters on `device` without values."""
    with init_empty_weights():
        net = stage.network.new(spec.dims)
    dtype = torch.bfloat16 if frozen and stage.precision == "bf16" else torch.float32
    allocate(net, dtype, device)
    return net


def fill_given(net: Any, stage: TeacherStage) -> None:
    """The weights of `stage.path`: any published layout where the network's kind has some, else model.safetensors under its own
    names. Of a network in shards each rank reads its rows; one on the meta device is only checked."""
    assert stage.path is not None
    if stage.network.layouts:
        try:
            fill_network(net, stage.path, base=stage.wan, widen=stage.widen)
        except UserError as error:
            if not stage.network.source or not str(error).startswith("no weights"):
                raise
            raise UserError(f"{error}; get {stage.network.source}") from error
        return
    if stage.wan is not None or stage.widen:
        raise UserError(f"teacher.wan, widen: {label(stage.network)} has no published layout; remove them")
    file = weights_file(stage.path)
    if not file.is_file():
        raise UserError(f"no weights: {file}; give teacher.path a folder that holds {OURS}, or that file")
    fill_strict(net, file)


def weights_file(path: Path) -> Path:
    """The file of a network without a published layout, given by itself or by its folder."""
    return path if path.is_file() else path / OURS


@torch.no_grad()
def fill_strict(net: Any, file: Path) -> None:
    """The weights of a file under the network's own names; of a network in shards each rank reads its rows, one on the meta device
    is only checked. UserError where they do not fit."""
    own, tensors = net.state_dict(), read_safetensors(file)
    check_shapes({name: x.shape for name, x in tensors.items()}, shapes_of(own), file, HINT)
    for name, value in own.items():
        if not value.is_meta:
            copy_rows(value, tensors[name].read)
            check_finite({name: value}, file, "get the weights again")


def published_student(recipe: Recipe, path: Path, wan: Path | None) -> Bundle:
    """The student whose weights are published at `path`, over the weights `wan` where it is a LoRA or a part, with the geometry,
    history and encoders of a recipe; in bf16 where the recipe's teacher is. UserError for what does not fit, and for a codec or a
    text encoder that is fitted to a run's data."""
    spec = spec_of(recipe)
    if spec.codec.fitted or spec.text.fitted:
        raise UserError(
            "data.codec, data.text: they are fitted to a run's data; give a recipe whose encoders have a path"
        )
    stage = TeacherStage(network=spec.network, path=path, wan=wan, precision=recipe.teacher.precision)
    net = load_given(stage, spec, torch.device("cpu"))
    codec, image = spec.codec.load(path, spec.height, spec.width), None if spec.image is None else spec.image.load()
    encoders = codec, spec.audio.load(spec.samples_per_frame), spec.text.load(path)
    return Bundle(spec.network.student(net, spec).eval().requires_grad_(False), *encoders, image_encoder=image)


def load_teacher(recipe: Recipe, device: torch.device | str = "cpu") -> Teacher:
    """The teacher of a recipe on `device`; UserError where its run has none yet, or where weights do not fit."""
    spec, device = spec_of(recipe), torch.device(device)
    if not recipe.teacher.is_trained:
        return Teacher(AvatarTeacher(load_given(recipe.teacher, spec, device)))
    file = Path(recipe.run_dir) / "stages" / "teacher" / "model.safetensors"
    if not file.is_file():
        raise UserError(f"no teacher yet: {file}; run the recipe first, or give its run_dir=")
    record.require(file.parent)
    net = recipe.teacher.network.new(spec.dims)
    load_strict(net, load_tensors(file), file, HINT)
    return Teacher(AvatarTeacher(net.to(device)))

"""The student as a checkpoint folder: weights, spec, model card; and its copy at the top of the run."""

import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from distill.pipeline.artifacts import Artifacts
from distill.pipeline.pretrained import digest
from distill.pipeline.run_folder import revision
from distill.recipe import METHODS
from distill.training.checkpoint import Writer
from students.weights import checkpoint
from students.weights.adapter import Adapter, Base
from students.weights.card import model_card
from teachers.disk.digests import faults
from teachers.files import load_tensors, remove_folder, staged
from teachers.resolve import name_of

EDITED = ("spec.json ", "README.md ")


def export(artifacts: Artifacts, folder: Path) -> dict:
    """Write folder/student from the weights of `distill`; self-contained, or as an adapter over its base. Rank 0 does, and the
    others look in once a second."""
    spec, target = artifacts.spec, folder / "student"

    def write() -> None:
        card = _card(artifacts)
        student = artifacts.bundle(artifacts.student("distill", device=torch.device("cpu")))  # whole in fp32
        remove_folder(target)
        checkpoint.save_student(target, student, card, _adapter(artifacts))

    Writer(folder, artifacts.engine, keep=0).write(target, write)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in checkpoint.make_student(spec).parameters())
    return {"nfe_per_chunk": spec.nfe_per_chunk, "parameters": parameters}


def _card(artifacts: Artifacts) -> str:
    """The student's model card: what the stage `distill` recorded of it, in words."""
    recipe, teacher = artifacts.recipe, artifacts.recipe.teacher
    done = (artifacts.folder.finished("distill") or {}).get("metrics", {})
    given = Path(teacher.wan or teacher.path or "trained by the recipe")
    methods = [name_of(METHODS, method, digests=True) for method in (recipe.init.method, recipe.distill.method)]
    facts = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "teacher": given.name if given.is_absolute() else str(given),
        "method": ", then ".join(methods),
        "steps of distillation": done.get("steps", recipe.distill.train.num_steps),
        "parameters": f"{done['parameters']:,}" if "parameters" in done else "",
        "revision": revision(),
    }
    return model_card(
        artifacts.spec,
        title=f"Student of {recipe.name}",
        data=artifacts.source.description,
        facts={name: value for name, value in facts.items() if value != ""},
        scores=done.get("best"),
    )


def _adapter(artifacts: Artifacts) -> tuple[Adapter, Base] | None:
    """The student's adapter and where its base is, if that is to be exported."""
    recipe, run = artifacts.recipe, artifacts.folder
    if recipe.lora is None or recipe.lora.export == "merged":
        return None
    config, file = artifacts.config(recipe.init_checkpoint), run.stage_dir(recipe.init_checkpoint) / "model.safetensors"
    path, wan = (file, None) if config.is_trained else (config.path, config.wan)
    assert path is not None
    path, wan = path.resolve(), wan and wan.resolve()
    base = Base(path=path, wan=wan, widen=config.widen, ours=config.is_trained, digest=digest(path, wan))
    return recipe.lora.adapter(load_tensors(run.stage_dir("distill") / "model.safetensors"), recipe.lora.scale), base


def publish(artifacts: Artifacts) -> None:
    """Copy the exported student to the top of the run folder, unless it is there as it was exported; spec.json and the card may
    have been edited since."""
    target, source = artifacts.folder.path / "student", artifacts.folder.stage_dir("export") / "student"
    if artifacts.engine.is_main:
        done = artifacts.folder.finished("export")
        assert done is not None
        files = {name.removeprefix("student/"): written for name, written in done["files"].items()}
        wrong = [f"{name} {words}" for name, words in faults(target, files)] if target.is_dir() else []
        edited = all(name.startswith(EDITED) and not name.endswith("not there") for name in wrong)
        for words in wrong:
            tqdm.write(f"distill: {target / words}{'' if edited else ': copied again'}", file=sys.stderr)
        if not target.is_dir() or not edited:
            remove_folder(target)
            with staged(target) as partial:
                shutil.copytree(source, partial)
    artifacts.engine.barrier()

"""The student as a checkpoint folder: weights, spec, model card; and its copy at the top of the run."""

import shutil
from pathlib import Path

from distill.pipeline.artifacts import Artifacts
from distill.pipeline.pretrained import digest
from distill.pipeline.run_folder import revision
from distill.recipe import METHODS
from students.weights import checkpoint
from students.weights.adapter import Adapter, Base
from students.weights.card import model_card
from teachers.files import load_tensors, staged
from teachers.resolve import name_of


def export(artifacts: Artifacts, folder: Path) -> dict:
    """Write folder/student from the weights of `distill`; self-contained, or as an adapter over its base."""
    spec = artifacts.spec
    if artifacts.engine.is_main:
        card = _card(artifacts)
        student = artifacts.bundle(artifacts.student("distill"))
        checkpoint.save_student(folder / "student", student, card, _adapter(artifacts))
    artifacts.engine.barrier()
    return {
        "nfe_per_chunk": spec.nfe_per_chunk,
        "parameters": sum(p.numel() for p in artifacts.student("distill").parameters()),
    }


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
    path, wan = path.expanduser().resolve(), wan and wan.expanduser().resolve()
    base = Base(path=path, wan=wan, widen=config.widen, ours=config.is_trained, digest=digest(path, wan))
    return recipe.lora.adapter(load_tensors(run.stage_dir("distill") / "model.safetensors")), base


def publish(artifacts: Artifacts) -> None:
    """Copy the exported student to the top of the run folder."""
    target = artifacts.folder.path / "student"
    if artifacts.engine.is_main and not (target / "spec.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        with staged(target) as partial:
            shutil.copytree(artifacts.folder.stage_dir("export") / "student", partial)
    artifacts.engine.barrier()

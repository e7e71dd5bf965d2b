"""The student as a checkpoint folder: weights, spec, model card; and its copy at the top of the run."""

import json
import shutil
from pathlib import Path

from distill.pipeline.artifacts import Artifacts
from distill.pipeline.pretrained import digest
from students.weights import checkpoint
from students.weights.adapter import Adapter, Base
from teachers.files import load_tensors, staged


def export(artifacts: Artifacts, folder: Path) -> dict:
    """Write folder/student from the weights of `distill`; self-contained, or as an adapter over its base."""
    recipe, spec = artifacts.recipe, artifacts.spec
    if artifacts.engine.is_main:
        best = (artifacts.folder.finished("distill") or {}).get("metrics", {})
        card = (
            f"# Student of {recipe.name}\n\nA causal {len(spec.sigmas)}-step audio-driven avatar student, distilled "
            f"by avatar-distill. Data: {spec.width}x{spec.height} {artifacts.source.description}.\n\n"
            f"```json\n{json.dumps({'distill': best}, indent=1)}\n```\n\n"
            "    distill sample --student . --image PORTRAIT.png --audio SPEECH.wav --text 'smiles and nods' --out out.mp4\n"
        )
        student = artifacts.bundle(artifacts.student("distill"))
        checkpoint.save_student(folder / "student", student, card, _adapter(artifacts))
    artifacts.engine.barrier()
    return {
        "nfe_per_chunk": spec.nfe_per_chunk,
        "parameters": sum(p.numel() for p in artifacts.student("distill").parameters()),
    }


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

"""Every stage of a recipe at size=tiny, with one engine."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.skipped import SkippedError
from distill.compose import RECIPES
from distill.pipeline.stages import run
from distill.recipe import load_recipe
from distill.training.lora import ENGINES


def tiny(name: str, kind: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Seconds of each stage and of all, and the systems that were evaluated."""
    if kind.startswith("zero"):
        try:
            import deepspeed  # noqa: F401
        except Exception as error:
            raise SkippedError(f"deepspeed cannot be imported: {error}") from error
    run_dir = folder / "runs" / f"{name}_{kind}"
    shutil.rmtree(run_dir, ignore_errors=True)
    precision = "bf16" if device.type == "cuda" else "fp32"
    words = ["size=tiny", "threads=1", f"run_dir={run_dir}", f"engine.kind={kind}", f"engine.precision={precision}"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", words)
    if recipe.lora is not None and kind not in ENGINES:
        raise SkippedError(f"LoRA roles share weights, which {kind} shards")
    run(recipe)
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    stages = {stage: facts["seconds"] for stage, facts in report["stages"].items()}
    shutil.rmtree(run_dir)
    return {"precision": precision, "stages": stages, "systems": sorted(report["systems"])}

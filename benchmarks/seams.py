"""Seam jumps of every system of finished runs: mean frame change at chunk borders over mean change elsewhere.

    python benchmarks/seams.py RUN_DIR [RUN_DIR ...]

Reads the clips that the evaluate stage kept. A script, not a test; it writes nothing. The codec's own seam is the mark: a
causal codec jumps at every latent frame, and chunks begin at latent frames.
"""

import sys
from pathlib import Path

import yaml

from distill.data.encoders import load_encoders
from distill.data.procedural.source import held_out
from distill.pipeline.evaluation.health import seam_frames
from distill.pipeline.evaluation.systems import clips_file
from distill.recipe import Recipe, spec_of
from eval.metrics.quality import measure
from eval.metrics.seam import seam_jump
from teachers.config import convert
from teachers.errors import UserError
from teachers.files import load_tensors

SYSTEMS = ("teacher", "teacher_few_step", "zero_shot", "init", "student")


def measure_seams(run_dir: Path) -> dict[str, tuple[float, float, float]]:
    """System -> seam jump (mean over the noise seeds), half its range over them, mean jackknife error over clips."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"no run folder: {run_dir}; give the run_dir of a finished run")
    recipe = convert(Recipe, yaml.safe_load(file.read_text(encoding="utf-8")))
    borders, stage = seam_frames(spec_of(recipe)), run_dir / "stages" / "evaluate"
    world = held_out(recipe.data, recipe.eval.condition_seed, "test", recipe.eval.num_conditions)
    encoders = load_encoders(recipe.data, run_dir / "stages" / "data")
    clips = {"real": [world.video], "codec": [encoders.decode(encoders.encode(world.video))]}
    for name in SYSTEMS:
        files = [clips_file(stage, "test", name, seed) for seed in range(recipe.eval.num_seeds)]
        clips[name] = [load_tensors(file)["video"] for file in files]
    found = {}
    for name, videos in clips.items():
        values, errors = zip(*(seam_jump(measure(video), borders) for video in videos), strict=True)
        found[name] = (sum(values) / len(values), (max(values) - min(values)) / 2, sum(errors) / len(errors))
    return found


if __name__ == "__main__":
    try:
        for folder in sys.argv[1:]:
            print(f"{folder}\n| system | seam jump | jackknife error |\n|---|---|---|")
            for system, (value, spread, error) in measure_seams(Path(folder)).items():
                print(f"| {system} | {value:.3f} ± {spread:.3f} | {error:.3f} |")
    except UserError as error:
        sys.exit(f"measure_seams: {error}")

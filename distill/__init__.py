"""How a causal few-step avatar student is made: stages, methods, rollout, training, data, command line.

from distill import load_recipe, run

folder = run(load_recipe("recipes/dmd_avatar.yaml", ["preset=smoke", "run_dir=runs/smoke"]))
"""

from teachers.lazy import offer

__version__ = "0.1.0"
__all__ = ["Recipe", "load_recipe", "load_teacher", "run"]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = offer(
    __name__,
    {
        "Recipe": "distill.recipe",
        "load_recipe": "distill.recipe",
        "load_teacher": "distill.pipeline.pretrained",
        "run": "distill.pipeline.stages",
    },
)

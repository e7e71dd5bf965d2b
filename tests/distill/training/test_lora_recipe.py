"""LoRA in a recipe: read strictly, in the fingerprints of the stages that train adapters, and planned."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.compose import RECIPES
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.stages import Pipeline
from distill.planning import report
from distill.planning.estimate import make_plan, peak_bytes, rank_bytes, suggest_fix
from distill.planning.job import job_of
from distill.recipe import load_recipe, to_dict
from distill.training import lora
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.lora import LoraRoles, adapt, trained
from teachers.config import convert
from teachers.errors import UserError
from teachers.files import save_tensors
from tests.distill.training.test_lora import a_backbone, stir

NAME = "blocks.0.attn1.to_q"

# Recipe -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "lora: got rank 0"),
        ({"targets": []}, "lora.targets: names no module"),
        ({"targets": ["to_w"]}, "lora.targets: no module is called 'to_w'; did you mean"),
        (
            {"targets": ["patch_embedding"]},
            "lora.targets: patch_embedding is a Conv3d, no linear map; put it in lora.full",
        ),
        ({"full": ["audio"]}, "lora.full: the network has no module 'audio'; "),
        ({"full": ["blocks.1"]}, "lora.full: blocks.1.attn1.to_q is in it and one of lora.targets too"),
        ({"ranks": 3}, "unknown key 'lora.ranks': recipe; did you mean 'rank'"),
    ],
)
def test_lora_of_a_recipe_is_read_strictly(change, words):
    with pytest.raises(UserError) as error:
        adapt(a_backbone(), convert(LoraRoles, change, "lora"), 0, "student")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_engines_that_shard_weights_are_refused(engine):
    with pytest.raises(UserError, match=f"^lora: {engine} shards weights, which LoRA roles share; use engine=ddp"):
        lora.check("fp32", "fp32", engine)
    lora.check("fp32", "fp32", "zero1")


def test_the_backbone_is_held_as_the_engine_computes():
    with pytest.raises(UserError, match=r"held in precision fp32, engine\.precision is bf16; set both to one value"):
        lora.check("fp32", "bf16", "ddp")


def stage_configs(folder: Path, *overrides: str) -> dict[str, dict]:
    """The config of every stage of a recipe, which are not run."""
    found: dict[str, dict] = {}
    engine = Engine(EngineConfig(kind="ddp", precision="fp32"))
    try:
        recipe = load_recipe(
            RECIPES / "scratch_avatar.yaml", [f"run_dir={folder / str(len(os.listdir(folder)))}", *overrides]
        )
        pipeline: Any = Pipeline(recipe, engine)
        pipeline.artifacts.folder.stage = lambda name, config, *_: found.update({name: config})
        for name in pipeline.stages:
            pipeline.stage(name)
    finally:
        engine.close()
    return found


def test_lora_is_read_by_the_stages_that_train_adapters_and_its_export_by_export(tmp_path):
    plain, ours = stage_configs(tmp_path), stage_configs(tmp_path, "lora={rank: 4, alpha: 2}")
    other = stage_configs(tmp_path, "lora={rank: 4, alpha: 2, export: adapter}")
    assert plain["export"] == {"name": "scratch_avatar", "lora.export": None, "lora.scale": None}
    assert [name for name in plain if plain[name] != ours[name]] == ["init", "distill", "export"]
    wanted = {"lora.rank": 4, "lora.alpha": 2.0, "lora.targets": list(lora.TARGETS), "lora.full": []}
    assert {name: value for name, value in ours["init"].items() if name.startswith("lora")} == wanted
    assert [name for name in ours if ours[name] != other[name]] == ["export"]
    half = stage_configs(tmp_path, "lora={rank: 4, alpha: 2, scale: 0.5}")
    assert [name for name in ours if ours[name] != half[name]] == ["export"]
    assert half["export"] == {**ours["export"], "lora.scale": 0.5}
    assert to_dict(load_recipe(RECIPES / "scratch_avatar.yaml"))["lora"] is None


def test_the_scale_is_that_of_the_trained_student(tmp_path):
    """What `init` left is folded whole, also where `distill` goes on from it; the student of `distill` at its scale."""
    student = stir(adapt(a_backbone(), LoraRoles(rank=3, alpha=1.5), 0, "student"))
    tensors = {name: p.detach() for name, p in trained(student).items()}
    save_tensors(tmp_path / "model.safetensors", tensors)

    def weight(stage: str, scale: float) -> Tensor:
        recipe = SimpleNamespace(lora=LoraRoles(rank=3, alpha=1.5, scale=scale), init_checkpoint="base")
        folder, engine = SimpleNamespace(stage_dir=lambda _: tmp_path), SimpleNamespace(device="cpu")
        parts: Any = SimpleNamespace(recipe=recipe, folder=folder, engine=engine, network=lambda *_: a_backbone())
        return Artifacts.network(parts, stage).get_parameter(f"{NAME}.weight").detach()

    plain = a_backbone().get_parameter(f"{NAME}.weight")
    change = 0.5 * tensors[f"{NAME}.lora_B.weight"] @ tensors[f"{NAME}.lora_A.weight"]
    for stage, scale, size in (("init", 0.5, 1.0), ("distill", 1.0, 1.0), ("distill", 0.5, 0.5), ("distill", 0.0, 0.0)):
        torch.testing.assert_close(weight(stage, scale), plain + size * change)


# Plan -------------------------------------------------------------------------------------------------------------------


def one_gpu(*overrides: str):
    """The recipe at its real width, with one chunk and one exit, which change no weight."""
    short = ("teacher.path=anywhere", "data.world.num_frames=9", "distill.method.exit_step=last")
    return load_recipe(RECIPES / "omniavatar_one_gpu.yaml", [*short, *overrides])


def by_hand(config: LoraRoles) -> int:
    """Trained elements of OmniAvatar-1.3B: rank (in + out) of ten matrices a block; 33-channel patches, audio."""
    width, ffn, layers, hidden = 1536, 8960, 30, 32
    pack = 4 * 10752 * hidden + hidden + 2 * hidden
    full = 33 * 4 * width + width + pack + 14 * (hidden * width + width)
    return config.rank * layers * (8 * 2 * width + 2 * (width + ffn)) + full


@pytest.mark.slow
def test_the_plan_of_the_real_size_knows_adapters_and_one_backbone():
    recipe = one_gpu()
    assert recipe.lora is not None
    assert recipe.lora.alpha / recipe.lora.rank == 0.5
    plan = make_plan(replace(job_of(recipe), stages={"distill": recipe.distill}, trajectories=None))
    count = plan.parameters["teacher"]
    assert set(plan.parameters.values()) == {1_421_187_232}
    assert plan.lora["student"] == plan.lora["fake_score"] == by_hand(recipe.lora)
    update = replace(
        plan.updates[0], points=dict.fromkeys([(), ("checkpointing",), ("checkpointing", "lora")], ((0, 0),))
    )
    plan = replace(plan, updates=(update,))
    parts = rank_bytes(plan, update, "ddp", 1)
    assert parts["backbone weights"] == 2 * count
    assert parts["teacher weights"] == 0
    assert parts["student weights"] == parts["fake_score weights"] == 4 * by_hand(recipe.lora)
    full = replace(plan, adapted=frozenset(), backbone=frozenset())
    learned, whole = (
        found["gradients"] + found["student moments"] + found["fake_score moments"]
        for found in (parts, rank_bytes(full, update, "ddp", 1))
    )
    assert whole == (4 + 8 + 8) * count
    assert 0.05 * whole < learned <= 0.1 * whole
    text = report.as_text(plan, "name", [1], ["ddp", "fsdp2"], 80.0)
    assert "backbone     one set of weights for teacher, student, fake_score" in text
    assert f"a LoRA of {by_hand(recipe.lora):,}" in text
    assert "FSDP2   shards weights, which LoRA roles share: use ddp, zero1 or zero2" in text
    assert suggest_fix(plan, "zero3", 8, 1e15) is None


def test_lora_is_named_as_the_switch_that_makes_it_fit():
    recipe = one_gpu("lora=null", "teacher.network.num_layers=3")
    plan = make_plan(replace(job_of(recipe), stages={"distill": recipe.distill}, trajectories=None))
    assert plan.backbone == {"student", "fake_score", "teacher"}
    update = replace(
        plan.updates[0], points=dict.fromkeys([(), ("checkpointing",), ("checkpointing", "lora")], ((0, 0),))
    )
    plan = replace(plan, updates=(update,))
    full, switched = (peak_bytes(plan, "ddp", 1, on) for on in ((), ("checkpointing", "lora")))
    assert switched < 0.3 * full
    assert suggest_fix(plan, "ddp", 1, 0.5 * full) == ("checkpointing", "lora")
    assert "fits with checkpointing + lora" in report.as_text(plan, "name", [1], ["ddp"], 0.5 * full / 2**30)

"""What a stage trains against is made in shards and whole nowhere, or streamed where the recipe says so."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from distill.compose import RECIPES
from distill.methods.forcing import Forced
from distill.methods.rollout import rollout
from distill.pipeline import artifacts as module
from distill.pipeline import pretrained
from distill.pipeline.artifacts import Artifacts
from distill.planning.job import batch_on, job_of
from distill.recipe import load_recipe, spec_of
from distill.training.engines.offload import is_streamed
from teachers.errors import UserError
from tests.support.sizes.fake_ranks import RankOfMany, fake_ranks


def some_artifacts(world: int, monkeypatch, name: str = "livetalk", **engine: Any) -> Artifacts:
    """Of a recipe of tiny given networks, whose files are not read."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["size=tiny"])
    for place in (module, pretrained):
        monkeypatch.setattr(place, "fill_given", lambda *_, **__: None)
    rank: Any = RankOfMany(world, replace(recipe.engine, **engine))
    rank.kind = rank.config.kind
    folder: Any = SimpleNamespace(stage_dir=lambda stage: Path("nowhere") / stage)
    nothing: Any = None
    return Artifacts(recipe, rank, spec_of(recipe), nothing, folder, nothing)


def test_a_sharded_teacher_is_whole_nowhere(monkeypatch):
    """Not on this rank before either: the engine's copy of a whole network is not asked for."""
    with fake_ranks(8):
        artifacts = some_artifacts(8, monkeypatch, kind="fsdp2")
        net = artifacts.frozen("teacher")
        assert "teacher" not in vars(artifacts)
        matrices = [p for p in net.parameters() if p.ndim == 2]
        assert all(isinstance(p, DTensor) for p in matrices)
        whole = sum(p.numel() for p in net.parameters())
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in net.parameters())
        assert held < whole / 4  # an eighth, what does not divide, and the tables
        assert not any(p.requires_grad for p in net.parameters())


def test_a_whole_teacher_is_streamed_where_it_is_offloaded(monkeypatch):
    artifacts = some_artifacts(1, monkeypatch, kind="ddp", offload=("teacher",))
    artifacts.engine.freeze = lambda net: net
    assert is_streamed(artifacts.frozen("teacher"))
    plain = some_artifacts(1, monkeypatch, kind="ddp")
    assert not is_streamed(plain.teacher)


def test_an_adapted_ar_teacher_computes_without_autocast(monkeypatch):
    """As a stage that solves trajectories calls it, over a backbone in bf16."""
    monkeypatch.setattr(module.lora, "load", lambda *_: None)
    monkeypatch.setattr(module, "load_tensors", lambda _: {})
    artifacts = some_artifacts(1, monkeypatch, "omniavatar_one_gpu", kind="ddp", precision="bf16")
    artifacts.engine.split = lambda net: net
    job = job_of(artifacts.recipe)
    batch = batch_on(job, "clips", "cpu")
    assert batch.x0 is not None
    n = artifacts.spec.chunk_frames
    with torch.no_grad():
        x0 = rollout(artifacts.ar_teacher, batch.conditions, lambda *_: batch.x0[:, :, :n])
    assert x0.shape == batch.x0.shape
    assert artifacts.ar_teacher.net.get_submodule("blocks.0.attn1.to_q").lora_A.default.weight.dtype == torch.bfloat16


def test_an_ar_teacher_that_solves_trajectories_is_whole_on_each_rank(monkeypatch):
    """Where the engine shards too: ranks solve other clips, and not as many. It computes without autocast."""
    monkeypatch.setattr(module, "load_strict", lambda *_: None)
    monkeypatch.setattr(module, "load_tensors", lambda _: {})
    with fake_ranks(8):
        artifacts = some_artifacts(8, monkeypatch, kind="fsdp2", precision="bf16")
        artifacts.engine.split = lambda net: net
        net = artifacts.ar_teacher
        assert not any(isinstance(p, DTensor) or p.requires_grad for p in net.parameters())
        batch = batch_on(job_of(artifacts.recipe), "clips", "cpu")
        assert batch.x0 is not None
        sigma = torch.full((batch.x0.shape[0],), 0.5)
        with torch.no_grad():
            x0 = Forced(net, batch.x0).denoise(batch.x0, sigma, batch.conditions)
    assert x0.shape == batch.x0.shape


def test_lora_roles_keep_the_teacher(monkeypatch):
    artifacts = some_artifacts(1, monkeypatch, "omniavatar_one_gpu", kind="ddp", offload=("teacher",))
    with pytest.raises(UserError, match=r"engine\.offload: LoRA roles are made of the teacher's own weights"):
        _ = artifacts.teacher
    assert torch.device("cpu") == artifacts.engine.device

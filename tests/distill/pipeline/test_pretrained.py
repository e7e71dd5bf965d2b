"""Weights that were trained here are weights to give: their folder says what names and shapes do not."""

from dataclasses import replace

import pytest
import torch

from distill.compose import RECIPES
from distill.pipeline.pretrained import load_given, write_config
from distill.recipe import load_recipe, spec_of
from teachers.errors import UserError
from teachers.files import save_tensors


def test_a_trained_network_of_any_shape_is_read_again(tmp_path):
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", ["preset=smoke"])
    spec, network = spec_of(recipe), recipe.teacher.network
    assert network.head_dim == 24, "not Wan's, whose weights need no config.json"
    trained = network.new(spec.dims).state_dict()
    save_tensors(tmp_path / "model.safetensors", trained)
    given = replace(recipe.teacher, path=tmp_path, method=None, train=None)
    with pytest.raises(UserError, match=r"put a config\.json with num_heads beside the weights"):
        load_given(given, spec, torch.device("cpu"))
    write_config(tmp_path, network, spec)
    found = load_given(given, spec, torch.device("cpu")).state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)

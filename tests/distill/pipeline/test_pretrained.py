"""Weights that were trained here are weights to give: their folder says what names and shapes do not."""

from dataclasses import replace

import pytest
import torch

from distill.compose import RECIPES
from distill.pipeline.pretrained import load_given, write_config
from distill.recipe import load_recipe, spec_of
from teachers.errors import UserError
from teachers.files import save_tensors

GIVEN = ("livetalk", "s2v", "longcat", "infinitetalk", "flashhead", "echomimic", "stableavatar", "fantasytalking")


@pytest.mark.parametrize("name", ["scratch_avatar", *GIVEN])
def test_a_trained_network_of_any_kind_and_shape_is_read_again(tmp_path, name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["size=tiny" if name in GIVEN else "preset=smoke"])
    spec, network = spec_of(recipe), recipe.teacher.network
    trained = network.new(spec.dims).state_dict()
    save_tensors(tmp_path / "model.safetensors", trained)
    given = replace(recipe.teacher, path=tmp_path, wan=None, method=None, train=None)
    with pytest.raises(UserError):
        load_given(given, spec, torch.device("cpu"))
    write_config(tmp_path, network, spec)
    found = load_given(given, spec, torch.device("cpu")).state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[key].float(), trained[key].to(found[key].dtype).float()) for key in trained)

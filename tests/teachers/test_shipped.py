"""Shipped weights: found by `shipped:`, checked by sha256, named alike on every machine, small, and what a recipe takes."""

import json
import shutil

import pytest
import torch

from distill.pipeline.pretrained import load_given
from distill.recipe import load_recipe, spec_of
from eval.embedded.extractors import Probes
from teachers import shipped
from teachers.codecs.convolutional import ConvCodecConfig
from teachers.config import convert, to_plain
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from teachers.shipped.publish import publish

MIB = 2**20
WORLD = shipped.HERE / "world"


def test_a_path_is_found_and_named_alike_everywhere():
    found = shipped.resolve("shipped:world/codec.safetensors")
    assert found.is_file()
    assert shipped.name_of(found) == "shipped:world/codec.safetensors"
    config = convert(ConvCodecConfig, {"path": "shipped:world"})
    assert to_plain(config)["path"] == "shipped:world"
    assert str(shipped.resolve("a/b")) == shipped.name_of(shipped.resolve("a/b")) == "a/b"


@pytest.mark.parametrize("name", ["shipped:", "shipped:moon", "shipped:world/../../files.py", "shipped:/etc"])
def test_what_is_not_shipped_is_named(name):
    with pytest.raises(UserError, match=r"no shipped weights: .*there are shipped:world"):
        shipped.resolve(name)


def test_every_file_is_listed_and_a_flipped_bit_is_named(tmp_path):
    files = {file.relative_to(WORLD).as_posix() for file in WORLD.rglob("*") if file.is_file()}
    assert files - set(json.loads((WORLD / shipped.SUMS).read_text())) == {shipped.SUMS, "README.md"}
    assert sum(file.stat().st_size for file in WORLD.rglob("*") if file.is_file()) < 25 * MIB
    copy = tmp_path / "world"
    shutil.copytree(WORLD, copy)
    shipped.verify(copy)
    shipped.verify.cache_clear()
    content = bytearray((copy / "codec.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "codec.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged installation: .*codec\.safetensors is not what was shipped"):
        shipped.verify(copy)


def test_a_run_is_published_in_half_precision_and_without_what_it_has_not(tmp_path):
    data = tmp_path / "run" / "stages" / "data"
    (data / "text").mkdir(parents=True)
    save_tensors(data / "codec.safetensors", {"weight": torch.tensor([1.0, 1 / 3])})
    (data / "text" / "config.json").write_text("{}")
    publish(tmp_path / "run", tmp_path / "out")
    shipped.verify(tmp_path / "out")
    assert torch.equal(
        load_tensors(tmp_path / "out" / "codec.safetensors")["weight"], torch.tensor([1.0, 1 / 3]).half()
    )
    assert set(json.loads((tmp_path / "out" / shipped.SUMS).read_text())) == {"codec.safetensors", "text/config.json"}
    assert not (tmp_path / "out" / "teacher").exists()


def test_a_student_of_shipped_parts_holds_them_itself():
    recipe = load_recipe("world_teacher", ["data=faces"])
    spec = spec_of(recipe)
    assert recipe.data.codec.path == WORLD
    assert spec.codec.path is None
    assert spec.text.path is None


def test_the_default_recipe_starts_from_the_shipped_teacher_and_extractors():
    recipe = load_recipe("dmd_avatar", [])
    assert not recipe.teacher.is_trained
    teacher = load_given(recipe.teacher, spec_of(recipe), torch.device("cpu"))
    assert all(bool(value.isfinite().all()) for value in teacher.state_dict().values())
    assert shipped.name_of(recipe.teacher.path) == "shipped:world/teacher"
    probes = Probes.load(recipe.eval.probes)
    assert probes.sha256 == json.loads((WORLD / "probes.json").read_text())["sha256"]


def test_a_mistyped_name_in_a_recipe_says_what_there_is():
    with pytest.raises(UserError, match=r"no shipped weights: shipped:wurld; there are shipped:world"):
        load_recipe("dmd_avatar", ["teacher.path=shipped:wurld"])

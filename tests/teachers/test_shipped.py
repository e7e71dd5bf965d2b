"""Shipped weights: found by `shipped:`, checked by sha256, named alike on every machine, small, and what the recipes take."""

import shutil

import pytest

from distill.recipe import load_recipe, spec_of
from teachers import shipped
from teachers.codecs.convolutional import ConvCodecConfig
from teachers.config import convert, to_plain
from teachers.errors import UserError

MIB = 2**20


def test_a_path_is_found_and_named_alike_everywhere():
    found = shipped.resolve("shipped:world/teacher.safetensors")
    assert found.is_file()
    assert shipped.name_of(found) == "shipped:world/teacher.safetensors"
    config = convert(ConvCodecConfig, {"path": "shipped:world"})
    assert to_plain(config)["path"] == "shipped:world"
    assert str(shipped.resolve("a/b")) == shipped.name_of(shipped.resolve("a/b")) == "a/b"


@pytest.mark.parametrize("name", ["shipped:", "shipped:moon", "shipped:world/../../files.py", "shipped:/etc"])
def test_what_is_not_shipped_is_named(name):
    with pytest.raises(UserError, match=r"no shipped weights: .*there are shipped:world"):
        shipped.resolve(name)


def test_every_file_is_listed_and_a_flipped_bit_is_named(tmp_path):
    world = shipped.HERE / "world"
    files = {file.relative_to(world).as_posix() for file in world.rglob("*") if file.is_file()}
    listed = set(shipped.json.loads((world / shipped.SUMS).read_text()))
    assert files - listed == {shipped.SUMS, "README.md"}
    assert sum(file.stat().st_size for file in world.rglob("*") if file.is_file()) < 25 * MIB
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    shipped.verify(copy)
    shipped.verify.cache_clear()
    content = bytearray((copy / "codec.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "codec.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged installation: .*codec\.safetensors is not what was shipped"):
        shipped.verify(copy)


def test_the_default_recipe_is_given_everything():
    recipe = load_recipe("dmd_avatar")
    assert not recipe.teacher.is_trained
    spec = spec_of(recipe)
    assert spec.codec.path is None and spec.text.path is None, "a student's folder holds these itself"
    assert recipe.eval.probes == shipped.resolve("shipped:world")

"""The tables of the published layouts: they are the published checkpoints', the library's and the network's own."""

import hashlib
import re
from dataclasses import fields, replace
from math import prod

import pytest
import torch
import yaml
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from distill.compose import RECIPES
from teachers.checkpoints import layouts
from teachers.checkpoints.layouts import Architecture
from teachers.config import convert
from teachers.errors import UserError
from teachers.networks.wan import AvatarTransformer, NetworkConfig, build_network

WAN_1B = Architecture(
    width=1536, in_channels=16, out_channels=16, patch=(1, 2, 2), num_layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256
)  # fmt: skip
WAN_14B = replace(WAN_1B, width=5120, num_layers=40, ffn_dim=13824)
IMAGE_14B = replace(WAN_14B, in_channels=36, image_dim=1280)
AUDIO = {"in_channels": 33, "audio_in": 4 * 10752, "packed": 32}
AVATAR_1B = replace(WAN_1B, **AUDIO, num_audio=14)
AVATAR_14B = replace(WAN_14B, **AUDIO, num_audio=19)
STEERED_1B = replace(AVATAR_1B, pose_in=4 * 6)
PARAMETERS = {
    "wan 1.3B": (WAN_1B, 825, 1_418_996_800),
    "wan 14B": (WAN_14B, 1095, 14_288_491_584),
    "wan image 14B": (IMAGE_14B, 1303, 16_394_878_784),
    "avatar 1.3B": (AVATAR_1B, 857, 1_421_187_232),
    "avatar 14B": (AVATAR_14B, 1137, 14_293_426_336),
    "steered 1.3B": (STEERED_1B, 863, 1_421_187_232 + 24 * 32 + 3 * 32 + 33 * 1536),
}
SIZES = [pytest.param(*row, id=name) for name, row in PARAMETERS.items()]


def fingerprint(shapes) -> str:
    """MD5 of all names with and without their shapes, sorted: how DiffSynth-Studio and OmniAvatar recognise published files."""
    names = sorted(part for name, shape in shapes.items() for part in (f"{name}:{'_'.join(map(str, shape))}", name))
    return hashlib.md5(",".join(names).encode()).hexdigest()


@pytest.mark.parametrize(
    ("architecture", "layout", "published"),
    [
        pytest.param(WAN_1B, "wan", "9269f8db9040a9d860eaca435be61814", id="Wan2.1-T2V-1.3B"),
        pytest.param(WAN_14B, "wan", "aafcfd9672c3a2456dc46e1cb6e52c70", id="Wan2.1-T2V-14B"),
        pytest.param(IMAGE_14B, "wan", "6bfcfb3b342cb286ce886889d519a77e", id="Wan2.1-I2V-14B"),
        pytest.param(WAN_14B, "diffusers", "cb104773c6c2cb6df4f9529ad5c60d0b", id="Wan2.1-T2V-14B-Diffusers"),
        pytest.param(AVATAR_1B, "wan", "2bf9513c", id="OmniAvatar-1.3B merged, LiveTalk"),
        pytest.param(AVATAR_14B, "wan", "883a90b1", id="OmniAvatar-14B merged"),
    ],
)
def test_names_and_shapes_are_those_of_the_published_files(architecture, layout, published):
    assert fingerprint(layouts.tensors(architecture, layout)).startswith(published)


WANS = [layout for layout in layouts.LAYOUTS if layout not in layouts.WHOLE]


@pytest.mark.parametrize(("architecture", "num_tensors", "num_parameters"), SIZES)
def test_the_number_of_parameters_is_the_published_one(architecture, num_tensors, num_parameters):
    for layout in WANS:
        shapes = layouts.tensors(architecture, layout)
        assert len(shapes) == num_tensors
        assert sum(prod(shape) for shape in shapes.values()) == num_parameters


def own(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    assert all(parameter.is_meta for parameter in network.parameters())
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["wan 1.3B", "wan 14B", "wan image 14B", "avatar 1.3B", "avatar 14B", "steered 1.3B"])
def test_ours_are_the_names_and_shapes_of_the_network_at_full_size(name):
    architecture, _, num_parameters = PARAMETERS[name]
    with init_empty_weights():
        network = AvatarTransformer.from_config(layouts.make_config(architecture, "ours"))
    assert own(network) == layouts.tensors(architecture, "ours")
    assert sum(p.numel() for p in network.parameters()) == num_parameters
    assert network.audio_at == (tuple(range(2, architecture.num_layers // 2 + 1)) if architecture.audio_in else ())


@pytest.mark.parametrize(
    ("file", "name", "dims"),
    [
        ("omniavatar_1_3b", "avatar 1.3B", {"audio_dim": 10752}),
        ("omniavatar_14b", "avatar 14B", {"audio_dim": 10752}),
        ("wan_t2v_1_3b", "wan 1.3B", {"audio_dim": 0}),
        ("wan_t2v_14b", "wan 14B", {"audio_dim": 0}),
    ],
)
def test_the_sizes_in_the_recipes_are_the_published_networks(file, name, dims):
    architecture, _, num_parameters = PARAMETERS[name]
    group = yaml.safe_load((RECIPES / "teacher" / f"{file}.yaml").read_text(encoding="utf-8"))
    assert group["network"].keys() == {f.name for f in fields(NetworkConfig)} - {"guidance"}  # of students alone
    config = convert(NetworkConfig, group["network"])
    with init_empty_weights():
        network = build_network(config, latent_channels=16, stride=4, text_dim=4096, **dims)
    assert own(network) == layouts.tensors(architecture, "ours")
    assert sum(p.numel() for p in network.parameters()) == num_parameters
    values = layouts.make_config(architecture, "ours")
    assert values is not None
    assert config == convert(NetworkConfig, {key: values[key] for key in group["network"]})


@pytest.mark.parametrize("name", ["wan 1.3B", "wan 14B", "wan image 14B"])
def test_diffusers_are_the_names_and_shapes_of_its_network_at_full_size(name):
    architecture = PARAMETERS[name][0]
    with init_empty_weights():
        network = WanTransformer3DModel.from_config(layouts.make_config(architecture, "diffusers"))
    assert own(network) == layouts.tensors(architecture, "diffusers")


@pytest.mark.parametrize("architecture", [WAN_1B, IMAGE_14B], ids=["text", "image"])
def test_diffusers_own_converter_renames_as_the_table_does(architecture):
    names = list(layouts.tensors(architecture, "wan"))
    theirs = convert_wan_transformer_to_diffusers({name: name for name in names})
    assert {wan: ours for ours, wan in theirs.items()} == {n: layouts.rename(n, layouts.TO_OURS) for n in names}
    assert [layouts.rename(layouts.rename(n, layouts.TO_OURS), layouts.TO_WAN) for n in names] == names


@pytest.mark.parametrize(("architecture", "num_tensors", "num_parameters"), SIZES)
def test_shapes_tell_the_architecture(architecture, num_tensors, num_parameters):
    assert layouts.infer(layouts.tensors(architecture), "here") == architecture
    for layout in ("ours", "wan", "diffusers"):
        config = layouts.make_config(architecture, layout)
        assert config is not None
        assert layouts.with_config(architecture, config, "here") == architecture


def test_what_no_shape_determines_is_read_from_the_config():
    values = replace(
        AVATAR_1B, num_audio=2, head_dim=64, stride=2, audio_blocks=(0, 7), prediction="reference", eps=1e-5, max_positions=99
    )  # fmt: skip
    config = layouts.make_config(values, "ours")
    assert layouts.with_config(replace(AVATAR_1B, num_audio=2), config, "here") == values
    assert layouts.with_config(AVATAR_1B, {"audio_blocks": [*range(2, 16)]}, "here") == AVATAR_1B
    assert layouts.with_config(WAN_1B, {"dim": 1536, "num_heads": 24}, "here").head_dim == 64
    assert layouts.with_config(WAN_1B, {}, "here").head_dim == 128


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        (replace(WAN_1B, width=100), {}, "width 100 is not a number of heads of 128; put a config.json"),
        (WAN_1B, {"num_heads": 12, "head_dim": 64}, "width 1536 is not a number of heads of 64"),
        (WAN_1B, {"num_layers": 40}, r"config\.json states 40 layers, the weights have 30"),
        (replace(AVATAR_1B, num_audio=13), {}, "13 audio_cond_projs for 30 layers, where 14 are needed"),
        (replace(AVATAR_1B, audio_in=43007), {}, "43007 audio channels are not 4 frames"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(architecture, config, words):
    with pytest.raises(UserError, match=words):
        layouts.with_config(architecture, config, "here")


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("model.blocks.0.norm3.weight", "blocks.0.norm3.weight"),
        ("model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.ffn.0.bias", "blocks.3.ffn.0.bias"),
        ("module.model.blocks.0._checkpoint_wrapped_module.modulation", "blocks.0.modulation"),
        ("_orig_mod.head.modulation", "head.modulation"),
        ("blocks.1.self_attn.q.base_layer.weight", "blocks.1.self_attn.q.weight"),
        ("audio_proj.proj.weight", "audio_proj.proj.weight"),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name, clean):
    assert layouts.bare(name) == clean


def test_another_model_is_distinguished_from_wan():
    assert layouts.naming(layouts.tensors(WAN_1B, "wan"), "here") == "wan"
    assert layouts.naming(layouts.tensors(AVATAR_1B, "ours"), "here") == "ours"
    for names in (["transformer_blocks.0.attn1.to_q.weight"], [], ["double_blocks.0.img_attn.qkv.weight", "a"]):
        with pytest.raises(UserError, match=r"layout of another model: here has .*give weights of Wan2\.1"):
            layouts.naming(names, "here")


def test_every_fault_is_listed_under_the_names_of_the_source():
    needed = layouts.tensors(WAN_1B)
    shapes = dict(needed) | {"blocks.3.extra": (1,), "proj_out.bias": (65,)}
    del shapes["blocks.7.norm2.bias"]
    with pytest.raises(UserError) as error:
        layouts.check(shapes, needed, layouts.TO_WAN, "here")
    assert str(error.value).startswith(
        "weights do not fit: here: missing blocks.7.norm3.bias; unexpected blocks.3.extra; "
        "head.head.bias is [65] where [64] is needed; "
    )
    many = {name: shape for name, shape in needed.items() if not name.startswith("blocks.29.")}
    with pytest.raises(UserError, match=re.escape("missing blocks.29.modulation, ") + r".* and 21 more;"):
        layouts.check(many, needed, layouts.TO_WAN, "here")
    with pytest.raises(UserError, match=r"missing patch_embedding\.weight"):
        layouts.infer({k: v for k, v in needed.items() if not k.startswith("patch")}, "here")


@pytest.mark.parametrize(
    ("architecture", "layout", "words"),
    [
        (AVATAR_1B, "diffusers", "layout diffusers cannot represent audio_in 43008"),
        (replace(IMAGE_14B, in_channels=33), "ours", "layout ours cannot represent 33 input channels for 16"),
        (replace(WAN_14B, in_channels=36), "ours", "layout ours cannot represent 36 input channels for 16"),
        (replace(IMAGE_14B, stride=2, in_channels=34), "diffusers", "cannot represent stride 2"),
        (replace(WAN_1B, prediction="reference"), "wan", "cannot represent prediction reference"),
        (replace(WAN_1B, head_dim=64), "self-forcing", "cannot represent head_dim 64"),
        (replace(AVATAR_1B, audio_blocks=(1,)), "wan", r"cannot represent audio_blocks \(1,\)"),
        (replace(AVATAR_1B, stride=2), "self-forcing", "cannot represent stride 2"),
        (STEERED_1B, "wan", "cannot represent pose_in 24"),
        (WAN_1B, "longcat", "layout longcat cannot represent a network of kind wan"),
        (replace(WAN_1B, kind="longcat"), "wan", "cannot represent a network of kind longcat"),
        (replace(WAN_1B, patch=(2, 2, 2)), "ours", r"cannot represent patches of \(2, 2, 2\)"),
    ],
)
def test_nothing_is_dropped_for_want_of_a_place(architecture, layout, words):
    with pytest.raises(UserError, match=words):
        layouts.check_representable(architecture, layout, "here")


def test_what_has_a_place_is_let_through():
    for layout in WANS:
        layouts.check_representable(replace(WAN_1B, stride=2), layout, "here")
        layouts.check_representable(IMAGE_14B, layout, "here")
    layouts.check_representable(replace(IMAGE_14B, stride=2, in_channels=34), "ours", "here")
    layouts.check_representable(AVATAR_14B, "wan", "here")


def test_no_two_kinds_give_one_of_our_names_to_tensors_of_other_published_names():
    """Renaming knows no kind: a name of ours that two kinds shared would come back under the later one's."""
    for table in ("TO_WAN", "TO_OURS"):
        pairs = {(ours, wan) if table == "TO_WAN" else (wan, ours) for wan, ours, _ in layouts.ROWS}
        assert len(pairs) == len(getattr(layouts, table)), table

"""Wan's image encoder: CLIP's tokens equal the equations from the published names, the channels beside the noise, the face."""

import math

import pytest
import torch

from teachers.codecs.linear import CodecConfig
from teachers.encoders import image
from teachers.encoders.image import FILE, WanImageConfig, face_mask, from_original
from teachers.errors import UserError
from tests.support.tiny import randn

WIDTH, HEADS, LAYERS, PATCH, SIDE = 160, 2, 3, 4, 3
"""Heads of the published width 80; one layer more than is used."""


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """The vision half under the names of Wan's file, and a tensor of the text half, which is ignored."""
    shapes = {
        "cls_embedding": (1, 1, WIDTH),
        "patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "pos_embedding": (1, SIDE * SIDE + 1, WIDTH),
        "pre_norm.weight": (WIDTH,),
        "pre_norm.bias": (WIDTH,),
        "post_norm.weight": (WIDTH,),
        "head": (WIDTH, 8),
    }
    for i in range(LAYERS):
        sizes = {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.to_qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        sizes |= {"mlp.0": (2 * WIDTH, WIDTH), "mlp.2": (WIDTH, 2 * WIDTH)}
        for name, shape in sizes.items():
            shapes |= {f"transformer.{i}.{name}.weight": shape, f"transformer.{i}.{name}.bias": shape[:1]}
    made = {}
    for k, (name, shape) in enumerate(shapes.items()):
        value = randn(*shape, seed=seed + k) / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else randn(*shape, seed=k)
        made[f"visual.{name}"] = value
    return made | {"textual.token_embedding.weight": randn(4, 4), "log_scale": torch.zeros(())}


def reference(w: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The equations of a pre-norm vision transformer: tokens [N, 1 + patches, D] after all layers but the last."""
    w = {name.removeprefix("visual."): value for name, value in w.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    n = len(pixels)
    cut = pixels.reshape(n, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, SIDE * SIDE, -1)
    x = torch.cat([w["cls_embedding"].expand(n, -1, -1), cut @ w["patch_embedding.weight"].flatten(1).T], dim=1)
    x = norm(x + w["pos_embedding"], "pre_norm")
    for i in range(LAYERS - 1):
        name = f"transformer.{i}"
        parts = linear(norm(x, f"{name}.norm1"), f"{name}.attn.to_qkv").unflatten(-1, (3, HEADS, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.mlp.2")
    return x


CONFIG = {"dim": WIDTH, "tokens": SIDE * SIDE + 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.save({name: value.half() for name, value in published().items()}, path / FILE)
    return path


def test_clip_s_tokens_equal_the_equations(folder):
    encoder = WanImageConfig(path=folder, **CONFIG).load()
    picture = randn(2, 3, 20, 28).clamp(-1, 1)
    small = torch.nn.functional.interpolate(picture, (SIDE * PATCH,) * 2, mode="bicubic", align_corners=False)
    mean, std = torch.tensor(image.MEAN).view(3, 1, 1), torch.tensor(image.STD).view(3, 1, 1)
    weights = {name: value.half().float() for name, value in published().items()}
    expected = reference(weights, (small * 0.5 + 0.5 - mean) / std)
    found = encoder.tokens(picture)
    assert found.shape == (2, SIDE * SIDE + 1, WIDTH)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-5


def test_the_published_size():
    """ViT-H/14 without its last layer; nothing of the text half."""
    with torch.device("meta"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        shape = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=31, num_attention_heads=16, patch_size=14
        )
        model = CLIPVisionModel(shape)
    used = sum(p.numel() for name, p in model.named_parameters() if "post_layernorm" not in name)
    layer = 4 * (1280 * 1280 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    assert used == 31 * layer + 257 * 1280 + 1280 + 3 * 14 * 14 * 1280 + 2 * 1280


def test_a_folder_of_diffusers(tmp_path):
    config = WanImageConfig(path=tmp_path, dim=16, tokens=10)
    config.write_random(tmp_path)
    encoder = config.load()
    assert encoder.tokens(randn(1, 3, 12, 12)).shape == (1, 10, 16)
    with pytest.raises(UserError, match=r"gives 10 tokens of 16, tokens=257 and dim=16"):
        WanImageConfig(path=tmp_path, dim=16).load()


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"missing models_clip.*\.pth: .*get .*Wan2\.1-I2V-14B-480P.*or image_encoder/"):
        WanImageConfig(path=tmp_path).load()
    (tmp_path / "image_encoder").mkdir()
    with pytest.raises(UserError, match=r"missing image_encoder/config\.json.*Diffusers"):
        WanImageConfig(path=tmp_path).load()
    weights = published()
    del weights["visual.transformer.1.attn.to_qkv.bias"]
    with pytest.raises(UserError, match=r"transformer\.1\.attn\.to_qkv\.bias"):
        from_original(weights, tmp_path)


class Codec:
    """Each latent frame is the mean of its pixel frames in every cell of 4 x 4."""

    config = CodecConfig(stride=2, patch=4, channels=3)

    def encode(self, video):
        lead = torch.cat([video[:, :, :1], video], dim=2).unflatten(2, (-1, 2)).mean(dim=3)
        return torch.nn.functional.avg_pool3d(lead, (1, 4, 4))


def test_the_channels_beside_the_noise():
    """[mask | latents of the image and then mid-grey]: the mask is 1 in frame 0 alone, as published 1 is known."""
    picture = randn(2, 3, 8, 12)
    found = image.beside(picture, Codec(), 3)
    assert found.shape == (2, 2 + 3, 3, 2, 3)
    assert torch.equal(found[:, :2, 0], torch.ones(2, 2, 2, 3))
    assert not found[:, :2, 1:].any()
    assert torch.allclose(found[:, 2:, 0], torch.nn.functional.avg_pool2d(picture, 4))
    assert not found[:, 2:, 1:].any()
    shapes = WanImageConfig(face="box", tokens=5, dim=7).sizes(2, 3, 3, 2, 3)
    assert shapes == {"image": (5, 7), "beside": (5, 3, 2, 3), "regions": (1, 2, 3)}


def test_the_face_is_a_box_of_whole_tokens(monkeypatch):
    box = type("Box", (), {"x": 0.3, "y": 0.2, "width": 0.4, "height": 0.5})
    monkeypatch.setattr(image.face, "find_faces", lambda pixels: [box])
    mask = face_mask(randn(3, 64, 64), 8, 8, 2)
    expected = torch.zeros(8, 8)
    expected[0:4, 2:4] = 1.0  # rows 0.2 .. 0.7 of 4 cells: 0 .. 2; columns 0.3 .. 0.7: 1 .. 2
    assert torch.equal(mask, expected)
    monkeypatch.setattr(image.face, "find_faces", lambda pixels: [])
    assert torch.equal(face_mask(randn(3, 64, 64), 8, 8, 2), torch.ones(8, 8))

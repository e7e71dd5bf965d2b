"""DINOv2: the layout of facebook/dinov2-base, the network against its equations, preprocessing against transformers' own."""

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from eval.networks import dino
from eval.networks.dino import CONFIG, MEAN, SIDE, STD, Dino, preprocess
from eval.networks.weights import REGISTRY
from teachers.errors import UserError
from tests.eval.networks.test_weights import publish
from tests.support.tiny import randomise, rng

FILE = REGISTRY["dinov2"].file
SMALL = CONFIG | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
PUBLISHED = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


def a_model(seed: int = 0) -> Dinov2Model:
    return randomise(Dinov2Model(Dinov2Config(**SMALL)), seed).eval().requires_grad_(False)


def published(model: Dinov2Model) -> dict[str, Tensor]:
    """The tensors under the names of the published file: encoder.layer.0.attention.attention.query.weight, ..."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[re.sub(r"(?<=attention\.)[qkvo]_proj", lambda found: PUBLISHED[found[0]], name)] = tensor.contiguous()
    return state


def put(folder, monkeypatch, state: dict[str, Tensor]) -> None:
    monkeypatch.setattr(dino, "CONFIG", SMALL)
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})
    publish(monkeypatch, "dinov2", path)


def some_frames(num: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(num, 3, 5, 7, generator=rng(num, height))
    noise = torch.rand(num, 3, height, width, generator=rng(num, width))
    return (255 * (0.7 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * noise)).byte()


# ---- the layout


def test_the_published_size():
    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(**CONFIG))
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_580_480
    config = model.config
    assert (config.num_attention_heads, config.layer_norm_eps, config.hidden_act) == (
        12,
        1e-6,
        "gelu",
    )  # no shape tells
    names = published(model)
    assert len(names) == 223
    assert names["embeddings.position_embeddings"].shape == (1, 1 + 37 * 37, 768)
    assert names["encoder.layer.11.attention.attention.query.weight"].shape == (768, 768)
    assert names["encoder.layer.11.attention.output.dense.bias"].shape == (768,)


# ---- the network


def reference(state: dict[str, Tensor], x: Tensor, heads: int = 3, layers: int = 2) -> Tensor:
    """ViT with layer scale (2010.11929, 2103.17239, 2304.07193): the class token of the last, normalised layer."""
    state = {name: tensor.double() for name, tensor in state.items()}
    width = state["layernorm.weight"].shape[0]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = x.double().unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    weight = state["embeddings.patch_embeddings.projection.weight"].flatten(1)
    tokens = patches @ weight.T + state["embeddings.patch_embeddings.projection.bias"]
    places = state["embeddings.position_embeddings"]
    grid = places[:, 1:].reshape(1, 37, 37, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", align_corners=False).flatten(2).mT
    first = (state["embeddings.cls_token"] + places[:, :1]).expand(len(x), -1, -1)
    h = torch.cat((first, tokens + grid), dim=1)
    for layer in range(layers):
        here = f"encoder.layer.{layer}"
        y = norm(f"{here}.norm1", h)
        q, k, v = (
            linear(f"{here}.attention.attention.{name}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = (q @ k.mT / math.sqrt(width // heads)).softmax(-1) @ v
        y = linear(f"{here}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        h = h + y * state[f"{here}.layer_scale1.lambda1"]
        y = linear(f"{here}.mlp.fc1", norm(f"{here}.norm2", h))
        y = linear(f"{here}.mlp.fc2", 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
        h = h + y * state[f"{here}.layer_scale2.lambda1"]
    return norm("layernorm", h)[:, 0]


def test_the_published_file_gives_the_features_of_the_equations(tmp_path, monkeypatch, capsys):
    state = published(a_model())
    put(tmp_path, monkeypatch, state)
    frames = some_frames(2, 90, 70)
    network = Dino.load(tmp_path)
    got, want = network.features(frames), reference(state, preprocess(frames))
    assert got.shape == (2, 24)
    assert (want[0] - want[1]).abs().max() > 1e-2
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert not network.network.training
    assert not any(parameter.requires_grad for parameter in network.network.parameters())
    assert capsys.readouterr() == ("", "")


def test_batch_size_changes_nothing():
    network, frames = Dino(a_model()), some_frames(3, 64, 64)
    together = network.features(frames, batch_size=3)
    for batch_size in (1, 2):
        torch.testing.assert_close(network.features(frames, batch_size), together, rtol=1e-6, atol=1e-6)


# ---- the file


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("encoder.layer.1.attention.attention.key.bias"), r"layer\.1\.attention\S*k\S*\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra"),
        (lambda state: state.update({"layernorm.weight": torch.zeros(25)}), "layernorm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, monkeypatch, change, expected):
    state = published(a_model())
    change(state)
    put(tmp_path, monkeypatch, state)
    with pytest.raises(UserError, match=f"identity with DINOv2 refused: its file does not fit: .*{expected}"):
        Dino.load(tmp_path)


def test_a_missing_a_changed_and_a_damaged_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"identity with DINOv2 refused: .* is not there"):
        Dino.load(tmp_path)
    put(tmp_path, monkeypatch, published(a_model()))
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is another file"):
        Dino.load(tmp_path)
    path.write_bytes(whole[:100])
    publish(monkeypatch, "dinov2", path)
    with pytest.raises(UserError, match="its file cannot be read"):
        Dino.load(tmp_path)


# ---- preprocessing


@pytest.mark.parametrize(("height", "width"), [(90, 70), (300, 517), (256, 256), (31, 224)])
def test_preprocessing_equals_the_published_processor(height, width):
    """preprocessor_config.json of facebook/dinov2-base, run by transformers."""
    frames = some_frames(2, height, width)
    theirs = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=list(MEAN),
        image_std=list(STD),
        rescale_factor=1 / 255,
    )
    images = [frame.permute(1, 2, 0).numpy() for frame in frames]
    want = np.stack(theirs(images, input_data_format="channels_last")["pixel_values"])
    got = preprocess(frames)
    assert got.shape == (2, 3, SIDE, SIDE)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-6)


def test_colour_order_and_scale():
    frame = torch.tensor([255, 0, 128], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 20, 20)
    got = preprocess(frame)[0, :, 100, 100]
    want = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(got, want)


def test_a_large_frame_is_antialiased():
    """Stripes of one row at 4 x the size: their mean is left, with PIL's bicubic, away from the borders."""
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(512)[None, None, :, None].expand(1, 3, 1024, 1024)
    got = preprocess(stripes)[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert (got - 0.5).abs().max() < 0.01


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 4, 8, 8).byte()]
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_frames_are_refused(frames):
    with pytest.raises(UserError, match="DINOv2 sees uint8 frames"):
        preprocess(frames)

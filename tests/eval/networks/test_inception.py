"""FID's Inception: names, shapes, network and preprocessing against a second writing of the published facts."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.networks.inception import DIM, Inception, preprocess, resize_tf1
from eval.networks.weights import REGISTRY
from teachers.errors import UserError
from tests.eval.networks.test_weights import publish
from tests.support.tiny import rng

NETWORK_FILE = REGISTRY["inception"].file


@functools.cache
def a_network() -> Inception:
    """Random weights that keep the size of what passes through; every statistic of every norm is its own."""
    network, generator = Inception(), rng(3)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif key.endswith(("running_var", "bn.weight")):
            value.copy_(1 + 0.2 * noise.clamp(-2, 2))
        else:
            value.copy_(0.3 * noise)
    return network


def some_frames(num: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Coarse colours with noise on them, so that features differ between frames."""
    coarse = torch.rand(num, 3, 4, 4, generator=rng(seed, num))
    noise = torch.rand(num, 3, height, width, generator=rng(seed, height, width))
    return (255 * (0.7 * F.interpolate(coarse, (height, width), mode="nearest") + 0.3 * noise)).byte()


# ---- the layout


def test_names_and_shapes_are_those_of_torchvision_with_1008_classes():
    """The published file has torchvision's names: 94 convolutions with a norm of 5, and the classifier: 566 tensors."""
    from torchvision.models import Inception3

    with torch.device("meta"):
        theirs = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
        ours = Inception().state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert len(ours) == 566
    assert sum(value.numel() for key, value in ours.items() if not key.endswith("num_batches_tracked")) == 23885392
    assert ours["fc.weight"].shape == (1008, DIM)


# ---- the network


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Inception v3 (1512.00567, figures 5-7) with the pools of the 2015 graph, written anew from functions."""

    def conv(name: str, x: Tensor, stride: int = 1, valid: bool = False) -> Tensor:
        weight = state[f"{name}.conv.weight"].double()
        pad = (0, 0) if valid else tuple((side - 1) // 2 for side in weight.shape[2:])
        y = F.conv2d(x, weight, stride=stride, padding=pad)
        gain, shift, mean, var = (
            state[f"{name}.bn.{key}"].double()[:, None, None]
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        return ((y - mean) / (var + 1e-3).sqrt() * gain + shift).clamp(min=0)

    def chain(prefix: str, names: list[str], x: Tensor) -> Tensor:
        for name in names:
            x = conv(f"{prefix}.{name}", x)
        return x

    def average(x: Tensor) -> Tensor:
        """Mean over the pixels that exist of the 3 x 3 around each."""
        box = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        sums = F.conv2d(x.flatten(0, 1)[:, None], box, padding=1)
        counts = F.conv2d(torch.ones_like(x[:1, :1]), box, padding=1)
        return (sums / counts).view_as(x)

    def greatest(x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), value=float("-inf"))
        height, width = x.shape[-2:]
        return torch.stack([padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]).amax(0)

    def halve(x: Tensor) -> Tensor:
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))

    def figure_5(name: str, x: Tensor) -> Tensor:
        return torch.cat(
            (
                chain(name, ["branch1x1"], x),
                chain(name, ["branch5x5_1", "branch5x5_2"], x),
                chain(name, [f"branch3x3dbl_{i}" for i in (1, 2, 3)], x),
                chain(name, ["branch_pool"], average(x)),
            ),
            1,
        )

    def figure_6(name: str, x: Tensor) -> Tensor:
        return torch.cat(
            (
                chain(name, ["branch1x1"], x),
                chain(name, [f"branch7x7_{i}" for i in (1, 2, 3)], x),
                chain(name, [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)], x),
                chain(name, ["branch_pool"], average(x)),
            ),
            1,
        )

    def figure_7(name: str, x: Tensor, pool) -> Tensor:
        wide = chain(name, ["branch3x3_1"], x)
        deep = chain(name, ["branch3x3dbl_1", "branch3x3dbl_2"], x)
        halves = [
            conv(f"{name}.{half}", y)
            for y, stem in ((wide, "branch3x3_2"), (deep, "branch3x3dbl_3"))
            for half in (f"{stem}a", f"{stem}b")
        ]
        return torch.cat((conv(f"{name}.branch1x1", x), *halves, conv(f"{name}.branch_pool", pool(x))), 1)

    x = conv("Conv2d_1a_3x3", x.double(), stride=2, valid=True)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, valid=True))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", halve(x)), valid=True)
    x = halve(x)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = figure_5(name, x)
    deep = chain("Mixed_6a", ["branch3x3dbl_1", "branch3x3dbl_2"], x)
    x = torch.cat(
        (
            conv("Mixed_6a.branch3x3", x, 2, valid=True),
            conv("Mixed_6a.branch3x3dbl_3", deep, 2, valid=True),
            halve(x),
        ),
        1,
    )
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = figure_6(name, x)
    deep = chain("Mixed_7a", [f"branch7x7x3_{i}" for i in (1, 2, 3)], x)
    x = torch.cat(
        (
            conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x), 2, valid=True),
            conv("Mixed_7a.branch7x7x3_4", deep, 2, valid=True),
            halve(x),
        ),
        1,
    )
    x = figure_7("Mixed_7c", figure_7("Mixed_7b", x, average), greatest)
    return x.mean((2, 3))


def test_the_network_equals_the_equations():
    """To 1e-4 of the spread of features over frames, which is small: a pool that counts its padding moves them by far more."""
    network, x = a_network(), preprocess(some_frames(2, 64, 80))
    want = reference(network.state_dict(), x)
    got = network(x)
    spread = (want[0] - want[1]).abs().mean()
    assert got.shape == (2, DIM)
    assert spread > 1e-2
    assert (got - want).abs().max() < 1e-4 * spread
    logits = want @ network.fc.weight.double().T + network.fc.bias.double()
    torch.testing.assert_close(network.fc(got).double(), logits, rtol=1e-5, atol=1e-5)


def test_batch_size_changes_nothing():
    network, frames = a_network(), some_frames(2, 48, 40)
    together = network.features(frames, batch_size=2)
    assert together.shape == (2, DIM)
    torch.testing.assert_close(network.features(frames, batch_size=1), together, rtol=1e-6, atol=1e-6)


def test_the_published_file_is_loaded(tmp_path, monkeypatch):
    network = a_network()
    torch.save(network.state_dict(), tmp_path / NETWORK_FILE, _use_new_zipfile_serialization=False)
    publish(monkeypatch, "inception", tmp_path / NETWORK_FILE)
    loaded = Inception.load(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(UserError, match="FID and KID with Inception refused"):
        Inception.load(tmp_path / "elsewhere")


# ---- preprocessing


TABLE = torch.tensor([[0.0, 60, 30], [90, 15, 240]])
TF1_4X5 = [  # TensorFlow 1: output i lies at input i * 3/5 across, i * 2/4 down
    [0.0, 36.0, 54.0, 36.0, 30.0],
    [45.0, 40.5, 57.0, 115.5, 135.0],
    [90.0, 45.0, 60.0, 195.0, 240.0],
    [90.0, 45.0, 60.0, 195.0, 240.0],
]


def test_the_resize_is_tensorflow_1s():
    got = resize_tf1(TABLE[None, None], 4, 5)[0, 0]
    torch.testing.assert_close(got, torch.tensor(TF1_4X5), rtol=0, atol=1e-4)
    assert torch.equal(resize_tf1(TABLE[None, None], 2, 3)[0, 0], TABLE)
    shrunk = resize_tf1(torch.arange(60.0)[None, None, None].repeat(1, 1, 6, 1), 3, 3)[0, 0]
    torch.testing.assert_close(shrunk, torch.tensor([[0.0, 20, 40]] * 3))  # picked, not averaged


FRAME = (torch.arange(3 * 40 * 30).reshape(1, 3, 40, 30) * 7919 % 256).byte()
PROBES = {  # (channel, row, column) -> value; by torch-fidelity 0.4.0 and pytorch-fid 0.3.0
    "tf1": {
        (0, 0, 0): -1.0000000,
        (0, 0, 298): -0.8515625,
        (0, 298, 0): -0.3906250,
        (1, 150, 149): -0.0469795,
        (1, 7, 200): 0.9744982,
        (2, 298, 298): -0.9921875,
        (2, 211, 13): 0.5178198,
    },
    "pytorch_fid": {
        (0, 0, 0): -1.0000000,
        (0, 0, 298): -0.8509804,
        (0, 298, 0): -0.3882353,
        (1, 150, 149): 0.0099417,
        (1, 7, 200): 0.2665373,
        (2, 298, 298): -0.9921569,
        (2, 211, 13): 0.5769558,
    },
}


@pytest.mark.parametrize("variant", PROBES)
def test_preprocessing_equals_the_published_tools(variant):
    got = preprocess(FRAME, variant)
    assert got.shape == (1, 3, 299, 299)
    for place, value in PROBES[variant].items():
        assert got[0][place].item() == pytest.approx(value, abs=2e-6), place


def test_a_large_frame_is_not_antialiased():
    """Rows 0 and 255 in turn, 598 high: every second one is picked by TF 1, pairs are averaged with half-pixel centres."""
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(299)[None, None, :, None].expand(1, 3, 598, 299)
    assert torch.equal(preprocess(stripes), torch.full((1, 3, 299, 299), -1.0))
    thirds = torch.tensor([255, 0, 255], dtype=torch.uint8).repeat(299)[None, None, :, None].expand(1, 3, 897, 299)
    assert torch.equal(preprocess(thirds, "pytorch_fid"), torch.full((1, 3, 299, 299), -1.0))


def test_scaling_and_colour_order():
    """255 becomes 127/128 for TF 1 and 1 for pytorch-fid; red stays first."""
    frame = torch.tensor([255, 128, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8, 8)
    torch.testing.assert_close(preprocess(frame)[0, :, 0, 0], torch.tensor([127 / 128, 0.0, -1.0]), rtol=0, atol=0)
    torch.testing.assert_close(preprocess(frame, "pytorch_fid")[0, :, 0, 0], torch.tensor([1.0, 1 / 255, -1.0]))


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 1, 8, 8).byte()]
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_frames_are_refused(frames):
    with pytest.raises(UserError, match="Inception sees uint8 frames"):
        preprocess(frames)


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_variant_is_refused():
    with pytest.raises(UserError, match="unknown preprocessing of Inception: clean; use tf1 or pytorch_fid"):
        preprocess(FRAME, "clean")

"""PSNR and SSIM against their formulas, LPIPS from a file on disk, and no network at any time."""

import socket
from pathlib import Path

import lpips
import pytest
import torch
from torch import Tensor

from eval.metrics.pairs.psnr import PSNR
from eval.metrics.pairs.ssim import SSIM
from eval.networks import lpips as lpips_network
from eval.networks.lpips import Lpips
from eval.networks.weights import REGISTRY
from teachers.errors import UserError
from tests.eval.networks.test_weights import publish
from tests.support.tiny import rng

FILE = REGISTRY["alexnet"].file


def psnr(a: Tensor, b: Tensor) -> Tensor:
    return PSNR().compare(a, b, None)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    return SSIM().compare(a, b, None)


def some(seed: int = 0, frames: int = 3, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (3, frames, side, side), dtype=torch.uint8, generator=rng(seed, side))


def test_psnr_is_the_formula_frame_by_frame():
    a, b = some(), some(1)
    squares = (a.double() - b.double()).square().mean((0, 2, 3))
    torch.testing.assert_close(psnr(a, b).double(), 10 * torch.log10(255**2 / squares), rtol=1e-6, atol=0)
    b = a.clone()
    b[:, 1] ^= 1  # one grey level everywhere: 10 log10 255^2
    values = psnr(a, b)
    assert values[1] == pytest.approx(48.1308, abs=1e-3)
    assert torch.isinf(values[[0, 2]]).all()


def gaussian_ssim(x: Tensor, y: Tensor) -> float:
    """Wang et al. 2004, eq. 13: mean over places and channels, reflected edges, windows of 11 by explicit patches, fp64."""
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    padded = (torch.nn.functional.pad(z.double()[None], (5, 5, 5, 5), mode="reflect")[0] for z in (x, y))
    px, py = (z.unfold(1, 11, 1).unfold(2, 11, 1) for z in padded)

    def mean(z: Tensor) -> Tensor:
        return (z * window).sum((3, 4))

    mx, my = mean(px), mean(py)
    vx, vy, cov = mean(px * px) - mx**2, mean(py * py) - my**2, mean(px * py) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_ssim_is_the_papers_and_does_not_depend_on_the_other_frames():
    """data_range is fixed: taken from the batch it would change with what else is compared."""
    a = some(frames=2, side=24)
    a[:, 0] = a[:, 0] // 8 + 100  # little contrast
    b = (a.float() * 0.6 + 40).round().byte()
    b[:, 1] = (a[:, 1] // 2 + 60).byte()
    values = ssim(a, b)
    for frame in range(2):
        assert values[frame] == pytest.approx(gaussian_ssim(a[:, frame], b[:, frame]), abs=2e-5)
        assert values[frame] == pytest.approx(float(ssim(a[:, frame : frame + 1], b[:, frame : frame + 1])), abs=1e-6)
    assert torch.equal(ssim(a, a), torch.ones(2))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


def a_backbone() -> dict[str, Tensor]:
    """AlexNet's published layout: features.N and classifier.N."""
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    state = {}
    for place, shape in shapes.items():
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"features.{place}.weight"] = torch.randn(shape, generator=rng(place, 1)) * (2 / fan_in) ** 0.5
        state[f"features.{place}.bias"] = torch.randn(shape[0], generator=rng(place, 2)) / 10
    return state | {"classifier.1.weight": torch.zeros(8, 8), "classifier.1.bias": torch.zeros(8)}


def reference_lpips(state: dict[str, Tensor], heads: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Zhang et al. 1801.03924, eq. 1, fp64: unit-normalised features of five layers, weighted squared differences, means."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    steps = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))

    def layers(z: Tensor) -> list[Tensor]:
        found, z = [], (z.double() / 127.5 - 1 - shift) / scale
        for place, stride, padding in steps:
            if place in (3, 6):
                z = torch.nn.functional.max_pool2d(z, 3, 2)
            w, b = (state[f"features.{place}.{name}"].double() for name in ("weight", "bias"))
            z = torch.nn.functional.conv2d(z, w, b, stride, padding).relu()
            found.append(z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    pairs = zip(layers(x), layers(y), heads, strict=True)
    return torch.stack(
        [((a - b).square() * head.double().view(1, -1, 1, 1)).sum(1).mean((1, 2)) for a, b, head in pairs]
    ).sum(0)


def test_lpips_is_the_equation_with_the_published_heads(tmp_path, monkeypatch, offline):
    state = a_backbone()
    torch.save(state, tmp_path / FILE)
    publish(monkeypatch, "alexnet", tmp_path / FILE)
    metric = Lpips.load(tmp_path)
    a, b = some(), some(2)
    bundled = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", "cpu", weights_only=True)
    heads = [bundled[f"lin{layer}.model.1.weight"] for layer in range(5)]
    assert [len(head.flatten()) for head in heads] == [64, 192, 384, 256, 256]
    want = reference_lpips(state, heads, a.transpose(0, 1), b.transpose(0, 1))
    torch.testing.assert_close(metric.distance(a, b).double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metric.distance(a, b, batch_size=1), metric.distance(a, b), rtol=0, atol=1e-6)
    assert metric.distance(a, a).abs().max() == 0


def test_a_missing_backbone_a_wrong_one_and_wrong_names_are_refused(tmp_path, monkeypatch, offline):
    with pytest.raises(UserError, match=r"LPIPS refused: .*alexnet-owt-7be5be79\.pth is not there; get alexnet"):
        Lpips.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"LPIPS refused: .*is another file"):
        Lpips.load(tmp_path)
    state = a_backbone()
    state["features.9.weight"] = state.pop("features.8.weight")
    torch.save(state, tmp_path / FILE)
    publish(monkeypatch, "alexnet", tmp_path / FILE)
    with pytest.raises(
        UserError, match=r"LPIPS refused: its file does not fit: missing .*unexpected features\.9\.weight"
    ):
        Lpips.load(tmp_path)


def test_changed_heads_are_refused(monkeypatch, tmp_path):
    torch.save(a_backbone(), tmp_path / FILE)
    publish(monkeypatch, "alexnet", tmp_path / FILE)
    monkeypatch.setattr(lpips_network, "HEADS_SHA256", "0" * 64)
    with pytest.raises(UserError, match="LPIPS refused: its heads are another file"):
        Lpips.load(tmp_path)


@pytest.mark.parametrize("other", [some(side=32), some(frames=2), some().float(), some()[0]])
@pytest.mark.usefixtures("unchecked_shapes")
def test_unlike_pairs_are_refused(other):
    for measure in (psnr, ssim):
        with pytest.raises(UserError, match="compared in pairs"):
            measure(some(), other)


def test_small_frames_are_refused_by_those_that_need_more():
    with pytest.raises(UserError, match="SSIM needs frames of at least 12"):
        ssim(some(side=8), some(side=8))
    with pytest.raises(UserError, match="LPIPS needs frames of at least 64"):
        Lpips(torch.nn.Linear(1, 1)).distance(some(side=32), some(side=32))

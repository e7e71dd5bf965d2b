"""I3D: what is passed to the published program, with a small scripted stand-in of the same signature in its place."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.networks.i3d import DIM, I3D, preprocess_common
from eval.networks.weights import REGISTRY
from teachers.errors import UserError
from tests.eval.networks.test_weights import publish
from tests.support.tiny import randn, rng

FILE = REGISTRY["i3d"].file


class StandIn(nn.Module):
    """forward(x, rescale, resize, return_features) as the published file has it: squeeze, scale, a layer, mean over time."""

    def __init__(self, classes: int = DIM):
        super().__init__()
        self.conv = nn.Conv3d(3, classes, (3, 8, 8), stride=(1, 8, 8))
        with torch.no_grad():
            self.conv.weight.copy_(randn(classes, 3, 3, 8, 8, seed=5) / 24)
            self.conv.bias.copy_(randn(classes, seed=6))

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if resize:
            x = F.interpolate(x, size=(x.shape[2], 224, 224), mode="trilinear", align_corners=False)
        if rescale:
            x = 2.0 * x / 255.0 - 1.0
        logits = self.conv(x).square().mean((3, 4)).mean(2)
        return logits if return_features else logits.softmax(1)


def scripted(classes: int = DIM):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(StandIn(classes))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted().save(str(path))
    return path


@pytest.fixture
def network(program, monkeypatch) -> I3D:
    publish(monkeypatch, "i3d", program)
    return I3D.load(program.parent)


def some_videos(num: int = 2, frames: int = 10, height: int = 40, width: int = 30) -> Tensor:
    return torch.randint(0, 256, (num, 3, frames, height, width), dtype=torch.uint8, generator=rng(2, num, frames))


def reference(x: Tensor) -> Tensor:
    """The stand-in's layer by explicit patches, fp64: x [N, 3, T, 224, 224] in [-1, 1] -> [N, 400]."""
    layer = StandIn().double()
    patches = x.double().unfold(2, 3, 1).unfold(3, 8, 8).unfold(4, 8, 8)  # n c t y x 3 8 8
    out = torch.einsum("nctyxijk,ocijk->notyx", patches, layer.conv.weight) + layer.conv.bias[:, None, None, None]
    return out.square().mean((2, 3, 4))


def squeezed(videos: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with half-pixel centres and no antialias, by the formula, frame by frame, in fp64."""
    for dim, want in ((3, size[0]), (4, size[1])):
        have = videos.shape[dim]
        place = ((torch.arange(want, dtype=torch.float64) + 0.5) * have / want - 0.5).clamp(0, have - 1)
        low = place.floor().long()
        share = (place - low).reshape(-1, *[1] * (4 - dim))
        high = (low + 1).clamp(max=have - 1)
        videos = videos.double().index_select(dim, low) * (1 - share) + videos.double().index_select(dim, high) * share
    return videos


def test_stylegan_v_leaves_resize_and_scaling_to_the_file(network):
    """Frames are squeezed to 224 x 224, RGB, 0..255 to [-1, 1]; features are the logits, not probabilities."""
    videos = some_videos()
    want = reference(2 * squeezed(videos, (224, 224)) / 255 - 1)
    got = network.features(videos)
    assert got.shape == (2, DIM)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(40, 31), (29, 40)])
def test_common_metrics_keeps_the_aspect_and_cuts_the_centre(network, height, width):
    videos = some_videos(1, 10, height, width)
    long = math.ceil(max(height, width) * 224 / min(height, width))
    cut = slice((long - 224) // 2, (long - 224) // 2 + 224)
    if height > width:
        frames = squeezed(videos, (long, 224))[..., cut, :]
    else:
        frames = squeezed(videos, (224, long))[..., cut]
    frames = 2 * frames / 255 - 1
    torch.testing.assert_close(preprocess_common(videos).double(), frames, rtol=0, atol=1e-4)
    got = network.features(videos, variant="common_metrics")
    torch.testing.assert_close(got.double(), reference(frames), rtol=1e-5, atol=1e-5)
    assert (got - network.features(videos)).abs().max() > 1e-3  # the two variants are two metrics


def test_shrinking_is_not_antialiased():
    """Thirds white, black, white at 672: the middle one is taken."""
    rows = torch.tensor([255, 0, 255], dtype=torch.uint8).repeat(224)
    videos = rows[:, None].expand(1, 3, 1, 672, 672)
    assert torch.equal(preprocess_common(videos), torch.full((1, 3, 1, 224, 224), -1.0))


def test_arguments_reach_the_file_by_name():
    """By position they break under torch >= 2.1 with DataParallel."""
    calls = []

    class Recorder(nn.Module):
        def forward(self, *args, **kwargs):
            calls.append((args, kwargs))
            return torch.zeros(len(kwargs["x"]), DIM)

    I3D(Recorder()).features(some_videos(1))
    I3D(Recorder()).features(some_videos(1), variant="common_metrics")
    flags = [{key: value for key, value in kwargs.items() if key != "x"} for _, kwargs in calls]
    assert [args for args, _ in calls] == [(), ()]
    assert flags == [
        {"rescale": True, "resize": True, "return_features": True},
        {"rescale": False, "resize": False, "return_features": True},
    ]
    assert torch.equal(calls[0][1]["x"], some_videos(1).float())


def test_batch_size_changes_nothing(network):
    videos = some_videos(3)
    together = network.features(videos, batch_size=3)
    for batch_size in (1, 2):
        torch.testing.assert_close(network.features(videos, batch_size), together, rtol=1e-6, atol=1e-6)


def test_a_changed_program_is_refused_before_it_is_opened(program, tmp_path, monkeypatch):
    publish(monkeypatch, "i3d", program)
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / FILE).write_bytes(content)
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=r"FVD with I3D refused: .* is another file") as caught:
        I3D.load(tmp_path)
    assert REGISTRY["i3d"].source in str(caught.value)


@pytest.mark.parametrize(
    ("videos", "expected"),
    [
        (some_videos(1, frames=9), "at least 10 frames: got 9"),
        (some_videos(1).float(), "uint8 videos"),
        (some_videos(1)[0], "uint8 videos"),
        (some_videos(1).transpose(1, 2), "uint8 videos"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_videos_are_refused(network, videos, expected):
    with pytest.raises(UserError, match=expected):
        network.features(videos)


@pytest.mark.usefixtures("unchecked_shapes")
def test_another_network_and_an_unknown_variant_are_refused(network):
    with pytest.raises(UserError, match=r"I3D returned \(1, 10\) for 1 videos"):
        I3D(scripted(10)).features(some_videos(1))
    with pytest.raises(UserError, match="unknown preprocessing of I3D: clean; use stylegan_v or common_metrics"):
        network.features(some_videos(1), variant="clean")

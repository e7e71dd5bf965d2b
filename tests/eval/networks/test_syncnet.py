"""SyncNet v2: names and shapes, both towers against a second writing, and what they see against the published pipeline."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.networks.syncnet import DIM, SyncNet, audio_input, crop_faces, lip_input, resize_cv2, windows_of
from eval.networks.weights import REGISTRY
from teachers.errors import UserError
from tests.eval.networks.test_weights import publish
from tests.support.tiny import randn, rng

FILE = REGISTRY["syncnet"].file
WEIGHTS = {  # of convolutions and linear layers; each has a bias
    "netcnnaud.0": (64, 1, 3, 3),
    "netcnnaud.4": (192, 64, 3, 3),
    "netcnnaud.8": (384, 192, 3, 3),
    "netcnnaud.11": (256, 384, 3, 3),
    "netcnnaud.14": (256, 256, 3, 3),
    "netcnnaud.18": (512, 256, 5, 4),
    "netfcaud.0": (512, 512),
    "netfcaud.3": (1024, 512),
    "netcnnlip.0": (96, 3, 5, 7, 7),
    "netcnnlip.4": (256, 96, 1, 5, 5),
    "netcnnlip.8": (256, 256, 1, 3, 3),
    "netcnnlip.11": (256, 256, 1, 3, 3),
    "netcnnlip.14": (256, 256, 1, 3, 3),
    "netcnnlip.18": (512, 256, 1, 6, 6),
    "netfclip.0": (512, 512),
    "netfclip.3": (1024, 512),
}
NORMS = {
    "netcnnaud": {1: 64, 5: 192, 9: 384, 12: 256, 15: 256, 19: 512},
    "netfcaud": {1: 512},
    "netcnnlip": {1: 96, 5: 256, 9: 256, 12: 256, 15: 256, 19: 512},
    "netfclip": {1: 512},
}


@functools.cache
def a_network() -> SyncNet:
    """Random weights that keep the size of what passes through; every statistic of every norm is its own."""
    network, generator = SyncNet(), rng(4)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif key.endswith("running_var") or (key.endswith("weight") and value.ndim == 1):
            value.copy_(1 + 0.2 * noise.clamp(-2, 2))
        else:
            value.copy_(0.3 * noise)
    return network


def some_faces(num: int) -> Tensor:
    """Coarse colours that move, with noise."""
    coarse = torch.rand(num, 3, 6, 6, generator=rng(num, 5))
    noise = torch.rand(num, 3, 224, 224, generator=rng(num, 6))
    return (255 * (0.7 * F.interpolate(coarse, (224, 224), mode="bilinear") + 0.3 * noise)).byte()


def some_mfcc(rows: int) -> Tensor:
    return 10 * randn(rows, 13, seed=8)


# ---- the layout


def test_names_shapes_and_size_are_the_published_ones():
    table: dict[str, tuple[int, ...]] = {}
    for name, shape in WEIGHTS.items():
        table |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for tower, norms in NORMS.items():
        for place, width in norms.items():
            for kind in ("weight", "bias", "running_mean", "running_var"):
                table[f"{tower}.{place}.{kind}"] = (width,)
            table[f"{tower}.{place}.num_batches_tracked"] = ()
    network = SyncNet()
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == table
    assert len(table) == 102
    sizes = {tower: sum(p.numel() for p in getattr(network, tower).parameters()) for tower in NORMS}
    assert sizes["netcnnaud"] + sizes["netfcaud"] == 5_664_704
    assert sizes["netcnnlip"] + sizes["netfclip"] == 7_966_912
    assert sum(sizes.values()) == 13_631_616


def test_the_published_file_is_loaded(tmp_path, monkeypatch):
    """In the old format of torch.save, and without the counters that came after it was written."""
    network = a_network()
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / FILE, _use_new_zipfile_serialization=False)
    publish(monkeypatch, "syncnet", tmp_path / FILE)
    loaded = SyncNet.load(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    assert not loaded.training
    with pytest.raises(UserError, match="Sync-C and Sync-D with SyncNet v2 refused"):
        SyncNet.load(tmp_path / "elsewhere")


# ---- the towers


def normed(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    gain, shift, mean, var = (
        state[f"{name}.{key}"].double().reshape(shape) for key in ("weight", "bias", "running_mean", "running_var")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * gain + shift).clamp(min=0)


def head(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = (state[f"{name}.0.{key}"].double() for key in ("weight", "bias"))
    x = normed(state, f"{name}.1", x @ weight.T + bias)
    weight, bias = (state[f"{name}.3.{key}"].double() for key in ("weight", "bias"))
    return x @ weight.T + bias


def encode_audio(state: dict[str, Tensor], window: Tensor) -> Tensor:
    """Window [13, 20] -> [1024], layer by layer with the published sizes."""

    def layer(place: int, x: Tensor, pad: int = 1) -> Tensor:
        weight, bias = (state[f"netcnnaud.{place}.{key}"].double() for key in ("weight", "bias"))
        return normed(state, f"netcnnaud.{place + 1}", F.conv2d(x, weight, bias, padding=pad))

    x = layer(4, layer(0, window.double()[None, None]))
    x = x.unfold(2, 3, 1).unfold(3, 3, 2).amax((4, 5))
    assert x.shape == (1, 192, 11, 9)
    x = layer(14, layer(11, layer(8, x)))
    x = x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    assert x.shape == (1, 256, 5, 4)
    return head(state, "netfcaud", layer(18, x, 0).flatten(1))[0]


def see(state: dict[str, Tensor], window: Tensor) -> Tensor:
    """Window [3, 5, 224, 224] -> [1024]: after the first layer there is no time, and everything is a plain picture."""

    def layer(place: int, x: Tensor, pad: int = 1, stride: int = 1) -> Tensor:
        weight, bias = (state[f"netcnnlip.{place}.{key}"].double() for key in ("weight", "bias"))
        return normed(state, f"netcnnlip.{place + 1}", F.conv2d(x, weight.flatten(1, 2), bias, stride, pad))

    def pool(x: Tensor) -> Tensor:
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))

    x = pool(layer(0, window.double().flatten(0, 1)[None], 0, 2))
    assert x.shape == (1, 96, 54, 54)
    x = pool(F.pad(layer(4, x, 1, 2), (1, 1, 1, 1), value=float("-inf")))
    assert x.shape == (1, 256, 13, 13)
    x = pool(layer(14, layer(11, layer(8, x))))
    assert x.shape == (1, 256, 6, 6)
    return head(state, "netfclip", layer(18, x, 0).flatten(1))[0]


def test_both_towers_equal_the_equations_window_by_window():
    """Window v is frames v .. v+4 in BGR, 0..255 as they are, and MFCC rows 4v .. 4v+19; nothing is normalised."""
    network, faces, mfcc = a_network(), some_faces(6), some_mfcc(24)
    lips, sounds = network.features(faces, mfcc, num_windows=2)
    assert lips.shape == sounds.shape == (2, DIM)
    state = network.state_dict()
    blue_first = faces.flip(1).double()
    want_lips = torch.stack([see(state, blue_first[v : v + 5].transpose(0, 1)) for v in range(2)])
    want_sounds = torch.stack([encode_audio(state, mfcc[4 * v : 4 * v + 20].T) for v in range(2)])
    for got, want in ((lips, want_lips), (sounds, want_sounds)):
        spread = (want[0] - want[1]).abs().mean()
        assert spread > 0.01 * want.abs().mean()
        assert (got - want).abs().max() < 1e-3 * spread


def test_batch_size_changes_nothing():
    network, faces, mfcc = a_network(), some_faces(7), some_mfcc(28)
    together = network.features(faces, mfcc, 3, batch_size=3)
    for batch_size in (1, 2):
        for got, want in zip(network.features(faces, mfcc, 3, batch_size), together, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=4e-6 * float(want.abs().max()))


# ---- windows


@pytest.mark.parametrize(
    ("frames", "samples", "windows"),
    [(125, 80000, 120), (126, 80000, 120), (125, 79999, 119), (6, 3840, 1), (200, 80639, 120)],
)
def test_the_number_of_windows_drops_the_last_one(frames, samples, windows):
    assert windows_of(frames, samples) == windows


@pytest.mark.parametrize(("frames", "samples"), [(5, 80000), (125, 3839), (0, 0)])
def test_too_short_a_clip_is_refused(frames, samples):
    with pytest.raises(UserError, match="SyncNet needs at least 6 frames at 25 fps"):
        windows_of(frames, samples)


def test_a_clip_with_exactly_its_sound_has_enough_rows():
    """80000 samples are 499 rows of MFCC and 125 frames."""
    assert audio_input(some_mfcc(499), 120).shape == (120, 1, 13, 20)
    assert lip_input(some_faces(1).expand(125, 3, 224, 224), 120).shape == (120, 3, 5, 224, 224)


@pytest.mark.parametrize("mfcc", [some_mfcc(23), some_mfcc(24)[:, :12], some_mfcc(24)[None]])
@pytest.mark.usefixtures("unchecked_shapes")
def test_too_little_sound_is_refused(mfcc):
    with pytest.raises(UserError, match="SyncNet needs at least 24 MFCC rows of 13"):
        audio_input(mfcc, 2)


@pytest.mark.parametrize(
    "faces", [some_faces(5), some_faces(6).float(), some_faces(6)[..., :200], some_faces(6).transpose(0, 1)]
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_faces_are_refused(faces):
    with pytest.raises(UserError, match="SyncNet sees at least 6 uint8 face crops"):
        lip_input(faces, 2)


# ---- face crops


SMALL = torch.tensor([[0, 60, 30, 255], [90, 15, 240, 7], [200, 100, 1, 128]], dtype=torch.uint8)
CV2_5X5 = [
    [0, 42, 45, 97, 255],
    [36, 40, 78, 126, 156],
    [90, 37, 128, 170, 7],
    [156, 93, 81, 91, 80],
    [200, 130, 50, 39, 128],
]
PICTURE = (torch.arange(2 * 3 * 90 * 120).reshape(2, 3, 90, 120) * 7919 % 251).byte()
BOXES = {  # box -> {(frame, channel, row, column): value}, by numpy and cv2 as run_pipeline.py
    (40.0, 20.0, 80.0, 70.0): {
        (0, 0, 0, 112): 167,
        (0, 1, 60, 60): 97,
        (0, 2, 111, 112): 136,
        (0, 0, 150, 90): 137,
        (0, 1, 40, 200): 211,
        (0, 2, 222, 5): 192,
        (1, 0, 100, 100): 40,
        (1, 2, 77, 131): 167,
    },
    (-10.0, 5.5, 31.0, 44.25): {
        (0, 0, 0, 112): 143,
        (0, 1, 60, 60): 110,
        (0, 2, 111, 112): 151,
        (0, 0, 150, 90): 58,
        (0, 1, 40, 200): 85,
        (0, 2, 222, 5): 110,
        (1, 0, 100, 100): 109,
        (1, 2, 77, 131): 172,
    },
    (70.0, 50.0, 118.0, 89.0): {
        (0, 0, 0, 112): 34,
        (0, 1, 60, 60): 105,
        (0, 2, 111, 112): 226,
        (0, 0, 150, 90): 113,
        (0, 1, 40, 200): 174,
        (0, 2, 222, 5): 110,
        (1, 0, 100, 100): 111,
        (1, 2, 77, 131): 33,
    },
}


def test_the_resize_is_opencvs():
    """By OpenCV 4.14 and 5.0, which agree; the last one is the image itself."""
    assert resize_cv2(SMALL[None], 5)[0].tolist() == CV2_5X5
    face = some_faces(1)[0]
    assert torch.equal(resize_cv2(face, 224), face)


@pytest.mark.parametrize("side", [2, 3, 7, 112, 300])
def test_the_resize_is_bilinear_without_antialias(side):
    image = torch.randint(0, 256, (3, 61, 47), dtype=torch.uint8, generator=rng(side))
    want = F.interpolate(image[None].double(), (side, side), mode="bilinear", align_corners=False)[0]
    assert (resize_cv2(image, side) - want).abs().max() < 1


@pytest.mark.parametrize("box", BOXES)
def test_crops_equal_the_published_pipeline(box):
    got = crop_faces(PICTURE, torch.tensor(box))
    assert got.shape == (2, 3, 224, 224)
    assert got.dtype == torch.uint8
    assert {place: int(got[place]) for place in BOXES[box]} == BOXES[box]


@pytest.mark.parametrize("box", [(30.0, 20.0, 70.0, 60.0), (60.0, 40.0, 100.0, 90.0)])
def test_a_crop_is_the_published_square(box):
    """x - 1.4 s .. x + 1.4 s, y - s .. y + 1.8 s, grey 110 outside; the same for all frames."""
    left, top, right, bottom = box
    for frame, crop in zip(PICTURE.numpy(), crop_faces(PICTURE, torch.tensor(box)), strict=True):
        s, x, y = max(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
        m = int(1.8 * s)
        padded = np.pad(frame, ((0, 0), (m, m), (m, m)), constant_values=110)
        part = padded[:, int(y + m - s) : int(y + m + 1.8 * s), int(x + m - 1.4 * s) : int(x + m + 1.4 * s)]
        want = F.interpolate(torch.from_numpy(part.copy())[None].double(), (224, 224), mode="bilinear")[0]
        assert (crop - want).abs().max() < 1


def test_outside_the_picture_is_grey():
    got = crop_faces(torch.full((1, 3, 40, 40), 255, dtype=torch.uint8), torch.tensor([0.0, 0.0, 40.0, 40.0]))[0]
    assert got[:, :, 0].unique().tolist() == [110]  # left of the picture
    assert got[:, -1].unique().tolist() == [110]  # below
    assert got[:, 0, 112].tolist() == [255, 255, 255]  # nothing is above: a crop begins at the box's top


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([30.0, 20.0, 30.0, 60.0], "does not fit a frame of 120 x 90"),
        ([70.0, 20.0, 30.0, 60.0], "does not fit"),
        ([200.0, 20.0, 240.0, 60.0], "does not fit"),
        ([30.0, float("nan"), 70.0, 60.0], "does not fit"),
        ([float("-inf"), 20.0, float("inf"), 60.0], "does not fit"),
        ([-1e6, -1e6, 1e6, 1e6], "does not fit"),
        ([50.0, 50.0, 50.5, 50.5], "does not fit"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_boxes_that_do_not_fit_are_refused(boxes, expected):
    with pytest.raises(UserError, match=expected):
        crop_faces(PICTURE, torch.tensor(boxes))


@pytest.mark.parametrize("frames", [PICTURE.float(), PICTURE[0], PICTURE[:, :1]])
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_frames_are_refused(frames):
    with pytest.raises(UserError, match="SyncNet sees uint8 frames"):
        crop_faces(frames, torch.tensor([30.0, 20.0, 70.0, 60.0]))

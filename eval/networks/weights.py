"""Published weights of the metrics: which file, its sha256, where to get it.

A metric whose file is missing or wrong is refused by name; the file is never replaced by another. Sizes and sha256 are those that
public projects pin; the file is the user's to fetch, under the licence that is named.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from teachers.checkpoints.strict import load_strict, misfits, shapes_of
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One published file: `file` is its name in the weights folder, `others` are names that the same bytes have elsewhere."""

    metric: str
    file: str
    sha256: str
    num_bytes: int | None
    source: str
    licence: str
    others: tuple[str, ...] = ()


REGISTRY = {
    "inception": Weights(
        metric="FID and KID with Inception",
        file="pt_inception-2015-12-05-6726825d.pth",
        others=("weights-inception-2015-12-05-6726825d.pth",),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        num_bytes=95_628_359,
        source="the release fid_weights of github.com/mseitzer/pytorch-fid or v0.2.0 of github.com/toshas/torch-fidelity",
        licence="Apache-2.0 (TensorFlow models, 2015)",
    ),
    "i3d": Weights(
        metric="FVD with I3D",
        file="i3d_torchscript.pt",
        sha256="bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
        num_bytes=51_235_320,
        source="https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt or huggingface.co/flateon/FVD-I3D-torchscript",
        licence="Apache-2.0 for the weights (DeepMind kinetics-i3d); the file itself names no licence",
    ),
    "syncnet": Weights(
        metric="Sync-C and Sync-D with SyncNet v2",
        file="syncnet_v2.model",
        sha256="961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
        num_bytes=54_573_114,
        source="https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        licence="none named for the file; the code of joonson/syncnet_python is MIT",
    ),
    "dinov2": Weights(
        metric="identity with DINOv2",
        file="dinov2-base/model.safetensors",
        sha256="d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
        num_bytes=346_345_912,
        source="model.safetensors of huggingface.co/facebook/dinov2-base",
        licence="Apache-2.0",
    ),
    "alexnet": Weights(
        metric="LPIPS",
        file="alexnet-owt-7be5be79.pth",
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        num_bytes=244_408_911,
        source="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        licence="BSD-3-Clause (torchvision)",
    ),
    "syncnet_example": Weights(
        metric="the golden example of SyncNet",
        file="example.avi",
        sha256="1724121b3a50141cfc9e77c034f7de914024d015b92762ae12d3e1a7151b8621",
        num_bytes=None,
        source="https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/example.avi",
        licence="none named for the file",
    ),
}


def weights_folder() -> Path:
    """Where published metric weights are looked for: $AVATAR_DISTILL_WEIGHTS, else the user's cache folder."""
    chosen = os.environ.get("AVATAR_DISTILL_WEIGHTS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "avatar-distill" / "weights"


def locate(name: str, folder: Path | None = None) -> Path:
    """The file of REGISTRY[name] in `folder` (default `weights_folder()`), its sha256 verified.

    Raises UserError that says which metric is refused, why, and where the right file is.
    """
    return _verified(name, folder)[0]


def read(name: str, folder: Path | None = None) -> io.BytesIO:
    """The content of that file: the very bytes whose sha256 was verified, so that nothing else can be loaded or run.

    Raises UserError as `locate` does.
    """
    return io.BytesIO(_verified(name, folder)[1])


def read_state(name: str, folder: Path | None = None) -> Any:
    """What torch.save wrote to that file; only tensors are unpickled. Raises UserError as `locate` does, and for a damaged file."""
    content = read(name, folder)
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of archives may raise
        raise refused(name, f"its file cannot be read ({type(error).__name__})") from error


OPTIONAL = r".*\.num_batches_tracked"
"""What no inference reads may be missing of a file."""


Network = TypeVar("Network", bound=nn.Module)


def load_network(name: str, network: Network, folder: Path | None = None) -> Network:
    """Fill `network` from the state dict that torch.save wrote to the file of `name`, strictly; freeze it, in eval mode.

    OPTIONAL tensors may be missing. Raises UserError as `read_state` does and where names or shapes are others.
    """
    fill(name, network, read_state(name, folder))
    return network


def fill(name: str, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Strictly copy `state` into `network` and freeze it, in eval mode. Raises UserError that lists what does not fit."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise refused(name, "its file holds no state dict")
    if faults := misfits(shapes_of(state), shapes_of(network.state_dict()), optional=OPTIONAL):
        raise refused(name, f"its file does not fit: {faults}")
    load_strict(network, state, name, "", optional=OPTIONAL)
    network.eval().requires_grad_(False)


def check_frames(frames: Tensor, network: str) -> None:
    """UserError for anything but uint8 [N, 3, H, W]."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise UserError(
            f"{network} sees uint8 frames [N, 3, H, W]: got {frames.dtype} {tuple(frames.shape)}; convert the frames"
        )


@contextmanager
def exact() -> Iterator[None]:
    """Inference in true fp32: no gradient, and no TF32."""
    with torch.inference_mode(), true_fp32():
        yield


@contextmanager
def true_fp32() -> Iterator[None]:
    """No TF32, which cuDNN uses for convolutions by default."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _verified(name: str, folder: Path | None) -> tuple[Path, bytes]:
    """The file and its content."""
    if name not in REGISTRY:
        raise UserError(f"unknown weights: {name}; known are {', '.join(REGISTRY)}")
    weights, folder = REGISTRY[name], Path(folder) if folder is not None else weights_folder()
    places = [folder / file for file in (weights.file, *weights.others)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise refused(name, f"{places[0]} is not there")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise refused(name, f"{path} cannot be read ({error.strerror})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != weights.sha256:
        raise refused(name, f"{path} is another file or a part of it ({len(content)} bytes, sha256 {found})")
    return path, content


def refused(name: str, why: str) -> UserError:
    """The UserError that refuses the metric of `name`: why, and where the right file is."""
    weights = REGISTRY[name]
    size = f"{weights.num_bytes} bytes, " if weights.num_bytes else ""
    return UserError(
        f"{weights.metric} refused: {why}; get {weights.file} ({size}sha256 {weights.sha256}) from {weights.source}"
    )

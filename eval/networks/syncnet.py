"""SyncNet v2: the lip tower, the audio tower and what they see (Chung and Zisserman, "Out of time", 2016; syncnet_python).

V windows of 5 frames at 25 fps and of 20 MFCC rows (0.2 s), one a frame: window v is frames v .. v+4 and rows 4v .. 4v+19. Features
are not normalised; distances, lags and padding belong to the metric.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from eval.networks.weights import check_frames, exact, load_network
from teachers.errors import UserError

DIM = 1024
SIDE = 224
FPS, SAMPLE_RATE = 25, 16000
FRAMES, ROWS, ROWS_A_FRAME, COEFFICIENTS = 5, 20, 4, 13
CROP_SCALE, PAD_VALUE = 0.4, 110

# width | kernel | stride | padding | pool: kernel stride padding
AUDIO = """
    64  | 3 3 | 1 1 | 1 1 | 1 1, 1 1, 0 0
    192 | 3 3 | 1 1 | 1 1 | 3 3, 1 2, 0 0
    384 | 3 3 | 1 1 | 1 1 |
    256 | 3 3 | 1 1 | 1 1 |
    256 | 3 3 | 1 1 | 1 1 | 3 3, 2 2, 0 0
    512 | 5 4 | 1 1 | 0 0 |
"""
LIP = """
    96  | 5 7 7 | 1 2 2 | 0 0 0 | 1 3 3, 1 2 2, 0 0 0
    256 | 1 5 5 | 1 2 2 | 0 1 1 | 1 3 3, 1 2 2, 0 1 1
    256 | 1 3 3 | 1 1 1 | 0 1 1 |
    256 | 1 3 3 | 1 1 1 | 0 1 1 |
    256 | 1 3 3 | 1 1 1 | 0 1 1 | 1 3 3, 1 2 2, 0 0 0
    512 | 1 6 6 | 1 1 1 | 0 0 0 |
"""


class SyncNet(nn.Module):
    """Both towers; layers keep their published positions, which are the names of the weights."""

    def __init__(self):
        super().__init__()
        self.netcnnaud = _tower(AUDIO, 1, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        self.netfcaud = _head()
        self.netcnnlip = _tower(LIP, 3, nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
        self.netfclip = _head()
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "SyncNet":
        """With the published weights in `folder`; raises UserError as `eval.networks.weights.locate` does."""
        return load_network("syncnet", cls(), folder).to(device)

    def lip(self, windows: Float[Tensor, "v 3 5 224 224"]) -> Float[Tensor, "v 1024"]:
        """BGR windows, 0..255 -> their features."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))

    def audio(self, windows: Float[Tensor, "v 1 13 20"]) -> Float[Tensor, "v 1024"]:
        """MFCC windows -> their features."""
        return self.netfcaud(self.netcnnaud(windows).flatten(1))

    def features(
        self,
        faces: UInt8[Tensor, "t 3 224 224"],
        mfcc: Float[Tensor, "f 13"],
        num_windows: int,
        batch_size: int = 20,
    ) -> tuple[Float[Tensor, "v 1024"], Float[Tensor, "v 1024"]]:
        """RGB face crops at 25 fps and MFCC rows at 100 a second -> lip and audio features, fp32 on the CPU.

        `num_windows` is `windows_of(frames, samples)`. Raises UserError where crops or rows are too few or of another kind.
        """
        device, lips_in = next(self.parameters()).device, lip_input(faces, num_windows)
        with exact():
            lips = [self.lip(part.to(device).contiguous()).float().cpu() for part in lips_in.split(batch_size)]
        return torch.cat(lips), self.voice(mfcc, num_windows, batch_size)

    def voice(self, mfcc: Float[Tensor, "f 13"], num_windows: int, batch_size: int = 20) -> Float[Tensor, "v 1024"]:
        """The audio features alone."""
        device, audio_in = next(self.parameters()).device, audio_input(mfcc, num_windows)
        with exact():
            return torch.cat([self.audio(part.to(device)).float().cpu() for part in audio_in.split(batch_size)])


def windows_of(num_frames: int, num_samples: int) -> int:
    """V of a clip at 25 fps and 16 kHz, as published: min(frames, samples // 640) - 5, one less than would fit.

    Raises UserError where none is left.
    """
    shared = min(num_frames, num_samples * FPS // SAMPLE_RATE)
    if shared <= FRAMES:
        raise UserError(
            f"SyncNet needs at least {FRAMES + 1} frames at {FPS} fps with their sound: got {num_frames} frames and "
            f"{num_samples} samples; evaluate longer clips"
        )
    return shared - FRAMES


def lip_input(faces: UInt8[Tensor, "t 3 224 224"], num_windows: int) -> Float[Tensor, "v 3 5 224 224"]:
    """RGB crops -> windows of 5 frames, 1 apart, in BGR, 0..255 as they are; a view, so that no frame is held five times."""
    needed = num_windows + FRAMES - 1
    if faces.dtype != torch.uint8 or faces.shape[1:] != (3, SIDE, SIDE) or len(faces) < needed:
        raise UserError(
            f"SyncNet sees at least {needed} uint8 face crops [T, 3, {SIDE}, {SIDE}]: got {faces.dtype} "
            f"{tuple(faces.shape)}; crop them with crop_faces"
        )
    return lip_windows(faces[:needed].float())


def lip_windows(faces: Float[Tensor, "t 3 h w"]) -> Float[Tensor, "v 3 5 h w"]:
    """RGB frames -> windows of 5, 1 apart, in BGR."""
    return faces.flip(1).unfold(0, FRAMES, 1).movedim(4, 2)


def audio_input(mfcc: Float[Tensor, "f 13"], num_windows: int) -> Float[Tensor, "v 1 13 20"]:
    """MFCC rows -> windows of 20 rows, 4 apart, coefficients down and time across."""
    needed = ROWS_A_FRAME * (num_windows - 1) + ROWS
    if mfcc.ndim != 2 or mfcc.shape[1] != COEFFICIENTS or len(mfcc) < needed:
        raise UserError(
            f"SyncNet needs at least {needed} MFCC rows of {COEFFICIENTS}: got {tuple(mfcc.shape)}; give the whole sound"
        )
    return mfcc[:needed].float().unfold(0, ROWS, ROWS_A_FRAME)[:, None]


def crop_faces(
    frames: UInt8[Tensor, "t 3 h w"], box: Float[Tensor, "4"], crop_scale: float = CROP_SCALE
) -> UInt8[Tensor, "t 3 224 224"]:
    """Square crops around a face box, as run_pipeline.py of syncnet_python makes them.

    The box is left, top, right, bottom in pixels. With s half its longer side and c = crop_scale, the crop spans x - s (1 + c) ..
    x + s (1 + c) and y - s .. y + s (1 + 2c) around the centre x, y: a square of 2.8 s, shifted down. Outside the frame it is grey
    110. Raises UserError for a box that is empty, larger than twice the frame or centred outside it.
    """
    check_frames(frames, "SyncNet")
    margin, rows, columns = _crop(frames.shape[-2:], box, crop_scale)
    padded = (F.pad(frame, (margin, margin, margin, margin), value=PAD_VALUE) for frame in frames.cpu())
    return torch.stack([resize_cv2(frame[:, rows, columns], SIDE) for frame in padded])


def crop_faces_float(
    frames: Float[Tensor, "t 3 h w"], box: Float[Tensor, "4"], crop_scale: float = CROP_SCALE
) -> Float[Tensor, "t 3 224 224"]:
    """`crop_faces` of frames 0..255 that are no integers, with their gradient: the same to the rounding."""
    margin, rows, columns = _crop(frames.shape[-2:], box, crop_scale)
    padded = F.pad(frames, (margin, margin, margin, margin), value=PAD_VALUE)[:, :, rows, columns]
    return F.interpolate(padded, (SIDE, SIDE), mode="bilinear", align_corners=False)


def _crop(size: Sequence[int], box: Tensor, crop_scale: float) -> tuple[int, slice, slice]:
    """The margin around frames of that size, and the rows and columns of the crop in what it makes of them."""
    height, width = size
    left, top, right, bottom = box.double().tolist()
    half, x, y = max(bottom - top, right - left) / 2, (left + right) / 2, (top + bottom) / 2
    inside = 0 <= x <= width and 0 <= y <= height and 0.5 <= half <= max(height, width)
    if not (inside and right > left and bottom > top):  # NaN fails too
        raise UserError(
            f"face box {left:g}, {top:g}, {right:g}, {bottom:g} does not fit a frame of {width} x {height}; "
            "boxes are left, top, right, bottom in pixels"
        )
    margin = int(half * (1 + 2 * crop_scale))
    x, y = x + margin, y + margin
    rows = slice(int(y - half), int(y + half * (1 + 2 * crop_scale)))
    columns = slice(int(x - half * (1 + crop_scale)), int(x + half * (1 + crop_scale)))
    return margin, rows, columns


def resize_cv2(image: UInt8[Tensor, "c h w"], side: int) -> UInt8[Tensor, "c s s"]:
    """cv2.resize with INTER_LINEAR of uint8: half-pixel centres, edges repeated, no antialias, weights of 11 bits, to the bit."""
    low, high, of_low, of_high = _taps(image.shape[2], side)
    image = image.int()
    across = (image.index_select(2, low) * of_low + image.index_select(2, high) * of_high) >> 4
    low, high, of_low, of_high = _taps(image.shape[1], side)
    mixed = across.index_select(1, low).mul_(of_low[:, None]).bitwise_right_shift_(16)
    mixed += across.index_select(1, high).mul_(of_high[:, None]).bitwise_right_shift_(16)
    return mixed.add_(2).bitwise_right_shift_(2).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _taps(size: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each output pixel the two input pixels around it, the edge twice beyond an edge, and their weights in 1 / 2048."""
    place = ((torch.arange(side, dtype=torch.float64) + 0.5) * (1 / (side / size)) - 0.5).float()
    low = place.floor()
    share = place - low
    of_low, of_high = ((1 - share) * 2048).round().int(), (share * 2048).round().int()
    return low.long().clamp(0, size - 1), (low.long() + 1).clamp(0, size - 1), of_low, of_high


def _tower(table: str, inputs: int, conv: type, norm: type, pool: type) -> nn.Sequential:
    layers: list[nn.Module] = []
    for row in table.strip().splitlines():
        width, kernel, stride, padding, pooling = (cell.strip() for cell in row.split("|"))
        layers += [conv(inputs, int(width), _ints(kernel), _ints(stride), _ints(padding)), norm(int(width)), nn.ReLU()]
        if pooling:
            layers.append(pool(*(_ints(cell) for cell in pooling.split(","))))
        inputs = int(width)
    return nn.Sequential(*layers)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, DIM))


def _ints(cell: str) -> tuple[int, ...]:
    return tuple(int(number) for number in cell.split())

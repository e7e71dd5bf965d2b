"""Where the face is: OpenCV's cascade of Haar features for pictures and clips; a template without weights for clips.

The cascade (Viola and Jones 2001; Lienhart's `haarcascade_frontalface_alt2`) ships inside opencv-python-headless 4 (Apache-2.0,
the file under Intel's licence, BSD-3-clause in substance): `pip install 'avatar-distill[face]'`. It finds upright frontal faces
from some 4 % of the longer side on. Without it, or where it finds none, a clip is searched by `face_template`, which needs motion;
a still picture then has no face.
"""

import importlib.util
import threading
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from teachers.media import face_template
from teachers.media.crop import Box, around, fit_image, shape_within

CASCADE = "haarcascade_frontalface_alt2.xml"
LONG_SIDE, SMALLEST = 640, 24  # pixels of the image that is searched, and of the smallest face in it
STEP, NEIGHBOURS = 1.1, 5  # ratio of two sizes; matches of which a detection is made
WEAK = 0.5  # share of the strongest detection's matches below which another one is dropped
WIDTH, TOP, HEIGHT = 0.82, 0.01, 1.02  # the box of brow to chin, in units of the cascade's square
SURE = 0.1  # confidence of the template from which a clip is cropped around its box
INSTALL = "pip install 'avatar-distill[face]'"
_one_at_a_time = threading.Lock()  # the cascade keeps its working memory


@lru_cache(maxsize=1)
def _cascade() -> Any:
    """The detector, None where it is not installed (OpenCV 5 has no cascades)."""
    if importlib.util.find_spec("cv2") is None:
        return None
    import cv2

    cv2.setNumThreads(0)  # its pool does not survive a fork, and workers share the cores already
    made = getattr(cv2, "CascadeClassifier", None)
    found = made(cv2.data.haarcascades + CASCADE) if made is not None else None  # pyright: ignore  # its stub has no data
    return None if found is None or found.empty() else found


def detector() -> str:
    """Which detector is at hand, in words that are the same as long as it finds the same faces; "" without one."""
    if _cascade() is None:
        return ""
    import cv2

    return f"opencv {cv2.__version__} {CASCADE.removesuffix('.xml')}"


def find_faces(pixels: UInt8[Tensor, "h w 3"]) -> list[Box]:
    """The faces of an upright picture, the largest first; [] also without a detector."""
    cascade = _cascade()
    if cascade is None:
        return []
    height, width = pixels.shape[:2]
    ratio = min(1.0, LONG_SIDE / max(height, width))
    image = pixels.permute(2, 0, 1)[None]
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    if size != (height, width):
        image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    red, green, blue = image[0].float()
    grey = (0.299 * red + 0.587 * green + 0.114 * blue).round().byte().numpy()
    with _one_at_a_time:
        found, matches = cascade.detectMultiScale2(grey, STEP, NEIGHBOURS, minSize=(SMALLEST, SMALLEST))
    least, boxes = WEAK * max(matches, default=0), []
    sure = [tuple(map(int, one)) for one, count in zip(found, matches, strict=True) if count >= least]
    for x, y, side, _ in sorted(sure, key=lambda one: (-one[2], one)):
        left, top = x + (1 - WIDTH) / 2 * side, y + TOP * side
        boxes.append(
            Box(left / size[1], top / size[0], WIDTH * side / size[1], HEIGHT * side / size[0], confidence=1.0)
        )
    return boxes


def find_in_clip(
    frames: UInt8[Tensor, "t h w 3"], motion: Float[Tensor, "h w"] | None = None, everywhere: bool = False
) -> Box | None:
    """The face of a clip from some of its frames and its mean change (levels a frame): the median of the largest ones, or with
    `everywhere` the box that holds them all. Its confidence is the share of frames that have one; where none has, the
    template's. None where nothing is found."""
    found = [boxes[0] for boxes in (find_faces(frame) for frame in frames) if boxes]
    if found:
        share = len(found) / len(frames)
        middle = torch.tensor([[b.x, b.y, b.width, b.height] for b in found]).median(0).values.tolist()
        near = [
            box for box in found if abs(box.x - middle[0]) < 2 * middle[2] and abs(box.y - middle[1]) < 2 * middle[3]
        ]
        whole = around(near) if everywhere else None
        sides = middle if whole is None else [whole.x, whole.y, whole.width, whole.height]
        return Box(*sides, confidence=share)
    return None if motion is None else face_template.locate(frames, motion)


def fit_portrait(
    pixels: UInt8[Tensor, "h w 3"], size: tuple[int, int], crop: str = "face"
) -> tuple[Float[Tensor, "3 h2 w2"], str]:
    """`pixels` uint8 [h, w, 3] to [3, H, W] in [-1, 1] by the rule `crop` (`teachers.media.crop`), and what the user should know:
    why the face was not used, "" where it was or there was nothing to choose."""
    source = pixels.shape[1], pixels.shape[0]
    if crop != "face" or shape_within(source, size) == source:
        return fit_image(pixels, size, crop), ""
    faces = find_faces(pixels)
    note = ""
    if not faces:
        reason = "no face was found" if detector() else f"no face detector is installed ({INSTALL})"
        note = f"{reason}: the top of the picture is kept"
    return fit_image(pixels, size, crop, faces[0] if faces else None), note

"""Where a clip is cropped, and what that leaves of its face."""

from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.datasets.manifest import Clip
from teachers.errors import UserError
from teachers.media import face
from teachers.media.container import upright
from teachers.media.crop import Box, place, shape_within
from teachers.media.film import read_frames

LOOK_SECONDS, MOST_LOOKS = Fraction(1), 16  # between the frames in which the face is searched, and their number at most
SMALL_SIDE = 640  # longer side of the frames that are searched, in pixels
CUT = 0.02  # share of a face outside the frame from which it is named


def crop_box(
    clip: Clip,
    source: tuple[int, int],
    size: tuple[int, int] | None,
    crop: str = "center",
    find: Callable[[], Box | None] = lambda: None,
) -> tuple[int, int, int, int]:
    """x, y, width, height in pixels of an upright frame of `source` = (w, h).

    The clip's crop, scaled where it was measured in a frame of another size but the same shape; of it the largest part that has
    the shape of `size` = (H, W), by the rule `crop`, or even sides where `size` is None. `find` gives the face in fractions of the
    frame, and is asked only where that matters. Raises UserError for a crop that does not fit.
    """
    width, height = source
    x, y, w, h = clip.crop or (0, 0, width, height)
    if clip.crop is not None and clip.crop_size not in (None, source):
        across, down = Fraction(width, clip.crop_size[0]), Fraction(height, clip.crop_size[1])
        if abs(across / down - 1) > Fraction(1, 100):
            raise UserError(f"crop was measured in a frame of {clip.crop_size}, the video has another shape: {source}")
        x, w = round(x * across), min(round(w * across), width - round(x * across))
        y, h = round(y * down), min(round(h * down), height - round(y * down))
    if w < 1 or h < 1 or x < 0 or y < 0 or x + w > width or y + h > height:
        raise UserError(f"crop lies outside the frame: got {(x, y, w, h)} of {source}")
    if size is None:
        if min(w, h) < 2:
            raise UserError(f"crop is smaller than 2 x 2 pixels: got {(x, y, w, h)}")
        return x, y, w // 2 * 2, h // 2 * 2
    seen = find() if crop == "face" and shape_within((w, h), size) != (w, h) else None
    own = None if seen is None else seen.inside(source, (x, y, w, h))
    left, top, width, height = place((w, h), size, crop, own)
    return x + left, y + top, width, height


def find_face(path: Path, start: Fraction, end: Fraction | None) -> Box | None:
    """The box that holds the face throughout a stretch of a video, in fractions of the upright frame, from a frame a second or 16
    of them; None where there is none. Raises as `read_frames`."""
    step = LOOK_SECONDS if end is None else max(LOOK_SECONDS, (end - start) / MOST_LOOKS)
    looks, motions, wanted = [], [], start
    with closing(read_frames(path, start)) as source:
        for frame in source:
            if end is not None and frame.time >= end and looks:
                break
            if frame.time + frame.duration > wanted:
                pair = [_small(upright(one.frame)) for one in (frame, *islice(source, 1))]
                looks.append(pair[0])
                motions.append((pair[-1].float() - pair[0].float()).abs().mean(2))
                wanted += step
            if len(looks) == MOST_LOOKS:
                break
    found = face.find_in_clip(torch.stack(looks), torch.stack(motions).mean(0), everywhere=True)
    return found if found is not None and found.confidence >= face.SURE else None


def _small(pixels: np.ndarray) -> Tensor:
    """uint8 [h, w, 3] with a longer side of at most 640 pixels."""
    ratio = min(1.0, SMALL_SIDE / max(pixels.shape[:2]))
    size = [max(1, round(side * ratio)) for side in pixels.shape[:2]]
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = image if ratio == 1 else F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    return small[0].permute(1, 2, 0)


class FaceWatch:
    """What a crop leaves of the faces that a detector finds in the whole frames, one a second."""

    def __init__(self):
        self.next, self.found, self.cuts = Fraction(0), 0, [0.0]

    def look(self, pixels: np.ndarray, window: tuple[int, int, int, int], time: Fraction) -> None:
        """A whole upright frame [h, w, 3], of which the part `window` (x, y, width, height) is kept, at `time` s of the clip."""
        if time < self.next or not face.detector():
            return
        self.next = time + LOOK_SECONDS
        faces = face.find_faces(_small(pixels))
        if faces:
            self.found += 1
            self.cuts.append(faces[0].inside((pixels.shape[1], pixels.shape[0]), window).cut)

    @property
    def metadata(self) -> dict[str, float | None]:
        """`face_cut`: the largest share of the face that lies outside the clip's frame, None where no face was found."""
        return {"face_cut": round(max(self.cuts), 3) if self.found else None}

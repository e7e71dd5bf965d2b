"""The film that `distill sample --film` dubs: its frames at the student's rate and size, and where the mouth is in each."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from students.serving.dubbing import blend, weights
from students.spec import Spec
from teachers.errors import UserError
from teachers.media.container import upright
from teachers.media.crop import Box, fit_image, place
from teachers.media.face import INSTALL, detector, find_faces
from teachers.media.film import read_frames

LEFT, TOP, RIGHT, BOTTOM = (
    0.05,
    0.45,
    0.95,
    1.15,
)  # the region in units of a face's box from brow to chin: the jaw may fall
ROUNDING = Fraction(1, 1000)  # seconds, of times in files
STEADY = 5  # frames, of whose boxes the median is taken


def read_region(text: str) -> Tensor:
    """The box [4] that `left,top,right,bottom` in fractions of the frame says; UserError for another text."""
    try:
        box = torch.tensor([float(word) for word in text.split(",")])
    except ValueError as error:
        raise UserError(f"--region: {error}; write left,top,right,bottom in fractions, 0.25,0.5,0.75,1") from error
    if box.shape != (4,) or not torch.isfinite(box).all() or not (box[:2] < box[2:]).all():
        raise UserError(f"--region: got {text}; write left,top,right,bottom in fractions, 0.25,0.5,0.75,1")
    return box


class Film:
    """Frames uint8 [n, H, W, 3] of a video with their regions [n, 4], handed out as the sound goes on; the last one holds.

    A frame shows what the video shows at its time. All have one crop (`teachers.media.crop`), chosen by the first one. `region`:
    one box for all in fractions of the crop; without it the face is found in each frame. UserError where the first has none.
    `paste` puts what was drawn back into the whole frames, which are held until then.
    """

    def __init__(self, path: Path, spec: Spec, crop: str, region: Tensor | None):
        self.path, self.spec, self.region = path, spec, region
        self.ended: int | None = None  # how many frames there were
        self._source = self._timed()
        self._boxes: deque[Tensor] = deque(maxlen=STEADY)
        pixels = next(self._source)
        faces = find_faces(pixels) if crop == "face" or region is None else []
        if not faces and region is None:
            reason = "has no face in its first frame" if detector() else f"needs a face detector ({INSTALL})"
            raise UserError(
                f"--film {reason}: {path}; give what is drawn by --region left,top,right,bottom in fractions"
            )
        self._shape = pixels.shape
        self._held: deque[tuple[Tensor, Tensor]] = deque()  # whole frames and their regions, not pasted yet
        self._part = place(
            (pixels.shape[1], pixels.shape[0]), (spec.height, spec.width), crop, faces[0] if faces else None
        )
        self._pixels, self._last = pixels, self._fitted(pixels, faces)
        self._given = 0

    @property
    def first(self) -> Tensor:
        """The picture [3, H, W] in [-1, 1] that the stream begins with."""
        return self._last[0].permute(2, 0, 1).float() / 127.5 - 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the whole frames."""
        return self._shape[0], self._shape[1]

    def paste(self, drawn: Tensor) -> Tensor:
        """The next whole frames uint8 [n, h, w, 3] with what was drawn [n, H, W, 3] of their crops, within the regions alone."""
        x, y, width, height = self._part
        whole = []
        for frame in drawn:
            pixels, box = self._held.popleft()
            made = (fit_image(frame, (height, width)) + 1) * 127.5
            part = pixels[y : y + height, x : x + width][None]
            pixels = pixels.clone()
            mixed = blend(part, made.round().byte().permute(1, 2, 0)[None], weights(box[None], height, width))
            pixels[y : y + height, x : x + width] = mixed[0]
            whole.append(pixels)
        return torch.stack(whole) if whole else drawn.new_zeros(0, *self._shape)

    def until(self, frame: int) -> tuple[Tensor, Tensor]:
        """Frames and regions before frame number `frame` that were not handed out yet."""
        made = [self._take(number) for number in range(self._given, frame)]
        self._given = max(self._given, frame)
        if not made:
            return self._last[0].new_zeros(0, *self._last[0].shape), torch.zeros(0, 4)
        frames, regions = zip(*made, strict=True)
        return torch.stack(frames), torch.stack(regions)

    def _take(self, number: int) -> tuple[Tensor, Tensor]:
        if number and self.ended is None:
            pixels = next(self._source, None)
            if pixels is None:
                self.ended = number
            else:
                self._pixels = pixels
                self._last = self._fitted(pixels, find_faces(pixels) if self.region is None else [])
        self._held.append((self._pixels, self._last[1]))
        return self._last

    def _timed(self) -> Iterator[Tensor]:
        """What the video shows at the time of each frame, uint8 [h, w, 3]."""
        number, shown = 0, None
        with closing(read_frames(self.path)) as source:
            for picture in source:
                while shown is not None and Fraction(number) / self.spec.fps < picture.time:
                    yield shown
                    number += 1
                shown, end = torch.from_numpy(upright(picture.frame)), picture.time + picture.duration
        assert shown is not None  # read_frames gives one at least
        for _ in range(number, max(1, math.ceil((end - ROUNDING) * self.spec.fps))):
            yield shown

    def _fitted(self, pixels: Tensor, faces: list[Box]) -> tuple[Tensor, Tensor]:
        """A frame of the student's size, and its region."""
        if pixels.shape != self._shape:
            raise UserError(f"frames change their size: {self.path}; convert the video to one size")
        x, y, width, height = self._part
        part = pixels[y : y + height, x : x + width]
        frame = ((fit_image(part, (self.spec.height, self.spec.width)) + 1) * 127.5).round().byte().permute(1, 2, 0)
        if self.region is not None:
            return frame, self.region
        if faces:
            face = faces[0].inside((pixels.shape[1], pixels.shape[0]), self._part)
            corner, sides = torch.tensor([face.x, face.y] * 2), torch.tensor([face.width, face.height] * 2)
            self._boxes.append(corner + sides * torch.tensor([LEFT, TOP, RIGHT, BOTTOM]))
        return frame, torch.stack(list(self._boxes)).median(dim=0).values

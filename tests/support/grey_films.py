"""Tiny grey films for the tests of the data readers, which look at names, sizes and lengths alone."""

from pathlib import Path

import av
import numpy as np


def put_film(path: Path, width: int = 64, height: int = 48, frames: int = 5, fps: int = 25, turned: int = 0) -> Path:
    """Write a grey film; `turned` degrees is the rotation that the file asks a player for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
        stream = container.add_stream(codec, rate=fps, width=width, height=height, pix_fmt="yuv420p")
        if turned:
            stream.set_display_rotation(turned)
        for _ in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((height, width, 3), 128, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path

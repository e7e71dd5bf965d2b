"""What a viewer's video costs by format: bytes a second, milliseconds of one core a frame, PSNR; chunk after chunk, as it is sent.

    python benchmarks/serving/codecs.py [--video FILE] [--size 512] [--fps 25] [--seconds 8] [--chunk 8] [--json OUT]

Each frame of a chunk is encoded as it comes, nothing is looked ahead, one thread. Without a video a drawn face talks. The network's
delay of a chunk is its bytes over the line: given for 10 Mbit/s. A script, not a test; it writes nothing but OUT.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

LINE = 10e6  # bits a second of a viewer's line
VIDEO = {
    "H.264 fast": ("libx264", {"preset": "ultrafast", "tune": "zerolatency", "crf": "23"}),
    "H.264": ("libx264", {"preset": "veryfast", "tune": "zerolatency", "crf": "23"}),
    "VP8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": "16", "b": "2500k"}),
    "VP9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": "30", "b": "0"}),
}


def drawn(size: int, fps: int, seconds: int) -> np.ndarray:
    """uint8 [T, H, W, 3] of a face of the procedural world."""
    from distill.data.procedural import render

    config = render.WorldConfig(resolution=size, num_frames=fps * seconds + 1, fps=Fraction(fps))
    rng = torch.Generator().manual_seed(3)
    clip = render.make_clips(config, render.draw_conditions(config, 1, rng), rng).video
    return clip[0].permute(1, 2, 3, 0).contiguous().numpy()


def filmed(file: Path, size: int, frames: int) -> np.ndarray:
    """The same of a video, cut to a square and scaled; it goes to and fro where it is too short."""
    found = []
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            pixels = Image.fromarray(frame.to_ndarray(format="rgb24"))
            side = min(pixels.size)
            left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
            found.append(np.asarray(pixels.crop((left, top, left + side, top + side)).resize((size, size))))
            if len(found) == frames:
                break
    order = (
        np.abs((np.arange(frames) + len(found) - 1) % (2 * len(found) - 2) - (len(found) - 1)) if len(found) > 1 else []
    )
    return np.stack([found[i] for i in order])


def picture(kind: str, **options) -> Callable[[np.ndarray], tuple[bytes, np.ndarray]]:
    """Encodes a frame by itself."""

    def encode(frame: np.ndarray) -> tuple[bytes, np.ndarray]:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, kind, **options)
        return file.getvalue(), frame

    return encode


def still(video: np.ndarray, encode: Callable) -> dict:
    """Bytes of every frame, seconds of every encode, and the frames as they are decoded."""
    sizes, seconds, seen = [], [], []
    for frame in video:
        began = time.perf_counter()
        data, _ = encode(frame)
        seconds.append(time.perf_counter() - began)
        sizes.append(len(data))
        seen.append(np.asarray(Image.open(io.BytesIO(data))))
    return {"sizes": sizes, "seconds": seconds, "seen": np.stack(seen)}


def moving(video: np.ndarray, fps: int, name: str, options: dict[str, str]) -> dict:
    """The same of a video codec, which gives a packet for each frame."""
    encoder = av.CodecContext.create(name, "w")
    encoder.width, encoder.height, encoder.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, fps), Fraction(fps), 10_000
    encoder.thread_count = 1
    options = dict(options)
    encoder.bit_rate = int(float(options.pop("b", "0k").rstrip("k")) * 1000)
    encoder.options = options
    decoder = av.CodecContext.create({"libx264": "h264", "libvpx": "vp8", "libvpx-vp9": "vp9"}[name], "r")
    decoder.thread_count = 1
    decoder.flags |= av.codec.context.Flags.low_delay
    sizes, seconds, seen, late = [], [], [], 0
    for number, frame in enumerate(video):
        began = time.perf_counter()
        one = av.VideoFrame.from_ndarray(frame, format="rgb24")
        one.pts = number
        packets = encoder.encode(one)
        seconds.append(time.perf_counter() - began)
        sizes.append(sum(packet.size for packet in packets))
        late = max(late, number + 1 - sum(size > 0 for size in sizes))
        for packet in packets:
            seen += [found.to_ndarray(format="rgb24") for found in decoder.decode(packet)]
    seen += [found.to_ndarray(format="rgb24") for found in decoder.decode(None)]
    return {"sizes": sizes, "seconds": seconds, "seen": np.stack(seen), "frames behind": late}


def row(video: np.ndarray, found: dict, fps: int, chunk: int) -> dict[str, float]:
    seen = found["seen"]
    errors = [(np.float32(a) - np.float32(b)) ** 2 for a, b in zip(video[: len(seen)], seen, strict=True)]
    psnr = [10 * np.log10(255**2 / max(float(error.mean()), 1e-3)) for error in errors]
    rate = 8 * sum(found["sizes"]) / len(video) * fps
    chunks = [sum(found["sizes"][i : i + chunk]) for i in range(0, len(video), chunk)]
    return {
        "Mbit/s": rate / 1e6,
        "encode ms a frame": 1000 * float(np.median(found["seconds"])),
        "PSNR dB": float(np.mean(psnr)),
        "first chunk ms on the line": 8000 * chunks[0] / LINE,
        "chunk ms on the line": 8000 * float(np.median(chunks)) / LINE,
        "frames behind": found.get("frames behind", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=8, help="frames of a chunk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.video:
        video = filmed(args.video, args.size, args.fps * args.seconds)
    else:
        video = drawn(args.size, args.fps, args.seconds)
    rows = {"raw": {"Mbit/s": 8 * video[0].size * args.fps / 1e6}}
    rows["JPEG 90"] = row(video, still(video, picture("JPEG", quality=90)), args.fps, args.chunk)
    rows["WebP 80"] = row(video, still(video, picture("WEBP", quality=80, method=0)), args.fps, args.chunk)
    for name, (codec, options) in VIDEO.items():
        rows[name] = row(video, moving(video, args.fps, codec, options), args.fps, args.chunk)
    for name, found in rows.items():
        print(name, {key: round(value, 2) for key, value in found.items()})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A viewer's stream over a line that loses packets: the page's WebSocket (TCP) beside WebRTC (aiortc). Linux, as root.

    pip install aiortc && python benchmarks/serving/loss.py [--loss 0 1 3 5] [--delay 20] [--rate 10] [--seconds 60] [--json OUT]

Server and viewer have a network namespace each, joined by two TUN devices; between them every packet of both directions waits for
its turn on a line of `--rate` Mbit/s, then for `--delay` ms, and is lost with a chance of `--loss` percent. TCP and UDP are the
kernel's own, nothing of the machine's network is changed. Chunks of 8 frames, 512x512 at 25 frames/s, VP8 both ways: the server
sends a chunk as soon as it is drawn, WebRTC a frame at a time. Late is what comes after its place in a video that begins as its
chunk is drawn: a viewer that waits as long as the latest frame sees no stall.
"""

import argparse
import asyncio
import ctypes
import fcntl
import heapq
import json
import multiprocessing
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from benchmarks.serving.codecs import drawn  # noqa: E402, of a script started by its path
from distill.live.protocol import HEADER, pack_chunk  # noqa: E402
from students.serving.session import Chunk  # noqa: E402
from teachers.encoders.small import SAMPLE_RATE  # noqa: E402
from teachers.media.realtime import Vp8Encoder  # noqa: E402

SIZE, FPS, CHUNK = 512, 25, 8
SERVER, VIEWER, PORT = "10.9.0.1", "10.9.0.2", 8000
QUEUE = 0.2  # seconds of the line that may wait for it
BITS, CELL = 12, 32  # of a frame's number, painted into it; pixels of a bit
WHOLE = 30.0  # dB: a frame with less is damaged
TUNSETIFF, TUN_WITHOUT_HEADER, NEW_NETWORK = 0x400454CA, 0x1001, 0x40000000


@dataclass
class Direction:
    """One way of the line. `leaves(now, size)`: when a packet of `size` bytes that comes now is at the other end, None where it is
    lost by chance or finds the queue full."""

    loss: float
    delay: float
    bits: float
    rng: random.Random
    free: float = 0.0
    carried: int = 0

    def leaves(self, now: float, size: int) -> float | None:
        begins = max(now, self.free)
        if begins - now > QUEUE:
            return None
        self.free = begins + 8 * size / self.bits
        self.carried += size
        return None if self.rng.random() < self.loss else self.free + self.delay


def relay(ends: list[int], ways: list[Direction], ended: threading.Event) -> None:
    """Carries packets between two TUN devices until `ended`."""
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while not ended.is_set():
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, end, packet = heapq.heappop(waiting)
            os.write(end, packet)
        wait = min(0.05, waiting[0][0] - now if waiting else 0.05)
        for end in select.select(ends, [], [], max(0, wait))[0]:
            number = ends.index(end)
            packet = os.read(end, 65536)
            if (at := ways[number].leaves(time.monotonic(), len(packet))) is not None:
                count += 1
                heapq.heappush(waiting, (at, count, ends[1 - number], packet))


def enter(address: str, handed: socket.socket) -> None:
    """This process into a network of its own with one device, which is handed to who carries its packets."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
        raise SystemExit(f"no network namespace ({os.strerror(ctypes.get_errno())}); run as root, on Linux")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"line", TUN_WITHOUT_HEADER))
    for words in (f"addr add {address}/24 dev line", "link set line up", "link set lo up"):
        subprocess.run(["ip", *words.split()], check=True)
    socket.send_fds(handed, [b"."], [device])
    os.close(device)


@dataclass(frozen=True)
class Video:
    """What is sent: frames uint8 [T, H, W, 3], over and over, `num_frames` in all; each names its number."""

    frames: np.ndarray
    num_frames: int

    def frame(self, number: int) -> np.ndarray:
        """A frame with its number in the first row of cells."""
        picture = self.frames[number % len(self.frames)].copy()
        bits = np.array([255 * (number >> bit & 1) for bit in range(BITS)], np.uint8)
        picture[:CELL, : BITS * CELL] = bits.repeat(CELL)[None, :, None]
        return picture

    def error(self, picture: np.ndarray) -> tuple[int, float]:
        """The number that a received frame names, and its PSNR."""
        cells = picture[:CELL, : BITS * CELL].reshape(CELL, BITS, CELL, 3).mean(axis=(0, 2, 3))
        number = int((cells > 127) @ (1 << np.arange(BITS)))
        mean = float(np.square(np.float32(picture[CELL:]) - self.frame(number)[CELL:]).mean())
        return number, 10 * np.log10(255**2 / max(mean, 1e-3))

    def chunk(self, number: int) -> Chunk:
        first = number * CHUNK
        frames = torch.from_numpy(np.stack([self.frame(first + i) for i in range(CHUNK)]))
        sound = 0.1 * torch.randn(CHUNK * SAMPLE_RATE // FPS, generator=torch.Generator().manual_seed(number))
        return Chunk(index=number, first_frame=first, frames=frames, audio=sound, seconds={})


def due(began: float, number: int) -> float:
    """When a frame is to be seen by who waits for nothing."""
    return began + number / FPS


async def socket_server(shown: Video, pipe: Any, congestion: str) -> float:
    """Chunks as the server packs them, each at its time; when the first one was drawn."""
    from websockets.asyncio.server import serve

    began, done, encoder = [], asyncio.Event(), Vp8Encoder((SIZE, SIZE), Fraction(FPS))

    async def viewer(connection) -> None:
        tcp = connection.transport.get_extra_info("socket")
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        began.append(time.monotonic())
        for number in range(shown.num_frames // CHUNK):
            await asyncio.sleep(due(began[0], number * CHUNK) - time.monotonic())
            await connection.send(pack_chunk(shown.chunk(number), 0, encoder))
        await connection.wait_closed()
        done.set()

    async with serve(viewer, SERVER, PORT, compression=None, max_size=None, ping_interval=None):
        pipe.send("up")
        await done.wait()
    return began[0]


async def socket_viewer(shown: Video, pipe: Any) -> dict[int, tuple[float, float]]:
    """Frame -> when it was there and its PSNR."""
    from websockets.asyncio.client import connect

    pipe.recv()
    decoder, found = av.CodecContext.create("vp8", "r"), {}
    async with connect(f"ws://{SERVER}:{PORT}", compression=None, max_size=None, ping_interval=None) as connection:
        while len(found) < shown.num_frames:
            data = await connection.recv()
            now, place = time.monotonic(), HEADER.size
            for _ in range(CHUNK):
                (length,) = struct.unpack_from("<I", data, place)
                place += 4 + length
                for frame in decoder.decode(av.Packet(data[place - length : place])):
                    number, error = shown.error(frame.to_ndarray(format="rgb24"))
                    found[number] = (now, error)
    return found


def described(peer: Any) -> tuple[str, str]:
    """What the other end needs to know."""
    return peer.localDescription.sdp, peer.localDescription.type


async def webrtc_server(shown: Video, pipe: Any, _: str) -> float:
    """A frame at a time, and sound; when the first one was drawn."""
    from aiortc import AudioStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription, VideoStreamTrack

    began, done = [], asyncio.Event()

    class Frames(VideoStreamTrack):
        number = 0

        async def recv(self) -> av.VideoFrame:
            number, self.number = self.number, self.number + 1
            began[:] = began or [time.monotonic()]
            await asyncio.sleep(due(began[0], number) - time.monotonic())
            if number >= shown.num_frames:
                done.set()
                number = shown.num_frames - 1
            frame = av.VideoFrame.from_ndarray(shown.frame(number), format="rgb24")
            frame.pts, frame.time_base = self.number * 90_000 // FPS, Fraction(1, 90_000)
            return frame

    class Sound(AudioStreamTrack):
        async def recv(self) -> av.AudioFrame:
            frame = await super().recv()
            assert isinstance(frame, av.AudioFrame)
            noise = np.random.default_rng(0).integers(-3000, 3000, frame.samples, dtype=np.int16)
            frame.planes[0].update(noise.tobytes())
            return frame

    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    peer.addTrack(Frames())
    peer.addTrack(Sound())
    await peer.setLocalDescription(await peer.createOffer())
    pipe.send(described(peer))
    answer = await asyncio.to_thread(pipe.recv)
    await peer.setRemoteDescription(RTCSessionDescription(*answer))
    await done.wait()
    await asyncio.sleep(2)
    await peer.close()
    return began[0]


async def webrtc_viewer(shown: Video, pipe: Any) -> dict[int, tuple[float, float]]:
    """Frame -> when it was there first and its PSNR; until none comes for two seconds."""
    from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
    from aiortc.mediastreams import MediaStreamError

    peer, found, tracks = RTCPeerConnection(RTCConfiguration(iceServers=[])), {}, asyncio.Queue()
    peer.on("track", tracks.put_nowait)
    await peer.setRemoteDescription(RTCSessionDescription(*await asyncio.to_thread(pipe.recv)))
    await peer.setLocalDescription(await peer.createAnswer())
    pipe.send(described(peer))

    async def listen(track) -> None:
        while True:
            await track.recv()

    given = [await tracks.get(), await tracks.get()]
    listening = asyncio.create_task(listen(next(track for track in given if track.kind == "audio")))
    video = next(track for track in given if track.kind == "video")
    try:
        while True:
            frame = await asyncio.wait_for(video.recv(), 20 if not found else 2)
            now = time.monotonic()
            number, error = shown.error(frame.to_ndarray(format="rgb24"))
            found.setdefault(number, (now, error))
    except (TimeoutError, MediaStreamError):
        pass
    listening.cancel()
    await peer.close()
    return found


ROLES = {"WebSocket": (socket_server, socket_viewer), "WebRTC": (webrtc_server, webrtc_viewer)}


def play(way: str, address: str, handed: socket.socket, pipe: Any, answer: Any, shown: Video, congestion: str) -> None:
    """One end, in a process of its own."""
    enter(address, handed)
    torch.set_num_threads(1)
    server, viewer = ROLES[way]
    answer.send("ready")
    answer.recv()
    answer.send(asyncio.run(server(shown, pipe, congestion) if address == SERVER else viewer(shown, pipe)))


def measure(way: str, line: dict[str, float], shown: Video, congestion: str) -> dict[str, float]:
    """A video over a line."""
    context = multiprocessing.get_context("spawn")
    between, ends, answers, processes = context.Pipe(), [], [], []
    for address, pipe in zip((SERVER, VIEWER), between, strict=True):
        ours, theirs = socket.socketpair()
        answer, other = context.Pipe()
        words = (way, address, theirs, pipe, other, shown, congestion)
        processes.append(context.Process(target=play, args=words, daemon=True))
        processes[-1].start()
        ends.append(socket.recv_fds(ours, 1, 1)[1][0])
        answers.append(answer)
    bits, delay, loss = line["rate"] * 1e6, line["delay"] / 1000, line["loss"] / 100
    ways = [Direction(loss, delay, bits, random.Random(seed)) for seed in (1, 2)]
    ended = threading.Event()
    carrier = threading.Thread(target=relay, args=(ends, ways, ended), daemon=True)
    carrier.start()
    for answer in answers:
        answer.recv()
    for answer in answers:
        answer.send("go")
    found, began = answers[1].recv(), answers[0].recv()
    for process in processes:
        process.join()
    ended.set()
    carrier.join()
    for end in ends:
        os.close(end)
    to, back = (8e-6 * way.carried * FPS / shown.num_frames for way in ways)
    return row(found, began, shown.num_frames) | {"Mbit/s": to, "back": back}


def row(found: dict[int, tuple[float, float]], began: float, num: int) -> dict[str, float]:
    """Milliseconds after its place of each frame that came whole, and the shares of the others."""
    whole = {number: now for number, (now, error) in found.items() if error >= WHOLE}
    late = 1000 * np.array([now - due(began, number) for number, now in whole.items()])
    middle, many, all_but_one, most = np.percentile(late, [50, 95, 99, 100])
    rates = {"missing %": 100 * (1 - len(found) / num), "damaged %": 100 * (len(found) - len(whole)) / num}
    return {"late p50": middle, "p95": many, "p99": all_but_one, "most": most, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loss", type=float, nargs="+", default=[0, 1, 3, 5], help="percent of the packets, each way")
    parser.add_argument("--delay", type=float, default=20, help="milliseconds, each way")
    parser.add_argument("--rate", type=float, default=10, help="Mbit/s, each way")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--congestion", nargs="+", default=["cubic", "bbr"], help="TCP's, of the server")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.seconds * FPS >= 1 << BITS:
        raise SystemExit(f"--seconds: at most {(1 << BITS) // FPS}")
    shown, rows = Video(drawn(SIZE, FPS, 4)[: 4 * FPS], int(args.seconds * FPS) // CHUNK * CHUNK), {}
    for loss in args.loss:
        line = {"loss": loss, "delay": args.delay, "rate": args.rate}
        for way, congestion in [*(("WebSocket", one) for one in args.congestion), ("WebRTC", "")]:
            name = f"{loss:g} %, {way}{', ' * bool(congestion)}{congestion}"
            rows[name] = measure(way, line, shown, congestion)
            print(name, {key: round(float(value), 2) for key, value in rows[name].items()}, flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A server for hours, whose viewers come, talk and vanish, beside strangers who send nonsense; its memory, a row a minute.

    python benchmarks/serving/soak.py --student runs/dmd_avatar/student [--minutes 60] [--viewers 6] [--json OUT]

Viewers stay for 3 to 20 s and leave in every way there is: a clean close, a cut line, or they stop reading. Strangers send half
requests, silence, wrong names, garbage and floods. At the end SIGTERM, timed. A script, not a test; it writes nothing but OUT.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from benchmarks.serving.viewers import Flooder, Talker, counted, server

GONE = (ConnectionClosed, OSError, TimeoutError)


class Visitor(Talker):
    """Talks for a while, then leaves as `how` says: closes, cuts the line, or stops reading and is cut off."""

    async def visit(self, seconds: float, how: str) -> None:
        task = asyncio.create_task(self.run(time.monotonic() + seconds))
        await asyncio.sleep(seconds)
        if how == "freeze" and hasattr(self, "socket"):
            self.socket.transport.pause_reading()
            await asyncio.sleep(6.0)
        if how != "close" and hasattr(self, "socket"):
            self.socket.transport.abort()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


NONSENSE = (
    b"",
    b"GET / HT",
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\r\n",
    b"POST /live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\nabc",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 100_000,
)


async def stranger(host: str, port: int, rng: random.Random) -> None:
    """Nonsense, then silence until it is closed, or gone in the middle."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(rng.choice(NONSENSE))
        await asyncio.wait_for(reader.read(), rng.choice((0.1, 15.0)))
    except GONE:
        pass
    finally:
        writer.transport.abort()


async def garbage(url: str, rng: random.Random) -> None:
    """Messages that are none, until it is shut out."""
    async with connect(url, compression=None, proxy=None) as page:
        await page.recv()
        for _ in range(rng.randrange(1, 40)):
            await page.send(
                rng.choice(("{", "[]", '{"type": "open", "portrait": 99}', b"\x01GIF89a", rng.randbytes(50)))
            )
        await asyncio.sleep(0.5)


async def churn(url: str, viewers: int, minutes: float, process: psutil.Process, seed: int) -> list[dict[str, Any]]:
    """So many visitors at any time, and strangers; a row a minute."""
    rng, end, counts, rows = random.Random(seed), time.monotonic() + 60 * minutes, Counter(), []
    host, _, port = url.removeprefix("ws://").removesuffix("/live").partition(":")

    async def keep_coming(place: int) -> None:
        number = place
        while time.monotonic() < end:
            number += viewers
            try:
                await Visitor(url, number, seed).visit(
                    rng.uniform(3, 20), rng.choice(("close", "cut", "cut", "freeze"))
                )
                counts["visits"] += 1
            except GONE:
                counts["cut off"] += 1

    async def strange() -> None:
        while time.monotonic() < end:
            what = rng.random()
            try:
                if what < 0.75:
                    await stranger(host, int(port), rng)
                elif what < 0.95:
                    await garbage(url, rng)
                else:
                    await Flooder(url, 7, seed, True).run(time.monotonic() + 2)
                counts["strangers"] += 1
            except GONE:
                counts["strangers"] += 1
            await asyncio.sleep(rng.uniform(0, 1))

    tasks = [asyncio.create_task(keep_coming(i)) for i in range(viewers)]
    tasks += [asyncio.create_task(strange()) for _ in range(3)]
    with tqdm(total=round(minutes), unit="min", desc="soak") as bar:
        while time.monotonic() < end:
            await asyncio.sleep(min(60.0, max(end - time.monotonic(), 0.1)))
            children = [child.memory_info().rss for child in process.children(recursive=True)]
            rows.append(
                {
                    "resident_mib": round(process.memory_info().rss / 2**20, 1),
                    "decoders_mib": round(sum(children) / 2**20, 1),
                    "threads": process.num_threads(),
                    "files": process.num_fds(),
                    "viewers": await asyncio.to_thread(counted, url, "distill_viewers"),
                    "errors": await asyncio.to_thread(counted, url, "distill_stream_errors_total"),
                    **counts,
                }
            )
            bar.update()
            tqdm.write(json.dumps(rows[-1]))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--viewers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with server(args.student, args.threads, "--viewers", str(args.viewers + 2)) as (address, running):
        process, url = psutil.Process(running.pid), address.replace("http", "ws") + "live"
        rows = asyncio.run(churn(url, args.viewers, args.minutes, process, args.seed))
        time.sleep(8.0)  # whoever vanished last is noticed
        after = {"viewers": counted(url, "distill_viewers"), "files": process.num_fds()}
        began = time.monotonic()
        running.terminate()
        status = running.wait(60)
        after |= {"exit_status": status, "exit_seconds": round(time.monotonic() - began, 2)}
    half = rows[len(rows) // 2 :]
    after["mib_a_minute"] = round(
        statistics.linear_regression(range(len(half)), [r["resident_mib"] for r in half])[0], 3
    )
    print(json.dumps(after))
    if args.json:
        args.json.write_text(json.dumps({"load": os.getloadavg(), "minutes": rows, "after": after}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Everything that only a GPU can tell, in one command of eight minutes on one card, without a download.

    python benchmarks/gpu.py [--out runs/gpu] [--minutes 8] [--parts size bench.livetalk ...]
    python benchmarks/gpu.py --device cpu --quick        # the same code at a tiny size; what needs CUDA is skipped

tiny        whole recipes at size=tiny, with each engine of one process
size        two layers at real width: one update of each loss, its peak memory against the plan's, the TFLOP/s reached
bench       `distill bench` of a student of published shape: eager, fp8, compiled, as CUDA graphs
equality    small networks and codecs, CPU against GPU
tests       pytest -m gpu

Each part is a process with a time limit: one that fails or hangs is one line of the result, and the others go on. The same command
again runs what is not done yet, as long as code, torch and card are the same. OUT/gpu.json holds every number, OUT/gpu.md the page
that is printed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)
RECIPES = ("livetalk", "self_forcing", "omniavatar_one_gpu")
KINDS = ("ddp", "zero2", "zero3", "fsdp2")
TOGETHER = 12  # processes of tiny runs at once, where there are as many cores
FEW = 4
"""Layers of what is compiled, one graph for each length of the context: at full depth they would take longer than all the rest."""
OK, NO_CUDA = "ok", "skipped: no CUDA"


@dataclass(frozen=True, kw_only=True)
class Part:
    """`run(device, quick, folder)` gives the numbers of a part, `fault` among them where they are wrong, in at most `seconds`; some
    need CUDA, some can run beside others."""

    name: str
    seconds: int
    run: Callable[[Any, bool, Path], dict[str, Any]]
    cuda: bool = False
    beside: bool = False


def parts(quick: bool) -> Iterator[Part]:
    """In the order in which they run: what is most likely to find a fault first."""
    yield Part(name="equality", seconds=90, run=_equality, beside=True)
    for name in RECIPES:
        for kind in KINDS[: 1 if quick else None]:
            yield Part(name=f"tiny.{name}.{kind}", seconds=180, run=partial(_tiny, name, kind), beside=True)
    for name in RECIPES:
        yield Part(name=f"size.{name}", seconds=120, run=partial(_size, name))
    for mode, layers in (("eager", None), ("fp8", None), *((mode, FEW) for mode in ("eager", "compiled", "graphs"))):
        for shape in ("livetalk", "480x832"):
            run, needs_cuda = partial(_bench, shape, mode, layers), mode != "eager"
            name = f"bench.{shape}.{mode}" + ("" if layers is None else f".{layers}_layers")
            yield Part(name=name, seconds=100 if layers is None else 150, run=run, cuda=needs_cuda)
    yield Part(name="tests", seconds=120, run=_tests, cuda=True)


def _equality(device, quick: bool, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu_parts.equality import equality

    found = equality(device)
    apart = [name for name, case in found.items() if not case["equal"]]
    return {"cases": found, **({"fault": f"not equal: {', '.join(apart)}"} if apart else {})}


def _tiny(name: str, kind: str, device, quick: bool, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu_parts.tiny import tiny

    return tiny(name, kind, device, folder)


def _size(name: str, device, quick: bool, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu_parts.size import losses

    return losses(name, device, quick)


def _bench(shape: str, mode: str, layers: int | None, device, quick: bool, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu_parts.serving import speed

    return speed(shape, mode, layers, device, quick)


def _tests(device, quick: bool, folder: Path) -> dict[str, Any]:
    files = [str(f) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text(encoding="utf-8")]
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    sys.stderr.write(done.stdout[-4000:])
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu: {''.join(last) or f'exit status {done.returncode}'}")
    return {"verdict": last[0]}


def attempt(part: Part, device: str, quick: bool, folder: Path) -> dict[str, Any]:
    """The part in this process: its status in a line, seconds and numbers."""
    import torch

    from benchmarks.gpu_parts.skipped import SkippedError

    began = time.monotonic()
    try:
        if part.cuda and device != "cuda":
            raise SkippedError("no CUDA")
        result = part.run(torch.device(device), quick, folder)
        status = f"failed: {result['fault']}" if "fault" in result else OK
    except SkippedError as error:
        status, result = f"skipped: {error}", {}
    except Exception as error:  # one line of the result, and the others go on
        import traceback

        traceback.print_exc()
        status, result = f"failed: {_line(str(error)) or type(error).__name__}", {}
    return {"status": status, "seconds": round(time.monotonic() - began, 2), "result": result}


def in_process_of_its_own(words: Sequence[str], seconds: float, file: Path, log: Path) -> dict[str, Any]:
    """What the command leaves in `file`, or a line about why it left nothing; it and its children end after `seconds`."""
    began = time.monotonic()
    file.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(file.parent / "compiled"), **os.environ, "PYTHONPATH": paths}
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(words, stdout=out, stderr=out, env=environ, start_new_session=True)
        try:
            child.wait(seconds)
            status = f"failed: {_line(log.read_text(encoding='utf-8', errors='replace')) or 'no word'} (exit {child.returncode})"
        except subprocess.TimeoutExpired:
            status = f"failed: over {seconds:.3g} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"status": status, "seconds": round(time.monotonic() - began, 2), "result": {}}


def _line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is left, write and print the page; 0 where every part is ok or skipped, else 1."""
    args = _arguments(words)
    device = _device(args.device)
    out = args.out.resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    known = {part.name: part for part in parts(args.quick)}
    if args.only:
        found = attempt(known[args.only], device, args.quick, out)
        _write(out / "parts" / f"{args.only}.json", found)
        return 0
    chosen = [part for name, part in known.items() if not args.parts or any(name.startswith(p) for p in args.parts)]
    if not chosen:
        sys.exit(f"gpu.py: --parts: got {' '.join(args.parts)}; there are {', '.join(known)}")
    facts = machine(device, args.quick)
    runner = Runner(args, device, out, facts)
    results = runner.run(chosen)
    from benchmarks.gpu_parts.page import page

    result = {**facts, "seconds": round(runner.spent, 1), "parts": results}
    _write(out / "gpu.json", result)
    text = page(result)
    (out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(r["status"] != OK and not r["status"].startswith("skipped") for r in results.values()))


class Runner:
    """Runs parts against the clock; a result of the same code on the same machine is kept."""

    def __init__(self, args: argparse.Namespace, device: str, out: Path, facts: Mapping[str, Any]):
        self.args, self.device, self.out, self.facts = args, device, out, facts
        self.key = {name: facts[name] for name in ("revision", "torch", "device", "quick")}
        self.began = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def run(self, chosen: Sequence[Part]) -> dict[str, Any]:
        """Those that can run beside others together, the others one by one; by name in the order given."""
        results: dict[str, Any] = {}
        together = max(1, min(TOGETHER, (os.cpu_count() or 1) - 1))
        if not self.args.quick:
            with ThreadPoolExecutor(together) as pool:
                beside = [part for part in chosen if part.beside]
                results |= zip((part.name for part in beside), pool.map(self.one, beside), strict=True)
        for part in chosen:
            if part.name not in results:
                results[part.name] = self.one(part)
        return {part.name: results[part.name] for part in chosen}

    def one(self, part: Part) -> dict[str, Any]:
        """A part's result: an earlier one, or that of now, which is kept where it is a result."""
        kept, left = self.out / "parts" / f"{part.name}.done.json", 60 * self.args.minutes - self.spent
        if kept.is_file() and (before := json.loads(kept.read_text(encoding="utf-8")))["key"] == self.key:
            return before["found"]
        if part.cuda and self.device != "cuda":
            return {"status": NO_CUDA, "seconds": 0.0, "result": {}}
        if left < 10:
            return {"status": f"not started: {self.args.minutes:g} minutes are over", "seconds": 0.0, "result": {}}
        if self.args.quick:
            found = attempt(part, self.device, True, self.out)
        else:
            file, log = (self.out / "parts" / f"{part.name}.{end}" for end in ("json", "log"))
            words = [sys.executable, __file__, "--only", part.name, "--device", self.device, "--out", str(self.out)]
            found = in_process_of_its_own(words, min(part.seconds, left), file, log)
        if found["status"] == OK:
            _write(kept, {"key": self.key, "found": found})
        print(f"{part.name}: {found['status']}, {found['seconds']:.0f} s", file=sys.stderr)
        return found


def machine(device: str, quick: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    from distill.commands.devices import device_name
    from distill.pipeline.run_folder import revision, versions

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None
    cores = {"cores": os.cpu_count(), "gib": memory}
    name = device_name(torch.device(device))
    torches = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return {"device": name, **cores, **torches, "revision": revision(), "versions": versions(), "quick": quick}


def _write(file: Path, value: Any) -> None:
    from teachers.files import atomic_write

    atomic_write(file, json.dumps(value, indent=1, default=str) + "\n")


def _device(asked: str | None) -> str:
    """cuda where there is one; with `cpu` no part sees a GPU."""
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: --device cuda: there is none; --device cpu --quick runs the same code at a tiny size")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together (default 8)")
    parser.add_argument(
        "--parts", nargs="*", default=[], metavar="NAME", help="names or their beginnings (default all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in this process")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if _device(args.device) == "cpu" and not args.quick:
        sys.exit("gpu.py: no CUDA; --device cpu --quick runs the same code at a tiny size")
    return args


if __name__ == "__main__":
    sys.exit(main())

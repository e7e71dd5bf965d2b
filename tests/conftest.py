"""One thread for every test and its children: two spinning OpenMP pools on a busy machine are ten times slower."""

import gc
import os
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # or each optimizer step looks for the driver's library anew
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from jaxtyping import config, install_import_hook
from tqdm import tqdm

import tests.support.shape_checks

PACKAGES = ("distill", "teachers", "students", "eval")
LONG = (
    "e2e/test_pipeline.py",
    "distill/training/engines/test_engines.py",
    "e2e/test_real_recipes.py",
    "distill/planning/test_outlook.py",
    "distill/planning/test_measured.py",
    "e2e/test_real_size.py",
    "students/test_on_gpu.py",
    "distill/commands/sweep/test_real_jobs.py",
    "docs/test_docs.py",
    "distill/data/test_recorded.py",
    "distill/training/engines/test_hsdp.py",
    "students/serving/test_optimize.py",
    "e2e/test_endurance.py",
    "examples/test_own_method.py",
    "examples/test_own_teacher.py",
    "examples/test_own_data.py",
    "benchmarks/test_folder.py",
    "distill/training/lifecycle/test_torchrun.py",
    "distill/pipeline/test_stages.py",
    "distill/pipeline/evaluation/test_health.py",
    "e2e/test_fuzz.py",
    "e2e/test_hook.py",
    "distill/test_recipe.py",
)
BEGAN, SECONDS = time.monotonic(), float(os.environ.get("TEST_SECONDS", "inf"))
torch.set_num_threads(1)
# tqdm's own lock is one semaphore of a process and of all its forks: one that is killed while it draws would leave it taken, and
# its monitor may hold a lock when another thread forks.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def modules_with_shapes() -> list[str]:
    """The modules that annotate shapes with jaxtyping."""
    root = Path(__file__).parents[1]
    files = (file for package in PACKAGES for file in (root / package).rglob("*.py"))
    annotated = (file for file in files if "from jaxtyping import" in file.read_text(encoding="utf-8"))
    return [".".join(file.relative_to(root).with_suffix("").parts) for file in annotated]


install_import_hook(modules_with_shapes(), f"{tests.support.shape_checks.__name__}.check")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two workers end together."""
    order = {name: i for i, name in enumerate(LONG)}
    folder = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(folder).as_posix(), len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Tests that would begin later than TEST_SECONDS after this process are left out, and named."""
    if time.monotonic() - BEGAN > SECONDS:
        pytest.skip(f"no time is left of TEST_SECONDS={SECONDS:g}")


def pytest_collection_finish():
    """What the imports have made stays: a full collection need not visit it (DeepSpeed asks for many)."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """A run in this process sets its own number of threads, which must not outlive its test or fixture."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """For tests that pass wrong shapes on purpose, to see the error that users get without the checks of the tests."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)

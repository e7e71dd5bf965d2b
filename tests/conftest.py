"""One thread for every test and its children: two spinning OpenMP pools on a busy machine are ten times slower."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

LONG = (
    "e2e/test_real_recipes.py",
    "e2e/test_pipeline.py",
    "distill/training/test_engines.py",
    "distill/planning/test_estimate.py",
    "distill/commands/test_sweep.py",
    "distill/data/test_recorded.py",
    "students/serving/test_optimize.py",
    "distill/methods/test_gaussian.py",
)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two workers end together."""
    order = {name: i for i, name in enumerate(LONG)}
    tests = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(tests).as_posix(), len(LONG)))


@pytest.fixture(autouse=True)
def one_thread():
    """A run in this process sets its own number of threads, which must not outlive its test or fixture."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)

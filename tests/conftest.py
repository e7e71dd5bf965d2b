"""One thread for every test and its children: two spinning OpenMP pools on a busy machine are ten times slower."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

LONG = (
    "test_real_recipes.py",
    "test_pipeline.py",
    "test_engines.py",
    "test_planner.py",
    "test_sweep.py",
    "test_data_folder.py",
    "test_speed.py",
    "test_gaussian.py",
)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two workers end together."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def one_thread():
    """A run in this process sets its own number of threads, which must not outlive its test or fixture."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)

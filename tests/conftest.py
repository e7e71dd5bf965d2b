"""One thread for every test and its children: two spinning OpenMP pools on a busy machine are ten times slower."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

LONG = ("test_pipeline.py", "test_engines.py", "test_real_recipes.py", "test_planner.py")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two workers end together."""
    items.sort(key=lambda item: item.path.name not in LONG)

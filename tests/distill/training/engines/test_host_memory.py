"""A 14B teacher in small on one node: eight ranks load it in shards, and together read and hold little more than the file.

`worker` is one rank. Names are OmniAvatar-14B's, in Wan's layout; 16 blocks of 40, a 20th of the width.
"""

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors

from distill.pipeline.pretrained import fill_given, outline
from distill.pipeline.tiny import _network
from distill.recipe import TeacherStage
from distill.training.config import EngineConfig
from distill.training.engines import fsdp
from distill.training.engines.engine import Engine
from teachers.checkpoints import weights
from teachers.networks.wan import NetworkConfig
from tests.distill.planning.test_measured import status
from tests.support.processes import hand_back, run_ranks
from tests.support.tiny import make_spec

pytestmark = pytest.mark.slow

RANKS, MOST = 8, 1.3
WIDE = NetworkConfig(num_layers=16, num_heads=4, head_dim=64, ffn_dim=688, freq_dim=32, audio_hidden=8)
NARROW = replace(WIDE, num_heads=2, head_dim=16, ffn_dim=96)
"""As deep, with as many modules, names and hooks, but next to no weights."""
READ = {"bytes": 0, "most": 0}


class CountedSlice:
    """Rows of a tensor of a file, whose bytes count once they are read."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

    def __getitem__(self, rows: Any) -> Any:
        return counted(self.inner[rows])


class CountedFile:
    """safetensors' safe_open."""

    def __init__(self, *arguments: Any, **more: Any):
        self.inner = safetensors.safe_open(*arguments, **more)
        self.keys, self.metadata = self.inner.keys, self.inner.metadata

    def __enter__(self) -> "CountedFile":
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def get_tensor(self, name: str) -> Any:
        return counted(self.inner.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self.inner.get_slice(name))


def counted(part: Any) -> Any:
    READ["bytes"] += part.nbytes
    READ["most"] = max(READ["most"], status("RssAnon"))
    return part


def worker(folder: Path) -> None:
    engine = Engine(EngineConfig(kind="fsdp2", precision="fp32"))
    stage = TeacherStage(network=WIDE, path=folder / "teacher")
    weights.safe_open = CountedFile
    hand_back()
    loaded(engine, replace(stage, network=NARROW, path=folder / "narrow"))  # what 14B in full has no more of
    gc.collect()
    before, READ["bytes"], READ["most"] = status("RssAnon"), 0, 0
    net = loaded(engine, stage)
    facts = {"read": READ["bytes"], "held": max(READ["most"], status("RssAnon")) - before}
    facts["parameters"] = sum(p.numel() for p in net.parameters())
    (folder / f"facts-{engine.rank}.json").write_text(json.dumps(facts))
    engine.close()


def loaded(engine: Engine, stage: TeacherStage) -> Any:
    """The frozen network of a stage, as `Artifacts.in_shards` makes it."""
    net = outline(stage, make_spec(network=stage.network))
    fsdp.shard(engine, net, fill=partial(fill_given, stage=stage))
    return net


def test_ranks_of_a_node_read_and_hold_a_file_once(tmp_path):
    def place(path: Path) -> Path:
        path.mkdir()
        return path

    for network, name in ((WIDE, "teacher"), (NARROW, "narrow")):
        _network(TeacherStage(network=network, path=tmp_path / name), make_spec(network=network), place)
    run_ranks(__file__, tmp_path, RANKS)
    size = sum(file.stat().st_size for file in (tmp_path / "teacher").glob("*.safetensors"))
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(RANKS)]
    assert size == pytest.approx(4 * facts[0]["parameters"], rel=0.02)
    read, held = (sum(own[name] for own in facts) for name in ("read", "held"))
    print(f"{RANKS} ranks, {size / 1e6:.1f} MB: {read / size:.3f} of it read, {held / size:.3f} held at the peak")
    assert size < read + 2**16
    assert read < MOST * size
    assert 0.9 * size < held < MOST * size, f"anonymous memory at its peak: {held / size:.2f} of the file"

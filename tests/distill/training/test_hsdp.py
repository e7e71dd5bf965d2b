"""HSDP: four ranks as two replicas of two shards each are one process; a checkpoint crosses between meshes.

Run as a script this file is one rank.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor, Replicate, Shard

from distill.training.engine import Engine, EngineConfig
from teachers.errors import UserError
from tests.distill.training.test_engines import STEPS, differences, newest, run
from tests.support.ranks import run_ranks
from tests.support.tiny import Ranks


def worker(folder: Path) -> None:
    meshes = {shards: Engine(EngineConfig(kind="fsdp2", precision="fp32", shard_ranks=shards)) for shards in (2, 4)}
    trainer = run(meshes[2], folder / "2x2", steps=STEPS, batch_size=2, every=1)
    weight = next(p for p in trainer.trained["student"].values() if isinstance(p, DTensor) and p.ndim == 2)
    facts = {
        "mesh": list(weight.device_mesh.shape),
        "placements": weight.placements == (Replicate(), Shard(0)),
        "rows": [weight.shape[0], weight.to_local().shape[0]],
    }
    if meshes[2].is_main:
        shutil.copytree(folder / "2x2" / "checkpoint-00000001", folder / "crossed" / "checkpoint-00000001")
    meshes[2].barrier()
    run(meshes[4], folder / "crossed", steps=STEPS, batch_size=2)
    (folder / f"facts-{meshes[2].rank}.json").write_text(json.dumps(facts))
    meshes[2].close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hsdp")
    run_ranks(__file__, folder, 4)
    return folder


def test_two_replicas_of_two_shards_are_one_process(launched, tmp_path):
    run(Ranks(), tmp_path, steps=STEPS, batch_size=8)
    expected = newest(tmp_path)
    assert not differences(newest(launched / "2x2"), expected)
    assert not differences(newest(launched / "crossed"), expected), "resumed on another mesh"
    for rank in range(4):
        facts = json.loads((launched / f"facts-{rank}.json").read_text())
        assert facts["mesh"] == [2, 2]
        assert facts["placements"]
        assert facts["rows"][1] * 2 == facts["rows"][0]


def test_shards_that_do_not_divide_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"engine.shard_ranks: 1 processes are no multiple of 2"):
        Engine(EngineConfig(kind="fsdp2", precision="fp32", shard_ranks=2))
    with pytest.raises(UserError, match=r"engine.shard_ranks: ddp has no such option"):
        EngineConfig(kind="ddp", precision="fp32", shard_ranks=2)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))

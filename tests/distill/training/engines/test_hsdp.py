"""HSDP: four ranks as two replicas of two shards each are one process, also where pairs share sequences; a checkpoint crosses
between meshes.

`worker` is one rank.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from distill.training.checkpoint import Reader
from distill.training.config import EngineConfig
from distill.training.engines import fsdp
from distill.training.engines.engine import Engine
from teachers.checkpoints.weights import ALL, copy_rows, read_safetensors
from teachers.errors import UserError
from teachers.files import save_tensors
from tests.distill.training.engines.test_engines import SMALL, STEPS, differences, newest, run
from tests.support.processes import run_ranks
from tests.support.tiny import Ranks, a_student

pytestmark = pytest.mark.slow


def worker(folder: Path) -> None:
    if os.environ["WORLD_SIZE"] == "2":
        engine = Engine(EngineConfig(kind="fsdp2", precision="fp32"))
        run(engine, folder / "fewer", steps=STEPS, batch_size=2)
        engine.close()
        return
    meshes = {shards: Engine(EngineConfig(kind="fsdp2", precision="fp32", shard_ranks=shards)) for shards in (2, 4)}
    pairs = Engine(EngineConfig(kind="fsdp2", precision="fp32", shard_ranks=2, sequence_parallel=2))
    run(pairs, folder / "shared", steps=STEPS, batch_size=2)
    trainer = run(meshes[2], folder / "2x2", steps=STEPS, batch_size=2, every=1)
    weight = next(p for p in trainer.trained["student"].values() if isinstance(p, DTensor) and p.ndim == 2)
    facts = {
        "mesh": list(weight.device_mesh.shape),
        "placements": weight.placements == (Replicate(), Shard(0)),
        "rows": [weight.shape[0], weight.to_local().shape[0]],
    }
    facts |= born(meshes[2], folder)
    turns = [f"row {i}" for i in range(meshes[2].rank, 6, 4)]
    facts["turns"] = meshes[2].in_turns(turns, 6)
    shares = {num: meshes[2].share(num) for num in (3, 6, 8)}
    facts["shares"] = [len(own) for own in shares.values()]
    facts["gathered"] = [meshes[2].all_rows(own.unsqueeze(1), num).flatten().tolist() for num, own in shares.items()]
    if meshes[2].is_main:
        shutil.copytree(folder / "2x2" / "checkpoint-00000001", folder / "crossed" / "checkpoint-00000001")
    meshes[2].barrier()
    facts["stored"] = sum(piece.values.numel() for piece in trainer.pieces())
    read = Reader.read

    def counted(self, file, name, elements) -> Tensor:
        part = read(self, file, name, elements)
        facts["resumed"] = facts.get("resumed", 0) + part.numel()
        return part

    Reader.read = counted
    run(meshes[4], folder / "crossed", steps=STEPS, batch_size=2)
    (folder / f"facts-{meshes[2].rank}.json").write_text(json.dumps(facts))
    meshes[2].close()


def born(engine: Engine, folder: Path) -> dict:
    """A network of the meta device that gets shards and then values: how far it is from the file's, and the share that is read."""
    whole = a_student(seed=3, **SMALL).net
    if engine.is_main:
        save_tensors(folder / "net.safetensors", whole.state_dict())
    engine.barrier()
    tensors, read = read_safetensors(folder / "net.safetensors"), 0
    with init_empty_weights():
        net = a_student(seed=4, **SMALL).net

    def fill(net: nn.Module) -> None:
        nonlocal read
        for name, parameter in net.named_parameters():

            def counted(rows: slice = ALL, name=name) -> Tensor:
                nonlocal read
                part = tensors[name].read(rows)
                read += part.numel()
                return part

            with torch.no_grad():
                copy_rows(parameter, counted)

    fsdp.shard(engine, net, fill=fill)
    expected = dict(whole.named_parameters())
    apart = [float((fsdp_whole(p) - expected[name]).abs().max()) for name, p in net.named_parameters()]
    buffers = all(torch.equal(a, b) for a, b in zip(net.buffers(), whole.buffers(), strict=True))
    total = sum(p.numel() for p in whole.parameters())
    return {"apart": max(apart), "buffers": buffers, "read": read / total}


def fsdp_whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


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
    assert not differences(newest(launched / "shared"), expected), "two pairs of ranks that share sequences"
    found = [json.loads((launched / f"facts-{rank}.json").read_text()) for rank in range(4)]
    total = sum(x.numel() for x in expected.values())
    for rank, facts in enumerate(found):
        assert facts["stored"] == pytest.approx((0.5, 0.5, 0, 0)[rank] * total, rel=0.06), (
            "one replica's ranks, their rows"
        )
        assert facts["resumed"] < 0.3 * total, "a quarter of the rows"
        assert facts["mesh"] == [2, 2]
        assert facts["placements"]
        assert facts["rows"][1] * 2 == facts["rows"][0]
        assert facts["shares"] == [1, 2, 2], "every rank generates as many clips"
        assert facts["gathered"] == [list(range(num)) for num in (3, 6, 8)], "the rows of all ranks, in their order"
        assert facts["turns"] == [f"row {i}" for i in range(6)]
        assert facts["apart"] == 0
        assert facts["buffers"]
        assert 0.5 <= facts["read"] < 0.56, "a network is made in shards, of which each rank reads its rows alone"


def test_half_as_many_ranks_continue_what_replicas_of_shards_wrote(launched, tmp_path):
    shutil.copytree(launched / "2x2" / "checkpoint-00000001", tmp_path / "fewer" / "checkpoint-00000001")
    run_ranks(__file__, tmp_path, 2)
    assert not differences(newest(tmp_path / "fewer"), newest(launched / "2x2"))


def test_shards_that_do_not_divide_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"engine.sequence_parallel: 1 processes are no multiple of 2"):
        Engine(EngineConfig(kind="fsdp2", precision="fp32", sequence_parallel=2))
    with pytest.raises(UserError, match=r"engine.shard_ranks: ddp has no such option"):
        EngineConfig(kind="ddp", precision="fp32", shard_ranks=2)

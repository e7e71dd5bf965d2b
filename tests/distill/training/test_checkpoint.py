"""Checkpoints: the last are kept, written beside training, whole or not at all, and a damaged one is named."""

import errno
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.methods import Batch
from distill.training import checkpoint
from distill.training.role import elements
from distill.training.trainer import Trainer
from teachers import files
from teachers.errors import UserError
from tests.distill.training.test_loop import Regression, batches_of, config, everything, nets, run
from tests.support.tiny import Ranks


def test_the_last_checkpoints_are_kept_and_a_damaged_one_is_named(tmp_path):
    trainer = run(tmp_path, checkpoint_every=1)
    trainer.writer.keep = 2
    for trainer.step in (7, 8, 9):
        trainer.save()
    trainer.writer.finish()
    kept = checkpoint.saved(tmp_path)
    assert [path.name for path in kept] == ["checkpoint-00000008", "checkpoint-00000009"]
    file = kept[-1] / "00000-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"^damaged checkpoint: .*checkpoint-00000009[^\n]*delete it[^\n]*$"):
        trainer.load()
    shutil.rmtree(kept[-1])
    assert trainer.load()
    assert trainer.step == 8


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = run(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    trainer.step = 7
    trainer.save()
    wait([trainer.writer._jobs[0].work])
    with pytest.raises(UserError, match=r"^the disk is full: [^\n]*$"):
        trainer.writer.any_rank()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    monkeypatch.undo()
    assert run(tmp_path, num_steps=8).step == 8


def test_a_checkpoint_being_written_is_not_one(tmp_path):
    run(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-00000006", tmp_path / ".checkpoint-00000007.tmp")
    (tmp_path / "checkpoint-00000009").mkdir()
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["checkpoint-00000006"]


def test_a_rank_that_finds_the_checkpoint_written_already_takes_part_all_the_same(tmp_path):
    """Rank 0 may be done before a late rank begins; a collective that one rank leaves out would hang the run."""
    engine, reductions = Ranks(rank=1, world_size=2, is_main=False), []
    engine.all_reduce_mean = lambda tensors: reductions.append(tensors[0].fill_(0.5))  # rank 0 says that it is there
    (tmp_path / "checkpoint-00000001").mkdir()
    (tmp_path / "checkpoint-00000001" / "manifest.json").touch()
    writer = checkpoint.Writer(tmp_path, engine, 1)
    writer.begin("checkpoint-00000001", {}, [])
    assert len(reductions) == 1
    assert writer._jobs == [], "nothing is written"


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_waits(tmp_path, monkeypatch):
    """The disk answers when `ready` is set. What is stored is what was trained when the checkpoint was begun."""
    ready, save_file = threading.Event(), files.save_file
    monkeypatch.setattr(files, "save_file", lambda *arguments, **more: ready.wait(60) and save_file(*arguments, **more))
    trainer = Trainer(Ranks(), config(), nets(), "a", tmp_path)
    expected = everything(trainer)
    trainer.save()
    totals = {"a": 2, "b": 0}
    metrics = trainer.advance(Regression(trainer.roles), batches_of(4), 0, totals, trainer.writer.any_rank)
    assert metrics is not None, "a step that the disk does not hold up"
    assert not checkpoint.saved(tmp_path)
    threading.Timer(0.2, ready.set).start()
    trainer.save()
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["checkpoint-00000000"], "waited for by the next"
    stored = checkpoint.Reader(checkpoint.saved(tmp_path)[0]).tensors("")
    assert [name for name, x in stored.items() if not torch.equal(x.flatten(), expected[name])] == []
    assert not torch.equal(everything(trainer)["a/weight/weight"], expected["a/weight/weight"])
    trainer.writer.finish()


def test_training_goes_on_while_the_best_is_written_and_a_kill_leaves_the_one_before(tmp_path, monkeypatch):
    """The best and the checkpoint of one step wait for one disk, the second with its copy; nothing waits for them."""
    ready, save_file = threading.Event(), files.save_file
    trainer = Trainer(Ranks(), config(), nets(), "a", tmp_path / "run")

    def keep(step: int) -> dict:
        trainer.step, trainer.selection.best = step, {"score": 1.0 / step, "step": step}
        trainer.save_best()
        trainer.save()
        return {name: x.clone() for name, x in trainer.ema.shadow.items()}

    first = keep(1)
    trainer.writer.finish()
    monkeypatch.setattr(files, "save_file", lambda *arguments, **more: ready.wait(60) and save_file(*arguments, **more))
    trainer.step = 0
    assert trainer.advance(Regression(trainer.roles), batches_of(4), 0, {"a": 9, "b": 9}, trainer.writer.any_rank)
    second = keep(2)
    metrics = trainer.advance(Regression(trainer.roles), batches_of(4), 0, {"a": 9, "b": 9}, trainer.writer.any_rank)
    assert metrics is not None, "a step that the disk does not hold up"
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    killed = Trainer(Ranks(), config(), nets(), "a", tmp_path / "killed")
    assert killed.load()
    assert (killed.step, killed.best["step"]) == (1, 1)
    assert torch.equal(killed.averaged()["weight"], first["weight"])
    ready.set()
    trainer.writer.finish()
    assert torch.equal(trainer.averaged()["weight"], second["weight"])
    assert not torch.equal(first["weight"], second["weight"])
    kept = lambda: [path.name for path in checkpoint.saved(tmp_path / "run", checkpoint.BEST)]  # noqa: E731
    assert kept() == ["best-00000002"]
    trainer.selection.best = {"score": 0.1, "step": 3}
    trainer.save_best()
    trainer.writer.finish()
    assert kept() == ["best-00000002", "best-00000003"], "the checkpoint still names the one before"
    assert trainer.load()
    assert kept() == ["best-00000002"], "step 3 is still to come"


def test_a_checkpoint_that_no_memory_is_free_for_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_host_bytes", lambda: 100)
    trainer = run(tmp_path, num_steps=1)
    assert trainer.load()
    trainer.step = 2
    trainer.save()
    assert trainer.writer._jobs[0].work.done(), "the copy is larger than half of what is free"


def test_a_write_that_fails_stops_training_at_the_next_micro_step(tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    steps, advance = [], Trainer.advance
    monkeypatch.setattr(
        Trainer,
        "advance",
        lambda self, *rest: (
            steps.append(self.step),
            wait([job.work for job in self.writer._jobs]),
            advance(self, *rest),
        )[-1],
    )
    with pytest.raises(UserError, match=r"^the disk is full: [^\n]*00000-00000.safetensors[^\n]*$"):
        run(tmp_path, checkpoint_every=1)
    assert steps == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "its room is given back"


def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_sees(tmp_path, monkeypatch):
    """A rank's listing of a network disk may lack the newest one, or still have what was removed."""
    trainer = run(tmp_path, checkpoint_every=1)
    trainer.writer.keep = 2
    for trainer.step in (8, 9):
        trainer.save()
    trainer.writer.finish()
    older = checkpoint.saved(tmp_path)[:1]
    monkeypatch.setattr(Ranks, "from_main", lambda self, value: older if isinstance(value, list) else value)
    assert trainer.load()
    assert trainer.step == 8


def test_what_was_begun_is_put_in_its_place_when_one_process_fails(tmp_path, monkeypatch):
    ready, save_file = threading.Event(), files.save_file
    monkeypatch.setattr(files, "save_file", lambda *arguments, **more: ready.wait(60) and save_file(*arguments, **more))

    def batches(position: int) -> Batch:
        if position == 2:
            threading.Timer(0.1, ready.set).start()
            raise UserError("a clip is damaged")
        return batches_of(4)(position)

    with pytest.raises(UserError, match="a clip is damaged"):
        run(tmp_path, batches=batches, checkpoint_every=1)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["checkpoint-00000001"]


def test_pieces_of_any_ranks_are_one_tensor(tmp_path):
    """Three ranks with uneven rows, one with none, written by a thread of each; rows and elements of it are read from any."""
    whole = torch.arange(35.0).view(7, 5)
    shares = [(0, 15), (15, 35), (35, 35)]
    engines = [Ranks(rank=rank, world_size=3, is_main=rank == 0) for rank in range(3)]
    writers = [checkpoint.Writer(tmp_path, engine, 1) for engine in engines]
    for writer, (start, end) in zip(writers, shares, strict=True):
        piece = checkpoint.Piece("net", whole.shape, start, whole.flatten()[start:end])
        writer.begin("checkpoint-00000001", {}, [piece] if start < end else [])
        wait([writer._jobs[0].work])
    writers[0].finish()
    reader = checkpoint.Reader(checkpoint.saved(tmp_path)[0])
    ((name, rows),) = reader.stream("")
    assert name == "net"
    for cut in (slice(0, 3), slice(2, 6), slice(6, 7), slice(7, 7), slice(None)):
        assert torch.equal(rows[cut], whole[cut])
    assert elements(rows, whole.shape, 13, 9).tolist() == list(range(13, 22))
    for rank in range(3):
        checkpoint.verify(reader.path, rank, 3)
    file = reader.path / "00001-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    checkpoint.verify(reader.path, 0, 3)
    with pytest.raises(UserError, match=r"^damaged checkpoint: .*00001-00000.safetensors is not what was written; "):
        checkpoint.verify(reader.path, 1, 3)


def test_pieces_that_leave_a_gap_are_no_checkpoint(tmp_path):
    writer = checkpoint.Writer(tmp_path, Ranks(), 1)
    writer.begin("checkpoint-00000001", {}, [checkpoint.Piece("net", torch.Size((4,)), 1, torch.zeros(3))])
    with pytest.raises(AssertionError, match="the pieces of net are not all of it"):
        writer.finish()
    assert not checkpoint.saved(tmp_path)


def test_large_checkpoints_are_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 40)
    trainer = run(tmp_path)
    files = checkpoint.Reader(checkpoint.saved(tmp_path)[-1]).metadata["files"]
    assert len(files) > 3
    assert everything(run(tmp_path)).keys() == everything(trainer).keys()


def test_another_network_in_the_folder_is_refused(tmp_path):
    run(tmp_path)
    other = {"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2)}
    with pytest.raises(UserError, match=r"does not fit: a differs in bias"):
        Trainer(Ranks(), config(), other, "a", tmp_path).load()


def test_a_checkpoint_is_written_when_the_minutes_are_over(tmp_path, monkeypatch):
    steps, save = [], Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: (steps.append(self.step), save(self)))
    run(tmp_path / "often", checkpoint_every=0, checkpoint_minutes=1e-9)
    assert steps == [1, 2, 3, 4, 5, 6]
    steps.clear()
    run(tmp_path / "never", checkpoint_every=0, checkpoint_minutes=0)
    assert steps == [6]

"""Trajectories: exact states on the student's sigmas, resumable shards, and labels that are checked at load."""

import errno
import json
import os
from dataclasses import replace

import psutil
import pytest
import torch

from distill.pipeline.generate import solve_states
from distill.pipeline.trajectories import load, make
from distill.recipe import TrajectoriesConfig
from students.spec import student_sigmas
from teachers import flow
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from teachers.guidance import Guidance
from tests.support.methods.gaussian import autoregressive
from tests.support.tiny import Ranks, a_teacher, a_train_set, randn, rng, some_conditions

SIGMAS = student_sigmas(4, 3.0)
CONFIG = TrajectoriesConfig(num_pairs=10, num_steps=8, shift=3.0, batch_size=4)


def write(folder, sigmas=SIGMAS, seed=0, engine=None):
    folder.mkdir(exist_ok=True)
    teacher = a_teacher()
    return make(
        lambda _: teacher, "abc", a_train_set(), CONFIG, sigmas, seed=seed, folder=folder, engine=engine or Ranks()
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_states_are_the_ode_s_own():
    """Against the closed form of a Gaussian teacher: the first state is the noise, each lies on the exact path."""
    teacher = autoregressive(torch.linspace(-1, 1, 6).view(2, 3, 1, 1), torch.tensor([[1.0, 0.3], [0.3, 0.8]]), 0.6)
    given = replace(some_conditions(5, 3), reference=randn(5, 2, 1, 1, 1))
    noise = randn(5, 2, 3, 1, 1, seed=1)
    grid = flow.sigma_grid(400, 3.0)
    keep = (*flow.on_grid(SIGMAS, grid), 400)
    states = solve_states(teacher, given, noise, grid, keep, Guidance())
    assert states.shape == (5, 5, 2, 3, 1, 1)
    assert torch.equal(states[:, 0], noise)
    for i, sigma in enumerate((*SIGMAS, 0.0)):
        exact = teacher.solution(noise, sigma, given)
        assert (states[:, i, :, 1:] - exact[:, :, 1:]).abs().max() < 0.015
    assert torch.allclose(states[:, -1, :, :1], given.reference, atol=1e-6)


def test_guidance_is_applied():
    given, noise = some_conditions(2, 4), randn(2, 4, 4, 4, 4)
    grid = flow.sigma_grid(2, 3.0)
    plain, guided = (solve_states(a_teacher(), given, noise, grid, (2,), g) for g in (Guidance(), Guidance(audio=3.0)))
    assert (plain - guided).abs().mean() > 1e-3


def test_a_round_trip(tmp_path):
    metrics = write(tmp_path)
    assert metrics == {"pairs": 10, "nfe": 8}
    assert sorted(contents(tmp_path)) == ["manifest.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    pairs = load(tmp_path, SIGMAS, "abc")
    states = pairs.states[torch.arange(10)]
    assert states.shape == (10, 5, 4, 8, 4, 4)
    assert states.dtype == torch.float16
    assert pairs.sigmas == pytest.approx((*SIGMAS, 0.0))
    assert torch.isfinite(states.float()).all()
    pool = a_train_set()
    batch = pairs.batch(pool, torch.tensor([3, 7]), "cpu")
    assert torch.equal(batch.conditions.audio, pool.features["audio"][pairs.rows[[3, 7]]])
    assert torch.equal(batch.states, states[[3, 7]].float())
    assert torch.allclose(batch.states[:, -1, :, :1], batch.conditions.reference, atol=2e-3)
    noise = states[:, 0].float()
    assert len({float(x.sum()) for x in noise}) == 10
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)


def test_pairs_stay_on_the_disk(tmp_path):
    """64 MiB of states: loading maps them, a batch reads its own."""
    shard = torch.randn(64, 4, 2**17, 1, 1, 1, generator=rng(0)).half()
    save_tensors(tmp_path / "shard-00000.safetensors", {"states": shard, "rows": torch.arange(64)})
    facts = {"sigmas": [1.0, 0.75, 0.5, 0.0], "teacher": "abc", "rows": [list(range(64))]}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    process = psutil.Process()
    before = process.memory_info().rss
    pairs = load(tmp_path, [1.0, 0.75, 0.5], "abc")
    assert process.memory_info().rss - before < 8 * 2**20
    assert torch.equal(pairs.states[torch.tensor([63, 5])], shard[[63, 5]])
    assert process.memory_info().rss - before < 24 * 2**20


def test_sigmas_off_the_grid_are_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"student sigma .* is not on the teacher's grid of 8 steps"):
        write(tmp_path, sigmas=student_sigmas(3, 3.0))
    with pytest.raises(UserError, match="is not on the teacher's grid"):
        write(tmp_path, sigmas=student_sigmas(4, 5.0))
    assert not list(tmp_path.iterdir())


def test_other_sigmas_and_another_teacher_are_refused_at_load(tmp_path):
    write(tmp_path)
    near = (*SIGMAS[:2], SIGMAS[2] + 1e-4, SIGMAS[3])
    for sigmas in (student_sigmas(2, 3.0), student_sigmas(4, 5.0), SIGMAS[1:], near):
        with pytest.raises(UserError, match=r"holds states at sigmas .*, the student asks for .*; make them again$"):
            load(tmp_path, sigmas, "abc")
    with pytest.raises(UserError, match=r"comes from another teacher \(abc\)"):
        load(tmp_path, SIGMAS, "abd")
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert facts["sigmas"] == pytest.approx([*SIGMAS, 0.0])


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [
        ("data", r"^the data are not finite: audio of one of the clips \[[\d, ]+\]; check the data"),
        ("weights", r"^the teacher's solution is not finite: clip \d+ at sigma [\d.]+; check its weights"),
    ],
)
def test_states_that_are_not_finite_are_never_stored_and_say_whose_they_are(tmp_path, corrupt, expected):
    teacher, pool = a_teacher(), a_train_set()
    if corrupt == "data":
        pool.features["audio"][:, 1] = float("nan")
    else:
        next(iter(teacher.parameters())).data[0] = float("nan")
    with pytest.raises(UserError, match=expected):
        make(lambda _: teacher, "abc", pool, CONFIG, SIGMAS, seed=0, folder=tmp_path, engine=Ranks())
    assert not list(tmp_path.iterdir())


def test_a_lost_shard_is_made_again_bit_for_bit(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "manifest.json").unlink()
    kept = {i: (tmp_path / f"shard-0000{i}.safetensors").stat().st_mtime_ns for i in (0, 2)}
    write(tmp_path)
    assert contents(tmp_path) == before
    assert kept == {i: (tmp_path / f"shard-0000{i}.safetensors").stat().st_mtime_ns for i in (0, 2)}


def test_ranks_share_the_shards_and_write_what_one_would(tmp_path):
    write(tmp_path / "one")
    looked: dict[str, list[int]] = {}
    for rank in (1, 0):
        write(tmp_path / "two", engine=Ranks(rank=rank, world_size=2, is_main=rank == 0, looked=looked))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    write(tmp_path / "other", seed=1)
    other = load_tensors(tmp_path / "other" / "shard-00000.safetensors")["states"]
    assert not torch.equal(other, load_tensors(tmp_path / "one" / "shard-00000.safetensors")["states"])


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch):
    """The second shard does not fit: one line, no half shard; with room again the result is the undisturbed one."""
    real, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"the disk is full: .*shard-00001.safetensors needs \d+ bytes"):
            write(tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["shard-00000.safetensors"]
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

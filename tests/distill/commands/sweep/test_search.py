"""Successive halving: on known curves it keeps the best; killed at any time it ends with the same table; refusals in one line."""

import csv
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from distill.cli import main
from distill.commands.sweep import halving, search
from distill.commands.sweep.halving import Parameter, Replay, SearchFile, Trial, best
from distill.compose import RECIPES
from distill.recipe import Recipe, load_recipe
from teachers.errors import UserError

RATE = "distill.train.optimizers.student.lr"
SPACE = SearchFile(
    space={RATE: Parameter(low=1e-5, high=1e-2, log=True), "seed": Parameter(choices=(0, 1))},
    first=2,
    factor=3,
    trials=18,
)
STEPS = 18
TRIAL = """\
import json, math, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
run = pathlib.Path(words["run_dir"].strip("'"))
with open(run.parent / "starts", "a") as file:
    print(run.name, file=file)
rate, extra = float(words["distill.train.optimizers.student.lr"]), int(words["seed"])
run.mkdir(exist_ok=True)
log = run / "metrics.jsonl"
done = log.read_text().count("\\n") if log.exists() else 0
for step in range(2 + 2 * done, 20, 2):
    if rate > 5e-3:
        sys.exit(f"distill: distill collapsed at step {step}: frozen; health.stop=false goes on")
    value = abs(math.log10(rate) + 3) + 0.1 * extra + 1 / step
    with log.open("a") as file:
        print(json.dumps({"stage": "distill", "step": step, "validate/score": value}), file=file)
    time.sleep(0.02)
(run / "stages/distill").mkdir(parents=True)
(run / "stages/distill/fingerprint.json").write_text("{}")
time.sleep(60)
"""


def curve(values: dict, step: int) -> float:
    """What a trial of these values scores after so many steps: the same order at every step."""
    return abs(math.log10(values[RATE]) + 3) + 0.1 * values["seed"] + 1 / step


def searched(space: SearchFile, score=curve) -> list[Trial]:
    """All trials, by a known curve in the place of training, validated every second step."""
    trials: list[Trial] = []
    while len(trials) < space.trials:
        replay = Replay(space, trials)
        trial = replay.trial
        rows = tuple((step, score(trial.values, step)) for step in range(2, STEPS + 1, 2))
        step = replay.pruned_at(rows)
        rows = tuple(row for row in rows if step is None or row[0] <= step)
        ended = {"state": "complete", "score": rows[-1][1]} if step is None else {"state": "pruned"}
        trials.append(replace(trial, rows=rows, **ended))
    return trials


def test_the_best_of_all_proposals_is_kept_at_a_fraction_of_the_steps():
    trials = searched(SPACE)
    at_the_end = [curve(trial.values, STEPS) for trial in trials]
    winner = best(SPACE, trials)
    assert winner is not None
    assert winner.score == min(at_the_end)
    assert {trial.rows[-1][0] for trial in trials} == {2, 6, 18}, "trials end at rungs alone, or at the end"
    assert sum(trial.rows[-1][0] for trial in trials) < 0.6 * STEPS * len(trials)
    turned = searched(replace(SPACE, trials=12, direction="maximize"), lambda values, step: -curve(values, step))
    assert [trial.values for trial in turned] == [trial.values for trial in trials[:12]]
    assert [trial.state for trial in turned] == [trial.state for trial in trials[:12]]


def test_the_same_seed_proposes_the_same_and_another_one_other_values():
    trials = searched(replace(SPACE, trials=14))  # beyond TPE's first ten, which are random
    assert halving.read(json.loads(json.dumps(halving.plain(trials)))) == trials
    for number in range(14):
        again = Replay(SPACE, trials[:number]).trial
        assert (again.number, again.values) == (number, trials[number].values)
        assert Replay(replace(SPACE, seed=9), trials[:number]).trial.values != again.values
    assert len({trial.values[RATE] for trial in trials}) == 14


@cache
def a_recipe() -> Recipe:
    return load_recipe(RECIPES / "lab_avatar.yaml", ["distill.train={num_steps: 18, validate_every: 2}"])


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "trial.py").write_text(TRIAL)
    space = {"space": {RATE: {"low": 1e-5, "high": 1e-2, "log": True}, "seed": {"choices": [0, 1]}}}
    space |= {"first": 2, "trials": 7, "seed": 3}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(space))
    monkeypatch.setattr(search, "load_job", lambda path, job, run_dir: replace(a_recipe(), run_dir=str(run_dir)))
    monkeypatch.setattr("distill.commands.sweep.command.POLL_SECONDS", 0.01)
    return tmp_path


def words(place: Path, name: str) -> list[str]:
    launcher = f"--launcher={sys.executable} -S {place / 'trial.py'}"
    return ["search", "lab_avatar", str(place / "small.yaml"), f"--dir={place / name}", launcher]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "search.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_fork_that_is_killed_while_it_draws_leaves_the_bars_of_its_parent_free():
    context = multiprocessing.get_context("fork")
    drawing = context.Event()

    def draw() -> None:
        tqdm.get_lock().acquire()
        drawing.set()
        signal.pause()

    process = context.Process(target=draw, daemon=True)
    process.start()
    assert drawing.wait(60)
    process.kill()
    process.join()
    assert tqdm.get_lock().acquire(timeout=5)
    tqdm.get_lock().release()


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_table(place, capsys):
    assert main(words(place, "whole")) == 0
    expected = rows(place / "whole")
    assert {row["state"] for row in expected} == {"complete", "pruned"}
    assert any(row["why"].startswith("health: distill collapsed at step 2") for row in expected)
    shown = capsys.readouterr().out
    assert "distill run " in shown
    starts = place / "killed" / "starts"
    for number in (2, 4, 6):  # three kills, each with another trial at work
        process = multiprocessing.get_context("fork").Process(target=main, args=(words(place, "killed"),))
        process.start()
        until = time.monotonic() + 60
        while time.monotonic() < until and not (starts.is_file() and f"trial-{number:03}" in starts.read_text()):
            time.sleep(0.005)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert main(words(place, "killed")) == 0
    assert rows(place / "killed") == expected
    (place / "killed" / "search.json").unlink()
    assert main(words(place, "killed")) == 0, "the runs themselves are enough"
    assert rows(place / "killed") == expected
    winner = min((row for row in expected if row["state"] == "complete"), key=lambda row: float(row["score"]))
    text = (place / "killed" / "best.yaml").read_text()
    assert f"# trial-{int(winner['trial']):03} of killed: {RATE}={winner[RATE]} seed={winner['seed']}\n" in text
    assert load_recipe(place / "killed" / "best.yaml").distill.train.num_steps == 18


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"space": {}}, "space: it is empty; give it keys"),
        ({"space": {"seed": {"low": 3, "high": 1}}}, "low, high: got 3, 1; low must be below high, both finite"),
        ({"space": {"seed": {"low": 0, "high": 1, "log": True}}}, "low: got 0 with log: true; a logarithm needs"),
        ({"space": {"seed": {"choices": [1]}}}, r"choices: got \[1\]; give at least two, each once"),
        ({"space": {"seed": {"choices": [1, 2], "low": 0}}}, "a parameter has choices or a range: got both"),
        ({"space": {"seed": {}}}, r"a parameter without values; give choices"),
        ({"trails": 3}, "unknown key 'trails'.*did you mean 'trials'"),
        ({"first": 0}, "first: got 0; it must be at least 1"),
        ({"first": 3}, "the rung of step 3 in .* is not validated; distill.train.validate_every=2 must divide it"),
        ({"first": 18}, r"first: got 18 in .*; distill\.train\.num_steps is 18: no rung"),
        ({"stage": "data"}, "stage: got 'data' in .*; the recipe has no such stage that trains"),
        ({"overrides": ["run_dir=x"]}, "'run_dir=x': .* give KEY=VALUE, and the folder of all runs by --dir"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(place, change, expected):
    file = place / "small.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"^[^\n]*{expected}[^\n]*$"):
        search.plan(Path("lab_avatar"), str(file), [], None, "")


def test_a_wrong_key_value_or_folder_is_named(place, monkeypatch):
    with pytest.raises(UserError, match=r"^no search file: .*lab_ratez\.yaml; did you mean 'lab_rates'"):
        search.plan(Path("lab_avatar"), "lab_ratez", [], None, "")
    (place / "whole").mkdir()
    (place / "whole" / "thesis.tex").touch()
    assert main(words(place, "whole")) == 2
    folder = place / "other"
    folder.mkdir()
    (folder / "sweep.yaml").touch()
    (folder / "search.json").write_text(json.dumps({"search": {"first": 4}, "trials": []}))
    found = search.plan(Path("lab_avatar"), str(place / "small.yaml"), [], folder, "")
    with pytest.raises(UserError, match=r"^another search: .* has another 'space'; give another --dir$"):
        search._read(found)
    (folder / "search.json").write_text(json.dumps({"search": {}, "trials": [{}]}))
    with pytest.raises(UserError, match=r"^damaged file: .*search\.json"):
        search._read(found)
    monkeypatch.undo()
    small = yaml.safe_load((place / "small.yaml").read_text())
    (place / "small.yaml").write_text(yaml.safe_dump(small | {"space": {"sede": {"choices": [1, 2]}}}))
    with pytest.raises(UserError, match=r"^job 'trial-000 \(sede=\d\)': unknown key 'sede': .* did you mean 'seed'"):
        search.plan(Path("lab_avatar"), str(place / "small.yaml"), [], None, "")


def test_the_shipped_search_is_a_search(monkeypatch):
    loaded = []
    monkeypatch.setattr(search, "load_job", lambda recipe, job, run_dir: loaded.append(job) or a_recipe())
    monkeypatch.setattr(search, "_check_rungs", lambda *_: None)
    search.plan(Path("lab_avatar"), "lab_rates", [], None, "")
    assert len(loaded) == 1 + 3 * 2, "each end of the space is read before the first trial"
    recipe = load_recipe(RECIPES / "lab_avatar.yaml", [*loaded[-1].common, *loaded[-1].own])
    assert recipe.health.stop
    assert recipe.distill.method.exit_step == "last"

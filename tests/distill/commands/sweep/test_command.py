"""Sweeps: which jobs, contained failures, resume, shared stages and tables; jobs are stand-ins."""

import csv
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from distill import __version__
from distill.cli import main
from distill.commands.sweep import command
from distill.commands.sweep import table as sweep_table
from distill.compose import RECIPES
from distill.data.procedural import render
from distill.data.procedural.corruption import CorruptionConfig, corrupt_clips
from distill.data.source import Clips
from distill.pipeline.run_folder import RunFolder
from distill.recipe import load_recipe
from teachers.disk.digests import sealed
from teachers.errors import UserError
from teachers.flow import keyed_generator

RECIPE = RECIPES / "scratch_avatar.yaml"
JOB = f"""\
import json, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
run = pathlib.Path(words["run_dir"].strip("'"))
with open(run.parent / "starts", "a") as file:
    print(run.name, file=file)
deed = json.loads((run.parent.parent / "deeds.json").read_text()).get(run.name, "done")
if deed == "raise":
    print("teacher:  50%|##  | 1/2", end="\\r", file=sys.stderr)
    raise RuntimeError("out of luck")
if deed == "refuse":
    sys.exit("distill: student collapsed at step 8")
if deed == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if deed == "sleep":
    print("step 7 of 9", flush=True)
    time.sleep(60)
for folder in ("stages/evaluate", "student"):
    (run / folder).mkdir(parents=True)
(run / "student/spec.json").write_text("")
(run / "stages/evaluate/fingerprint.json").write_text({sealed({"version": __version__})!r})
scores = dict(fid=dict(mean=int(words["seed"]) + 0.123456789, error=0.5, seeds=[1.0, 2.0]), sync=dict(mean=0.9, error=None))
student = dict(metrics=scores, not_admitted=dict(fvd=dict(mean=7.0)))
(run / "report.json").write_text(json.dumps(dict(systems=dict(student=student))))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


def deeds(place: Path, **what: str) -> None:
    (place / "deeds.json").write_text(json.dumps({name.replace("_", "="): deed for name, deed in what.items()}))


def words(place: Path, *more: str) -> list[str]:
    return [*more, f"sweep_dir={place / 'sweep'}", f"launcher={sys.executable} {place / 'job.py'}"]


def starts(place: Path) -> list[str]:
    return (place / "sweep" / "starts").read_text().split()


def table(place: Path) -> dict[str, dict[str, str]]:
    with (place / "sweep" / "sweep.csv").open() as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def names(*given: str) -> list[str]:
    return [job.name for job in command.plan(RECIPE, given).jobs]


def test_jobs_are_the_product_in_hydra_s_syntax_and_order():
    given = ["preset=smoke", "seed=range(1,3)", "distill.train.num_steps=choice(8,16)"]
    found = command.plan(RECIPE, given)
    assert [job.name for job in found.jobs] == [
        "seed=1,distill.train.num_steps=8",
        "seed=1,distill.train.num_steps=16",
        "seed=2,distill.train.num_steps=8",
        "seed=2,distill.train.num_steps=16",
    ]
    assert [(r.seed, r.distill.train.num_steps) for r in found.recipes.values()] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert all(r.init.train.num_steps == 4 for r in found.recipes.values()), "preset=smoke is every job's"
    assert found.folder == Path("runs/scratch_avatar_sweep")
    assert (
        found.recipes["seed=1,distill.train.num_steps=8"].run_dir
        == "runs/scratch_avatar_sweep/seed=1,distill.train.num_steps=8"
    )


def test_names_are_folders():
    assert names("method@init=ode_init,forcing") == ["method@init=ode_init", "method@init=forcing"]
    assert names("reuse='a b','a/b'")[0].startswith("reuse=_a_b_-"), "equal as folders, distinguished by a digest"
    long = [command._folder_name(["some.long.key=1"] * 20 + [f"seed={seed}"]) for seed in (0, 1)]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 120


def test_a_sweep_file_names_its_jobs(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("overrides: [preset=smoke]\njobs:\n  short: [distill.train.num_steps=2]\n  plain: []\n")
    found = command.plan(RECIPE, [f"sweep={file}", "seed=0,1"])
    assert [job.name for job in found.jobs] == ["short,seed=0", "short,seed=1", "plain,seed=0", "plain,seed=1"]
    assert [r.distill.train.num_steps for r in found.recipes.values()] == [2, 2, 4, 4]
    assert found.folder == Path("runs/scratch_avatar_own")


def test_the_ablation_undoes_the_default_step_by_step():
    """final is the default recipe; each row before it and the last differ from it in what LiveTalk's Table 3 says."""
    found = command.plan(RECIPE, ["sweep=livetalk_ablation"])
    default = load_recipe(RECIPE)

    def undone(recipe) -> set[str]:
        there, here = recipe.distill, default.distill
        rates = [there.train.optimizers[role].lr / here.train.optimizers[role].lr for role in here.train.optimizers]
        guidance = {there.method.guidance.text, there.method.guidance.audio}
        assert set(rates) <= {0.5} or set(rates) <= {1.0}
        wrong = {"conditions": recipe.corruption is not None, "lr": rates[0] != 1.0, "guidance": guidance != {1.25}}
        wrong["init"] = recipe.init.train.num_steps * 5 == default.init.train.num_steps
        return {name for name, is_wrong in wrong.items() if is_wrong}

    assert {name: undone(recipe) for name, recipe in found.recipes.items()} == {
        "baseline": {"conditions", "init", "lr", "guidance"},
        "curated": {"init", "lr", "guidance"},
        "converged_init": {"lr", "guidance"},
        "double_lr": {"guidance"},
        "final": set(),
        "final_degraded": {"conditions"},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["seed=0,1", "sede=1"], "job 'seed=0': unknown key 'sede': command line; did you mean 'seed'?"),
        (["seed=0,one"], "job 'seed=one': wrong value of 'seed': 'one'"),
        (["student.chunk_frames=2,3"], "job 'student.chunk_frames=3': "),
        (["seed=0,1", "tracker=wandb"], "job 'seed=0': tracker=wandb is not installed"),
        (["seed=1,1"], "the same job twice: 'seed=1'"),
        (["seed=1"], "nothing varies: -m"),
        (["seed"], "no values to run: 'seed'"),
        (["seed=interval(0,1)"], "no values to run: 'seed=interval(0,1)'"),
        (["seed=glob(*)"], "no values to run: 'seed=glob(*)'"),
        (["seed=0,1", "run_dir=x"], "'run_dir=x': -m; every job has its own run folder"),
        (["seed=0,1", "hydra/launcher=submitit_slurm"], "jobs are started by launcher=, e.g. launcher='srun python'"),
        (["sweep=livetalk_ablatoin"], "did you mean 'livetalk_ablation'?"),
        (["sweep=EMPTY.yaml"], "not a sweep: EMPTY.yaml"),
        (["sweep=BROKEN.yaml"], "wrong value of 'jobs.a': 1 in BROKEN.yaml; it must be list of str"),
        (["sweep=NAMES.yaml"], "not a job's name: '../up' in NAMES.yaml"),
    ],
)
def test_what_is_wrong_in_any_job_is_reported_before_the_first(place, monkeypatch, capsys, given, expected):
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: False)
    monkeypatch.setattr("distill.training.metrics_log.get_available_trackers", lambda: [])
    monkeypatch.chdir(place)
    Path("EMPTY.yaml").write_text("jobs: {}\n")
    Path("BROKEN.yaml").write_text("jobs: {a: 1}\n")
    Path("NAMES.yaml").write_text("jobs: {../up: []}\n")
    assert main(["run", str(RECIPE), "-m", *words(place, *given)]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (place / "sweep").exists()


def test_a_sweep_word_without_m_and_many_processes_are_refused(place, monkeypatch, capsys):
    assert main(["run", str(RECIPE), "sweep=livetalk_ablation"]) == 2
    assert "add -m" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", str(RECIPE), "-m", *words(place, "seed=0,1")]) == 2
    assert "launcher='accelerate launch --num_processes 2'" in capsys.readouterr().err


def test_failures_are_contained_reported_and_only_they_run_again(place, capsys):
    deeds(place, seed_0="raise", seed_1="kill", seed_2="refuse")
    given = words(place, "seed=0,1,2,3")
    assert main(["run", str(RECIPE), *given[:1], "-m", *given[1:]]) == 1
    assert starts(place) == ["seed=0", "seed=1", "seed=2", "seed=3"]
    rows = table(place)
    assert [row["status"] for row in rows.values()] == ["failed", "failed", "failed", "done"]
    assert rows["seed=0"]["error"] == "RuntimeError: out of luck (exit 1)"
    assert rows["seed=1"]["error"] == "killed by SIGKILL, perhaps for memory"
    assert rows["seed=2"]["error"] == "student collapsed at step 8 (exit 1)"
    said = capsys.readouterr().err
    assert "[1/4] seed=0: failed: RuntimeError: out of luck" in said
    assert "[4/4] seed=3: done" in said
    assert "1 of 4 jobs are done" in said

    deeds(place)
    assert main(["run", str(RECIPE), "-m", *given]) == 0
    assert starts(place)[4:] == ["seed=0", "seed=1", "seed=2"]
    assert {row["status"] for row in table(place).values()} == {"done"}
    assert {row["error"] for row in table(place).values()} == {""}
    assert main(["run", str(RECIPE), "-m", *given]) == 0
    assert len(starts(place)) == 7


def test_tables_hold_the_reports_numbers(place):
    deeds(place)
    assert main(["run", str(RECIPE), "-m", *words(place, "seed=0,1")]) == 0
    for name, row in table(place).items():
        student = json.loads((place / "sweep" / name / "report.json").read_text())["systems"]["student"]["metrics"]
        assert float(row["fid"]) == student["fid"]["mean"]
        assert float(row["fid_error"]) == student["fid"]["error"]
        assert float(row["sync"]) == student["sync"]["mean"]
        assert (row["sync_error"], row["fvd"], row["motion"]) == ("", "", "")
        assert 0 <= float(row["seconds"]) < 60
    lines = (place / "sweep" / "sweep.md").read_text().splitlines()
    assert lines[0] == "| job | fid | fvd | sync | motion | seconds | status |"
    assert lines[2].startswith("| seed=0 | 0.123 ± 0.50 | not admitted | 0.900 | - |")
    assert lines[3].endswith("| done |")
    picture = (place / "sweep" / "sweep.svg").read_text()
    assert picture.count('class="dot') == 4
    assert "FID" in picture
    assert "FVD" not in picture


def test_a_named_row_shows_its_overrides():
    row = sweep_table.Row("short", ("a.b=1", "c=2"), {}, (), None, "waiting", None)
    lines = sweep_table.markdown([row]).splitlines()
    assert lines[0].startswith("| job | overrides | fid |")
    assert lines[2] == "| short | `a.b=1` `c=2` | - | - | - | - | - | waiting |"


def test_sigterm_stops_the_job_and_the_sweep_and_it_goes_on(place, capsys):
    deeds(place, seed_0="sleep")
    given = words(place, "seed=0,1")
    plan, found = command.plan(RECIPE, given), []
    log, state = command._files(plan, plan.jobs[0])

    def meanwhile() -> None:
        """Once the job works: another start is refused, then this process gets a signal."""
        while not (log.is_file() and "step 7" in log.read_text()):
            time.sleep(0.02)
        try:
            command.refuse_alive(plan, plan.jobs[0])
        except UserError as error:
            found.append(str(error))
        found.append(json.loads(state.read_text())["process"])
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=meanwhile)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(RECIPE), "-m", *given])
    thread.join()
    assert ended.value.code == 128 + signal.SIGTERM
    refused, process = found
    assert f"job 'seed=0' still runs: process {process}" in refused
    assert command._created(process) is None
    assert "the same command continues" in capsys.readouterr().err
    before = json.loads(state.read_text())
    assert before["status"] == "stopped"
    deeds(place)
    assert main(["run", str(RECIPE), "-m", *given]) == 0
    assert starts(place) == ["seed=0", "seed=0", "seed=1"]
    after = json.loads(state.read_text())["seconds"]
    assert after > before["seconds"]
    assert float(table(place)["seed=0"]["seconds"]) == pytest.approx(after, abs=0.06)  # the table rounds


def test_a_killed_sweep_takes_its_job_along_and_holds_its_folder_until_then(place):
    deeds(place, seed_0="sleep")
    given = words(place, "seed=0,1")
    plan = command.plan(RECIPE, given)
    log, state = command._files(plan, plan.jobs[0])
    sweep = multiprocessing.get_context("fork").Process(target=main, args=(["run", str(RECIPE), "-m", *given],))
    sweep.start()
    while not (log.is_file() and "step 7" in log.read_text()):
        time.sleep(0.02)
    with pytest.raises(
        UserError, match=rf"^in use: {plan.folder} by process {sweep.pid} on .*choose another sweep_dir="
    ):
        command.open_folder(plan)
    job = json.loads(state.read_text())["process"]
    sweep.kill()
    sweep.join()
    until = time.monotonic() + 10
    while command._created(job) is not None and time.monotonic() < until:
        time.sleep(0.02)
    assert command._created(job) is None
    command.open_folder(plan).release()


def test_a_killed_sweep_s_seconds_count_until_the_job_last_wrote(place):
    deeds(place)
    plan = command.plan(RECIPE, words(place, "seed=0,1"))
    command.open_folder(plan)
    log, state = command._files(plan, plan.jobs[0])
    log.write_text("half way")
    os.utime(log, (1000.0, 1000.0))
    state.write_text(json.dumps({"status": "running", "began": 958.0, "seconds": 8.0, "process": 0, "created": 0.0}))
    assert command._seconds(plan, plan.jobs[0]) == 50.0


def test_another_recipe_or_a_foreign_folder_is_refused(place, capsys):
    deeds(place)
    plan = command.plan(RECIPE, words(place, "seed=0,1", "preset=smoke"))
    RunFolder.open(plan.recipes["seed=1"])
    (place / "sweep" / "sweep.yaml").write_text("")
    assert main(["run", str(RECIPE), "-m", *words(place, "seed=0,1")]) == 2
    assert "another recipe's run folder" in capsys.readouterr().err
    (place / "sweep" / "sweep.yaml").unlink()
    assert main(["run", str(RECIPE), "-m", *words(place, "seed=0,1", "preset=smoke")]) == 2
    assert "not a sweep's folder" in capsys.readouterr().err


def test_a_stage_is_looked_for_in_every_run_and_every_job(tmp_path):
    """`reuse` takes several runs, and a sweep's folder stands for all of its jobs."""

    def stage(name: str, reuse: tuple[str, ...], made: list[str]) -> dict:
        recipe = load_recipe(RECIPE, ["preset=smoke", f"run_dir={tmp_path / name}", f"reuse=[{','.join(reuse)}]"])
        done = RunFolder.open(recipe).stage("data", {"a": 1}, (), lambda folder: (made.append(name), {"from": name})[1])
        return done

    made: list[str] = []
    stage("many/other", (), made)
    (tmp_path / "many" / "sweep.yaml").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sweep.yaml").write_text("")
    assert stage("many/job", (str(tmp_path / "empty"), str(tmp_path / "many")), made) == {"from": "many/other"}
    assert stage("alone", (str(tmp_path / "many" / "job"),), made) == {"from": "many/other"}
    assert made == ["many/other"]
    with pytest.raises(UserError, match="no run folder"):
        stage("lost", (str(tmp_path / "nowhere"),), made)


def test_degraded_clips_are_worse_in_what_was_requested():
    config = render.WorldConfig(num_frames=5)
    asked = render.draw_conditions(config, 24, keyed_generator(0, "asked"))
    clips = render.make_clips(config, asked, keyed_generator(0, "motion"))

    def worse(**changes) -> Clips:
        off = {"blur": 0.0, "exposure": 0.0, "shift": 0.0, "static_text": False}
        return corrupt_clips(CorruptionConfig(**(off | changes)), clips, keyed_generator(0, "degraded"))

    def edges(video):
        return video.float().diff(dim=-1).abs().mean()

    assert torch.equal(worse().video, clips.video)
    assert worse().text == clips.text
    assert edges(worse(blur=0.08).video) < 0.8 * edges(clips.video)
    light = worse(exposure=1.0).video.float().mean((1, 2, 3, 4)) / clips.video.float().mean((1, 2, 3, 4))
    assert 0.49 < light.min() < 0.7
    assert 1.3 < light.max() < 2.01
    moved = worse(shift=0.25).video
    exact = [(torch.equal(a, b)) for a, b in zip(moved, clips.video, strict=True)]
    assert not any(exact)
    assert edges(moved) > 0.7 * edges(clips.video)
    static = worse(static_text=True)
    assert {text.split(" in front")[0] for text in static.text} <= set(render.SUBJECTS)
    assert torch.equal(static.audio, clips.audio)
    assert torch.equal(worse(blur=0.05, shift=0.1).video, worse(blur=0.05, shift=0.1).video)
    with pytest.raises(UserError, match=r"corruption\.shift: got 0\.7"):
        CorruptionConfig(blur=0.0, exposure=0.0, shift=0.7, static_text=False)


def test_launchers_hand_m_on():
    """`accelerate launch RECIPE -m ...` and `torchrun RECIPE -m ...`: the -m is not theirs."""
    given = [str(RECIPE), "-m", "seed=0,1"]
    assert launch_command_parser().parse_args(given).training_script_args == given[1:]
    assert get_args_parser().parse_args(given).training_script_args == given[1:]


@pytest.mark.parametrize("sweep", sorted(path.stem for path in (RECIPES / "sweep").glob("*.yaml")))
def test_every_job_of_a_shipped_sweep_is_a_recipe(sweep):
    """Whatever the recipe's body sets, also where a job has another method."""
    recipe = RECIPES / ("lab_avatar.yaml" if sweep.startswith("lab_") else RECIPE.name)
    common, jobs = command.read_sweep(recipe, sweep)
    found = {name: load_recipe(recipe, [*common, *own]) for name, own in jobs.items()}
    assert len({str(recipe) for recipe in found.values()}) == len(found), "two jobs are the same"


def test_dmd_is_guided_as_the_trajectories_are_unless_it_is_given():
    def guidance(*words: str):
        return load_recipe(RECIPES / "dmd_avatar.yaml", words).distill.method.guidance

    assert (guidance().text, guidance().audio) == (2.25, 1.5)
    assert guidance("trajectories.guidance.text=4").text == 4
    one = guidance("distill.method.guidance.text=3")
    assert (one.text, one.audio) == (3, 1.5)
    turned = guidance("trajectories.guidance={text: 4, audio: 2, first: audio}")
    assert (turned.text, turned.audio, turned.first) == (4, 2, "audio")
    assert guidance("~trajectories.guidance").text == 1, "as the trajectories, which are unguided then"

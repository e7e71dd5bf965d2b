"""The whole pipeline at its smallest, through the command line: every stage, killed and resumed, finished and run again."""

import hashlib
import json
import random
import re
import shutil
import time
import warnings
import wave
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.cli import main
from distill.compose import RECIPES
from distill.pipeline import record, run_folder
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from distill.training import checkpoint
from distill.training.engines.engine import Engine
from students.serving.session import Session
from students.weights.checkpoint import load_student
from teachers import media
from teachers.errors import UserError
from tests.support import processes
from tests.support.processes import run_ranks
from tests.support.runs import SMALL as SHORT

RECIPE = RECIPES / "scratch_avatar.yaml"
SMALL = {"num_layers": 2, "width": 48, "ffn_dim": 96, "head_layers": 1, "head_width": 48, "head_ffn_dim": 96}
STAGES = ("data", "extractors", "teacher", "trajectories", "init", "distill", "export", "evaluate")


def words_of(run_dir: Path, *overrides: str) -> list[str]:
    return ["run", str(RECIPE), "preset=smoke", "threads=1", f"run_dir={run_dir}", *overrides]


def run(run_dir: Path, *overrides: str) -> processes.Done:
    return processes.run(words_of(run_dir, *overrides))


def results(run_dir: Path) -> dict[str, str]:
    """sha256 of every lasting tensor file, of the videos of samples, and of the scores (times and revision left out)."""
    found = {}
    for file in sorted([*run_dir.rglob("*.safetensors"), *(run_dir / "samples").glob("*.mp4")]):
        found[str(file.relative_to(run_dir))] = hashlib.sha256(file.read_bytes()).hexdigest()
    report = json.loads((run_dir / "report.json").read_text())
    scores = {name: system["metrics"] for name, system in report["systems"].items()}
    found["scores"] = json.dumps(scores, sort_keys=True)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.cpu_seconds < 90
    return folder


def worker(folder: Path) -> None:
    """One of two ranks, as a launcher starts them (tests/e2e/test_hook.py)."""
    assert main(words_of(folder / "run", *SHORT, "data.world.shard_clips=16")) == 0


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path):
    """Data parallel over gloo, from the first stage to the report, which says how many processes it was."""
    run_ranks(__file__, tmp_path, 2)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["device"]["processes"] == 2
    assert (tmp_path / "run" / "student" / "spec.json").is_file()


def test_every_stage_leaves_its_artifacts(finished):
    report = json.loads((finished / "report.json").read_text())
    assert set(report["systems"]) == {"teacher", "teacher_few_step", "zero_shot", "init", "student"}
    for system in report["systems"].values():
        scores = {**system["metrics"], **system.get("not_admitted", {})}
        assert {"fid", "fvd", "kid", "sync", "sync_offset_frames", "identity", "motion", "diversity"} <= set(scores)
        assert {"nfe_per_chunk", "seconds_per_video_second", "ttff_seconds", "fps"} <= set(system["cost"])
    assert {"seconds", "fingerprint", "metrics"} <= set(report["stages"]["distill"])
    for name in STAGES:
        assert (finished / "stages" / name / "fingerprint.json").is_file()
    assert (finished / "stages" / "teacher" / "config.json").is_file(), "it can be given to another recipe"
    assert (finished / "student" / "spec.json").is_file()
    assert (finished / "report.html").stat().st_size > 10_000
    assert len(list((finished / "samples").glob("*.mp4"))) > 0


def with_checkpoints(finished: Path, folder: Path, monkeypatch) -> Path:
    """A copy of a run in which teacher, init and distill were trained again, and keep what a finished stage deletes."""
    shutil.copytree(finished, folder)
    monkeypatch.setattr(run_folder, "drop_scratch", lambda _: None)
    recipe = load_recipe(RECIPE, ["preset=smoke", "threads=1", f"run_dir={folder}"])
    for name in ("teacher", "init", "distill"):
        assert not checkpoint.saved(folder / "stages" / name)
        assert not list((folder / "stages" / name).glob("best-*"))
        (folder / "stages" / name / "fingerprint.json").unlink()
    pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
    for name in STAGES[: STAGES.index("distill") + 1]:
        pipeline.stage(name)
    pipeline.close()
    return folder


@pytest.fixture(scope="module")
def checkpointed(finished, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return with_checkpoints(finished, tmp_path_factory.mktemp("checkpointed") / "run", patch)


@pytest.mark.slow
def test_what_is_handed_on_is_the_average_then_the_best(finished, checkpointed):
    """teacher and init hand on the averaged weights, not the raw ones; distill its best; the exported student is that."""
    stages = checkpointed / "stages"
    for stage, role in (("teacher", "teacher"), ("init", "student")):
        stored = checkpoint.Reader(checkpoint.saved(stages / stage)[-1])
        given = load_file(stages / stage / "model.safetensors")
        averaged = {name.removeprefix("net."): x for name, x in stored.tensors("ema/").items()}
        raw = {name.removeprefix("net."): x for name, x in stored.tensors(f"{role}/weight/").items()}
        assert set(averaged) <= set(given)
        assert all(torch.equal(given[name], averaged[name]) for name in averaged)
        assert not all(torch.equal(raw[name], averaged[name]) for name in averaged)
    (best,) = checkpoint.saved(stages / "distill", checkpoint.BEST)
    best = checkpoint.Reader(best).tensors("ema/")
    given = load_file(stages / "distill" / "model.safetensors")
    assert all(torch.equal(given[name.removeprefix("net.")], x) for name, x in best.items())
    exported = load_file(finished / "student" / "model.safetensors")
    assert all(torch.equal(exported[name], x) for name, x in given.items())


def test_a_finished_run_recomputes_nothing(finished):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    done = run(finished)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.cpu_seconds < 10, "on an idle machine about as long by the clock"
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_every_flipped_bit_is_named(checkpointed, capfd):
    """100 of 100, in every kind of file that a run leaves, by the start, the resume or the load that reads it."""
    folder = checkpointed
    recipe = load_recipe(RECIPE, ["preset=smoke", "threads=1", f"run_dir={folder}"])
    pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
    for name in STAGES:
        pipeline.stage(name)

    def read(file: Path) -> None:
        top, stage, name = (*file.relative_to(folder).parts, "", "")[:3]
        if name.startswith(("checkpoint-", "best-")):
            checkpoint.verify(file.parent)
        elif top == "stages":
            pipeline.stage(stage)
        elif top == "student":
            load_student(folder / "student")
        else:  # a start makes it again
            raise UserError(
                str(record.fault(folder / "stages" / "evaluate", record.read(folder / "stages" / "evaluate")))
            )

    unread = ("started.json", "README.md", "metrics.jsonl", "recipe.yaml", ".lock")
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in unread and "SHA256SUMS." not in file.name:
            kinds.setdefault(re.sub(r"\d+", "N", f"{file.parent.name}/{file.name}"), []).append(file)
    assert len(kinds) > 40
    rng, missed = random.Random(0), []
    for number in range(100):
        file = rng.choice(kinds[sorted(kinds)[number % len(kinds)]])
        data = file.read_bytes()
        place = rng.choice([i for i in (rng.randrange(len(data)) for _ in range(20)) if not chr(data[i]).isspace()])
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        said = ""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read(file)
            except UserError as error:
                said = str(error)
        said += "".join(str(one.message) for one in warned)
        if file.name not in said and not (file.name == "SHA256SUMS" and "is not what was written" in said):
            missed.append((str(file.relative_to(folder)), place, said))
        file.write_bytes(data)
    pipeline.close()
    assert not missed


def test_a_broken_student_is_copied_again(finished, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    weights = folder / "student" / "model.safetensors"
    good = weights.read_bytes()
    for corrupt in (
        lambda: weights.write_bytes(good[:-1] + b"x"),
        weights.unlink,
        lambda: shutil.rmtree(folder / "student"),
    ):
        corrupt()
        assert main(["run", str(RECIPE), "preset=smoke", "threads=1", f"run_dir={folder}"]) == 0
        assert weights.read_bytes() == good
    said = capfd.readouterr().err
    assert "model.safetensors is not what was written: copied again" in said
    spec = folder / "student" / "spec.json"
    spec.write_text(spec.read_text().replace('"window": ', '"window":  '))
    assert main(["run", str(RECIPE), "preset=smoke", "threads=1", f"run_dir={folder}"]) == 0
    assert '"window":  ' in spec.read_text(), "what the user edited stays"
    assert "spec.json has" in capfd.readouterr().err


def test_another_seed_in_the_same_folder_is_refused(finished):
    done = run(finished, "seed=1")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "seed" in done.stderr


def test_killed_and_resumed_equals_never_killed(finished, tmp_path):
    """SIGKILL once in every stage, each as soon as it has left something (extractors and export: as soon as it began)."""
    folder = tmp_path / "run"
    marks = [
        ("data", "shard-*.safetensors"),
        ("extractors", "started.json"),
        ("teacher", "checkpoint-*"),
        ("trajectories", "shard-*.safetensors"),
        ("init", "checkpoint-*"),
        ("distill", "checkpoint-*"),
        ("export", "started.json"),
        ("evaluate", "clips/*.safetensors"),
    ]
    killed = []
    for stage, pattern in marks:
        process = processes.start(words_of(folder))
        while process.exitcode is None and not list((folder / "stages" / stage).glob(pattern)):
            time.sleep(0.005)
        if process.exitcode is None:
            processes.kill(process)
            killed.append(stage)
    assert len(killed) >= 7, killed
    done = run(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder) == results(finished)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["midas_avatar", "flowact_avatar", "flowact_full"])
def test_another_kind_of_student_runs_whole(finished, tmp_path, name):
    """The stages that are equal are the finished run's; the student comes out of the same sampler."""
    words = [f"run_dir={tmp_path / 'run'}", f"reuse={finished}", "preset=smoke", "threads=1"]
    if name == "midas_avatar":
        words += [f"student.network.{key}={size}" for key, size in SMALL.items()]
    processes.finish(["run", str(RECIPES / f"{name}.yaml"), *words])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    own = {"ar_teacher"} if name == "midas_avatar" else set()
    assert set(report["systems"]) == {"teacher", "teacher_few_step", "zero_shot", "init", "student"} | own
    assert ("fid_student_over_ar_teacher" in report["ratios"]) == bool(own)
    assert report["systems"]["student"]["cost"]["nfe_per_chunk"] == (5 if name == "midas_avatar" else 1)
    if name == "flowact_full":
        init = json.loads((tmp_path / "run" / "stages" / "init" / "fingerprint.json").read_text())
        assert init["inputs"] == ["trajectories", "ar_teacher", "teacher"], "its weights are those of forcing"
    bundle = load_student(tmp_path / "run" / "student")
    session = Session(bundle, torch.zeros(3, bundle.spec.height, bundle.spec.width), "a person nods")
    session.push(0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(1)))
    session.close()
    assert 13 <= sum(len(chunk.frames) for chunk in session.frames()) <= 15  # to the end of a chunk


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("method@init=ode_init", "trajectories.role=teacher"),
            "init: a student with a network of its own has a teacher of its own",
        ),
        (("~method@ar_teacher",), "method@ar_teacher=forcing"),
        (("method@ar_teacher=null",), "Config group override must be a string"),
        (("engine=zero3",), "student.network: midas is trained whole"),
        (("student.network.depth=3",), "unknown key 'student.network.depth'"),
        (("student.network.name=mida",), "did you mean 'midas'?"),
        (("student.history_noise.buckets=30",), "student.history_noise.buckets: got 30"),
    ],
)
def test_what_a_midas_recipe_cannot_be_is_one_line(tmp_path, capsys, words, expected):
    folder = tmp_path / "run"
    assert main(["run", str(RECIPES / "midas_avatar.yaml"), "preset=smoke", f"run_dir={folder}", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert expected in error[-1]
    assert not folder.exists()


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "speech.wav"
    from distill.data.procedural.speech import synthesise

    samples = synthesise(1, 40_123, torch.Generator().manual_seed(0)).audio[0]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples * 32767).short().numpy().tobytes())
    return path


def test_sample_makes_a_video_as_long_as_its_sound(finished, wav, tmp_path):
    from PIL import Image

    image = tmp_path / "face.png"
    Image.new("RGB", (40, 60), (200, 150, 120)).save(image)
    out = tmp_path / "out.mp4"
    words = [
        "sample",
        "--student",
        finished / "student",
        "--image",
        image,
        "--audio",
        wav,
        "--text",
        "smiles",
        "--out",
        out,
    ]
    done = processes.run([str(word) for word in words], timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    frames, fps = media.read_video(out)
    assert abs(len(frames) / float(fps) - 40_123 / 16_000) <= 1 / float(fps)

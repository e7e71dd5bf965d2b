"""Whatever a file holds that we read, what comes of it is a result or one line, never a traceback."""

import json
import os
import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distill.cli import main
from distill.commands.drift import data_config
from distill.commands.eval.multiturn import read_scripts
from distill.commands.report import read_runs
from distill.commands.sample.inputs import read_pose
from distill.commands.sweep.command import read_sweep
from distill.commands.sweep.table import read_row
from distill.compose import RECIPES
from distill.data.curate import curate
from distill.data.curate.candidates import read_faces
from distill.data.curate.curate import read_thresholds
from distill.data.datasets import avspeech, celebvhq, hdtf
from distill.data.datasets import folder as own_folder
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.datasets.split import ClipList
from distill.data.prepare import shards
from distill.live.protocol import parse
from distill.recipe import load_recipe
from distill.scoring.clip_sets import _boxes
from distill.scoring.scoring import read_report
from distill.training import checkpoint
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from eval.cards import load_card
from eval.embedded.extractors import Probes
from eval.external import read_scores
from eval.report.page import render
from eval.report.run_comparison import comparison_page
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.serving.timeline import read_script
from students.weights.checkpoint import load_student, save_student
from teachers import media
from teachers.checkpoints import weights
from teachers.checkpoints.convert import read_checkpoint
from teachers.disk.digests import SUMS
from teachers.errors import UserError
from teachers.files import load_tensors, read_facts
from tests.distill.commands import test_report
from tests.distill.training.test_loop import config, nets
from tests.support import eval_sets
from tests.support.mutations import mutated
from tests.support.tiny import Ranks, a_bundle, a_portrait, some_sound

ROUNDS, SLOW = int(os.environ.get("FUZZ_ROUNDS", "40")), {"recipe": 10, "a run's recipe": 10, "student": 4}
"""Wrong files of each kind, and how many times fewer of those whose reader is slow."""
Reader = Callable[[], Any]


def yaml_of(text: str, read: Callable[[Path], Any], name: str = "a.yaml"):
    def make(folder: Path) -> tuple[list[Path], Reader]:
        (folder / name).write_text(text)
        return [folder / name], lambda: read(folder / name)

    return make


def a_run_s_recipe(folder: Path):
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", ["preset=smoke"])
    from teachers.config import dump

    (folder / "recipe.yaml").write_text(dump(recipe))

    def read() -> None:
        load_recipe(folder / "recipe.yaml")
        data_config(folder)

    return [folder / "recipe.yaml"], read


def a_student(folder: Path):
    save_student(folder, a_bundle(), "card")
    (folder / SUMS).unlink()  # the readers behind it are meant
    small = [
        folder / "spec.json",
        *(folder / "text").glob("*.json"),
        folder / "model.safetensors",
        folder / "codec.safetensors",
    ]
    return small, lambda: load_student(folder)


def a_student_s_list(folder: Path):
    save_student(folder, a_bundle(), "card")
    return [folder / SUMS], lambda: load_student(folder)


def a_snapshot(folder: Path):
    bundle = a_bundle()
    session = Session(bundle, a_portrait(), "a person nods")
    session.push(audio=some_sound(16_000))
    [*session.frames()]
    save_session(session, folder / "session.safetensors")
    return [folder / "session.safetensors"], lambda: load_session(bundle, folder / "session.safetensors")


def a_checkpoint(folder: Path):
    trainer = Trainer(Ranks(), config(), nets(), "a", folder)
    trainer.save()
    trainer.writer.finish()
    files = [*checkpoint.saved(folder)[0].iterdir()]
    return files, lambda: Trainer(Ranks(), config(), nets(), "a", folder).load()


def a_log(folder: Path):
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(3):
        log.write("teacher", step, {"loss": 0.5})
    return [folder / "metrics.jsonl"], lambda: (log.rows("teacher"), log.resume("teacher", 2))


def a_report(folder: Path):
    student = {"metrics": {"fid": {"mean": 1.0, "error": 0.1}}, "not_admitted": {}}
    (folder / "report.json").write_text(json.dumps({"systems": {"student": student}}))
    return [folder / "report.json"], lambda: str(read_row(folder, "a", (), 1.0, "done", None))


def compared_runs(folder: Path):
    """Each mutated value of a report is read by a table, a figure or a sentence."""
    runs = [test_report.a_run(folder / name, {"seed": 0}) for name in "ab"]

    def read() -> None:
        found = read_runs(runs)
        render(comparison_page(found, folder))

    return [runs[1] / "report.json", runs[1] / "recipe.yaml"], read


def tensors(folder: Path):
    path = folder / "model-00001-of-00002.safetensors"
    save_file({"blocks.0.weight": torch.ones(3, 2)}, path, {"text": "[]"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"blocks.0.weight": path.name}}))

    def read() -> None:
        weights.find(folder)
        weights.read_safetensors(path)
        load_tensors(path)
        read_facts(path)
        read_checkpoint(folder)

    return [path, index], read


def an_archive(folder: Path):
    torch.save({"generator": {"model.head.weight": torch.ones(3, 2)}}, folder / "a.pt")
    return [folder / "a.pt"], lambda: read_checkpoint(folder / "a.pt")


def prepared(folder: Path):
    row = {"key": "a", "id": "a", "offset": 0, "bytes": 7, "frames": 3, "size": [4, 4], "sound": True}
    (folder / "00000.json").write_text(json.dumps({"samples": [row]}))
    shards.write_checksums(folder, {"00000.tar": "0" * 64})
    shards.write_fragment(folder / "00000.tar", "a", {"json": b"{}", "mp4": b"x"})

    def read() -> None:
        shards.read_indices(folder)
        [*shards.samples(folder / "00000.tar")]
        shards.verify(folder)

    return [folder / "00000.json", folder / shards.CHECKSUMS, folder / "00000.tar"], read


def a_manifest(folder: Path):
    Manifest((Clip(dataset="d", id="a", source="a.mp4", start=0.0, end=1.0),)).save(folder / "manifest.parquet")
    return [*folder.iterdir()], lambda: Manifest.load(folder / "manifest.parquet")


def annotations(read: Callable, files: dict[str, str], at: str | None = None):
    def make(folder: Path) -> tuple[list[Path], Reader]:
        for name, text in files.items():
            (folder / name).write_text(text)
        return [folder / name for name in files], lambda: read(folder / at if at else folder)

    return make


def scored_clips(folder: Path):
    """What a killed `distill data curate` has left."""
    row = dict.fromkeys(curate.SCHEMA.names) | {"id": "a", "fingerprint": "b", "sharpness": 0.5, "kept": True}
    (folder / "scores.jsonl").write_text(json.dumps(row) + "\n")
    return [folder / "scores.jsonl"], lambda: curate._earlier_rows(folder)


def probes(folder: Path):
    eval_sets.probes(folder)
    return [folder / "probes.json", folder / "probes.safetensors"], lambda: Probes.load(folder)


def pictures(folder: Path):
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    (folder / "a.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'
    )

    def read() -> None:
        for name in ("a.svg", "a.png"):
            media.decode_image(folder / name)

    return [folder / "a.png", folder / "a.svg"], read


def sound(folder: Path):
    media.write_video(folder / "a.mp4", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), Fraction(25), some_sound(1920))
    return [folder / "a.mp4"], lambda: (media.read_audio(folder / "a.mp4"), media.read_video(folder / "a.mp4"))


def messages(folder: Path):
    (folder / "open").write_text(json.dumps({"type": "open", "portrait": 0, "text": "a", "seed": 1}))
    return [folder / "open"], lambda: parse((folder / "open").read_bytes().decode("utf-8", "surrogateescape"))


CELEBVHQ = {
    "clips": {"a": {"ytb_id": "y", "duration": {"start_sec": 0.0, "end_sec": 2.0},
                    "bbox": {"top": 0.1, "bottom": 0.9, "left": 0.1, "right": 0.9},
                    "attributes": {"appearance": [0], "action": [1], "emotion": {"sep_flag": False, "labels": "neutral"}},
                    "version": "v0.1"}},
    "meta_info": {"appearance_mapping": ["blurry"], "action_mapping": ["blow", "chew"]},
}  # fmt: skip
SCORES = {"metric": "m", "made_by": "x", "generated": {"a": 1.0}}
EVAL = {"format": 2, "name": "a", "card": {}, "n": 1, "clips": [], "rows": {}, "columns": {}}
READ: dict[str, Callable[[Path], tuple[list[Path], Reader]]] = {
    "recipe": yaml_of((RECIPES / "scratch_avatar.yaml").read_text(), lambda path: load_recipe(path, ["preset=smoke"])),
    "a run's recipe": a_run_s_recipe,
    "sweep": yaml_of(
        "jobs: {a: [seed=1], b: [seed=2]}\noverrides: [threads=1]", lambda path: read_sweep(path, str(path))
    ),
    "timeline": yaml_of("timeline: [{at: 0, do: speak}, {at: 2.5, do: a person nods}]", read_script),
    "card": yaml_of((RECIPES.parent / "eval/protocols/strict.yaml").read_text(), lambda path: load_card(str(path))),
    "thresholds": yaml_of("lip_sync: {at_least: 0.5}", read_thresholds),
    "test list": yaml_of("name: a\nwindows: []", ClipList.load),
    "conversations": yaml_of("- {name: a, turns: []}", read_scripts),
    "directions": yaml_of("0.1, 0.2\n# none\n0.3 0.4\n", lambda path: read_pose(path, 2), "pose.txt"),
    "face boxes": yaml_of('{"a": [0, 0, 4, 4], "b": null}', _boxes, "boxes.json"),
    "faces": yaml_of("a,0,0.1,0.2,0.3,0.4\n", read_faces, "faces.csv"),
    "scores": yaml_of(json.dumps(SCORES), lambda path: read_scores(path, ["a"], ["fid"]), "a.json"),
    "eval.json": yaml_of(json.dumps(EVAL), read_report, "eval.json"),
    "celebvhq": yaml_of(json.dumps(CELEBVHQ), lambda path: celebvhq.read(path.parent), "celebvhq_info.json"),
    "avspeech": annotations(
        avspeech.read, {"avspeech_train.csv": "abcdefghijk,1.0,4.0,0.5,0.5\n"}, "avspeech_train.csv"
    ),
    "hdtf": annotations(hdtf.read, {"RD_video_url.txt": "Radio1 https://www.youtube.com/watch?v=abcdefghijk\n"}),
    "own json": annotations(
        own_folder.read, {"metadata.json": '[{"file_name": "a.mp4", "text": "x"}]'}, "metadata.json"
    ),
    "own csv": annotations(own_folder.read, {"metadata.csv": "file_name,text\na.mp4,x\n"}, "metadata.csv"),
    "student": a_student,
    "student's list": a_student_s_list,
    "session": a_snapshot,
    "checkpoint": a_checkpoint,
    "metrics.jsonl": a_log,
    "report.json": a_report,
    "compared runs": compared_runs,
    "weights": tensors,
    "archive": an_archive,
    "prepared": prepared,
    "manifest": a_manifest,
    "scored clips": scored_clips,
    "probes": probes,
    "picture": pictures,
    "sound": sound,
    "message": messages,
}


@pytest.mark.parametrize("name", READ)
def test_a_wrong_file_is_one_line(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    files, read = READ[name](folder)
    rng, whole = random.Random(name), {file: file.read_bytes() for file in files}
    for _ in range(ROUNDS // SLOW.get(name, 1)):
        file = rng.choice(files)
        file.write_bytes(wrong := mutated(whole[file], rng))
        try:
            with warnings.catch_warnings(), suppress(UserError):
                warnings.simplefilter("ignore")
                read()
        except Exception as error:
            raise AssertionError(f"{file.name}: {wrong[:500]!r}") from error
        file.write_bytes(whole[file])


@pytest.mark.parametrize(
    "words",
    [
        ["run", "dmd_avatar", "run_dir=" + "x" * 300],
        ["run", "dmd_avatar", "distill.train.optimizers.student.lr=-1"],
        ["run", "dmd_avatar", "name=\udcff"],
        ["run", "nowhere/\udcff.yaml"],
        ["sample", "--student", "x", "--image", "a.png", "--audio", "a.wav", "--text", "\ud800", "--out", "a.mp4"],
        ["serve", "--student", "x", "--max-viewers", "9" * 5000],
    ],
)
def test_a_wrong_command_line_is_one_line(words, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill: ")
    assert error.count("\n") == 1

"""What reads which files, for `tests.e2e.fuzz_many`: media of many containers, a user's own files, a finished run."""

import collections
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.commands.report import read_runs
from distill.data.datasets.manifest import Clip
from distill.data.prepare.cutting import CutConfig, cut
from distill.live import uploads
from distill.pipeline.export import publish
from distill.pipeline.run_folder import RunFolder
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from distill.scoring.clip_io import read_clip
from distill.scoring.clip_sets import Entry
from distill.training.engines.engine import Engine
from eval.cards import load_card
from students.weights.checkpoint import load_student
from teachers import media
from teachers.checkpoints.convert import read_checkpoint
from teachers.errors import UserError
from teachers.files import load_tensors
from teachers.media.picture import FORMATS, SUFFIXES
from tests.e2e.test_fuzz import READ
from tests.e2e.test_pipeline import RECIPE
from tests.support.media import films, sounds

Readers = Mapping[str, Callable[[], Any]]


class Case(NamedTuple):
    """Readers and the files that they read."""

    files: list[Path]
    readers: Readers
    restore: Callable[[], None] = lambda: None


def of_sound(path: Path) -> Readers:
    """As `sample`, `serve` and `eval` read it."""
    return {
        "sample": lambda: [*media.AudioReader(path, mono=False)],
        "serve": lambda: uploads.decode_file(path.read_bytes()),
        "eval": lambda: media.read_audio(path),
    }


def of_film(path: Path) -> Readers:
    """As all commands read its sound, and `prepare`, `eval` and Python its frames."""
    clip, target = Clip(dataset="d", id="a", source=path.name), path.parent / "out.mp4"
    entry = Entry(clip=clip, path=path, sound=None, text="")
    config = CutConfig(size=(32, 32), min_seconds=0.1, cuts="keep", silent=True)
    return {
        **of_sound(path),
        "prepare": lambda: cut(clip, path, config, target),
        "set": lambda: read_clip(entry, load_card("syncnet_v2"), generated=False),
        "Python": lambda: media.read_video(path, (32, 32)),
    }


def of_picture(path: Path) -> Readers:
    return {
        "sample": lambda: media.fit_portrait(media.decode_image(path), (64, 64)),
        "serve": lambda: uploads.decode_picture(path.read_bytes(), (64, 64)),
    }


def some_media(folder: Path) -> Iterator[tuple[Path, Readers]]:
    """Small films, sounds and pictures of many containers and codecs, each with its readers."""
    from PIL import Image

    from tests.teachers.media.test_film import write

    two = sounds.tone(0.5, 48_000)[:, None].repeat(2, axis=1)
    for suffix, codec in {"mp4": "aac", "mov": "pcm_s16le", "mkv": "flac", "webm": "libopus", "ts": "aac"}.items():
        path = sounds.write_sound(folder / f"film a.{suffix}", codec, 48_000, two, video=12)
        yield path, of_film(path)
    codecs = {
        "mov": "mpeg4",
        "mp4": "libvpx-vp9",
        "mxf": "mpeg2video",
        "avi": "mjpeg",
        "mkv": "libx265",
        "webm": "libvpx",
    }
    for suffix, codec in codecs.items():
        path = write(folder / f"film b.{suffix}", codec, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p")
        yield path, of_film(path)
    codecs = {
        "wav": "pcm_s16le",
        "flac": "flac",
        "mp3": "mp3",
        "ogg": "libopus",
        "m4a": "aac",
        "aac": "aac",
        "ac3": "ac3",
    }
    for suffix, codec in codecs.items():
        path = sounds.write_sound(folder / f"sound.{suffix}", codec, 48_000, two)
        yield path, of_sound(path)
    for kind in FORMATS:
        path = folder / f"picture.{kind.lower()}"
        Image.fromarray(films.numbered(7)).save(path, kind)
        yield path, of_picture(path)


def given(folder: Path, inputs: list[Path]) -> Iterator[tuple[str, Path, Readers]]:
    """Copies of a user's files, media by their suffixes and folders of weights, each with its readers."""
    for top in inputs:
        for source in sorted(file for file in top.rglob("*") if file.is_file() and file.suffix not in (".md", ".txt")):
            path = folder / top.name / source.relative_to(top)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
            if source.suffix in SUFFIXES:
                yield "given pictures", path, of_picture(path)
            elif source.suffix in (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".aac"):
                yield "given sounds", path, of_sound(path)
            elif source.suffix in (".json", ".pt", ".safetensors"):
                yield "given weights", path, {"convert": lambda path=path: read_checkpoint(path.parent)}
            else:
                yield "given films", path, of_film(path)


def a_run(folder: Path, source: Path) -> Case:
    """A finished run: every file in it, through the start that finds it done, and through what reads a finished run."""
    run = folder / "run"
    shutil.copytree(source, run)
    recipe = load_recipe(RECIPE, ["preset=smoke", "threads=1", f"run_dir={run}"])
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock"]

    def start() -> None:
        """The stages are looked at, not run again."""
        pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
        try:
            for name in pipeline.stages:
                pipeline.stage(name)
            publish(pipeline.artifacts)
        finally:
            pipeline.close()

    def made_again(self: RunFolder, stage: Path, *_: Any) -> dict[str, Any]:
        raise UserError(f"{stage.name} is made again")

    def restore() -> None:
        for file in run.rglob("*"):
            if file.is_file() and not (source / file.relative_to(run)).is_file():
                file.unlink()
        for file in files:
            whole = source / file.relative_to(run)
            now, was = (file.stat() if file.is_file() else None), whole.stat()
            if now is None or (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(whole, file)

    RunFolder._run = made_again  # pyright: ignore  # in this process alone
    tensors = [file for file in files if file.suffix == ".safetensors"]
    readers = {
        "run": start,
        "report compare": lambda: read_runs([run, source]),
        "student": lambda: load_student(run / "student"),
        "tensors": lambda: [
            load_tensors(file) for file in tensors if file.stat().st_mtime_ns > time.time_ns() - 10**10
        ],
    }
    return Case(files, readers, restore)


def cases(folder: Path, inputs: list[Path], run: Path) -> dict[str, list[Case]]:
    """Kind -> cases of it."""
    found: dict[str, list[Case]] = collections.defaultdict(list)
    for name, make in READ.items():
        (place := folder / name).mkdir(parents=True)
        files, read = make(place)
        found[name].append(Case(files, {name: read}))
    (folder / "media").mkdir()
    for path, readers in some_media(folder / "media"):
        found[f"{path.stem.split()[0]}s"].append(Case([path], readers))
    for kind, path, readers in given(folder / "given", inputs):
        found[kind].append(Case([path], readers))
    found["run folder"].append(a_run(folder / "a run", run))
    return dict(found)

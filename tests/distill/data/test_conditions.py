"""data.name=conditions: portraits, speech and prompts beside films or in their place, from files to a distilled student."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.compose import RECIPES
from distill.data import latents
from distill.data.datasets.folder import read
from distill.data.encoders import load_encoders
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from distill.data.source import Clips
from distill.pipeline import train_stages
from distill.pipeline.evaluation.evaluate import skipped_notes
from distill.pipeline.stages import check_films, run
from distill.recipe import load_recipe
from teachers.errors import UserError
from teachers.files import load_tensors
from tests.distill.data.test_recorded import FPS, SHORT, clips, films, prepared  # noqa: F401 (fixtures)
from tests.support.media.sounds import write_sound
from tests.support.tiny import Ranks

PROMPTS = ("a person nods", "a person smiles", "a person looks up")
SECONDS = (3.0, 0.4, 2.0)  # the second recording is shorter than a clip
RATE = 16_000


def recording(number: int, seconds: float) -> torch.Tensor:
    """A ramp of its own slope [S], by which a stretch of it, and its place, are recognised."""
    return 0.1 + torch.arange(round(seconds * RATE)) * slope(number)


def slope(number: int) -> float:
    return (1 + number) * 5e-6


@pytest.fixture(scope="module")
def given(films, clips, tmp_path_factory):  # noqa: F811
    """Prepared films, and folders of pictures and recordings, some in folders below; a file of prompts."""
    folder = tmp_path_factory.mktemp("given")
    prepared(films, folder / "shards")
    for number in range(4):
        path = folder / "portraits" / ("more" if number == 3 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clips.video[number, :, 0].permute(1, 2, 0).numpy()).save(path)
    (folder / "portraits" / "notes.txt").write_text("not a picture")
    (folder / "speech").mkdir()
    for number, seconds in enumerate(SECONDS):
        write_sound(folder / "speech" / f"{number}.wav", "pcm_s16le", RATE, recording(number, seconds).numpy()[:, None])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


def settings(given: Path, *more: str) -> list[str]:
    paths = (
        f"data.path={given / 'shards'}",
        f"data.portraits={given / 'portraits'}",
        f"data.speech={given / 'speech'}",
    )
    named = ("data.name=conditions", *paths, f"data.prompts={given / 'prompts.txt'}", "data.num_drawn=12")
    return [*SHORT, *named, *more]


def opened(given: Path, *more: str):
    return load_recipe(RECIPES / "scratch_avatar.yaml", settings(given, *more)).data.open()


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """scratch_avatar on films and drawn conditions, with a GAN term, whole; and the rows that its stages were trained on."""
    run_dir = tmp_path_factory.mktemp("run") / "mixed"
    more = ("method@distill=dmd_gan", "trajectories.num_pairs=24", f"run_dir={run_dir}")
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", settings(given, *more))
    rows: dict[str, int] = {}
    train = train_stages.run_training

    def counted(artifacts, stage, config, folder, roles, frozen, batch_of, size, *others):
        rows[stage] = size
        return train(artifacts, stage, config, folder, roles, frozen, batch_of, size, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stages, "run_training", counted)
        return recipe, run(recipe), rows


def test_a_drawn_condition_is_a_picture_a_stretch_of_speech_and_a_prompt(given, clips):  # noqa: F811
    source = opened(given)
    assert (source.num_films, source.num_train) == (len(source.training), len(source.training) + 12)
    films_first = range(source.num_film_shards)
    made = [*source.train(0, range(source.num_shards))]
    assert {part.video.shape[2] for part in made[: len(films_first)]} == {source.config.world.num_frames}
    drawn = made[len(films_first) :]
    assert sum(len(part.text) for part in made) == source.num_train
    assert sum(len(part.text) for part in drawn) == 12
    pictures = {clips.video[number, :, 0].numpy().tobytes() for number in range(4)}
    video, sound = torch.cat([part.video for part in drawn]), torch.cat([part.audio for part in drawn])
    assert {picture.numpy().tobytes() for picture in video[:, :, 0]} <= pictures
    assert len({picture.numpy().tobytes() for picture in video[:, :, 0]}) > 1
    assert video.shape[2] == 1
    assert {text for part in drawn for text in part.text} == set(PROMPTS)
    places = set()
    for row in sound:
        number = round(float(row[-1] - row[0]) / (len(row) - 1) / slope(0)) - 1
        place = round(float(row[0] - 0.1) / slope(number))
        error = recording(number, SECONDS[number])[place : place + len(row)] - row
        assert float(error.abs().max()) < 1e-4  # 16 bits
        places.add((number, place))
    assert len(places) == 12  # each its own place
    assert {number for number, _ in places} == {0, 2}


def test_a_condition_is_a_function_of_the_seed_and_its_number(given):
    def drawn(seed: int, *more: str) -> list[tuple[bytes, bytes, str]]:
        source = opened(given, *more)
        parts = source.train(seed, range(source.num_film_shards, source.num_shards))
        rows = [(part.video[i], part.audio[i], part.text[i]) for part in parts for i in range(len(part.text))]
        return [(picture.numpy().tobytes(), sound.numpy().tobytes(), text) for picture, sound, text in rows]

    own = drawn(0)
    assert drawn(0, "data.world.shard_clips=5") == own
    assert drawn(0, "data.num_drawn=7") == own[:7]
    assert not set(drawn(1)) & set(own)
    source = opened(given)
    again = [*source.train(0, range(source.num_shards), workers=2)]
    assert [part.text for part in again] == [part.text for part in source.train(0, range(source.num_shards))]


@pytest.mark.slow
def test_a_drawn_row_is_its_portrait_s_latent_and_the_features_of_its_sound(finished):
    recipe, run_dir, _ = finished
    folder, source = run_dir / "stages" / "data", recipe.data.open()
    encoders = load_encoders(recipe.data, folder)
    pool = latents.load_train_set(folder, encoders.mark)
    assert (len(pool), pool.num_films) == (2 * source.num_train, 2 * source.num_films)
    batch = pool.batch(torch.arange(len(pool)))
    assert batch.filmed is not None
    assert batch.filmed.tolist() == [True] * pool.num_films + [False] * 24
    assert bool((batch.x0[: pool.num_films, :, 1:].flatten(1) != 0).any(dim=1).all())
    assert not batch.x0[pool.num_films :, :, 1:].any()
    size, row = source.config.world.shard_clips, pool.num_films
    for part in source.train(recipe.seed, range(source.num_film_shards, source.num_shards)):
        still = part.video.expand(-1, -1, source.config.world.num_frames, -1, -1)
        x0, conditions = encoders.of_clips(Clips(video=still, audio=part.audio, text=part.text, labels={}))
        rows = slice(row, row + len(part.text))
        assert torch.allclose(batch.conditions.reference[rows], x0[:, :, :1], atol=1e-2)
        assert torch.allclose(batch.conditions.audio[rows], conditions.audio, atol=1e-5)
        assert torch.allclose(batch.conditions.text[rows], conditions.text, atol=1e-5)
        mirrored = encoders.encode(part.video.flip(-1))
        again = slice(row + len(part.text), row + 2 * len(part.text))
        assert torch.allclose(batch.conditions.reference[again], mirrored, atol=1e-2)
        row += 2 * len(part.text)
    assert (row, size) == (len(pool), 8)
    shard = load_tensors(folder / f"shard-{source.num_film_shards:05d}.safetensors")
    assert shard["x0"].shape[2] == 1  # no frame that nothing reads is encoded or stored


@pytest.mark.slow
def test_films_and_drawn_conditions_end_in_one_student(finished):
    """The teacher is trained on films; trajectories and DMD take both; the report says what the data are."""
    recipe, run_dir, trained_on = finished
    report, source = json.loads((run_dir / "report.json").read_text()), recipe.data.open()
    facts = report["stages"]["data"]["metrics"]
    expected = {"train_clips": source.num_films, "drawn_conditions": 12, "portraits": 4, "recordings": 3, "prompts": 3}
    assert expected.items() <= facts.items()
    made = json.loads((run_dir / "stages" / "trajectories" / "manifest.json").read_text())
    rows = torch.tensor([row for own in made["rows"] for row in own])
    assert bool((rows >= 2 * source.num_films).any())
    assert bool((rows < 2 * source.num_films).any())
    assert trained_on == {"teacher": 2 * source.num_films, "init": 24, "distill": 2 * source.num_train}
    assert (
        "12 conditions drawn from 4 portraits, 3 recordings and 3 prompts"
        in (run_dir / "student/README.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.long
def test_without_films_a_given_teacher_is_distilled(given, films, tmp_path):  # noqa: F811
    """dmd_avatar on drawn conditions alone; the films, of which it sees none, are what it is scored on."""
    prepare(read(None, films), films, tmp_path / "shards", "folder", CutConfig(fps=FPS, size=(64, 64)), shard_clips=5)
    own = [word for word in settings(given) if word.startswith(("data.p", "data.s", "data.n", "data.h", "eval."))]
    own += [
        f"data.path={tmp_path / 'shards'}",
        "data.train_on_films=false",
        "eval.probes=null",
        f"run_dir={tmp_path / 'run'}",
    ]
    run_dir = run(load_recipe(RECIPES / "dmd_avatar.yaml", ["preset=smoke", "threads=1", *own]))
    report = json.loads((run_dir / "report.json").read_text())
    facts = report["stages"]["data"]["metrics"]
    assert (facts["clips"], facts["train_clips"]) == (2 * 12, 0)
    assert {"init", "student"} <= report["systems"].keys()


def test_what_needs_films_is_refused_before_anything_is_written(given, tmp_path):
    words = settings(given, "data.train_on_films=false", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"data.codec is fitted to films: give a trained one"):
        load_recipe(RECIPES / "scratch_avatar.yaml", words)
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", settings(given))
    source = recipe.data.open()
    source._films = 0
    with pytest.raises(UserError, match="teacher is trained on films, of which these data train on none"):
        check_films(recipe, source)
    given_teacher = replace(recipe, teacher=replace(recipe.teacher, path=tmp_path, train=None))
    check_films(given_teacher, source)
    for slot, method, stage in (("init", "forcing", "init"), ("distill", "dmd_gan", "distill")):
        words = settings(given, f"method@{slot}={method}")
        other = load_recipe(RECIPES / "scratch_avatar.yaml", words)
        other = replace(other, teacher=given_teacher.teacher)
        with pytest.raises(UserError, match=f"^{stage} is trained on films"):
            check_films(other, source)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.portraits=nowhere"], "data.portraits: no such folder: nowhere"),
        (["data.num_drawn=0"], "data.num_drawn: got 0; draw at least one"),
        (["data.prompts=nowhere.txt"], "data.prompts: nowhere.txt cannot be read"),
        (["data.crop=left"], "data.crop"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, change, message):
    with pytest.raises(UserError) as raised:
        opened(given, *change)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folders_without_what_is_asked_for_are_refused(given, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"data.speech: no file is one of .*convert or add some"):
        opened(given, f"data.speech={tmp_path}")
    with pytest.raises(UserError, match=r"a.txt has no line; write one prompt a line"):
        opened(given, f"data.prompts={tmp_path / 'a.txt'}")
    write_sound(tmp_path / "short.wav", "pcm_s16le", RATE, recording(0, 0.5).numpy()[:, None])
    write_sound(tmp_path / "silent.wav", "pcm_s16le", RATE, torch.zeros(3 * RATE).numpy()[:, None])
    source = opened(given, f"data.speech={tmp_path}")
    with pytest.raises(
        UserError,
        match=r"data.speech: none of 2 files drawn .*: each is broken or shorter than a clip, 1.2 s, or silent there",
    ):
        [*source.train(0, [source.num_film_shards])]


def test_a_skipped_portrait_changes_neither_sound_nor_prompt(given, tmp_path):
    files = tmp_path / "files"
    shutil.copytree(given / "portraits", files)
    made = []
    for damaged in (False, True):
        if damaged:
            (files / "0.png").write_bytes(b"damaged")
        source = opened(given, f"data.portraits={files}", "data.world.shard_clips=12")
        made += source.train(0, [source.num_film_shards])
    assert not torch.equal(made[0].video, made[1].video)
    assert torch.equal(made[0].audio, made[1].audio)
    assert made[0].text == made[1].text


def test_the_parts_of_a_condition_are_combined_at_random(given, tmp_path):
    """As many portraits as prompts: one drawn by the other's numbers would always come with the same."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("abcd"), encoding="utf-8-sig")
    source = opened(given, f"data.prompts={prompts}", "data.num_drawn=24", "data.world.shard_clips=24")
    (made,) = source.train(0, [source.num_film_shards])
    pairs = {(video.numpy().tobytes(), text) for video, text in zip(made.video, made.text, strict=True)}
    assert {text for _, text in pairs} == set("abcd")
    assert len({portrait for portrait, _ in pairs}) == 4
    assert len(pairs) > 8


@pytest.mark.parametrize("folder", ["portraits", "speech"])
def test_an_error_of_the_machine_ends_the_stage(folder, given, monkeypatch):
    """A file that is skipped for it would be another condition when the run goes on."""
    source, open_file = opened(given), Path.open
    failures = iter([OSError(errno.EIO, "Input/output error")])

    def flaky(self, *mode, **options):
        if self.parent.name == folder and (error := next(failures, None)):
            raise error
        return open_file(self, *mode, **options)

    monkeypatch.setattr(Path, "open", flaky)
    with pytest.raises(UserError, match="Input/output error"):
        [*source.train(0, [source.num_film_shards])]
    assert [*source.train(0, [source.num_film_shards])]


def test_links_to_nothing_are_no_files(given, tmp_path):
    files = tmp_path / "files"
    shutil.copytree(given / "portraits", files)
    (files / "a.png").symlink_to("nowhere.png")
    assert len(opened(given, f"data.portraits={files}").portraits) == 4


def test_skipped_files_are_counted_over_ranks_and_starts(given, tmp_path):
    """In the stage's metrics, and as a note of the report; a shard that was there is counted too."""
    files, folder = tmp_path / "files", tmp_path / "data"
    shutil.copytree(given / "portraits", files)
    for number in range(24):
        (files / f"bad{number}.png").write_bytes(b"damaged")
    folder.mkdir()
    source = opened(given, f"data.portraits={files}", "data.num_drawn=24", "data.world.shard_clips=7")
    facts = latents.prepare(source.config, source, 0, folder, Ranks())
    drawn = [*source.train(0, range(source.num_film_shards, source.num_shards))]
    names = sorted({name for part in drawn for name in part.skipped})
    assert len(names) > 20
    assert (facts["skipped_files"], facts["skipped"]) == (len(names), names[:20])
    (folder / f"shard-{source.num_film_shards:05d}.safetensors").unlink()
    again = latents.prepare(source.config, source, 0, folder, Ranks())
    assert (again["skipped_files"], again["skipped"]) == (len(names), names[:20])
    (note,) = skipped_notes({"data": {"metrics": facts}})
    assert note.startswith(
        f"Files that cannot be read were skipped, {len(names)} of those that were drawn: portraits/bad"
    )
    assert note.endswith(f" and {len(names) - 20} more.")
    assert not skipped_notes({"data": {"metrics": {"clips": 3}}})


@pytest.mark.parametrize(("folder", "bad"), [("portraits", "bad.png"), ("speech", "bad.wav")])
def test_a_broken_file_is_named_once_and_skipped(folder, bad, given, tmp_path, capsys):
    """One in a corpus ends no stage; all of them do."""
    files = tmp_path / "files"
    shutil.copytree(given / folder, files)
    (files / bad).write_bytes(b"damaged")
    source = opened(given, f"data.{folder}={files}", "data.num_drawn=24", "data.world.shard_clips=7")
    numbers = range(source.num_film_shards, source.num_shards)
    made = [*source.train(3, numbers, workers=2)]
    assert sum(len(part.text) for part in made) == 24
    lines = [line for line in capsys.readouterr().err.splitlines() if bad in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"distill: data.{folder}: skipped: ")
    again = [*source.train(3, numbers)]
    assert all(
        torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio) for a, b in zip(made, again, strict=True)
    )
    assert {name for part in made for name in part.skipped} == {f"{folder}/{bad}"}
    for file in files.rglob("*.*"):
        file.write_bytes(b"damaged")
    source = opened(given, f"data.{folder}={files}")
    with pytest.raises(
        UserError, match=rf"data.{folder}: none of [0-9]+ files drawn .*; the last broken one: .*; give others"
    ):
        [*source.train(3, numbers)]

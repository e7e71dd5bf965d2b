"""data=folder: procedural clips written as films with sound, prepared, and scratch_avatar through to its report."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.cli import main
from distill.compose import RECIPES
from distill.data import latents
from distill.data.datasets.folder import read
from distill.data.datasets.manifest import Manifest
from distill.data.encoders import fitted_fingerprint, load_encoders
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from distill.data.procedural import render
from distill.data.recorded import FolderConfig
from distill.data.source import UNLABELLED, Clips, brightness_and_contrast
from distill.pipeline.evaluation.clip_sets import reserve
from distill.pipeline.stages import Pipeline, run
from distill.recipe import load_recipe
from distill.training.engines.engine import Engine
from students.weights.checkpoint import load_student
from teachers import media
from teachers.codecs.linear import to_float
from teachers.errors import UserError
from teachers.flow import keyed_generator
from tests.support.processes import finish

NUM, FILMS = 46, 14  # frames of a film: three clips of 15 and one left over
WORLD = render.WorldConfig(num_frames=NUM)
FPS = Fraction(WORLD.fps)
SHORT = (
    "preset=smoke",
    "threads=1",
    "data=folder",
    "data.held_out=0.5",
    "data.world.num_train=32",
    "data.text_steps=2",
    "teacher.train.num_steps=4",
    "init.train.num_steps=2",
    "distill.train.num_steps=2",
    "trajectories.num_pairs=4",
    "data.world.shard_clips=8",
    "eval.probe_steps=4",
    "eval.num_seeds=1",
    "eval.latency_runs=1",
    "eval.num_samples=1",
)


@pytest.fixture(scope="module")
def clips():
    asked = render.draw_conditions(WORLD, FILMS, keyed_generator(0, "films"))
    return render.make_clips(WORLD, asked, keyed_generator(0, "motion"))


@pytest.fixture(scope="module")
def films(clips, tmp_path_factory):
    """Fourteen mp4 with sound, a text beside each but the last."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(FILMS):
        path = folder / f"person_{number:02d}.mp4"
        frames = clips.video[number].permute(1, 2, 3, 0).contiguous()
        media.write_video(path, frames, FPS, clips.audio[number])
        if number < FILMS - 1:
            path.with_suffix(".txt").write_text(clips.text[number])
    return folder


def prepared(films, out, **changes):
    prepare(read(None, films), films, out, "folder", CutConfig(fps=FPS, size=WORLD.size, **changes), shard_clips=5)
    return out


@pytest.fixture(scope="module")
def data(films, tmp_path_factory):
    return prepared(films, tmp_path_factory.mktemp("data") / "shards")


@lru_cache(maxsize=1)
def shipped() -> FolderConfig:
    given = load_recipe(RECIPES / "scratch_avatar.yaml", [*SHORT, "data.path=nowhere"]).data
    assert isinstance(given, FolderConfig)
    return given


def config(path, /, **changes) -> FolderConfig:
    return replace(shipped(), **{"path": path, **changes})


def opened(path, /, **changes) -> Any:
    return config(path, **changes).open()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("folder_run") / "run"
    path, words = RECIPES / "scratch_avatar.yaml", [*SHORT, f"data.path={data}", f"run_dir={run_dir}"]
    finish(["run", str(path), *words])
    return load_recipe(path, words), run_dir


def people(windows) -> set[str]:
    return {windows[row].facts["identity"] for row in range(len(windows))}


@pytest.mark.slow
def test_the_report_scores_what_can_be_had_and_names_what_cannot(finished, clips):
    _, run_dir = finished
    report = json.loads((run_dir / "report.json").read_text())
    assert report["left_out"] == UNLABELLED
    for name, system in report["systems"].items():
        scores = {**system["metrics"], **system.get("not_admitted", {})}
        gap = set() if name.startswith("teacher") else {"gap"}
        seen = {"motion_energy", "sharpness", "seam", "black", "flash", "flicker", "frozen", "saturation"}
        assert {"fid", "fvd", "kid"} | seen | gap == set(scores)
    assert set(report["stages"]["extractors"]["metrics"]["cases"]) == {
        "fid",
        "fvd",
        "kid",
        "motion_energy",
        "sharpness",
    }
    assert not any(word in name for name in report["targets"] for word in ("sync", "diversity", "motion_student"))
    page = (run_dir / "report.html").read_text()
    for name, reason in UNLABELLED.items():
        assert f"<b>{name}</b>: {reason}" in page
    assert any(text in page for text in clips.text)
    facts = report["stages"]["data"]["metrics"]
    assert facts["train_clips"] + facts["held_out_clips"] == 3 * FILMS
    assert facts["train_samples"] + facts["held_out_samples"] == FILMS
    assert report["protocol"]["run"]["counts"]["num_conditions"] == min(4, facts["held_out_clips"] // 2)
    assert (run_dir / "samples" / "0-student.mp4").is_file()
    assert "clips of the folder shards" in (run_dir / "student" / "README.md").read_text()
    assert load_student(run_dir / "student").spec.height == 32


@pytest.mark.slow
def test_the_training_set_is_the_clips_through_the_encoders(finished, data):
    """Latents and features on disk are those of the training clips, each with its mirror image, once."""
    recipe, run_dir = finished
    source, folder = opened(data), run_dir / "stages" / "data"
    encoders = load_encoders(recipe.data, folder)
    pool = latents.load_train_set(folder, encoders.mark)
    assert len(pool) == 2 * source.num_train == 2 * len(source.training)
    own = source.training.batch(range(len(source.training)))
    x0, conditions = encoders.of_clips(
        Clips(
            video=torch.cat([own.video, own.video.flip(-1)]), audio=own.audio.repeat(2, 1), text=own.text * 2, labels={}
        )
    )
    stored = pool.batch(torch.arange(len(pool)))
    pairs: Any = ((x0.half().float(), stored.x0), (conditions.audio, stored.conditions.audio))
    for made, kept in pairs:
        order = [sorted(range(len(pool)), key=lambda i, x=x: x[i].flatten().tolist()) for x in (made, kept)]
        assert torch.allclose(made[order[0]], kept[order[1]], atol=1e-3)
    psnr = -10 * torch.log10(
        (to_float(encoders.decode(encoders.encode(own.video))) - to_float(own.video)).square().mean() / 4
    )
    assert psnr > 22  # of a codec that was fitted on a few films


def test_no_person_is_on_both_sides_and_no_clip_in_two_sets_that_are_compared(data):
    source = opened(data)
    assert people(source.training).isdisjoint(people(source.test))
    assert len(people(source.training) | people(source.test)) == FILMS
    sets = {
        name: source.draw(5, name, 100) for name in ("test", "reference", "validate", "validate reference", "admit")
    }

    def contents(name: str) -> set[bytes]:
        return {video.numpy().tobytes() for video in sets[name].video}

    held = {source.test[row].video.numpy().tobytes() for row in range(len(source.test))}
    assert contents("test").isdisjoint(contents("reference"))
    assert contents("test") | contents("reference") == held
    assert contents("admit") == contents("test")
    assert contents("validate").isdisjoint(contents("validate reference") | held)
    assert torch.equal(source.draw(5, "test", 3).video, sets["test"].video[:3])
    assert not torch.equal(source.draw(6, "test", 3).video, sets["test"].video[:3])
    with pytest.raises(ValueError, match="one motion"):
        source.draw(5, "test", 3, motion=1)


def test_a_clip_is_its_film(data, clips):
    """Frames and sound of a training clip against what was written: mp4 and AAC lose little."""
    source = opened(data)
    for row in range(0, len(source.training), 7):
        sample = source.training[row]
        number, first = int(sample.facts["id"].removeprefix("person_")), sample.first
        shown = clips.video[number][:, first : first + 15].float()
        assert (sample.video.float() - shown).abs().mean() < 6
        received = clips.audio[number][first * 1280 : (first + 15) * 1280]
        assert torch.corrcoef(torch.stack([sample.audio, received]))[0, 1] > 0.95
        assert sample.text == ("" if number == FILMS - 1 else clips.text[number])


def test_what_is_measured_on_frames_is_there(clips):
    video = clips.video[:2, :, :4]
    found = brightness_and_contrast(video)
    assert len(found) == 32
    assert all(value.shape == (2, 4) for value in found.values())
    grey = video.float().mean(1) / 255
    assert torch.allclose(found["brightness_5"], grey[:, :, 8:16, 8:16].mean((2, 3)), atol=1e-5)
    flat = brightness_and_contrast(torch.full_like(video, 100))
    assert all(float(value.max()) == 0 for name, value in flat.items() if name.startswith("contrast"))


@pytest.mark.slow
def test_stale_features_are_refused(finished, tmp_path):
    recipe, run_dir = finished
    folder = tmp_path / "data"
    shutil.copytree(run_dir / "stages" / "data", folder)
    latents.load_train_set(folder, fitted_fingerprint(folder))
    codec = folder / "codec.safetensors"
    codec.write_bytes(codec.read_bytes()[:-1] + b"\1")
    encoders = load_encoders(recipe.data, folder)
    with pytest.raises(UserError, match=rf"^stale features: {folder}/manifest.json was made by another codec[^\n]*$"):
        latents.load_train_set(folder, encoders.mark)


def test_all_clips_are_used_and_the_run_says_how_many(data):
    """`data=folder` takes all, and so does a real recipe with clips of its own; fewer are said in words."""
    whole = opened(data)
    num = len(whole.training)
    assert whole.num_train == num
    assert whole.how_many() == f"{num} of {num} clips"
    fewer = opened(data, world=replace(shipped().world, num_train=10))
    assert fewer.num_train == 10
    assert fewer.how_many() == f"10 of {num} clips (data.world.num_train: null takes all)"
    words = ("data.name=folder", f"data.path={data}", "teacher.path=anywhere")
    assert load_recipe(RECIPES / "livetalk.yaml", words).data.world.num_train is None
    assert load_recipe(RECIPES / "livetalk.yaml", words[2:]).data.open().num_train == 256


def test_other_clips_in_the_folder_are_other_data(data, films, tmp_path):
    """The stage's fingerprint knows which clips were read, so features of former ones are never taken for theirs."""
    other = tmp_path / "films"
    shutil.copytree(films, other)
    (other / "person_03.txt").write_text("someone else talks")
    changed = prepared(other, tmp_path / "changed")
    assert opened(data).digests != opened(changed).digests


def test_a_spoiled_shard_ends_the_data_stage_in_one_line(data, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(data, folder)
    shard = folder / "folder-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    words = [f"data.path={folder}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=rf"^shard differs from its checksum: {shard};[^\n]*$"):
        run(load_recipe(RECIPES / "scratch_avatar.yaml", [*SHORT, *words]))


def test_clips_that_do_not_fit_are_refused_with_the_command(data, films, tmp_path):
    out = f"{films.name}_32x32_25-2fps"
    for given, words in (
        (
            {"path": films},
            f"clips are not prepared: {films}; run distill data prepare folder --videos {films} --out {out} ",
        ),
        ({"path": films}, f"--fps 25/2 --size 32x32 and give data.path={out}$"),
        ({"path": tmp_path / "none"}, "no folder of clips"),
        ({"path": tmp_path}, "no clips: .* has no videos and no shards"),
        (
            {"path": data, "world": replace(WORLD, num_frames=15, fps="16")},
            "prepared at 25/2 fps: .*--fps 16 --size 32x32",
        ),
        (
            {"path": data, "world": replace(WORLD, num_frames=15, resolution=64)},
            r"no clip fits this recipe, 64x64 with sound \(14 unused: it is 32x32, not 64x64\)",
        ),
        (
            {"path": data, "world": replace(WORLD, num_frames=47)},
            "the train videos have 0 clips of 47 frames.* 2 are needed",
        ),
    ):
        with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*"):
            opened(data, **given)
    with pytest.raises(UserError, match=r"data.held_out: got 1"):
        config(data, held_out=1.0)


def test_nothing_is_written_before_the_clips_fit(films, tmp_path):
    words = ["data=folder", f"data.path={films}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"^[^\n]*run distill data prepare folder[^\n]*$"):
        run(load_recipe(RECIPES / "scratch_avatar.yaml", words))
    assert not (tmp_path / "run").exists()


def with_manifest(data, target, change):
    """A copy of prepared data whose manifest's clips went through `change`."""
    shutil.copytree(data, target)
    manifest = Manifest.load(target / "manifest.parquet")
    Manifest(tuple(change(number, clip) for number, clip in enumerate(manifest.clips))).save(
        target / "manifest.parquet"
    )
    return target


def test_an_official_split_stands(data, tmp_path):
    names = ("test", "train", "validation")
    path = with_manifest(data, tmp_path / "a", lambda n, clip: replace(clip, split=names[(n > 5) + (n > 11)]))
    source = opened(path, world=replace(WORLD, num_frames=15))
    assert people(source.test) == {f"person_{n:02d}.mp4" for n in range(6)}
    assert people(source.training) == {f"person_{n:02d}.mp4" for n in range(6, 12)}
    assert source.facts["unused_samples"] == {"it is in the split validation": 2}


def test_somebody_is_held_out_even_of_few_and_of_one_person_the_last_pieces(data, tmp_path):
    two = with_manifest(data, tmp_path / "two", lambda n, clip: replace(clip, identity=f"p{n % 2}"))
    source = opened(two, held_out=1e-9)
    assert len(source.test) == len(source.training) == 21
    one = with_manifest(data, tmp_path / "one", lambda _, clip: replace(clip, identity="p"))
    source = opened(one, held_out=1e-9)
    source.reserve(8, "fid")
    assert (len(source.training), len(source.test)) == (42 - 16 - 1, 16)
    starts = {clip.id: (clip.source, clip.start) for clip in source.clips}
    ends = [(*starts[sample.id], first) for windows in (source.training, source.test) for sample, first in windows.rows]
    assert ends == sorted(ends)
    assert len(set(ends)) == len(ends)
    for name in ("somebody", "q", "r"):  # whichever side a hash puts them on
        alone = with_manifest(data, tmp_path / name, lambda _, clip, name=name: replace(clip, identity=name))
        assert len(opened(alone, held_out=0.5).test) == 21
    (note,) = source.notes
    assert note.startswith("All clips are of one person: the last 16 of 42 in time are held out")
    many = source.digests
    source.reserve(3, "fid")
    assert (len(source.training), len(source.test)) == (42 - 6 - 1, 6)
    assert source.notes[1].startswith("Only 3 clips are scored and compared with 3 others")
    assert source.digests != many, "other clips are trained on"
    few = with_manifest(
        data, tmp_path / "few", lambda n, clip: replace(clip, identity="pq"[n > 7], split="other" * (n > 7))
    )
    source = opened(few)
    assert len(source.training) == 11
    source.reserve(5, "fid")
    with pytest.raises(
        UserError, match=r"the train videos have 11 clips of 15 [^\n]*, 12 are needed, 6 for fid in each"
    ):
        source.reserve(6, "fid")


@pytest.mark.parametrize(("protocol", "least"), [("embedded", 3), ("quality", 1)])
def test_the_least_number_of_clips_is_that_of_the_card_s_metrics(data, tmp_path, protocol, least):
    """Three of the jackknife of a distance, one of a mean over clips; fewer must not be asked for either."""
    if protocol == "quality":
        card = yaml.safe_load((RECIPES.parent / "eval" / "protocols" / "embedded.yaml").read_text())
        card["metrics"] = {name: card["metrics"][name] for name in ("motion_energy", "sharpness")}
        protocol = str(tmp_path / "quality.yaml")
        Path(protocol).write_text(yaml.safe_dump(card))
    words = [*SHORT, f"data.path={data}", f"eval.protocol={protocol}", f"run_dir={tmp_path / 'run'}"]
    reserve(recipe := load_recipe(RECIPES / "scratch_avatar.yaml", words), source := recipe.data.open())
    given = []
    source.reserve = lambda count, why: given.append((count, why))
    reserve(recipe, source)
    assert given == [(least, "fid, kid, fvd" if least == 3 else "motion_energy, sharpness")]
    fewer = replace(recipe, eval=replace(recipe.eval, num_reference=2))
    if least == 3:
        with pytest.raises(
            UserError, match=r"eval.num_reference is too small: got 2; fid, kid, fvd of embedded need 3"
        ):
            reserve(fewer, source)
    else:
        reserve(fewer, source)


def test_clips_without_sound_are_counted_not_used(films, tmp_path):
    silent = tmp_path / "films"
    shutil.copytree(films, silent)
    frames = media.read_video(silent / "person_00.mp4")[0]
    media.write_video(silent / "person_00.mp4", frames, FPS)
    source = opened(prepared(silent, tmp_path / "out", silent=True))
    assert source.facts["unused_samples"] == {"it has no sound": 1}


def test_the_source_is_named_and_the_default_is_not(data):
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", [*SHORT, f"data.path={data}"])
    again = load_recipe(
        RECIPES / "scratch_avatar.yaml",
        [*SHORT, "data=avatars", "data.name=folder", f"data.path={data}", "data.held_out=0.5"],
    )
    assert type(recipe.data) is type(again.data) is FolderConfig
    with pytest.raises(UserError, match=r"missing value of 'data.path'"):
        load_recipe(RECIPES / "scratch_avatar.yaml", ["data=folder"])
    with pytest.raises(UserError, match=r"unknown data source 'folders'.*data\.name.*did you mean 'folder'"):
        load_recipe(RECIPES / "scratch_avatar.yaml", ["data.name=folders"])


MUTE = ("person_02", "person_09")


@pytest.fixture(scope="module")
def curated(films, tmp_path_factory):
    """The films with two of them mute: prepared, and what `distill data curate` made of them."""
    folder = tmp_path_factory.mktemp("curated")
    shutil.copytree(films, folder / "films")
    for name in MUTE:
        path = folder / "films" / f"{name}.mp4"
        frames, _ = media.read_video(path)
        media.write_video(path, frames, FPS, torch.zeros(NUM * 1280))
    shards, out = prepared(folder / "films", folder / "shards", silent=True), folder / "kept"
    (folder / "thresholds.yaml").write_text("speech: {at_least: 0.3}")
    words = ["--out", str(out), "--thresholds", str(folder / "thresholds.yaml"), "--workers", "0"]
    assert main(["data", "curate", str(shards), *words]) == 0
    kept = Manifest.load(out / "manifest.parquet")
    assert len(kept.clips) == FILMS - len(MUTE)
    return shards, out


def recipe_of(shards, *words):
    return load_recipe(RECIPES / "scratch_avatar.yaml", [*SHORT, f"data.path={shards}", *words])


@pytest.mark.slow
def test_a_recipe_trains_on_the_clips_that_curate_kept(curated, tmp_path):
    shards, out = curated
    everything: Any = recipe_of(shards).data.open()
    recipe = recipe_of(shards, f"data.manifest={out}", f"run_dir={tmp_path / 'run'}")
    source: Any = recipe.data.open()
    mute = {f"{name}.mp4" for name in MUTE}
    assert (
        people(source.training) | people(source.test) == (people(everything.training) | people(everything.test)) - mute
    )
    assert source.facts["unused_samples"] == {"it is not in data.manifest": len(MUTE)}
    assert source.digests != everything.digests
    received = [source.draw(0, name, 100).audio for name in ("test", "reference", "probes")]
    received += [clips.audio for clips in source.train(0, range(source.num_shards))]
    assert all(audio.any(dim=1).all() for audio in received)
    one_file = recipe_of(shards, f"data.manifest={out / 'manifest.parquet'}").data.open()
    assert one_file.digests == source.digests
    pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
    assert pipeline.stage("data")["unused_samples"] == source.facts["unused_samples"]
    assert len(pipeline.artifacts.student_train_set) == 2 * source.num_train == 2 * len(source.training)
    pipeline.artifacts.log.close()


@pytest.mark.slow
def test_captions_of_the_manifest_are_what_is_trained_on(curated, tmp_path):
    shards, out = curated
    kept = Manifest.load(out / "manifest.parquet")
    changed = tuple(
        replace(clip, text=f"rewritten {clip.id}", identity="a b"[2 * (n % 2)]) for n, clip in enumerate(kept.clips)
    )
    Manifest(changed).save(tmp_path / "manifest.parquet")
    source: Any = opened(shards, manifest=tmp_path)
    said = {text for clips in source.train(0, range(source.num_shards)) for text in clips.text}
    said |= {*source.draw(0, "test", 100).text, *source.draw(0, "reference", 100).text}
    assert said == {clip.text for clip in changed}
    assert source.digests != opened(shards, manifest=out).digests


@pytest.mark.slow
def test_a_manifest_of_other_clips_is_refused(curated, data, tmp_path):
    shards, out = curated
    kept = Manifest.load(out / "manifest.parquet")
    Manifest(()).save(tmp_path / "none.parquet")
    Manifest((replace(kept.clips[0], end=1.0),)).save(tmp_path / "moved.parquet")
    Manifest((replace(kept.clips[0], id="stranger"),)).save(tmp_path / "stranger.parquet")
    for path, words in (
        (tmp_path / "none.parquet", "none.parquet keeps no clip; curate with other --thresholds"),
        (tmp_path / "moved.parquet", f"clip {kept.clips[0].id} of .*moved.parquet is not in {shards}"),
        (tmp_path / "stranger.parquet", f"clip stranger of .* is not in {shards}; curate that folder again"),
        (tmp_path / "gone", "manifest not found: .*gone"),
        (tmp_path, "manifest not found: .*manifest.parquet"),
    ):
        with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
            opened(shards, manifest=path)

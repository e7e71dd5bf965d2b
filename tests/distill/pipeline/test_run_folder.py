"""The run folder: done stages are skipped, killed ones go on, foreign ones are refused, files are whole or absent."""

import json
import multiprocessing
import time
from dataclasses import dataclass, field, replace

import pytest
import torch

from distill.data.stored import opener
from distill.pipeline import record, run_folder
from distill.pipeline.run_folder import RunFolder
from teachers.errors import UserError
from teachers.files import atomic_write, replacing, save_tensors


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8


@dataclass(frozen=True, kw_only=True)
class Toy:
    run_dir: str
    seed: int = 0
    reuse: str | None = None
    threads: int = 1
    net: Inner = field(default_factory=Inner)


class Killed(BaseException):
    pass


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(run_dir=str(tmp_path / "runs" / "toy"))


class Body:
    """Counts its runs; writes one artifact a step and dies after `dies_after` of 3."""

    def __init__(self, dies_after: int = 3):
        self.dies_after = dies_after
        self.made: list[int] = []

    def __call__(self, folder):
        for step in range(3):
            if (folder / f"{step}.txt").exists():
                continue
            if step >= self.dies_after:
                raise Killed
            atomic_write(folder / f"{step}.txt", "x")
            self.made.append(step)
        return {"steps": 3}


def test_a_done_stage_is_skipped_and_its_metrics_returned(toy):
    body = Body()
    run = RunFolder.open(toy)
    assert run.stage("data", {"n": 1}, (), body) == {"steps": 3}
    assert RunFolder.open(toy).stage("data", {"n": 1}, (), body) == {"steps": 3}
    assert body.made == [0, 1, 2]
    done = json.loads((run.stage_dir("data") / "fingerprint.json").read_text())
    kept = {"fingerprint", "inputs", "config", "seconds", "metrics", "version", "revision", "files", "digest"}
    assert set(done) == kept
    assert list(done["files"]) == ["0.txt", "1.txt", "2.txt"]
    assert done["config"] == {"n": 1}


def test_what_only_an_unfinished_stage_needs_is_deleted_once_its_record_is_written(toy, monkeypatch):
    """Checkpoints of a 14B student are terabytes, clips of evaluation hours; a kill before the record loses none of them, and one
    behind it leaves none."""
    scratch = (
        "checkpoint-00000002/manifest.json",
        "best-00000002/manifest.json",
        "clips/8-a-file/a.txt",
        "clip_sets/b.txt",
    )

    def body(folder):
        for name in (*scratch, "model.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / name, "x")
        return {}

    def there() -> list[str]:
        return [name for name in (*scratch, "model.txt") if (run.stage_dir("init") / name).exists()]

    def killed(*_):
        raise Killed

    run = RunFolder.open(toy)
    before, behind = (record, "files_of"), (run_folder, "drop_scratch")
    for module, name in (before, behind):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(Killed):
                run.stage("init", {}, (), body)
        assert there() == [*scratch, "model.txt"], name
    run.close()
    run = RunFolder.open(toy)
    run.stage("init", {}, (), pytest.fail)
    assert there() == ["model.txt"]
    assert list(run.finished("init")["files"]) == ["model.txt"]
    run.close()


def test_a_killed_stage_continues_from_its_own_leftovers_and_its_seconds_add_up(toy):
    run = RunFolder.open(toy)
    with pytest.raises(Killed):
        run.stage("data", {"n": 1}, (), Body(dies_after=2))
    started = run.stage_dir("data") / "started.json"
    state = record.read_started(started.parent)
    started.write_text(record.sealed({**state, "began": state["began"] - 100}))
    body = Body()
    run.stage("data", {"n": 1}, (), body)
    assert body.made == [2]
    assert 100 <= run.finished("data")["seconds"] < 110


class Main:
    """Rank 0, whose words are kept."""

    is_main, rank = True, 0

    def __init__(self):
        self.said = []

    def barrier(self) -> None: ...

    def from_main(self, value):
        self.said.append(value)
        return value


class Other(Main):
    """A rank that receives them."""

    is_main, rank = False, 1

    def from_main(self, value):
        return self.said.pop(0)


def test_what_is_done_is_rank_0_s_to_say(toy, tmp_path):
    """A rank whose network disk shows none of the files that rank 0 wrote."""
    main, other, body = Main(), Other(), Body()
    first = RunFolder.open(toy, main)
    main.said.clear()
    for name, inputs in (("data", ()), ("teacher", ("data",)), ("data", ())):
        first.stage(name, {"n": 1}, inputs, Body())
    other.said, blind = main.said, RunFolder(tmp_path / "shows_nothing", (), other)
    for name, inputs in (("data", ()), ("teacher", ("data",)), ("data", ())):
        assert blind.stage(name, {"n": 1}, inputs, lambda _: body(tmp_path) and {"steps": 9}) == {"steps": 3}
        assert blind.finished(name) == first.finished(name)
    assert other.said == []
    assert body.made == [0, 1, 2], "of two stages that are not done, one body's files are the other's"


def flip(path, bit=3):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1 << bit]))


@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_a_damaged_file_of_a_done_stage_is_named_and_made_again_on_request(toy, how):
    run = RunFolder.open(toy)
    run.stage("data", {"n": 1}, (), Body())
    file, words = (
        run.stage_dir("data") / "1.txt",
        {"flipped": "is not what was written", "cut": "has 0 bytes, 1 were written"},
    )
    if how == "flipped":
        flip(file)
    elif how == "cut":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(UserError) as caught:
        RunFolder.open(toy).stage("data", {"n": 1}, (), Body())
    assert f"{file.parent}: 1.txt {words.get(how, 'was written and is not there')}; put it back, or delete" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    file.unlink(missing_ok=True)
    (file.parent / "fingerprint.json").unlink()
    body = Body()
    assert RunFolder.open(toy).stage("data", {"n": 1}, (), body) == {"steps": 3}
    assert body.made == [1], "what was whole was made again, or what was damaged was not"


def test_leftovers_of_a_killed_stage_that_are_damaged_are_made_again(toy, capfd):
    run = RunFolder.open(toy)
    with pytest.raises(Killed):
        run.stage("data", {"n": 1}, (), Body(dies_after=2))
    flip(run.stage_dir("data") / "0.txt")
    (run.stage_dir("data") / "2.txt").write_text("x")  # in no list: the kill came between
    body = Body()
    run.stage("data", {"n": 1}, (), body)
    assert body.made == [0, 2]
    assert "data: the leftover 0.txt is not what was written: it is made again" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["fingerprint.json", "started.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"fingerprint": 1}'])
def test_a_damaged_record_is_one_line_and_deletes_nothing(toy, name, content):
    run = RunFolder.open(toy)
    run.stage("data", {"n": 1}, (), Body())
    if name == "started.json":
        (run.stage_dir("data") / "fingerprint.json").unlink()
    (run.stage_dir("data") / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^damaged file: .*{name} is not what was written; [^\n]*$"):
        run.stage("data", {"n": 1}, (), Body())
    assert (run.stage_dir("data") / "2.txt").exists()


def test_a_damaged_stage_is_not_reused(toy, tmp_path, capfd):
    first = RunFolder.open(toy)
    first.stage("data", {"n": 1}, (), Body())
    flip(first.stage_dir("data") / "0.txt")
    body = Body()
    second = RunFolder.open(replace(toy, run_dir=str(tmp_path / "second"), reuse=toy.run_dir))
    second.stage("data", {"n": 1}, (), body)
    assert body.made == [0, 1, 2]
    assert "0.txt is not what was written: not taken" in capfd.readouterr().err


def test_what_a_stage_leaves_at_the_top_is_made_again_when_it_is_gone(toy, capfd):
    run = RunFolder.open(toy)

    def body(folder):
        atomic_write(folder / "clip", "x")
        atomic_write(run.path / "report.json", "x")
        return {}

    for corrupt in (None, (run.path / "report.json").unlink, lambda: flip(run.path / "report.json")):
        if corrupt is not None:
            corrupt()
        run.stage("evaluate", {}, (), body, ("report.*",))
        assert (run.path / "report.json").read_text() == "x"
    said = capfd.readouterr().err
    assert "evaluate: report.json was written and is not there: it is made again" in said
    assert "evaluate: report.json is not what was written: it is made again" in said


def test_shards_of_a_big_stage_are_verified_where_they_are_read(toy, monkeypatch):
    monkeypatch.setattr("distill.data.stored.BIG_BYTES", 100)
    run = RunFolder.open(toy)

    def body(folder):
        for i in range(3):
            save_tensors(folder / f"shard-{i:05d}.safetensors", {"x": torch.full((100,), float(i))})
        return {}

    run.stage("data", {}, (), body)
    folder = run.stage_dir("data")
    flip(folder / "shard-00001.safetensors")
    run.stage("data", {}, (), body)
    opened = opener(folder)
    assert opened(folder / "shard-00000.safetensors")["x"][0] == 0
    with pytest.raises(
        UserError, match=r"damaged stage: .*: shard-00001.safetensors is not what was written; put it back"
    ):
        opened(folder / "shard-00001.safetensors")
    (folder / "shard-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00002.safetensors was written and is not there"):
        run.stage("data", {}, (), body)


def _work(toy, ready):
    def body(folder):
        with replacing(folder / "shard") as temporary:
            temporary.write_text("half")
            ready.touch()
            time.sleep(60)
        return {}

    RunFolder.open(toy).stage("data", {}, (), body)


def test_a_second_start_says_who_works_and_touches_nothing(toy, tmp_path):
    ready = tmp_path / "ready"
    process = multiprocessing.get_context("fork").Process(target=_work, args=(toy, ready))
    process.start()
    while not ready.is_file():
        time.sleep(0.01)
    folder = tmp_path / "runs" / "toy"
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        UserError, match=rf"^in use: {folder} by process {process.pid} on .*; wait for it, end it, or choose"
    ):
        RunFolder.open(toy)
    assert sorted(folder.rglob("*")) == before, "temporaries of the one at work were deleted"
    process.kill()
    process.join()
    RunFolder.open(toy).close()
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]


def test_a_name_that_no_folder_can_have_is_one_line(tmp_path):
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(UserError, match=r"^not a path: [^\n]*; choose another$"):
            RunFolder.open(Toy(run_dir=str(tmp_path / name)))


def test_leftovers_of_another_fingerprint_are_deleted(toy):
    run = RunFolder.open(toy)
    with pytest.raises(Killed):
        run.stage("data", {"n": 1}, (), Body(dies_after=2))
    body = Body()
    run.stage("data", {"n": 2}, (), body)
    assert body.made == [0, 1, 2]
    body = Body()
    run.stage("data", {"n": 3}, (), body)
    assert body.made == [0, 1, 2], "a finished stage with another fingerprint was reused"


def test_a_fingerprint_has_the_version(toy, monkeypatch):
    run = RunFolder.open(toy)
    before = run.fingerprint("data", {"n": 1}, ())
    assert run.fingerprint("data", {"n": 1}, ()) == before
    monkeypatch.setattr("distill.pipeline.run_folder.__version__", "another")
    assert run.fingerprint("data", {"n": 1}, ()) != before


def test_a_stage_is_redone_when_its_input_was(toy):
    run = RunFolder.open(toy)
    for n in (1, 2):
        body = Body()
        run.stage("data", {"n": n}, (), Body())
        run.stage("teacher", {}, ("data",), body)
        assert body.made == [0, 1, 2]
    with pytest.raises(AssertionError, match="teacher needs nothing_yet"):
        run.stage("teacher", {}, ("nothing_yet",), Body())


def test_an_evaluation_is_never_reused_for_its_report_lies_outside(toy, tmp_path):
    RunFolder.open(toy).stage("evaluate", {"n": 1}, (), Body())
    body = Body()
    RunFolder.open(replace(toy, run_dir=str(tmp_path / "second"), reuse=toy.run_dir)).stage(
        "evaluate", {"n": 1}, (), body
    )
    assert body.made == [0, 1, 2]


def test_reuse_takes_a_finished_stage_of_another_run(toy, tmp_path):
    RunFolder.open(toy).stage("data", {"n": 1}, (), Body())
    second = RunFolder.open(replace(toy, run_dir=str(tmp_path / "second"), reuse=toy.run_dir, seed=1))
    body = Body()
    assert second.stage("data", {"n": 1}, (), body) == {"steps": 3}
    assert body.made == []
    assert (second.stage_dir("data") / "2.txt").read_text() == "x"
    second.stage("data", {"n": 2}, (), body)
    assert body.made == [0, 1, 2]
    assert (RunFolder.open(toy).stage_dir("data") / "2.txt").exists(), "the source run was touched"
    with pytest.raises(UserError, match="no run folder"):
        RunFolder.open(replace(toy, run_dir=str(tmp_path / "third"), reuse=str(tmp_path / "nowhere")))


def test_another_recipe_s_folder_is_refused_with_every_difference(toy):
    RunFolder.open(toy)
    RunFolder.open(replace(toy, threads=4))
    with pytest.raises(UserError, match=r"has net\.width=8, now net\.width=9; choose another run_dir="):
        RunFolder.open(replace(toy, net=Inner(width=9)))
    with pytest.raises(
        UserError, match=r"now seed=5 \(net\.width changed too\); choose|now net\.width=9 \(seed changed too\); choose"
    ):
        RunFolder.open(replace(toy, net=Inner(width=9), seed=5))


def test_what_a_killed_start_left_half_written_is_gone(toy):
    folder = RunFolder.open(toy).path
    (folder / "stages" / "data").mkdir(parents=True)
    left = folder / "stages" / "data" / ".fingerprint.json.99.tmp"
    left.write_text("{")
    RunFolder.open(toy)
    assert not left.exists()
    assert (folder / "recipe.yaml").is_file()


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(Toy(run_dir=str(folder)))
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_an_impossible_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        RunFolder.open(Toy(run_dir=str(tmp_path / "file" / "run")))


def test_recipe_yaml_says_versions_and_revision(toy):
    text = (RunFolder.open(toy).path / "recipe.yaml").read_text()
    assert text.startswith("# avatar-distill recipe\n")
    assert f"# torch: {torch.__version__.split('+')[0]}" in text
    assert "# revision: " in text


class Follower:
    is_main, rank = False, 1

    def barrier(self):
        pass

    def from_main(self, value):
        return None


def test_only_the_main_rank_writes(toy, tmp_path):
    RunFolder.open(replace(toy, run_dir=str(tmp_path / "follow")), Follower())
    assert not (tmp_path / "follow").exists()

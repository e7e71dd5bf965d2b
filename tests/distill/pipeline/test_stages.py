"""The table of stages: every recipe field belongs to a stage or changes no result, and fingerprints follow what a stage reads."""

import copy
import dataclasses
import functools
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill.compose import RECIPES
from distill.methods import flow_matching, ode_init
from distill.pipeline import stages as module
from distill.pipeline import train_stages
from distill.pipeline.pretrained import digest
from distill.pipeline.stages import Pipeline, check, facts, field_value, stages
from distill.recipe import NO_RESULT, Recipe, TeacherStage, load_recipe, spec_of
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.lora import LoraRoles
from eval.embedded.protocol import EvalConfig
from students.weights import checkpoint
from teachers.errors import UserError
from tests.distill.pipeline.evaluation.test_health import SMALL
from tests.support.faults import around
from tests.support.tiny import Ranks

CASES = {
    "plain": ("scratch_avatar", ()),
    "corrupted": (
        "scratch_avatar",
        ("corruption={blur: 0.1, exposure: 1.0, shift: 0.1, static_text: true}", "lora={rank: 2, alpha: 2}"),
    ),
    "base": ("livetalk", ("teacher.path=nowhere", "size=tiny")),
    "causal": ("midas_avatar", ()),
    "no trajectories": ("scratch_avatar", ("method@init=forcing",)),
}
FAST = ("corrupted", "base")


@functools.cache
def recipe_of(case: str) -> Recipe:
    name, words = CASES[case]
    return load_recipe(RECIPES / f"{name}.yaml", words)


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def parts_of(kind: Any, declared: set[str], prefix: str = "") -> list[str]:
    """Dotted fields of a config, of its parts too where something below them is declared."""
    found = []
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        if any(key.startswith(f"{name}.") for key in declared):
            parts = {"eval": EvalConfig, "engine": EngineConfig, "lora": LoraRoles, "base": TeacherStage}
            part = parts.get(name, field.type)
            found += parts_of(part, declared - {name}, f"{name}.") if dataclasses.is_dataclass(part) else [name]
        else:
            found.append(name)
    return found


def leaves(value: Any, key: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, its owner, its own name) of every value that holds no other."""
    found = []
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{key}{field.name}"
        if dataclasses.is_dataclass(item):
            found += leaves(item, f"{name}.")
        else:
            found.append((name, value, field.name))
    return found


def other(value: Any) -> Any:
    """A value that is not this one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float | Fraction):
        return value + 1
    if isinstance(value, tuple | list):
        return type(value)([*value, "more"])
    if isinstance(value, dict):
        return {**value, "more": 1}
    return Path(f"{value}/more") if isinstance(value, Path) else f"{value} more"


@pytest.mark.parametrize("kind", [Recipe, EvalConfig, EngineConfig, LoraRoles])
def test_every_field_belongs_to_a_stage_or_changes_no_result(kind):
    read = {field for case in CASES for stage in stages(recipe_of(case)) for field in stage.fields}
    prefix = {Recipe: "", EvalConfig: "eval.", EngineConfig: "engine.", LoraRoles: "lora."}[kind]
    for name in parts_of(kind, read | set(NO_RESULT), prefix):
        owners = [field for field in (*read, *NO_RESULT) if below(name, field) or below(field, name)]
        assert owners, f"{name}: give it to a stage in distill/pipeline/stages.py, or to NO_RESULT"
        assert any(below(name, field) for field in read) != any(below(name, free) for free in NO_RESULT), name


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in FAST)]
)
def test_a_changed_field_changes_the_facts_of_the_stages_that_read_it_and_of_no_other(case, monkeypatch):
    monkeypatch.setattr("distill.pipeline.stages.digest", lambda path: f"digest of {path}")
    recipe = recipe_of(case)
    table = stages(recipe)
    before = {stage.name: facts(stage, recipe, {}) for stage in table}
    unread = []
    for name, _, _ in leaves(recipe):
        changed = copy.deepcopy(recipe)
        owner, key = next((owner, key) for other_name, owner, key in leaves(changed) if other_name == name)
        if getattr(owner, key) is None:
            continue
        object.__setattr__(owner, key, other(getattr(owner, key)))
        found = {stage.name for stage in table if facts(stage, changed, {}) != before[stage.name]}
        assert found == {stage.name for stage in table if any(below(name, field) for field in stage.fields)}, name
        assert not found or not any(below(name, free) for free in NO_RESULT), name
        unread += [] if found else [name]
    allowed = [name for name in unread if not any(below(name, free) for free in NO_RESULT)]
    absent = ("trajectories.", "corruption", "base", "ar_teacher", "lora")  # where the recipe has no such stage
    assert all(name.startswith(absent) for name in allowed), allowed


def test_inputs_are_stages_before(tmp_path):
    for case in CASES:
        seen: set[str] = set()
        for stage in stages(recipe_of(case)):
            assert set(stage.inputs) <= seen, (case, stage.name)
            seen.add(stage.name)


def test_a_distillation_depends_on_what_scores_it_and_where_both_networks_start():
    for case, start in (("base", "base"), ("no trajectories", "teacher")):
        (stage,) = (stage for stage in stages(recipe_of(case)) if stage.name == "distill")
        assert {"extractors", "init", start} <= set(stage.inputs), case


def test_the_digests_of_a_data_source_are_in_the_facts_of_the_data_alone():
    recipe = recipe_of("no trajectories")
    found = {stage.name: facts(stage, recipe, {"shards": "abc"}).get("files", {}) for stage in stages(recipe)}
    assert [name for name, files in found.items() if files.get("data source: shards") == "abc"] == ["data"]


def test_every_file_that_a_path_names_is_in_the_facts(tmp_path):
    """Paths are found by walking the config: one changed byte of any of them changes the stages that read it."""
    folder = tmp_path / "models"
    words = [f"teacher.path={folder / 'teacher'}", "size=tiny", f"run_dir={tmp_path / 'run'}"]
    recipe = load_recipe(RECIPES / "livetalk.yaml", words)
    paths = {name: getattr(owner, key) for name, owner, key in leaves(recipe) if isinstance(getattr(owner, key), Path)}
    assert {"teacher.path", "teacher.wan", "base.path", "base.wan", "data.codec.path", "data.audio.path"} <= set(paths)
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights").write_text("one")
    table = stages(recipe)
    before = {stage.name: facts(stage, recipe, {}) for stage in table}
    for name, path in paths.items():
        (path / "weights").write_text("two")
        changed = {stage.name for stage in table if facts(stage, recipe, {}) != before[stage.name]}
        shared = {key for key, value in paths.items() if value == path}
        assert changed == {stage.name for stage in table if shared & set(stage_paths(stage, paths))}, name
        (path / "weights").write_text("one")
    assert "data source: clips" in facts(table[0], recipe, {"clips": "abc"})["files"]


def stage_paths(stage, paths):
    return [name for name in paths if any(below(name, field) for field in stage.fields)]


def test_code_from_outside_is_in_the_facts(tmp_path, monkeypatch):
    """A config whose class is none of ours brings a digest of its file."""
    file = tmp_path / "their_method.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom distill.methods.forcing import needs, build\n"
        "@dataclass(frozen=True)\nclass Config:\n    context: str = 'clean'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import their_method  # pyright: ignore[reportMissingImports]

    recipe = copy.deepcopy(recipe_of("no trajectories"))
    object.__setattr__(recipe.init, "method", their_method.Config())
    stage = next(stage for stage in stages(recipe) if stage.name == "init")
    before = facts_without_names(stage, recipe)
    file.write_text(file.read_text() + "# changed\n")
    after = facts_without_names(stage, recipe)
    assert set(before) == {"init.method code"}
    assert before != after


def facts_without_names(stage, recipe):
    import distill.pipeline.stages as module

    return dict(module._files(field_value(recipe, "init"), "init"))


READ: list[tuple[str, str]] = []


@pytest.fixture
def recorded(monkeypatch):
    """Every field of Recipe, eval, trajectories, health, engine and lora that is read while a stage runs: (stage, dotted field)."""
    now, READ[:] = [""], []

    def watch(kind: type, prefix: str) -> None:
        names = {field.name for field in dataclasses.fields(kind)}
        parts = {"eval", "trajectories", "health", "engine", "lora"} if kind is Recipe else set()

        def read(self, name: str):
            if now[0] and name in names - parts:
                READ.append((now[0], f"{prefix}{name}"))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", read, raising=False)

    from distill.health import HealthConfig
    from distill.recipe import TrajectoriesConfig

    for kind, prefix in (
        (Recipe, ""),
        (EvalConfig, "eval."),
        (TrajectoriesConfig, "trajectories."),
        (HealthConfig, "health."),
        (EngineConfig, "engine."),
        (LoraRoles, "lora."),
    ):
        watch(kind, prefix)
    return now


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


OTHERS = {"plain": (), "forcing": ("method@init=forcing",), "lora": ("lora={rank: 2, alpha: 2}",)}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_stage_reads_no_field_that_it_does_not_declare(runs, recorded, name):
    """What is read while a stage runs is declared by it or by a stage that it builds on, or changes no result. Stages that are
    equal run once."""
    small = (*SMALL, "eval.num_seeds=1", "eval.latency_runs=1", "eval.latency_warmup=0", "eval.num_samples=1")
    reuse = [f"reuse={other}" for other in runs.iterdir()][:1]
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", (*small, f"run_dir={runs / name}", *reuse, *OTHERS[name]))
    pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
    declared: dict[str, set[str]] = {}
    for stage_name, stage in pipeline.stages.items():
        inner = stage.run

        def run(artifacts, folder, inner=inner, stage_name=stage_name):
            recorded[0] = stage_name
            try:
                return inner(artifacts, folder)
            finally:
                recorded[0] = ""

        pipeline.stages[stage_name] = dataclasses.replace(stage, run=run)
        declared[stage_name] = set(stage.fields).union(*(declared[other] for other in stage.inputs))
        pipeline.stage(stage_name)
    structure = {
        "base",
        "ar_teacher",
        "corruption",
        "init",
        "distill",
        "teacher",
        "data",
        "student",
        "trajectories.role",
    }
    for stage_name, field in dict.fromkeys(READ):
        allowed = any(below(field, other) for other in (*declared[stage_name], *NO_RESULT, *structure))
        assert allowed, f"stage {stage_name} reads {field}, which neither it nor an input declares"
    assert len(set(READ)) > (40 if name == "plain" else 20)
    pipeline.artifacts.log.close()


@pytest.mark.parametrize("slot", ["teacher", "ar_teacher", "init", "distill"])
def test_the_recipe_s_seed_given_to_a_stage_is_the_same_training(slot):
    words = (*SMALL, "method@ar_teacher=forcing", "seed=3")

    def of(*more):
        recipe = load_recipe(RECIPES / "scratch_avatar.yaml", (*words, *more))
        return {stage.name: facts(stage, recipe, {}) for stage in stages(recipe)}

    own, given, other = of(), of(f"{slot}.train.seed=3"), of(f"{slot}.train.seed=4")
    assert given == own
    assert [name for name in own if other[name] != own[name]] == [slot]


@pytest.mark.slow
def test_a_stage_of_another_seed_is_another_and_those_before_it_are_the_same(tmp_path, monkeypatch):
    threads = set()

    def rows(original, *given):
        threads.add(threading.current_thread())
        return original(*given)

    around(monkeypatch, train_stages, "batch_rows", rows)

    def weights(*words):
        name = words[0] if words else "init"
        recipe = load_recipe(RECIPES / "scratch_avatar.yaml", (*SMALL, f"run_dir={tmp_path / name}", *words))
        pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
        for stage in list(pipeline.stages)[: list(pipeline.stages).index("init") + 1]:
            pipeline.stage(stage)
        pipeline.close()
        return {file.parent.name: digest(file) for file in (tmp_path / name).glob("stages/*/model.safetensors")}

    first, second = weights(), weights("init.train.seed=1", f"reuse={tmp_path / 'init'}")
    assert len(first) > 1
    assert [name for name in first if first[name] != second[name]] == ["init"]
    assert threads == {threading.main_thread()}, "a CPU that trains makes its batches in no second thread"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (flow_matching.Config(), r"distill\.method: no role 'teacher' to be had; train student"),
        (ode_init.Config(context="data"), r"trajectories\.role: got teacher; distill\.method"),
    ],
)
def test_a_slot_refuses_a_method_that_it_cannot_serve(tmp_path, method, message):
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", [f"run_dir={tmp_path / 'run'}"])
    recipe = replace(recipe, distill=replace(recipe.distill, method=method))
    engine = Engine(recipe.engine)
    with pytest.raises(UserError, match=message) as caught:
        Pipeline(recipe, engine)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["recovery_avatar", "preference_avatar"])
def test_a_finished_student_that_goes_on_keeps_its_sampler(tmp_path, name):
    """Its weights say what they were trained for."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", [f"base.path={tmp_path}"])
    spec, engine = spec_of(recipe), SimpleNamespace(config=recipe.engine, kind="ddp")
    for own, refused in ((spec, False), (replace(spec, sigmas=(1.0, 0.5)), True)):
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", checkpoint._header(own))
        if not refused:
            check(recipe, spec, engine)
            continue
        with pytest.raises(UserError, match=r"sigmas is \[1, .* in the recipe, \[1, 0\.5\] in .*model\.safetensors"):
            check(recipe, spec, engine)
    (tmp_path / "model.safetensors").unlink()
    check(recipe, spec, engine)  # of weights that are not there, or not a student's, nothing is known


def test_a_teacher_of_its_own_waits_for_no_other_where_it_starts_from_no_weights():
    """So that a longer bidirectional teacher leaves it as it is; one that is made of the teacher's network reads its weights."""

    def inputs(name: str, slot: str) -> tuple[str, ...]:
        (found,) = [stage for stage in stages(load_recipe(RECIPES / f"{name}.yaml")) if stage.name == slot]
        return found.inputs

    assert inputs("midas_avatar", "ar_teacher") == ("data",)
    assert inputs("midas_world", "init")[:2] == ("trajectories", "ar_teacher")
    assert inputs("flowact_full", "ar_teacher") == ("data", "teacher")


def test_files_are_digested_by_rank_0_alone(monkeypatch):
    """64 ranks would read 56 GB of a teacher each."""
    monkeypatch.setattr(module, "facts", lambda *_: pytest.fail("another rank has read the files"))
    engine, seen = Ranks(rank=1, world_size=2, is_main=False), []
    engine.from_main = lambda _: {"config": "rank 0's"}  # type: ignore[method-assign]
    folder = SimpleNamespace(stage=lambda _name, config, *_: seen.append(config) or {})
    pipeline: Any = object.__new__(Pipeline)
    pipeline.stages = {"data": SimpleNamespace(inputs=(), run=lambda *_: {}, beside=())}
    pipeline.artifacts = SimpleNamespace(engine=engine, recipe=None, source=SimpleNamespace(), folder=folder)
    pipeline.stage("data")
    assert seen == [{"config": "rank 0's"}]

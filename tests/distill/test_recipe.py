"""Recipes are read strictly, and every shipped one loads under every preset."""

import time
from pathlib import Path

import pytest
import yaml

from distill import compose
from distill.compose import RECIPES, compose_values
from distill.recipe import Recipe, load_recipe, to_dict
from teachers.config import dump
from teachers.errors import UserError

FIELDS = Recipe.__dataclass_fields__


@pytest.fixture
def own(tmp_path) -> Path:
    """A user's recipe outside the shipped folder, with a group of its own and a shipped one."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text("widht: 3\n")
    file = tmp_path / "own.yaml"
    file.write_text(
        "# avatar-distill recipe\ndefaults:\n  - student: mine\n  - engine: local\n  - _self_\n"
        "name: own\nseed: 1\nrun_dir: runs/${name}\nthreads: 1\n"
    )
    return file


def test_composition_finds_own_and_shipped_groups(own):
    values, locate = compose_values(own, ["seed=7", "engine.precision=bf16", "name=other"], FIELDS)
    assert values["seed"] == 7
    assert values["run_dir"] == "runs/other"
    assert values["engine"]["precision"] == "bf16"
    assert values["student"] == {"widht": 3}
    assert locate("student.widht") == str(own.parent / "student" / "mine.yaml")
    assert locate("engine.bucket_mib") == str(RECIPES / "engine" / "local.yaml")
    assert locate("engine.precision") == "command line"
    assert locate("name.x") == "command line"
    assert locate("threads") == str(own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_machines_own_precision_is_written_down(own, monkeypatch, precision):
    """`auto` goes into recipe.yaml and fingerprints as what it is here, also where another key asks for the engine's."""
    monkeypatch.setattr(compose, "native_precision", lambda: precision)
    values, _ = compose_values(own, ["engine.precision=auto", "name=${engine.precision}"], FIELDS)
    assert values["engine"]["precision"] == values["name"] == precision


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sede=1"], "unknown key 'sede': command line; did you mean 'seed'?"),
        (["presett=smoke"], "unknown key 'presett': command line; did you mean 'preset'?"),
        (["engine=locl"], "unknown engine 'locl': command line; did you mean 'local'?"),
        (["student=mone"], "unknown student 'mone': command line; did you mean 'mine'?"),
        (["seed"], "not an override: 'seed' on the command line; write key=value"),
        (["--fast"], "not an override: '--fast' on the command line; write key=value"),
        (["seed=1,2"], "several values in 'seed=1,2': command line"),
        (["hydra.run.dir=x"], "'hydra.run.dir=x' would have no effect"),
        (["run_dir=${nowhere}"], "own.yaml; fix the recipe or the overrides"),
    ],
)
def test_a_wrong_override_is_one_line(own, overrides, words):
    with pytest.raises(UserError) as caught:
        compose_values(own, overrides, FIELDS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "~/a",
        "runs/ä",
        "runs/中文",
        "runs/a[1]",
        "a=b",
        "[x]/y",
        "{a}",
        "a(1)",
        "a'b",
        'a"b',
        "a#b",
        "a&b;c!d",
        "a\\b=c",
        "é [2] = '",
    ],
)
def test_a_path_of_any_name_is_taken_as_it_is_written(own, value):
    values, _ = compose_values(own, [f"run_dir={value}", f"reuse=[{value},b=c]"], FIELDS)
    assert values["run_dir"] == value
    assert values["reuse"] == [value, "b=c"]


def test_home_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(
        RECIPES / "scratch_avatar.yaml",
        ["run_dir=~/run", "reuse=[~/a,b]", "teacher.path=~/weights", "teacher.wan=~no-such-user/x"],
    )
    assert recipe.run_dir == f"{tmp_path}/run"
    assert recipe.reuse == (f"{tmp_path}/a", "b")
    assert recipe.teacher.path == tmp_path / "weights"
    assert str(recipe.teacher.wan) == "~no-such-user/x"


@pytest.mark.parametrize("name", ["ü.yaml", "a=b.yaml", "x[1].yaml", "mein rezept.yaml", "a'b.yaml"])
def test_a_recipe_of_any_name_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / "ö [1] =x"
    folder.mkdir()
    (folder / name).write_text((RECIPES / "scratch_avatar.yaml").read_text())
    assert load_recipe(folder / name, ["preset=smoke"]).name == "scratch_avatar"


@pytest.mark.parametrize("text", ["${oc.env:PASSWORD}", "x-${oc.env:PASSWORD,none}", "${${threads}:PASSWORD}"])
def test_a_recipe_does_not_read_the_environment(own, monkeypatch, text):
    """Its values are written to recipe.yaml and to the report, which people pass on."""
    monkeypatch.setenv("PASSWORD", "very secret")
    with pytest.raises(
        UserError, match=r"a recipe does not read the environment: \$\{oc\.env:PASSWORD\} in "
    ) as caught:
        compose_values(own, [f"name={text}", "threads=oc.env"], FIELDS)
    assert "very secret" not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["a0: abcdefgh", *(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}" for i in range(1, 40))],
        ["a0: {x: 1}", *(f"a{i}: {{x: '${{a{i - 1}}}', y: '${{a{i - 1}}}'}}" for i in range(1, 40))],
        ["a0: [1]", *(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']" for i in range(1, 40))],
        [f"a0: {'x' * 20_000}", *(f"a{i}: ${{a0}}${{a0}}${{a0}}${{a0}}" for i in range(1, 400))],
    ],
    ids=["texts", "mappings", "lists", "long texts"],
)
def test_references_that_grow_are_refused_at_once(own, lines):
    own.write_text(own.read_text() + "\n".join(lines) + "\n")
    began = time.process_time()
    with pytest.raises(UserError, match=rf"^too large: {own} has over 2000 references"):
        compose_values(own, [], FIELDS)
    assert time.process_time() - began < 8


def test_references_of_the_command_line_that_grow_are_refused(own):
    with pytest.raises(UserError, match=r"^too large"):
        compose_values(
            own, ["++a0={x: 1}", *(f"++a{i}={{x: ${{a{i - 1}}}, y: ${{a{i - 1}}}}}" for i in range(1, 12))], FIELDS
        )


@pytest.mark.parametrize("place", ["recipe", "group"])
def test_anchors_that_grow_are_refused_at_once(own, place):
    lines = ["x: &a0 [1,1,1,1,1,1,1,1,1]", *(f"x{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    file = own if place == "recipe" else own.parent / "student" / "mine.yaml"
    file.write_text(file.read_text() + "\n".join(lines) + "\n")
    began = time.perf_counter()
    with pytest.raises(UserError, match=rf"^too large: {file} has over 100000 values with its anchors written out"):
        compose_values(own, [], FIELDS)
    assert time.perf_counter() - began < 2
    file.write_text("a: &a [*a]\n")
    with pytest.raises(UserError, match="an anchor that holds itself"):
        compose_values(own, [], FIELDS)


@pytest.mark.parametrize("text", ["seed: [1\n", "seed: 1\nseed: 2\n", "- 1\n", "defaults:\n  - engine: nowhere\n"])
def test_a_broken_file_is_one_line(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        compose_values(file, [], FIELDS)


def test_a_missing_file_names_the_nearest(own):
    with pytest.raises(UserError, match=r"no recipe file: .*owm.yaml; did you mean 'own.yaml'\?"):
        compose_values(own.with_name("owm.yaml"), [], FIELDS)


SHIPPED = sorted(file for file in RECIPES.glob("*.yaml"))
PRESETS = sorted(file.stem for file in (RECIPES / "preset").glob("*.yaml"))


def switches(file):
    """The ways in which a shipped recipe is run: the embedded one by preset, those of real teachers by size."""
    if any(words in file.read_text() for words in ("preset:", "- scratch_avatar", "- dmd_avatar")):
        return [[f"preset={preset}"] for preset in PRESETS]
    return [["teacher.path=/models/teacher"], ["size=tiny"]]


@pytest.mark.parametrize(
    ("file", "switch"),
    [(file, switch) for file in SHIPPED for switch in switches(file)],
    ids=lambda x: getattr(x, "stem", x[-1] if isinstance(x, list) else None),
)
def test_every_shipped_recipe_loads_and_survives_dump(file, switch, tmp_path):
    recipe = load_recipe(file, [*switch, "seed=3"])
    assert recipe.seed == 3
    assert recipe.run_dir == f"runs/{recipe.name}"
    again = tmp_path / "recipe.yaml"
    again.write_text(dump(recipe))
    read = load_recipe(again)
    assert read == recipe
    assert to_dict(read) == to_dict(recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.precison=bf16", "unknown key 'engine.precison': command line; did you mean 'precision'?"),
        ("engine.precision=fp8", "it must be one of 'fp32', 'bf16'"),
        ("seed=one", "wrong value of 'seed': 'one' in command line; it must be int"),
        ("distill.method.name=dnd", "unknown method 'dnd': command line (distill.method.name)"),
        ("preset=smok", "did you mean 'smoke'?"),
    ],
)
def test_a_mistyped_override_of_the_shipped_recipe_is_one_line(override, words):
    with pytest.raises(UserError) as caught:
        load_recipe(RECIPES / "scratch_avatar.yaml", [override])
    assert words in str(caught.value)


def test_a_recipe_of_a_real_teacher_says_what_it_wants():
    with pytest.raises(UserError, match=r"missing value of 'teacher\.path': .*give it as teacher\.path=VALUE"):
        load_recipe(RECIPES / "livetalk.yaml")
    with pytest.raises(UserError, match=r"no weights of the teacher: give teacher\.path=FOLDER"):
        load_recipe(RECIPES / "scratch_avatar.yaml", ["~teacher.method"])


def test_a_preset_sets_only_what_a_recipe_has():
    """KEY? of a preset is dropped where the recipe has no KEY, and the command line goes above it where it has."""
    plain, midas, codec = (load_recipe(RECIPES / f"{name}.yaml", ["preset=smoke"]) for name in SMOKE)
    assert plain.ar_teacher is None
    assert midas.ar_teacher is not None
    assert midas.ar_teacher.train.num_steps == 4
    assert codec.data.codec.fit.steps == (6, 2, 2)
    live = load_recipe(RECIPES / "liveavatar.yaml", ["size=tiny"])
    assert live.teacher.network.num_layers == 6
    assert live.base.network == live.teacher.network, "a ${KEY} stays one: what it names has its own"
    own = load_recipe(RECIPES / "midas_avatar.yaml", ["ar_teacher.train.num_steps=3", "preset=smoke"])
    assert own.ar_teacher is not None
    assert (own.ar_teacher.train.num_steps, own.ar_teacher.train.log_every) == (3, 2)
    with pytest.raises(UserError, match=r"unknown key 'data\.codec\.fit'"):
        load_recipe(RECIPES / "scratch_avatar.yaml", ["preset=smoke", "data.codec.fit.steps=[1, 1, 1]"])


SMOKE = ("scratch_avatar", "midas_avatar", "midas_dc_ae")


def test_a_preset_of_ones_own_reaches_into_parts_that_are_there(tmp_path):
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "mine.yaml").write_text(
        "# @package _global_\ndistill:\n  method:\n    gan?: 0.5\n    warmup?: 7\nlora?:\n  rank: 3\n  none?: 1\n  alpha?: 5\n"
    )
    (tmp_path / "own.yaml").write_text("defaults:\n  - scratch_avatar\n  - _self_\nname: own\n")
    recipe = load_recipe(tmp_path / "own.yaml", ["preset=mine"])
    assert (recipe.distill.method.gan, recipe.distill.method.warmup, recipe.lora) == (0.0, 7, None)
    recipe = load_recipe(tmp_path / "own.yaml", ["preset=mine", "method@distill=dmd_gan", "lora={rank: 9, alpha: 2}"])
    assert recipe.distill.method.gan == 0.5
    assert recipe.lora is not None
    assert recipe.lora.rank == 9


def test_a_preset_tells_a_trained_teacher_from_a_given_one():
    trained, given = (
        load_recipe(RECIPES / f"{name}_avatar.yaml", ["preset=smoke"]).teacher for name in ("scratch", "dmd")
    )
    assert (trained.network.num_layers, trained.train.num_steps) == (2, 6)
    assert (given.network.num_layers, given.train) == (4, None)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_recipe_leaves_its_engine_to_the_group(file):
    """`engine=zero3` would do nothing, and say nothing, where the recipe's own lines have the last word."""
    engine = yaml.safe_load(file.read_text()).get("engine") or {}
    assert not engine.keys() & {"kind", "shard_ranks", "gather_once"}


@pytest.mark.parametrize("kind", ["zero3", "ddp"])
def test_another_engine_of_a_large_recipe_is_taken(kind):
    engine = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere", f"engine={kind}"]).engine
    assert (engine.kind, engine.precision, engine.checkpointing, engine.shard_ranks) == (kind, "bf16", True, None)


def test_a_method_from_the_command_line_takes_what_it_has_of_the_recipes_body(tmp_path):
    """The body's settings of another method are no error, what the command line or a body says wrongly is."""
    (tmp_path / "own.yaml").write_text(
        "defaults:\n  - dmd_avatar\n  - _self_\nname: own\n"
        "distill: {method: {guidance: {text: 3.0, audio: 2.0}, warmup: 7, shift: 4.0}}\n"
    )

    def method(*words: str):
        return load_recipe(tmp_path / "own.yaml", words).distill.method

    assert (method().warmup, method().guidance.text) == (7, 3.0)
    gan = method("method@distill=dmd_gan")
    assert (gan.warmup, gan.guidance.audio, gan.gan) == (7, 2.0, 0.1)
    forcing = method("method@distill=forcing")
    assert (type(forcing).__module__, forcing.shift) == ("distill.methods.forcing", 4.0)
    assert method("method@distill=dmd_gan", "~distill.method.gan_critic").gan == 0.1
    wrong = ("distill.method.warmup=3", "distill.method.guidance.text=3", "distill.method.guidance={text: 3}")
    for word in (*wrong, "distill.method={warmup: 3}", "distill={method: {warmup: 3}}"):
        with pytest.raises(UserError, match=r"unknown key 'distill\.method\.(warmup|guidance)'"):
            method("method@distill=forcing", word)
    (tmp_path / "own.yaml").write_text(
        "defaults:\n  - dmd_avatar\n  - _self_\nname: own\ndistill: {method: {warmpu: 7}}\n"
    )
    with pytest.raises(UserError, match=r"unknown key 'distill\.method\.warmpu'.*own\.yaml"):
        method("method@distill=forcing")

"""examples/own_teacher from a folder outside the checkout: the whole pipeline, the student it leaves, and a user's mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import distill
from distill.cli import main
from distill.pipeline.pretrained import load_given
from distill.recipe import load_recipe, spec_of
from students.networks.windowed import Windowed
from students.serving.session import Session
from students.weights.checkpoint import load_student
from teachers.conditions import Conditions
from teachers.config import to_plain
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher
from tests.support.processes import finish
from tests.support.runs import SMALL as OF_A_RECIPE_WITH_PRESETS
from tests.support.tiny import some_sound

CHECKOUT = Path(distill.__file__).resolve().parent.parent
EXAMPLE = CHECKOUT / "examples" / "own_teacher"
SMALL = tuple(word for word in OF_A_RECIPE_WITH_PRESETS if not word.startswith("preset="))


def copied(folder: Path) -> Path:
    return shutil.copytree(EXAMPLE, folder / "mine", ignore=shutil.ignore_patterns("__pycache__", "runs"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = copied(tmp_path_factory.mktemp("outside"))
    finish(["run", str(folder / "own_teacher.yaml"), f"run_dir={folder / 'run'}", *SMALL])
    return folder


@pytest.mark.slow
def test_the_student_reads_the_users_condition(finished):
    bundle = load_student(finished / "run" / "student")
    assert isinstance(bundle.student, Windowed)
    portrait, first = torch.linspace(-0.5, 0.5, 32 * 32).view(1, 32, 32).expand(3, -1, -1), {}
    for emotion in (0, 1, None):
        given = {} if emotion is None else {"emotion": torch.eye(4)[emotion]}
        session = Session(bundle, portrait, "a person talks", seed=1, conditions=given)
        session.push(some_sound(12 * bundle.spec.samples_per_frame))
        first[emotion] = session.step() and session.point.seen[-1].x0
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[None])


@pytest.mark.slow
def test_what_was_written_names_the_users_files_and_reads_back(finished):
    saved = finished / "run" / "recipe.yaml"
    values = yaml.safe_load(saved.read_text())
    assert values["teacher"]["network"]["name"] == f"{finished}/emotion_net.py:EmotionNet"
    assert values["data"]["name"] == f"{finished}/emotion_data.py:EmotionWorld"
    assert load_recipe(saved) == load_recipe(finished / "own_teacher.yaml", [f"run_dir={finished / 'run'}", *SMALL])
    spec = json.loads((finished / "run" / "student" / "spec.json").read_text())
    assert spec["network"]["name"] == "windowed"
    assert spec["network"]["network"]["name"] == f"{finished}/emotion_net.py:EmotionNet"
    report = json.loads((finished / "run" / "report.json").read_text())
    assert set(report["systems"]) == {"teacher", "teacher_few_step", "zero_shot", "init", "student"}


@pytest.mark.slow
def test_stages_follow_the_content_of_the_users_file(finished, tmp_path, monkeypatch):
    """Moved, nothing runs again; edited, the teacher's weights are another network's."""
    moved = shutil.copytree(finished, tmp_path / "moved", ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(moved)
    assert main(["run", "own_teacher.yaml", "run_dir=again", f"reuse={finished / 'run'}", *SMALL]) == 0
    one, two = ({p.parent.name: json.loads(p.read_text())["fingerprint"] for p in (run / "stages").glob("*/fingerprint.json")}
                for run in (finished / "run", moved / "again"))  # fmt: skip
    assert one == two
    edited = load_recipe(moved / "own_teacher.yaml")
    before = (moved / "emotion_net.py").read_text()
    plain = to_plain(edited.teacher, digests=True)
    (moved / "emotion_net.py").write_text(before.replace("silu", "gelu"))
    assert to_plain(edited.teacher, digests=True) != plain


@pytest.mark.slow
def test_the_planner_knows_it(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    assert main(["plan", "own_teacher.yaml"]) == 0
    assert "teacher" in capsys.readouterr().out


def edited(folder: Path, file: str, old: str, new: str) -> Path:
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


MISTAKES = [
    ("emotion_net.py", "def build(", "def biuld(", r"missing method build: {file}:EmotionNet \(.*\); add `def build\("),
    (
        "emotion_net.py",
        "class EmotionNet",
        "class EmotionNett",
        r"{file}: no class 'EmotionNet' \(.*\); did you mean 'EmotionNett'",
    ),
    (
        "emotion_net.py",
        "width: int = 64",
        "widht: int = 64",
        r"unknown key 'teacher.network.width' of {file}:EmotionNet: .*; did you mean 'widht'",
    ),
    ("emotion_net.py", "(NetworkKind)", "", r"{file}:EmotionNet is no network: "),
    (
        "own_teacher.yaml",
        "width: 32",
        "wdith: 32",
        r"unknown key 'teacher.network.wdith' of .*/emotion_net.py:EmotionNet: .*; did you mean 'width'",
    ),
    (
        "own_teacher.yaml",
        "emotion_net:EmotionNet",
        "emotion_nett:EmotionNet",
        r"no file of the network .*: .*there is no .*/emotion_nett.py",
    ),
    ("emotion_data.py", "def open(", "open = 1 + (", r"{file}:17: SyntaxError: invalid syntax"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[2].strip("():"))
def test_a_mistake_is_one_line_that_names_the_file(tmp_path, mistake):
    file, old, new, expected = mistake
    folder = copied(tmp_path)
    path = edited(folder, file, old, new)
    with pytest.raises(UserError, match=expected.replace("{file}", str(path))) as error:
        load_recipe(folder / "own_teacher.yaml")
    assert "\n" not in str(error.value)


def conditions(spec, frames: int) -> Conditions:
    audio = torch.zeros(1, frames, spec.codec.stride, spec.audio_dim)
    text, reference = torch.zeros(1, 4, spec.text.dim), torch.zeros(1, *spec.latent_size).unsqueeze(2)
    return Conditions({"emotion": torch.zeros(1, 4)}, text=text, audio=audio, reference=reference)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "return self.out(x)",
            "return self.out(x)[:, :1]",
            r"emotion_net.py:EmotionNet: wrong shape: its output is \[1, 1, 3, 4, 4\]",
        ),
        ("nn.Linear(EMOTIONS, width)", "nn.Linear(5, width)", r"/emotion_net.py:\d+: RuntimeError: .*; fix the file"),
        ("nn.Conv3d(width, width, 3", "nn.Conv3d('a', width, 3", r"/emotion_net.py:\d+: .*; fix the file"),
    ],
    ids=["shape", "inside", "build"],
)
def test_a_network_of_wrong_shapes_is_one_line_that_names_the_file(tmp_path, old, new, expected):
    folder = copied(tmp_path)
    edited(folder, "emotion_net.py", old, new)
    recipe = load_recipe(folder / "own_teacher.yaml")
    spec = spec_of(recipe)
    x = torch.zeros(1, *spec.latent_size).unsqueeze(2).expand(-1, -1, 3, -1, -1)

    def used() -> None:
        AvatarTeacher(recipe.teacher.network.new(spec.dims)).denoise(x, torch.ones(1), conditions(spec, 3))

    with pytest.raises(UserError, match=expected) as error:
        used()
    assert "\n" not in str(error.value)


def test_a_condition_that_the_data_lacks_is_one_line(tmp_path):
    recipe = load_recipe(copied(tmp_path) / "own_teacher.yaml", ["data.name=avatars"])
    spec = spec_of(recipe)
    teacher, given = AvatarTeacher(recipe.teacher.network.new(spec.dims)), conditions(spec, 3)
    without = Conditions({name: value for name, value in given.features.items() if name != "emotion"})
    with pytest.raises(
        UserError, match=r"condition 'emotion': emotion_net.py:EmotionNet takes it, but it is not given; put"
    ):
        teacher.denoise(
            torch.zeros(1, *spec.latent_size).unsqueeze(2).expand(-1, -1, 3, -1, -1), torch.ones(1), without
        )


@pytest.mark.slow
def test_given_weights_are_one_file_under_its_own_names(finished, tmp_path):
    shutil.copytree(finished / "run" / "stages" / "teacher", tmp_path / "weights")
    words = [f"teacher.path={tmp_path / 'weights'}", "teacher.method=null", "teacher.train=null"]
    recipe = load_recipe(finished / "own_teacher.yaml", words)
    net = load_given(recipe.teacher, spec_of(recipe), torch.device("cpu"))
    stored = load_file(tmp_path / "weights" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())
    assert load_given(recipe.teacher, spec_of(recipe), torch.device("meta")) is not None
    other = load_recipe(finished / "own_teacher.yaml", [*words, "teacher.network.width=16"])
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=r"model\.safetensors: audio\.bias is"):
            load_given(other.teacher, spec_of(other), torch.device(device))
    with pytest.raises(
        UserError, match=r"engine\.checkpointing: emotion_net\.py:EmotionNet has no gradient checkpointing"
    ):
        net.kind.enable_checkpointing(net)


@pytest.mark.slow
def test_a_file_that_is_gone_is_one_line(tmp_path, finished):
    student = shutil.copytree(finished / "run" / "student", tmp_path / "student")
    spec = (student / "spec.json").read_text().replace(f"{finished}/", f"{tmp_path}/elsewhere/")
    (student / "spec.json").write_text(spec)
    with pytest.raises(
        UserError,
        match=rf"no file of the network .*: .*/spec.json \(network.network.name\); there is no {tmp_path}/elsewhere/emotion_net.py",
    ):
        load_student(student)

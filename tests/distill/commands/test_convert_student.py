"""`distill convert --to student`: LiveAvatar's LoRA, small and random, as a student folder that a session serves."""

import torch

from distill.cli import main
from distill.compose import RECIPES
from distill.pipeline.tiny import write_weights
from distill.recipe import load_recipe, spec_of
from students.serving.session import Session
from students.weights.checkpoint import load_student
from tests.support.tiny import some_sound


def test_a_published_student_is_served(tmp_path, capsys):
    run, lora = tmp_path / "run", tmp_path / "run" / "tiny" / "lora"
    words = ["size=tiny", f"run_dir={run}", f"base.path={lora}", "base.network=${teacher.network}"]
    recipe = load_recipe(RECIPES / "liveavatar.yaml", words)
    run.mkdir()
    write_weights(recipe, spec_of(recipe))
    base, target = str(recipe.teacher.path), tmp_path / "student"
    given = ["convert", str(lora), str(target), *words, "--to", "student", "--recipe", "liveavatar", "--base", base]
    assert main(given) == 0
    assert "a student of" in capsys.readouterr().out
    bundle = load_student(target)
    spec = bundle.spec
    assert [round(sigma, 4) for sigma in spec.sigmas] == [1, 0.8577, 0.6022, 0.0089]
    history = spec.history
    assert (spec.step, history.window, history.sinks, history.commit) == ("ode", 3, 0, "same_level")
    assert (history.anchors_ahead, history.anchors_roll, spec.horizon_frames) == (18, 12, 6)
    session = Session(bundle, torch.zeros(3, spec.height, spec.width), "a person nods")
    session.push(audio=some_sound(40 * spec.samples_per_frame))
    assert [len(chunk.frames) for chunk in session.frames()] == [13, 12]
    assert session.inputs.given.anchors.shape == (1, 16, 20, 8, 8)


def test_what_goes_together_is_said(tmp_path, capsys):
    for words, message in (
        (["--to", "student"], "--to student and --recipe go together"),
        (["--to", "ours", "--recipe", "liveavatar"], "--to student and --recipe go together"),
        (["seed=1", "--to", "ours"], "seed=1 would have no effect"),
    ):
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *words]) == 2
        assert message in capsys.readouterr().err

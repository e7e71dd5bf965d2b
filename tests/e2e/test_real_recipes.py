"""The recipes of real teachers, run whole on random tiny weights in the published layouts, by the code that loads the real ones."""

import json
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.cli import main
from distill.compose import RECIPES
from distill.data.encoders import ConditionEncoders
from distill.pipeline.pretrained import load_given
from distill.recipe import load_recipe, spec_of
from students.serving.session import Session
from students.weights.checkpoint import load_student
from teachers import media
from teachers.codecs.wan_vae import WanVAE
from teachers.encoders.wav2vec import Wav2Vec
from teachers.errors import UserError
from tests.support.processes import finish

SHORT = ("distill.method.fake_updates=1", "trajectories.num_steps=4", "eval.probe_steps=2")
"""Of all but one, which is as `size=tiny` has it."""
SYSTEMS = {"teacher", "teacher_few_step", "zero_shot", "init", "student"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["livetalk", "self_forcing", "omniavatar_one_gpu", "echomimic"])
def test_a_recipe_runs_whole(name, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    adapters = ["lora.rank=4", "lora.alpha=2", "lora.export=adapter"] if name == "omniavatar_one_gpu" else []
    words = ["size=tiny", "threads=1", f"run_dir={run}", *adapters, *(SHORT if name != "livetalk" else ())]
    if name == "livetalk":  # in this process, which checks shapes
        assert main(["run", str(RECIPES / f"{name}.yaml"), *words]) == 0
    else:
        finish(["run", str(RECIPES / f"{name}.yaml"), *words])
    report = json.loads((run / "report.json").read_text())
    assert set(report["systems"]) == SYSTEMS
    bundle = load_student(run / "student")
    assert isinstance(bundle.codec, WanVAE)
    assert not list((run / "student").glob("codec*")), "what was given stays where it is"
    has_audio = isinstance(bundle.audio_encoder, Wav2Vec)
    assert has_audio == (name != "self_forcing")
    portrait = torch.zeros(3, bundle.spec.height, bundle.spec.width) if has_audio else None
    session = Session(bundle, portrait, "a person nods", seed=1)
    session.push(audio=0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(1)))
    session.close()
    assert sum(len(chunk.frames) for chunk in session.frames()) >= 16
    if has_audio:
        check_sample(name, run, tmp_path, capsys, monkeypatch)
    check_changed_weights(name, run)
    if adapters:
        check_adapters(run)


def check_adapters(run: Path) -> None:
    """What the stages and the student hold, whose base has just been changed."""
    for file in (
        "stages/init/model.safetensors",
        "stages/distill/model.safetensors",
        "student/adapter_model.safetensors",
    ):
        names = [name.removeprefix("base_model.model.") for name in load_file(run / file)]
        # ten matrices in each of six blocks; patch embedding, audio pack, two audio projections
        assert len(names) == 2 * 10 * 6 + 2 + 4 + 2 * 2
        assert all(".lora_" in name or name.startswith(("patch_embedding.", "audio_")) for name in names)
    assert not (run / "student" / "model.safetensors").exists()
    with pytest.raises(
        UserError, match=r"base of the adapter .*student has changed: .*teacher/weights holds other weights"
    ):
        load_student(run / "student")


def check_sample(name: str, run: Path, folder: Path, capsys, monkeypatch) -> None:
    """`distill sample --teacher` on the same weights; the whole sound is encoded, not the 21 frames that are drawn of it."""
    encoded, conditions = [], ConditionEncoders.conditions
    monkeypatch.setattr(
        ConditionEncoders, "conditions", lambda *args: (encoded.append(args[1].shape), conditions(*args))[1]
    )
    image, sound = folder / "face.png", folder / "speech.wav"
    Image.new("RGB", (40, 40), (90, 60, 30)).save(image)
    write_wav(sound)
    words = ["sample", "--teacher", str(RECIPES / f"{name}.yaml"), "size=tiny", f"run_dir={run}"]
    words += ["teacher.sampler.num_steps=4"] if name == "echomimic" else []
    words += ["--image", str(image), "--audio", str(sound), "--text", "a person nods", "--out", str(folder / "t.mp4")]
    assert main(words) == 0
    assert encoded == [(1, 24_000)]
    video, fps = media.read_video(folder / "t.mp4")
    assert video.shape[0] == 21
    assert fps == (25 if name == "echomimic" else 16)
    assert "21 frames" in capsys.readouterr().out


def write_wav(path: Path) -> None:
    sound = (torch.randn(24_000, generator=torch.Generator().manual_seed(2)) * 3000).short().numpy().tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(sound)


def check_changed_weights(name: str, run: Path) -> None:
    """Weights that changed under the same path are noticed: the network they would give is another."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["size=tiny", f"run_dir={run}"])
    spec, base = spec_of(recipe), recipe.base or recipe.teacher
    before = load_given(base, spec, torch.device("cpu"))
    file = Path(base.wan or base.path or "") / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.norm3.bias"] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    after = load_given(base, spec, torch.device("cpu"))
    assert not torch.equal(before.blocks[0].norm2.bias, after.blocks[0].norm2.bias)
    del tensors["blocks.0.norm3.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing blocks\.0\.norm3\.bias"):
        load_given(base, spec, torch.device("cpu"))

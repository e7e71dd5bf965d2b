"""Exports of a LoRA student: merged, as an adapter beside its base, and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.training import lora
from distill.training.lora import LoraRoles, adapt, trained
from students.networks.causal_wan import CausalWan
from students.weights.adapter import Base, digest, fold, read_adapter
from students.weights.checkpoint import Bundle, load_student, save_student
from teachers.disk.digests import SUMS
from teachers.errors import UserError
from teachers.files import save_tensors
from tests.distill.training.test_lora import CONFIG, SMALL, stir
from tests.support.tiny import (
    CHANNELS,
    a_bundle,
    make_net,
    make_spec,
    randn,
    randomise,
    some_conditions,
    some_latents,
)

# Export -----------------------------------------------------------------------------------------------------------------


def a_run(folder: Path) -> tuple[CausalWan, Bundle, LoraRoles]:
    """A trained student over a base on the disk (as a stage leaves it), its adapter's file, and a bundle of the merged student."""
    bundle = a_bundle(prediction="velocity", **SMALL)
    net = randomise(make_net(0), 5).requires_grad_(False)
    save_tensors(folder / "base.safetensors", net.state_dict())
    student = CausalWan(stir(adapt(net, CONFIG, 0, "student")), make_spec(**SMALL))
    save_tensors(folder / "adapter.safetensors", {name: p.detach() for name, p in trained(student.net).items()})
    merged = copy.deepcopy(net)
    fold(merged, CONFIG.adapter({name: p.detach() for name, p in trained(student.net).items()}), folder)
    return student, replace(bundle, student=CausalWan(merged, bundle.spec)), CONFIG


def exported(folder: Path) -> tuple[CausalWan, Bundle, Base]:
    student, bundle, config = a_run(folder)
    base = Base(path=folder / "base.safetensors", ours=True, digest=digest(folder / "base.safetensors", None))
    adapter = config.adapter({name: p.detach() for name, p in trained(student.net).items()})
    save_student(folder / "merged", bundle, "# A card\n")
    save_student(folder / "adapter", bundle, "# A card\n", (adapter, base))
    return student, bundle, base


def clip_of(student: CausalWan) -> Tensor:
    given, x = some_conditions(frames=4), some_latents(frames=4)
    with torch.no_grad():
        return student.denoise_clip(x, torch.tensor([[0.9, 0.3], [0.2, 0.6]]), given, x)


def test_merged_and_adapter_exports_are_the_trained_student(tmp_path):
    student, _, base = exported(tmp_path)
    merged, adapter = (load_student(tmp_path / name) for name in ("merged", "adapter"))
    expected = clip_of(student)
    ours, theirs = clip_of(merged.student), clip_of(adapter.student)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    plain = CausalWan(make_net(0), make_spec(**SMALL))
    plain.net.load_state_dict(load_base(base))
    assert (clip_of(plain) - expected).abs().max() > 0.1
    assert merged.spec == adapter.spec
    assert merged.fingerprint == adapter.fingerprint
    assert not any(p.requires_grad for p in adapter.student.parameters())
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {
        "README.md",
        SUMS,
        "adapter_config.json",
        "adapter_model.safetensors",
        "codec.safetensors",
        "spec.json",
        "text",
    }
    assert json.loads((tmp_path / "adapter" / "spec.json").read_text())["base"]["path"] == str(base.path)
    assert "base" not in json.loads((tmp_path / "merged" / "spec.json").read_text())


def load_base(base: Base) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(base.path)


def test_peft_itself_reads_the_adapter(tmp_path):
    from peft import PeftModel

    student, _, base = exported(tmp_path)
    net = make_net(0)
    net.load_state_dict(load_base(base))
    theirs = PeftModel.from_pretrained(net, str(tmp_path / "adapter"))
    x, sigma, given = randn(2, 2 * CHANNELS + 1, 4, 4, 4), torch.tensor([0.3, 0.8]), some_conditions(frames=4)
    with torch.no_grad():
        ours = student.net(x, sigma, given.text, given.audio)[0]
        assert torch.equal(theirs(x, sigma, given.text, given.audio)[0], ours)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_student(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_without_its_base_is_refused_by_name(tmp_path):
    exported(tmp_path)
    folder, base = tmp_path / "adapter", tmp_path / "base.safetensors"
    tensors, whole = load_base(Base(path=base, digest="")), base.read_bytes()
    save_tensors(base, tensors | {"proj_out.bias": tensors["proj_out.bias"] + 1e-3})
    refused(folder, r"base of the adapter .*adapter has changed: .*base\.safetensors holds other weights")
    base.unlink()
    refused(
        folder,
        r"base of the adapter .*adapter is not at .*base\.safetensors; put it there, or fix base in .*spec\.json",
    )
    base.write_bytes(whole)
    load_student(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, r"adapter of another kind: .*adapter_config\.json has use_dora True"),
        ({"rank_pattern": {"to_q": 2}}, r"has rank_pattern"),
        ({"r": 4}, r"weights do not fit: .*lora_A\.weight is \[3, 32\] where \[4, 32\] is needed"),
        ({"target_modules": ["to_q"]}, r"weights do not fit: .*unexpected blocks\.0\."),
        ({"modules_to_save": None}, r"unexpected audio_cond_projs\.0\.bias"),
        ({"target_modules": ["to_z"]}, r"lora\.targets: no module is called 'to_z'; did you mean"),
        ({"r": "many"}, r"damaged adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change, words):
    exported(tmp_path)
    (tmp_path / "adapter" / SUMS).unlink()  # without a list of its files a folder is not compared with it
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(tmp_path / "adapter", words)


def test_a_damaged_adapter_is_refused(tmp_path):
    exported(tmp_path)
    (tmp_path / "adapter" / SUMS).unlink()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "adapter", r"damaged adapter: .*adapter")
    file.unlink()
    refused(tmp_path / "adapter", r"no adapter: .* lacks adapter_config\.json or adapter_model\.safetensors")


def test_what_a_file_holds_is_what_was_trained(tmp_path):
    """A round trip through the stage's file and through peft's layout; a missing tensor is named."""
    student, _, _ = exported(tmp_path)
    own = trained(student.net)
    kept = read_adapter(tmp_path / "adapter")
    assert (kept.rank, kept.alpha) == (3, 1.5)
    assert set(kept.tensors) == set(own)
    assert all(torch.equal(kept.tensors[name], p) for name, p in own.items())
    fresh = adapt(make_net(0), CONFIG, 1, "student")
    lora.load(fresh, dict(kept.tensors), tmp_path)
    assert all(torch.equal(p, own[name]) for name, p in trained(fresh).items())
    few = {name: x for name, x in kept.tensors.items() if not name.startswith("audio_proj.")}
    with pytest.raises(UserError, match=r"missing audio_proj\.proj\.weight"):
        lora.load(fresh, few, tmp_path)

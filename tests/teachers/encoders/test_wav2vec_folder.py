"""wav2vec 2.0 from folders: published files, shards, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from teachers.checkpoints.local_model import load_pretrained
from teachers.encoders.wav2vec import UNUSED, Wav2Vec
from teachers.errors import UserError
from tests.support.tiny import randn, some_sound
from tests.teachers.encoders.test_wav2vec import WIDTH, WINDOWS, N, a_folder, a_model, published

# ---- folders


def test_a_published_folder_loads_frozen_in_fp32(tmp_path):
    model = a_model()
    folder = a_folder(tmp_path / "wav2vec2-base-960h", model)
    names = set(load_file(folder / "model.safetensors"))
    assert {"lm_head.weight", "wav2vec2.encoder.pos_conv_embed.conv.weight_g"} <= names
    assert "wav2vec2.masked_spec_embed" not in names
    encoder, sound = Wav2Vec.load(folder, WINDOWS, N), some_sound(13 * N)
    assert torch.equal(encoder.whole(sound, 13), Wav2Vec(model.wav2vec2, WINDOWS, N).whole(sound, 13))
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in encoder.parameters())
    assert not encoder.model.training


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    model = a_model()
    folder = a_folder(tmp_path / "encoder", model)
    (folder / "model.safetensors").unlink()
    tensors, parts = published(model), {}
    for i, name in enumerate(tensors):
        parts.setdefault(f"model-0000{1 + i % 2}-of-00002.safetensors", {})[name] = tensors[name]
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sound = some_sound(13 * N)
    expected = Wav2Vec(model.wav2vec2, WINDOWS, N).whole(sound, 13)
    assert torch.equal(Wav2Vec.load(folder, WINDOWS, N).whole(sound, 13), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"^missing model-00002-of-00002.safetensors: .*encoder; get facebook/wav2vec2"):
        Wav2Vec.load(folder, WINDOWS, N)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"damaged file: .*index.json has no weight_map"):
        Wav2Vec.load(folder, WINDOWS, N)


def test_every_missing_file_is_named_with_its_source(tmp_path):
    everything = (
        r"^missing preprocessor_config.json, config.json, model.safetensors: .*; get facebook/wav2vec2-base-960h"
    )
    with pytest.raises(UserError, match=everything):
        Wav2Vec.load(tmp_path / "nothing", WINDOWS, N)
    folder = a_folder(tmp_path / "encoder")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"^missing config.json: ") as caught:
        Wav2Vec.load(folder, WINDOWS, N)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wav2vec2.encoder.layers.1.attention.q_proj.bias": None}, r"missing encoder.layers.1.attention.q_proj.bias"),
        (
            {"wav2vec2.encoder.layers.3.final_layer_norm.bias": randn(WIDTH)},
            r"unexpected .*layers.3.final_layer_norm.bias",
        ),
        ({"wav2vec2.encoder.layer_norm.bias": randn(5)}, r"encoder.layer_norm.bias is \[5\] where \[32\] is needed"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, change, message):
    folder = a_folder(tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors") | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^weights do not fit: .*encoder: {message}; get facebook"):
        Wav2Vec.load(folder, WINDOWS, N)


def test_damaged_files_and_another_sampling_rate_are_one_line(tmp_path):
    folder = a_folder(tmp_path / "encoder")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"^unreadable Wav2Vec2Model: .*encoder \(SafetensorError") as caught:
        load_pretrained(Wav2Vec2Model, folder, "it again", torch.float32, UNUSED)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^unreadable Wav2Vec2Model"):
        Wav2Vec.load(folder, WINDOWS, N)
    folder = a_folder(tmp_path / "others")
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    with pytest.raises(UserError, match=r"sampling_rate is 8000, not 16000"):
        Wav2Vec.load(folder, WINDOWS, N)

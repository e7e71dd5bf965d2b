"""umT5: Wan's two layouts give one encoder, equal to the equations; text is cleaned as Wan cleans it; files are read strictly."""

import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from teachers.encoders.umt5 import UMT5, clean, from_original
from teachers.errors import UserError
from tests.support.tiny import randomise

LAYERS, HEADS, WIDTH, TOKENS = 2, 4, 24, 12
WORDS = ["a", "person", "nods", "and", "someone", "smiles"]
TEXT_ENCODERS = ["a person nods", "someone smiles and nods and smiles and a person nods and smiles and nods", ""]


def a_tokenizer(extra: int = 0) -> T5Tokenizer:
    """The class of Wan's tokenizer folder, on a handful of words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(f"▁{i}", -2.0) for i in range(extra)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def an_encoder(**changes) -> UMT5EncoderModel:
    """The class of Wan's text_encoder folder, with random weights; q, k, v are narrower than the model, as d_kv allows."""
    sizes = {
        "vocab_size": 20,
        "d_model": WIDTH,
        "d_kv": 5,
        "d_ff": 40,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    }
    return randomise(UMT5EncoderModel(UMT5Config(**(sizes | changes)))).eval().requires_grad_(False)


def original(model: UMT5EncoderModel) -> dict[str, Tensor]:
    """The tensors under the names of models_t5_umt5-xxl-enc-bf16.pth, written out one by one."""
    own = model.state_dict()
    out = {"token_embedding.weight": own["shared.weight"], "norm.weight": own["encoder.final_layer_norm.weight"]}
    for i in range(model.config.num_layers):
        theirs, ours = f"blocks.{i}", f"encoder.block.{i}.layer"
        for part in "qkvo":
            out[f"{theirs}.attn.{part}.weight"] = own[f"{ours}.0.SelfAttention.{part}.weight"]
        out[f"{theirs}.pos_embedding.embedding.weight"] = own[f"{ours}.0.SelfAttention.relative_attention_bias.weight"]
        out[f"{theirs}.norm1.weight"] = own[f"{ours}.0.layer_norm.weight"]
        out[f"{theirs}.norm2.weight"] = own[f"{ours}.1.layer_norm.weight"]
        out[f"{theirs}.ffn.gate.0.weight"] = own[f"{ours}.1.DenseReluDense.wi_0.weight"]
        out[f"{theirs}.ffn.fc1.weight"] = own[f"{ours}.1.DenseReluDense.wi_1.weight"]
        out[f"{theirs}.ffn.fc2.weight"] = own[f"{ours}.1.DenseReluDense.wo.weight"]
    return {name: tensor.clone() for name, tensor in out.items()}


def by_the_equations(w: dict[str, Tensor], ids: list[int]) -> Tensor:
    """umT5's encoder on one unpadded text [L] -> [L, D] (Raffel et al. 1910.10683; gated GELU; a bias in every layer)."""

    def rms(name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def bucket(distance: int) -> int:
        """Key minus query: 16 buckets each way, exact below 8, logarithmic to 128."""
        far = abs(distance)
        if far >= 8:
            far = min(15, 8 + int(math.log(far / 8) / math.log(128 / 8) * 8))
        return far + 16 * (distance > 0)

    x, length = w["token_embedding.weight"][ids], len(ids)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        normed = rms(f"{block}.norm1", x)
        q, k, v = ((normed @ w[f"{block}.attn.{part}.weight"].T).unflatten(-1, (HEADS, -1)) for part in "qkv")
        table = w[f"{block}.pos_embedding.embedding.weight"]
        bias = torch.stack([torch.stack([table[bucket(b - a)] for b in range(length)]) for a in range(length)])
        scores = torch.einsum("qhd,khd->qkh", q, k) + bias
        mixed = torch.einsum("qkh,khd->qhd", torch.softmax(scores, 1), v).flatten(1)
        x = x + mixed @ w[f"{block}.attn.o.weight"].T
        normed = rms(f"{block}.norm2", x)
        gated = gelu(normed @ w[f"{block}.ffn.gate.0.weight"].T) * (normed @ w[f"{block}.ffn.fc1.weight"].T)
        x = x + gated @ w[f"{block}.ffn.fc2.weight"].T
    return rms("norm", x)


def a_folder(path, model: UMT5EncoderModel | None = None):
    """text_encoder/ and tokenizer/ as in Wan's diffusers folders."""
    (model or an_encoder()).save_pretrained(path / "text_encoder")
    a_tokenizer().save_pretrained(path / "tokenizer")
    return path


def files_of_wan(path, tensors):
    """models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/ as in Wan's own folders."""
    path.mkdir()
    torch.save(tensors, path / "models_t5_umt5-xxl-enc-bf16.pth")
    a_tokenizer().save_pretrained(path / "google" / "umt5-xxl")
    return path / "models_t5_umt5-xxl-enc-bf16.pth", path / "google" / "umt5-xxl"


def test_features_equal_the_equations_and_padding_is_zero(tmp_path):
    model = an_encoder()
    encoder = UMT5.load(a_folder(tmp_path / "wan", model), TOKENS, torch.float32)
    features = encoder(TEXT_ENCODERS)
    ids, mask = encoder.tokens(TEXT_ENCODERS)
    assert features.shape == (3, TOKENS, WIDTH)
    assert mask.sum(dim=1).tolist() == [4, TOKENS, 1]
    assert ids[:, 0].tolist() == [4, 8, 1]
    assert ids[1, -1] == 1, "a text that is cut keeps its end token"
    weights = original(model)
    for row, one, seen in zip(features, ids, mask, strict=True):
        length = int(seen.sum())
        assert not row[length:].any()
        assert (row[:length] - by_the_equations(weights, one[:length].tolist())).abs().max() < 1e-5
    assert torch.allclose(encoder(TEXT_ENCODERS[:1])[0], features[0], atol=1e-6), "a text depends on its neighbours"


def test_defaults_are_512_tokens_in_bf16(tmp_path):
    encoder = UMT5.load(a_folder(tmp_path / "wan"))
    features = encoder(TEXT_ENCODERS[:1])
    assert features.shape == (1, 512, WIDTH)
    assert features.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in encoder.parameters())


def test_wan_s_own_file_gives_the_same_encoder(tmp_path):
    model = an_encoder()
    weights, tokenizer = files_of_wan(tmp_path / "wan", original(model))
    encoder = UMT5.load_original(weights, tokenizer, TOKENS, torch.float32)
    folder = UMT5.load(a_folder(tmp_path / "diffusers", model), TOKENS, torch.float32)
    assert torch.equal(encoder(TEXT_ENCODERS), folder(TEXT_ENCODERS))
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight
    assert {p.dtype for p in UMT5.load_original(weights, tokenizer).parameters()} == {torch.bfloat16}
    encoder.save(tmp_path / "saved")
    assert torch.equal(UMT5.load(tmp_path / "saved", TOKENS, torch.float32)(TEXT_ENCODERS), folder(TEXT_ENCODERS))


def test_the_published_size():
    """umT5-xxl's encoder: 242 tensors, 5 680 910 336 numbers."""
    shapes = {"token_embedding": (256384, 4096), "norm": (4096,)}
    for i in range(24):
        shapes |= {f"blocks.{i}.{name}": (4096,) for name in ("norm1", "norm2")}
        shapes |= {f"blocks.{i}.attn.{part}": (4096, 4096) for part in "qkvo"}
        shapes |= {f"blocks.{i}.ffn.{name}": (10240, 4096) for name in ("gate.0", "fc1")}
        shapes |= {f"blocks.{i}.ffn.fc2": (4096, 10240), f"blocks.{i}.pos_embedding.embedding": (32, 64)}
    tensors = {
        f"{name}.weight": torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    assert len(tensors) == 242
    model = from_original(tensors, "models_t5_umt5-xxl-enc-bf16.pth", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336
    config = model.config
    assert (config.num_layers, config.num_heads, config.d_kv, config.d_ff) == (24, 64, 64, 10240)


# ---- text


def test_white_space_and_entities_are_cleaned():
    assert clean("  a\tperson \n\n nods\u0020") == "a person nods"
    assert clean("salt &amp;amp; pepper &lt;b&gt;") == "salt & pepper <b>"


def test_the_encoder_reads_and_counts_cleaned_text(tmp_path):
    encoder = UMT5.load(a_folder(tmp_path / "wan"), TOKENS, torch.float32)
    assert torch.equal(encoder([" a \n person&#32;nods "]), encoder(["a person nods"]))
    assert encoder.count("a person&#32;nods&#32;and") == encoder.count("a person nods and") == 5


def test_ftfy_comes_first_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=lambda text: text.replace("\uff0c", "&amp;")))
    assert clean("a \uff0c b") == "a & b"


@pytest.mark.parametrize(
    "text", ["\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd", "caf\u00e9", "&ldquo;hello&rdquo;", "bell\x07", "&EACUTE;"]
)
def test_text_that_needs_ftfy_asks_for_it(monkeypatch, text):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"cleaned with ftfy: .*pip install ftfy"):
        clean(text)
    assert clean("plain & simple") == "plain & simple"


# ---- files


def test_every_missing_file_is_named_with_its_source(tmp_path):
    encoder = "text_encoder/config.json, text_encoder/model.safetensors"
    tokenizer = "tokenizer/tokenizer.json, tokenizer/tokenizer_config.json"
    with pytest.raises(UserError, match=f"^missing {encoder}, {tokenizer}: .*; get .*Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        UMT5.load(tmp_path / "nothing")
    folder = a_folder(tmp_path / "wan")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^missing tokenizer/tokenizer.json: "):
        UMT5.load(folder)
    weights, tokenizer = files_of_wan(tmp_path / "own", original(an_encoder()))
    with pytest.raises(UserError, match=r"^missing other.pth: .*; get models_t5_umt5-xxl-enc-bf16.pth"):
        UMT5.load_original(weights.with_name("other.pth"), tokenizer)
    with pytest.raises(UserError, match=r"^missing tokenizer.json, tokenizer_config.json: "):
        UMT5.load_original(weights, tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    model = an_encoder()
    model.save_pretrained(tmp_path / "wan" / "text_encoder", max_shard_size=4000)
    a_tokenizer().save_pretrained(tmp_path / "wan" / "tokenizer")
    assert torch.equal(
        UMT5.load(tmp_path / "wan", TOKENS, torch.float32)(TEXT_ENCODERS),
        UMT5(a_tokenizer(), model, TOKENS)(TEXT_ENCODERS),
    )
    shard = sorted((tmp_path / "wan" / "text_encoder").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"^missing text_encoder/{shard.name}: "):
        UMT5.load(tmp_path / "wan")


def test_weights_of_a_folder_that_do_not_fit_are_listed(tmp_path):
    folder = a_folder(tmp_path / "wan")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.0.layer_norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing encoder.block.1.layer.0.layer_norm.weight"):
        UMT5.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.ffn.fc1.weight": None}, "missing blocks.1.ffn.fc1.weight"),
        ({"blocks.1.ffn.fc9.weight": torch.zeros(3)}, "unexpected blocks.1.ffn.fc9.weight"),
        (
            {"blocks.0.attn.q.weight": torch.zeros(20, 7)},
            r"blocks.0.attn.q.weight is \[20, 7\] where \[20, 24\] is needed",
        ),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_weights_of_wan_that_do_not_fit_are_listed(tmp_path, change, message):
    tensors = {name: value for name, value in (original(an_encoder()) | change).items() if value is not None}
    with pytest.raises(UserError, match=f"^weights do not fit: .*enc-bf16.pth: {message}; get models_t5"):
        UMT5.load_original(*files_of_wan(tmp_path / "wan", tensors))


def test_a_file_with_more_than_tensors_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^not a table of tensors: .*enc-bf16\.pth; get models_t5"):
        UMT5.load_original(*files_of_wan(tmp_path / "wan", original(an_encoder()) | {"epoch": 3}))


class Code:
    """A pickle of this runs a command."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_with_code_and_a_truncated_file_are_refused(tmp_path):
    trap = tmp_path / "executed"
    with pytest.raises(UserError, match=r"^refused weights: .* is a pickle with code in it"):
        UMT5.load_original(*files_of_wan(tmp_path / "evil", {"norm.weight": Code(trap)}))
    assert not trap.exists()
    weights, tokenizer = files_of_wan(tmp_path / "cut", original(an_encoder()))
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"^damaged weights: ") as caught:
        UMT5.load_original(weights, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = a_folder(tmp_path / "wan")
    a_tokenizer(extra=30).save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer of another model: .* has 40 tokens, the encoder 20"):
        UMT5.load(folder)
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^unreadable tokenizer: ") as caught:
        UMT5.load(folder)
    assert "\n" not in str(caught.value)
    assert json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["tokenizer_class"]

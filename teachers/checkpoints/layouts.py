"""The published layouts of Wan's transformer: key names, shapes, and the config that shapes determine. No tensor is touched here.

ours           diffusers' names, with OmniAvatar's audio modules: the state dict of teachers.networks.wan.AvatarTransformer
wan            names of Wan2.1 (2503.20314); OmniAvatar (2506.18866) and LiveTalk add the audio modules to them
diffusers      WanTransformer3DModel
self-forcing   a torch archive {"generator": {"model." + Wan's name: tensor}} (Self Forcing 2506.08009, CausVid 2412.07772)
longcat        LongCat-Video-Avatar (2512.13531), of another backbone, whose names are ours too

A kind of network whose `rows` are all that it has (`whole`) is a layout of its own, under the kind's name.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from math import prod
from typing import Any

from teachers.checkpoints.strict import check_shapes, listed
from teachers.conditions import taken
from teachers.errors import UserError
from teachers.networks.kind import NETWORKS
from teachers.resolve import resolve

Shape = tuple[int, ...]
Row = tuple[str, str, tuple[str, ...]]  # Wan's name, ours, sizes; {} is the index of a block or of an audio projection


def _rows(text: str) -> tuple[Row, ...]:
    """Lines `Wan's name | our name | sizes`, or `=` for the same name; `x.*` stands for x.weight and for x.bias, which has the
    first size alone."""
    rows: list[Row] = []
    for line in text.strip().splitlines():
        wan, ours, sizes = (cell.strip() for cell in line.split("|"))
        ours = wan if ours == "=" else ours
        rows.append((wan.replace("*", "weight"), ours.replace("*", "weight"), tuple(sizes.split())))
        if wan.endswith("*"):
            rows.append((wan.replace("*", "bias"), ours.replace("*", "bias"), tuple(sizes.split()[:1])))
    return tuple(rows)


# D width, I and O channels in and out (of a patch), p q r patch, T text, Q sinusoids of the time, F feed-forward, V CLIP image,
# A audio and P pose rows of one latent frame, H what they are packed to
WAN = _rows("""
    patch_embedding.*                  | patch_embedding.*                               | D I p q r
    text_embedding.0.*                 | condition_embedder.text_embedder.linear_1.*     | D T
    text_embedding.2.*                 | condition_embedder.text_embedder.linear_2.*     | D D
    time_embedding.0.*                 | condition_embedder.time_embedder.linear_1.*     | D Q
    time_embedding.2.*                 | condition_embedder.time_embedder.linear_2.*     | D D
    time_projection.1.*                | condition_embedder.time_proj.*                  | 6D D
    blocks.{}.modulation               | blocks.{}.scale_shift_table                     | 1 6 D
    blocks.{}.self_attn.q.*            | blocks.{}.attn1.to_q.*                          | D D
    blocks.{}.self_attn.k.*            | blocks.{}.attn1.to_k.*                          | D D
    blocks.{}.self_attn.v.*            | blocks.{}.attn1.to_v.*                          | D D
    blocks.{}.self_attn.o.*            | blocks.{}.attn1.to_out.0.*                      | D D
    blocks.{}.self_attn.norm_q.weight  | blocks.{}.attn1.norm_q.weight                   | D
    blocks.{}.self_attn.norm_k.weight  | blocks.{}.attn1.norm_k.weight                   | D
    blocks.{}.norm3.*                  | blocks.{}.norm2.*                               | D
    blocks.{}.cross_attn.q.*           | blocks.{}.attn2.to_q.*                          | D D
    blocks.{}.cross_attn.k.*           | blocks.{}.attn2.to_k.*                          | D D
    blocks.{}.cross_attn.v.*           | blocks.{}.attn2.to_v.*                          | D D
    blocks.{}.cross_attn.o.*           | blocks.{}.attn2.to_out.0.*                      | D D
    blocks.{}.cross_attn.norm_q.weight | blocks.{}.attn2.norm_q.weight                   | D
    blocks.{}.cross_attn.norm_k.weight | blocks.{}.attn2.norm_k.weight                   | D
    blocks.{}.ffn.0.*                  | blocks.{}.ffn.net.0.proj.*                      | F D
    blocks.{}.ffn.2.*                  | blocks.{}.ffn.net.2.*                           | D F
    head.modulation                    | scale_shift_table                               | 1 2 D
    head.head.*                        | proj_out.*                                      | O D
""")
IMAGE = _rows("""
    img_emb.proj.0.*                       | condition_embedder.image_embedder.norm1.*         | V
    img_emb.proj.1.*                       | condition_embedder.image_embedder.ff.net.0.proj.* | V V
    img_emb.proj.3.*                       | condition_embedder.image_embedder.ff.net.2.*      | D V
    img_emb.proj.4.*                       | condition_embedder.image_embedder.norm2.*         | D
    blocks.{}.cross_attn.k_img.*           | blocks.{}.attn2.add_k_proj.*                      | D D
    blocks.{}.cross_attn.v_img.*           | blocks.{}.attn2.add_v_proj.*                      | D D
    blocks.{}.cross_attn.norm_k_img.weight | blocks.{}.attn2.norm_added_k.weight               | D
""")
AUDIO = _rows("""
    audio_proj.proj.*     | audio_proj.proj.*     | H A
    audio_proj.norm_out.* | audio_proj.norm_out.* | H
    audio_cond_projs.{}.* | audio_cond_projs.{}.* | D H
""")
POSE = _rows("""
    pose_proj.proj.*     | pose_proj.proj.*     | H P
    pose_proj.norm_out.* | pose_proj.norm_out.* | H
    pose_cond_proj.*     | pose_cond_proj.*     | D H
""")
KINDS: dict[str, Any] = {name: resolve(NETWORKS, name) for name in NETWORKS.ours}
"""The kinds of network by name; those with `rows` have more than Wan."""
WHOLE = {name: _rows(kind.rows) for name, kind in KINDS.items() if kind.whole}
"""Of the kinds that are no Wan."""
BEYOND = {name: _rows(kind.rows) for name, kind in KINDS.items() if kind.rows and not kind.whole}
LAYOUTS = ("ours", "wan", "diffusers", "self-forcing", *WHOLE)
SYMBOLS = {size for _, _, dims in (*WAN, *IMAGE, *AUDIO, *POSE) for size in dims}
ROWS = (*WAN, *IMAGE, *AUDIO, *POSE, *chain.from_iterable((*BEYOND.values(), *WHOLE.values())))
TO_OURS = {wan: ours for wan, ours, _ in ROWS}
TO_WAN = {ours: wan for wan, ours, _ in ROWS}

UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight|freqs")
"""Published diffusers image-to-video weights have the first, and no network uses it; the second is Wan's table of positions."""
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
"""Of peft, ComfyUI, diffusers' LoRA files and Self-Forcing's wrapper module, in the order in which they are taken off."""
HYPHEN = "___lorahyphen___"
"""Of LongCat-Video's LoRAs, in the place of dots."""
_WRAPPED = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module|base_layer)\.")
_NUMBERED = re.compile(r"(\D+?)\.(\d+)\.(.+)")
_KOHYA = re.compile(r"lora_unet_+blocks_(\d+)_(\w+)\.(.+)")
_MODULES = {
    module.replace(".", "_"): module
    for row in (*WAN, *IMAGE, *chain.from_iterable((*BEYOND.values(), *WHOLE.values())))
    for name in row[:2]
    if (module := name.removeprefix("blocks.{}.").removesuffix(".weight")) != name
}
"""Of a block, as kohya's trainers write them: self_attn_q."""
LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
"""Modules that OmniAvatar's LoRA changes, and LiveAvatar's, by the end of Wan's name."""
LORA_PARTS = ("blocks.", "audio_injector.")
"""The parts of a network that such modules are in."""
LORA_RANK, LORA_ALPHA = 128, 64
"""Of the published OmniAvatar, whose scale is alpha / rank = 0.5."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a checkpoint's network: by its shapes, then (from head_dim on) published values of what shapes do not determine."""

    width: int
    in_channels: int
    out_channels: int
    patch: tuple[int, int, int]
    num_layers: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    packed: int = 0
    num_audio: int = 0
    image_dim: int = 0
    audio_in: int = 0
    pose_in: int = 0
    head_dim: int = 128
    stride: int = 4
    audio_blocks: tuple[int, ...] | None = None
    prediction: str = "velocity"
    eps: float = 1e-6
    max_positions: int = 1024
    kind: str = "wan"
    beyond: tuple[tuple[str, int], ...] = ()  # sizes of the symbols that the kind's own rows bring
    own: tuple[tuple[str, Any], ...] = ()  # keys of our config.json that the kind brings


REPRESENTABLE = {
    "ours": {"audio_in", "pose_in", "image_dim", "head_dim", "stride", "audio_blocks"}
    | {"prediction", "eps", "max_positions", "kind"},
    "wan": {"audio_in", "image_dim", "head_dim", "eps", "kind"},
    "diffusers": {"image_dim", "head_dim", "eps", "max_positions"},
    "self-forcing": {"audio_in", "image_dim"},
    **{name: {"head_dim", "stride", "kind"} for name in WHOLE},
}
"""Fields that a layout can represent beyond the text-to-video sizes."""


def rename(name: str, table: Mapping[str, str]) -> str:
    """`name` by TO_OURS or TO_WAN; a name that is not in the table stays."""
    match = None if name in table else _NUMBERED.fullmatch(name)
    renamed = table.get(f"{match[1]}.{{}}.{match[3]}" if match else name)
    return name if renamed is None else renamed.format(match[2]) if match else renamed


def bare(name: str) -> str:
    """`name` without the wrappers of FSDP, checkpointing, torch.compile, DDP and peft, and without PREFIXES; kohya's and
    LongCat-Video's with dots."""
    name = _WRAPPED.sub("", name)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = name.removeprefix(f"lora{HYPHEN}").replace(HYPHEN, ".")
    flat = _KOHYA.fullmatch(name)
    return f"blocks.{flat[1]}.{_MODULES.get(flat[2], flat[2])}.{flat[3]}" if flat else name


def naming(names: Collection[str], where: Any) -> str:
    """The layout of bare names: "wan", "ours" or that of another backbone; UserError for another model's."""
    if other := next((kind for kind, rows in WHOLE.items() if rows[0][0] in names), None):
        return other
    matches = [
        layout
        for layout, key in (
            ("wan", r"blocks\.\d+\.(self_attn\.|cross_attn\.|ffn\.\d)"),
            ("ours", r"blocks\.\d+\.(attn[12]\.to|ffn\.net)"),
        )
        if any(re.match(key, name) for name in names)
    ]
    if not matches and any(rows[0][0].format(0) in names for rows in BEYOND.values()):
        matches = ["wan"]  # a part of the weights, over others
    if len(matches) != 1:
        raise UserError(
            f"layout of another model: {where} has {listed(names, 3) or 'nothing'}, where Wan has blocks.0.self_attn.q.weight "
            "and diffusers' Wan blocks.0.attn1.to_q.weight; give weights of Wan2.1, OmniAvatar, Self-Forcing or LiveTalk"
        )
    return matches[0]


def _expand(architecture: Architecture) -> Iterator[tuple[str, str, Shape]]:
    """Every tensor as (Wan's name, our name, shape)."""
    a = architecture
    sizes = {"D": a.width, "6D": 6 * a.width, "I": a.in_channels, "O": a.out_channels * prod(a.patch), "T": a.text_dim,
             "Q": a.freq_dim, "F": a.ffn_dim, "V": a.image_dim, "A": a.audio_in, "P": a.pose_in, "H": a.packed,
             **dict(zip("pqr", a.patch, strict=True)), **dict(a.beyond)}  # fmt: skip
    own = BEYOND.get(a.kind, ())  # of which those by number that are no block's are as many as there are of audio
    groups = ((WAN, True), (IMAGE, a.image_dim), (AUDIO, a.audio_in), (POSE, a.pose_in), (own, True))
    groups = ((WHOLE[a.kind], True),) if a.kind in WHOLE else groups
    for wan, ours, dims in chain.from_iterable(rows for rows, exists in groups if exists):
        shape = tuple(int(size) if size.isdecimal() else sizes[size] for size in dims)
        count = a.num_layers if ours.startswith("blocks.") else a.num_audio if "{}" in wan else 1
        yield from ((wan.format(i), ours.format(i), shape) for i in range(count))


def tensors(architecture: Architecture, layout: str = "ours") -> dict[str, Shape]:
    """Name -> shape of every tensor of a layout; those of self-forcing are the names inside its entry."""
    if layout in ("ours", "diffusers"):
        return {ours: shape for _, ours, shape in _expand(architecture)}
    prefix = "model." if layout == "self-forcing" else ""
    return {prefix + wan: shape for wan, _, shape in _expand(architecture)}


def infer(shapes: Mapping[str, Shape], where: Any) -> Architecture:
    """The architecture by the shapes of tensors under our names; `check` then verifies every tensor.

    Raises UserError where a tensor that determines a size is missing.
    """
    sizes: dict[str, int] = {}
    kind = next((name for name, rows in (WHOLE | BEYOND).items() if rows[0][1].format(0) in shapes), "wan")
    own, base = (WHOLE | BEYOND).get(kind, ()), WHOLE.get(kind, WAN)
    for _, ours, dims in own if kind in WHOLE else (*WAN, *IMAGE, *AUDIO, *POSE, *own):
        shape = shapes.get(ours.format(0), ())
        if len(shape) == len(dims):
            for symbol, size in zip(dims, shape, strict=True):
                sizes.setdefault(symbol, size)
    needed = [ours.format(0) for _, ours, dims in base if not {d for d in dims if d[-1].isalpha()} <= {*sizes, "6D"}]
    if needed:
        part = "; give the weights that these replace a part of as --base" if kind in BEYOND else ""
        raise UserError(f"weights do not fit: {where}: missing {listed(needed)}; is the download complete?{part}")

    def count(stem: str) -> int:
        matches = (re.match(rf"{stem}\.(\d+)\.", name) for name in shapes)
        return 1 + max((int(match[1]) for match in matches if match), default=-1)

    stems = {"audio_cond_projs", *(name.partition(".{}")[0] for _, name, _ in own if not name.startswith("blocks."))}
    patch = (sizes["p"], sizes["q"], sizes["r"])
    symbols = {symbol for _, _, dims in own for symbol in dims if not symbol.isdecimal()}
    beyond = tuple((symbol, sizes[symbol]) for symbol in sorted(symbols - set(SYMBOLS)) if symbol in sizes)
    return Architecture(
        width=sizes["D"], in_channels=sizes["I"], out_channels=sizes["O"] // prod(patch), patch=patch,
        num_layers=count("blocks"), ffn_dim=sizes["F"], text_dim=sizes["T"], freq_dim=sizes["Q"], packed=sizes.get("H", 0),
        num_audio=max(map(count, stems)), image_dim=sizes.get("V", 0), audio_in=sizes.get("A", 0),
        pose_in=sizes.get("P", 0), kind=kind, beyond=beyond,
    )  # fmt: skip


def check(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], names: Mapping[str, str], where: Any) -> None:
    """UserError that lists what is missing, unexpected or of another shape; `names` turns our names to the source's."""
    hint = "is the download complete, and of this model?"
    if any(name not in expected for name in shapes):
        hint += " `distill convert --leave-out NAME` makes weights without what is unexpected"
    check_shapes(shapes, expected, where, hint, named=lambda name: rename(name, names))


def with_config(architecture: Architecture, config: Mapping[str, Any], where: Any) -> Architecture:
    """The architecture with the fields of a config.json (any layout's); UserError where it and the weights disagree."""
    heads = config.get("num_heads", config.get("num_attention_heads"))
    head_dim = config.get("head_dim", config.get("attention_head_dim", architecture.width // heads if heads else 128))
    rule = tuple(range(2, architecture.num_layers // 2 + 1))
    blocks = config.get("audio_blocks")
    result = replace(
        architecture,
        head_dim=head_dim,
        stride=config.get("stride") or config.get("vae_stride", (4,))[0],
        audio_blocks=None if blocks is None or tuple(blocks) == rule else tuple(blocks),
        prediction=config.get("prediction", "velocity"),
        eps=config.get("eps", 1e-6),
        max_positions=config.get("max_positions", config.get("rope_max_seq_len", 1024)),
    )
    if result.width % head_dim or (heads and heads * head_dim != result.width):
        raise UserError(
            f"heads do not fit: {where}: width {result.width} is not a number of heads of {head_dim}; "
            "put a config.json with num_heads beside the weights"
        )
    if config.get("num_layers", result.num_layers) != result.num_layers:
        raise UserError(
            f"weights do not fit: {where}: config.json states {config['num_layers']} layers, the weights have {result.num_layers}; "
            "is a file missing?"
        )
    if "image" in taken(KINDS[result.kind]) and not result.image_dim:
        raise UserError(
            f"weights do not fit: {where}: {result.kind} goes with Wan's image-to-video weights, these have no image path; "
            "give those of Wan2.1-I2V"
        )
    own = KINDS[result.kind].own_config(dict(result.beyond, num_audio=result.num_audio), result.stride, config)
    result = replace(result, own=tuple(own.items()))
    needed = len(rule if result.audio_blocks is None else result.audio_blocks)
    if result.audio_in and result.num_audio != needed:
        raise UserError(
            f"weights do not fit: {where}: {result.num_audio} audio_cond_projs for {result.num_layers} layers, where {needed} are "
            "needed; is the download complete?"
        )
    if result.audio_in % result.stride or result.pose_in % result.stride:
        raise UserError(
            f"weights do not fit: {where}: {result.audio_in} audio channels are not {result.stride} frames of them"
        )
    return result


def check_representable(architecture: Architecture, layout: str, where: Any) -> None:
    """UserError where `layout` cannot represent the architecture: nothing is dropped silently."""
    a, lost = architecture, []
    has_stride = a.audio_in or a.pose_in or a.image_dim
    for field in fields(a):
        is_extra = (
            any(field.name in names for names in REPRESENTABLE.values()) and field.name not in REPRESENTABLE[layout]
        )
        if is_extra and getattr(a, field.name) != field.default and (field.name != "stride" or has_stride):
            lost.append(f"{field.name} {getattr(a, field.name)}")
    if layout not in ("ours", a.kind) and (a.kind in WHOLE or layout in WHOLE):
        lost.append(f"a network of kind {a.kind}")
    if layout == "ours":
        if a.in_channels not in KINDS[a.kind].input_channels(a.out_channels, a.stride, a.image_dim):
            lost.append(f"{a.in_channels} input channels for {a.out_channels}")
        if a.patch[0] != 1 or a.patch[1] != a.patch[2]:
            lost.append(f"patches of {a.patch}")
    if lost:
        raise UserError(f"layout {layout} cannot represent {', '.join(lost)}: {where}; choose another --to")


def apart(kind: str, names: Collection[str]) -> list[str]:
    """Those of the names, Wan's or ours, that a kind of network is published with apart from Wan's: its adapter; else none."""
    if not KINDS[kind].apart:
        return []
    rows = {re.escape(name).replace(r"\{\}", r"\d+") for row in BEYOND[kind] for name in row[:2]}
    own = re.compile("|".join(sorted(rows)))
    return [name for name in names if own.fullmatch(name)]


def network_class(architecture: Architecture) -> Any:
    """The class of the module of an architecture."""
    return KINDS[architecture.kind].module_class()


def make_config(architecture: Architecture, layout: str) -> dict[str, Any] | None:
    """The config.json of a layout; None where it has none (self-forcing)."""
    a = architecture
    num_heads = a.width // a.head_dim
    shared = {name: getattr(a, name) for name in ("num_layers", "ffn_dim", "freq_dim", "text_dim", "eps")}
    if layout in WHOLE:
        return KINDS[layout].published_config(make_config(a, "ours"))
    if layout == "ours" and a.kind in WHOLE:
        return {
            "_class_name": network_class(a).__name__, "num_layers": a.num_layers, "num_heads": num_heads, "head_dim": a.head_dim,
            "ffn_dim": a.ffn_dim, "freq_dim": a.freq_dim, "text_dim": a.text_dim, "latent_channels": a.out_channels,
            "patch": a.patch[1], "stride": a.stride, "audio_hidden": a.packed, "max_positions": a.max_positions, **dict(a.own),
        }  # fmt: skip
    if layout == "ours":
        symbol, states = KINDS[a.kind].audio_row
        audio_dim = states * dict(a.beyond).get(symbol, 0) if states else a.audio_in // a.stride
        return {
            "_class_name": network_class(a).__name__, **shared, "num_heads": num_heads, "head_dim": a.head_dim,
            "latent_channels": a.out_channels, "reference": a.in_channels != a.out_channels, "patch": a.patch[1],
            "stride": a.stride, "audio_dim": audio_dim, "audio_hidden": a.packed or 32,
            "audio_blocks": None if a.audio_blocks is None else list(a.audio_blocks),
            **({"pose_dim": a.pose_in // a.stride} if a.pose_in else {}),
            **({"image_dim": a.image_dim} if a.image_dim else {}),
            "prediction": a.prediction, "max_positions": a.max_positions, **dict(a.own),
        }  # fmt: skip
    if layout == "diffusers":
        return {
            "_class_name": "WanTransformer3DModel", **shared, "num_attention_heads": num_heads, "attention_head_dim": a.head_dim,
            "in_channels": a.in_channels, "out_channels": a.out_channels, "patch_size": list(a.patch),
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": a.max_positions,
            "image_dim": a.image_dim or None, "added_kv_proj_dim": a.width if a.image_dim else None,
            "pos_embed_seq_len": None,
        }  # fmt: skip
    if layout == "wan":
        return {
            "_class_name": "WanModel", "model_type": "i2v" if a.image_dim else "t2v", **shared, "num_heads": num_heads,
            "dim": a.width, "in_dim": a.in_channels, "out_dim": a.out_channels, "text_len": 512,
            **KINDS[a.kind].published_config(make_config(a, "ours") or {}),
        }  # fmt: skip
    return None

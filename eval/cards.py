"""Protocol cards of `distill eval`: YAML files that name everything on which a score depends, typed, with one hash.

A card is `eval/protocols/NAME.yaml` or a file of the user's. They lie beside the code that scores, below recipes, so that who
only scores needs no recipe. Two numbers may be compared only where the hashes of their cards are equal.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from eval.embedded.protocol import canonical_sha256
from eval.networks import i3d, syncnet
from eval.networks.weights import REGISTRY
from teachers.config import convert, nearest, to_plain
from teachers.errors import UserError

PROSE = ("source", "note", "choices", "sha256")
"""Keys that describe and do not decide: they are not hashed."""
FROM_RUN = "probes"
"""The extractor whose sha256 is that of a run, filled in by `Card.resolved`."""


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """What is scored of a clip, and what is refused.

    num: clips in a set (null: as many as the real set has); frames: the first ones that count (null: all, as many in every clip)
    fps, retime: another rate is refused, or each frame is the picture that a player shows at its time (null fps: as it is)
    size, fit: height and width; another size is refused, or scaled (antialiased bicubic) and cut around its centre (null: as it is)
    lossless: generated clips must be tensors or lossless RGB films; given: leading frames that are the reference, not scored by FID
    """

    num: int | None
    frames: int | None
    fps: Fraction | None
    retime: Literal["refuse", "shown"]
    size: tuple[int, int] | None
    fit: Literal["refuse", "crop"]
    lossless: bool
    given: int

    def __post_init__(self):
        for name in ("num", "frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"card: clips.{name} must be at least 1: got {getattr(self, name)}; null takes all")
        if self.fps is not None and self.fps <= 0:
            raise UserError(f"card: clips.fps must be above 0: got {self.fps}")
        if self.given < 0 or (self.frames is not None and self.given >= self.frames):
            raise UserError(f"card: clips.given must leave a frame: got {self.given}")


@dataclass(frozen=True, kw_only=True)
class FrameRule:
    """FID and KID: Frechet distance and unbiased MMD^2 of frame features.

    every: each n-th frame; pooling: the frames of the whole set in one distance, or a distance for each pair of clips and their
    mean; ddof: covariance over N - ddof. No resize here antialiases.
    """

    extractor: Literal["inception", "probes"]
    sha256: str | None
    layer: Literal["pool3, 2048", "frame probe, 64"]
    resize: Literal["tf1", "pytorch_fid", "none"]
    antialias: Literal[False]
    every: int
    pooling: Literal["set", "pair"]
    ddof: Literal[0, 1]


@dataclass(frozen=True, kw_only=True)
class VideoRule:
    """FVD: Frechet distance of one feature a clip, over all its frames."""

    extractor: Literal["i3d", "probes"]
    sha256: str | None
    layer: Literal["logits, 400", "clip probe, 64"]
    resize: Literal["stylegan_v", "common_metrics", "none"]
    antialias: Literal[False]
    ddof: Literal[0, 1]


@dataclass(frozen=True, kw_only=True)
class SyncRule:
    """Lip sync. With probes fps, resample, crop and padding say what they are: nothing is resampled or cropped.

    resample: how a clip comes to `fps`; box: one a clip, the real clip's, for both
    sound: a generated clip's own, or the real clip's
    """

    extractor: Literal["syncnet", "probes"]
    sha256: str | None
    fps: Fraction | None
    resample: Literal["duplicate", "nearest", "blend", "none"]
    max_lag: int
    padding: Literal["zeros", "none"]
    box: Literal["real", "none"]
    crop_scale: float | None
    crop_pad: int | None
    channels: Literal["bgr", "rgb"]
    sound: Literal["own", "real"]


@dataclass(frozen=True, kw_only=True)
class IdentityRule:
    """Likeness of every frame but the first to the real clip's first frame."""

    extractor: Literal["dinov2", "probes"]
    sha256: str | None
    layer: Literal["class token, 768", "identity head"]
    score: Literal["cosine", "one minus own over swapped"]


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """PSNR, SSIM and LPIPS of a generated frame with the real one at its time; both in 0..255 (LPIPS in [-1, 1])."""

    ssim: Literal["gaussian 11, sigma 1.5, reflected, RGB"]
    lpips: Literal["alex, v0.1"]
    lpips_sha256: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One protocol. `choices` lists what is ours because the source is silent; a rule that is null is not part of the protocol.

    window_seconds: of the windows over which drift in a clip is a slope; clips of fewer than two have none
    """

    name: str
    source: str
    note: str
    choices: tuple[str, ...]
    clips: ClipRule
    fid: FrameRule | None
    fvd: VideoRule | None
    sync: SyncRule | None
    identity: IdentityRule | None
    pairs: PairRule | None
    window_seconds: Fraction
    floor_splits: int
    errors: Literal["jackknife over clips"]

    @property
    def sha256(self) -> str:
        """Hash over every key that decides a number."""
        return canonical_sha256({key: value for key, value in to_plain(self).items() if key not in PROSE})

    @property
    def label(self) -> str:
        """Name and the first digits of the hash: what stands beside a number."""
        return f"{self.name} {self.sha256[:12]}"

    @property
    def embedded(self) -> bool:
        """Whether its extractors are those of a run."""
        return any(rule is not None and rule.extractor == FROM_RUN for rule in self._with_extractor().values())

    def resolved(self, probes_sha256: str) -> "Card":
        """The same card with the hash of a run's probes where it has them."""
        rules = {
            name: dataclasses.replace(rule, sha256=probes_sha256)
            for name, rule in self._with_extractor().items()
            if rule is not None and rule.extractor == FROM_RUN
        }
        return dataclasses.replace(self, **rules)

    def plain(self) -> dict[str, Any]:
        """For eval.json: every key, and the hash."""
        return {**to_plain(self), "sha256": self.sha256}

    def _with_extractor(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("fid", "fvd", "sync", "identity")}


def names() -> list[str]:
    """The protocols that come with the package."""
    folder = resources.files("eval") / "protocols"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_card(name: str) -> Card:
    """The shipped card of that name, or the card in a YAML file.

    Raises UserError for an unknown name, an unknown, missing or mistyped key, and for a card that asks for what the code does not
    do: another weights file than `eval.networks.weights` verifies, or other constants than SyncNet's.
    """
    if name.endswith((".yaml", ".yml")):
        where = name
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"protocol card cannot be read ({error}): {name}; check the path") from error
    elif name in names():
        where = f"protocols/{name}.yaml"
        text = (resources.files("eval") / where).read_text(encoding="utf-8")
    else:
        raise UserError(f"unknown protocol '{name}': --protocol; {nearest(name, names())}, or the path of a card.yaml")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"protocol card is no YAML: {where}; {' '.join(str(error).split())[:200]}") from error
    card = convert(Card, values, "", lambda _: where)
    _check(card, where)
    return card


def _check(card: Card, where: str) -> None:
    wanted = {name: rule for name, rule in card._with_extractor().items() if rule is not None}
    for name, rule in wanted.items():
        known = None if rule.extractor == FROM_RUN else REGISTRY[rule.extractor].sha256
        if rule.sha256 != known:
            raise UserError(f"'{name}.sha256' is {rule.sha256}: {where}; {rule.extractor} is verified as {known}")
    if card.pairs is not None and card.pairs.lpips_sha256 != REGISTRY["alexnet"].sha256:
        raise UserError(f"'pairs.lpips_sha256' is another file: {where}; it is {REGISTRY['alexnet'].sha256}")
    if card.fid is not None and (card.fid.every < 1 or (card.fid.resize == "none") != (card.fid.extractor == FROM_RUN)):
        raise UserError(f"'fid' asks for what {card.fid.extractor} does not do (every, resize): {where}")
    if card.fvd is not None and (card.fvd.resize == "none") != (card.fvd.extractor == FROM_RUN):
        raise UserError(f"'fvd.resize' {card.fvd.resize} is not for {card.fvd.extractor}: {where}")
    if card.fvd is not None and card.fvd.extractor == "i3d" and (card.clips.frames or i3d.MIN_FRAMES) < i3d.MIN_FRAMES:
        raise UserError(f"'clips.frames' must be at least {i3d.MIN_FRAMES} for FVD: {where}; give longer clips")
    if card.window_seconds <= 0:
        raise UserError(f"'window_seconds' must be above 0: {where}; 1 is usual")
    if card.floor_splits < 2:
        raise UserError(f"'floor_splits' must be at least 2: {where}; 8 is usual")
    if card.sync is not None:
        _check_sync(card.sync, where)


def _check_sync(rule: SyncRule, where: str) -> None:
    published = {
        "fps": Fraction(syncnet.FPS),
        "padding": "zeros",
        "box": "real",
        "crop_pad": syncnet.PAD_VALUE,
        "channels": "bgr",
    }
    none = {"fps": None, "padding": "none", "box": "none", "crop_pad": None, "channels": "rgb", "resample": "none"}
    fixed = published if rule.extractor == "syncnet" else {**none, "crop_scale": None}
    for key, value in fixed.items():
        if getattr(rule, key) != value:
            raise UserError(f"'sync.{key}' must be {value} for {rule.extractor}: {where}; got {getattr(rule, key)}")
    if rule.extractor == "syncnet" and (rule.crop_scale is None or rule.resample == "none"):
        raise UserError(f"'sync.crop_scale' and 'sync.resample' must be given for syncnet: {where}")
    if rule.max_lag < 1:
        raise UserError(f"'sync.max_lag' must be at least 1 frame: {where}; got {rule.max_lag}")


def first_difference(card: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first key, in the order of the cards, in which two plain cards differ, with both values; None where none decides."""
    if card.get("sha256") == other.get("sha256"):
        return None
    one, two = _flat(card), _flat(other)
    for key in (*one, *(key for key in two if key not in one)):
        if one.get(key) != two.get(key):
            return f"{key} is {one.get(key)} here and {two.get(key)} there"
    return "sha256 differs, so one of the two was changed by hand"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if not prefix and key in (*PROSE, "name"):
            continue
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat if prefix else {**flat, "name": value.get("name")}

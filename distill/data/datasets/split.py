"""`distill data split`: splits that share no identity, and fixed test lists; the same on every machine and in every order.

A list names clips of a manifest and a window in each, so that it can be committed and applied to whatever videos there are.
"""

import argparse
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from distill.data.datasets import avspeech, celebvhq, folder, hdtf
from distill.data.datasets.folder import Videos
from distill.data.datasets.manifest import Clip, Manifest, Refused, check_id, clip_or_refusal, gather
from teachers.config import convert
from teachers.disk.read import read_yaml
from teachers.errors import UserError
from teachers.files import atomic_write, make_folder

SALT = "avatar-distill 1"
FRACTIONS = {"train": 0.9, "test": 0.1}
READERS = {"hdtf": hdtf.read, "avspeech": avspeech.read, "celebvhq": celebvhq.read, "folder": folder.read}
LIVETALK = "windows sampled by sha256 from split test (LiveTalk 2512.23576 sec. 5.2: 100 random 5 s clips, its list is unpublished)"
OMNIAVATAR = "the start of every clip (OmniAvatar's author: the first 15 s of every HDTF clip, no split)"


@dataclass(frozen=True, kw_only=True)
class Window:
    """`seconds` of its list, from `offset` seconds after the start of clip `id`."""

    id: str
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ClipList:
    """A fixed test list: windows of `seconds` in clips of one dataset, and a description of how they were chosen."""

    name: str
    dataset: str
    protocol: str
    seconds: float
    salt: str
    windows: tuple[Window, ...]

    def __post_init__(self):
        check_id(self.name)

    def save(self, path: Path) -> None:
        """Write the list as YAML, a line for each window."""
        fields = {**asdict(self), "windows": [asdict(window) for window in self.windows]}
        make_folder(path.parent)
        atomic_write(path, yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=1000))

    @classmethod
    def load(cls, path: Path) -> "ClipList":
        """The list in `path`; UserError, with the key, for an unknown or mistyped one."""
        fields = read_yaml(Path(path), "write it again with `distill data split`")
        return convert(cls, fields, locate=lambda _: str(path))


def place(identity: str, salt: str = SALT) -> float:
    """Where an identity falls in [0, 1): the first 53 bits of sha256(salt, newline, identity)."""
    digest = hashlib.sha256(f"{salt}\n{identity}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def assign(manifest: Manifest, fractions: Mapping[str, float] = FRACTIONS, salt: str = SALT) -> Manifest:
    """The manifest with a split for every clip; clips of one identity (without one: of one source) share it.

    An identity is placed by its hash alone, so other clips do not change it. `fractions`, in their order, divide [0, 1),
    so the last split keeps its members when it grows. An official split stands, for all clips of its identities; where it has
    one identity on several sides, the last side in the order of `fractions` keeps it and clips of the others are refused.
    """
    names = list(fractions)
    bad = not names or "" in names or any(not 0 <= value <= 1 for value in fractions.values())
    if bad or abs(math.fsum(fractions.values()) - 1) > 1e-9:
        raise UserError(f"fractions must have names, lie in [0, 1] and sum to 1: got {dict(fractions)}; correct them")
    official: dict[str, str] = {}
    for clip in manifest.clips:
        if clip.split and clip.split not in names:
            raise UserError(
                f"clip {clip.id} is officially in '{clip.split}', which has no fraction: give {clip.split}=0 or more"
            )
        if clip.split:
            before = official.get(_identity(clip), clip.split)
            official[_identity(clip)] = max(before, clip.split, key=names.index)
    rows: list[Clip | Refused] = list(manifest.refused)
    for clip in manifest.clips:
        split = official.get(_identity(clip)) or _hashed_split(_identity(clip), fractions, salt)
        if clip.split in ("", split):
            rows.append(replace(clip, split=split))
        else:
            reason = f"officially in '{clip.split}', but identity {_identity(clip)} is in '{split}' too"
            rows.append(Refused(clip.id, clip.source, reason))
    return gather(rows)


def livetalk_list(
    manifest: Manifest,
    dataset: str,
    *,
    num: int = 100,
    seconds: float = 5.0,
    salt: str = SALT,
    videos: Path | None = None,
) -> ClipList:
    """`num` windows of `seconds` from the clips of `dataset` in split test, in the order of their hashes.

    Each clip is divided into windows from its start, the remainder dropped; a shorter list is the beginning of a longer one. The
    paper does not state how its clips were sampled. `videos` measures clips without an end. UserError for too few windows.
    """
    library = None if videos is None else Videos(videos)
    windows = []
    for clip in manifest.clips:
        if clip.dataset == dataset and clip.split == "test":
            num_windows = math.floor(_seconds(clip, library) / seconds + 1e-6)
            windows += [Window(id=clip.id, offset=index * seconds) for index in range(num_windows)]
    if len(windows) < num:
        raise UserError(f"{num} windows of {seconds:g} s are needed, {dataset} test has {len(windows)}: add clips")
    windows.sort(key=lambda window: (place(f"{window.id}\n{window.offset:.3f}", salt), window.id, window.offset))
    return ClipList(
        name=f"livetalk_{dataset}",
        dataset=dataset,
        protocol=LIVETALK,
        seconds=seconds,
        salt=salt,
        windows=tuple(windows[:num]),
    )


def omniavatar_list(manifest: Manifest) -> ClipList:
    """The first 15 s of every HDTF clip, whole where it is shorter (issue Omni-Avatar/OmniAvatar#90)."""
    windows = tuple(Window(id=clip.id) for clip in manifest.clips if clip.dataset == "hdtf")
    return ClipList(name="omniavatar_hdtf", dataset="hdtf", protocol=OMNIAVATAR, seconds=15.0, salt="", windows=windows)


def select(manifest: Manifest, clips: ClipList) -> Manifest:
    """The windows of a list as clips of split test, `ID_at5000ms`; a window that is not in the manifest is refused."""
    known = {clip.id: clip for clip in manifest.clips if clip.dataset == clips.dataset}
    reasons = {row.id: row.reason for row in manifest.refused}
    rows: list[Clip | Refused] = []
    for window in clips.windows:
        clip, key = known.get(window.id), f"{window.id}_at{round(window.offset * 1000)}ms"
        if clip is None:
            rows.append(
                Refused(key, "", reasons.get(window.id, f"no clip {window.id} of {clips.dataset} in the manifest"))
            )
            continue
        start = clip.start + window.offset
        end = start + clips.seconds if clip.end is None else min(start + clips.seconds, clip.end)
        rows.append(clip_or_refusal(**{**asdict(clip), "id": key, "start": start, "end": end, "split": "test"}))
    return gather(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill data split`."""
    parser.add_argument(
        "manifest", type=Path, metavar="MANIFEST", help="manifest.parquet, or with --dataset its annotations"
    )
    parser.add_argument("--dataset", choices=READERS, help="read the official annotation files instead of a manifest")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write, .parquet")
    parser.add_argument(
        "--fraction", nargs="+", metavar="NAME=SHARE", help="splits and their shares (default train=0.9 test=0.1)"
    )
    parser.add_argument("--salt", default=SALT, help="another salt is another split (default '%(default)s')")
    parser.add_argument(
        "--lists", type=Path, metavar="DIR", help="write the test lists of the manifest's datasets there"
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", help="for --dataset, and to measure clips without an end")
    parser.add_argument("--select", type=Path, metavar="LIST", help="instead of splitting: the clips of a test list")


def run(args: argparse.Namespace) -> int:
    """Split, or select, and print what was written; return 0. Raises UserError."""
    if args.select and (args.fraction or args.lists):
        raise UserError(
            "a list is selected or written, not both: --select with --fraction or --lists; run them one by one"
        )
    read = READERS.get(args.dataset)
    manifest = read(args.manifest, args.videos) if read else Manifest.load(args.manifest)
    if args.select:
        result = select(manifest, ClipList.load(args.select))
    else:
        result = assign(manifest, _fractions(args.fraction), args.salt)
        _check_sides(result, _fractions(args.fraction))
    lists = _lists(result, args.salt, args.videos) if args.lists else []
    result.save(args.out)
    for clips in lists:
        clips.save(args.lists / f"{clips.name}.yaml")
    counts = ", ".join(f"{num} {name}" for name, num in sorted(Counter(clip.split for clip in result.clips).items()))
    sys.stdout.write(f"{args.out}: {counts or 'no'} clips, {len(result.refused)} refused\n")
    sys.stdout.writelines(f"{args.lists / clips.name}.yaml: {len(clips.windows)} windows\n" for clips in lists)
    return 0


def _lists(manifest: Manifest, salt: str, videos: Path | None) -> list[ClipList]:
    datasets = sorted({clip.dataset for clip in manifest.clips})
    lists = [livetalk_list(manifest, dataset, salt=salt, videos=videos) for dataset in datasets]
    return [*lists, omniavatar_list(manifest)] if "hdtf" in datasets else lists


def _fractions(words: Iterable[str] | None) -> Mapping[str, float]:
    """`train=0.9 test=0.1` as a mapping."""
    if words is None:
        return FRACTIONS
    pairs = [word.partition("=") for word in words]
    try:
        fractions = {name: float(share) for name, _, share in pairs}
    except ValueError as error:
        raise UserError(f"shares are written as train=0.9 test=0.1: got {' '.join(words)}; correct them") from error
    if len(fractions) < len(pairs):
        raise UserError(f"a split is named twice: {' '.join(words)}; name it once")
    return fractions


def _check_sides(manifest: Manifest, fractions: Mapping[str, float]) -> None:
    """UserError for a split with a share and no clip: nothing could be tested, or trained."""
    counts = Counter(clip.split for clip in manifest.clips)
    people = len({_identity(clip) for clip in manifest.clips})
    if empty := [name for name, share in fractions.items() if share and not counts[name]]:
        raise UserError(
            f"split {', '.join(empty)} has no clip: {len(manifest.clips)} clips of {people} identities, each on one side; "
            "give more people, other shares (--fraction), another --salt, or one split (--fraction train=1)"
        )


def _identity(clip: Clip) -> str:
    return clip.identity or clip.source


def _hashed_split(identity: str, fractions: Mapping[str, float], salt: str) -> str:
    """The split whose part of [0, 1) the identity falls into, parts measured from the end."""
    left = 1 - place(identity, salt)  # in (0, 1]
    for name, share in reversed(list(fractions.items())):
        left -= share
        if left <= 0:
            return name
    return next(name for name, share in fractions.items() if share)  # the rounding of the sum


def _seconds(clip: Clip, library: Videos | None) -> float:
    if clip.end is not None:
        return clip.end - clip.start
    if library is None:
        raise UserError(f"clip {clip.id} has no end: its length is not known; give the folder of videos")
    return library.seconds(clip.source) - clip.start

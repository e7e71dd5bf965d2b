"""What a student's training data cover: a check of the pictures and texts that it is given, before it draws from them.

A picture is compared with the training pictures by reconstruction, in two ways: through the student's codec, and through the
principal components of small training pictures (a linear novelty score: Hoffmann, "Kernel PCA for novelty detection", 2007, without
the kernel). What the training set's own held-out pictures reach is stored beside them; a text is compared by its words.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teachers.codecs.linear import to_float
from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.registry import Codec

FILE = "coverage.safetensors"
SIDE, COMPONENTS = 24, 64  # of the small pictures, and of their principal components at most
SPARE = 3.0  # dB below the least of the own pictures from which another one is unlike them
BEST = 60.0  # dB, a reconstruction without a fault
WAYS = {"codec": "through its codec", "pictures": "through the components of its training pictures"}
WORD = re.compile(r"[^\W\d_]+")
NAMED = 8  # words of a message at most


@dataclass(frozen=True)
class Coverage:
    """mean [D] and basis [k, D] of small training pictures, D = 3 x 24 x 24; `own`: way -> the median and the least PSNR in dB of
    held-out pictures of the training set; words of all its texts, in lower case."""

    mean: Tensor
    basis: Tensor
    own: dict[str, tuple[float, float]]
    words: frozenset[str]

    @classmethod
    def fit(
        cls,
        pictures: Tensor,
        held_out: Tensor,
        texts: Iterable[str],
        codec: Codec,
        device: torch.device | str = "cpu",
    ) -> "Coverage":
        """Of first frames of training clips uint8 [N, 3, H, W], of first frames [M, 3, H, W] that neither codec nor components were
        fitted on, and of all texts."""
        rows = _small(to_float(pictures))
        mean, count = rows.mean(0), min(COMPONENTS, max(1, len(rows) // 4))
        basis = torch.linalg.svd(rows - mean, full_matrices=False)[2][:count]
        made = cls(mean, basis, {}, frozenset(word for text in texts for word in words_of(text)))
        levels: dict[str, list[float]] = {way: [] for way in WAYS}
        for picture in held_out:
            for way, level in made.levels(to_float(picture), codec, device).items():
                levels[way].append(level)
        own = {way: (float(torch.tensor(found).median()), min(found)) for way, found in levels.items() if found}
        return cls(mean, basis, own, made.words)

    @torch.no_grad()
    def levels(self, reference: Tensor, codec: Codec, device: torch.device | str = "cpu") -> dict[str, float]:
        """PSNR in dB of a picture [3, H, W] in [-1, 1] after reconstruction, by way."""
        given = reference.float().to(device)[None, :, None]
        decoded = codec.decode(codec.encode(given))[0, :, 0].float().cpu()
        row = _small(reference.float().cpu()[None])
        projected = (row - self.mean) @ self.basis.T @ self.basis + self.mean
        return {"codec": _psnr(decoded, reference.float().cpu()), "pictures": _psnr(projected, row)}

    def unlike(self, reference: Tensor, codec: Codec, device: torch.device | str = "cpu") -> str | None:
        """Why a picture [3, H, W] in [-1, 1] is outside the training data, in words; None where it is not."""
        found = self.levels(reference, codec, device)
        short = {way: least - SPARE - found[way] for way, (_, least) in self.own.items()}
        if not short or max(short.values()) <= 0:
            return None
        way = max(short, key=lambda name: self.own[name][0] - found[name] if short[name] > 0 else -BEST)
        return (
            f"the picture is unlike what this student was trained on: {found[way]:.1f} dB, its own {self.own[way][0]:.1f} dB "
            f"(reconstructed {WAYS[way]}); the video will not look like it"
        )

    def unknown_words(self, text: str) -> str | None:
        """Which words of a text were in no training text, in words; None where all were."""
        unknown = [word for word in dict.fromkeys(words_of(text)) if word not in self.words]
        if not unknown:
            return None
        shown = ", ".join(unknown[:NAMED]) + (f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else "")
        return f"the text has words that this student was never trained on: {shown}; do not expect them to be followed"

    def save(self, file: Path) -> None:
        """Write one safetensors file; numbers and words are in its header."""
        facts = {"own": self.own, "words": sorted(self.words)}
        save_tensors(file, {"mean": self.mean, "basis": self.basis.half()}, {"coverage": json.dumps(facts)})


def load_coverage(file: Path) -> Coverage | None:
    """What `Coverage.save` wrote, None where there is no such file; UserError where it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            facts = json.loads(stored.metadata()["coverage"])
            mean, basis = stored.get_tensor("mean").float(), stored.get_tensor("basis").float()
        own = {way: (float(median), float(least)) for way, (median, least) in facts["own"].items()}
        if mean.shape != (3 * SIDE * SIDE,) or basis.shape[1:] != mean.shape or not own.keys() <= WAYS.keys():
            raise ValueError("other shapes")
        return Coverage(mean, basis, own, frozenset(map(str, facts["words"])))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"damaged student: {file} cannot be read ({error}); export it again") from error


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def _small(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    return F.adaptive_avg_pool2d(pictures, SIDE).flatten(1)


def _psnr(x: Tensor, y: Tensor) -> float:
    """In dB, of values in [-1, 1]."""
    error = float((x - y).double().square().mean())
    return min(BEST, 10 * float(torch.log10(torch.tensor(4 / max(error, 1e-12)))))

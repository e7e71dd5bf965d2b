"""Scores that another program made: the way in for metrics whose code or weights we may not depend on.

`distill eval --scores FILE.json` takes, for one metric, a value for each clip and who made it:

    {"metric": "iqa", "made_by": "q-future/one-align, every frame, transformers 4.36.1",
     "generated": {"clip": 3.9}, "real": {"clip": 4.2}}

`real` is optional. The mean and its jackknife error stand in the tables under "From other programs"; two reports compare
only where `made_by` is the same. Such a program runs in an environment of its own, reads the clips and writes the file:

* Q-Align, IQA and ASE (code S-Lab 1.0, non-commercial; transformers 4.36 to 4.37.2, some 16 GB in fp16): for every frame
  `model.score([frame], task_="quality", input_="image")` of `AutoModelForCausalLM.from_pretrained("q-future/one-align",
  trust_remote_code=True, torch_dtype=torch.float16)`, `task_="aesthetic"` for ASE; 1 to 5; the clip's value is the mean over its
  frames. `input_="video"` samples one frame a second and gives other numbers: say in `made_by` which it was.
* ArcFace, CSIM (code MIT; models non-commercial): insightface's `FaceAnalysis("buffalo_l")`, the 5-point `norm_crop` to 112,
  cosine of `normed_embedding` of each frame with the first real frame; the clip's value is the mean over frames. Without
  alignment it is another metric: say so in `made_by`.

The clips of a student lie as tensors in OUT/generated: `safetensors.torch.load_file(path)["video"]` is uint8 [3, T, H, W].
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from teachers.errors import UserError


@dataclass(frozen=True)
class Adapted:
    """One metric of another program. values: "generated", and "real" where it is given -> one for each clip, in their order."""

    metric: str
    made_by: str
    values: dict[str, list[float]]


def read_scores(path: Path, clips: Sequence[str], ours: Collection[str]) -> Adapted:
    """The file of one metric; UserError when it is damaged, has a score of `ours`, or has not exactly these clips."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        metric, made_by = given["metric"], given["made_by"]
        unknown = given.keys() - {"metric", "made_by", "generated", "real"}
        texts = all(isinstance(text, str) and text for text in (metric, made_by))
        if unknown or not texts:
            raise ValueError(f"unknown key {min(unknown)}" if unknown else "metric and made_by must be texts")
        sides = {"generated": given["generated"]} | ({} if given.get("real") is None else {"real": given["real"]})
        if not all(isinstance(side, dict) for side in sides.values()):
            raise ValueError("generated and real must map clips to numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"scores of another program cannot be read ({error}): {path}; see eval/external.py") from error
    if metric in ours:
        raise UserError(f"'{metric}' is a metric of distill eval: {path}; give it another name")
    return Adapted(metric, made_by, {name: _values(path, side, clips) for name, side in sides.items()})


def _values(path: Path, side: dict, clips: Sequence[str]) -> list[float]:
    if side.keys() != set(clips):
        wrong = sorted(side.keys() ^ set(clips))
        raise UserError(f"{path} has {len(side)} clips, {len(clips)} are scored; the first that differs: {wrong[0]}")
    for name, value in side.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"the score of {name} is no finite number: {path}; got {value}")
    return [float(side[name]) for name in clips]

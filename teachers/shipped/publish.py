"""Make the shipped weights of the embedded world from a run of recipes/world_teacher.yaml, of the stages that are done.

python -m teachers.shipped.publish runs/world_teacher
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from teachers.shipped import HERE, SUMS, sha256

TEXT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def publish(run: Path, folder: Path) -> None:
    """Copy codec, text encoder, extractors and teacher of a run into `folder`, codec and teacher as fp16, and list every file's
    sha256. Of a stage that is not done nothing is copied."""
    stages = run / "stages"
    for source, name in (("data/codec", "codec"), ("teacher/model", "teacher/model")):
        if (file := stages / f"{source}.safetensors").is_file():
            tensors = {key: value.to(torch.float16) for key, value in load_tensors(file).items()}
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_tensors(folder / f"{name}.safetensors", tensors)
    copied = [(stages / "data" / "text" / name, folder / "text" / name) for name in TEXT]
    if (folder / "teacher" / "model.safetensors").is_file():
        config = stages / "teacher" / "config.json"
        if not config.is_file():
            raise UserError(f"no {config}: the run is of an older revision; train its teacher again")
        copied.append((config, folder / "teacher" / "config.json"))
    copied += [(stages / "extractors" / name, folder / name) for name in ("probes.safetensors", "probes.json")]
    for source, target in copied:
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json"))
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in files if file.name != SUMS}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    publish(Path(sys.argv[1]), HERE / "world")

"""Make the shipped weights of the embedded world from a finished run of recipes/world_teacher.yaml.

python -m teachers.shipped.publish runs/world_teacher
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml

from teachers.files import load_tensors, save_tensors
from teachers.shipped import HERE, SUMS, sha256

CONFIG = ("num_layers", "num_heads", "head_dim", "audio_blocks", "prediction", "stride")  # what weights do not say
TEXT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def publish(run: Path, folder: Path) -> None:
    """Copy codec, text encoder, extractors and teacher of a run into `folder`, networks as fp16, and list every file's sha256."""
    stages = run / "stages"
    for name in ("text", "teacher"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for source, name in (("data/codec", "codec"), ("teacher/model", "teacher/model")):
        tensors = load_tensors(stages / f"{source}.safetensors")
        save_tensors(folder / f"{name}.safetensors", {key: value.to(torch.float16) for key, value in tensors.items()})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    known = recipe["teacher"]["network"] | {"stride": recipe["data"]["codec"]["stride"]}
    config = {name: known[name] for name in CONFIG}
    (folder / "teacher" / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in TEXT:
        shutil.copyfile(stages / "data" / "text" / name, folder / "text" / name)
    for name in ("probes.safetensors", "probes.json"):
        shutil.copyfile(stages / "extractors" / name, folder / name)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in (".safetensors", ".json"))
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in files if file.name != SUMS}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    publish(Path(sys.argv[1]), HERE / "world")

"""A student as a repository of a diffusers modular pipeline: the block's code, the index of its components, and the student.

modular_config.json         which block, in which file
modular_block.py            the block, a copy of students/export/modular_block.py
modular_model_index.json    the component `avatar`, and in which repository it is
student/                    the student's folder as it was exported
README.md                   its card, and how to use it
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers

from students.export import hub
from students.export.modular_block import AvatarStreamBlock
from students.weights.checkpoint import load_student
from teachers.config import to_plain

STUDENT, INDEX = "student", "modular_model_index.json"
USE = """
## With diffusers

<!-- needs avatar-distill and diffusers -->
    from diffusers import ModularPipeline

    pipe = ModularPipeline.from_pretrained("{name}", trust_remote_code=True)
    pipe.load_components()
    state = pipe(image=portrait, prompt="a person talks", audio=samples)  # float [S] in [-1, 1] at 16 kHz, as they come
    state = pipe(state=state, audio=more)                                 # state.get("frames"), state.get("sound")
"""


def write_repository(folder: Path, student: Path, repo_id: str | None = None) -> None:
    """Write the repository of a student folder into the new `folder`. `repo_id`: its name at the hub, by which a component is found
    there; a folder of this machine finds its own without. UserError for a folder that is no student."""
    bundle = load_student(student)
    if repo_id is not None:
        hub.warn_of_paths(to_plain(bundle.spec))
    folder.mkdir(parents=True)
    shutil.copytree(student, folder / STUDENT)
    block = AvatarStreamBlock()
    block.save_pretrained(folder)
    shutil.copy(Path(__file__).with_name("modular_block.py"), folder)
    hint = ["students.serving.pipeline", "AvatarPipeline"]
    place = {"pretrained_model_name_or_path": repo_id, "subfolder": STUDENT, "variant": None, "revision": None}
    version = {"_diffusers_version": diffusers.__version__}
    index = {"_class_name": "ModularPipeline", **version, "_blocks_class_name": type(block).__name__}
    _write(folder / INDEX, {**index, "avatar": [*hint, {"type_hint": hint, **place}]})
    _write(folder / STUDENT / "model_index.json", {"_class_name": "AvatarPipeline", **version})
    card = (student / "README.md").read_text(encoding="utf-8")
    card = card.replace("library_name: avatar-distill", "library_name: diffusers", 1)
    card = card.replace("tags:\n", "tags:\n- modular-diffusers\n", 1)
    (folder / "README.md").write_text(card + USE.format(name=repo_id or "."), encoding="utf-8")


def push_repository(student: Path, repo_id: str, **options: Any) -> str:
    """Write the repository of a student folder and put it to the hub as `user/name`; the commit's address. Options and errors as
    `hub.upload`'s."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "repository"
        write_repository(folder, student, repo_id)
        return hub.upload(folder, repo_id, **options)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

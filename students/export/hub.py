"""Student folders at a hub of models, by huggingface_hub: where a name leads, and how a folder gets there."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teachers.errors import UserError

OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What `located` passes on to huggingface_hub."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def located(name: str | Path, subfolder: str | None = None, **options: Any) -> Path:
    """The folder that a name stands for: that of this machine, or, where there is none, a snapshot of the hub's repository
    `user/name`, with its `subfolder` alone where one is given; options as in OPTIONS. UserError where the hub has or gives none."""
    folder = Path(name) / (subfolder or "")
    if Path(name).exists() or not REPOSITORY.fullmatch(str(name)):
        return folder
    from huggingface_hub import snapshot_download

    files = [f"{subfolder}/*"] if subfolder else None
    with _one_line(f"{name} is no folder here, and the hub does not give it"):
        return Path(snapshot_download(str(name), allow_patterns=files, **options)) / (subfolder or "")


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str = "Upload a student",
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put the files of a folder into the hub's repository `user/name`, which is made where there is none; the commit's address.
    `token`: by default that of `hf auth login` or of HF_TOKEN. UserError where the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _one_line(f"{repo_id} was not uploaded; log in with `hf auth login`, or try again"):
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=commit_message, create_pr=create_pr, token=token
        )
    return str(done.commit_url)


def warn_of_paths(plain: Any, key: str = "") -> None:
    """Warn of each path of this machine in a spec: who loads the student elsewhere needs the file there."""
    for name, value in plain.items():
        if isinstance(value, dict):
            warn_of_paths(value, f"{key}{name}.")
        elif isinstance(value, str) and Path(value).is_absolute():
            warnings.warn(
                f"spec.json: {key}{name} is {value}, which stays on this machine; publish it too, and say where it belongs",
                stacklevel=3,
            )


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Errors of the hub as a UserError of one line."""
    try:
        yield
    except Exception as error:  # which library speaks HTTP for huggingface_hub, and raises, changes with its version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"hub: {what} ({reason})") from error

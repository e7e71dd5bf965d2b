"""Models of a local folder, by transformers: nothing is downloaded, unpickled or executed from it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from teachers.checkpoints.strict import describe, refuse
from teachers.checkpoints.weights import weight_map
from teachers.errors import UserError
from teachers.files import refuse_other_kind


def load_local(
    what: str, folder: Path, model_class: Any, processor_class: Any, device: str | None = None
) -> tuple[Any, Any]:
    """A chat model in evaluation mode on `device` (None: a GPU where there is one), and its processor; UserError where it cannot be
    read."""
    if not (folder / "config.json").is_file():
        raise UserError(f"no {what}: {folder} has no config.json; give a folder that save_pretrained wrote")
    try:
        model = model_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="auto")
        processor = processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds: wrong class, missing file, damaged weights, remote code
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{what} cannot be read ({reason}): {folder}; give a folder of that kind") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


@torch.inference_mode()
def ask(model: Any, processor: Any, content: list[dict[str, Any]], max_new_tokens: int, **sampling: Any) -> str:
    """A chat model's answer to one message (images and texts in the format of chat templates): greedy, or drawn with `sampling`
    (temperature, top_p)."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    tokens = model.generate(**inputs, do_sample=bool(sampling), **sampling, max_new_tokens=max_new_tokens)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def require(folder: Path, files: Sequence[str], source: str) -> None:
    """UserError that lists every missing file of `files` in `folder` and where to get it, or names one that is no such file."""
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"missing {', '.join(missing)}: {folder}; get {source}")
    for name in files:
        refuse_other_kind(folder / name)


def model_files(folder: Path) -> list[str]:
    """Files of a transformers model in safetensors: its config and one file of weights, or an index and all its shards."""
    index = folder / "model.safetensors.index.json"
    shards = [index.name, *sorted(set(weight_map(index).values()))] if index.is_file() else ["model.safetensors"]
    return ["config.json", *shards]


@contextmanager
def quiet() -> Iterator[None]:
    """Neither transformers' report of tensors, which is our one line, nor its progress bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_pretrained(kind, folder: Path, source: str, dtype: torch.dtype, optional: Sequence[str] = ()):
    """The frozen transformers model of class `kind` in a local folder, read strictly from safetensors.

    Tensors whose whole name matches a pattern of `optional` may be missing or unexpected. UserError lists missing files, and the
    tensors that are missing, unexpected or of another shape.
    """
    require(folder, model_files(folder), source)
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever a reader of configs and tensors may raise at a damaged file
        raise UserError(
            f"unreadable {kind.__name__}: {folder} ({type(error).__name__}: {error}); get {source}"
        ) from error
    allowed = re.compile("|".join(optional))
    missing, unexpected = (
        [name for name in sorted(info[key]) if not allowed.fullmatch(name)]
        for key in ("missing_keys", "unexpected_keys")
    )
    wrong = {name: (actual, expected) for name, actual, expected in sorted(info["mismatched_keys"])}
    refuse(describe(missing, unexpected, wrong), folder, f"get {source}")
    return model.eval().requires_grad_(False)

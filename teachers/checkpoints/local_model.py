"""A vision-language model of a local folder, by transformers: nothing is downloaded, unpickled or executed from it."""

from pathlib import Path
from typing import Any

import torch

from teachers.errors import UserError


def load_local(
    what: str, folder: Path, model_class: Any, processor_class: Any, device: str | None = None
) -> tuple[Any, Any]:
    """The model in evaluation mode, on `device` (None: a GPU where there is one), and its processor; UserError where it cannot be
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

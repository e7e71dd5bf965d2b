"""ComfyUI nodes of a student: copy or link this folder to ComfyUI/custom_nodes/avatar_distill, in an environment that has
avatar-distill installed.

Load a student; Talk (a portrait and a sound -> a video with its sound); Stream (every run of the workflow pushes the next piece of
sound and returns the frames that are finished, of one stream that goes on from run to run).
ComfyUI's types: IMAGE is float [B, H, W, C] in 0..1, AUDIO {"waveform": float [B, C, T], "sample_rate": int}.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from students import AvatarPipeline, Session
from teachers import UserError
from teachers.encoders.small import SAMPLE_RATE

CROPS = ["face", "top", "center"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_STREAMS = 4
"""That are kept open, the newest."""
TEXT = ("STRING", {"default": "a person talks", "multiline": True})
SEED = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1})


class LoadStudent:
    """A folder of an exported student, or a repository user/name of a hub."""

    CATEGORY, FUNCTION = "avatar-distill", "load"
    RETURN_TYPES, RETURN_NAMES = ("AVATAR_STUDENT", "INT", "INT", "FLOAT"), ("student", "width", "height", "fps")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        return {
            "required": {
                "folder": ("STRING", {"default": "runs/dmd_avatar/student"}),
                "device": (devices, {"default": devices[-1]}),
                "dtype": (list(DTYPES), {"default": "fp32"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, folder: str, **_: Any) -> str:  # noqa: N802
        """Loaded again once the folder was exported again."""
        spec = Path(folder) / "spec.json"
        return str(spec.stat().st_mtime_ns) if spec.is_file() else ""

    def load(self, folder: str, device: str, dtype: str):
        pipe = AvatarPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype], device_map=device)
        spec = pipe.bundle.spec
        return pipe, spec.width, spec.height, float(spec.fps)


class Talk:
    """A portrait says a sound: the video is as long as the sound, to one frame."""

    CATEGORY, FUNCTION = "avatar-distill", "talk"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "AUDIO", "FLOAT"), ("frames", "sound", "fps")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        links = {"student": ("AVATAR_STUDENT",), "portrait": ("IMAGE",), "audio": ("AUDIO",)}
        return {"required": {**links, "text": TEXT, "seed": SEED, "crop": (CROPS, {"default": "face"})}}

    def talk(self, student: AvatarPipeline, portrait: Tensor, audio: dict, text: str, seed: int, crop: str):
        spec, session = student.bundle.spec, open_session(student, portrait, text, seed, crop)
        push(session, audio)
        session.close()
        samples = session.inputs.audio.end
        count = -(-samples // spec.samples_per_frame)
        frames, sound = drawn(session, count)
        if not len(frames):
            raise UserError("audio is empty: there is nothing to say; give at least one sample")
        return as_image(frames[:count]), as_audio(sound[:samples]), float(spec.fps)


class Stream:
    """Every run pushes `audio` and returns the chunks that it finishes. Another student, portrait, seed or crop opens a new stream,
    and so do `restart` and the run after one with `last`; another text takes effect with the next chunk. `new` counts the frames;
    where it is 0 the newest frame is returned again, with a frame's silence, until more sound comes."""

    CATEGORY, FUNCTION = "avatar-distill", "push"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "AUDIO", "INT", "INT"), ("frames", "sound", "new", "first_frame")
    open: ClassVar[OrderedDict[str, "OpenStream"]] = OrderedDict()  # by the node's number in its workflow

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        links = {"student": ("AVATAR_STUDENT",), "portrait": ("IMAGE",), "audio": ("AUDIO",)}
        switches = {name: ("BOOLEAN", {"default": False}) for name in ("last", "restart")}
        given = {"text": TEXT, "seed": SEED, "crop": (CROPS, {"default": "face"}), **switches}
        return {"required": {**links, **given}, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802
        """Never the same: equal sound is pushed again."""
        return float("nan")

    def push(
        self,
        student: AvatarPipeline,
        portrait: Tensor,
        audio: dict,
        text: str,
        seed: int,
        crop: str,
        last: bool,
        restart: bool,
        unique_id: str = "",
    ):
        facts = (student, hash(portrait[0].cpu().numpy().tobytes()), seed, crop)
        stream = self.open.pop(unique_id, None)
        if stream is None or restart or stream.facts != facts or stream.session.inputs.closed:
            session = open_session(student, portrait, text, seed, crop)
            stream = OpenStream(session, facts, text)
        session = stream.session
        if text != stream.text:
            session.set(text)
            stream.text = text
        push(session, audio)
        if last:
            session.close()
        self.open[unique_id] = stream
        while len(self.open) > MOST_STREAMS:
            self.open.popitem(last=False)
        first = session.point.frame
        frames, sound = drawn(session)
        new = len(frames)
        stream.newest = frames[-1:] if new else stream.newest
        if not new:
            frames, sound = stream.newest, torch.zeros(session.spec.samples_per_frame)
        return as_image(frames), as_audio(sound), new, first


class OpenStream:
    """A session, what it was opened with, its text, and its newest frame uint8 [1, H, W, 3], at first black."""

    def __init__(self, session: Session, facts: tuple, text: str):
        self.session, self.facts, self.text = session, facts, text
        self.newest = torch.zeros(1, session.spec.height, session.spec.width, 3, dtype=torch.uint8)


def open_session(student: AvatarPipeline, portrait: Tensor, text: str, seed: int, crop: str) -> Session:
    """A session of the first picture of a batch."""
    spec, picture = student.bundle.spec, None
    if spec.takes_image:
        pixels = (portrait[0, ..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        picture = student.reference_of(Image.fromarray(pixels), crop)
    return Session(student.bundle, picture, text, seed, drop=("pose",) if spec.pose_dim else ())


def push(session: Session, audio: dict) -> None:
    """The first sound of a batch, its channels mixed, at whatever rate it has."""
    session.push(audio=audio["waveform"][0].float().cpu(), rate=int(audio["sample_rate"]))


def drawn(session: Session, count: int = 0) -> tuple[Tensor, Tensor]:
    """All chunks that can be drawn now: uint8 [T, H, W, 3] and their sound [S]; ComfyUI shows the progress, of `count` frames,
    and may end it in between."""
    progress, ended = in_comfyui(count)
    frames, sounds = [torch.zeros(0, session.spec.height, session.spec.width, 3, dtype=torch.uint8)], [torch.zeros(0)]
    for chunk in session.frames():
        ended()
        frames.append(chunk.frames)
        sounds.append(chunk.audio)
        progress(len(chunk.frames))
    return torch.cat(frames), torch.cat(sounds)


def in_comfyui(count: int):
    """ComfyUI's progress bar of `count` steps, and what raises where the run was cancelled; nothing outside of it."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return lambda _: None, lambda: None
    return (ProgressBar(count).update if count else lambda _: None), throw_exception_if_processing_interrupted


def as_image(frames: Tensor) -> Tensor:
    return frames.float() / 255


def as_audio(sound: Tensor) -> dict[str, Any]:
    return {"waveform": sound.view(1, 1, -1), "sample_rate": SAMPLE_RATE}


NODE_CLASS_MAPPINGS = {"AvatarDistillLoad": LoadStudent, "AvatarDistillTalk": Talk, "AvatarDistillStream": Stream}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AvatarDistillLoad": "Load avatar student",
    "AvatarDistillTalk": "Avatar talks",
    "AvatarDistillStream": "Avatar stream",
}

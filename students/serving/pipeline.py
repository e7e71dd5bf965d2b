"""The session in diffusers' habit: `AvatarPipeline.from_pretrained(folder)(image=, audio=, prompt=)`."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from students.export import hub
from students.serving.optimize import DTYPES, cast, usable
from students.serving.session import Session
from students.weights.card import model_card
from students.weights.checkpoint import Bundle, load_student, save_student
from students.weights.coverage import Coverage
from teachers.config import to_plain
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.guidance import Scales
from teachers.media.face import fit_portrait
from teachers.media.picture import decode_image


@dataclass
class AvatarPipelineOutput(BaseOutput):
    """frames: a list of PIL images, or uint8 [T, H, W, 3] (np, pt); audio [S] at 16 kHz that plays with them; fps."""

    frames: list[Image.Image] | np.ndarray | Tensor
    audio: Tensor
    fps: float


class AvatarPipeline(DiffusionPipeline):
    """A session over whole files in diffusers' form; to stream, open a Session on `pipe.bundle`."""

    def __init__(self, student, codec, audio_encoder, text, coverage: Coverage | None = None, image_encoder=None):
        super().__init__()
        parts = {"audio_encoder": audio_encoder, "text": text, "image_encoder": image_encoder}
        self.register_modules(student=student, codec=codec, **parts)
        self.coverage = coverage
        self.card: str | None = None  # of the folder that it was read from

    @property
    def bundle(self) -> Bundle:
        return Bundle(self.student, self.codec, self.audio_encoder, self.text, self.coverage, self.image_encoder)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.student.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's matrices."""
        return max(self.student.parameters(), key=torch.numel).dtype

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        torch_dtype: torch.dtype | None = None,
        device_map: str | None = None,
        subfolder: str | None = None,
        **options,
    ) -> "AvatarPipeline":
        """The pipeline of an exported student's folder, or of the hub's repository `user/name` (its `subfolder`), by default in
        fp32 on the CPU. device_map: a device, or balanced (cuda where there is one). options: revision, token, cache_dir,
        force_download and local_files_only, of the hub."""
        options = {name: value for name, value in options.items() if value is not None}
        if unknown := options.keys() - set(hub.OPTIONS):
            takes = f"folder, torch_dtype, device_map, subfolder, {', '.join(hub.OPTIONS)}"
            raise UserError(f"from_pretrained: got {', '.join(sorted(unknown))}; it takes {takes}")
        device = usable(None if device_map == "balanced" else device_map or "cpu")
        place = hub.located(folder, subfolder, **options)
        bundle = load_student(place)
        parts = bundle.student, bundle.codec, bundle.audio_encoder, bundle.text, bundle.coverage, bundle.image_encoder
        pipe = cls(*parts)
        card = place / "README.md"
        pipe.card = card.read_text(encoding="utf-8") if card.is_file() else None
        return pipe.to(device, torch_dtype)

    def to(
        self,
        *given: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,  # noqa: ARG002  # of diffusers
    ) -> "AvatarPipeline":
        """`to(device)`, `to(dtype)` or `to(device, dtype)`, in place. All parts move; the type, float32 or bfloat16, is of the
        network's matrices alone. UserError for a device that cannot be used and for another type."""
        for value in given:
            device, dtype = (device, value) if isinstance(value, torch.dtype) else (value or device, dtype)
        if dtype not in (None, *DTYPES.values()):
            raise UserError(f"torch_dtype: got {dtype}; a student runs in torch.float32 or torch.bfloat16")
        if dtype is not None:
            cast(self.student.net, dtype)
        if device is not None:
            self.bundle.to(usable(device))
        return self

    def save_pretrained(self, folder: str | Path, **unknown) -> None:
        """Write the student's folder, as `distill run` exports it."""
        if unknown:
            raise UserError(f"save_pretrained takes a folder alone: got {', '.join(unknown)}")
        save_student(Path(folder), self.bundle, self.card or model_card(self.bundle.spec))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload a student",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **unknown,
    ) -> str:
        """Put the student's folder, its card with it, into the hub's repository `user/name`, which is made where there is none;
        the commit's address. `token`: by default that of `hf auth login`. UserError where the hub refuses."""
        if unknown:
            raise UserError(
                f"push_to_hub: got {', '.join(unknown)}; it takes repo_id, commit_message, private, token and create_pr"
            )
        hub.warn_of_paths(to_plain(self.bundle.spec))
        with TemporaryDirectory() as place:
            self.save_pretrained(Path(place) / "student")
            return hub.upload(Path(place) / "student", repo_id, commit_message, private, token, create_pr)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Tensor | str | Path,
        audio: Tensor | np.ndarray,
        prompt: str = "",
        generator: torch.Generator | None = None,
        sampling_rate: int = SAMPLE_RATE,
        output_type: str = "pil",
        other: Tensor | np.ndarray | None = None,
        pose: Tensor | np.ndarray | None = None,
        guidance_scale: Scales | None = None,
        crop: str = "face",
        strict: bool = False,
    ) -> AvatarPipelineOutput:
        """image: PIL of any mode and shape or a path (`crop`: the part that is kept, face, top or center), or [3, H, W] in [-1, 1]
        of the student's size; audio [S] or [channels, S] in [-1, 1]; the video is as long as the sound, to one frame. `other`, as
        audio: the other speaker's sound, for a student of two speakers; pose rows [T, P], one a frame, the last one holds, to a
        student that is steered. `generator` gives the stream's seed (initial_seed). output_type: pil, np or pt. guidance_scale: of
        a guidance-distilled student, one or by name, within its trained ranges; it costs nothing. A picture or words unlike what
        the student was trained on are warned of, and with `strict` refused (UserError)."""
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type: got {output_type!r}; pil, np or pt")
        seed = generator.initial_seed() % 2**63 if generator is not None else 0
        spec = self.bundle.spec
        drop = ("pose",) if pose is None else ()
        reference = self.reference_of(image, crop)
        for line in self.bundle.unlike(reference, prompt):
            if strict:
                raise UserError(f"{line}; give another one, or strict=False")
            warnings.warn(line, stacklevel=3)
        session = Session(self.bundle, reference, prompt, seed, drop=drop, guidance=guidance_scale)
        second = None if other is None else torch.as_tensor(other)
        session.push(audio=torch.as_tensor(audio), rate=sampling_rate, other=second)
        if pose is not None:
            session.push(pose=torch.as_tensor(pose))
            chunk = spec.codec.stride * spec.chunk_frames
            missing = -(-session.inputs.audio.end // spec.samples_per_frame) + 2 * chunk - session.inputs.pose.end
            last = session.inputs.pose.read(session.inputs.pose.end - 1, session.inputs.pose.end)
            session.push(pose=last.expand(max(0, missing), -1))
        session.close()
        count = -(-session.inputs.audio.end // spec.samples_per_frame)
        frames, sounds = [], []
        with self.progress_bar(total=count) as bar:  # pyright: ignore[reportCallIssue]  # a bound method
            for chunk in session.frames():
                frames.append(chunk.frames)
                sounds.append(chunk.audio)
                bar.update(min(len(chunk.frames), count - chunk.first_frame))
        if not frames:
            raise UserError("audio is empty: there is nothing to say; give at least one sample")
        video, sound = torch.cat(frames)[:count], torch.cat(sounds)[: session.inputs.audio.end]
        shown: Any = video if output_type == "pt" else video.numpy()
        if output_type == "pil":
            shown = [Image.fromarray(frame) for frame in shown]
        return AvatarPipelineOutput(frames=shown, audio=sound, fps=float(spec.fps))

    def reference_of(self, image: Image.Image | Tensor | str | Path, crop: str = "face") -> Tensor:
        """A picture as a session takes it, [3, H, W] in [-1, 1] of the student's size; `image` and `crop` as `__call__` has
        them."""
        if isinstance(image, Tensor):
            return image
        spec = self.bundle.spec
        pixels = decode_image(Path(image) if isinstance(image, str) else image)
        fitted, note = fit_portrait(pixels, (spec.height, spec.width), crop)
        if note:
            warnings.warn(note, stacklevel=4)
        return fitted

"""A streaming block for diffusers' modular pipelines: sound in, finished frames out, and the stream in the pipeline's state.

    pipe = ModularPipeline.from_pretrained(FOLDER_OR_REPOSITORY, trust_remote_code=True)
    pipe.load_components()
    state = pipe(image=portrait, prompt="a person talks", audio=samples)   # opens a stream
    state = pipe(state=state, audio=more)                                  # the same stream goes on
    state.get("frames"), state.get("sound")

Needs `pip install avatar-distill`. A stream is one thing: a state from before continues the same stream as the newest one does.
"""

import warnings
from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from students.serving.pipeline import AvatarPipeline
from students.serving.session import Session
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError


class Stream:
    """The session of a pipeline's state. A pipeline copies its state with every call; a stream is not copied."""

    def __init__(self, session: Session, prompt: str):
        self.session, self.prompt = session, prompt

    def __deepcopy__(self, memo: dict) -> "Stream":
        return self


class AvatarStreamBlock(ModularPipelineBlocks):
    """One call: what is given goes into the stream, and all chunks that can be drawn come out."""

    model_name = "avatar-distill"
    _requirements = {"avatar-distill": ""}  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "Streams a talking avatar: the first call opens a stream of a portrait, every call pushes sound and returns the chunks "
            "of frames that are finished. Any split of the same sound gives the same frames."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("avatar", AvatarPipeline, description="the student with its codec and encoders")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("stream", Stream, description="of the call before, kept in the state"),
            InputParam("image", description="portrait: a PIL image, a path or [3, H, W] in [-1, 1]; to open"),
            InputParam("crop", str, default="face", description="the part of it that is kept: face, top or center"),
            InputParam("prompt", str, default="", description="text; another one takes effect with the next chunk"),
            InputParam("seed", int, default=0, description="of the stream's noise; to open"),
            InputParam("lead", int, description="chunks at most ahead of `played`; to open; None: no bound"),
            InputParam("audio", torch.Tensor, description="samples [S] or [channels, S] in [-1, 1] that are new"),
            InputParam("sampling_rate", int, default=SAMPLE_RATE, description="of the samples, Hz"),
            InputParam(
                "other", torch.Tensor, description="the other speaker's, as audio; of a student of two speakers"
            ),
            InputParam("pose", torch.Tensor, description="rows [T, P] that are new; of a student that is steered"),
            InputParam("played", int, description="frames that the viewer has seen"),
            InputParam("interrupt", bool, default=False, description="take back what was not seen, and its sound"),
            InputParam("close", bool, default=False, description="no more sound: the rest plays to its end"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("frames", torch.Tensor, description="uint8 [t, H, W, 3], t may be 0"),
            OutputParam(
                "sound", torch.Tensor, description="samples [t * samples a frame] at 16 kHz that play with them"
            ),
            OutputParam("first_frame", int, description="number of the first of them in the stream"),
            OutputParam("waiting", str, description="why there are no more: audio, pose, lead or end"),
            OutputParam("stream", Stream, description="for the next call"),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """UserError for a wrong input, and where the components were not loaded."""
        given: Any = self.get_block_state(state)
        if given.stream is None:
            given.stream = self._open(components, given)
        stream: Stream = given.stream
        session = stream.session
        if given.played is not None:
            session.played(given.played)
        if given.interrupt:
            session.interrupt()
        if given.prompt != stream.prompt:
            session.set(given.prompt)
            stream.prompt = given.prompt
        if given.audio is not None or given.pose is not None:
            audio, other, pose = (
                None if part is None else torch.as_tensor(part) for part in (given.audio, given.other, given.pose)
            )
            session.push(audio=audio, pose=pose, rate=given.sampling_rate, other=other)
        if given.close:
            session.close()
        begin, height, width = session.point.frame, session.spec.height, session.spec.width
        frames, sounds = [torch.zeros(0, height, width, 3, dtype=torch.uint8)], [torch.zeros(0)]
        while chunk := session.step():
            frames.append(chunk.frames)
            sounds.append(chunk.audio)
        given.frames, given.sound, given.first_frame = torch.cat(frames), torch.cat(sounds), begin
        given.waiting = chunk.reason
        given.audio = given.other = given.pose = given.played = None  # once: the state is given to the next call
        given.interrupt = given.close = False
        self.set_block_state(state, given)
        return components, state

    def _open(self, components: Any, given: Any) -> Stream:
        avatar = components.avatar
        if avatar is None:
            raise UserError("avatar: the pipeline has no student yet; call pipe.load_components()")
        spec = avatar.bundle.spec
        if spec.takes_image and given.image is None:
            raise UserError("image: the first call opens the stream; give it a portrait")
        reference = avatar.reference_of(given.image, given.crop) if spec.takes_image else None
        for line in avatar.bundle.unlike(reference, given.prompt):
            warnings.warn(line, stacklevel=2)
        drop = ("pose",) if spec.pose_dim and given.pose is None else ()
        return Stream(
            Session(avatar.bundle, reference, given.prompt, given.seed, lead=given.lead, drop=drop), given.prompt
        )

"""`distill sample --teacher RECIPE`: one clip of the many-step teacher, so that who owns one sees that it loads right."""

import argparse
import math
import sys
import time
from collections import deque
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distill.commands import devices
from distill.commands.sample.inputs import Steering, check, portrait, read_pose, report_track
from distill.data.encoders import load_encoders
from distill.pipeline import record
from distill.pipeline.generate import clip_noise
from distill.pipeline.pretrained import load_teacher
from distill.recipe import SamplerConfig, load_recipe, spec_of
from students.serving.optimize import Speed
from teachers import media
from teachers.codecs.linear import to_float
from teachers.conditions import blank_features
from teachers.errors import UserError
from teachers.media.mark import Mark
from teachers.media.sound import SAMPLE_RATE

LONGEST_SECONDS = 120
"""Of the sound that is encoded whole, as OmniAvatar does: attention over it grows with its square."""


def run(args: argparse.Namespace) -> int:
    """Write the teacher's video of one training clip's length and return 0. UserError in one line, and then no video is there.

    The whole sound is encoded, also what comes after the clip (`Wav2Vec.of_clip`).
    """
    media.check_output(args.out)
    recipe = load_recipe(args.teacher, args.overrides)
    spec, (device, speed) = spec_of(recipe), devices.choose(args, "teacher")
    if args.dtype or speed != Speed(dtype=speed.dtype):
        raise UserError(
            "--dtype, --compile, --attention, --quantize are a student's: a teacher's recipe says; remove them"
        )
    check(spec, args.other, args.pose)
    own = media.AudioReader(args.audio, mono=False)
    played, rate = torch.cat(list(own)), own.rate
    sound = media.resample(played.mean(dim=1), rate, SAMPLE_RATE)
    other = None if args.other is None else media.read_audio(args.other)
    steering = None if args.pose is None else Steering(read_pose(args.pose, spec.pose_dim))
    image = portrait(media.decode_image(args.image), spec, args)
    teacher = load_teacher(recipe, device)
    reference = recipe.teacher.network.reference
    folder = Path(recipe.run_dir) / "stages" / "data"
    if (folder / record.FILE).is_file():  # given encoders need no stage
        record.require(folder)
    encoders = load_encoders(recipe.data, folder, reference, device)
    num_frames = recipe.data.world.num_frames
    voices = _voices(sound, other, spec.speakers)
    if args.other is not None:
        played, rate = voices[0].sum(dim=0, keepdim=True).mT.clamp(-1, 1), SAMPLE_RATE
    pose = steering.until(num_frames)[None] if steering else None
    if spec.pose_dim and pose is None:
        pose = torch.zeros(1, num_frames, spec.pose_dim)  # dropped
    blank = blank_features(recipe.teacher.network, 1, spec.horizon_frames)  # nothing else is given here
    given = encoders.codec.encode(image[None, :, None].to(device)).float().cpu()
    conditions = encoders.conditions(voices, [args.text], given, num_frames, pose, blank, image[None]).to(device)
    x, settings = clip_noise(spec, 1, args.seed).to(device), recipe.teacher.sampler
    if settings is None:
        solved = recipe.trajectories
        settings = SamplerConfig(num_steps=solved.num_steps, shift=solved.shift, guidance=solved.guidance)
    began = time.perf_counter()
    with torch.inference_mode():
        states = teacher.states(
            conditions,
            x,
            num_steps=settings.num_steps,
            shift=settings.shift,
            guidance=settings.guidance,
            grid=settings.grid,
        )
        (last,) = deque(tqdm(states, total=settings.num_steps + 1, desc="teacher", file=sys.stderr), maxlen=1)
        frames = encoders.decode(last, conditions.lead)[0].permute(1, 2, 3, 0).contiguous()
    seconds = time.perf_counter() - began
    upscale = max(1, math.ceil(args.size / min(spec.height, spec.width)))
    if args.mark:
        frames = Mark(args.mark, spec.height, spec.width)(frames)
    sound = played.squeeze(1)
    media.write_video(args.out, frames, spec.fps, sound, rate, upscale, smooth=True, synthetic=not args.no_label)
    report_track(own)
    deviation = float(to_float(frames).std())
    sys.stdout.write(
        f"{args.out}: {num_frames} frames, {float(num_frames / spec.fps):.2f} s, {settings.num_steps} steps of "
        f"{settings.guidance.passes} passes in {seconds:.1f} s, pixel deviation {deviation:.2f}\n"
    )
    return 0


def _voices(sound: Tensor, other: Tensor | None, speakers: int) -> Tensor:
    """The sound [1, S] that is encoded, of two speakers [1, 2, S]; the shorter voice ends in silence."""
    longest = LONGEST_SECONDS * SAMPLE_RATE
    if len(sound) > longest:
        sys.stderr.write(
            f"--audio is {len(sound) / SAMPLE_RATE:.0f} s long: its first {LONGEST_SECONDS} s are encoded\n"
        )
    if speakers == 1:
        return sound[None, :longest]
    parts = [sound[:longest], torch.zeros(0) if other is None else other[:longest]]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)[None]

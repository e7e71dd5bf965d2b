"""`distill sample --teacher RECIPE`: clips of the many-step teacher, so that who owns one sees that it loads right.

One, or where the network reads the film before a clip (Wan2.2-S2V), as many as `--clips` asks for, one behind the other.
"""

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
from distill.data.encoders import ConditionEncoders, load_encoders
from distill.pipeline import record
from distill.pipeline.generate import clip_noise
from distill.pipeline.pretrained import load_teacher
from distill.recipe import SamplerConfig, load_recipe, spec_of
from students.serving.optimize import Speed
from students.spec import Spec
from teachers import media
from teachers.codecs.linear import to_float
from teachers.conditions import Conditions, blank_features
from teachers.errors import UserError
from teachers.media.mark import Mark
from teachers.media.sound import SAMPLE_RATE
from teachers.resolve import label
from teachers.teacher import Teacher

LONGEST_SECONDS = 120
"""Of the sound that is encoded whole, as OmniAvatar does: attention over it grows with its square."""


def run(args: argparse.Namespace) -> int:
    """Write the teacher's video, each clip of a training clip's length, and return 0. UserError in one line, and then no video is
    there.

    The whole sound is encoded, also what comes after the clip (`Wav2Vec.of_clip`).
    """
    media.check_output(args.out)
    recipe = load_recipe(args.teacher, args.overrides)
    spec, (device, speed) = spec_of(recipe), devices.choose(args, "teacher")
    network = recipe.teacher.network
    if args.clips > 1 and not network.past:
        raise UserError(f"--clips {args.clips}: {label(network)} does not read the film before a clip; remove it")
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
    folder = Path(recipe.run_dir) / "stages" / "data"
    if (folder / record.FILE).is_file():  # given encoders need no stage
        record.require(folder)
    encoders = load_encoders(recipe.data, folder, network.reference, device)
    latent_frames = args.clips * spec.horizon_frames
    num_frames = recipe.data.world.num_frames + spec.codec.stride * (latent_frames - spec.horizon_frames)
    voices = _voices(sound, other, spec.speakers)
    if args.other is not None:
        played, rate = voices[0].sum(dim=0, keepdim=True).mT.clamp(-1, 1), SAMPLE_RATE
    pose = steering.until(num_frames)[None] if steering else None
    if spec.pose_dim and pose is None:
        pose = torch.zeros(1, num_frames, spec.pose_dim)  # dropped
    blank = blank_features(network, 1, latent_frames)  # nothing else is given here
    given = encoders.codec.encode(image[None, :, None].to(device)).float().cpu()
    conditions = encoders.conditions(voices, [args.text], given, num_frames, pose, blank, image[None]).to(device)
    settings = recipe.teacher.sampler
    if settings is None:
        solved = recipe.trajectories
        settings = SamplerConfig(num_steps=solved.num_steps, shift=solved.shift, guidance=solved.guidance)
    began = time.perf_counter()
    with torch.inference_mode():
        video = film(teacher, encoders, conditions, spec, settings, args.clips, args.seed)
    frames = video[0].permute(1, 2, 3, 0).contiguous()
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


def film(
    teacher: Teacher,
    encoders: ConditionEncoders,
    conditions: Conditions,
    spec: Spec,
    settings: SamplerConfig,
    clips: int,
    seed: int,
) -> Tensor:
    """Video uint8 [1, 3, T, H, W] of so many clips under conditions of all of their latent frames; each but the first reads the
    last `past` latents of the film before it, encoded again, with mid-grey frames in front where it is shorter, and is decoded
    behind them (Wan2.2-S2V's sampler). UserError for a network that cannot."""
    kind, n, stride = teacher.denoiser.net.kind, spec.horizon_frames, spec.codec.stride
    given, count, drawn = {**vars(settings)}, 1 + stride * (kind.past - 1), torch.zeros(0)
    if clips > 1:  # before hours of drawing, whether it can be
        kind.behind(conditions, torch.zeros(1, spec.latent_size[0], kind.past, *spec.latent_size[1:]))
    for clip in range(clips):
        own, lead = conditions.frames(clip * n, clip * n + n), conditions.lead
        if clip:
            before = to_float(drawn[:, :, -count:].to(teacher.device))
            before = torch.nn.functional.pad(before, (0, 0, 0, 0, count - before.shape[2], 0))
            lead = encoders.codec.encode(before).float()
            own = kind.behind(own, lead)
        noise = clip_noise(spec, seed, *([clip] if clip else []))(torch.arange(1)).to(teacher.device)
        states = tqdm(
            teacher.states(own, noise, **given), total=settings.num_steps + 1, desc="teacher", file=sys.stderr
        )
        (last,) = deque(states, maxlen=1)
        video = encoders.decode(last, lead)
        drawn = torch.cat([drawn, video[:, :, -stride * n :]], dim=2) if clip else video
    return drawn


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

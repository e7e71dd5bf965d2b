"""The embedded world: procedural talking avatars with everything that distillation has to preserve.

Conditions (identity, sound, text) come from one generator and nuisance (sway phase, gesture sign, blink times, gaze, drift of
light) from another: given its conditions a clip is still random, so a student that regresses the mean is visibly static.
Frame 0 is the reference portrait at rest; motion fades in over the next frames.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.data.procedural import duplex, speech
from distill.data.procedural.face import IDENTITY, render
from distill.data.procedural.speech import Speech
from distill.data.source import Clips
from teachers.config import fraction
from teachers.errors import UserError
from teachers.machine import clips_at_once

EXPRESSIONS = ("neutral", "smile", "frown", "surprised")
GESTURES = ("still", "nod", "shake", "tilt")

_EXPRESSION_PHRASES = (
    ("with a calm face", "looking neutral", "with a plain expression", "keeping a straight face"),
    ("smiling", "with a warm smile", "who smiles happily", "looking cheerful"),
    ("frowning", "with a sad frown", "who looks unhappy", "looking gloomy"),
    ("surprised", "with raised brows", "who looks astonished", "looking amazed"),
)
_GESTURE_PHRASES = (
    ("holds still", "keeps the head steady", "does not move the head", "sits motionless"),
    ("nods", "nods along", "keeps nodding the head", "nods in agreement"),
    ("shakes the head", "keeps shaking the head", "shakes the head in disagreement", "turns left and right"),
    ("tilts the head", "keeps tilting the head", "rocks the head sideways", "sways the head from side to side"),
)
SUBJECTS = ("a person", "someone", "a presenter", "an avatar", "the speaker", "a character")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Size of the embedded world, `resolution` high and `width` (null: as much) wide. `fps` is a fraction such as "25/2";
    `num_frames` counts pixel frames of a clip. `num_train`: training clips; null is all clips of a folder, 256 of a world that has
    no end. They are decoded and encoded `shard_clips` at a time, a file each. `speakers` 2: the avatar and another person, in
    turns. `steered`: its head follows a direction signal. `variety`: how far people, framing and walls differ, 1 as far as they
    can."""

    resolution: int = 32
    width: int | None = None
    fps: str = "25/2"
    num_frames: int = 15
    num_train: int | None = 1536
    shard_clips: int = 256
    speakers: int = 1
    steered: bool = False
    variety: float = 1.0

    def __post_init__(self):
        try:
            rate = fraction(self.fps)
        except ValueError as error:
            raise UserError(f"data.world.fps: {error}; use 25/2, 16, 20 or 25") from error
        if not 0 < rate <= 1000:
            raise UserError(f"data.world.fps: got {self.fps}; use 25/2, 16, 20 or 25")

    @property
    def pose_dim(self) -> int:
        """Numbers of a pose row."""
        return duplex.POSE_DIM if self.steered else 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self.resolution, self.width or self.resolution


@dataclass(frozen=True, kw_only=True)
class SceneParameters:
    """What conditions determine: identity [N, IDENTITY] in [0, 1], speech, text, class indices [N] of expression and gesture; in a
    conversation the other's speech and who speaks [N, K] (`duplex.draw_turns`); pose rows [N, T, P] where the head is steered."""

    identity: Float[Tensor, "n 28"]
    speech: Speech
    text: list[str]
    expression: Int[Tensor, " n"]
    gesture: Int[Tensor, " n"]
    other: Speech | None = None
    turn: Int[Tensor, "n k"] | None = None
    pose: Float[Tensor, "n t 3"] | None = None


def samples_per_frame(config: WorldConfig) -> int:
    """Audio samples of one pixel frame; UserError where they are no whole number."""
    samples = Fraction(speech.SAMPLE_RATE) / Fraction(config.fps)
    if samples.denominator != 1:
        raise UserError(f"data.world.fps: {config.fps} does not divide {speech.SAMPLE_RATE} Hz; use 25/2, 16, 20 or 25")
    return samples.numerator


def draw_conditions(config: WorldConfig, num: int, rng: torch.Generator) -> SceneParameters:
    """Identity, sound and text of `num` clips."""
    expression = torch.randint(0, len(EXPRESSIONS), (num,), generator=rng)
    gesture = torch.randint(0, len(GESTURES), (num,), generator=rng)
    picks = torch.randint(0, 1 << 30, (num, 4), generator=rng).tolist()
    text = []
    for e, g, (subject, e_phrase, g_phrase, order) in zip(expression.tolist(), gesture.tolist(), picks, strict=True):
        person = SUBJECTS[subject % len(SUBJECTS)]
        face = _EXPRESSION_PHRASES[e][e_phrase % len(_EXPRESSION_PHRASES[e])]
        move = _GESTURE_PHRASES[g][g_phrase % len(_GESTURE_PHRASES[g])]
        text.append(f"{person} {face} talks and {move}" if order % 2 else f"{person} {move} while talking, {face}")
    samples = config.num_frames * samples_per_frame(config)
    voice = speech.synthesise(num, samples, rng)
    identity = 0.5 + config.variety * (torch.rand(num, IDENTITY, generator=rng) - 0.5)
    other = turn = pose = None
    if config.speakers == 2:
        other, turn = speech.synthesise(num, samples, rng), duplex.draw_turns(num, voice.opening.shape[1], rng)
        voice, other = duplex.in_turn(voice, turn, duplex.OWN), duplex.in_turn(other, turn, duplex.OTHER)
    if config.steered:
        pose = duplex.draw_directions(num, config.num_frames, float(Fraction(config.fps)), rng)
    return SceneParameters(
        identity=identity,
        speech=voice,
        text=text,
        expression=expression,
        gesture=gesture,
        other=other,
        turn=turn,
        pose=pose,
    )


def frame_ticks(config: WorldConfig) -> Int[Tensor, " t"]:
    """The tick of 10 ms in the middle of each pixel frame, [T]."""
    fps = float(Fraction(config.fps))
    time = torch.arange(config.num_frames) / fps
    return ((time + 0.5 / fps) * (speech.SAMPLE_RATE / speech.HOP)).round().long()


def draw_motion(config: WorldConfig, scene: SceneParameters, rng: torch.Generator) -> dict[str, Float[Tensor, "n t"]]:
    """Labels [N, T] of every frame: the nuisance (sway, gesture phase, blinks, gaze, light) and what the conditions determine."""
    num, frames, fps = scene.gesture.shape[0], config.num_frames, float(Fraction(config.fps))
    time = torch.arange(frames) / fps
    fade = 1.0 - torch.exp(-time / 0.10)

    def uniform(low, high):
        return torch.rand(num, 1, generator=rng) * (high - low) + low

    def sign():
        return torch.randint(0, 2, (num, 1), generator=rng) * 2.0 - 1.0

    def sway(amplitude, low_hz, high_hz):
        return amplitude * torch.sin(2 * math.pi * (uniform(low_hz, high_hz) * time + uniform(0, 1)))

    swing = torch.sin(2 * math.pi * uniform(1.7, 2.1) * time) * sign() * uniform(0.8, 1.1)
    is_gesture = [(scene.gesture == i).float().unsqueeze(1) for i in range(len(GESTURES))]
    sway_x, sway_y = fade * sway(0.5, 0.15, 0.45), fade * sway(0.25, 0.15, 0.45)
    if scene.pose is not None:
        sway_x, sway_y = (duplex.REACH * duplex.follow(scene.pose[..., i], fps) for i in (0, 1))
    head_x, head_y = sway_x + is_gesture[2] * swing, sway_y + is_gesture[1] * swing
    tilt = fade * sway(0.25, 0.15, 0.4) + is_gesture[3] * swing
    light = fade * sign() * uniform(0.5, 1.0)
    saccade = uniform(0.0, float(time[-1]) * 1.3)
    directions = torch.randint(-1, 2, (num, 2), generator=rng).float()
    gaze = torch.where(time < saccade, directions[:, :1], directions[:, 1:]) * (time > 0)
    # Blinks: closed for about 0.2 s; the first falls anywhere in a window twice the clip's length, then every 1.5 to 3.5 s.
    blink = torch.zeros(num, frames)
    centre = uniform(0.15, 2.4)
    while bool((centre < time[-1] + 0.5).any()):
        blink = torch.maximum(blink, (1.45 - (time - centre).abs() / 0.10).clamp(0, 1))
        centre = centre + uniform(1.5, 3.5)
    ticks = frame_ticks(config)
    if scene.other is not None and scene.turn is not None:
        head_y = head_y + duplex.NOD * duplex.follow(scene.other.opening[:, ticks], fps)
        gaze = gaze * (scene.turn[:, ticks] != duplex.OTHER)
    opening, width = scene.speech.opening[:, ticks].clone(), scene.speech.width[:, ticks].clone()
    opening[:, 0], width[:, 0] = speech.REST  # frame 0 is the portrait
    return {
        "mouth_open": opening,
        "mouth_width": width,
        "blink": blink * (time > 0),
        "gaze": gaze,
        "head_x": head_x,
        "head_y": head_y,
        "tilt": tilt,
        "light": light,
        **{name: (scene.expression == i).float().unsqueeze(1) * fade for i, name in enumerate(EXPRESSIONS) if i},
    }


def make_clips(config: WorldConfig, scene: SceneParameters, rng: torch.Generator, chosen: range | None = None) -> Clips:
    """Render `scene`, or the `chosen` rows of it, with nuisance drawn from `rng`."""
    batch = clips_at_once(config.num_frames, *config.size, "cpu")
    state = draw_motion(config, scene, rng)
    chosen, video = range(len(scene.gesture)) if chosen is None else chosen, []
    for start in range(chosen.start, chosen.stop, batch):
        rows = torch.arange(start, min(start + batch, chosen.stop))
        video.append(render(config.size, scene.identity[rows], {k: v[rows] for k, v in state.items()}))
    labels = dict(state, expression=scene.expression, gesture=scene.gesture, identity=scene.identity)
    audio, talk = scene.speech.audio, {}
    if scene.other is not None and scene.turn is not None:
        ticks = frame_ticks(config)
        audio = torch.stack([audio, scene.other.audio], dim=1)
        talk = {"turn": scene.turn[:, ticks], "other_open": scene.other.opening[:, ticks]}
    empty = torch.empty(len(scene.gesture), 0)
    others = Clips(video=empty, audio=audio, text=scene.text, labels=labels, pose=scene.pose, talk=talk)
    return replace(others.rows(chosen), video=torch.cat(video))

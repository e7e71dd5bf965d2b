"""The embedded world: procedural talking avatars with everything that distillation has to preserve.

Conditions (identity, sound, text) come from one generator and nuisance (sway phase, gesture sign, blink times, gaze, drift of
light) from another: given its conditions a clip is still random, so a student that regresses the mean is visibly static.
Frame 0 is the reference portrait at rest; motion fades in over the next frames.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from distill.data.procedural import duplex, speech
from distill.data.procedural.speech import Speech
from distill.data.source import Clips
from teachers.config import fraction
from teachers.errors import UserError

PIXELS_AT_ONCE = 64 * 15 * 32 * 32
EXPRESSIONS = ("neutral", "smile", "frown", "surprised")
GESTURES = ("still", "nod", "shake", "tilt")
IDENTITY = 14  # parameters of one face: colours, shape, framing, ambient light

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
    turns. `steered`: its head follows a direction signal."""

    resolution: int = 32
    width: int | None = None
    fps: str = "25/2"
    num_frames: int = 15
    num_train: int | None = 1536
    shard_clips: int = 256
    speakers: int = 1
    steered: bool = False

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

    identity: Float[Tensor, "n 14"]
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
    identity = torch.rand(num, IDENTITY, generator=rng)
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


def _mix(a, b, weight: Tensor) -> Tensor:
    """Colours a to b [3] by weight [N] -> [N, 3, 1, 1, 1]."""
    a, b = torch.tensor(a), torch.tensor(b)
    return (a + (b - a) * weight.unsqueeze(-1)).view(-1, 3, 1, 1, 1)


def _ellipse(u: Tensor, v: Tensor, cx, cy, rx, ry, soft: float) -> Tensor:
    """Anti-aliased coverage of an ellipse; `soft` is half a pixel in the units of u, v."""
    x, y = (u - cx) / rx, (v - cy) / ry
    radius = torch.sqrt(x**2 + y**2 + 1e-6)
    slope = torch.sqrt((x / rx) ** 2 + (y / ry) ** 2 + 1e-6) / radius  # |grad|: distance to the edge to first order
    return ((1.0 - radius) / slope / (2 * soft) + 0.5).clamp(0, 1)


def _paint(image: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    return image + (colour - image) * cover.unsqueeze(1)


def _palette(identity: Tensor) -> dict[str, Tensor]:
    p = identity.unbind(dim=1)
    return {
        "skin": _mix((0.42, 0.27, 0.19), (0.96, 0.80, 0.68), p[0]),
        "hair": _mix((0.10, 0.07, 0.05), (0.80, 0.58, 0.25), p[1]),
        "lips": _mix((0.75, 0.20, 0.25), (0.60, 0.28, 0.25), p[2]),
        "wall_high": _mix((0.40, 0.55, 0.72), (0.62, 0.50, 0.66), p[3]),
        "wall_low": _mix((0.24, 0.34, 0.36), (0.40, 0.34, 0.30), p[4]),
        "shirt": _mix((0.20, 0.32, 0.62), (0.66, 0.28, 0.30), p[5]),
        "iris": _mix((0.20, 0.12, 0.05), (0.20, 0.45, 0.65), p[6]),
    }


def _draw_head(image, u, v, shape, colour, state, soft):
    """Hair, face, eyes, brows and mouth in head coordinates (chin at v = 0.75)."""
    wide, hair, apart = shape
    image = _paint(image, _ellipse(u, v, 0.0, -0.18, wide + 0.13, 0.74 + hair, soft), colour["hair"])
    image = _paint(image, _ellipse(u, v, 0.0, 0.05, wide, 0.74, soft), colour["skin"])
    smile, frown, surprised = state["smile"], state["frown"], state["surprised"]
    white, dark = torch.ones(1, 3, 1, 1, 1), torch.full((1, 3, 1, 1, 1), 0.08)
    lid = (1.0 - state["blink"]).clamp(min=0.05)
    for side in (-1.0, 1.0):
        ex, ey = side * apart, -0.12
        lash = _ellipse(u, v, ex, ey + 0.03, 0.16, 0.045, soft) * (state["blink"] * 1.5 - 0.5).clamp(0, 1)
        image = _paint(image, lash, colour["skin"] * 0.35)
        eye = _ellipse(u, v, ex, ey, 0.155, 0.12 * lid * (1 + 0.25 * surprised), soft) * (2 * lid - 0.1).clamp(0, 1)
        image = _paint(image, eye, white)
        image = _paint(image, eye * _ellipse(u, v, ex + 0.07 * state["gaze"], ey, 0.085, 0.10, soft), colour["iris"])
        slope = side * (0.30 * frown - 0.15 * smile)
        brow_v = v + 0.32 + 0.11 * surprised - slope * (u - ex)
        image = _paint(image, _ellipse(u, brow_v, ex, 0.0, 0.19, 0.045, soft), colour["hair"] * 0.6)
    image = _paint(image, _ellipse(u, v, 0.0, 0.14, 0.055, 0.09, soft) * 0.5, colour["skin"] * 0.7)
    opening, width = state["mouth_open"], state["mouth_width"]
    half = 0.19 + 0.17 * width + 0.03 * smile
    bend = 0.9 * smile - 0.9 * frown
    mouth_v = v - 0.44 + bend * (u**2 - 0.05)
    inner = 0.012 + 0.21 * opening
    image = _paint(image, _ellipse(u, mouth_v, 0.0, 0.0, half, inner + 0.055, soft), colour["lips"])
    hole = _ellipse(u, mouth_v, 0.0, 0.0, half * 0.84, inner, soft)
    image = _paint(image, hole, dark * torch.tensor([2.2, 0.8, 0.8]).view(1, 3, 1, 1, 1))
    teeth = hole * ((-0.35 * inner - mouth_v) / (2 * soft) + 0.5).clamp(0, 1)
    return _paint(image, teeth, white * 0.93)


def render(
    config: WorldConfig, p: Float[Tensor, "n 14"], state: dict[str, Float[Tensor, "n t"]]
) -> UInt8[Tensor, "n 3 t h w"]:
    """Draw the frames, uint8 [N, 3, T, H, W], of identities p [N, IDENTITY]; labels are [N, T]."""
    height, width = config.size
    size = min(height, width)  # -1..1 is the square in the middle
    gu, gv = (((torch.arange(side) + 0.5) * 2 - side) / size for side in (width, height))
    gu, gv = gu.view(1, 1, 1, -1), gv.view(1, 1, -1, 1)
    state = {k: v[:, :, None, None] for k, v in state.items()}
    shape_of = lambda i, low, high: (p[:, i] * (high - low) + low).view(-1, 1, 1, 1)  # noqa: E731
    zoom, off_x, off_y = shape_of(7, 0.96, 1.02), shape_of(8, -0.03, 0.03), shape_of(9, -0.01, 0.04)
    shape = (shape_of(10, 0.57, 0.62), shape_of(11, 0.03, 0.09), shape_of(12, 0.25, 0.27))
    frames = state["blink"].shape[1]
    colour = _palette(p)
    soft = 1.0 / size
    image = colour["wall_high"] + (colour["wall_low"] - colour["wall_high"]) * ((gv + 1) / 2).unsqueeze(1)
    image = image.expand(-1, 3, frames, height, width)
    hx, hy, angle = 0.10 * state["head_x"], 0.10 * state["head_y"], 0.16 * state["tilt"]
    u0, v0 = (gu - off_x) / zoom, (gv - off_y) / zoom
    image = _paint(image, _ellipse(u0 - 0.3 * hx, v0, 0.0, 1.25, 0.95, 0.48, soft), colour["shirt"])
    image = _paint(image, _ellipse(u0 - 0.6 * hx, v0, 0.0, 0.80, 0.22, 0.28, soft), colour["skin"] * 0.82)
    pu, pv = u0 - hx, v0 - hy - 0.5  # turn about the neck
    u, v = torch.cos(angle) * pu + torch.sin(angle) * pv, torch.cos(angle) * pv - torch.sin(angle) * pu + 0.5
    image = _draw_head(image, u, v, shape, colour, state, soft)
    ambient = shape_of(13, 0.90, 1.04).unsqueeze(1)
    lit = ambient * (1.0 + 0.30 * state["light"].unsqueeze(1) * gu.unsqueeze(1).clamp(-0.8, 0.8))
    return (image * lit).clamp(0, 1).mul(255).round().to(torch.uint8)


def make_clips(config: WorldConfig, scene: SceneParameters, rng: torch.Generator, chosen: range | None = None) -> Clips:
    """Render `scene`, or the `chosen` rows of it, with nuisance drawn from `rng`."""
    batch = max(1, PIXELS_AT_ONCE // (config.num_frames * config.size[0] * config.size[1]))
    state = draw_motion(config, scene, rng)
    chosen, video = range(len(scene.gesture)) if chosen is None else chosen, []
    for start in range(chosen.start, chosen.stop, batch):
        rows = torch.arange(start, min(start + batch, chosen.stop))
        video.append(render(config, scene.identity[rows], {k: v[rows] for k, v in state.items()}))
    labels = dict(state, expression=scene.expression, gesture=scene.gesture, identity=scene.identity)
    audio, talk = scene.speech.audio, {}
    if scene.other is not None and scene.turn is not None:
        ticks = frame_ticks(config)
        audio = torch.stack([audio, scene.other.audio], dim=1)
        talk = {"turn": scene.turn[:, ticks], "other_open": scene.other.opening[:, ticks]}
    empty = torch.empty(len(scene.gesture), 0)
    others = Clips(video=empty, audio=audio, text=scene.text, labels=labels, pose=scene.pose, talk=talk)
    return replace(others.rows(chosen), video=torch.cat(video))

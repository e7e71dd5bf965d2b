"""The picture of the embedded world: procedural talking heads, drawn at any size by anti-aliased shapes painted one over another.

Coordinates: u to the right and v down, -1..1 over the square in the middle of a frame. A head is drawn in coordinates of its own
(chin at v = 0.75), turned about the neck; features shift a little further than its outline when it turns, as on a solid head.
Shapes that lie in a part of the frame only are painted there.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

IDENTITY = (
    28  # parameters of one clip's look, each in [0, 1]: colours, face, hair, clothes, framing, wall, ambient light
)
SHIFT, TURN, PARALLAX = (
    0.10,
    0.16,
    0.35,
)  # of a head at head_x, head_y = 1; radians at tilt 1; further shift of the features
WHITE, DARK, GUM = (0.96, 0.95, 0.92), (0.10, 0.07, 0.07), (0.30, 0.07, 0.08)


@dataclass(frozen=True)
class Canvas:
    """Pixels [N, 3, T, h, w] of a part of the frame with its head coordinates u, v [N, T, h, w]; `soft` is half a pixel in their
    units. Painting writes into the pixels."""

    pixels: Tensor
    u: Tensor
    v: Tensor
    soft: float

    def part(self, rows: slice, columns: slice) -> "Canvas":
        """A view of some rows and columns."""
        crop, shape = (..., rows, columns), self.pixels[:, 0].shape
        return Canvas(self.pixels[crop], self.u.expand(shape)[crop], self.v.expand(shape)[crop], self.soft)

    def ellipse(self, cx, cy, rx, ry) -> Tensor:
        """Anti-aliased coverage [N, T, h, w] of an ellipse."""
        x, y = (self.u - cx) / rx, (self.v - cy) / ry
        radius = torch.sqrt(x.square() + y.square() + 1e-6)
        slope = (
            torch.sqrt((x / rx).square() + (y / ry).square() + 1e-6) / radius
        )  # |grad|: first-order distance to the edge
        return ((1.0 - radius) / slope / (2 * self.soft) + 0.5).clamp_(0, 1)

    def glow(self, cx, cy, rx, ry) -> Tensor:
        """A soft spot: 1 in the centre, 0 from the ellipse on."""
        return (1.0 - ((self.u - cx) / rx).square() - ((self.v - cy) / ry).square()).clamp_(0, 1)

    def step(self, distance: Tensor) -> Tensor:
        """Anti-aliased coverage of distance > 0."""
        return (distance / (2 * self.soft) + 0.5).clamp_(0, 1)

    def paint(self, cover: Tensor, colour: Tensor | tuple[float, float, float]) -> None:
        """Mix in a colour [N, 3, 1, 1, 1] by a coverage [N, T, h, w]."""
        if isinstance(colour, tuple):
            colour = torch.tensor(colour).view(1, 3, 1, 1, 1)
        self.pixels.add_((colour - self.pixels) * cover.unsqueeze(1))


class Look:
    """The parameters [N, IDENTITY] of some clips by name, as [N, 1, 1, 1] or as colours [N, 3, 1, 1, 1]."""

    def __init__(self, identity: Float[Tensor, "n 28"]):
        self.p = identity

    def of(self, i: int, low: float, high: float) -> Tensor:
        """Parameter i scaled to low..high."""
        return (self.p[:, i] * (high - low) + low).view(-1, 1, 1, 1)

    def has(self, i: int, share: float) -> Tensor:
        """1 for that share of all looks, else 0."""
        return (self.p[:, i] < share).float().view(-1, 1, 1, 1)

    def mix(self, i: int, *colours: tuple[float, float, float]) -> Tensor:
        """Parameter i along a line of colours."""
        table = torch.tensor(colours)
        place = self.p[:, i] * (len(colours) - 1)
        low = place.long().clamp(max=len(colours) - 2)
        return torch.lerp(table[low], table[low + 1], (place - low).unsqueeze(1)).view(-1, 3, 1, 1, 1)

    def colours(self) -> dict[str, Tensor]:
        """Every colour of a look."""
        return {
            "skin": self.mix(0, (0.36, 0.22, 0.15), (0.62, 0.42, 0.30), (0.86, 0.66, 0.52), (0.96, 0.80, 0.69)),
            "hair": self.mix(1, (0.08, 0.06, 0.05), (0.28, 0.16, 0.09), (0.50, 0.24, 0.12), (0.82, 0.64, 0.34)),
            "lips": self.mix(2, (0.72, 0.22, 0.26), (0.64, 0.32, 0.30)),
            "wall_high": self.mix(3, (0.38, 0.56, 0.74), (0.66, 0.68, 0.62), (0.72, 0.56, 0.50), (0.50, 0.44, 0.64)),
            "wall_low": self.mix(4, (0.22, 0.32, 0.40), (0.36, 0.36, 0.30), (0.44, 0.30, 0.28)),
            "shirt": self.mix(5, (0.16, 0.28, 0.60), (0.20, 0.46, 0.40), (0.78, 0.72, 0.58), (0.66, 0.22, 0.26)),
            "iris": self.mix(6, (0.20, 0.11, 0.05), (0.30, 0.34, 0.16), (0.20, 0.42, 0.64)),
            "thing": self.mix(14, (0.80, 0.66, 0.36), (0.24, 0.46, 0.32), (0.62, 0.34, 0.26)),
        }


def render(
    size: tuple[int, int], identity: Float[Tensor, "n 28"], state: dict[str, Float[Tensor, "n t"]]
) -> UInt8[Tensor, "n 3 t h w"]:
    """Frames uint8 [N, 3, T, H, W] of `size` (H, W), of looks `identity` with labels [N, T]."""
    height, width = size
    side = min(height, width)
    gu, gv = (((torch.arange(n) + 0.5) * 2 - n) / side for n in (width, height))
    gu, gv = gu.view(1, 1, 1, -1), gv.view(1, 1, -1, 1)
    state = {name: value[:, :, None, None] for name, value in state.items()}
    look, soft = Look(identity), 1.0 / side
    colour = look.colours()
    zoom, off_x, off_y = look.of(7, 0.84, 1.06), look.of(8, -0.12, 0.12), look.of(9, -0.03, 0.07)
    num, frames = state["blink"].shape[:2]
    wall = _wall(look, colour, (gu + 0 * gv).expand(num, 1, -1, -1), (gv + 0 * gu).expand(num, 1, -1, -1), soft)
    pixels = wall.expand(-1, -1, frames, -1, -1).clone()
    hx, hy, angle = SHIFT * state["head_x"], SHIFT * state["head_y"], TURN * state["tilt"]
    u0, v0 = (gu - off_x) / zoom, (gv - off_y) / zoom
    soft = soft / 0.95
    pu, pv = u0 - hx, v0 - hy - 0.5  # turn about the neck
    u, v = torch.cos(angle) * pu + torch.sin(angle) * pv, torch.cos(angle) * pv - torch.sin(angle) * pu + 0.5
    head = Canvas(pixels, u, v, soft)
    _hair_behind(head, look, colour)
    low = slice(int(0.55 * height), None)
    _body(Canvas(pixels, u0 - 0.3 * hx, v0, soft).part(low, slice(None)), look, colour, 0.3 * hx)
    _head(head, look, colour)
    edge = (height - side) // 2, (width - side) // 2
    rows = lambda a, b: slice(edge[0] + int((a + 1) / 2 * side), edge[0] + int((b + 1) / 2 * side + 1))  # noqa: E731
    columns = slice(edge[1] + int(0.1 * side), edge[1] + int(0.9 * side) + 1)
    face = Canvas(pixels, u - PARALLAX * hx, v - PARALLAX * hy, soft)
    _eyes(face.part(rows(-0.8, 0.45), columns), look, colour, state)
    _nose(face.part(rows(-0.5, 0.6), columns), look, colour)
    _mouth(face.part(rows(-0.2, 1.0), columns), look, colour, state)
    _fringe(head.part(rows(-1.0, 0.3), slice(None)), look, colour)
    ambient = look.of(13, 0.88, 1.04).unsqueeze(1)
    lit = ambient * (1.0 + 0.30 * state["light"].unsqueeze(1) * gu.unsqueeze(1).clamp(-0.8, 0.8))
    return pixels.mul_(lit).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _wall(look: Look, colour: dict[str, Tensor], u: Tensor, v: Tensor, soft: float) -> Tensor:
    """A wall of two colours with a panel at one side and a round thing at the other, out of focus, [N, 3, 1, H, W]."""
    blend = ((v + 1) / 2).unsqueeze(1)
    image = colour["wall_high"] + (colour["wall_low"] - colour["wall_high"]) * blend
    canvas = Canvas(image, u, v, 4 * soft + 0.04)
    at, wide = look.of(15, -0.95, 0.95), look.of(16, 0.12, 0.35)
    panel = canvas.step(wide - (u - at).abs()) * canvas.step(v + look.of(17, 0.3, 1.2)) * look.has(18, 0.7)
    canvas.paint(0.55 * panel, colour["wall_low"] * 0.7 + 0.25)
    spot = canvas.ellipse(-at, look.of(19, -0.8, 0.2), 0.22, look.of(20, 0.18, 0.4)) * look.has(21, 0.6)
    canvas.paint(0.8 * spot, colour["thing"])
    return image


def _hair_behind(head: Canvas, look: Look, colour: dict[str, Tensor]) -> None:
    """The mass of hair around and, long, beside the head."""
    wide, length = look.of(10, 0.50, 0.58), look.of(22, -0.25, 0.35)
    head.paint(head.ellipse(0.0, -0.20 + length, wide + 0.11, 0.66 + length.clamp(min=0)), colour["hair"] * 0.75)


def _body(body: Canvas, look: Look, colour: dict[str, Tensor], shift: Tensor) -> None:
    """Shoulders, neck with the shadow of the chin, and a neckline."""
    skin, shirt = colour["skin"], colour["shirt"]
    broad = look.of(23, 0.78, 0.98)
    body.paint(body.ellipse(0.0, 1.30, broad, 0.50), shirt)
    body.paint(0.5 * body.glow(0.0, 1.45, broad, 0.7), shirt * 1.15)
    neck = Canvas(body.pixels, body.u - shift, body.v, body.soft)
    neck.paint(neck.ellipse(0.0, 0.86, 0.21, 0.30), skin * 0.86)
    neck.paint(0.6 * neck.glow(0.0, 0.68, 0.26, 0.20), skin * 0.55)
    body.paint(body.ellipse(0.0, 0.80, 0.20, 0.30) * body.step(body.v - 0.94), skin * 0.90)


def _head(head: Canvas, look: Look, colour: dict[str, Tensor]) -> None:
    """Ears and a face that narrows to the chin, darker towards its edge."""
    skin, wide, jaw = colour["skin"], look.of(10, 0.50, 0.58), look.of(11, 0.02, 0.22)
    for side in (-1.0, 1.0):
        head.paint(head.ellipse(side * (wide - 0.005), -0.02, 0.075, 0.13), skin * 0.88)
    shaped = Canvas(head.pixels, head.u / (1.0 - jaw * head.v), head.v, head.soft)
    cover = shaped.ellipse(0.0, 0.03, wide, 0.72)
    radius = (shaped.u / wide).square() + ((shaped.v - 0.03) / 0.72).square()
    head.paint(cover, skin)
    head.paint(cover * (0.30 * radius.square()).clamp(max=0.45), skin * 0.60)
    beard = cover * head.step(0.8 * (head.v - 0.30) - 0.12 + 0.5 * head.u.square()) * look.has(24, 0.22)
    head.paint(0.75 * beard, colour["hair"] * 0.8 + skin * 0.15)


def _eyes(face: Canvas, look: Look, colour: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Lids, whites, irises with pupil and a highlight, brows; glasses for some."""
    apart, large = look.of(12, 0.215, 0.25), look.of(25, 0.92, 1.10)
    skin, smile, frown, surprised = colour["skin"], state["smile"], state["frown"], state["surprised"]
    is_open = 1.0 - state["blink"]
    glasses = look.has(26, 0.18)
    for side in (-1.0, 1.0):
        half = face.part(slice(None), _half(face, side))
        ex, ey, width = side * apart, -0.10, 0.130 * large
        half.paint(0.55 * half.glow(ex, ey - 0.03, 0.21, 0.16), skin * 0.72)
        open_v = 0.082 * large * is_open * (1 + 0.30 * surprised - 0.15 * smile)
        half.paint(half.ellipse(ex, ey - 0.012 * is_open + 0.02 * state["blink"], width + 0.018, open_v + 0.020), DARK)
        white = half.ellipse(ex, ey + 0.004, width, open_v + 1e-3) * (6 * is_open).clamp(max=1)
        half.paint(white, WHITE)
        gx = ex + 0.055 * state["gaze"]
        half.paint(white * half.ellipse(gx, ey, 0.074, 0.076), colour["iris"])
        half.paint(white * half.ellipse(gx, ey, 0.036, 0.038), DARK)
        half.paint(0.9 * white * half.ellipse(gx + 0.025, ey - 0.028, 0.018, 0.018), WHITE)
        slope = side * (0.32 * frown - 0.14 * smile)
        brow_v = ey - 0.20 - 0.10 * surprised + 0.03 * frown + slope * (half.u - ex)
        bent = Canvas(half.pixels, half.u, half.v - brow_v + 0.9 * (half.u - ex).square(), half.soft)
        half.paint(bent.ellipse(ex, 0.0, 0.175, look.of(27, 0.024, 0.044)), colour["hair"] * 0.55)
        rim = half.ellipse(ex, ey + 0.01, 0.20, 0.165) - half.ellipse(ex, ey + 0.01, 0.17, 0.135)
        half.paint(0.9 * rim.clamp(min=0) * glasses, DARK)


def _half(face: Canvas, side: float) -> slice:
    """The columns where an eye of that side can be."""
    columns = face.pixels.shape[-1]
    return slice(0, int(0.72 * columns)) if side < 0 else slice(int(0.28 * columns), columns)


def _nose(face: Canvas, look: Look, colour: dict[str, Tensor]) -> None:
    """A ridge in half shadow and two nostrils."""
    skin, wide = colour["skin"], look.of(16, 0.065, 0.095)
    face.paint(0.55 * face.glow(0.045, 0.06, 0.06, 0.24), skin * 0.72)
    face.paint(0.45 * face.glow(-0.01, 0.04, 0.05, 0.22), skin * 1.10)
    face.paint(0.5 * face.glow(0.0, 0.205, wide + 0.05, 0.075), skin * 0.66)
    for side in (-1.0, 1.0):
        face.paint(0.8 * face.ellipse(side * wide * 0.62, 0.215, 0.030, 0.018), skin * 0.34)


def _mouth(face: Canvas, look: Look, colour: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Lips around the teeth, the tongue and the dark of an open mouth; its corners follow the expression."""
    opening, width, smile, frown = (state[name] for name in ("mouth_open", "mouth_width", "smile", "frown"))
    lips, half = colour["lips"], 0.135 + 0.130 * width + 0.03 * smile
    bend = 0.9 * smile - 0.9 * frown
    mouth = Canvas(face.pixels, face.u, face.v - 0.43 + bend * (face.u.square() - 0.03), face.soft)
    inner = 0.006 + 0.165 * opening
    full = 0.040 + 0.016 * look.p[:, 2].view(-1, 1, 1, 1) + 0.018 * (1 - width)  # rounded lips are fuller
    mouth.paint(0.5 * mouth.glow(0.0, inner + 0.10, 0.16, 0.06), colour["skin"] * 0.70)
    mouth.paint(mouth.ellipse(0.0, 0.55 * inner, half, inner + full), lips)
    mouth.paint(0.7 * mouth.glow(0.0, inner * 1.55 + 0.55 * full, 0.6 * half, 0.5 * full), lips * 1.25)
    mouth.paint(mouth.ellipse(0.0, 0.50 * inner, 0.96 * half, 0.008 + 0.2 * inner), lips * 0.45)
    hole = mouth.ellipse(0.0, 0.55 * inner, half * 0.84, inner) * (opening * 12).clamp(max=1)
    mouth.paint(hole, GUM)
    mouth.paint(0.9 * hole * mouth.ellipse(0.0, 1.65 * inner, 0.6 * half, 0.55 * inner + 1e-3), lips * 1.05)
    mouth.paint(hole * mouth.step(-0.45 * inner + 0.035 * width + 0.02 - mouth.v - 0.02), WHITE)


def _fringe(head: Canvas, look: Look, colour: dict[str, Tensor]) -> None:
    """Hair over the forehead, parted at one side."""
    wide, low, part = look.of(10, 0.50, 0.58), look.of(11, -0.52, -0.36), look.of(19, -0.35, 0.35)
    cap = head.ellipse(0.0, -0.22, wide + 0.06, 0.55)
    line = (low + 0.55 * (head.u - part).square() + 0.05 * torch.cos(9 * (head.u - part))).clamp(max=-0.26)
    cover = cap * head.step(line - head.v)
    head.paint(cover, colour["hair"])
    head.paint(0.35 * cover * head.glow(part, -0.62, 0.32, 0.16), colour["hair"] * 1.5 + 0.05)

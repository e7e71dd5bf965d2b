"""A maze seen in the first person and steered by keys: interactive worlds (MIDAS 2508.19320 in Minecraft), drawn by ray casting.

A pose row is the keys that lead to its frame, the direction row of the faces in other words: turn (1 right), walk (1 ahead), and 1
for "steered"; a dropped pose is zeros. The keys of frame 0, which is the reference image, move nobody. Lengths are in cells.

N = clips, T = frames, G = cells a side, M = views, W = columns.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from distill.data.config import ClipsConfig
from distill.data.procedural.render import samples_per_frame
from distill.data.source import Clips, ClipSource
from teachers.errors import UserError
from teachers.flow import keyed_generator

GRID = 9  # cells a side, 4 x 4 rooms and what is between them
FULL_TURN = 20  # frames of a held turn key in which the view is the first one again
SPEED = 0.15  # a frame
RADIUS = 0.25  # how near a wall the walker comes, measured along the axes
KEPT = 0.4  # of the walls between rooms that the maze would not need to be connected without them
FADE = 5.0  # distance at which light has fallen to 1/e
SAMPLES = 2  # rays a column
VIEWS_AT_ONCE = 256
HUES = {
    "red": (0.85, 0.25, 0.22),
    "orange": (0.90, 0.55, 0.15),
    "yellow": (0.85, 0.80, 0.25),
    "green": (0.25, 0.70, 0.30),
    "blue": (0.25, 0.40, 0.85),
    "violet": (0.60, 0.30, 0.75),
}


@dataclass(frozen=True, kw_only=True)
class Maze:
    """walls [N, G, G], row y, column x; the colours of walls [N, G, G, 3] and floors [N, 3] in [0, 1]; the hue [N] that most walls
    have."""

    walls: Bool[Tensor, "n g g"]
    colours: Float[Tensor, "n g g 3"]
    floor: Float[Tensor, "n 3"]
    hue: Int[Tensor, " n"]

    def rows(self, rows: Tensor) -> "Maze":
        """Some of them."""
        return Maze(**{name: value[rows] for name, value in vars(self).items()})


def draw_mazes(num: int, rng: torch.Generator) -> Maze:
    """Mazes by the binary tree rule, each room open to the one above or on its left, and further walls taken out."""
    rooms, upper = range(1, GRID, 2), torch.rand(num, GRID, GRID, generator=rng) < 0.5
    extra = torch.rand(num, GRID, GRID, generator=rng) > KEPT
    walls = torch.ones(num, GRID, GRID, dtype=torch.bool)
    for y in rooms:
        for x in rooms:
            walls[:, y, x] = False
            up = upper[:, y, x] if x > 1 else torch.full((num,), fill_value=True)
            if y > 1:
                walls[:, y - 1, x] &= ~(up | extra[:, y - 1, x])
            if x > 1:
                walls[:, y, x - 1] &= ~(~up | extra[:, y, x - 1] if y > 1 else torch.ones_like(up))
    palette = torch.tensor([*HUES.values()])
    hue = torch.randint(0, len(HUES), (num,), generator=rng)
    other = torch.randint(0, len(HUES), (num, GRID, GRID), generator=rng)
    picked = torch.where(torch.rand(num, GRID, GRID, generator=rng) < 0.5, other, hue.view(-1, 1, 1))
    colours = palette[picked] * (0.75 + 0.25 * torch.rand(num, GRID, GRID, 1, generator=rng))
    floor = 0.25 + 0.35 * torch.rand(num, 3, generator=rng)
    return Maze(walls=walls, colours=colours, floor=floor, hue=hue)


def draw_start(maze: Maze, rng: torch.Generator) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
    """Where a walker begins: the middle of a room, x and y [N, 2], and his heading [N] in steps of a full turn, 0 to the right."""
    num = len(maze.walls)
    place = 2.0 * torch.randint(0, GRID // 2, (num, 2), generator=rng) + 1.5
    return place, torch.randint(0, FULL_TURN, (num,), generator=rng)


def draw_keys(num: int, frames: int, rng: torch.Generator) -> Float[Tensor, "{num} {frames} 3"]:
    """Pose rows of clips: two in five hold a turn key for the clip, or for a full turn and then the other one; one in five walks
    ahead and backwards again; the others press keys for 3 to 10 frames each."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    keys = torch.zeros(num, frames, 2)
    for row in keys:
        kind, side, start = pick(0, 5), 2.0 * pick(0, 2) - 1.0, pick(1, 6)
        if kind < 2:
            row[start:, 0] = side
            if kind:
                row[start + FULL_TURN :, 0] = -side
        elif kind == 2:
            ahead, pause = pick(4, frames // 2 - 2), pick(0, 5)
            row[start : start + ahead, 1] = 1.0
            row[start + ahead + pause : start + pause + 2 * ahead, 1] = -1.0
        else:
            while start < frames:
                row[start : (start := start + pick(3, 11))] = torch.tensor(
                    ((0.0, 1.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (-1.0, 1.0), (0.0, 0.0))
                )[pick(0, 8)]
    return torch.cat([keys, torch.ones(num, frames, 1)], dim=2)


def directions(heading: Int[Tensor, "*m"]) -> Float[Tensor, "*m 2"]:
    """Unit vectors, x and y; a full turn gives the same numbers."""
    angle = heading % FULL_TURN * (2 * math.pi / FULL_TURN)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def follow(
    maze: Maze, place: Float[Tensor, "n 2"], heading: Int[Tensor, " n"], keys: Float[Tensor, "n t p"]
) -> tuple[Float[Tensor, "n t 2"], Int[Tensor, "n t"]]:
    """Places and headings of every frame under the keys. A step that would end nearer than RADIUS to a wall is not made."""
    places, headings, rows = [place], [heading], torch.arange(len(place)).unsqueeze(1)
    corners = RADIUS * torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    for row in keys[:, 1:, :2].unbind(1):
        turn, ahead = row.round().unbind(1)
        heading = heading + turn.long()
        there = place + SPEED * ahead.unsqueeze(1) * directions(heading)
        cells = (there.unsqueeze(1) + corners).floor().long()
        place = torch.where(maze.walls[rows, cells[..., 1], cells[..., 0]].any(1, keepdim=True), place, there)
        places.append(place)
        headings.append(heading)
    return torch.stack(places, dim=1), torch.stack(headings, dim=1)


def cast(
    walls: Bool[Tensor, "m g g"], place: Float[Tensor, "m 2"], ray: Float[Tensor, "m w 2"]
) -> tuple[Float[Tensor, "m w"], Int[Tensor, "m w"], Bool[Tensor, "m w"], Float[Tensor, "m w"]]:
    """Where rays [M, W, 2] from places [M, 2] hit a wall: distance in lengths of the ray, the wall's cell y G + x, whether its face
    looks along x, and the place on the face from 0 to 1."""
    lines, found = torch.arange(GRID + 1.0), []
    flat, rows = walls.flatten(1), torch.arange(len(walls)).view(-1, 1, 1)
    for axis in (0, 1):
        along, start = ray[..., axis, None], place[:, None, axis, None]
        far = (lines - start) / torch.where(along == 0, 1e-9, along)  # to each line of the grid [M, W, G + 1]
        across = place[:, None, 1 - axis, None] + far * ray[..., 1 - axis, None]
        cell = (lines - (along < 0).float()).clamp(0, GRID - 1).long(), across.floor().clamp(0, GRID - 1).long()
        number = cell[1 - axis] * GRID + cell[axis]
        near, line = torch.where((far > 0) & flat[rows, number], far, math.inf).min(dim=2, keepdim=True)
        found.append([part.squeeze(2) for part in (near, number.gather(2, line), across.gather(2, line))])
    faces_x = found[0][0] < found[1][0]
    far, cell, across = (torch.where(faces_x, a, b) for a, b in zip(*found, strict=True))
    return far, cell, faces_x, across - across.floor()


def view(
    maze: Maze, place: Float[Tensor, "m 2"], heading: Int[Tensor, " m"], size: tuple[int, int]
) -> UInt8[Tensor, "m 3 h w"]:
    """The view from each place, in a maze each: 90 degrees wide, eyes at half the height of the walls, which is a cell."""
    height, width = size
    focal, columns = width / 2, SAMPLES * width
    side = ((torch.arange(columns) + 0.5) / SAMPLES - width / 2) / focal
    ahead = directions(heading)
    right = torch.stack([-ahead[:, 1], ahead[:, 0]], dim=1)
    ray = ahead.unsqueeze(1) + side.view(1, -1, 1) * right.unsqueeze(1)  # a unit ahead, so that walls are flat
    far, cell, faces_x, on_face = cast(maze.walls, place, ray)
    down = (torch.arange(height) + 0.5 - height / 2).view(1, -1, 1)  # pixels below the horizon
    top = 0.5 * focal / far.clamp_min(0.05)  # of the wall, in pixels
    covered = (top.unsqueeze(1) - down.abs() + 0.5).clamp(0, 1).unsqueeze(-1)
    colour = maze.colours.flatten(1, 2)[torch.arange(len(cell)).unsqueeze(1), cell]
    joint = 0.65 + 0.35 * (8 * torch.minimum(on_face, 1 - on_face)).clamp(0, 1)
    shade = torch.where(faces_x, 1.0, 0.8) * joint * (-far / FADE).exp()
    course = 0.88 + 0.12 * torch.cos(4 * math.pi * down / top.unsqueeze(1).clamp_min(1.0))  # four courses of bricks
    wall = (colour * shade.unsqueeze(-1)).unsqueeze(1) * course.unsqueeze(-1)
    reach = 0.5 * focal / down.abs()  # of floor and ceiling, in lengths of a ray
    point = place[:, None, None] + reach.unsqueeze(-1) * ray.unsqueeze(1)
    tile = 0.8 + 0.2 * torch.cos(2 * math.pi * point).prod(-1)
    ground = maze.floor[:, None, None] * (tile * (-reach / FADE).exp()).unsqueeze(-1)
    sky = torch.tensor([0.55, 0.65, 0.75]) * (-reach / FADE).exp().unsqueeze(-1)
    image = torch.lerp(torch.where(down.unsqueeze(-1) > 0, ground, sky), wall, covered)
    image = image.unflatten(2, (width, SAMPLES)).mean(dim=3).permute(0, 3, 1, 2)
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)


def film(
    maze: Maze, places: Float[Tensor, "n t 2"], headings: Int[Tensor, "n t"], size: tuple[int, int]
) -> UInt8[Tensor, "n 3 t h w"]:
    """What walkers see, a few views at a time."""
    num, frames = headings.shape
    rows, parts = torch.arange(num).repeat_interleave(frames), []
    place, heading = places.flatten(0, 1), headings.flatten()
    for part in torch.arange(num * frames).split(VIEWS_AT_ONCE):
        parts.append(view(maze.rows(rows[part]), place[part], heading[part], size))
    return torch.cat(parts).unflatten(0, (num, frames)).transpose(1, 2).contiguous()


@dataclass(frozen=True, kw_only=True)
class MazeConfig(ClipsConfig):
    """Clips of a walk through a maze; each has a maze of its own, and keys for `world.steered`."""

    def __post_init__(self):
        super().__post_init__()
        if self.world.speakers != 1 or not self.world.steered:
            raise UserError(
                f"data.world: got speakers={self.world.speakers}, steered={self.world.steered}; nobody speaks in a maze and keys "
                "steer it: speakers: 1, steered: true"
            )

    def open(self) -> "Mazes":
        """The mazes."""
        return Mazes(self)


class Mazes(ClipSource):
    """Walks through mazes as a source of clips, in silence. Any number can be drawn."""

    description = "procedural mazes in the first person, no people"

    def clips(self, seed: int, name: str, num: int) -> Clips:
        """Each in a maze of its own, under keys of `draw_keys`."""
        rng, world = keyed_generator(seed, "maze", name), self.config.world
        maze = draw_mazes(num, rng)
        keys = draw_keys(num, world.num_frames, rng)
        video = film(maze, *follow(maze, *draw_start(maze, rng), keys), world.size)
        text = [f"a maze of {[*HUES][hue]} walls" for hue in maze.hue.tolist()]
        audio = torch.zeros(num, world.num_frames * samples_per_frame(world))
        return Clips(video=video, audio=audio, text=text, labels={}, pose=keys)

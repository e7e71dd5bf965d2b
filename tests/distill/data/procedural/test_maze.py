"""The maze: closed forms of its views and of the walker's motion, and its clips as a data source."""

import math
from dataclasses import replace

import pytest
import torch

from distill.compose import RECIPES
from distill.data.procedural import duplex, maze
from distill.data.procedural.maze import FULL_TURN, GRID, RADIUS, SPEED, Maze
from distill.recipe import load_recipe, spec_of
from tests.distill.data.procedural.test_duplex import one_line
from tests.support.tiny import rng

SIZE = 64, 64
LEFT, RIGHT, AHEAD, BACK, NONE = (-1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.0, 0.0)
RECIPE = RECIPES / "midas_world.yaml"


def keys(*held: tuple[tuple[float, float], int]) -> torch.Tensor:
    """Pose rows [1, T, 3] of keys that are held for so many frames each, after frame 0."""
    rows = [NONE, *(key for key, count in held for _ in range(count))]
    return torch.tensor([[(*row, 1.0) for row in rows]])


def corridor() -> Maze:
    """One straight corridor along x in row 4, from cell 1 to the wall in cell 8; grey, on black."""
    walls = torch.ones(1, GRID, GRID, dtype=torch.bool)
    walls[:, 4, 1:8] = False
    grey = torch.ones(1, GRID, GRID, 3)
    return Maze(walls=walls, colours=grey, floor=torch.zeros(1, 3), hue=torch.zeros(1, dtype=torch.long))


def walked(world: Maze, rows: torch.Tensor, x: float = 2.5, heading: int = 0):
    return maze.follow(world, torch.tensor([[x, 4.5]]), torch.tensor([heading]), rows)


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_a_full_turn_is_the_same_picture_bit_by_bit_and_half_of_one_is_not(side):
    world = maze.draw_mazes(4, rng(1))
    rows = keys((side, FULL_TURN)).expand(4, -1, -1)
    video = maze.film(world, *maze.follow(world, *maze.draw_start(world, rng(2)), rows), SIZE)
    assert torch.equal(video[:, :, FULL_TURN], video[:, :, 0])
    assert all(not torch.equal(video[:, :, t], video[:, :, 0]) for t in range(1, FULL_TURN))


def test_a_turn_to_the_right_moves_the_picture_to_the_left_by_its_angle():
    """The middle of the view is, one step later, where tan(18 degrees) puts it."""
    world = maze.draw_mazes(1, rng(3))
    place, heading = maze.draw_start(world, rng(4))
    ray = math.tan(2 * math.pi / FULL_TURN)
    before, after = (maze.directions(heading + i)[0] for i in (0, 1))
    right = torch.stack([-after[1], after[0]])
    seen = after - ray * right  # on the left of the new view
    torch.testing.assert_close(seen / seen.norm(), before)
    video = maze.film(world, *maze.follow(world, place, heading, keys((RIGHT, 1))), SIZE)[0].float()
    shift = round(32 * ray)
    errors = {s: (video[:, 0, :, 32 + s : 40 + s] - video[:, 1, :, 32:40]).abs().mean() for s in (-shift, 0, shift)}
    assert min(errors, key=errors.get) == shift  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_the_wall_at_the_end_of_a_corridor_is_as_far_and_as_high_as_computed():
    for x in (2.5, 4.0, 6.25):
        far, cell, faces_x, _ = maze.cast(corridor().walls, torch.tensor([[x, 4.5]]), torch.tensor([[[1.0, 0.0]]]))
        assert (float(far), int(cell), bool(faces_x)) == (8.0 - x, 4 * GRID + 8, True)
        image = maze.view(corridor(), torch.tensor([[x, 4.5]]), torch.tensor([0]), SIZE)[0, 0]
        middle = image[:, 32].float()
        lit = (middle[32:] > 0).sum()  # below the horizon: wall, then a black floor
        assert abs(int(lit) - 16 / (8.0 - x)) <= 1
    slanted = torch.tensor([[[1.0, 1.0]]])  # the side of the corridor is half a cell away, at any place along it
    far, cell, faces_x, on_face = maze.cast(corridor().walls, torch.tensor([[2.25, 4.5]]), slanted)
    assert (float(far), int(cell), bool(faces_x)) == (0.5, 5 * GRID + 2, False)
    assert float(on_face) == 0.75


def test_a_walk_ends_at_a_wall_and_leads_back_where_it_began():
    places, headings = walked(corridor(), keys((AHEAD, 60)), 2.6)
    steps = places[0, :, 0].diff()
    count = int((8.0 - RADIUS - 2.6) / SPEED)
    torch.testing.assert_close(steps[:count], torch.full((count,), SPEED), atol=1e-5, rtol=0)
    assert (steps[count:] == 0).all()
    assert not headings.any()
    assert torch.equal(places[..., 1], torch.full_like(places[..., 1], 4.5))
    there_and_back = walked(corridor(), keys((AHEAD, 12), (NONE, 3), (BACK, 12)))
    torch.testing.assert_close(there_and_back[0][0, -1], torch.tensor([2.5, 4.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(there_and_back[0][0, 12], torch.tensor([2.5 + 12 * SPEED, 4.5]), atol=1e-5, rtol=0)
    video = maze.film(corridor(), *there_and_back, SIZE)[0].int()
    assert (video[:, 0] - video[:, -1]).abs().max() <= 1
    assert (video[:, 0] - video[:, 12]).abs().max() > 20


def test_every_room_can_be_reached_and_the_border_is_shut():
    walls = maze.draw_mazes(32, rng(5)).walls
    assert all(side.all() for side in (walls[:, 0], walls[:, -1], walls[..., 0], walls[..., -1]))
    open_, reached = ~walls, torch.zeros_like(walls)
    reached[:, 1, 1] = True
    for _ in range(GRID * GRID):
        wide = torch.nn.functional.max_pool2d(reached.float(), (3, 1), 1, (1, 0))
        wide = torch.maximum(wide, torch.nn.functional.max_pool2d(reached.float(), (1, 3), 1, (0, 1)))
        reached = (wide > 0) & open_
    assert torch.equal(reached, open_)
    assert open_[:, 1::2, 1::2].all()


def test_the_clips_of_the_source():
    config = load_recipe(RECIPE, ["preset=smoke"]).data
    source, frames = config.open(), config.world.num_frames
    first, again, other = (source.clips(seed, name, 6) for seed, name in ((1, "test"), (1, "test"), (1, "reference")))
    assert first.video.shape == (6, 3, frames, 64, 64)
    assert first.video.dtype == torch.uint8
    assert first.pose is not None
    assert first.pose.shape == (6, frames, duplex.POSE_DIM)
    assert set(first.pose[..., :2].unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (first.pose[..., 2] == 1).all()
    still, turning = (first.pose[:, 1:, :2] == 0).all(2), first.pose[:, 1:, 0] != 0
    moved = (first.video.diff(dim=2) != 0).flatten(3).any(3).any(1)
    assert not moved[still].any()
    assert moved[turning].all(), "a frame's keys are those that lead to it"
    assert not first.audio.any()
    assert all(text.split()[-2] in maze.HUES for text in first.text)
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, other.video)
    one_line(
        r"^data\.world: got speakers=1, steered=False", replace, config, world=replace(config.world, steered=False)
    )


def test_the_mirror_image_of_a_clip_is_a_walk_under_mirrored_keys():
    """Which is what `data.mirror` takes them for."""
    world = maze.draw_mazes(3, rng(6))
    place, heading = maze.draw_start(world, rng(7))
    rows = maze.draw_keys(3, 21, rng(8))
    video = maze.film(world, *maze.follow(world, place, heading, rows), SIZE)
    flipped = replace(world, walls=world.walls.flip(2), colours=world.colours.flip(2))
    there = torch.stack([GRID - place[:, 0], place[:, 1]], dim=1), FULL_TURN // 2 - heading
    mirrored = maze.film(flipped, *maze.follow(flipped, *there, duplex.mirrored(rows)), SIZE)
    assert ((mirrored.flip(-1).int() - video.int()).abs() <= 2).float().mean() > 0.99


def test_the_student_of_the_recipe_is_steered_and_remembers_more_than_a_full_turn():
    recipe = load_recipe(RECIPE)
    spec = spec_of(recipe)
    assert spec.pose_dim == duplex.POSE_DIM
    assert spec.audio_dim == 0
    assert (spec.history.window or 0) * spec.chunk_frames * spec.codec.stride > FULL_TURN

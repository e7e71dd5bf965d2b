"""The measures of the maze on the renderer itself: what is right scores right, and keys that come a chunk late do not."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from benchmarks.lab import midas_world as lab
from distill.data.procedural import maze
from students.serving.session import Chunk, Session
from teachers.flow import keyed_generator
from tests.support.tiny import MIDAS, a_bundle, a_portrait

SIZE, FRAMES = (64, 64), 1 + lab.LAP


@pytest.fixture(scope="module")
def walks():
    return lab.draw_walks(2, FRAMES, SIZE, seed=1)


@dataclass
class World:
    """A session that draws the true views, under the keys of `late` chunks before."""

    number: int
    late: int = 0
    keys: list = field(default_factory=list)

    def push(self, pose):
        self.keys.append(pose)

    def step(self):
        none = torch.tensor([[0.0, 0.0, 1.0]])
        own = [none, *[none.expand(2, -1)] * self.late, *self.keys[1:]][: len(self.keys)]
        rng = keyed_generator(1, "midas world")
        world = maze.draw_mazes(2, rng)
        lab.lap_keys(FRAMES, rng)
        there = maze.follow(world, *maze.draw_start(world, rng), torch.cat(own).expand(2, -1, -1))
        count, one = len(own[-1]), slice(self.number, self.number + 1)
        place, heading = (part[one, -count:].flatten(0, 1) for part in there)
        frames = maze.view(world.rows(torch.full((count,), self.number)), place, heading, SIZE)
        return Chunk(len(self.keys) - 1, 0, frames.permute(0, 2, 3, 1), torch.empty(0), {})

    def interrupt(self, frame):
        self.keys = self.keys[: 1 + (frame - 1) // 2]

    def played(self, frame):
        pass

    point = SimpleNamespace(frame=0)


@pytest.mark.parametrize("late", [0, 1])
def test_a_key_is_felt_in_the_chunk_that_draws_it(walks, monkeypatch, late):
    monkeypatch.setattr(lab, "Session", lambda *_, seed, **__: World(seed, late))
    frames, delays = lab.stream(a_bundle(chunk_frames=1), walks, 1)
    assert delays == [late] * len(walks.turns)
    assert torch.equal(frames, walks.video[1]) is (late == 0)


def test_the_true_views_score_as_what_they_are(walks):
    mean = walks.video.float().mean((0, 1))
    true, floor = (lab.scores(walks.video, walks, mean, 12.5, other) for other in (0, 1))
    late = lab.scores(walks.video.roll(2, 1), walks, mean, 12.5)
    for name in ("full turn", "true view, 0 to 1 s"):
        torch.testing.assert_close(true[name], torch.ones(2))
        assert floor[name].max() < 0.6
    assert true["full turn, half way"].max() < 0.6
    assert true["steering"].min() > 0.9
    assert late["steering"].max() < true["steering"].min()
    assert late["true view, 1 to 2 s"].max() < 0.9
    assert lab.shown(torch.tensor([1.0, float("nan"), 3.0])) == "2.00 ± 1.00"


def test_what_was_taken_back_leaves_no_trace_in_a_stream(monkeypatch):
    """The same frames as of a session that was never asked for the chunks without the key."""
    monkeypatch.setattr(lab, "turned", lambda *_: False)
    bundle = a_bundle(network=MIDAS, pose_dim=3, chunk_frames=1)
    walks = lab.draw_walks(2, FRAMES, (bundle.spec.height, bundle.spec.width), seed=1)
    frames, delays = lab.stream(bundle, walks, 0)
    assert delays == [None, None]
    reference = walks.video[0, 0].float() / 127.5 - 1
    assert reference.shape == a_portrait().shape
    session = Session(bundle, reference, walks.text[0], 0, drop=("audio",))
    session.push(pose=walks.keys)
    plain = torch.cat([chunk.frames.permute(0, 3, 1, 2) for chunk in session.frames()])
    assert torch.equal(frames[: len(plain)], plain)

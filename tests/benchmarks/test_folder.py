"""`data=folder` on 100 small clips: all are used, training does not wait for them, and its memory does not grow."""

import pytest

from benchmarks.folder import measure
from tests.support.processes import call

pytestmark = [pytest.mark.slow, pytest.mark.long]

SMALL = (
    "data.text_steps=2",
    "data.world.shard_clips=20",
    "teacher.network.num_layers=2",
    "teacher.network.audio_blocks=[0,1]",
    "teacher.train.checkpoint_every=0",
    "teacher.train.batch_size=8",
)


def test_a_hundred_clips_are_all_used_and_none_is_waited_for(tmp_path):
    found = call(measure, tmp_path, 100, 20, 40, 1, 0, SMALL, timeout=900)
    assert found["trained_on"] + found["held_out"] == found["clips"] == 100
    assert found["trained_on"] > found["held_out"] > 0
    assert found["loader_clips_a_second"] > 2 * found["trainer_clips_a_second"]
    assert found["resident_growth_mib"] < 8

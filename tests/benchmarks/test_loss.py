"""The line between a server and a viewer: when packets arrive, which do not, and what is read of the frames that came."""

import random

import numpy as np
import pytest

from benchmarks.serving.loss import Direction, Video, due, row


def test_a_packet_waits_for_those_before_it_and_for_the_delay():
    way = Direction(loss=0.0, delay=0.02, bits=1e6, rng=random.Random(0))
    assert way.leaves(1.0, 1250) == pytest.approx(1.03)  # 10 ms on the line
    assert way.leaves(1.0, 1250) == pytest.approx(1.04)
    assert way.leaves(2.0, 1250) == pytest.approx(2.03)
    assert way.carried == 3 * 1250


def test_a_full_queue_takes_no_more():
    way = Direction(loss=0.0, delay=0.0, bits=1e6, rng=random.Random(0))
    taken = [way.leaves(0.0, 1100) for _ in range(40)]  # 8.8 ms each
    assert [x is not None for x in taken] == [True] * 23 + [False] * 17
    assert max(x for x in taken if x is not None) == pytest.approx(23 * 8.8e-3)
    assert way.leaves(0.01, 1100) is not None


def test_packets_are_lost_by_chance_and_were_carried():
    way = Direction(loss=0.05, delay=0.0, bits=1e9, rng=random.Random(0))
    lost = sum(way.leaves(float(i), 100) is None for i in range(10_000))
    assert 400 < lost < 600
    assert way.carried == 1_000_000


def test_a_frame_is_known_by_its_number_and_damage_is_seen():
    rng = np.random.default_rng(0)
    shown = Video(rng.integers(0, 255, (3, 64, 512, 3), dtype=np.uint8), 2000)
    assert not np.array_equal(shown.frame(1203), shown.frame(1204))
    number, error = shown.error(shown.frame(1203))
    assert (number, error > 60) == (1203, True)
    damaged = shown.frame(1203)
    damaged[40:50] = 0
    assert shown.error(damaged)[1] < 30
    assert shown.chunk(2).first_frame == 16


def test_lateness_counts_from_a_frame_s_own_place_and_of_whole_ones_alone():
    found = {i: (due(10.0, i) + 0.05, 40.0) for i in range(8)} | {8: (due(10.0, 8) + 3.0, 20.0)}
    scores = row(found, 10.0, 10)
    assert scores["late p50"] == pytest.approx(50)
    assert scores["most"] == pytest.approx(50)
    assert (scores["missing %"], scores["damaged %"]) == (pytest.approx(10), pytest.approx(10))

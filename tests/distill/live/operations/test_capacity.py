"""How many viewers fit: from what batches cost."""

import math

import pytest

from distill.live.operations.capacity import LOAD, Capacity, measure
from tests.support import tiny
from tests.support.live.serving import a_puppet


def test_costs_lie_on_the_line_between_measured_sizes():
    capacity = Capacity(0.64, {1: 0.02, 2: 0.03, 4: 0.05, 8: 0.09})
    assert [capacity.cost(size) for size in (1, 2, 3, 4, 6, 8)] == pytest.approx([0.02, 0.03, 0.04, 0.05, 0.07, 0.09])
    assert capacity.cost(16) == pytest.approx(0.17)
    assert Capacity(0.64, {1: 0.02}).cost(5) == pytest.approx(0.1)


def test_viewers_are_those_that_the_best_batch_draws_in_time():
    capacity = Capacity(0.64, {1: 0.02, 2: 0.03, 4: 0.06, 8: 0.09, 16: 0.4})
    assert capacity.largest == 8, "a batch of 16 would keep an answer waiting"
    assert capacity.viewers == int(LOAD * 0.64 / (0.09 / 8))
    assert Capacity(0.64, {1: 0.042, 2: 0.059, 4: 0.094, 8: 0.176, 16: 0.335}).largest == 4, "a CPU gains little beyond"
    capacity.room = 7
    assert capacity.viewers == 7
    assert Capacity(0.64, {1: 3.0}).viewers == 1


def test_a_machine_that_becomes_slower_lets_fewer_in():
    capacity = Capacity(0.64, {1: 0.02, 8: 0.09})
    before = capacity.viewers
    for _ in range(200):
        capacity.note(8, 0.18)
    assert capacity.slowdown == pytest.approx(2.0, rel=0.02)
    assert capacity.cost(1) == pytest.approx(0.04, rel=0.02)
    assert capacity.viewers == pytest.approx(before / 2, abs=1)
    for _ in range(400):
        capacity.note(1, 0.02)
    assert capacity.viewers == pytest.approx(before, abs=1)


def test_measuring_stops_where_a_batch_takes_too_long():
    ticks = iter(range(10**6))
    slow = measure(tiny.a_bundle(), tiny.a_portrait(), clock=lambda: 0.1 * next(ticks))
    assert slow.chunk_seconds == pytest.approx(4 / 12.5)
    assert set(slow.measured) == {1, 2, 4, 8, 16, 32}
    assert math.isinf(slow.room)
    hours = measure(tiny.a_bundle(), tiny.a_portrait(), clock=lambda: 3600.0 * next(ticks))
    assert set(hours.measured) == {1}
    assert hours.viewers == 1
    assert set(measure(tiny.a_bundle(), tiny.a_portrait(), 4).measured) == {1, 2, 4}
    assert set(measure(a_puppet(), tiny.a_portrait()).measured) == {1}, "a student whose streams cannot be joined"

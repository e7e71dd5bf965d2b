"""bf16 master weights round small updates away: in closed form."""

import pytest
import torch

from benchmarks.lab.master_weights import changed, round_to_bf16


@pytest.mark.parametrize(("relative", "kept"), [(2**-10, 0.0), (2**-8, 1.0)])
def test_updates_below_half_a_unit_in_the_last_place_are_lost(relative, kept):
    weights = torch.tensor(
        [1.0, -1.0, 0.25, 64.0]
    )  # at the lower end of a binade, a unit in the last place is 2^-7 of each
    before = [weights.clone()]
    for _ in range(100):
        weights += relative * 2 * before[0].abs() * before[0].sign() * 0.99
        round_to_bf16([weights])
    assert changed([weights], before) == kept


def test_fp32_masters_add_the_same_updates_up():
    weights, before = torch.ones(4), [torch.ones(4)]
    for _ in range(100):
        weights += 2**-10
    torch.testing.assert_close(weights, torch.full((4,), 1 + 100 * 2**-10))
    assert changed([weights], before) == 1.0

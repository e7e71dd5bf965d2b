"""What runs beside the decoder is computed as where it was asked for: in the caller's precision, without gradients."""

import pytest
import torch

from students.serving.overlap import Beside


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_the_second_has_the_caller_s_autocast(threaded, narrow):
    beside, weight = Beside(torch.device("cpu"), threaded), torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        one, second = beside.run(lambda: 1, lambda: weight @ weight)
    value = second()
    assert one == 1
    assert value.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert not value.requires_grad

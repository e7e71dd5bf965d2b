"""Strict loading: all of a state dict, or one line that lists what is wrong and a module that is as it was."""

import re

import pytest
import torch
from torch import nn

from teachers.checkpoints.strict import check_shapes, load_strict, misfits
from teachers.errors import UserError


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def state():
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) for name, value in network().state_dict().items()}


def test_values_are_copied_or_take_the_place_of_a_modules_own():
    net, tensors = network(), state()
    own = {name: value.data_ptr() for name, value in net.state_dict().items()}
    load_strict(net, tensors, "file", "fix")
    assert {name: value.data_ptr() for name, value in net.state_dict().items()} == own
    assert torch.equal(net[0].weight, tensors["0.weight"])
    with torch.device("meta"):
        outline = network()
    load_strict(outline, tensors, "file", "fix", assign=True)
    assert outline[0].weight.data_ptr() == tensors["0.weight"].data_ptr()


def test_copies_keep_the_modules_types_and_assigned_tensors_the_files():
    tensors = {name: value.half() for name, value in state().items()}
    copied, assigned = network(), network()
    load_strict(copied, tensors, "file", "fix")
    load_strict(assigned, tensors, "file", "fix", assign=True)
    assert (copied[0].weight.dtype, assigned[0].weight.dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize("assign", [False, True])
def test_what_does_not_fit_is_listed_in_one_line_and_nothing_is_loaded(assign):
    net, tensors = network(), state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    del tensors["0.bias"]
    tensors |= {"1.weight": torch.zeros(4), "extra": torch.zeros(1)}
    message = "weights do not fit: file: missing 0.bias; unexpected extra; 1.weight is [4] where [2] is needed; fix"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_strict(net, tensors, "file", "fix", assign=assign)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_optional_tensors_may_be_missing_but_not_wrong():
    net, tensors = network(), state()
    net[1].num_batches_tracked.fill_(7)
    kept = r".*\.num_batches_tracked"
    del tensors["1.num_batches_tracked"]
    load_strict(net, tensors, "file", "fix", optional=kept)
    assert net[1].num_batches_tracked == 7
    with pytest.raises(UserError, match=r"num_batches_tracked is \[2\] where \[\] is needed"):
        load_strict(net, tensors | {"1.num_batches_tracked": torch.zeros(2)}, "file", "fix", optional=kept)


def test_long_lists_are_cut_and_names_are_the_files():
    wanted = {f"ours.{i}": (i,) for i in range(9)}
    message = misfits({}, wanted, named=lambda name: name.replace("ours", "theirs"))
    assert message == "missing " + ", ".join(f"theirs.{i}" for i in range(6)) + " and 3 more"
    check_shapes(wanted, wanted, "file", "fix")

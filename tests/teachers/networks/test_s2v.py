"""Wan2.2-S2V against an independent one in plain PyTorch (tests/teachers/reference/s2v.py), and the faults that it sees."""

import pytest
import torch

from teachers.errors import UserError
from teachers.networks import s2v
from teachers.networks.s2v import S2V, AudioEncoder, S2VBlock, S2VConfig
from tests.support.faults import Faults, around
from tests.support.networks.s2v import (
    AFTER,
    CHANNELS,
    DIMS,
    HEIGHT,
    SMALL,
    WIDTH,
    an_s2v_net,
    s2v_conditions,
    s2v_latents,
    some_rows,
)
from tests.support.tiny import randn
from tests.teachers.reference.s2v import S2VReference

SIGMA = torch.tensor([0.9, 0.4])
PER_FRAME = torch.tensor([[0.0, 0.55, 1.0], [0.3, 0.72, 0.13]])


def difference(sigma=SIGMA, motion: int = 19, pose: bool = True, silent: bool = False) -> float:
    """Largest difference of the network's raw output to the reference's, in parts of the largest value."""
    net, rows, x = an_s2v_net(), some_rows() * (not silent), s2v_latents()
    given = s2v_conditions(rows, motion, pose)
    levels = sigma[:, None].expand(-1, 3) if sigma.ndim == 1 else sigma
    reference = S2VReference(net.state_dict(), 2, AFTER)
    expected = reference.run(x, levels, given.text, rows, given.anchors, given.pose_latents)
    out = net.kind.run(net, net.kind.compose(x, given, ())[1], sigma, given)
    assert expected.abs().mean() > 0.1
    return float((out - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [{}, {"motion": 0, "pose": False}, {"motion": 7}, {"motion": 21}, {"sigma": PER_FRAME}, {"silent": True}],
    ids=str,
)
def test_the_network_is_the_equations(case):
    assert difference(**case) <= 1e-5


@torch.no_grad()
def test_no_pose_is_zeros_and_not_the_absence_of_their_bias():
    net, given, x = an_s2v_net(), s2v_conditions(some_rows()), s2v_latents()
    zeros = torch.cat([x, torch.zeros_like(x)], dim=1)
    args = SIGMA, given.text, given.audio
    assert torch.equal(net(x, *args, anchors=given.anchors)[0], net(zeros, *args, anchors=given.anchors)[0])


@torch.no_grad()
def test_positions_are_the_published_ones():
    """By the angle of the first pair of time, which is the position itself."""
    net = an_s2v_net()
    table = net.anchor_table(30, 80, 4, 8)[0, :, 0]
    at = torch.angle(table[:, 0]).div(2 * torch.pi).remainder(1)
    expected = [30] * 32 + [-1] * 32 + [-3] * 8 + [time for time in (-19, -14, -9, -4) for _ in range(2)]
    assert torch.allclose(at, (torch.tensor(expected) / (2 * torch.pi)).remainder(1).float(), atol=1e-6)
    columns = table[-8:, net.rope.t_dim // 2 + net.rope.h_dim // 2]
    assert torch.allclose(
        torch.angle(columns[:2]), torch.angle(torch.polar(torch.ones(2), torch.tensor([0.0, 7.0]))), atol=1e-5
    )


def test_what_does_not_fit_is_refused():
    for wrong, words in (
        ({"inject_after": (0, 3)}, r"inject_after \[0, 3\], patch 2: .* its 3 blocks"),
        ({"patch": 1}, r"patch 1: network s2v"),
    ):
        with pytest.raises(UserError, match=words):
            S2VConfig(**vars(SMALL) | wrong).check()
    with pytest.raises(
        UserError, match=r"reads 3 states a row, .* got rows of 16 numbers, .* give data\.audio states: all"
    ):
        SMALL.new(type(DIMS)(**vars(DIMS) | {"audio_dim": 16}))
    with pytest.raises(UserError, match=r"anchors: \[4, 8\] latent rows and columns with motion; give multiples of 8"):
        an_s2v_net().anchor_tokens(randn(1, CHANNELS, 20, 4, 8))
    net, given = an_s2v_net(), s2v_conditions(some_rows())
    with pytest.raises(ValueError, match="anchors missing"):
        net(s2v_latents(), SIGMA, given.text, given.audio)


# ---- planted faults

FAULTS = Faults()
fault = FAULTS.fault


@fault("shift and scale of the AdaIN swapped")
def _(patch):
    def read(own, self, *given):
        return tuple(part._replace(shift=part.scale, scale=part.shift) for part in own(self, *given))

    around(patch, S2V, "audio_inputs", read)


@fault("audio injected before the block")
def _(patch):
    inject = S2VBlock.after
    patch.setattr(S2VBlock, "after", lambda self, x, audio, num: x)
    patch.setattr(S2VBlock, "before", lambda self, x, audio: inject(self, x, audio, 80))


@fault("audio injected into the anchors too")
def _(patch):
    def after(own, self, x, audio, num):
        if audio is None:
            return x
        key, value, shift, scale = (torch.cat([part, part[:, -1:]], dim=1) for part in audio[1:])
        spread = torch.cat([x[:, :-80], x[:, -32:]], dim=1)
        out = own(self, spread, audio._replace(key=key, value=value, shift=shift, scale=scale), 0)
        return torch.cat([out[:, :-32], x[:, -80:-32], out[:, -32:]], dim=1)

    around(patch, S2VBlock, "after", after)


@fault("every token attends to the audio of all frames")
def _(patch):
    def after(own, self, x, audio, num):
        if audio is None:
            return x
        frames = audio.key.shape[1]
        key, value = (part.flatten(1, 2).unsqueeze(1).repeat(1, frames, 1, 1, 1) for part in audio[1:3])
        return own(self, x, audio._replace(key=key, value=value), num)

    around(patch, S2VBlock, "after", after)


@fault("audio rows a pixel frame late")
def _(patch):
    around(patch, AudioEncoder, "forward", lambda own, self, rows: own(self, rows.roll(1, 1)))


@fault("zeros before the first row")
def _(patch):
    around(patch, s2v.F, "pad", lambda own, x, pad, mode="constant": own(x, pad))


@fault("states weighed alike")
def _(patch):
    around(
        patch, AudioEncoder, "forward", lambda own, self, rows: own(self, rows.mean(2, keepdim=True).expand_as(rows))
    )


@fault("no learned token")
def _(patch):
    def forward(own, self, rows):
        tokens, summary = own(self, rows)
        return tokens[:, :, :-1], summary

    around(patch, AudioEncoder, "forward", forward)


@fault("the global token without its last layer")
def _(patch):
    def forward(own, self, rows):
        held, self.final_linear = self.final_linear, torch.nn.Identity()
        out = own(self, rows)
        self.final_linear = held
        return out

    around(patch, AudioEncoder, "forward", forward)


@fault("the reference behind the clip and not at 30")
def _(patch):
    around(patch, S2V, "anchor_table", lambda own, self, ahead, *given: own(self, ahead - 27, *given))


@fault("anchors at the frames' time")
def _(patch):
    patch.setattr(s2v, "Modulations", lambda own, zero, num: s2v_modulations(own, own[:, :1], num))


s2v_modulations = s2v.Modulations


@fault("motion from far to near")
def _(patch):
    around(patch, S2V, "anchor_table", lambda own, self, *given: turned(own(self, *given)))


def turned(table):
    return torch.cat([table[:, :32], table[:, 72:], table[:, 64:72], table[:, 32:64]], dim=1)


@fault("coarse grids at multiples of their step")
def _(patch):
    def linspace(own, first, last, count, **named):
        return (
            own(first, last, count, **named) if count > last else torch.arange(count, **named) * ((last + 1) // count)
        )

    around(patch, s2v.torch, "linspace", linspace)


@fault("motion marked as the reference")
def _(patch):
    def tokens(own, self, anchors):
        out, kinds = own(self, anchors).clone(), self.token_kind.weight
        out[:, 32:] += kinds[1] - kinds[2]
        return out

    around(patch, S2V, "anchor_tokens", tokens)


@fault("no mark of the frames")
def _(patch):
    def embed(own, self, x):
        return own(self, x) - self.token_kind.weight[0].view(1, -1, 1, 1, 1)

    around(patch, S2V, "embed", embed)


@fault("the pose left out")
def _(patch):
    around(patch, S2V, "embed", lambda own, self, x: own(self, x[:, :CHANNELS]))


@fault("missing motion filled by copies")
def _(patch):
    def tokens(own, self, anchors):
        first = anchors[:, :, 1:2].expand(-1, -1, 20 - anchors.shape[2], -1, -1)
        return own(self, torch.cat([anchors[:, :, :1], first, anchors[:, :, 1:]], dim=2))

    around(patch, S2V, "anchor_tokens", tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", FAULTS)
def test_the_reference_sees_a_planted_fault(name, monkeypatch):
    FAULTS[name][1](monkeypatch)
    assert difference(motion=17) > 2e-4  # 1e-5 is what agreement means


@torch.no_grad()
def test_sizes_of_the_test_are_those_it_names():
    assert an_s2v_net().anchor_tokens(randn(1, CHANNELS, 20, HEIGHT, WIDTH)).shape[1] == 80

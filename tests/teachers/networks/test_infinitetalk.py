"""InfiniteTalk against an independent one in plain PyTorch (tests/teachers/reference/talk.py), and the faults that it sees."""

import pytest
import torch
from torch import Tensor, nn

from teachers.networks import infinitetalk
from teachers.networks.blocks.wan import keys_values
from teachers.networks.infinitetalk import AudioProjector, InfiniteTalk, InfiniteTalkBlock
from tests.support.faults import Faults, around
from tests.support.networks.talk import (
    CHANNELS,
    a_talk_net,
    some_people,
    some_regions,
    talk_conditions,
    talk_latents,
)
from tests.teachers.reference.talk import Talk

SIGMA = torch.tensor([0.9, 0.4])
PER_FRAME = torch.tensor([[0.0, 0.55, 1.0], [0.3, 0.72, 0.13]])


def difference(speakers: int, sigma: Tensor = SIGMA, people: Tensor | None = None) -> float:
    """Largest difference of the network's raw output to the reference's, in parts of the largest value."""
    people = some_people(2, speakers) if people is None else people
    net, regions = a_talk_net(speakers), some_regions() if speakers == 2 else None
    given, x = talk_conditions(people, regions), talk_latents()
    inputs = torch.cat([given.reference, x[:, :, 1:]], dim=2)
    inputs = torch.cat([inputs, given.beside], dim=1)
    levels = sigma[:, None].expand(-1, 3) if sigma.ndim == 1 else sigma
    seen = None if regions is None else regions[:, :, ::2, ::2]  # on the grid of tokens
    masks = None if seen is None else torch.cat([seen, 1 - seen.amax(1, keepdim=True)], 1).flatten(2)
    reference = Talk(net.state_dict(), 2, (), context_tokens=3)
    expected = reference.run(inputs, levels, given.text, given.image, people, masks)
    out = net.kind.run(net, net.kind.compose(x, given, (0,))[1], sigma, given)
    assert expected.abs().mean() > 0.1
    return float((out - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("speakers", [1, 2])
def test_the_network_is_the_equations(speakers):
    assert difference(speakers) <= 1e-5
    assert difference(speakers, PER_FRAME) <= 1e-5
    silent = some_people(2, speakers)
    silent[0] = 0.0  # no audio: published as one track of zeros, and nothing is rotated
    assert difference(speakers, people=silent) <= 1e-5


# ---- planted faults

FAULTS = Faults()
fault = FAULTS.fault


@fault("keys and values interleaved")
def _(patch):
    def read(self, tokens):
        return self.audio_cross_attn.kv_linear(tokens).unflatten(-1, (self.attn1.heads, -1, 2)).unbind(-1)

    patch.setattr(InfiniteTalkBlock, "keys_values", read)


@fault("frame 0 of the clip read as every other frame")
def _(patch):
    around(patch, AudioProjector, "forward", lambda own, self, rows, first: own(self, rows, [False] * len(first)))


@fault("every frame read as frame 0")
def _(patch):
    around(patch, AudioProjector, "forward", lambda own, self, rows, first: own(self, rows, [True] * len(first)))


@fault("neighbouring rows in the other order")
def _(patch):
    around(patch, AudioProjector, "forward", lambda own, self, rows, first: own(self, rows.flip(3), first))


@fault("audio a pixel frame late")
def _(patch):
    around(patch, AudioProjector, "forward", lambda own, self, rows, first: own(self, rows.roll(1, 2), first))


@fault("no norm of the audio tokens")
def _(patch):
    def forward(own, self, rows, first):
        held, self.norm = self.norm, nn.Identity()
        out = own(self, rows, first)
        self.norm = held
        return out

    around(patch, AudioProjector, "forward", forward)


@fault("each token attends to the audio of all frames")
def _(patch):
    def listen(own, self, x, from_audio, places):
        frames = from_audio.key.shape[1]
        key, value = (part.flatten(1, 2).unsqueeze(1).repeat(1, frames, 1, 1, 1) for part in from_audio[:2])
        return own(self, x, from_audio._replace(key=key, value=value), places)

    around(patch, InfiniteTalkBlock, "after_conditions", listen)


@fault("audio before the text")
def _(patch):
    listen = InfiniteTalkBlock.after_conditions
    patch.setattr(InfiniteTalkBlock, "before", lambda self, x, from_audio: listen(self, x, from_audio, []))
    patch.setattr(InfiniteTalkBlock, "after_conditions", lambda self, x, from_audio, places: x)


@fault("no norm of the tokens before audio")
def _(patch):
    def listen(own, self, x, from_audio, places):
        held, self.norm_x = self.norm_x, nn.Identity()
        out = own(self, x, from_audio, places)
        self.norm_x = held
        return out

    around(patch, InfiniteTalkBlock, "after_conditions", listen)


@fault("the image by the text's norm")
def _(patch):
    def look(self, image):
        own = self.attn2
        return keys_values(image, own.add_k_proj, own.norm_k, own.add_v_proj, own.heads)

    patch.setattr(InfiniteTalkBlock, "look", look)


@fault("the image's latents before the mask")
def _(patch):
    def forward(own, self, x, *given, **named):
        noisy, mask, image = x.split([CHANNELS, self.config.stride, CHANNELS], dim=1)
        return own(self, torch.cat([noisy, image, mask], dim=1), *given, **named)

    around(patch, InfiniteTalk, "forward", forward)


@fault("speakers swapped", 2)
def _(patch):
    patch.setattr(infinitetalk, "PLACES", infinitetalk.PLACES[::-1])


@fault("background at 0", 2)
def _(patch):
    patch.setattr(infinitetalk, "BACKGROUND", 0.0)


@fault("maps from the keys of the last frame", 2)
def _(patch):
    around(
        patch, InfiniteTalkBlock, "locate", lambda own, self, q, k, from_audio: own(self, q, k.roll(8, 1), from_audio)
    )


@fault("queries not rotated to speakers", 2)
def _(patch):
    def listen(own, self, x, from_audio, places):
        return own(self, x, from_audio._replace(spoken=0 * from_audio.spoken), places)

    around(patch, InfiniteTalkBlock, "after_conditions", listen)


@fault("regions not weighed by their size", 2)
def _(patch):
    around(patch, infinitetalk, "shares", lambda own, *given: own(*given).gt(0).float())


@fault("maps not scaled between their least and most", 2)
def _(patch):
    def positions(_, maps):
        own = [low + maps[..., i] * (high - low) for i, (low, high) in enumerate(infinitetalk.PLACES)]
        at = torch.stack([*own, torch.full_like(own[0], infinitetalk.BACKGROUND)], dim=-1)
        return at.gather(-1, maps.argmax(dim=-1, keepdim=True)).squeeze(-1)

    around(patch, infinitetalk, "positions", positions)


@fault("positions over half the head", 2)
def _(patch):
    around(patch, infinitetalk, "turns", lambda own, at, width: own(at * (torch.ones(1)), width) ** 0.5)


@torch.no_grad()
@pytest.mark.parametrize("name", FAULTS)
def test_the_reference_sees_a_planted_fault(name, monkeypatch):
    speakers, plant = FAULTS[name]
    plant(monkeypatch)
    assert difference(speakers) > 2e-4  # 1e-5 is what agreement means

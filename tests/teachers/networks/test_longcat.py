"""LongCat-Video-Avatar against an independent one in plain PyTorch (tests/teachers/reference/longcat.py), and the faults seen."""

import pytest
import torch
from torch import Tensor, nn

from teachers.conditions import Conditions
from teachers.networks import infinitetalk
from teachers.networks.blocks import longcat as longcat_block
from teachers.networks.blocks.longcat import CrossAttention, FinalLayer, LongCatBlock, SelfAttention
from teachers.networks.infinitetalk import AudioContext
from teachers.networks.kind import AvatarTeacher
from teachers.networks.longcat import LongCat
from teachers.networks.spans import Span
from tests.support.faults import Faults, around
from tests.support.networks.longcat import KNOWN, SMALL, a_longcat, longcat_conditions
from tests.support.networks.talk import audio_of, some_people, some_regions, talk_latents
from tests.teachers.reference.longcat import LongCatReference

SIGMA = torch.tensor([0.9, 0.4])
PER_FRAME = torch.tensor([[0.6, 0.55, 1.0], [0.3, 0.72, 0.13]])


def difference(speakers: int = 1, sigma: Tensor = SIGMA, known=KNOWN, people: Tensor | None = None) -> float:
    """Largest difference of the teacher's velocity to the reference's, in parts of the largest value."""
    people = some_people(2, speakers) if people is None else people
    net, regions = a_longcat(speakers), some_regions() if speakers == 2 else None
    given, x = longcat_conditions(people, regions), talk_latents()
    kind = net.kind
    composed = kind.compose(x, given, known)[1]
    levels = sigma[:, None].expand(-1, 3) if sigma.ndim == 1 else sigma
    seen = None if regions is None else regions[:, :, ::2, ::2]  # on the grid of tokens
    masks = None if seen is None else torch.cat([seen, 1 - seen.amax(1, keepdim=True)], 1).flatten(2)
    reference = LongCatReference(net.state_dict(), 2, context_tokens=3)
    expected = -reference(composed, levels, given.text, [3, 5], people, len(known), masks=masks)
    out = kind.run(net, composed, kind.levels(sigma, 3, known), given, None, known)
    assert expected.abs().mean() > 0.1
    return float((out - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("speakers", [1, 2])
def test_the_network_is_the_equations(speakers):
    assert difference(speakers) <= 1e-5
    assert difference(speakers, PER_FRAME) <= 1e-5
    assert (
        difference(speakers, people=0 * some_people(2, speakers)) <= 1e-5
    )  # no audio: rows of zeros, rotated all the same
    if speakers == 1:
        assert difference(known=()) <= 1e-5  # text-to-video
        assert difference(known=(0, 1)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 1])
def test_a_continuation_is_the_equations(skip):
    """The published window: the reference image, at a place of its own in time, clean frames, noisy frames; noisy ones near the
    reference's place do not see it."""
    net, people, frames, clean, ref = a_longcat(), some_people(2, 1, 7), 8, 3, 4
    given, x = longcat_conditions(people), talk_latents(2, frames)
    sigma = torch.full((2, frames), 0.7)
    expected = -LongCatReference(net.state_dict(), 2, 3)(x, sigma, given.text, [3, 5], people, clean, ref, skip)
    sigma[:, :clean] = 0.0
    spans = [Span(0, 1, at=(ref,)), Span(1, clean, at=(0,))]
    if not skip:
        spans.append(Span(clean, frames, ((0, 1), (1, clean)), at=(ref, 0, clean - 1)))
    else:
        a, b = 1 + ref - skip, 2 + ref + skip
        spans.append(Span(clean, a, ((0, 1), (1, clean), (a, frames)), at=(ref, 0, a - 1, clean - 1)))
        spans.append(Span(a, b, ((1, a), (b, frames)), at=(0, b - 1, a - 1)))
        spans.append(Span(b, frames, ((0, 1), (1, b)), at=(ref, 0, b - 1)))
    audio = audio_of(people)
    rows, numbers = torch.cat([audio[:, :1], audio], dim=1), [0, 0, *[1] * (frames - 2)]
    out, _ = net(x, sigma, given.text, rows, [s for s in spans if s.start < s.stop], numbers=numbers)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_what_is_read_ahead_gives_the_same():
    net, given, x = a_longcat(2), longcat_conditions(some_people(2, 2), some_regions()), talk_latents()
    levels = SMALL.levels(SIGMA, 3, KNOWN)
    plain, _ = net(x, levels, given.text, given.audio, regions=given.regions)
    read = net.read_time(levels), net.read_text(given.text), net.read_audio(given.audio, None, given.regions)
    out, _ = net(x, *read)
    assert torch.allclose(out, plain, atol=1e-6)


@torch.no_grad()
def test_the_reference_is_a_clean_token():
    """Frame 0 as given comes out, sees no noise and neither text nor audio; without a reference it is drawn."""
    net = a_longcat()
    teacher, given, x = AvatarTeacher(net), longcat_conditions(some_people()), talk_latents()
    x0 = teacher.denoise(x, SIGMA, given)
    assert torch.equal(x0[:, :, :1], given.reference)
    tokens = []
    handle = net.blocks[-1].register_forward_hook(lambda _, args, out: tokens.append(out[0].unflatten(1, (3, -1))))
    teacher.denoise(x, SIGMA, given)
    other = longcat_conditions(some_people(seed=4), seed=9)
    teacher.denoise(x + 1, 0.5 * SIGMA, Conditions(other.features, reference=given.reference))
    handle.remove()
    assert torch.equal(tokens[0][:, 0], tokens[1][:, 0])
    assert (tokens[0][:, 1:] - tokens[1][:, 1:]).abs().mean() > 0.01


# ---- planted faults

FAULTS = Faults()
fault = FAULTS.fault


@fault("the published sign")
def _(patch):
    around(patch, FinalLayer, "forward", lambda own, self, x, embedding: -own(self, x, embedding))


@fault("keys before queries")
def _(patch):
    around(patch, SelfAttention, "read", lambda own, self, x: (lambda q, k, v: (k, q, v))(*own(self, x)))


@fault("no norm of the queries")
def _(patch):
    def read(own, self, x):
        held, self.q_norm = self.q_norm, nn.Identity()
        self.q_norm.weight = held.weight
        out = own(self, x)
        self.q_norm = held
        return out

    around(patch, SelfAttention, "read", read)


@fault("keys and values of text and audio swapped")
def _(patch):
    around(patch, CrossAttention, "read", lambda own, self, given: own(self, given)[::-1])


@fault("padding not attended to")
def _(patch):
    def embed(own, self, text):
        out = own(self, text)
        return torch.where(out.any(-1, keepdim=True), out, out[:, :1])

    around(patch, LongCat, "embed_text", embed)


@fault("padding embedded")
def _(patch):
    around(patch, LongCat, "embed_text", lambda own, self, text: self.y_embedder["y_proj"](text))


@fault("gate and scale of self-attention swapped")
def _(patch):
    around(patch, LongCatBlock, "read_time", lambda own, self, e: own(self, e)[:, :, [0, 2, 1, 3, 4, 5, 6, 7, 8]])


@fault("modulations of the MLP and of self-attention swapped")
def _(patch):
    around(patch, LongCatBlock, "read_time", lambda own, self, e: own(self, e)[:, :, [3, 4, 5, 0, 1, 2, 6, 7, 8]])


@fault("audio not modulated by the time")
def _(patch):
    def read(own, self, embedding):
        out = own(self, embedding).clone()
        out[:, :, 6:8] = 0.0
        return out

    around(patch, LongCatBlock, "read_time", read)


@fault("the condition token attends to text and audio")
def _(patch):
    around(patch, LongCat, "embed_time", lambda own, self, s: own(self, s)._replace(noisy=torch.ones(*s.shape, 1)))


@fault("the condition token sees the noise")
def _(patch):
    patch.setattr(Span, "apart", lambda self, known: (self,))


@fault("the condition token at the noise's time")
def _(patch):
    def embed(own, self, levels):
        return own(self, levels[:, -1:].expand_as(levels))._replace(noisy=own(self, levels).noisy)

    around(patch, LongCat, "embed_time", embed)


@fault("time in units of sigma")
def _(patch):
    around(patch, LongCat, "embed_time", lambda own, self, s: own(self, s / 1000)._replace(noisy=own(self, s).noisy))


@fault("audio a latent frame late")
def _(patch):
    around(patch, LongCat, "audio_inputs", lambda own, self, a, *rest: own(self, a.roll(1, 1), *rest))


@fault("the gate of the MLP on the wrong side")
def _(patch):
    def forward(_, self, x):
        return self.w2(self.w1(x) * nn.functional.silu(self.w3(x)))

    around(patch, longcat_block.GatedMLP, "forward", forward)


@fault("speakers swapped", 2)
def _(patch):
    patch.setattr(infinitetalk, "PLACES", infinitetalk.PLACES[::-1])


@fault("keys of audio not rotated", 2)
def _(patch):
    around(
        patch,
        LongCatBlock,
        "read_audio",
        lambda own, self, a: own(self, a._replace(regions=None))._replace(regions=a.regions),
    )


@fault("maps from the keys of the last frame", 2)
def _(patch):
    around(patch, AudioContext, "places", lambda own, self, q, k, attend: own(self, q, k.roll(8, 1), attend))


@torch.no_grad()
@pytest.mark.parametrize("name", FAULTS)
def test_the_reference_sees_a_planted_fault(name, monkeypatch):
    speakers, plant = FAULTS[name]
    plant(monkeypatch)
    assert difference(speakers) > 2e-4  # 1e-5 is what agreement means

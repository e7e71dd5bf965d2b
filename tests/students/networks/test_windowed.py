"""A causal student around any bidirectional denoiser: its clip is its stream, its past is a value, it is saved and comes back."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from distill.methods.rollout import draw_noise, rollout
from students.history import History
from students.networks.windowed import Windowed, WindowedConfig
from students.schedule import Schedule
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.spec import Spec
from students.weights.checkpoint import make_student
from teachers.config import convert, to_plain
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher, Dims, NetworkKind
from tests.support.tiny import (
    a_bundle,
    a_portrait,
    make_spec,
    randn,
    randomise,
    rng,
    some_conditions,
    some_latents,
    some_sound,
)

N = 2
HISTORIES = [
    History(sinks=1, window=2),
    History(sinks=0, window=1),
    History(sinks=1, window=1, memory=1),
    History(window=None),
]


@dataclass(frozen=True, kw_only=True)
class Plain(NetworkKind):
    """One sigma for all frames."""

    takes: ClassVar = ("audio",)
    prediction: ClassVar = "reference"

    width: int = 8

    def build(self, dims: Dims) -> nn.Module:
        return Conv(self.width, dims)


class Conv(nn.Module):
    def __init__(self, width: int, dims: Dims):
        super().__init__()
        self.stem = nn.Conv3d(dims.latent_channels, width, 3, padding=1)
        self.audio = nn.Linear(dims.stride * dims.audio_dim, width)
        self.out = nn.Conv3d(width, dims.latent_channels, 1)

    def forward(self, x, sigma, conditions):
        assert sigma.ndim == 1
        given = self.audio(conditions.audio.flatten(2)).transpose(1, 2)[..., None, None]
        return self.out(torch.tanh(self.stem(x) * (1 + sigma.view(-1, 1, 1, 1, 1)) + given))


def windowed_spec(history: History | None = None, network: NetworkKind | None = None, **changes) -> Spec:
    spec = make_spec(history, "reference", **changes)
    return replace(spec, network=WindowedConfig().over(network or spec.network))


def a_windowed(history: History | None = None, network: NetworkKind | None = None, **changes) -> Windowed:
    student = make_student(windowed_spec(history, network, **changes))
    randomise(student.net)
    return student


NETWORKS = pytest.mark.parametrize("network", [None, Plain()], ids=["wan", "conv"])


@NETWORKS
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@torch.no_grad()
def test_the_clip_is_the_stream(history, network):
    student, given, x, clean = a_windowed(history, network), some_conditions(), some_latents(), some_latents(seed=1)
    sigma = torch.linspace(0.95, 0.2, 8).view(2, 4)
    whole = student.denoise_clip(x, sigma, given, clean)
    seen = clean.clone()
    seen[:, :, :1] = given.reference
    state, parts = student.open(given.text), []
    for j in range(4):
        part, own = slice(j * N, (j + 1) * N), given.frames(j * N, (j + 1) * N)
        parts.append(student.denoise(state, student.plan(state, own), x[:, :, part], sigma[:, j], own)[0])
        state = student.commit(state, seen[:, :, part], own)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    if history.capacity:
        assert len(state.window) <= history.capacity
    other = student.denoise_clip(x, sigma, given, clean.flip(0))
    assert torch.equal(other[:, :, :N], whole[:, :, :N])
    assert not torch.equal(other[:, :, N:], whole[:, :, N:]), "the past is seen"


@NETWORKS
def test_later_input_changes_no_chunk_and_no_gradient_passes_the_context(network):
    student, given = a_windowed(network=network), some_conditions()
    noise = draw_noise(student, 2, rng(1))
    x0 = rollout(student, given, noise)
    changed = given.audio.clone()
    changed[:, 4:] += 1.0
    other = rollout(student, replace(given, audio=changed), noise)
    assert torch.equal(x0[:, :, :4], other[:, :, :4])
    assert not torch.equal(x0[:, :, 4:], other[:, :, 4:])
    first = rollout(student, given, lambda c, i: noise(c, i).requires_grad_(True))
    assert first.requires_grad
    state = student.open(given.text)
    leaf = some_latents(2, N).requires_grad_(True)
    state = student.commit(state, leaf * 1.0, given.frames(0, N))
    own = given.frames(N, 2 * N)
    student.denoise(state, None, randn(*leaf.shape), 0.5, own)[0].square().mean().backward()
    assert leaf.grad is None


def test_weights_are_the_teachers_and_the_first_chunk_of_one_chunk_is_the_teacher():
    student, given, x = a_windowed(network=Plain()), some_conditions(2, N), some_latents(2, N)
    teacher = AvatarTeacher(Plain().new(student.spec.dims))
    teacher.load_state_dict(student.state_dict())
    sigma = torch.tensor([0.9, 0.4])
    streamed, _ = student.denoise(student.open(given.text), None, x, sigma, given)
    assert torch.equal(teacher.denoise(x, sigma, given), streamed)


@NETWORKS
def test_a_session_streams_is_taken_back_and_saved(tmp_path, network):
    spec = windowed_spec(network=network)
    bundle = a_bundle(prediction="reference", network=spec.network)
    session = Session(bundle, a_portrait(), "a person nods", seed=3, lead=4)
    session.push(audio=some_sound(16 * 1280))
    films = [session.step().frames for _ in range(3)]
    save_session(session, tmp_path / "s.safetensors")
    again = load_session(bundle, tmp_path / "s.safetensors")
    following = session.step().frames
    assert torch.equal(again.step().frames, following)
    session.interrupt(len(films[0]), keep_input=True)
    assert torch.equal(session.step().frames, films[1])


def test_the_spec_reads_back_and_counts_its_evaluations():
    spec = windowed_spec()
    plain = to_plain(spec)
    assert plain["network"]["name"] == "windowed"
    assert convert(Spec, plain) == spec
    assert spec.nfe_per_chunk == len(spec.sigmas)
    assert make_spec().nfe_per_chunk == len(spec.sigmas) + 1


def test_what_it_cannot_be_is_one_line():
    with pytest.raises(UserError, match=r"student\.history, student.schedule: got commit=same_level, depth=1"):
        a_windowed(History(commit="same_level"))
    with pytest.raises(UserError, match="depth=3"):
        a_windowed(schedule=Schedule(depth=3))
    with pytest.raises(UserError, match="a windowed student has the teacher's network; remove it"):
        WindowedConfig(network=Plain()).over(Plain(width=16))
    with pytest.raises(
        UserError, match=r"Plain has no causal student of its own; give student\.network\.name=windowed"
    ):
        make_student(replace(make_spec(), network=Plain()))


def test_what_only_a_whole_clip_has_is_not_read():
    """Sound as a bidirectional network takes it, of the whole clip, is no stream's: the student trains on what it is served."""
    student = randomise(make_student(make_spec(network=WindowedConfig(network=make_spec().network))), 1).eval()
    given, x, sigma = some_conditions(2, 4), some_latents(2, 4), torch.full((2, 2), 0.5)
    other = replace(given, clip_audio=given.audio + 1.0)
    with torch.no_grad():
        assert torch.equal(student.denoise_clip(x, sigma, other), student.denoise_clip(x, sigma, given))
        louder = replace(given, audio=given.audio + 1.0)
        assert not torch.equal(student.denoise_clip(x, sigma, louder), student.denoise_clip(x, sigma, given))

"""What published code does and ours offers beside: absolute positions, rounded times, gradient through the context."""

import pytest
import torch

from distill.methods.rollout import draw_noise, rollout
from students.history import History
from students.networks.windowed import WindowedConfig
from students.schedule import Schedule
from students.spec import student_sigmas
from students.weights.checkpoint import make_student
from teachers.errors import UserError
from teachers.networks.kind import to_x0
from teachers.networks.spans import rotate
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import MIDAS, NETWORK, a_student, make_spec, rng, some_conditions, some_latents
from tests.teachers.reference.wan import Reference

N, CHUNKS = 2, 6
ONE_LAYER = NetworkConfig(**NETWORK | {"num_layers": 1}, audio_blocks=(0,))
TIMES = (1000.0, 936.0, 832.0, 624.0)  # LiveTalk's, whose sigmas are of 1000, 937.5, 833.33, 625


class Packed(Reference):
    """Audio as conditions hold it, [B, F, stride, A]."""

    def audio_context(self, rows, frames):
        return self.pack(rows.flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("cache", ["value", "inplace"])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_keys_are_where_the_published_code_has_them(positions, cache):
    """Of one layer, whose keys are of a chunk alone: attention over the visible frames, written from the equations, at the frame
    numbers of the stream (LiveTalk, Self Forcing) or counted over what is seen."""
    history = History(sinks=1, window=1, positions=positions)
    student = a_student(history, network=ONE_LAYER, horizon_frames=CHUNKS * N)
    given, clean, noisy = (
        some_conditions(1, CHUNKS * N),
        some_latents(1, CHUNKS * N),
        some_latents(1, CHUNKS * N, seed=1),
    )
    with torch.inference_mode():
        state = student.open(given.text, cache)
        for k in range(CHUNKS):
            frames = [i * N + f for i in (*history.visible(k), k) for f in range(N)]
            places = frames if positions == "absolute" else range(len(frames))
            own, part = slice(k * N, (k + 1) * N), given.frames(k * N, (k + 1) * N)
            out, _ = student.denoise(state, None, noisy[:, :, own], 0.7, part)

            net = Packed(student.net.state_dict(), 2, (0,), positions=places)
            inputs = net.see(torch.cat([clean[:, :, frames[:-N]], noisy[:, :, own]], dim=2), given.reference)
            sigma = torch.tensor([[0.0] * (len(frames) - N) + [0.7] * N])
            velocity = net(inputs, sigma, given.text, given.audio[:, frames])
            expected = (inputs[:, : velocity.shape[1]] - 0.7 * velocity)[:, :, -N:]
            known = len(part.known) if k == 0 else 0
            assert (out - expected)[:, :, known:].abs().max() <= 2e-5, f"chunk {k}"
            state = student.commit(state, clean[:, :, own], part)


@torch.no_grad()
def test_absolute_positions_end_with_the_table():
    student, given = a_student(History(sinks=1, window=1, positions="absolute")), some_conditions(1, N)
    state = student.open(given.text)
    for chunk in (510, 511):
        state = student.commit(student.resume(state, state.cached, chunk), some_latents(1, N), given)
    assert len(student.net._rope_cache) <= 256
    with pytest.raises(UserError, match=r"^latent frame 1026: [^\n]*1024[^\n]*absolute"):
        student.denoise(student.resume(state, state.cached, 512), None, some_latents(1, N), 0.7, given)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_the_network_is_conditioned_on_its_times_and_noise_has_the_sigmas(depth):
    sigmas, given, x, seen = student_sigmas(4, 5.0), some_conditions(1), some_latents(1), []
    student = a_student(sigmas=sigmas, times=TIMES, schedule=Schedule(depth=depth))
    embedder = student.net.condition_embedder.timesteps_proj
    hook = embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rollout(student, given, draw_noise(student, 1, rng(1)))
    assert {round(float(time), 2) for time in torch.cat(seen)} == {0.0, *TIMES}
    hook.remove()

    x0 = student.denoise_clip(x, torch.tensor([sigmas]), given)[:, :, 1:]
    times = torch.tensor([TIMES]) / 1000
    rounded = a_student(sigmas=sigmas).denoise_clip(x, times, given)[:, :, 1:]
    own, theirs = (torch.as_tensor(s).flatten().repeat_interleave(N)[1:, None, None] for s in (sigmas, times))
    x = x[:, :, 1:]
    assert torch.allclose(x0, x - own * (x - rounded) / theirs, atol=1e-5)


def in_place_rollout(student, given, noise, chunks) -> torch.Tensor:
    """Self Forcing's published training rollout with exit step 0: keys and values are written into one cache with gradient on, and
    overwritten by the clean pass without."""
    net, spec, grid = student.net, student.spec, student.spec.token_grid
    tokens, out = N * grid[0] * grid[1], []
    shape = (1, chunks * tokens, net.kind.num_heads, net.kind.head_dim)
    cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in net.blocks]

    def run(j, x, sigma):
        part, here = given.frames(j * N, (j + 1) * N), slice(j * tokens, (j + 1) * tokens)
        known = part.known if j == 0 else ()
        x, inputs = net.kind.compose(x, part, known)
        past = [(key[:, : here.start], value[:, : here.start]) for key, value in cache] if j else None
        level = torch.full((1, 1), sigma)
        raw, made = net(inputs, level, part.text, part.audio, past=past, past_frames=j * N)
        for (keys, values), (key, value) in zip(cache, made, strict=True):
            keys[:, here] = rotate(key, net.rope_table(j * N, N, *grid))
            values[:, here] = value
        return to_x0(raw, x, level, part, net.prediction, known)

    for j in range(chunks):
        out.append(run(j, noise(j, 0), spec.sigmas[0]))
        with torch.no_grad():
            run(j, out[-1], 0.0)
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_context_gradient_is_that_of_self_forcing_s_published_cache(checkpointing):
    student, given = a_student(History(sinks=0, window=None)), some_conditions(1, 3 * N)
    noise = draw_noise(student, 1, rng(1), 3)

    def gradients(x0) -> torch.Tensor:
        student.zero_grad()
        x0[:, :, -N:].square().mean().backward()
        return torch.cat([p.grad.flatten() for n, p in student.net.named_parameters() if "attn1.to_" in n])

    published = in_place_rollout(student, given, noise, 3)
    expected = gradients(published)
    if checkpointing:
        student.net.enable_gradient_checkpointing()
    ours = [rollout(student, given, noise, 0, context_gradient=leak) for leak in (True, False)]
    assert all(torch.allclose(x0, published, atol=1e-5) for x0 in ours)
    leaking, stopped = (gradients(x0) for x0 in ours)
    assert (leaking - expected).norm() <= 1e-5 * expected.norm()
    assert (stopped - expected).norm() > 0.1 * expected.norm()


def test_only_the_causal_wan_has_them():
    for wrong in ({"times": TIMES[:3]}, {"history": History(positions="absolute")}):
        for network in (MIDAS, WindowedConfig(network=NetworkConfig(**NETWORK, audio_blocks=(1,)))):
            with pytest.raises(UserError, match=r"^student\.times, student\.history\.positions: "):
                make_student(make_spec(**wrong, network=network))
    for times in (TIMES, (1000.0, 832.0), (1000.0, 832.0, 936.0), (1001.0, 936.0, 832.0)):
        with pytest.raises(UserError, match=r"^student\.times: got "):
            make_spec(times=times)

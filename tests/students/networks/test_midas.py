"""The MIDAS student: Qwen2's own arithmetic, plans under a mask == plans of a stream, history noise, conditions, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.methods import Batch, forcing
from distill.methods.rollout import context, draw_noise, rollout
from distill.pipeline.generate import many_step_clips
from students.history import History, HistoryNoise
from students.kv_cache import InplaceKVCache
from students.networks.midas_net import MidasConfig, MidasNet, read_language_model
from students.schedule import Schedule
from students.serving.optimize import Speed, prepare
from students.serving.session import Session
from students.weights.checkpoint import load_student, make_student, save_student
from teachers.errors import UserError
from teachers.guidance import Guidance
from tests.support.tiny import (
    CHANNELS,
    MIDAS,
    SIDE,
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

NOISE = HistoryNoise(buckets=5, most=0.4, p_clean=0.2)


def a_midas(history=None, network=MIDAS, **changes):
    spec = make_spec(history, network=network, **({"chunk_frames": 1, "history_noise": NOISE} | changes))
    return randomise(make_student(spec), 3)


def test_the_language_model_is_qwen2():
    """One token a chunk and every earlier chunk in sight is plain causal attention: transformers' own forward, to rounding."""
    net = randomise(MidasNet(MIDAS, CHANNELS, text_dim=4, audio_dim=3), 1).double()
    x = randn(2, 7, MIDAS.width, seed=2).double()
    from transformers import Qwen2Model

    whole: Any = Qwen2Model(net.llm.config).double()
    del whole.embed_tokens
    whole.load_state_dict(net.llm.state_dict())
    theirs = whole(inputs_embeds=x, use_cache=False).last_hidden_state
    ours = net.read_clip(x.unsqueeze(2), [tuple(range(i)) for i in range(7)])[:, :, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert ours.std() > 0.1


def test_latents_become_tokens_and_come_back():
    net, x = MidasNet(MIDAS, CHANNELS, text_dim=4, audio_dim=3), randn(2, CHANNELS, 3, SIDE, SIDE)
    tokens = net.tokens(x)
    assert tokens.shape == (2, 3 * (SIDE // 2) ** 2, CHANNELS * 4)
    assert torch.equal(net.latents_of(tokens, x), x)
    assert torch.equal(tokens[0, 1].view(CHANNELS, 2, 2), x[0, :, 0, :2, 2:4])


HISTORIES = [
    History(sinks=0, window=None),
    History(sinks=1, window=2),
    History(sinks=2, window=1, memory=1, memory_every=2),
    History(sinks=0, window=1),
]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda h: f"{h.sinks}-{h.window}-{h.memory}")
def test_the_masked_clip_is_the_stream(history, frames):
    student = a_midas(history, chunk_frames=frames).double()
    given, clean, x = (value.to(torch.float64) for value in (some_conditions(), some_latents(), some_latents(seed=1)))
    sigma = torch.rand(2, 8 // frames, generator=rng(4), dtype=torch.float64)
    whole = student.denoise_clip(x, sigma, given, clean)
    known = clean.clone()
    known[:, :, :1] = given.reference
    parts = []
    for j in range(8 // frames):
        part = slice(j * frames, (j + 1) * frames)
        state, own = context(student, known, given, j), given.frames(part.start, part.stop)
        parts.append(student.denoise(state, student.plan(state, own), x[:, :, part], sigma[:, j], own)[0])
        with torch.inference_mode():  # the buffers of a serving stream hold the same
            served = replace(state, kv_cache=InplaceKVCache(history))
            again, _ = student.denoise(served, student.plan(served, own), x[:, :, part], sigma[:, j], own)
        torch.testing.assert_close(again, parts[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-6)  # x0 is fp32
    assert (whole - given.reference).abs().mean() > 0.05


def test_a_plan_sees_the_past_and_not_the_future():
    student, given, x = a_midas(History(sinks=0, window=2)), some_conditions(), some_latents()
    sigma = torch.full((2, 8), 0.5)
    base = student.denoise_clip(x, sigma, given, some_latents(seed=1))
    changed = some_latents(seed=1)
    changed[:, :, 4] += 1
    apart = (student.denoise_clip(x, sigma, given, changed) - base).abs().amax(dim=(0, 1, 3, 4))
    assert [bool(a > 0) for a in apart] == [False] * 5 + [True] * 3
    late = replace(given, audio=given.audio.clone())
    late.audio[:, 4] += 1
    apart = (student.denoise_clip(x, sigma, late, some_latents(seed=1)) - base).abs().amax(dim=(0, 1, 3, 4))
    assert [bool(a > 0) for a in apart] == [False] * 4 + [True] * 4


def test_gradient_of_a_rollout_stays_in_its_chunk():
    student, given = a_midas(), some_conditions()
    noise = draw_noise(student, 2, rng(5))
    leaves = [noise(j, 2).clone().requires_grad_() for j in range(8)]
    x0 = rollout(student, given, lambda j, i: leaves[j] if i == 2 else noise(j, i))
    grads = torch.autograd.grad(x0[:, :, 5].sum(), [*leaves, *student.parameters()], allow_unused=True)
    assert [g is not None and bool(g.abs().max() > 0) for g in grads[:8]] == [j == 5 for j in range(8)]
    named = dict(zip((name for name, _ in student.named_parameters()), grads[8:], strict=True))
    unused = [name for name, g in named.items() if g is None or not g.abs().max() > 0]
    assert unused == ["net.first"], "every weight learns; the first token is for streams without a reference"


def test_checkpointing_gives_equal_gradients():
    given, x, found = some_conditions(), some_latents(), []
    for switch in (False, True):
        student = a_midas()
        if switch:
            student.net.gradient_checkpointing = True
        student.denoise_clip(x, torch.full((2, 8), 0.5), given, x).square().mean().backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", ["text", "audio", "pose", "reference"])
def test_what_is_given_changes_the_picture_and_what_is_dropped_does_not(name):
    student = a_midas(pose_dim=3)
    given = replace(some_conditions(), pose=randn(2, 8, 2, 3, seed=9))
    other = replace(given, **{name: getattr(given, name) + 0.5})
    x, sigma, clean = some_latents(), torch.full((2, 8), 0.5), some_latents(seed=1)

    def drawn(conditions):
        return student.denoise_clip(x, sigma, conditions, clean)[:, :, 1:]

    assert (drawn(other) - drawn(given)).abs().max() > 1e-3
    if name != "reference":
        assert torch.equal(drawn(other.drop(name)), drawn(given.drop(name)))


def test_no_text_at_all_is_a_text():
    """A dropped text masks every key but one: finite, and other than any text."""
    student, given, x = a_midas(), some_conditions(), some_latents()
    out = student.denoise_clip(x, torch.full((2, 8), 0.5), given.drop("text"), x)
    assert out.isfinite().all()


def test_the_head_depends_on_the_noise_level():
    student, given, x = a_midas(), some_conditions(), some_latents()
    drawn = [student.denoise_clip(x, torch.full((2, 8), sigma), given, x)[:, :, 1:] for sigma in (0.2, 0.8)]
    assert (drawn[0] - drawn[1]).abs().max() > 0.05


def test_a_padded_text_is_the_text():
    """Tokens that are zero are not read: how far a text is padded changes nothing."""
    student, given, x = a_midas(), some_conditions(), some_latents()
    sigma = torch.full((2, 8), 0.5)
    longer = replace(given, text=torch.nn.functional.pad(given.text, (0, 0, 0, 3)))
    torch.testing.assert_close(student.denoise_clip(x, sigma, longer, x), student.denoise_clip(x, sigma, given, x))


def test_buckets_of_history_noise():
    levels = NOISE.draw((4000,), rng(0))
    index = NOISE.bucket(levels)
    assert torch.equal(NOISE.bucket(torch.tensor([0.0, 0.1, 0.4])), torch.tensor([0, 1, 4]))
    shares = torch.bincount(index, minlength=5) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]), rtol=0, atol=0.025)
    assert (HistoryNoise(p_clean=1.0).draw((99,), rng(0)) == 0).all()
    with pytest.raises(ValueError, match=r"the buckets end at 0\.4"):
        NOISE.bucket(torch.tensor([0.05]))
    with pytest.raises(ValueError, match=r"the buckets end at 0\.4"):
        NOISE.bucket(torch.tensor([0.5]))


def test_a_plan_depends_on_how_noisy_the_past_is():
    student, given, x, clean = (
        a_midas(History(sinks=0, window=1)),
        some_conditions(),
        some_latents(),
        some_latents(seed=1),
    )
    sigma, level = torch.full((2, 8), 0.5), torch.zeros(2, 8)
    level[:, 3] = 0.3
    plain = student.denoise_clip(x, sigma, given, clean)
    assert torch.equal(student.denoise_clip(x, sigma, given, clean, torch.zeros(2, 8)), plain), "bucket 0 is no noise"
    apart = (student.denoise_clip(x, sigma, given, clean, level) - plain).abs().amax(dim=(0, 1, 3, 4))
    assert [bool(a > 0) for a in apart] == [False] * 4 + [True] * 3 + [False], "two layers, two chunks on"


def test_teacher_forcing_draws_noise_and_passes_its_level(monkeypatch):
    student, seen = a_midas(), []
    plain = student.denoise_clip
    monkeypatch.setattr(student, "denoise_clip", lambda *given: seen.append(given) or plain(*given))
    x0 = some_latents()
    method = forcing.build(forcing.Config(), {"student": student})
    assert method.loss("student", Batch(some_conditions(), x0), rng(1), rng(1)).value.isfinite()
    _, _, _, clean, level = seen[0]
    residual = (clean - (1 - level[:, None, :, None, None]) * x0).flatten(3).std(dim=-1).mean(dim=1)
    torch.testing.assert_close(residual, level, rtol=0.5, atol=0.02)
    assert len(level.unique()) > 2


def test_a_student_is_stored_whole(tmp_path):
    bundle = a_bundle(network=MIDAS, chunk_frames=1, history_noise=NOISE)
    save_student(tmp_path, bundle, "card")
    again = load_student(tmp_path)
    assert again.spec == bundle.spec
    assert again.fingerprint == bundle.fingerprint


def test_the_published_size():
    """Qwen2.5-3B without its vocabulary has 2.77 B parameters (Qwen2.5 card), MIDAS' head about 0.5 B."""
    with torch.device("meta"):
        net = MidasNet(MidasConfig(), latent_channels=128, text_dim=4096, audio_dim=10752)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert 2.76e9 < sizes["llm"] < 2.78e9
    assert 0.45e9 < sizes["head"] < 0.55e9


def test_a_language_model_from_a_folder(tmp_path):
    """Published Qwen2 folders hold a vocabulary and a head besides; the layers are taken, another size is refused."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def write(folder, width=MIDAS.width):
        config = Qwen2Config(
            vocab_size=50,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = randomise(Qwen2ForCausalLM(config), 8)
        model.save_pretrained(folder)
        return model.model

    net = MidasNet(MIDAS, CHANNELS, text_dim=4, audio_dim=3)
    theirs = write(tmp_path / "qwen")
    read_language_model(net, tmp_path / "qwen")
    assert torch.equal(net.llm.layers[1].mlp.up_proj.weight, theirs.layers[1].mlp.up_proj.weight)
    assert torch.equal(net.llm.norm.weight, theirs.norm.weight)
    write(tmp_path / "wide", 64)
    with pytest.raises(UserError, match="hidden_size 64 for 32"):
        read_language_model(net, tmp_path / "wide")
    with pytest.raises(UserError, match=r"missing config\.json"):
        read_language_model(net, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": History(commit="same_level")}, "student.history"),
        ({"history": History(sinks=1, window=0)}, "a window from 1"),
        ({"history": History(level=0.1)}, "level: 0.0"),
        ({"schedule": Schedule(depth=3)}, "depth: 1"),
        ({"history_noise": HistoryNoise(buckets=21)}, "the network has 20 embeddings"),
    ],
)
def test_what_it_was_not_made_for_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        a_midas(**changes)


def test_noise_that_is_none_is_refused():
    for wrong in ({"buckets": 1}, {"most": 1.0}, {"p_clean": 1.5}):
        with pytest.raises(UserError, match=r"student\.history_noise"):
            HistoryNoise(**wrong)


def test_a_plan_wants_finished_latents():
    with pytest.raises(ValueError, match="give clean"):
        a_midas().denoise_clip(some_latents(), torch.full((2, 8), 0.5), some_conditions())


def test_served_in_bf16_it_draws_nearly_the_same():
    def frames(bundle):
        session = Session(bundle, a_portrait(), "a person nods")
        session.push(some_sound(12 * 1280))
        return torch.cat([chunk.frames for chunk in session.frames()]).float()

    plain = frames(a_bundle(network=MIDAS, chunk_frames=1))
    narrow = prepare(a_bundle(network=MIDAS, chunk_frames=1), "cpu", Speed(dtype="bf16"))
    assert narrow.student.net.llm.rotary_emb.inv_freq.dtype == torch.float32
    assert narrow.student.net.llm.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert 0 < (frames(narrow) - plain).abs().mean() < 2
    with pytest.raises(UserError, match="no choice; native always works"):
        prepare(narrow, "cpu", Speed(attention="sage"))


def test_the_own_teacher_draws_with_guidance_in_every_context():
    """One Euler step is one denoising: without guidance the plain rollout, with it branches that each keep a context."""
    student, given = a_midas().eval(), some_conditions()
    plain = draw_noise(student, 2, rng(6))

    def noise(rows):
        return lambda chunk, step: plain(chunk, step)[rows]

    off = many_step_clips(student, given, noise, (1.0, 0.0), Guidance(), batch=1)
    with torch.inference_mode():
        apart = rollout(student, given.index(slice(0, 1)), lambda c, _: plain(c, 0)[:1], sigmas=lambda _: (1.0,))
    torch.testing.assert_close(off[:1], apart, rtol=0, atol=1e-5)
    guidance, expected = Guidance(text=2.0, audio=3.0), []
    branches = (given, given.drop("text", "audio"), given.drop("audio"))
    states = [student.open(c.text) for c in branches]
    with torch.no_grad():
        for j in range(8):
            parts, x, level = [c.frames(j, j + 1) for c in branches], plain(j, 0), torch.ones(2)
            full, none, text = (
                student.denoise(s, student.plan(s, c), x, level, c)[0] for s, c in zip(states, parts, strict=True)
            )
            expected.append(none + 2.0 * (text - none) + 3.0 * (full - text))
            states = [student.commit(s, expected[-1], c) for s, c in zip(states, parts, strict=True)]
    on = many_step_clips(student, given, noise, (1.0, 0.0), guidance, batch=2)
    torch.testing.assert_close(on, torch.cat(expected, dim=2), rtol=0, atol=1e-5)
    assert (on - off).abs().max() > 0.01

"""Two speakers and a direction signal: in the world, in both kinds of network, in the stream, and refused by name."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from distill.data import latents
from distill.data.encoders import load_encoders
from distill.data.procedural import duplex, render
from distill.data.procedural.render import WorldConfig
from distill.data.procedural.source import DataConfig, held_out
from distill.methods import Batch, flow_matching, forcing
from students.serving.session import Session, Starved
from students.serving.snapshot import load_session, save_session
from teachers.codecs.linear import CodecConfig
from teachers.conditions import Conditions
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from teachers.media.streams import Resampler
from teachers.networks.kind import AvatarTeacher
from tests.support.tiny import (
    MIDAS,
    Ranks,
    a_bundle,
    a_portrait,
    a_student,
    make_spec,
    randn,
    rng,
    some_conditions,
    some_latents,
    some_sound,
)

PER_FRAME, CHUNKS = 1280, 7
WORLD = WorldConfig(speakers=2, steered=True, num_train=6, shard_clips=4)
DATA = DataConfig(world=WORLD, codec=CodecConfig(), audio=AudioConfig(), text=TextConfig(vocab_size=300, num_layers=1))
KINDS = {"wan": {}, "midas": {"network": MIDAS, "chunk_frames": 1}}


@pytest.fixture(scope="module", params=list(KINDS))
def bundle(request):
    return a_bundle(speakers=2, pose_dim=duplex.POSE_DIM, **KINDS[request.param])


@pytest.fixture(scope="module")
def clips():
    return held_out(DATA, 0, "test", 48)


def inputs(bundle, num_chunks=CHUNKS, seed=0):
    """Own voice, the other's and directions: just what `num_chunks` need."""
    stop = bundle.spec.pixel_frames(num_chunks - 1)[1]
    num = stop * PER_FRAME + bundle.audio_encoder.lookahead
    return some_sound(num, seed), some_sound(num, seed + 5), randn(stop, duplex.POSE_DIM, seed=seed + 9).clamp(-1, 1)


def play(session, own=None, other=None, pose=None, rate=16000):
    session.push(audio=own, other=other, pose=pose, rate=rate)
    return film(session.frames())


def film(chunks):
    frames = [chunk.frames for chunk in chunks]
    return torch.cat(frames) if frames else torch.zeros(0, 16, 16, 3, dtype=torch.uint8)


def opened(bundle, **options):
    return Session(bundle, a_portrait(), "a person nods", **options)


def one_line(words: str, call, *given, **options) -> None:
    with pytest.raises(UserError, match=words) as error:
        call(*given, **options)
    assert "\n" not in str(error.value)


# ---- the world


def test_each_voice_is_silent_out_of_its_turn(clips):
    turn = clips.talk["turn"]
    assert clips.audio.shape == (48, 2, 15 * PER_FRAME)
    assert {*turn.unique().tolist()} == {duplex.OWN, duplex.OTHER, duplex.NONE}
    switched = ((turn == duplex.OWN).any(1) & (turn == duplex.OTHER).any(1)).float().mean()
    assert 0.4 < switched < 0.95, "some clips have both, some do not"
    # Frames well inside one's turn: the other's sound is zero there, and one's own is not.
    for speaker, sound in ((duplex.OWN, clips.audio[:, 0]), (duplex.OTHER, clips.audio[:, 1])):
        mine, loud = turn == speaker, sound.unflatten(1, (15, PER_FRAME)).square().mean(2).sqrt()
        inside = mine[:, :-2] & mine[:, 1:-1] & mine[:, 2:]
        others = turn == 1 - speaker
        away = others[:, :-2] & others[:, 1:-1] & others[:, 2:]
        assert loud[:, 1:-1][away].max() == 0
        assert loud[:, 1:-1][inside].mean() > 0.01


def test_the_mouth_is_its_own_and_the_nod_the_others(clips):
    turn, open_ = clips.talk["turn"], clips.labels["mouth_open"]
    steady = (turn[:, :-2] == duplex.OTHER) & (turn[:, 1:-1] == duplex.OTHER) & (turn[:, 2:] == duplex.OTHER)
    assert open_[:, 1:-1][steady].max() < 1e-6
    assert open_[turn == duplex.OWN].mean() > 0.15
    assert (clips.labels["gaze"][turn == duplex.OTHER] == 0).all()
    rest = clips.labels["head_y"] - duplex.REACH * duplex.follow(clips.pose[..., 1], 12.5)
    calm = clips.labels["gesture"] != 1
    nod = duplex.NOD * duplex.follow(clips.talk["other_open"], 12.5)
    assert torch.allclose(rest[calm], nod[calm], atol=1e-5)
    assert nod.max() > 0.5


def test_the_head_goes_where_it_is_sent(clips):
    assert clips.pose.shape == (48, 15, duplex.POSE_DIM)
    assert clips.pose[..., :2].abs().max() <= 1
    assert (clips.pose[..., 2] == 1).all()
    assert (clips.labels["head_x"][:, 0] == 0).all(), "frame 0 is the portrait at rest"
    still = clips.labels["gesture"] != 2
    assert torch.allclose(
        clips.labels["head_x"][still], duplex.REACH * duplex.follow(clips.pose[..., 0], 12.5)[still], atol=1e-5
    )
    jumps = (clips.pose[:, 1:, :2] - clips.pose[:, :-1, :2]).abs().amax(dim=(1, 2))
    assert (jumps > 0.5).any()
    assert (jumps < 0.5).any()
    target = torch.cat([torch.zeros(1, 5, 1), torch.ones(1, 15, 1)], dim=1)
    path = duplex.follow(target, 12.5)[0, :, 0]
    assert (path[:5] == 0).all()
    assert 0.4 < path[5] < 0.6
    assert 0.99 < path[-1] <= 1


def test_the_default_world_is_what_it_was():
    """The draws of two voices and of directions come after all others, so that neither moves them."""
    plain, both = (render.draw_conditions(c, 6, rng(1)) for c in (replace(WORLD, speakers=1, steered=False), WORLD))
    assert plain.other is None
    assert plain.pose is None
    assert torch.equal(plain.identity, both.identity)
    assert plain.text == both.text
    own = both.turn == duplex.OWN
    inside = own.float().unfold(1, 9, 1).amin(2) == 1  # away from the fading at both ends
    assert torch.allclose(plain.speech.opening[:, 4:-4][inside], both.speech.opening[:, 4:-4][inside], atol=1e-6)
    assert float(plain.speech.audio.double().square().sum()) == pytest.approx(676.81331, rel=1e-5), "as before"


def test_training_rows_have_both_voices_and_mirrored_directions(tmp_path):
    source = DATA.open()
    latents.prepare(replace(DATA, text_steps=2), source, 0, tmp_path, Ranks())
    encoders = load_encoders(DATA, tmp_path)
    pool = latents.load_train_set(tmp_path, encoders.mark)
    shown = next(source.train(0, [0]))
    rows = pool.batch(torch.tensor([1, 5])).conditions  # a clip of the first shard and its mirror image
    size = DATA.audio.dim(PER_FRAME)
    assert rows.audio.shape == (2, 8, 2, 2 * size)
    for k in (0, 1):
        received = encoders.audio_encoder(shown.audio[1, k], 0, 15)
        assert torch.allclose(rows.audio[0, 1:, :, k * size : (k + 1) * size].flatten(0, 1), received[1:], atol=1e-5)
    assert torch.equal(rows.pose[0, 1:].flatten(0, 1), shown.pose[1, 1:])
    assert torch.equal(rows.pose[1], rows.pose[0] * torch.tensor([-1.0, 1.0, 1.0]))


@pytest.mark.parametrize("speakers", [0, 3])
def test_a_world_of_three(speakers):
    one_line(r"^data\.world\.speakers: got \d; 1, or 2", replace, DATA, world=replace(WORLD, speakers=speakers))
    one_line(r"^speakers: got \d; a student takes one voice", make_spec, speakers=speakers)


# ---- networks


def test_every_condition_reaches_the_network_and_a_dropped_one_does_not(bundle):
    student, spec = bundle.student, bundle.spec
    frames, shape = spec.horizon_frames, spec.latent_size
    given = Conditions(
        text=randn(1, spec.text.max_tokens, spec.text.dim, seed=1),
        audio=randn(1, frames, spec.codec.stride, spec.audio_dim, seed=2),
        reference=randn(1, shape[0], 1, *shape[1:], seed=3),
        pose=randn(1, frames, spec.codec.stride, spec.pose_dim, seed=6),
    )
    x, clean = (randn(1, shape[0], frames, *shape[1:], seed=seed) for seed in (4, 5))
    sigma, size = torch.full((1, spec.num_chunks), 0.7), spec.audio_dim // 2

    def drawn(conditions):
        return student.denoise_clip(x, sigma, conditions, clean)

    leaves = {name: getattr(given, name).clone().requires_grad_() for name in ("audio", "pose")}
    received, steered = torch.autograd.grad(drawn(replace(given, **leaves)).square().sum(), list(leaves.values()))
    for part in (received[..., :size], received[..., size:], steered):
        assert part.abs().sum() > 0
    whole = drawn(given)
    for name in ("audio", "pose"):
        without = given.drop_rows(**{name: torch.tensor([True])})
        assert torch.equal(drawn(without), drawn(given.drop(name)))
        assert not torch.allclose(drawn(without), whole, atol=1e-4), name
        assert torch.equal(drawn(replace(given, **{name: 2 * getattr(given, name)}).drop(name)), drawn(without)), name
    swapped = torch.cat([given.audio[..., size:], given.audio[..., :size]], dim=-1)
    assert not torch.allclose(drawn(replace(given, audio=swapped)), whole, atol=1e-4), "who speaks is not lost"


@pytest.mark.parametrize("method", [forcing, flow_matching])
def test_directions_are_dropped_in_training_where_that_is_asked_for(method):
    """With its probability, and without a draw where it is zero or there are none."""
    steered = a_student(pose_dim=duplex.POSE_DIM)
    roles = {"student": steered, "teacher": AvatarTeacher(steered.net)}
    given = replace(some_conditions(), pose=randn(2, 8, 2, duplex.POSE_DIM, seed=8))

    def loss(drop, pose, roles=roles):
        trained, draws = method.build(method.Config(drop={"text": 0.1, "audio": 0.1, "pose": drop}), roles), rng(1)
        batch = Batch(conditions=replace(given, pose=pose), x0=some_latents())
        with torch.no_grad():
            value = trained.loss(trained.roles_to_update(0)[0], batch, draws, rng(2)).value
        return value, torch.rand(1, generator=draws)

    none = torch.zeros_like(given.pose)
    assert torch.equal(loss(1.0, given.pose)[0], loss(1.0, none)[0])
    assert not torch.equal(loss(0.0, given.pose)[0], loss(0.0, none)[0])
    plain = a_student()
    roles = {"student": plain, "teacher": AvatarTeacher(plain.net)}
    assert loss(0.9, None, roles) == loss(0.0, None, roles)
    assert loss(0.0, given.pose)[1] == loss(0.0, None, roles)[1], "no draw for what is never dropped"


# ---- the stream


def test_any_split_of_both_sounds_and_the_directions_gives_the_same_frames(bundle):
    own, other, pose = inputs(bundle)
    whole = play(opened(bundle), own, other, pose)
    assert len(whole) == bundle.spec.pixel_frames(CHUNKS - 1)[1]
    for seed in range(2):
        session, frames = opened(bundle), []
        cuts = [0, *torch.randint(0, len(own), (8,), generator=rng(seed)).sort().values.tolist(), len(own)]
        for i, (start, stop) in enumerate(pairwise(cuts)):
            last = None if i == len(cuts) - 2 else 2 * i + 2
            session.push(audio=own[start:stop], other=other[start:stop], pose=pose[2 * i : last])
            frames += session.frames()
        assert torch.equal(film(frames), whole)


def test_a_missing_voice_is_silence_of_the_same_length(bundle):
    own, other, pose = inputs(bundle)
    for given, spelt in (
        ((own, None), (own, torch.zeros_like(own))),
        ((None, other), (torch.zeros_like(other), other)),
    ):
        assert torch.equal(play(opened(bundle), *given, pose), play(opened(bundle), *spelt, pose))
    swapped = play(opened(bundle), other, own, pose)
    assert not torch.equal(swapped, play(opened(bundle), own, other, pose))


@pytest.mark.parametrize("which", ["own", "other", "pose"])
def test_a_change_is_seen_from_its_frame_on_and_not_before(bundle, which):
    given = dict(zip(("own", "other", "pose"), inputs(bundle), strict=True))
    whole = play(opened(bundle), **given)
    for chunk in (2, 4):
        start, stop = bundle.spec.pixel_frames(chunk)
        late = start * PER_FRAME + (bundle.audio_encoder.lookahead if which != "pose" else 0)
        changed = given[which].clone()
        rows = changed[start:] if which == "pose" else changed[late:]
        rows.copy_(rows.flip(0) * 0.7 + 0.05)
        frames = play(opened(bundle), **(given | {which: changed}))
        assert torch.equal(frames[:start], whole[:start]), "the past depends on the future"
        assert not torch.equal(frames[start:stop], whole[start:stop]), "it does not take effect at once"
    if which == "pose":  # also that of the last frame alone
        changed = given["pose"].clone()
        changed[stop - 1] += 0.5
        frames = play(opened(bundle), **(given | {"pose": changed}))
        assert torch.equal(frames[:start], whole[:start])
        assert not torch.equal(frames[start:stop], whole[start:stop])


def test_saved_in_the_middle_it_goes_on_with_the_same_bits(bundle, tmp_path):
    """Also in the middle of a resampled stretch, with input that no chunk has used yet."""
    own, other, pose = (torch.cat([part] * 3) for part in inputs(bundle))
    whole = play(opened(bundle), own, other, pose, rate=44100)
    session, cut = opened(bundle), len(own) // 2 + 77
    early = play(session, own[:cut], other[:cut], pose, rate=44100)
    save_session(session, tmp_path / "s.safetensors")
    again = load_session(bundle, tmp_path / "s.safetensors")
    late = play(again, own[cut:], other[cut:], rate=44100)
    assert len(early) > 0
    assert len(late) > 0
    assert torch.equal(torch.cat([early, late]), whole)
    again.close()
    assert again.inputs.audio.end == -(-len(own) * 16000 // 44100), "the last samples of both come out"


def test_interrupted_it_forgets_both_voices_and_the_directions(bundle):
    own, other, pose = inputs(bundle)
    session = opened(bundle, lead=CHUNKS)
    play(session, own, other, pose)
    back = bundle.spec.pixel_frames(3)[1]
    assert session.interrupt(played=back) == back
    new = inputs(bundle, seed=30)
    rest = [part[back * scale :] for part, scale in zip(new, (PER_FRAME, PER_FRAME, 1), strict=True)]
    joined = [
        torch.cat([old[: back * scale], late])
        for old, late, scale in zip((own, other, pose), rest, (PER_FRAME, PER_FRAME, 1), strict=True)
    ]
    assert torch.equal(play(session, *rest), play(opened(bundle), *joined)[back:])


def test_without_a_pose_it_waits_for_one_unless_it_is_dropped(bundle):
    own, other, _ = inputs(bundle)
    session = opened(bundle)
    assert len(play(session, own, other)) == 0
    assert session.step().reason == "pose"
    dropped = play(opened(bundle, drop=("pose",)), own, other)
    zeros = play(opened(bundle), own, other, torch.zeros(len(dropped), duplex.POSE_DIM))
    assert torch.equal(dropped, zeros)


def test_it_lives_on_in_silence_and_its_sound_is_its_own_voice(bundle):
    own, other, pose = inputs(bundle, 2)
    session = opened(bundle, lead=CHUNKS, idle="live")
    session.push(audio=own, other=other, pose=pose)
    chunks = [session.step() for _ in range(4)]
    assert [chunk.idle for chunk in chunks] == ["", "", "live", "live"]
    received = torch.cat([chunk.audio for chunk in chunks])
    size = min(len(own), len(received))
    assert torch.equal(received[:size], own[:size])
    assert not received[size:].any()
    stop = bundle.spec.pixel_frames(3)[1]
    spelt = [
        torch.nn.functional.pad(part, (0, stop * PER_FRAME + bundle.audio_encoder.lookahead - len(part)))
        for part in (own, other)
    ]
    held = torch.cat([pose, pose[-1:].expand(stop - len(pose), -1)])
    assert torch.equal(film(chunks), play(opened(bundle), *spelt, held))


def test_two_voices_are_resampled_as_each_alone():
    both = torch.stack([some_sound(9000, 1), some_sound(9000, 2)], dim=1)
    pair, alone = Resampler(44100, 16000, row_shape=(2,)), [Resampler(44100, 16000) for _ in range(2)]
    out = torch.cat([pair.push(both[:4000]), pair.push(both[4000:]), pair.finish()])
    for k, resampler in enumerate(alone):
        one = torch.cat([resampler.push(both[:4000, k]), resampler.push(both[4000:, k]), resampler.finish()])
        assert torch.equal(out[:, k], one)


# ---- refused


def test_refused_input_changes_nothing(bundle):
    own, other, pose = inputs(bundle)
    session = opened(bundle)
    bad = (
        (
            r"^audio and other are one stretch of time: got 100 and 99 samples",
            {"audio": own[:100], "other": other[:99]},
        ),
        (r"^other must be finite", {"audio": own[:3], "other": torch.tensor([0.0, float("nan"), 0.0])}),
        (r"^other must lie in \[-1, 1\]", {"other": torch.full((4,), 90.0)}),
        (r"^pose must be finite rows \[T, 3\]", {"audio": own[:9], "other": other[:9], "pose": torch.zeros(4, 2)}),
    )
    for words, given in bad:
        one_line(words, session.push, **given)
    assert torch.equal(play(session, own, other, pose), play(opened(bundle), own, other, pose))


def test_a_student_of_one_speaker_takes_no_other():
    session, sound = Session(a_bundle(), a_portrait(), "a person nods"), some_sound(12 * PER_FRAME)
    for given in ({}, {"audio": sound}):
        one_line(r"^other: this student takes one speaker", session.push, other=sound, **given)
    assert session.inputs.audio.end == 0
    assert session.step() == Starved("audio", session.step().missing)

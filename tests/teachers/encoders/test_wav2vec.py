"""wav2vec2: whole clips equal the published path, a stream is the same however it is cut, a folder is read strictly."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

from benchmarks.lookahead import deviation_table
from distill.data.encoders import ConditionEncoders
from teachers.conditions import pack_rows
from teachers.encoders.wav2vec import Wav2Vec, Wav2VecConfig
from teachers.errors import UserError
from teachers.networks.blocks.wan import AudioPack
from tests.support.tiny import randn, randomise, rng, some_sound
from tests.teachers.encoders import reference_audio as reference

N, HEADS, LAYERS, WIDTH = 640, 4, 3, 32
SMALL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "conv_dim": (12,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WINDOWS = Wav2VecConfig(lookback_frames=6, lookahead_frames=2)


def a_model(seed: int = 0, **changes) -> Wav2Vec2ForCTC:
    """The class of the published checkpoint, small, with random non-zero weights."""
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**(SMALL | changes)))
    return randomise(model, seed).eval().requires_grad_(False)


def an_encoder(config: Wav2VecConfig = WINDOWS, samples_per_frame: int = N, **changes) -> Wav2Vec:
    return Wav2Vec(a_model(**changes).wav2vec2, config, samples_per_frame)


def published(model: Wav2Vec2ForCTC) -> dict[str, torch.Tensor]:
    """The tensors under the names of facebook/wav2vec2-base-960h, which has no masked_spec_embed."""
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    out = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "wav2vec2.masked_spec_embed":
            out[name] = tensor.contiguous()
    return out


def a_folder(path, model: Wav2Vec2ForCTC | None = None, **changes):
    """A folder in the layout of facebook/wav2vec2-base-960h."""
    model = model or a_model()
    path.mkdir()
    model.config.save_pretrained(path)
    Wav2Vec2FeatureExtractor().save_pretrained(path)
    save_file(published(model) | changes, path / "model.safetensors", metadata={"format": "pt"})
    return path


# ---- whole clips


def test_the_published_size():
    with torch.device("meta"):
        model = Wav2Vec2Model(Wav2Vec2Config())
    assert sum(p.numel() for p in model.parameters()) == 94_371_712
    assert Wav2Vec(model, Wav2VecConfig(), N).dim == 10752


@pytest.mark.parametrize(("samples_per_frame", "samples"), [(640, 33 * 640), (1000, 33 * 1000 - 4321), (640, 40 * 640)])
def test_a_whole_clip_equals_the_equations(samples_per_frame, samples):
    """Traps 13 and 14: resampled before the transformer, silence after the sound and never a stretch, all states stacked."""
    model = a_model()
    encoder = Wav2Vec(model.wav2vec2, WINDOWS, samples_per_frame)
    sound = torch.stack([some_sound(samples, seed) + 0.1 for seed in (1, 2)])
    rows = encoder.whole(sound, 33)
    assert rows.shape == (2, 33, encoder.dim)
    expected = reference.audio_rows(published(model), sound, 33, samples_per_frame, HEADS)
    assert (rows - expected).abs().max() < 1e-5
    double = {name: tensor.double() for name, tensor in published(model).items()}
    encoder = Wav2Vec(model.double().wav2vec2, WINDOWS, samples_per_frame)
    expected = reference.audio_rows(double, sound.double(), 33, samples_per_frame, HEADS)
    assert (encoder.whole(sound, 33) - expected).abs().max() < 1e-11


@pytest.mark.parametrize(("frames", "windows"), [(21, 21), (22, 29), (23, 29), (29, 29), (30, 37)])
def test_a_clip_out_of_a_longer_sound_is_omniavatar_s_first_window(frames, windows):
    """Its inference pads the whole sound to whole windows (of 21 frames, 13 of them shared) and encodes it at once; a row of zeros
    stands before the first."""
    model = a_model()
    encoder = Wav2Vec(model.wav2vec2, replace(WINDOWS, prefix_frames=1), N)
    sound = some_sound((frames - 1) * N, 3)[None]
    expected = reference.audio_rows(published(model), sound, windows - 1, N, HEADS)[:, :20]
    rows = encoder.of_clip(sound, 21)
    assert not rows[:, 0].any()
    assert (rows[:, 1:] - expected).abs().max() < 1e-5


def test_the_stack_is_the_library_s_where_nothing_is_resampled():
    """420 samples a frame give three conv features for three frames. The last state comes first and once more at the end."""
    encoder, sound = an_encoder(samples_per_frame=420), some_sound(3 * 420)
    extractor = Wav2Vec2FeatureExtractor()
    values = extractor(sound.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    out = encoder.model(values, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    stacked = torch.cat([out.last_hidden_state, *out.hidden_states], dim=-1)[0]
    rows = encoder.whole(sound, 3)
    assert rows.shape == stacked.shape
    assert torch.allclose(rows, stacked, atol=1e-5)
    assert torch.equal(rows[:, :WIDTH], rows[:, -WIDTH:])
    assert not torch.allclose(rows[:, :WIDTH], rows[:, WIDTH : 2 * WIDTH], atol=0.1)


def test_the_audio_pack_of_a_clip_equals_the_equations():
    """Traps 13 and 15: the first row three times more in front, four rows a latent frame, one projection for each block from 2."""
    model, hidden, width = a_model(), 8, 16
    encoder = Wav2Vec(model.wav2vec2, WINDOWS, N)
    audio_pack = randomise(AudioPack(4 * encoder.dim, hidden), seed=1)
    projections = [randomise(torch.nn.Linear(hidden, width), seed=i) for i in (2, 3)]
    weights = {f"audio_proj.{name}": tensor for name, tensor in audio_pack.state_dict().items()}
    for i, projection in enumerate(projections):
        weights |= {f"audio_cond_projs.{i}.{name}": tensor for name, tensor in projection.state_dict().items()}
    sound = some_sound(13 * N)[None]
    expected = reference.audio_conditions(weights, reference.audio_rows(published(model), sound, 13, N, HEADS))
    packed = pack_rows(encoder.whole(sound, 13), 4)
    assert packed.shape == (1, 4, 4, encoder.dim)
    assert all(torch.equal(packed[:, 0, i], packed[:, 0, 3]) for i in range(3))
    with torch.no_grad():
        context = audio_pack(packed)
        for projection, added in zip(projections, expected, strict=True):
            assert (projection(context) - added).abs().max() < 1e-5


def test_the_reference_frame_may_have_a_row_of_zeros():
    encoder, sound = an_encoder(), some_sound(12 * N)
    rows = encoder.whole(sound, 13, prefix=1)
    assert not rows[0].any()
    assert torch.equal(rows[1:], encoder.whole(sound, 12))


def test_silence_is_encoded_and_is_not_zeros():
    """Trap 9: rows of zeros are no recording, and silence gives other rows."""
    encoder = an_encoder()
    silent = encoder.whole(torch.zeros(13 * N), 13)
    assert silent.abs().mean() > 0.1
    assert not torch.allclose(silent, encoder.whole(some_sound(13 * N), 13), atol=0.1)


def test_loudness_and_offset_of_the_clip_do_not_matter():
    encoder, sound = an_encoder(), some_sound(13 * N)
    assert torch.allclose(encoder.whole(0.25 * sound + 0.1, 13), encoder.whole(sound, 13), atol=1e-3)
    plain = Wav2Vec(encoder.model, encoder.config, N, normalise=False)
    assert torch.equal(plain.whole(reference.standardise(sound[None])[0], 13), encoder.whole(sound, 13))


# ---- streams

GRIDS = [
    WINDOWS,
    Wav2VecConfig(lookback_frames=5, lookahead_frames=0, grid_frames=1, grid_start=0),
    Wav2VecConfig(lookback_frames=9, lookahead_frames=3, grid_frames=12),
]


RATES = pytest.mark.parametrize("samples_per_frame", [640, 1000], ids=["25 fps", "16 fps"])
CELLS = pytest.mark.parametrize("config", GRIDS, ids=lambda config: f"cells of {config.grid_frames}")


@RATES
@CELLS
def test_any_split_gives_the_same_bits(config, samples_per_frame):
    """Trap 16: rows see a bounded window on a fixed grid."""
    encoder, sound = an_encoder(config, samples_per_frame), some_sound(30 * samples_per_frame + 77)
    together = encoder(sound)
    assert together.shape == (31, encoder.dim)
    generator = rng(3)
    for _ in range(3):
        cuts = [0, *sorted(torch.randperm(30, generator=generator)[:4].add(1).tolist()), 31]
        parts = [encoder(sound, a, b) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), together), cuts


@RATES
@CELLS
def test_rows_see_their_own_window_and_no_other_sample(config, samples_per_frame):
    encoder, sound = an_encoder(config, samples_per_frame), some_sound(60 * samples_per_frame)
    first = config.grid_start + 2 * config.grid_frames + 12
    last = first + config.grid_frames
    rows = encoder(sound, first, last)
    begin, end = first * samples_per_frame - encoder.lookback, last * samples_per_frame + encoder.lookahead
    soonest = (first - config.lookback_frames) * samples_per_frame  # at 16 fps a window may begin up to 7 frames before
    assert begin == soonest - (7000 if samples_per_frame == 1000 else 0)
    for inside, outside in [(soonest + 3, begin - 1), (end - 3, end)]:
        changed = sound.clone()
        changed[outside] += 0.5
        assert torch.equal(encoder(changed, first, last), rows)
        changed[inside] += 0.5
        assert not torch.equal(encoder(changed, first, last), rows)


def test_a_session_s_windows_give_the_rows_of_the_clip():
    """Chunks of three latent frames: 9 pixel frames, then 12; each call gets its own samples alone, zeros outside the clip."""
    encoder, sound = an_encoder(), some_sound(33 * N)
    whole = encoder(sound, 0, 33)
    padded = torch.nn.functional.pad(sound, (encoder.lookback, encoder.lookahead))
    for first, last in [(0, 9), (9, 21), (21, 33)]:
        window = padded[first * N : last * N + encoder.lookback + encoder.lookahead]
        assert torch.equal(encoder.rows(window, first, last), whole[first:last])


def test_cells_that_do_not_fit_the_chunks_are_refused():
    encoder = an_encoder()
    for first, last in [(0, 8), (3, 9)]:
        window = torch.zeros(encoder.lookback + (last - first) * N + encoder.lookahead)
        with pytest.raises(UserError, match=f"frames {first}..{last - 1} are not whole cells of grid_frames=4"):
            encoder.rows(window, first, last)


def test_a_window_that_holds_the_clip_gives_the_whole_clip():
    encoder = an_encoder(Wav2VecConfig(lookback_frames=0, lookahead_frames=0, grid_frames=13, grid_start=0))
    sound = some_sound(13 * N)
    assert torch.equal(encoder(sound), encoder.whole(sound, 13))


def test_rows_stand_where_those_of_the_whole_clip_stand():
    """On features that are their own numbers: the published rule drifts over a clip, a stream keeps to its middle."""
    for samples_per_frame, most in [(640, 1e-4), (1000, 0.25)]:
        encoder = an_encoder(samples_per_frame=samples_per_frame)
        for num_frames in range(101, 117, 2):
            count = (num_frames * samples_per_frame - 400) // 320 + 1
            features = torch.arange(count).float().expand(1, 1, -1)
            whole = torch.nn.functional.interpolate(features, size=num_frames, mode="linear", align_corners=True)
            streamed = encoder._at_frames(features, num_frames)
            middle = num_frames // 2
            assert (streamed - whole)[0, 0, middle].abs() < most
            assert torch.allclose(streamed[0, 0, 1:-1].diff(), torch.tensor(samples_per_frame / 320), atol=1e-3)


def test_a_window_begins_on_the_clip_s_own_grid_of_features():
    """At 16 fps windows that began at any frame would encode noise as another noise: 1.4, like any other row of the clip."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wav2Vec2Model(Wav2Vec2Config(**SMALL)).eval().requires_grad_(False)
    encoder, sound = Wav2Vec(model, Wav2VecConfig(lookback_frames=24), 1000), some_sound(101 * 1000)
    whole = encoder.whole(sound, 101)
    distance = (encoder(sound, 45, 61) - whole[45:61]).norm(dim=-1) / (whole - whole.mean(dim=0)).norm(dim=-1)[45:61]
    assert distance.mean() < 0.7


def test_nothing_before_the_sound_and_silence_after_it():
    encoder, sound = an_encoder(), some_sound(9 * N)
    longer = torch.cat([sound, torch.zeros(20 * N)])
    assert torch.equal(encoder(longer, 5, 20), encoder(sound, 5, 20))
    for first, last in [(-1, 3), (4, 4)]:
        with pytest.raises(ValueError, match=r"need 0 <= first < last"):
            encoder(sound, first, last)


def test_clips_of_a_batch_do_not_mix():
    encoder = an_encoder()
    sounds = torch.stack([some_sound(13 * N, seed) for seed in range(4)]).unflatten(0, (2, 2))
    for encode in (encoder, lambda sound: encoder.whole(sound, 13)):
        together = encode(sounds)
        assert together.shape == (2, 2, 13, encoder.dim)
        assert torch.allclose(together[1, 0], encode(sounds[1, 0]), atol=1e-5)


def test_the_deviation_from_whole_is_tabled_and_falls_with_the_look_ahead():
    encoder = an_encoder(Wav2VecConfig(lookback_frames=64))
    sound = some_sound(64 * N)
    table = deviation_table(encoder, sound, lookaheads=(0, 4, 8))
    print(f"\n{table}")
    header, line, *rows = table.splitlines()
    assert header.startswith("| look-ahead | relative L2: mean")
    assert line == "|---|---|---|---|---|---|"
    assert [row.split("|")[1].strip() for row in rows] == [
        "0 frames, 0 ms",
        "4 frames, 160 ms",
        "8 frames, 320 ms",
        "(another row)",
    ]
    numbers = [[float(number) for number in row.split("|")[2:7]] for row in rows]
    means, worst, cosines, lowest, spread = zip(*numbers, strict=True)
    assert means[0] > means[1] > means[2]
    assert means[3] > means[0]
    assert spread[3] > 1 > spread[2]
    assert cosines[0] < cosines[1] < cosines[2] <= 1
    assert all(w >= m for w, m in zip(worst, means, strict=True))
    assert all(c <= m for c, m in zip(lowest, cosines, strict=True))


def test_windows_and_frame_rates_that_cannot_be():
    with pytest.raises(UserError, match=r"got lookback_frames=-1, lookahead_frames=4, grid_frames=4"):
        Wav2VecConfig(lookback_frames=-1)
    with pytest.raises(UserError, match=r"grid_frames=0"):
        Wav2VecConfig(grid_frames=0)
    with pytest.raises(
        UserError, match=r"a frame of 320 samples is shorter than wav2vec2's 400; take at most 40 frames"
    ):
        an_encoder(samples_per_frame=320)


def test_a_clip_for_bidirectional_networks_is_the_published_whole_clip():
    """Through the data stage's encoders: the pool's rows for teacher and fake score are `whole`, with the zero row where asked."""
    sound = randn(2, 9 * N, seed=3)
    for config in (WINDOWS, replace(WINDOWS, prefix_frames=1), replace(WINDOWS, whole_clip=False)):
        audio_encoder = an_encoder(config)
        encoders = ConditionEncoders(
            codec=SimpleNamespace(config=SimpleNamespace(stride=4)),
            audio_encoder=audio_encoder,
            text=lambda t: torch.zeros(len(t), 1, 1),
        )
        given = encoders.conditions(sound, ["a", "b"], torch.zeros(2, 1, 1, 1, 1), 9)
        if not config.whole_clip:
            assert given.clip_audio is None
            continue
        windows = audio_encoder.of_clip(sound, 9)  # the prefix moves the last frame into a second window
        expected = pack_rows(windows if config.prefix_frames else audio_encoder.whole(sound, 9), 4)
        assert torch.equal(given.clip_audio, expected)
        assert given.clip_audio.shape == given.audio.shape
        assert not torch.equal(given.clip_audio, given.audio)
        assert bool(given.clip_audio[:, 0].any()) == (config.prefix_frames == 0)

"""Audio and text encoders: bounded windows, streaming equals whole, padding is silent, a saved encoder is the same encoder."""

import pytest
import torch

from distill.data.stored import packed_texts
from teachers.encoders.small import AudioConfig, LogMel, NoTextConfig, save_model
from tests.support.tiny import TEXT, TOKENS, make_spec, some_sound, text_encoder

N = 1280


def audio_encoder() -> LogMel:
    return LogMel(AudioConfig(num_mels=20, hop=320, window=512), N)


def test_a_row_sees_its_frame_and_the_margin_alone():
    log_mel, sound = audio_encoder(), some_sound(10 * N)
    rows = log_mel(sound)
    assert rows.shape == (10, log_mel.dim) == (10, 80)
    edge = 5 * N
    for offset, reaches in [
        (-log_mel.lookahead - 3, {4}),
        (-log_mel.lookahead + 5, {4, 5}),
        (log_mel.lookback - 3, {4, 5}),
    ]:
        changed = sound.clone()
        changed[edge + offset] += 0.5
        moved = (log_mel(changed) != rows).any(dim=1).nonzero().flatten().tolist()
        assert set(moved) == reaches, offset


def test_a_window_of_the_clip_gives_the_rows_of_the_whole():
    log_mel, sound = audio_encoder(), some_sound(12 * N)
    whole = log_mel(sound[None])
    for first, last in [(0, 1), (0, 5), (3, 7), (11, 12)]:
        assert torch.allclose(log_mel(sound[None], first, last), whole[:, first:last], atol=1e-5)
    window = sound[3 * N - log_mel.lookback : 7 * N + log_mel.lookahead]
    assert torch.allclose(log_mel.rows(window, 3, 7), whole[0, 3:7], atol=1e-5)


def test_outside_the_clip_is_silence():
    log_mel = audio_encoder()
    silent = log_mel(torch.zeros(N), 0, 1)[0]
    assert torch.allclose(log_mel(some_sound(2 * N), 4, 6), silent.expand(2, -1))
    assert torch.allclose(log_mel(some_sound(2 * N), -3, -1), silent.expand(2, -1))


def test_a_hop_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="320 does not divide 1000"):
        LogMel(AudioConfig(), 1000)


def test_louder_is_more_and_pitch_is_seen():
    log_mel = audio_encoder()
    time = torch.arange(4 * N) / 16000
    low, high = (0.2 * torch.sin(2 * torch.pi * hz * time) for hz in (200.0, 3000.0))
    assert (log_mel(2 * low)[1:3] >= log_mel(low)[1:3]).all()
    bands = log_mel(low).unflatten(1, (4, 20))[1:3].mean((0, 1)), log_mel(high).unflatten(1, (4, 20))[1:3].mean((0, 1))
    assert bands[0].argmax() < bands[1].argmax()


def test_text_features_have_silent_padding():
    encoder = text_encoder()
    texts = ["nods", "a person nods and someone smiles for a long time", ""]
    features = encoder(texts)
    _, mask = encoder.tokens(texts)
    assert features.shape == (3, TOKENS, TEXT)
    assert not features[mask == 0].any()
    assert features[0].any()
    assert not torch.equal(features[0], features[1])
    assert torch.allclose(encoder(["nods"])[0], features[0], atol=1e-6), "a text depends on its neighbours in the batch"
    assert torch.isfinite(encoder(["\N{GRINNING FACE} zażółć " + "x" * 500])).all()


def test_a_saved_encoder_is_the_same(tmp_path, capfd):
    encoder = text_encoder()
    encoder.save(tmp_path / "text")
    again = make_spec().text.load(tmp_path)
    assert "Loading weights" not in capfd.readouterr().err
    assert torch.equal(again(["a person nods"]), encoder(["a person nods"]))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_saved_encoder_has_the_files_of_save_pretrained(tmp_path):
    model = text_encoder().model
    save_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_no_text_is_one_token_of_no_numbers(tmp_path):
    """As stored and given to a batch; whatever is said, nothing is read."""
    encoder = NoTextConfig().load(tmp_path)
    features = encoder(["a person nods", ""])
    assert features.shape == (2, NoTextConfig.max_tokens, NoTextConfig.dim) == (2, 1, 0)
    assert encoder.count("a person nods") == 0
    assert not encoder.state_dict()
    assert packed_texts(list(features), torch.float32)["ends"].tolist() == [0, 0]

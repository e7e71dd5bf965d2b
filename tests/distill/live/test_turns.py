"""Talkers, voices and the end of a spoken turn."""

import json
import threading
import time
from fractions import Fraction

import pytest
import torch

from distill.live import turns, voice
from distill.live.talkers import BUILT_IN, Echo, Omni, TextToSpeech, Voice, load_talker
from distill.live.turns import AT_FIRST, NETWORK, Endpointer, Playhead, Turn
from teachers.errors import UserError
from tests.support.live.serving import eventually

RATE = 16000


def whole(pieces) -> torch.Tensor:
    return torch.cat([piece for piece in pieces if isinstance(piece, torch.Tensor)])


def test_the_way_to_the_viewer_is_the_least_that_a_rewind_and_the_next_report_took():
    playhead = Playhead(Fraction(25, 2))
    playhead.update(0, 0.5)  # of nothing that was asked
    assert playhead.trip == AT_FIRST
    for asked, answered in ((1.0, 1.3), (2.0, 2.15), (3.0, 3.2)):
        playhead.ask(asked - 0.5)  # a rewind that another one follows
        playhead.ask(asked)
        playhead.update(10, answered)
        playhead.update(11, answered + 0.3)
    assert playhead.trip == pytest.approx(0.15)
    for _ in range(8):
        playhead.ask(4.0)
        playhead.update(12, 4.001)
    assert playhead.trip == NETWORK
    assert Playhead(Fraction(25, 2), lambda: 7).trip == 0.0


def test_a_player_in_this_process_is_where_it_says():
    shown, playhead = [5], Playhead(Fraction(25, 2))
    playhead.update(4, 1.0)
    assert playhead.place(1.2, 100) == pytest.approx(6.5)
    assert playhead.place(9.0, 20) == 20
    playhead.local = lambda: shown[0]
    assert playhead.place(9.0, 100) == 5
    shown[0] = 30
    assert playhead.place(9.0, 20) == 20


def test_the_endpointer_finds_a_turn_in_noise_however_it_is_cut():
    noise = 0.002 * torch.randn(4 * RATE, generator=torch.Generator().manual_seed(0))
    said = 0.2 * torch.sin(torch.arange(RATE) * 0.2)
    sound = noise.clone()
    sound[RATE : 2 * RATE] += said
    found = []
    for size in (137, 640, 5000):
        endpointer = Endpointer()
        found.append([x for piece in sound.split(size) for x in endpointer.feed(piece)])
        assert [type(x) for x in found[-1]] == [str, torch.Tensor]
    assert all(torch.equal(other[1], found[0][1]) for other in found)
    assert 1.0 * RATE <= len(found[0][1]) <= 1.5 * RATE


def test_clicks_and_a_louder_room_are_no_turn():
    endpointer = Endpointer()
    room = 0.003 * torch.randn(6 * RATE, generator=torch.Generator().manual_seed(1))
    room[2 * RATE : 2 * RATE + 400] += 0.5  # a click of 25 ms
    room[4 * RATE :] *= 2
    assert endpointer.feed(room) == []


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_voice_of_soft_syllables_is_a_turn(noise):
    """The noise floor must not rise with a voice that begins softly."""
    said = torch.cat([torch.zeros(RATE), *voice.formant_voice("hello mama papa"), torch.zeros(2 * RATE)])
    rustle = noise * torch.randn(len(said), generator=torch.Generator().manual_seed(0))
    found = Endpointer().feed(0.3 * said + rustle)
    assert found[0] == "begin"
    assert len(found) == 2


def test_a_turn_without_end_is_cut_after_30_seconds():
    found = Endpointer().feed(torch.cat([torch.zeros(RATE), 0.3 * torch.ones(31 * RATE)]))
    assert len(found[1]) == pytest.approx(30 * RATE, abs=RATE)


def test_the_formant_voice_says_vowels_with_their_formants_and_is_quiet_at_commas():
    sound = whole(voice.formant_voice("aaa"))
    power = torch.fft.rfft(sound[1600:3200] * torch.hann_window(1600)).abs()
    peak = {
        name: float(power[int(low / 10) : int(high / 10)].max())
        for name, low, high in (("a", 600, 1300), ("hiss", 4500, 5500))
    }
    assert peak["a"] > 20 * peak["hiss"]
    assert sound.abs().max() <= 1
    pause = whole(voice.formant_voice("mama, mama"))
    levels = pause.split(160)
    quiet = [float(level.abs().max()) < 1e-3 for level in levels]
    inside = quiet[quiet.index(False) : len(quiet) - quiet[::-1].index(False)]
    assert sum(inside) > 8, "no pause at the comma"
    assert voice.syllables("4") == voice.syllables("four")
    assert list(voice.formant_voice("...")) == []


def test_a_long_text_is_spoken_piece_by_piece():
    began = time.thread_time()
    first = next(voice.formant_voice("many words " * 60))
    assert 0 < len(first) <= RATE // 10
    assert time.thread_time() - began < 2.0


@pytest.mark.skipif(not voice.has_espeak(), reason="espeak-ng is not installed; the formant voice takes its place")
def test_espeak_speaks_at_16_khz_from_the_first_sound_and_takes_no_options_from_the_text():
    sound = whole(voice.espeak_voice("Hello there, how are you?"))
    assert 0.8 * RATE < len(sound) < 3 * RATE
    assert sound[:160].abs().max() > 0.005
    assert len(whole(voice.espeak_voice("--version"))) > 0.3 * RATE


def test_talkers_are_found_by_name_or_folder_and_anything_else_is_refused(tmp_path):
    assert load_talker("formant").name == "formant"
    assert load_talker("auto").name in BUILT_IN
    with pytest.raises(UserError, match="none of auto"):
        load_talker("nobody")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="bert"):
        load_talker(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_talker(str(tmp_path))


def test_echo_and_voice_give_sound_back():
    received = torch.rand(5000)
    for talker in (Echo(), Voice("formant")):
        assert torch.equal(whole(talker.conversation().turn(received)), received)
    beeps = whole(Echo().turn("two words"))
    assert len(beeps) == 4 * RATE // 5


def test_a_local_vits_model_speaks(tmp_path):
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps({letter: i for i, letter in enumerate("_ abcdefghijklmnopqrstuvwxyz'<")}))
    tokenizer = VitsTokenizer(str(vocab), pad_token="_", unk_token="<", phonemize=False, language="eng")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "flow_size": 16}
    wide = {
        "spectrogram_bins": 33,
        "upsample_initial_channel": 64,
        "wavenet_dilation_rate": 1,
        "prior_encoder_num_flows": 1,
    }
    depth = {
        "prior_encoder_num_wavenet_layers": 1,
        "posterior_encoder_num_wavenet_layers": 1,
        "duration_predictor_num_flows": 1,
    }
    model = VitsModel(VitsConfig(vocab_size=30, **small, **wide, **depth))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    talker = load_talker(str(tmp_path))
    assert isinstance(talker, TextToSpeech)
    sound = whole(talker.conversation().turn("hello there. how are you"))
    assert sound.ndim == 1
    assert len(sound) > 100
    assert torch.isfinite(sound).all()


def a_tiny_omni():
    """Qwen2.5-Omni's thinker, talker and vocoder with random weights, and one speaker."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    size = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    ids = {"audio_token_index": 260, "image_token_index": 261, "video_token_index": 262, "audio_start_token_id": 263}
    ids |= {"audio_end_token_id": 264, "vision_start_token_id": 269, "vision_end_token_id": 270}
    audio_encoder = {
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 32,
        "output_dim": 32,
    }
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    text = {**size, "vocab_size": 300, "rope_parameters": rope}
    thinker = {
        "text_config": text,
        "audio_config": audio_encoder,
        "vision_config": {**eyes, "fullatt_block_indexes": [0]},
        **ids,
    }
    marks = {"tts_text_start_token_id": 266, "tts_text_end_token_id": 267, "tts_text_pad_token_id": 268}
    marks |= {"tts_codec_start_token_id": 110, "tts_codec_end_token_id": 111, "tts_codec_pad_token_id": 112}
    talker = {**size, **ids, **marks, "vocab_size": 120, "embedding_size": 32, "head_dim": 16, "rope_parameters": rope}
    dit = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ff_mult": 1,
        "emb_dim": 16,
        "head_dim": 16,
    }
    dit |= {"num_embeds": 121, "look_ahead_layers": [0], "look_backward_layers": [1], "enc_emb_dim": 16, "enc_dim": 16}
    dit |= {"enc_channels": [16, 16, 16, 16, 48], "enc_attention_channels": 8, "enc_se_channels": 8}
    vocoder = {"dit_config": dit, "bigvgan_config": {"upsample_initial_channel": 64}}
    config = Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker, token2wav_config=vocoder)
    model = Qwen2_5OmniForConditionalGeneration(config).eval()
    model.speaker_map = {"Chelsie": {"bos_token": 110, "cond": torch.randn(1, 16), "ref_mel": torch.randn(1, 20, 80)}}
    return model


class Letters:
    """In the place of the model's processor: a token a letter, and what it was asked."""

    def __init__(self):
        self.said = []

    def apply_chat_template(self, said, add_generation_prompt, tokenize):
        self.said.append(said)
        return " ".join(part["text"] for message in said for part in message["content"])

    def __call__(self, text, audio, return_tensors, padding):
        from transformers import BatchFeature

        ids = torch.tensor([[ord(letter) % 250 for letter in text]])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch_decode(self, ids, skip_special_tokens):
        return ["answer"]


def test_a_qwen_omni_model_answers_and_remembers():
    torch.manual_seed(0)  # its weights and what it draws
    letters = Letters()
    options = {"thinker_max_new_tokens": 4, "talker_max_new_tokens": 12, "talker_eos_token_id": [111, 112]}
    conversation = Omni("tiny", a_tiny_omni(), letters, options).conversation()
    sound = whole(conversation.turn("hello"))
    assert len(sound) > 1000
    assert sound.abs().max() <= 1
    assert torch.isfinite(sound).all()
    whole(conversation.turn("and you?"))
    given = [(message["role"], message["content"][0]["text"]) for message in letters.said[1]]
    assert given == [("user", "hello"), ("assistant", "answer"), ("user", "and you?")]


def test_a_talker_waits_when_it_is_far_ahead_and_stops_when_it_is_cancelled(monkeypatch):
    monkeypatch.setattr(turns, "MAX_HELD", 1600)
    made = []

    def endless():
        while True:
            made.append(1)
            yield torch.zeros(800)

    turn = Turn(1, 0.0)
    thread = threading.Thread(target=turn.fill, args=(endless, lambda: None))
    thread.start()
    eventually(lambda: turn.held > 1600, 20)
    count = len(made)
    time.sleep(0.2)
    assert len(made) <= count + 1
    turn.cancel()
    thread.join(20)
    assert turn.finished
    assert turn.failed == ""


def test_a_talker_that_fails_ends_its_turn_alone():
    def broken():
        yield torch.zeros(10)
        raise RuntimeError("no voice")

    turn = Turn(1, 0.0)
    turn.fill(broken, lambda: None)
    assert turn.finished
    assert "no voice" in turn.failed
    assert turn.held == 10

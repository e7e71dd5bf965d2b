"""Models of local folders: a Llama and a Whisper of random weights."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from distill.live.answering import local
from distill.live.answering.local import LocalChat, LocalTranscriber
from teachers.errors import UserError

WORDS = ("<pad>", "<eos>", "<unk>", "user", "assistant", *(f"word{i}" for i in range(40)))
TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}assistant"
SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def a_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save_chat(folder, template: str | None = TEMPLATE):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None, **SIZE)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = a_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_chat_model_answers_in_pieces_and_stops_where_nobody_listens(tmp_path, monkeypatch):
    chat = LocalChat.load(save_chat(tmp_path / "chat"))
    assert chat.name == "chat"
    said = [{"role": "user", "content": "word1 word2"}]
    monkeypatch.setattr(local, "MAX_NEW_TOKENS", 12)
    pieces = list(chat.answer(said))
    assert len(pieces) > 3
    assert set("".join(pieces).split()) <= set(WORDS)
    monkeypatch.setattr(local, "MAX_NEW_TOKENS", 10**6)
    chat.model.generation_config.eos_token_id = None
    answer = chat.answer(said)
    next(answer)
    answer.close()
    assert not any(thread.name == "chat model" for thread in threading.enumerate())
    chat.model.generate = None
    with pytest.raises(UserError, match=r"the chat model failed \(TypeError"):
        list(chat.answer(said))
    with pytest.raises(UserError, match="no chat template"):
        LocalChat.load(save_chat(tmp_path / "base", None))


def test_a_local_whisper_gives_words(tmp_path, monkeypatch):
    torch.manual_seed(0)
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    width = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 50}
    ids = {
        "vocab_size": len(WORDS),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "decoder_start_token_id": 3,
    }
    WhisperForConditionalGeneration(WhisperConfig(**depth, **width, **ids)).save_pretrained(tmp_path)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), a_tokenizer()).save_pretrained(tmp_path)
    monkeypatch.setattr(local, "MAX_NEW_TOKENS", 6)
    words = LocalTranscriber.load(tmp_path).transcribe(0.1 * torch.randn(8000))
    assert set(words.split()) <= set(WORDS)

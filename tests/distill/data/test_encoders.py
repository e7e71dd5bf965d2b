"""Clips that are encoded and decoded a few at a time."""

from typing import Any

import torch

from distill.data.encoders import ConditionEncoders
from teachers.codecs.convolutional import ConvCodec, ConvCodecConfig
from teachers.codecs.linear import to_float, to_uint8
from teachers.encoders.small import AudioConfig, LogMel


def some_encoders() -> ConditionEncoders:
    text: Any = None  # none is asked
    torch.manual_seed(0)
    codec = ConvCodec(ConvCodecConfig(stride=2, patch=8, channels=4, widths=(8, 16), blocks=(1, 1), train=None)).eval()
    return ConditionEncoders(codec=codec, audio_encoder=LogMel(AudioConfig(), 1280), text=text)


def test_a_few_at_a_time_are_what_all_at_once_are(monkeypatch):
    encoders, clips = some_encoders(), torch.randint(0, 256, (5, 3, 5, 16, 24), dtype=torch.uint8)
    seen: list[int] = []
    encode, decode = encoders.codec.encode, encoders.codec.decode
    monkeypatch.setattr(encoders.codec, "encode", lambda video: (seen.append(len(video)), encode(video))[1])
    monkeypatch.setattr(encoders.codec, "decode", lambda latents: (seen.append(len(latents)), decode(latents))[1])
    monkeypatch.setattr("teachers.machine.CPU_PIXELS_AT_ONCE", 2 * 5 * 16 * 24)
    latents = encoders.encode(clips)
    frames = encoders.decode(latents)
    assert seen == [2, 2, 1] * 2
    with torch.no_grad():
        whole = encode(to_float(clips))
        torch.testing.assert_close(latents, whole)
        assert (frames.int() - to_uint8(decode(whole)).int()).abs().max() <= 1

"""`distill sample --teacher --clips`: Wan2.2-S2V draws each clip behind the film before, which it reads as its motion."""

from dataclasses import replace

import pytest
import torch

from distill.cli import main
from distill.commands.sample.teacher import film
from distill.data.encoders import ConditionEncoders
from distill.recipe import SamplerConfig
from teachers.codecs.linear import EigenCodec, to_float
from teachers.encoders.small import AudioConfig
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher
from teachers.teacher import Teacher
from tests.students.networks.test_causal_s2v import N, a_spec
from tests.support.networks.s2v import CHANNELS, HEIGHT, STRIDE, WIDTH, an_s2v_net, s2v_conditions, some_rows
from tests.support.tiny import randn, text_encoder

SIZE, CLIPS = (HEIGHT * 4, WIDTH * 4), 3
SETTINGS = SamplerConfig(num_steps=2, shift=3.0, grid="unipc")


class Watched(AvatarTeacher):
    """The teacher, which keeps the anchors and the sound that it was given."""

    def denoise(self, x, sigma, conditions):
        self.__dict__.setdefault("seen", []).append((conditions.anchors, conditions.audio))
        return super().denoise(x, sigma, conditions)


class Codec(EigenCodec):
    """The codec, which keeps what it decoded."""

    def decode(self, latents):
        self.__dict__.setdefault("decoded", []).append(latents)
        return super().decode(latents)


def drawn(clips: int):
    spec = replace(a_spec(), horizon_frames=N)
    codec = Codec(spec.codec, *SIZE).fit(0.3 * randn(32, 3, 9, *SIZE, seed=5))
    sound = AudioConfig(num_mels=3, hop=200, window=200).load(1000)
    given = s2v_conditions(some_rows(1, N * CLIPS)).frames(0, N * clips)
    lead = codec.encode((0.3 * randn(1, 3, 1, *SIZE, seed=17)).clamp(-1, 1))
    encoders = ConditionEncoders(codec, sound, text_encoder(), False, lead=1)
    teacher = Watched(an_s2v_net())
    with torch.inference_mode():
        video = film(Teacher(teacher), encoders, replace(given, lead=lead), spec, SETTINGS, clips, 0)
    return video, teacher.seen, codec, given, lead


def test_each_clip_reads_the_film_before_it_as_its_motion():
    """4 F frames a clip behind the portrait's; anchors are the reference and the latents of the last 73 frames of the film, grey in
    front, behind which the clip is decoded; the first clip has none, and is what one clip is; a clip's sound is its own."""
    video, seen, codec, given, lead = drawn(CLIPS)
    one = drawn(1)[0]
    assert video.shape[2] == 1 + STRIDE * N * CLIPS
    assert torch.equal(video[:, :, : one.shape[2]], one)
    assert len(seen) == 2 * CLIPS
    for clip in range(CLIPS):
        (anchors, audio), decoded = seen[2 * clip], codec.decoded[clip]
        assert torch.equal(audio, given.audio[:, clip * N : clip * N + N])
        assert torch.equal(anchors[:, :, :1], given.anchors)
        if not clip:
            assert anchors.shape[2] == 1
            assert torch.equal(decoded[:, :, :1], lead)
            continue
        before = to_float(video[:, :, : 1 + STRIDE * N * clip])
        grey = torch.zeros(1, 3, 73 - before.shape[2], *SIZE)
        assert torch.equal(anchors[:, :, 1:], codec.encode(torch.cat([grey, before], dim=2)))
        assert anchors.shape[2] == 20
        assert torch.equal(decoded[:, :, :19], anchors[:, :, 1:])


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    words = ["sample", "--teacher", "echomimic", "teacher.path=anywhere", "--image", "a.png", "--audio", "a.wav"]
    words += ["--text", "a", "--out", str(tmp_path / "never.mp4")]
    assert main([*words, "--clips", "2"]) == 2
    assert "--clips 2: EchoMimicConfig does not read the film before a clip; remove it" in capsys.readouterr().err
    assert main([*words, "--clips", "0"]) == 2
    assert "--clips 0: a count from 1, of --teacher alone" in capsys.readouterr().err
    kind = an_s2v_net().kind
    with pytest.raises(UserError, match=r"\[4, 8\] latent rows and columns with motion; give multiples of 8"):
        kind.behind(s2v_conditions(some_rows(1, N)), torch.zeros(1, CHANNELS, 19, 4, 8))

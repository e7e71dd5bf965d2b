"""A student on a GPU has everything there, and no chunk waits for it but for its frames: proven on fake CUDA tensors."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import Wav2Vec2Config, Wav2Vec2Model

from students.history import History
from students.networks.windowed import WindowedConfig
from students.schedule import Schedule
from students.serving import inputs, overlap, session
from students.serving.optimize import Speed, prepare
from students.serving.pipeline import AvatarPipeline
from students.serving.session import Session
from students.weights.checkpoint import Bundle, make_student
from teachers.codecs import wan_vae
from teachers.codecs.linear import CodecConfig, EigenCodec
from teachers.codecs.taehv import TAEHV
from teachers.encoders.small import TextEncoder
from teachers.encoders.wav2vec import Wav2Vec, Wav2VecConfig
from tests.students.test_every_student import STUDENTS
from tests.support.sizes.fake_cuda import fake_cuda
from tests.support.tiny import make_spec

WINDOWED = {"network": WindowedConfig(network=make_spec().network)}
KINDS = {**STUDENTS, "windowed": (History(sinks=1, window=2), Schedule(), WINDOWED)}
NUM_CHUNKS = 3
WIDTH, PUBLISHED = 16, CodecConfig(stride=4, patch=8, channels=16)
AUDIO = Wav2VecConfig(features=4 * WIDTH, lookback_frames=8, lookahead_frames=2)
CODECS = {
    "wan_vae": lambda: wan_vae.WanVAE(AutoencoderKLWan(base_dim=4, num_res_blocks=1)),
    "taehv": lambda: TAEHV((16, 8, 8, 8), 8),
}


@pytest.fixture
def gpu(monkeypatch):
    """Its tensors have no values, so that input is not looked at."""
    monkeypatch.setattr(inputs, "checked_sound", lambda spec, audio, other, rate: audio)
    monkeypatch.setattr(inputs, "check_pose", lambda spec, pose: None)
    monkeypatch.setattr(session, "check_reference", lambda spec, reference: None)
    wan_vae._row.cache_clear()
    with fake_cuda() as gpu:
        yield gpu
    wan_vae._row.cache_clear()


def a_bundle(history: History, schedule: Schedule, changes: dict | None = None) -> Bundle:
    """A student with the embedded codec and encoders."""
    spec = make_spec(history, schedule=schedule, **{"pose_dim": 2, **(changes or {})})
    return around(spec, EigenCodec(spec.codec, spec.height, spec.width), spec.audio.load(spec.samples_per_frame))


def around(spec, codec, audio_encoder) -> Bundle:
    text = TextEncoder.build(spec.text, ["a person nods"]).eval().requires_grad_(False)
    return Bundle(make_student(spec).eval().requires_grad_(False), codec, audio_encoder, text)


def stream(bundle: Bundle, gpu) -> list:
    """Chunks of a stream of voice and pose; what was waited for before the first one is forgotten."""
    spec = bundle.spec
    session = Session(bundle, torch.zeros(3, spec.height, spec.width), "a person nods", lead=2)
    gpu.waits.clear()
    gpu.copies.clear()
    num_frames = spec.pixel_frames(NUM_CHUNKS + spec.schedule.ahead)[1]
    samples, chunks = num_frames * spec.samples_per_frame, []
    if spec.pose_dim:
        session.push(pose=torch.zeros(num_frames, spec.pose_dim))
    for start in range(0, samples, 5000):
        session.push(audio=torch.zeros(min(5000, samples - start)))
        for chunk in session.frames():
            session.played(session.point.frame)
            chunks.append(chunk)
    session.settle()
    for chunk in chunks:
        assert chunk.frames.device.type == chunk.audio.device.type == "cpu"
        assert chunk.frames.shape[1:] == (spec.height, spec.width, 3)
    return chunks


def waits_for_frames_alone(chunks: list, gpu) -> None:
    """One wait a chunk, for the stream on which its frames are decoded and copied to the host; no copy is waited for."""
    assert len(chunks) >= NUM_CHUNKS
    lines = Path(overlap.__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (i for i, line in enumerate(lines, start=1) if line.strip() == "self.side.synchronize()")
    assert gpu.waits == {f"students/serving/overlap.py:{number}": len(chunks)}
    assert gpu.copies == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_student_streams_on_a_gpu(gpu, kind):
    bundle = prepare(a_bundle(*KINDS[kind]), "cuda", Speed(dtype="bf16"))
    waits_for_frames_alone(stream(bundle, gpu), gpu)


@pytest.mark.slow
@pytest.mark.parametrize("codec", list(CODECS))
def test_so_do_published_codecs_and_audio_encoders(gpu, codec):
    spec = make_spec(History(sinks=1, window=2), height=32, width=32, codec=PUBLISHED, audio=AUDIO)
    shape = Wav2Vec2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    encoder = Wav2Vec(Wav2Vec2Model(shape).eval().requires_grad_(False), AUDIO, spec.samples_per_frame)
    bundle = prepare(around(spec, CODECS[codec](), encoder), "cuda", Speed(dtype="bf16"))
    stream(bundle, gpu)  # places among features are read once
    waits_for_frames_alone(stream(bundle, gpu), gpu)


def test_a_part_that_stays_behind_is_an_error(gpu):
    for name in ("codec", "audio_encoder"):
        bundle = prepare(a_bundle(*KINDS["sequential"]), "cuda", Speed())
        getattr(bundle, name).to("cpu")
        with pytest.raises(RuntimeError, match=r"device"):
            stream(bundle, gpu)


def test_what_is_waited_for_is_counted(gpu):
    made = torch.zeros(4)
    for queued in (False, True):
        made.to("cuda", non_blocking=queued)
        made.pin_memory().to("cuda", non_blocking=queued)
        torch.zeros(4, device="cuda").to("cpu", non_blocking=queued)
        torch.empty(4, pin_memory=True).copy_(torch.zeros(4, device="cuda"), non_blocking=queued)
    assert sum(gpu.copies.values()) == 6
    with torch.inference_mode():
        torch.tensor([1.0], device="cuda")
        made.cuda()
        assert sum(gpu.copies.values()) == 8
        assert torch.ones(2, device="cuda").sum().item() == 1
    torch.cuda.synchronize()
    assert sum(gpu.waits.values()) == 2


@pytest.mark.slow
def test_a_pipeline_moves_as_in_diffusers(gpu):
    bundle = a_bundle(*KINDS["sequential"])
    pipe = AvatarPipeline(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text)
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.float32)
    assert pipe.to("cuda", torch.bfloat16) is pipe
    assert (pipe.device.type, pipe.dtype) == ("cuda", torch.bfloat16)
    parts = [*bundle.student.parameters(), *bundle.codec.buffers(), *bundle.audio_encoder.buffers()]
    assert {part.device.type for part in [*parts, *bundle.text.parameters()]} == {"cuda"}
    assert {part.dtype for part in [*bundle.codec.buffers(), *bundle.text.parameters()]} == {torch.float32}
    assert bundle.student.net.scale_shift_table.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    out = pipe(torch.zeros(3, 16, 16), torch.zeros(9 * 1280), "a person nods", output_type="pt")
    assert (out.frames.shape, out.frames.device.type) == ((9, 16, 16, 3), "cpu")
    assert (pipe.to(torch.float32).dtype, pipe.to("cpu").device.type) == (torch.float32, "cpu")

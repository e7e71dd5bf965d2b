"""TAEHV: the published names and shapes, the equations written out frame by frame, chunks that equal the whole."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from teachers.codecs.linear import CodecConfig
from teachers.codecs.taehv import TAEHV, load_taehv
from teachers.errors import UserError
from tests.support.tiny import randomise
from tests.teachers.codecs.test_wan_vae import FRAMES, SPLITS, Touch, a_video, frames_seen, some_latents, stream

ENCODER = "conv relu pool2 half mem mem mem pool2 half mem mem mem pool1 half mem mem mem conv"
DECODER = "clamp conv relu mem mem mem up grow1 conv mem mem mem up grow2 conv mem mem mem up grow2 conv relu conv"


@lru_cache(maxsize=1)
def weights() -> dict[str, torch.Tensor]:
    table = randomise(TAEHV(widths=(12, 10, 8, 6), encoder_width=8), seed=5, scale=1.0).state_dict()
    table["decoder.22.weight"] *= 0.1  # most pixels stay inside 0 .. 1
    table["decoder.22.bias"].fill_(0.5)
    return table


def a_codec() -> TAEHV:
    codec = TAEHV(widths=(12, 10, 8, 6), encoder_width=8)
    codec.load_state_dict(weights())
    return codec


def published_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of taew2_1, position by position."""
    table: dict[str, tuple[int, ...]] = {}

    def conv(name, outputs, inputs, kernel=3, bias=True):
        table[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            table[f"{name}.bias"] = (outputs,)

    def memory(name, width):
        conv(f"{name}.conv.0", width, 2 * width)
        conv(f"{name}.conv.2", width, width)
        conv(f"{name}.conv.4", width, width)

    conv("encoder.0", 64, 3)
    for start, frames in ((2, 2), (7, 2), (12, 1)):
        conv(f"encoder.{start}.conv", 64, 64 * frames, kernel=1, bias=False)
        conv(f"encoder.{start + 1}", 64, 64, bias=False)
        for i in range(start + 2, start + 5):
            memory(f"encoder.{i}", 64)
    conv("encoder.17", 16, 64)
    conv("decoder.1", 256, 16)
    for start, width, outputs, frames in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
        for i in range(start, start + 3):
            memory(f"decoder.{i}", width)
        conv(f"decoder.{start + 4}.conv", width * frames, width, kernel=1, bias=False)
        conv(f"decoder.{start + 5}", outputs, width, bias=False)
    conv("decoder.22", 3, 64)
    return table


def frame_by_frame(part: str, kinds: str, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    """The network as equations on single frames [B, C, H, W]; y_t = relu(x_t + f(x_t, x_t-1)) with x_-1 = 0."""
    table = weights()

    def conv(name, x, stride=1):
        return F.conv2d(x, table[f"{name}.weight"], table.get(f"{name}.bias"), stride=stride, padding=1)

    for i, kind in enumerate(kinds.split()):
        name = f"{part}.{i}"
        if kind == "mem":
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            deltas = [torch.cat((x, past), dim=1) for x, past in zip(frames, before, strict=True)]
            deltas = [conv(f"{name}.conv.2", conv(f"{name}.conv.0", x).relu()).relu() for x in deltas]
            deltas = [conv(f"{name}.conv.4", x) for x in deltas]
            frames = [(x + delta).relu() for x, delta in zip(frames, deltas, strict=True)]
        elif kind == "pool2":
            matrix = table[f"{name}.conv.weight"][:, :, 0, 0]
            pairs = [torch.cat(frames[t : t + 2], dim=1) for t in range(0, len(frames), 2)]
            frames = [torch.einsum("oc,bchw->bohw", matrix, pair) for pair in pairs]
        elif kind in ("pool1", "grow1", "grow2"):
            matrix = table[f"{name}.conv.weight"][:, :, 0, 0]
            width = frames[0].shape[1]
            grown = [torch.einsum("oc,bchw->bohw", matrix, x) for x in frames]
            frames = [half for x in grown for half in ((x[:, :width], x[:, width:]) if kind == "grow2" else (x,))]
        else:
            step = {
                "conv": lambda x, name=name: conv(name, x),
                "half": lambda x, name=name: conv(name, x, stride=2),
                "relu": torch.relu,
                "clamp": lambda x: 3 * torch.tanh(x / 3),
                "up": lambda x: x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2),
            }[kind]
            frames = [step(x) for x in frames]
    return frames


def test_names_shapes_and_size_are_the_published_ones():
    with torch.device("meta"):
        codec = TAEHV()
    assert {name: tuple(value.shape) for name, value in codec.state_dict().items()} == published_layout()
    assert sum(value.numel() for value in codec.decoder.parameters()) == 9_844_611
    assert sum(value.numel() for value in codec.parameters()) == 11_315_539
    assert codec.config == CodecConfig(stride=4, patch=8, channels=16)


def test_decoding_follows_the_equations():
    latents = 2 * some_latents()
    frames = frame_by_frame("decoder", DECODER, list(latents.unbind(2)))[3:]
    expected = torch.stack(frames, dim=2).clamp(0, 1) * 2 - 1
    pixels = a_codec().decode(latents)
    assert pixels.shape == expected.shape == (2, 3, 17, 16, 24)
    assert torch.allclose(pixels, expected, atol=1e-5)
    assert float((pixels.abs() < 1).float().mean()) > 0.2, "clamped pixels prove little"
    assert float(pixels.std(dim=2).mean()) > 0.01, "pictures without motion prove little"


def test_encoding_follows_the_equations():
    video = a_video(batch=2)
    frames = [(x + 1) / 2 for x in video.unbind(2)]
    expected = torch.stack(frame_by_frame("encoder", ENCODER, frames + frames[-1:] * 3), dim=2)
    latents = a_codec().encode(video)
    assert latents.shape == expected.shape == (2, 16, 3, 2, 3)
    assert torch.allclose(latents, expected, atol=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_chunks_equal_the_whole(split):
    codec, latents = a_codec(), some_latents()
    pixels = stream(codec, latents, split)[0]
    assert [part.shape[2] for part in pixels] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    assert torch.equal(torch.cat(pixels, dim=2), codec.decode(latents))


def test_a_clip_goes_through_one_latent_frame_at_a_time():
    """What makes chunks equal the whole on every device, and keeps the memory of a long clip that of a short one."""
    codec = a_codec()
    assert frames_seen(codec.decoder[1], lambda: codec.decode(some_latents())) == [(2, 16, 2, 3)] * FRAMES
    assert frames_seen(codec.encoder[0], lambda: codec.encode(a_video())) == [(4, 3, 16, 24)] * 3


def test_an_old_state_can_be_gone_on_from():
    codec, latents, others = a_codec(), some_latents(), some_latents(seed=7)
    whole = codec.decode(latents)
    states = stream(codec, latents, (1, 2, 2))[1]
    kept = [tuple(slot.clone() for slot in state) for state in states]
    astray = codec.decode_chunk(others[:, :, 1:], states[0])[0]
    assert not torch.allclose(astray, whole[:, :, 1:], atol=1e-3)
    for state, start in zip(states[:2], (1, 3), strict=True):
        again = torch.cat(stream(codec, latents[:, :, start:], 1, state)[0], dim=2)
        assert torch.equal(again, whole[:, :, 4 * start - 3 :])
    for state, before in zip(states, kept, strict=True):
        assert all(torch.equal(slot, old) for slot, old in zip(state, before, strict=True)), "a state was written to"


def test_a_state_is_one_frame_a_memory_block_and_survives_the_disk(tmp_path):
    codec, latents = a_codec(), some_latents()
    states = stream(codec, latents, (1, 3, 1))[1]
    assert [tuple(slot.shape) for slot in states[0]] == [
        (2, w, 2 * k, 3 * k) for w, k in ((12, 1), (10, 2), (8, 4)) for _ in "123"
    ]
    assert all([slot.shape for slot in state] == [slot.shape for slot in states[0]] for state in states)
    assert all(slot.untyped_storage().nbytes() == slot.nbytes for state in states for slot in state), (
        "a state holds a clip"
    )
    save_file({str(n): slot for n, slot in enumerate(states[1])}, tmp_path / "state.safetensors")
    tensors = load_file(tmp_path / "state.safetensors")
    loaded = tuple(tensors[str(n)] for n in range(9))
    assert torch.equal(codec.decode_chunk(latents[:, :, 4:], loaded)[0], codec.decode(latents)[:, :, 13:])


def test_an_image_is_the_first_latent_of_its_still():
    codec, image = a_codec(), a_video(frames=1)
    latent = codec.encode(image)
    assert latent.shape == (1, 16, 1, 2, 3)
    assert torch.equal(codec.encode(image.expand(-1, -1, 9, -1, -1))[:, :, :1], latent)


def test_encoding_looks_three_frames_ahead_and_no_further():
    codec, video = a_codec(), a_video()
    latents, changed = codec.encode(video), video.clone()
    changed[:, :, 4:] *= -1
    assert torch.equal(codec.encode(changed)[:, :, :1], latents[:, :, :1])
    changed[:, :, 3:] *= -1
    assert not torch.allclose(codec.encode(changed)[:, :, 0], latents[:, :, 0], atol=1e-3)


def test_nothing_is_recorded_but_a_decode_of_latents_that_ask_for_it():
    latents, video = some_latents(), a_video().requires_grad_()
    pixels, state = a_codec().decode_chunk(latents)
    assert not any(out.requires_grad for out in (pixels, a_codec().encode(video), *state))
    assert a_codec().decode(latents.requires_grad_()).requires_grad


def test_low_precision_weights_give_fp32():
    codec, latents = a_codec().to(torch.bfloat16), some_latents()
    assert codec.decode(latents).dtype == codec.encode(a_video()).dtype == torch.float32
    assert torch.allclose(codec.decode(latents), a_codec().decode(latents), atol=0.2)
    assert torch.equal(torch.cat(stream(codec, latents, (2, 3))[0], dim=2), codec.decode(latents))


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_shapes_are_refused_in_one_line():
    codec = a_codec()
    with pytest.raises(UserError, match=r"^video: got torch.float32 \[1, 3, 8, 16, 24\], the codec takes floats \["):
        codec.encode(a_video(frames=8))
    with pytest.raises(UserError, match=r"^latents: got torch.float32 \[2, 15, 5, 2, 3\], the codec takes floats \["):
        codec.decode(some_latents()[:, 1:])
    state = codec.decode_chunk(some_latents(batch=1))[1]
    with pytest.raises(UserError, match=r"^state: it is \[1, 12, 2, 3\], the latents are \[2, 16, 5, 2, 3\]; "):
        codec.decode_chunk(some_latents(batch=2), state)


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
def test_published_files_load(tmp_path, name):
    half = {key: value.half() for key, value in weights().items()}
    (save_file if name.endswith("safetensors") else torch.save)(half, tmp_path / name)
    expected = a_codec()
    expected.load_state_dict({key: value.float() for key, value in half.items()})
    for path in (tmp_path, tmp_path / name):
        codec = load_taehv(path)
        assert not codec.training
        assert not any(parameter.requires_grad for parameter in codec.parameters())
        assert torch.equal(codec.decode(some_latents()), expected.decode(some_latents()))
        assert torch.equal(codec.encode(a_video()), expected.encode(a_video()))


def test_files_that_are_not_taew2_1_are_refused(tmp_path):
    def refused(path, *parts):
        with pytest.raises(UserError) as caught:
            load_taehv(path)
        for part in parts:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    file, where = tmp_path / "taew2_1.safetensors", "github.com/madebyollin/taehv"
    refused(tmp_path, "no weights", str(tmp_path / "taew2_1.safetensors"), where)
    table = weights()
    save_file(table, tmp_path / "taehv.safetensors")
    refused(tmp_path / "taehv.safetensors", "another model's latents", where)
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, file)
    refused(file, "not TAEHV's weights", where)
    save_file({key: value for key, value in table.items() if key != "decoder.16.conv.2.bias"}, file)
    refused(file, "missing decoder.16.conv.2.bias", where)
    save_file(table | {"decoder.13.conv.weight": torch.zeros(10, 10, 1, 1)}, file)
    refused(file, "decoder.13.conv.weight is [10, 10, 1, 1] where [20, 10, 1, 1] is needed")
    save_file(table | {"encoder.0.weight": torch.zeros(8, 12, 3, 3)}, file)  # taew2_2 works on 2 x 2 patches
    refused(file, "encoder.0.weight is [8, 12, 3, 3] where [8, 3, 3, 3] is needed")
    file.write_bytes(file.read_bytes()[:200])
    refused(file, "damaged weights")
    torch.save(table | {"code": Touch(tmp_path / "touched")}, tmp_path / "taew2_1.pth")
    refused(tmp_path / "taew2_1.pth", "a pickle with code in it")
    assert not (tmp_path / "touched").exists()

"""OmniAvatar's audio path from its equations, in elementary tensor operations on a dict of weights with their published names.

Baevski et al. 2006.11477 (post-norm base model) with the features resampled to the video rate before the transformer, then
OmniAvatar's audio pack (2506.18866). Any float precision; nothing is taken from transformers, diffusers or this package.
A = features of a row, T = pixel frames, F = latent frames, T = 1 + 4 (F - 1).
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]
STRIDES = (5, 2, 2, 2, 2, 2, 2)


def standardise(wave: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-7) over the last axis."""
    mean = wave.mean(-1, keepdim=True)
    return (wave - mean) / torch.sqrt(((wave - mean) ** 2).mean(-1, keepdim=True) + 1e-7)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def convolve(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """x [B, T, C], kernel [D, C, K] -> [B, T', D]: y[t] = sum_k kernel[.., k] x[stride t + k]."""
    return torch.einsum("btck,dck->btd", x.unfold(1, kernel.shape[2], stride), kernel)


def conv_features(w: Weights, wave: Tensor) -> Tensor:
    """wave [B, S] -> [B, L, C] at 50 Hz: seven convolutions with GELU; after the first each channel is normalised over time."""
    x = wave.unsqueeze(-1)
    for i, stride in enumerate(STRIDES):
        name = f"wav2vec2.feature_extractor.conv_layers.{i}"
        x = convolve(x, w[f"{name}.conv.weight"], stride)
        if i == 0:
            mean = x.mean(1, keepdim=True)
            x = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(1, keepdim=True) + 1e-5)
            x = x * w[f"{name}.layer_norm.weight"] + w[f"{name}.layer_norm.bias"]
        x = gelu(x)
    return x


def resample(x: Tensor, num_rows: int) -> Tensor:
    """[B, L, C] -> [B, num_rows, C], linear; the first row is the first feature, the last the last."""
    length = x.shape[1]
    at = torch.arange(num_rows, dtype=torch.float64) * (length - 1) / max(num_rows - 1, 1)
    left = at.floor().long()
    right = (left + 1).clamp(max=length - 1)
    share = (at - left).to(x.dtype)[None, :, None]
    return x[:, left] * (1 - share) + x[:, right] * share


def positions(w: Weights, x: Tensor) -> Tensor:
    """Grouped convolution over rows, kernel g v / |v| with the norm over all but the tap, padded by K/2 and the surplus row cut."""
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    direction = w[f"{name}.weight_v"]
    kernel = w[f"{name}.weight_g"] * direction / torch.sqrt((direction**2).sum((0, 1), keepdim=True))
    width, per_group, taps = kernel.shape
    rows = x.shape[1]
    padding = x.new_zeros(x.shape[0], taps // 2, width)
    padded = torch.cat([padding, x, padding], 1)
    groups = [
        convolve(padded[..., g : g + per_group], kernel[g : g + per_group], 1) for g in range(0, width, per_group)
    ]
    return gelu((torch.cat(groups, -1) + w[f"{name}.bias"])[:, :rows])


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    def split(part: str) -> Tensor:
        return linear(w, f"{name}.{part}_proj", x).unflatten(-1, (heads, -1))

    scores = torch.einsum("bqhd,bkhd->bhqk", split("q"), split("k")) / math.sqrt(x.shape[-1] // heads)
    mixed = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), split("v"))
    return linear(w, f"{name}.out_proj", mixed.flatten(2))


def states(w: Weights, features: Tensor, heads: int) -> list[Tensor]:
    """Features [B, T, C] at the video rate -> the input of the first layer and the output of each, [B, T, D]."""
    base = "wav2vec2.feature_projection"
    x = linear(w, f"{base}.projection", layer_norm(w, f"{base}.layer_norm", features))
    x = layer_norm(w, "wav2vec2.encoder.layer_norm", x + positions(w, x))
    found = [x]
    while (name := f"wav2vec2.encoder.layers.{len(found) - 1}") + ".layer_norm.weight" in w:
        x = layer_norm(w, f"{name}.layer_norm", x + attention(w, f"{name}.attention", x, heads))
        inner = gelu(linear(w, f"{name}.feed_forward.intermediate_dense", x))
        x = layer_norm(w, f"{name}.final_layer_norm", x + linear(w, f"{name}.feed_forward.output_dense", inner))
        found.append(x)
    return found


def audio_rows(w: Weights, sound: Tensor, num_frames: int, samples_per_frame: int, heads: int) -> Tensor:
    """sound [B, S] at 16 kHz -> [B, T, A]: normalised, then silence to the clip's length; the last state, then all states."""
    wave = standardise(sound)
    length = num_frames * samples_per_frame
    wave = torch.cat([wave, wave.new_zeros(len(wave), max(0, length - wave.shape[1]))], 1)[:, :length]
    found = states(w, resample(conv_features(w, wave), num_frames), heads)
    return torch.cat([found[-1], *found], -1)


def pack(rows: Tensor) -> Tensor:
    """[B, T, A] -> [B, F, 4 A]: the first row three times more in front, then four rows a latent frame."""
    batch, num_frames, width = rows.shape
    rows = torch.cat([rows[:, :1], rows[:, :1], rows[:, :1], rows], 1)
    return rows.reshape(batch, (num_frames + 3) // 4, 4 * width)


def audio_conditions(w: Weights, rows: Tensor) -> list[Tensor]:
    """[B, T, A] -> what is added to every token of a latent frame, [B, F, width], before blocks 2, 3, ..."""
    packed = layer_norm(w, "audio_proj.norm_out", linear(w, "audio_proj.proj", pack(rows)))
    count = len({name.split(".")[1] for name in w if name.startswith("audio_cond_projs.")})
    return [linear(w, f"audio_cond_projs.{i}", packed) for i in range(count)]

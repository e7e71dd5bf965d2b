"""Speech-like audio with known mouth shapes: the sound half of the embedded world.

Source-filter synthesis, vectorised over clips: a pulse train or noise source, shaped frame by frame in the STFT domain by vowel
formants. Loudness is drawn independently of the mouth opening, and loud non-speech noise is mixed in, so that loudness alone
does not determine the mouth: a network has to use the formants. Mouth shapes are co-articulated: a closure shuts the lips within
whatever vowels stand around it, short vowels open less, and lips are rounded or spread before the vowel sounds that needs it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SAMPLE_RATE = 16_000
HOP = 160  # samples a control frame: 100 Hz
N_FFT = 512

# Formants F1, F2, F3 in Hz (Peterson & Barney 1952, rounded) and the mouth (opening, width) of each vowel.
VOWELS = {
    "a": ((730, 1090, 2440), (1.00, 0.55)),
    "e": ((530, 1840, 2480), (0.55, 0.80)),
    "i": ((270, 2290, 3010), (0.25, 1.00)),
    "o": ((570, 840, 2410), (0.65, 0.25)),
    "u": ((300, 870, 2240), (0.20, 0.05)),
}
REST = (0.0, 0.5)
ANTICIPATION = 5  # ticks of 10 ms by which the width of the lips is ahead of the sound
MAX_SYLLABLES_PER_SECOND = 6.0


@dataclass(frozen=True, kw_only=True)
class Speech:
    """audio [N, S] in [-1, 1]; opening and width [N, K] in [0, 1] at 100 Hz."""

    audio: Float[Tensor, "n s"]
    opening: Float[Tensor, "n k"]
    width: Float[Tensor, "n k"]


def _uniform(shape, low, high, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng) * (high - low) + low


def _syllables(num: int, num_ticks: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Random syllables on a 100 Hz grid: per tick the vowel, and whether it is vowel, consonant noise or closure."""
    count = int(num_ticks / 100 * MAX_SYLLABLES_PER_SECOND) + 4
    onset = torch.randint(3, 9, (num, count), generator=rng)
    length = torch.randint(12, 26, (num, count), generator=rng)
    pause = torch.where(
        torch.rand(num, count, generator=rng) < 0.22, torch.randint(15, 50, (num, count), generator=rng), 0
    )
    kind = torch.randint(0, 3, (num, count), generator=rng)  # 0 closure (p, b, m), 1 fricative (s, f), 2 none
    onset = torch.where(kind == 2, 0, onset)
    vowel = torch.randint(0, len(VOWELS), (num, count), generator=rng)
    gain = 10 ** (_uniform((num, count), -9, 3, rng) / 20)
    lead = torch.randint(-20, 30, (num, 1), generator=rng)
    span = onset + length + pause
    start = torch.cumsum(span, dim=1) - span + lead
    ticks = torch.arange(num_ticks)
    index = (torch.searchsorted(start.contiguous(), ticks.expand(num, -1).contiguous(), right=True) - 1).clamp(min=0)
    inside = ticks - start.gather(1, index)
    onset_here, length_here = onset.gather(1, index), length.gather(1, index)
    before = inside < 0
    in_onset = (inside >= 0) & (inside < onset_here)
    voiced = (inside >= onset_here) & (inside < onset_here + length_here) & ~before
    kind_here = kind.gather(1, index)
    return {
        "vowel": vowel.gather(1, index),
        "gain": gain.gather(1, index),
        "voiced": voiced,
        "fricative": in_onset & (kind_here == 1),
        "closure": in_onset & (kind_here == 0),
    }


def smooth(x: Float[Tensor, "n k"], ticks: int) -> Float[Tensor, "n k"]:
    """Hann smoothing along the last axis over `ticks` control frames (edges replicated)."""
    window = torch.hann_window(ticks + 2, periodic=False)[1:-1]
    padded = torch.nn.functional.pad(x.unsqueeze(1), (ticks // 2, ticks - 1 - ticks // 2), mode="replicate")
    return torch.nn.functional.conv1d(padded, (window / window.sum()).view(1, 1, -1)).squeeze(1)


def _excitation(num: int, num_samples: int, voiced: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Glottal pulses (pitch with jitter and a slow contour) and white noise, both [N, S]."""
    num_ticks = voiced.shape[1]
    base = _uniform((num, 1), 95.0, 230.0, rng)
    contour = smooth(torch.randn(num, num_ticks, generator=rng), 41) * 3.0
    pitch = base * (1.0 + 0.06 * contour).clamp(0.7, 1.4)
    pitch = torch.nn.functional.interpolate(pitch.unsqueeze(1), size=num_samples, mode="linear").squeeze(1)
    phase = torch.cumsum(pitch.double() / SAMPLE_RATE, dim=1) % 1.0
    pulses = torch.exp(-(phase.float() * 12.0)) - 0.083
    return pulses, torch.randn(num, num_samples, generator=rng)


def _envelopes(
    syllables: dict[str, Tensor], scale: Tensor, tilt: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Magnitude responses [N, bins, ticks] of the vowel filter and of the fricative noise."""
    freqs = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1).view(1, 1, -1)
    table = torch.tensor([v[0] for v in VOWELS.values()], dtype=torch.float32)
    formants = table[syllables["vowel"]] * scale.unsqueeze(-1)
    formants = torch.stack([smooth(formants[..., i], 7) for i in range(3)], dim=-1)
    response = torch.zeros(*formants.shape[:2], freqs.shape[-1])
    for i, (bandwidth, level) in enumerate(((90.0, 1.0), (120.0, 0.6), (170.0, 0.3))):
        centre = formants[..., i : i + 1]
        response += level / (1.0 + ((freqs - centre) / bandwidth) ** 2)
    response = response * torch.exp(-freqs / 8000.0 * tilt.unsqueeze(-1))
    hiss_centre = _uniform((response.shape[0], 1, 1), 3500, 6500, rng)
    hiss = torch.exp(-(((freqs - hiss_centre) / 1500.0) ** 2)).expand_as(response)
    return response.transpose(1, 2), hiss.transpose(1, 2)


def synthesise(num: int, num_samples: int, rng: torch.Generator) -> Speech:
    """`num` speech-like clips of `num_samples` at 16 kHz with their mouth shapes."""
    num_ticks = num_samples // HOP + 1
    syllables = _syllables(num, num_ticks, rng)
    scale = _uniform((num, 1), 0.88, 1.18, rng)
    tilt = _uniform((num, 1), 0.5, 3.0, rng)
    pulses, noise = _excitation(num, num_samples, syllables["voiced"], rng)
    window = torch.hann_window(N_FFT)

    def spectrum(signal):
        return torch.stft(signal, N_FFT, HOP, window=window, return_complex=True)

    voice, hiss = _envelopes(syllables, scale, tilt, rng)
    voiced_gain = smooth(syllables["voiced"].float() * syllables["gain"], 5)
    hiss_gain = smooth(syllables["fricative"].float() * syllables["gain"] * 0.35, 3)
    spoken = spectrum(pulses)[..., :num_ticks] * voice * voiced_gain.unsqueeze(1)
    spoken = spoken + spectrum(noise)[..., :num_ticks] * hiss * hiss_gain.unsqueeze(1) * 0.5
    speech = torch.istft(spoken, N_FFT, HOP, window=window, length=num_samples)
    speech = speech / speech.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
    # Non-speech: a steady noise floor and, in a third of the clips, loud broadband bursts that do not move the mouth.
    floor = 10 ** (_uniform((num, 1), -55, -22, rng) / 20)
    bursts = (torch.rand(num, num_ticks, generator=rng) < 0.012).float() * (torch.rand(num, 1, generator=rng) < 0.35)
    burst_gain = torch.nn.functional.interpolate(smooth(bursts, 15).unsqueeze(1), size=num_samples).squeeze(1) * 8.0
    audio = speech + noise * (floor + burst_gain * 0.6)
    audio = audio * 10 ** (_uniform((num, 1), -30, -16, rng) / 20)
    mouth = torch.tensor([v[1] for v in VOWELS.values()])[syllables["vowel"]]
    rest = torch.tensor(REST)
    target = torch.where(syllables["voiced"].unsqueeze(-1), mouth, rest)
    fricative = torch.tensor([0.12, 0.75])
    target = torch.where(syllables["fricative"].unsqueeze(-1), fricative, target)
    closed = smooth(syllables["closure"].float(), 5)
    ahead = torch.cat([target[:, ANTICIPATION:, 1], target[:, -1:, 1].expand(-1, ANTICIPATION)], dim=1)
    return Speech(audio=audio.clamp(-1, 1), opening=smooth(target[..., 0], 11) * (1 - closed), width=smooth(ahead, 17))

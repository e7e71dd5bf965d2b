"""Embedded extractors: three small networks trained on the clips at hand, in place of Inception, I3D and SyncNet.

The protocol is named "embedded". Distances in their feature spaces rank systems of one run; they are NEVER comparable
with published FID/FVD or Sync-C, whose networks, preprocessing and data are others. A metric built on them is shown
as a score only where `eval.embedded.admission.admit` shows that it ranks known cases right.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from eval.metrics.sync import correlation
from teachers.checkpoints.strict import load_strict
from teachers.disk.read import read_json
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors, save_tensors
from teachers.machine import clips_at_once

DIM = 64  # width of both feature spaces
GRID = 4  # cells a side of the change map that the clip probe sees
TEMPOS = ("natural", "shuffled", "frozen", "flicker")
MOUTH = ("mouth_open", "mouth_width")

Progress = Callable[[int, float], None]  # (steps done, loss)


class FrameProbe(nn.Module):
    """Frames [N, 3, H, W] in [-1, 1] -> features [N, DIM] and readings of what the frame shows.

    H and W are multiples of 16. Outputs are standardised; `Probes` undoes that. `quality` is the blur and noise that
    training added: it keeps in the features what the other outputs learn to ignore.
    """

    def __init__(self, num_labels: int, num_expressions: int, num_identity: int):
        super().__init__()
        self.sizes = (num_labels, num_expressions, num_identity, 2)

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())

        self.trunk = nn.Sequential(nn.PixelUnshuffle(2), layer(12, 32, 1), layer(32, 64, 2), layer(64, 96, 2))
        self.embed = nn.Sequential(nn.Linear(96 * 16, DIM), nn.LayerNorm(DIM), nn.SiLU())
        self.heads = nn.Linear(DIM, sum(self.sizes))

    def forward(self, frames: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        """-> features, labels [N, L], expression logits [N, E], identity [N, I], quality [N, 2]."""
        maps = F.adaptive_avg_pool2d(self.trunk(frames), 4)
        features = self.embed(maps.flatten(1))
        return features, *self.heads(features).split(self.sizes, dim=1)


class ClipProbe(nn.Module):
    """Frame features and change maps [N, T, DIM + GRID^2] -> features [N, DIM] and readings of the motion."""

    def __init__(self, num_labels: int, num_gestures: int):
        super().__init__()
        self.sizes = (num_gestures, len(TEMPOS), num_labels)
        self.temporal = nn.Sequential(
            nn.Conv1d(DIM + GRID * GRID, 96, 3, padding=1, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv1d(96, 96, 3, padding=1, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv1d(96, 96, 3, padding=2, dilation=2, padding_mode="replicate"),
            nn.SiLU(),
        )
        self.embed = nn.Sequential(nn.Linear(192, DIM), nn.LayerNorm(DIM), nn.SiLU())
        self.heads = nn.Linear(DIM, sum(self.sizes))

    def forward(self, sequence: Float[Tensor, "n t c"]) -> tuple[Tensor, ...]:
        """-> features, gesture logits [N, G], tempo logits [N, 4], mean label speed [N, L] (standardised)."""
        hidden = self.temporal(sequence.mT)
        features = self.embed(torch.cat((hidden.mean(2), hidden.amax(2)), dim=1))
        return features, *self.heads(features).split(self.sizes, dim=1)


class AudioProbe(nn.Module):
    """Audio features [N, T, A], a row a pixel frame -> mouth (open, width) [N, T, 2]; its receptive field is +-2 frames."""

    def __init__(self, num_features: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(num_features, 96, 3, padding=1, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv1d(96, 96, 3, padding=1, padding_mode="replicate"),
            nn.SiLU(),
            nn.Conv1d(96, 2, 1),
        )

    def forward(self, features: Float[Tensor, "n t a"]) -> Float[Tensor, "n t 2"]:
        return self.layers(features.mT).mT


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the probes read from N clips; everything is fp32 on the CPU."""

    frame_features: Tensor  # [N, T, DIM]
    clip_features: Tensor  # [N, DIM]
    labels: dict[str, Tensor]  # name -> [N, T], in the world's units
    expression: Tensor  # [N, T, E] probabilities
    gesture: Tensor  # [N, G] probabilities
    identity: Tensor  # [N, T, I], standardised over the world

    @property
    def mouth(self) -> Tensor:
        """Mouth in the video [N, T, 2]: open, width."""
        return torch.stack([self.labels[name] for name in MOUTH], dim=-1)

    def clip(self, index: int) -> "Reading":
        """That of one clip, without the axis of clips."""
        labels = {name: values[index] for name, values in self.labels.items()}
        rest = (self.expression[index], self.gesture[index], self.identity[index])
        return Reading(self.frame_features[index], self.clip_features[index], labels, *rest)


class Probes:
    """The three networks with the statistics that standardise their inputs and outputs."""

    def __init__(
        self,
        frame: FrameProbe,
        clip: ClipProbe,
        audio_probe: AudioProbe,
        names: tuple[str, ...],
        scales: dict[str, Tensor],
    ):
        self.frame, self.clip, self.audio_probe = frame.eval(), clip.eval(), audio_probe.eval()
        frame.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.names, self.scales = names, scales

    @property
    def device(self) -> torch.device:
        return next(self.frame.parameters()).device

    @property
    def knows_mouth(self) -> bool:
        """Whether they have learned the mouth from video and from audio."""
        return all(name in self.names for name in MOUTH)

    def to(self, device: torch.device | str) -> "Probes":
        """The same probes with networks and statistics on `device`."""
        for network in (self.frame, self.clip, self.audio_probe):
            network.to(device)
        self.scales = {key: value.to(device) for key, value in self.scales.items()}
        return self

    @torch.inference_mode()
    def read(self, video: UInt8[Tensor, "n 3 t h w"]) -> Reading:
        """Read clips of any length T >= 2, a few clips at a time."""
        _, _, frames, height, width = video.shape
        parts: list[tuple[Tensor, ...]] = []
        for part in video.split(clips_at_once(frames, height, width, self.device.type)):
            clips = as_float(part.to(self.device))
            num, frames = clips.shape[0], clips.shape[2]
            flat = clips.transpose(1, 2).flatten(0, 1)
            features, labels, expression, identity, _ = (x.unflatten(0, (num, frames)) for x in self.frame(flat))
            clip_features, gesture, _, _ = self.clip(torch.cat((features, change_map(clips)), dim=2))
            labels = labels * self.scales["label_std"] + self.scales["label_mean"]
            outputs = (features, clip_features, labels, expression.softmax(2), gesture.softmax(1), identity)
            parts.append(tuple(x.float().cpu() for x in outputs))
        features, clip_features, values, expression, gesture, identity = (
            torch.cat(x) for x in zip(*parts, strict=True)
        )
        named = dict(zip(self.names, values.unbind(2), strict=True))
        return Reading(features, clip_features, named, expression, gesture, identity)

    def mouth_in(self, video: Float[Tensor, "n 3 t h w"]) -> Float[Tensor, "n t 2"]:
        """The mouth (open, width) that clips in [-1, 1] show, in the world's units, with the gradient of the clips."""
        columns = [self.names.index(name) for name in MOUTH]
        labels = self.frame(video.transpose(1, 2).flatten(0, 1))[1].unflatten(0, (len(video), -1))[..., columns]
        return labels * self.scales["label_std"][columns] + self.scales["label_mean"][columns]

    @torch.inference_mode()
    def mouth_from_audio(self, audio_features: Float[Tensor, "n t a"]) -> Float[Tensor, "n t 2"]:
        """Mouth (open, width) that the sound predicts, in the world's units."""
        scaled = (audio_features.to(self.device) - self.scales["audio_mean"]) / self.scales["audio_std"]
        columns = [self.names.index(name) for name in MOUTH]
        mouth = self.audio_probe(scaled) * self.scales["label_std"][columns] + self.scales["label_mean"][columns]
        return mouth.float().cpu()

    def check(self, video: Tensor, labels: Mapping[str, Tensor], audio_features: Tensor) -> dict[str, float]:
        """Agreement with known labels over frames 1..: correlations, and accuracy of expression and gesture. UserError where the
        clips lack a label that these extractors were trained on."""
        if lacking := [name for name in self.names if name not in labels]:
            raise UserError(
                f"eval.probes: trained on labels that these clips have not ({lacking[0]}); set eval.probes=null, which trains "
                "extractors on the clips"
            )
        reading = self.read(video)
        scores = {name: correlation(reading.labels[name][:, 1:], labels[name][:, 1:]) for name in self.names}
        if "expression" not in labels:
            return scores
        late = reading.expression[:, reading.expression.shape[1] // 3 :].mean(1).argmax(1)
        scores["expression"] = float((late == labels["expression"].cpu()).double().mean())
        scores["gesture"] = float((reading.gesture.argmax(1) == labels["gesture"].cpu()).double().mean())
        mouth = self.mouth_from_audio(audio_features)
        for index, name in enumerate(MOUTH):
            scores[f"audio_{name}"] = correlation(mouth[:, 1:, index], labels[name][:, 1:])
        return scores

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name: `frame.*`, `clip.*`, `audio_probe.*`, `scale.*`."""
        networks = {"frame": self.frame, "clip": self.clip, "audio_probe": self.audio_probe}
        state = {f"{key}.{name}": x for key, network in networks.items() for name, x in network.state_dict().items()}
        state.update({f"scale.{key}": x for key, x in self.scales.items()})
        return {name: x.detach().cpu().contiguous() for name, x in state.items()}

    @property
    def sha256(self) -> str:
        """Hash over names and values of every tensor: the extractor's identity on a protocol card."""
        digest = hashlib.sha256(json.dumps(self._meta(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def _meta(self) -> dict:
        audio = self.scales["audio_mean"].shape[0]
        return {
            "names": list(self.names),
            "frame": list(self.frame.sizes),
            "clip": list(self.clip.sizes),
            "audio": audio,
        }

    def save(self, folder: Path) -> None:
        """Write probes.safetensors and probes.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "probes.safetensors", self.state_dict())
        atomic_write(folder / "probes.json", json.dumps({**self._meta(), "sha256": self.sha256}, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> "Probes":
        """Read what `save` wrote; raises UserError if a file is missing or does not match its recorded hash."""
        try:
            meta = read_json(folder / "probes.json")
            state = load_tensors(folder / "probes.safetensors")
            names, sizes = tuple(meta["names"]), meta["frame"]
            frame = FrameProbe(sizes[0], sizes[1], sizes[2])
            clip, audio_probe = ClipProbe(meta["clip"][2], meta["clip"][0]), AudioProbe(meta["audio"])
            for key, network in {"frame": frame, "clip": clip, "audio_probe": audio_probe}.items():
                load_strict(network, _under(state, key), f"probe {key}", "fit them again")
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the probes cannot be read: {folder}: {error}; delete it and run again") from error
        probes = Probes(frame, clip, audio_probe, names, _under(state, "scale"))
        if probes.sha256 != meta.get("sha256"):
            raise UserError(f"the probes do not match their hash: {folder}; delete it and run again")
        return probes


def as_float(video: Tensor) -> Tensor:
    """uint8 0..255 -> fp32 [-1, 1]."""
    return video.float().div_(127.5).sub_(1)


def change_map(clips: Float[Tensor, "n 3 t h w"]) -> Float[Tensor, "n t g"]:
    """|x_t - x_(t-1)| averaged over colours and GRID x GRID cells, times 4; frame 0 repeats frame 1."""
    change = clips.diff(dim=2).abs().mean(1)
    pooled = F.adaptive_avg_pool2d(change, GRID).flatten(2) * 4
    return torch.cat((pooled[:, :1], pooled), dim=1)


def blur(frames: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Binomial 5 x 5 blur (1 4 6 4 1)/16 of each channel, edges repeated."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=frames.device) / 16
    padded = F.pad(frames, (2, 2, 2, 2), mode="replicate")
    height, width = frames.shape[-2:]
    rows = torch.stack([taps[i] * padded[..., i : i + height, :] for i in range(5)]).sum(0)
    return torch.stack([taps[i] * rows[..., i : i + width] for i in range(5)]).sum(0)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): x for name, x in state.items() if name.startswith(f"{prefix}.")}

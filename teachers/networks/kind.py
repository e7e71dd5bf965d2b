"""What a kind of network says of itself, so that students, teachers, fake scores, the planner and the pipeline know none by name.

A kind is a frozen dataclass that inherits from `NetworkKind`: its fields are keys of YAML, `build` makes the module, everything
else has a default. Its module maps `compose`d latents, a noise level and conditions to a raw output of the latents' shape.
B = batch, C = channels, F = latent frames.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from teachers import flow
from teachers.conditions import BUILT_IN, OF_IMAGE, Conditions
from teachers.errors import UserError
from teachers.networks.sequence import SequenceGroup
from teachers.resolve import Registry, in_users_file, label, missing

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one block, [B, n, M, d] with M heads of width d."""
PastParts = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
"""A context in parts: un-rotated keys, values, and the table that rotates the keys, of each chunk in the order of attention."""


class RaggedPast(NamedTuple):
    """A context of other length in every row of a batch: rotated keys and values [B, N, M, d], zeros behind the first `lengths` [B]
    tokens of a row."""

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, N + m, M, d], in each row the context, then those given [B, m, M, d], then zeros, and how many tokens
        of a row are not padding [B]."""
        at = (self.lengths.unsqueeze(1) + torch.arange(key.shape[1], device=key.device))[..., None, None]

        def behind(past: Tensor, own: Tensor) -> Tensor:
            whole = torch.cat([past, past.new_zeros(own.shape)], dim=1)
            return whole.scatter_(1, at.expand_as(own), own.to(past))

        return behind(self.keys, key), behind(self.values, value), self.lengths + key.shape[1]


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes that codec, encoders and data decide: channels of a latent, pixel frames of one (`stride`), widths of a text
    token, of an audio row (all speakers side by side), of a pose row and of an image token (0: there is none)."""

    latent_channels: int
    stride: int
    text_dim: int
    audio_dim: int
    pose_dim: int = 0
    speakers: int = 1
    image_dim: int = 0


class NetworkKind:
    """Defaults of a kind of network.

    takes       names of the conditions that it reads
    prediction  velocity (eps - x0), or reference (x0 as a difference to the reference latent)
    reference   whether frame 0 of a clip is given, not drawn; patch: a token is patch x patch cells of the latent grid
    first_frames  how many first latent frames of a stream are read unlike all others (a shorter audio window): 0 for none
    lead        latent frames in front of a clip that are the portrait's: they prime the codec, which gives 1 pixel frame for the
                first of a video and `stride` for every other, and belong to no chunk; 0 or 1
    past        how many latents of the film before a clip it reads, where its sampler draws one clip behind the other; 0: none
    rows        what a network of Wan's shape has beyond Wan in its published layout: lines `published name | our name | sizes` as
                in teachers.checkpoints.layouts, the first of which tells the kind
    whole       whether `rows` are all that it has: another backbone, whose layout has the kind's name and whose config.json there
                is `published_config`
    apart       whether what it has beyond Wan is published in a file of its own, NAME.safetensors over Wan's weights
    entries     the entries of a published torch archive that together are its weights, and of whose tensors' names each is the
                beginning; none: one entry is them all
    audio_row   of such rows: the symbol of an audio state's size, and how many states a row of the audio encoder has
    layouts     published layouts that `distill convert` reads for it; empty: our own safetensors file alone
    source      where its published weights are to be had, for messages
    causal      "module:Class" (net, spec) of its causal student; empty: none, `student.network.name: windowed` wraps it
    over_teacher  a student kind that is made around the teacher's network and starts from its weights
    context_pass  whether a student's `commit` runs the network once
    frame_sigma  whether the module takes sigma [B, F] too, a noise level of each frame
    can_checkpoint  whether `enable_checkpointing` recomputes blocks in the backward pass
    guidance    how many guidance scales are embedded beside the time
    clean_known  whether known frames are tokens of another sort: at sigma 0, and seeing each other alone
    """

    takes: ClassVar[tuple[str, ...]] = ("text", "audio", "pose")
    rows: ClassVar[str] = ""
    whole: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    entries: ClassVar[tuple[str, ...]] = ()
    audio_row: ClassVar[tuple[str, int]] = ("A", 0)
    layouts: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""
    causal: ClassVar[str] = ""
    over_teacher: ClassVar[bool] = False
    context_pass: ClassVar[bool] = True
    frame_sigma: ClassVar[bool] = False
    can_checkpoint: ClassVar[bool] = False
    first_frames: ClassVar[int] = 0
    lead: ClassVar[int] = 0
    past: ClassVar[int] = 0
    clean_known: ClassVar[bool] = False
    prediction: str = "velocity"
    reference: bool = True
    patch: int = 1
    guidance: int = 0

    @staticmethod
    def own_config(sizes: Mapping[str, int], stride: int, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG004
        """Keys of our config.json that the module takes beside Wan's: by the sizes of `rows`, or, where they do not determine them,
        those of another config.json."""
        return {}

    @staticmethod
    def input_channels(channels: int, stride: int, image_dim: int) -> tuple[int, ...]:
        """How many channels the module's input can have, for latents of so many: of Wan, the noisy ones, and these with reference
        and mask."""
        return channels, 2 * channels + (stride if image_dim else 1)

    @staticmethod
    def published_config(own: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG004
        """What the published config.json has beside Wan's keys, or of a `whole` kind all of it, of our own one."""
        return {}

    @missing
    def build(self, dims: Dims) -> nn.Module:
        """A freshly initialised module, which takes (composed latents [B, C', F, H, W], sigma [B], Conditions) -> raw output
        [B, C, F, H, W], where `run` does not say otherwise."""
        raise NotImplementedError

    def new(self, dims: Dims) -> Any:
        """`build`, and the module knows its kind as `kind`. UserError that names the user's file for what fails in it."""
        with in_users_file(self):
            net = self.build(dims)
        if not isinstance(net, nn.Module):
            raise UserError(f"{label(self)}.build: got {type(net).__name__}; it must return a torch.nn.Module")
        if not isinstance(net.__dict__.get("kind"), NetworkKind):
            net.kind = self  # pyright: ignore[reportArgumentType]
        if not hasattr(net, "_keep_in_fp32_modules"):
            net._keep_in_fp32_modules = ()  # pyright: ignore[reportArgumentType]
        return net

    def compose(self, x: Tensor, conditions: Conditions, known: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(x with the clean reference in the place of the known frames, the module's input made of it)."""
        x = write_reference(x, conditions, known)
        return x, x

    def run(
        self,
        net: Any,
        inputs: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        numbers: Sequence[int] | None = None,
        known: Sequence[int] = (),
    ) -> Tensor:
        """The module's raw output [B, C, F, H, W] of composed inputs at sigma, [B] or [B, F]. `numbers` of the frames in their
        stream, cut at `first_frames`; None: a whole clip, which begins and ends. `known`: the frames that are given."""
        return net(inputs, sigma, conditions)

    def denoise(
        self,
        net: Any,
        x: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        known: Sequence[int],
        numbers: Sequence[int] | None = None,
    ) -> Tensor:
        """x [B, C, F, H, W] at sigma, [B] or where the module takes it [B, F] -> x0 in fp32, the known frames as given; `numbers`
        as `run` has them. UserError for an output of another shape, a condition that is not given, and for what fails in a user's
        file."""
        for name in self.takes:
            if name in conditions.features or (name in BUILT_IN and name not in OF_IMAGE):
                continue
            fix = "give data.image an encoder of it" if name in OF_IMAGE else "put it into the data's Clips.features"
            raise UserError(f"condition '{name}': {label(self)} takes it, but it is not given; {fix}")
        x, inputs = self.compose(x, conditions, known)
        sigma = self.levels(sigma, x.shape[2], known)
        with in_users_file(self):
            out = self.run(net, inputs, sigma, conditions, numbers, known)
        if out.shape != x.shape:
            raise UserError(
                f"{label(self)}: wrong shape: its output is {list(out.shape)}, the latents are {list(x.shape)} "
                "[batch, channels, frames, height, width]; both must be equal"
            )
        return to_x0(out, x, sigma, conditions, self.prediction, known)

    def levels(self, sigma: Tensor, frames: int, known: Sequence[int]) -> Tensor:
        """sigma [B], [B, 1] or [B, F] as the module takes it: [B, F] with 0 at the known frames where these are clean tokens."""
        if not self.clean_known or not known:
            return sigma
        sigma = sigma.view(len(sigma), -1).repeat(1, frames if sigma.numel() == len(sigma) else 1)
        sigma[:, list(known)] = 0.0
        return sigma

    def numbered(self, numbers: Iterable[int], chunk_frames: int) -> tuple[int, ...] | None:
        """Numbers of latent frames in their stream, in chunks of so many, cut at `first_frames`, so that a compiled step meets few
        of them; None for a kind that reads all frames alike."""
        return tuple(min(number, self.first_frames) for number in numbers) if self.first_frames else None

    def anchor_distance(self, number: int, least: int) -> int | None:
        """How many latent frames ahead of the chunk that begins with frame `number` of a stream the anchors lie, at least so many;
        None for a kind without any."""
        return None

    def roll_anchors(self, anchors: Tensor, drawn: Tensor) -> Tensor:
        """Anchors like these [B, C, R, H, W] of the first latents of a stream [B, C, F, H, W]; UserError for a kind without any."""
        raise UserError(f"student.history.anchors_roll: {label(self)} has no anchors; set it to 0")

    def behind(self, conditions: Conditions, past: Tensor) -> Conditions:
        """The conditions of a clip behind a film whose last latents are `past` [B, C, past, H, W]; UserError where it reads none,
        or not of that size."""
        raise UserError(f"{label(self)} does not read the film before a clip; draw one clip")

    def student(self, net: Any, spec: Any) -> Any:
        """The causal student of this network; UserError where the kind has none."""
        if not self.causal:
            raise UserError(
                f"student.network: {label(self)} has no causal student of its own; give student.network.name=windowed"
            )
        module, _, name = self.causal.partition(":")
        return getattr(importlib.import_module(module), name)(net, spec)

    def start(self, net: Any) -> None:
        """Read what a fresh network does not start from at random; nothing by default."""

    def check(self) -> None:
        """UserError for sizes that cannot be."""

    def shallow(self, blocks: int = 1) -> "NetworkKind":
        """The same with its first `blocks` blocks, for a plan; itself where it has no more, or cannot be cut."""
        return self

    @property
    def period(self) -> int:
        """Blocks after which what they have repeats, for a plan that counts a few of them."""
        return 1

    def with_guidance(self, scales: int) -> "NetworkKind":
        """The kind with an embedding of so many guidance scales; UserError where it has none to offer."""
        raise UserError(f"student.guidance: {label(self)} has no embedding of {scales} guidance scales; remove it")

    def enable_checkpointing(self, net: Any, *function: Any) -> None:
        """Recompute blocks in the backward pass; UserError where the network cannot."""
        raise UserError(f"engine.checkpointing: {label(self)} has no gradient checkpointing; set it to false")

    def set_attention(self, net: Any, backend: str) -> None:
        """Choose the attention backend; ValueError where there is no choice."""
        raise ValueError("this student's network has no choice")

    def check_sequence(self, ranks: int, tokens: int) -> None:
        """UserError where so many ranks cannot share a sequence whose latent frames have so many tokens each."""
        raise UserError(f"engine.sequence_parallel: {label(self)} cannot share a sequence among ranks; set it to 1")

    def split_sequence(self, net: Any, group: SequenceGroup) -> None:
        """Share every sequence of the network with the ranks of the group; UserError where it cannot."""
        self.check_sequence(group.size, group.size)

    @property
    def kv_per_token(self) -> int:
        """Numbers that the context keeps of a token of a finished chunk; 0 where it keeps latents alone."""
        return 0

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_blocks` give out."""
        return 0

    def feature_blocks(self, net: Any) -> Sequence[nn.Module]:
        """Modules whose (first) output is tokens [B, F h w, feature_width], for the discriminator; UserError for none."""
        raise UserError(f"distill.method.gan: {label(self)} has no blocks to take features from; set it to 0")

    @property
    def num_blocks(self) -> int:
        """How many `feature_blocks` there are."""
        return 0

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Ends of the names of the linear maps that a LoRA changes; empty: it is trained whole."""
        return ()

    def shared_caches(self, net: Any) -> tuple[Any, ...]:
        """Objects of the network that copies over the same weights may share."""
        return ()


NETWORKS = Registry(
    kind="network",
    group="networks",
    entries={
        "wan": "teachers.networks.wan:NetworkConfig",
        "echomimic": "teachers.networks.echomimic:EchoMimicConfig",
        "flashhead": "teachers.networks.flashhead:FlashHeadConfig",  # before infinitetalk, whose telling name it has too
        "infinitetalk": "teachers.networks.infinitetalk:InfiniteTalkConfig",
        "s2v": "teachers.networks.s2v:S2VConfig",
        "longcat": "teachers.networks.longcat:LongCatConfig",
        "fantasytalking": "teachers.networks.fantasytalking:FantasyTalkingConfig",
        "stableavatar": "teachers.networks.stableavatar:StableAvatarConfig",
    },
    methods={"build": "def build(self, dims: Dims) -> torch.nn.Module"},
    base="teachers.networks.kind:NetworkKind",
)
"""The kinds of network that a teacher can be, the first without a name."""


def networks_in(module: nn.Module) -> Iterator[Any]:
    """The networks inside of a module (or itself): those that know their kind."""
    return (part for part in module.modules() if isinstance(part.__dict__.get("kind"), NetworkKind))


def write_reference(x: Tensor, conditions: Conditions, known: Sequence[int]) -> Tensor:
    """x [B, C, F, H, W] with the clean reference, where there is one, in the place of the known frames."""
    if conditions.reference is None or not known:
        return x
    x = x.clone()
    for frame in known:
        x[:, :, frame] = conditions.reference[:, :, 0].to(x)
    return x


def to_x0(
    out: Tensor, x: Tensor, sigma: Tensor, conditions: Conditions, prediction: str, known: Sequence[int]
) -> Tensor:
    """Raw network output [B, C, F, H, W] -> x0 in fp32, the known frames replaced by the reference."""
    if prediction == "velocity":
        x0 = flow.x0_from_velocity(x, out, sigma)
    else:
        assert conditions.reference is not None
        x0 = conditions.reference.float() + out.float()
    return write_reference(x0, conditions, known)


class AvatarTeacher(nn.Module):
    """The bidirectional denoiser over a whole clip; frame 0 is the reference, where one is given. Teacher and fake score alike, of
    any kind of network."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.net.kind.denoise(self.net, x, sigma, conditions, conditions.known)

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """x [B, C, F, H, W] at sigma [B] -> x0, frame 0 equal to the reference where there is one."""
        return self(x, sigma, conditions)

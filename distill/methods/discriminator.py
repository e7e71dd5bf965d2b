"""The discriminator of DMD's GAN term: small heads on hidden tokens of the fake score (DMD2 2405.14867, sec. 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teachers.conditions import Conditions
from teachers.networks.kind import AvatarTeacher, NetworkKind


class Discriminator(nn.Module):
    """One head for each of `blocks` of the fake score: its tokens [B, F*h*w, width] -> a logit for every generated token.

    The heads alone are its parameters: it learns on features that it does not change. `hidden` is the width of a head.
    """

    def __init__(self, width: int, blocks: Sequence[int], hidden: int):
        super().__init__()
        self.blocks = tuple(blocks)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in self.blocks
        )

    def forward(self, fake_score: AvatarTeacher, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Noisy clips x [B, C, F, H, W] at sigma [B] -> logits [B, heads, generated tokens], high where they look like data."""
        frames, start = x.shape[2], len(conditions.known)
        tokens = hidden_tokens(fake_score, self.blocks, x, sigma, conditions)
        logits = [head(hidden.float()).squeeze(2) for head, hidden in zip(self.heads, tokens, strict=True)]
        return torch.stack([logit.unflatten(1, (frames, -1))[:, start:].flatten(1) for logit in logits], dim=1)


def build_discriminator(network: NetworkKind) -> Discriminator:
    """For a fake score of this size, on the output of its middle block."""
    width = network.feature_width
    return Discriminator(width, (network.num_blocks // 2,), max(16, width // 4))


def hidden_tokens(
    fake_score: AvatarTeacher, blocks: Sequence[int], x: Tensor, sigma: Tensor, conditions: Conditions
) -> list[Tensor]:
    """The outputs of these feature blocks in a denoising pass, [B, F*h*w, width] each, with a graph where x asks for one."""
    net, kept = fake_score.net, {}
    taps = net.kind.feature_blocks(net)

    def tap(index: int):
        def hook(_module: nn.Module, _inputs: tuple, out: tuple) -> None:
            kept[index] = out[0] if isinstance(out, tuple) else out

        return taps[index].register_forward_hook(hook)

    handles = [tap(index) for index in blocks]
    try:
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            fake_score.denoise(x, sigma, conditions)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[index] for index in blocks]

"""The discriminator of DMD's GAN term: small heads on hidden tokens of the fake score (DMD2 2405.14867, sec. 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teachers.conditions import Conditions
from teachers.networks.kind import AvatarTeacher, NetworkKind


class Discriminator(nn.Module):
    """One head for each of `blocks` of the fake score: its tokens [B, F*h*w, width] -> a logit for every generated token.

    The heads alone are its parameters; whether the fake score learns with them is the method's to say (`gan_critic`).
    """

    def __init__(self, width: int, blocks: Sequence[int], hidden: int):
        super().__init__()
        self.blocks = tuple(blocks)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in self.blocks
        )

    def forward(
        self, fake_score: AvatarTeacher, x: Tensor, sigma: Tensor, conditions: Conditions, train: bool = False
    ) -> Tensor:
        """Noisy clips x [B, C, F, H, W] at sigma [B] -> logits [B, heads, generated tokens], high where they look like data. The
        features have a graph where x asks for one, or to `train` the fake score."""
        frames, start = x.shape[2], len(conditions.known)
        with torch.set_grad_enabled((train or x.requires_grad) and torch.is_grad_enabled()):
            tokens = hidden_tokens(fake_score, self.blocks, x, sigma, conditions)
        logits = [head(hidden.float()).squeeze(2) for head, hidden in zip(self.heads, tokens, strict=True)]
        return torch.stack([logit.unflatten(1, (frames, -1))[:, start:].flatten(1) for logit in logits], dim=1)


def build_discriminator(network: NetworkKind) -> Discriminator:
    """For a fake score of this size, on the outputs of two blocks: three quarters up and the last (of 30: numbers 21 and 29, as
    One-Forcing 2605.23458)."""
    width, last = network.feature_width, max(0, network.num_blocks - 1)
    blocks = sorted({max(0, 3 * network.num_blocks // 4 - 1), last})
    return Discriminator(width, blocks, max(16, width // 4))


def hidden_tokens(
    fake_score: AvatarTeacher, blocks: Sequence[int], x: Tensor, sigma: Tensor, conditions: Conditions
) -> list[Tensor]:
    """The outputs of these feature blocks in a denoising pass, [B, F*h*w, width] each."""
    net, kept = fake_score.net, {}
    taps = net.kind.feature_blocks(net)

    def tap(index: int):
        def hook(_module: nn.Module, _inputs: tuple, out: tuple) -> None:
            kept[index] = out[0] if isinstance(out, tuple) else out

        return taps[index].register_forward_hook(hook)

    handles = [tap(index) for index in blocks]
    try:
        fake_score.denoise(x, sigma, conditions)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[index] for index in blocks]

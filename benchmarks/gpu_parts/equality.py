"""The same small networks and codecs on the CPU and on the device: how far apart, relative to the size of what they give."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from distill.compose import RECIPES
from distill.methods.rollout import rollout
from distill.pipeline.generate import stream_noise
from distill.planning.job import batch_on, job_of, networks_on
from distill.recipe import load_recipe
from students.serving.optimize import cast
from teachers.codecs.taehv import TAEHV
from teachers.codecs.wan_vae import WanVAE

FP32 = 1e-4
"""Of the norm, without TF32."""
BF16 = 2.0
"""On the device no further from the CPU's fp32 than so many times the CPU's own bf16."""


def equality(device: torch.device) -> dict[str, Any]:
    """By case the distance in fp32 and in bf16, what is allowed of each, and whether both are within it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(0)
            return {name: _compare(*case, device) for name, case in _cases().items()}
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


Run = Callable[[Any, torch.device], Tensor]
"""A part on a device -> what it gives."""


def _cases() -> dict[str, tuple[nn.Module, Run, bool]]:
    """By name: the part, how it runs, and whether it is served in bf16 too."""
    recipe = load_recipe(RECIPES / "livetalk.yaml", ["size=tiny", "run_dir=nowhere"])
    job = replace(job_of(recipe), half=frozenset())
    spec, size = job.spec, job.at_once
    nets = networks_on(job, "distill", "cpu")
    for net in nets.values():
        nn.init.xavier_uniform_(net.net.proj_out.weight)  # zero before training
    batch, noise = batch_on(job, "clips", "cpu"), stream_noise(spec, 0, "equality")(torch.arange(size))
    latents = torch.randn(1, 16, 4, 4, 6)
    assert batch.x0 is not None
    x0, conditions = batch.x0, batch.conditions

    def teacher(net: Any, device: torch.device) -> Tensor:
        return net.denoise(x0.to(device), torch.full((size,), 0.7, device=device), conditions.to(device))

    def student(net: Any, device: torch.device) -> Tensor:
        return rollout(net, conditions.to(device), lambda chunk, step: noise(chunk, step).to(device))

    def decode(codec: Any, device: torch.device) -> Tensor:
        state, frames = None, []
        for part in latents.to(device).split(2, dim=2):
            pixels, state = codec.decode_chunk(part, state)
            frames.append(pixels)
        return torch.cat(frames, dim=2)

    return {
        "teacher forward": (nets["teacher"].eval(), teacher, True),
        "student, chunk by chunk": (nets["student"].eval(), student, True),
        "Wan VAE decode": (WanVAE(AutoencoderKLWan(base_dim=4, num_res_blocks=1)).eval(), decode, False),
        "TAEHV decode": (TAEHV((16, 8, 8, 8), 8).eval(), decode, False),
    }


def _compare(part: nn.Module, run: Run, half: bool, device: torch.device) -> dict[str, Any]:
    cpu = torch.device("cpu")
    exact = run(part.to(cpu), cpu)

    def distance(where: torch.device) -> float:
        return float((run(part.to(where), where).cpu().float() - exact).norm() / exact.norm())

    found: dict[str, Any] = {"fp32": distance(device), "fp32_allowed": FP32}
    if half:
        cast(part.net, torch.bfloat16)
        found |= {"bf16": distance(device), "bf16_allowed": BF16 * distance(cpu)}
    within = found["fp32"] <= FP32 and (not half or found["bf16"] <= found["bf16_allowed"])
    return {**found, "equal": bool(within and exact.std() > 0)}

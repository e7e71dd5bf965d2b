"""Peak memory of a DMD step: this trainer against Self-Forcing's way of holding it, side by side, each in its own process.

    python benchmarks/memory.py [--tiny] [--threads 1] [OVERRIDE ...]

Both train the same student and fake score under the same teacher, on the same conditions and noise: recipes/livetalk.yaml at
size=tiny, widened until tensors weigh (`WIDER`; --tiny leaves it as it is), every earlier chunk in sight as in Self-Forcing's
training, blocks checkpointed in both, two updates of each role. Counted are the bytes of all tensors alive, by a dispatch mode
(`Alive`), so the interpreter and libraries do not matter. A script, not a test.

What the other way is (read in Self-Forcing's trainer/distillation.py, model/dmd.py, pipeline/self_forcing_training.py):

fp32        three whole networks in fp32: FSDP keeps them so, the frozen teacher too
gradients   of one role stay until its next update begins: they are alive while the other role is trained
buffers     keys and values of the whole clip, made before the rollout and kept while its clip is scored
clones      the context is copied when a chunk is added, and the graph of each chunk keeps its copy: how a cache that gradients
            pass through and that is moved has to be held. Theirs is written in place, which checkpointing lets pass
graph       teacher and fake score run with gradient, and what they keep stays until the loss is made. In Self-Forcing's own code
            they do not
"""

import argparse
import functools
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDER = (
    "data.world.resolution=128",
    "data.world.num_frames=81",
    *("teacher.network.num_heads=12", "teacher.network.head_dim=64", "teacher.network.ffn_dim=2048"),
    *("teacher.network.num_layers=8", "teacher.network.freq_dim=64"),
    *("base.network.num_heads=6", "base.network.head_dim=64", "base.network.ffn_dim=1024", "base.network.freq_dim=64"),
)
WAYS = {  # name -> habits of the other way; None is this trainer
    "this trainer": None,
    "the issue's Self-Forcing": ("fp32", "gradients", "buffers", "clones", "graph"),
    "without a graph under the scores": ("fp32", "gradients", "buffers", "clones"),
    "without clones": ("fp32", "gradients", "buffers", "graph"),
    "with the teacher in bf16": ("gradients", "buffers", "clones", "graph"),
    "Self-Forcing's own code": ("fp32", "gradients", "buffers"),
}
MIB = 2**20


class Alive(TorchDispatchMode):
    """Bytes of all storages made under it that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.make_role(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def make_role(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.held:
            self.held[address] = weakref.ref(storage, functools.partial(self.forget, address, size))
            self.now += size

    def forget(self, address: int, size: int, _: weakref.ref) -> None:
        del self.held[address]
        self.now -= size


def make(recipe, spec, fp32: bool) -> dict[str, Any]:
    """Student, fake score and frozen teacher with random weights."""
    from students.networks.causal_wan import CausalWan
    from students.serving.optimize import cast
    from teachers.networks.kind import AvatarTeacher

    def network(config):
        net: Any = config.new(spec.dims)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        return net

    torch.manual_seed(0)
    student, fake = network(recipe.base.network), network(recipe.base.network)
    teacher = network(recipe.teacher.network)
    if not fp32 and recipe.teacher.precision == "bf16":
        cast(teacher, torch.bfloat16)
    if recipe.engine.checkpointing:
        student.enable_gradient_checkpointing()
        fake.enable_gradient_checkpointing()
    frozen = AvatarTeacher(teacher).eval().requires_grad_(False)
    return {"student": CausalWan(student, spec), "fake_score": AvatarTeacher(fake), "teacher": frozen}


def some_conditions(spec, batch: int):
    from teachers.conditions import Conditions

    rng = torch.Generator().manual_seed(1)
    frames, (channels, height, width) = spec.horizon_frames, spec.latent_size
    return Conditions(
        text=torch.randn(batch, spec.text.max_tokens, spec.text.dim, generator=rng),
        audio=torch.randn(batch, frames, spec.codec.stride, spec.audio_dim, generator=rng),
        reference=torch.randn(batch, channels, 1, height, width, generator=rng),
    )


def ours(recipe, method, roles, batch, updates: int) -> Tensor:
    """This trainer: two updates of each role."""
    import tempfile

    from distill.training.config import EngineConfig
    from distill.training.engines.engine import Engine
    from distill.training.trainer import Trainer

    trained = {name: roles[name] for name in ("student", "fake_score")}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            Engine(EngineConfig(precision="fp32")), recipe.distill.train, trained, "student", Path(folder)
        )
        for _ in range(updates):
            for role in ("student", "fake_score"):
                metrics = trainer.update(role, method, lambda _: batch, 0, updates)
    return metrics["fake_score/loss"]


class Theirs:
    """Self-Forcing's step with its habits, over our networks."""

    def __init__(self, method, roles, batch, habits):
        self.method, self.roles, self.batch, self.habits = method, roles, batch, habits
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def run(self, recipe, updates: int) -> Tensor:
        """Two updates of each role, generator first."""
        config = recipe.distill.train
        nets = {name: self.roles[name] for name in ("student", "fake_score")}
        optimizers = {
            name: torch.optim.AdamW(
                net.parameters(), lr=config.optimizers[name].lr, betas=config.optimizers[name].betas
            )
            for name, net in nets.items()
        }
        shadow = {name: p.detach().float().clone() for name, p in nets["student"].named_parameters()}
        for update in range(updates):
            for role, net in nets.items():
                optimizers[role].zero_grad(set_to_none=True)
                for name, other in nets.items():
                    other.requires_grad_(name == role)
                rng = torch.Generator().manual_seed(update)
                loss = self.student(rng) if role == "student" else self.fake_score(rng)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), config.optimizers[role].clip)
                optimizers[role].step()
                if "gradients" not in self.habits:
                    optimizers[role].zero_grad(set_to_none=True)
                if role == "student":
                    for name, p in net.named_parameters():
                        shadow[name].lerp_(p.detach().float(), 1 - config.ema_decay)
        return loss.detach()

    def rollout(self, rng: torch.Generator) -> Tensor:
        """The student's clip, gradient at the last step of each chunk, the context in buffers as long as the clip."""
        from distill.methods.rollout import draw_noise
        from teachers import flow
        from teachers.networks.kind import to_x0
        from teachers.networks.spans import rotate
        from teachers.networks.wan import with_reference

        student, given = self.roles["student"], self.batch.conditions
        spec, net, size = student.spec, student.net, given.text.shape[0]
        n, tokens = spec.chunk_frames, spec.token_grid[0] * spec.token_grid[1]
        noise, grad = draw_noise(student, size, rng), torch.is_grad_enabled()
        shape = (size, spec.horizon_frames * tokens, spec.network.num_heads, spec.network.head_dim)
        self.buffers = [(torch.zeros(shape), torch.zeros(shape)) for _ in net.blocks]

        def call(chunk, x, sigma, part):
            known = part.known if chunk == 0 else ()
            x, inputs = with_reference(x, part, known)
            level, seen = torch.full((size,), sigma), chunk * n * tokens
            past = [(keys[:, :seen], values[:, :seen]) for keys, values in self.buffers] if chunk else None
            out, new = net(inputs, level, part.text, part.audio, past=past, past_frames=chunk * n)
            return to_x0(out, x, level, part, net.prediction, known), new

        clip = []
        for chunk in range(spec.num_chunks):
            part, x = given.frames(chunk * n, (chunk + 1) * n), noise(chunk, 0)
            for step, sigma in enumerate(spec.sigmas):
                last = step == len(spec.sigmas) - 1
                with torch.set_grad_enabled(grad and last):
                    x0, _ = call(chunk, x, sigma, part)
                x = x0 if last else flow.add_noise(x0, noise(chunk, step + 1), spec.sigmas[step + 1])
            clip.append(x)
            with torch.no_grad():
                _, new = call(chunk, x.detach(), spec.history.level, part)
                table = net.rope_table(chunk * n, n, *spec.token_grid)
                self.store(slice(chunk * n * tokens, (chunk + 1) * n * tokens), [(rotate(k, table), v) for k, v in new])
        return torch.cat(clip, dim=2)

    def store(self, where: slice, new: list[tuple[Tensor, Tensor]]) -> None:
        if "clones" in self.habits:
            self.buffers = [(keys.clone(), values.clone()) for keys, values in self.buffers]
        for buffers, found in zip(self.buffers, new, strict=True):
            for buffer, value in zip(buffers, found, strict=True):
                buffer[:, where] = value

    def noisy(self, x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        from teachers import flow

        config = self.method.config
        sigma = flow.shift_sigma(torch.rand(x0.shape[0], generator=rng), config.shift)
        sigma = sigma.clamp(config.sigma_min, config.sigma_max)
        return flow.add_noise(x0, torch.randn(x0.shape, generator=rng), sigma), sigma

    def student(self, rng: torch.Generator) -> Tensor:
        from distill.methods import losses

        x0, given, scale = self.rollout(rng), self.batch.conditions, self.method.config.guidance.text
        if "buffers" not in self.habits:
            self.buffers = []
        with torch.set_grad_enabled("graph" in self.habits):
            x, sigma = self.noisy(x0, rng)
            fake = self.roles["fake_score"].denoise(x, sigma, given)
            full = self.roles["teacher"].denoise(x, sigma, given)
            nothing = self.roles["teacher"].denoise(x, sigma, given.drop("text", "audio"))
            gradient = losses.dmd_gradient(x0, nothing + scale * (full - nothing), fake)
        return 0.5 * torch.nn.functional.mse_loss(x0.double(), (x0.double() - gradient.double()).detach())

    def fake_score(self, rng: torch.Generator) -> Tensor:
        from distill.methods import losses

        with torch.no_grad():
            x0 = self.rollout(rng)
        if "buffers" not in self.habits:
            self.buffers = []
        x, sigma = self.noisy(x0, rng)
        config, x0_hat = self.method.config, self.roles["fake_score"].denoise(x, sigma, self.batch.conditions)
        return losses.denoising(x0_hat, x0, sigma, config.loss_power, config.loss_floor)


def measure(way: str, words: list[str], updates: int = 2) -> dict[str, float]:
    """Peak MiB of one way, MiB of the three networks, the fake score's last loss."""
    from distill.compose import RECIPES
    from distill.methods import Batch
    from distill.methods.dmd import build
    from distill.recipe import load_recipe, spec_of
    from students.history import History

    words = ["teacher.path=nowhere/tiny/teacher", "size=tiny", "distill.method.exit_step=last", *words]
    recipe, habits = load_recipe(RECIPES / "livetalk.yaml", words), WAYS[way]
    assert recipe.base is not None
    spec = replace(spec_of(recipe), history=History(sinks=0, window=None), network=recipe.base.network)
    with Alive() as alive:
        roles = make(recipe, spec, habits is not None and "fp32" in habits)
        networks = alive.now
        method = build(recipe.distill.method, roles, None)
        batch = Batch(conditions=some_conditions(spec, recipe.distill.train.batch_size))
        if habits is None:
            loss = ours(recipe, method, roles, batch, updates)
        else:
            loss = Theirs(method, roles, batch, habits).run(recipe, updates)
    return {"peak": alive.peak / MIB, "networks": networks / MIB, "loss": float(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS)
    asked, words = parser.parse_known_args()
    torch.set_num_threads(asked.threads)
    if asked.way:
        print(json.dumps(measure(asked.way, [*(() if asked.tiny else WIDER), *words])))
        return
    found = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, "--way", way, *sys.argv[1:]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{way}: {done.stderr[-2000:]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
    mine = found["this trainer"]["peak"]
    print("| | peak MiB | this trainer over it | networks MiB | fake score's loss |\n|---|---|---|---|---|")
    for way, facts in found.items():
        print(
            f"| {way} | {facts['peak']:.1f} | {mine / facts['peak']:.2f} | {facts['networks']:.1f} | {facts['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()

"""LoRA roles: one set of frozen weights, the arithmetic of three networks, exports that agree, a plan that knows."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.order import batch_rows
from distill.methods import Batch, dmd
from distill.training.config import EngineConfig, OptimizerConfig, TrainConfig
from distill.training.engines.engine import Engine
from distill.training.loop import train
from distill.training.lora import LoraRoles, adapt, make_backbone, trained
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from students.networks.causal_wan import CausalWan
from teachers.files import save_tensors
from teachers.networks.kind import AvatarTeacher
from tests.support.processes import run_ranks
from tests.support.tiny import (
    Ranks,
    a_train_set,
    make_net,
    make_spec,
    randn,
    some_conditions,
    some_latents,
)

FULL = ("patch_embedding", "audio_proj", "audio_cond_projs")
SMALL: dict[str, Any] = {"horizon_frames": 4}
CONFIG = LoraRoles(rank=3, alpha=1.5, full=FULL)
POOL = a_train_set(frames=4)
METHOD = dmd.Config(fake_updates=2, warmup=0, exit_step="random")


def a_backbone(seed: int = 0):
    return make_backbone(make_net(seed), "fp32")


def roles_over(backbone, config: LoraRoles = CONFIG) -> dict[str, nn.Module]:
    spec = make_spec(**SMALL)
    student = CausalWan(adapt(backbone, config, 0, "student"), spec)
    return {"student": student, "fake_score": AvatarTeacher(adapt(backbone, config, 0, "fake_score"))}


def stir(net: nn.Module, seed: int = 3) -> nn.Module:
    """Non-zero B, so that the adapter counts; the modules of `full` are moved too."""
    with torch.no_grad():
        for i, p in enumerate(trained(net).values()):
            p.add_(0.2 * randn(*p.shape, seed=seed + i))
    return net


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def train_config(**changes) -> TrainConfig:
    optimizer = OptimizerConfig(lr=3e-3, betas=(0.0, 0.99), weight_decay=0.01, clip=1.0, final=1.0)
    facts = {"num_steps": 3, "batch_size": 2, "log_every": 1, "checkpoint_every": 1, "ema_decay": 0.8}
    return TrainConfig(**(facts | {"optimizers": {"student": optimizer, "fake_score": optimizer}} | changes))


def batches_of(size: int = 2, until: int | None = None, engine: Any = None):
    def batches(position: int) -> Batch:
        if position == until:
            raise KeyboardInterrupt
        ranks = (engine.rank, engine.world_size) if engine else (0, 1)
        return POOL.batch(batch_rows(len(POOL), size, position, 0, *ranks), torch.device("cpu"))

    return batches


def run(folder: Path, until: int | None = None, engine=None, checkpointing: bool = False, **changes) -> SimpleNamespace:
    folder.mkdir(parents=True, exist_ok=True)
    backbone, engine = a_backbone(), engine or Ranks()
    before, roles = snapshot(backbone), roles_over(backbone)
    for role in roles.values() if checkpointing else ():
        role.net.enable_gradient_checkpointing()
    teacher = AvatarTeacher(backbone).eval()
    method = dmd.build(METHOD, {**roles, "teacher": teacher})
    config = train_config(**changes)
    trainer = Trainer(engine, config, roles, "student", folder)
    log = MetricsLog(folder / "metrics.jsonl", engine.is_main)
    batches = batches_of(config.batch_size, until, engine)
    train(trainer, method, batches, stage="distill", seed=0, log=log)
    return SimpleNamespace(trainer=trainer, backbone=backbone, before=before, roles=roles, teacher=teacher)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {name: x.clone() for name, _, _, x in trainer.pieces()}


# One backbone ----------------------------------------------------------------------------------------------------------


def test_frozen_weights_are_one_set_of_tensors():
    backbone = a_backbone()
    roles, own = roles_over(backbone), dict(backbone.named_parameters())
    copies = {f"{name}.{key}" for name in FULL for key, _ in backbone.get_submodule(name).named_parameters()}
    for role in roles.values():
        held = {name.replace(".base_layer", ""): p for name, p in role.net.named_parameters() if not p.requires_grad}
        assert set(held) == set(own) - copies
        assert all(p.data_ptr() == own[name].data_ptr() for name, p in held.items())
    alive = {p.data_ptr(): p.numel() for net in (backbone, *roles.values()) for p in net.parameters()}
    learned = [sum(p.numel() for p in trained(role).values()) for role in roles.values()]
    assert sum(alive.values()) == sum(p.numel() for p in own.values()) + sum(learned)
    names = {n for role in roles.values() for n, p in role.net.named_parameters() if p.data_ptr() not in alive}
    assert not names
    rope_table = {id(net._rope_cache) for net in (backbone, *(role.net for role in roles.values()))}
    assert len(rope_table) == 1


def test_a_fresh_adapter_changes_nothing_and_is_a_function_of_seed_and_role():
    backbone, plain = a_backbone(), make_net(0)
    roles, given = roles_over(backbone), some_conditions(frames=4)
    x, sigma = some_latents(frames=4), torch.tensor([0.3, 0.8])
    expected = AvatarTeacher(plain).denoise(x, sigma, given)
    assert torch.equal(AvatarTeacher(backbone).denoise(x, sigma, given), expected)
    assert torch.equal(roles["fake_score"].denoise(x, sigma, given), expected)
    levels = sigma.view(2, 1).expand(2, 2)
    ours, theirs = (
        s.denoise_clip(x, levels, given, x) for s in (roles["student"], CausalWan(plain, make_spec(**SMALL)))
    )
    assert torch.equal(ours, theirs)
    state = torch.random.get_rng_state()
    again, other = (trained(adapt(backbone, CONFIG, seed, "student")) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    first, score = trained(roles["student"].net), trained(roles["fake_score"].net)
    downs = [name for name in first if name.endswith("lora_A.weight")]
    assert len(downs) == 2 * 10  # ten matrices a block
    for name in downs:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], score[name])
        bound = first[name].shape[1] ** -0.5
        assert 0.7 * bound < first[name].abs().max() < bound


def test_an_adapter_changes_its_own_role_alone():
    backbone, given = a_backbone(), some_conditions(frames=4)
    roles, x, sigma = roles_over(backbone), some_latents(frames=4), torch.tensor([0.3, 0.8])
    teacher = AvatarTeacher(backbone)
    before = teacher.denoise(x, sigma, given)
    stir(roles["student"].net)
    assert torch.equal(roles["fake_score"].denoise(x, sigma, given), before)
    stir(roles["fake_score"].net)
    assert torch.equal(teacher.denoise(x, sigma, given), before)
    assert not torch.equal(roles["fake_score"].denoise(x, sigma, given), before)


# The same arithmetic as three networks ---------------------------------------------------------------------------------


class Written(nn.Module):
    """W x + b + alpha / rank * B A x, as the paper writes it."""

    def __init__(self, linear: nn.Linear, down: Tensor, up: Tensor, scale: float):
        super().__init__()
        self.frozen, self.scale = [linear.weight.detach(), linear.bias.detach()], scale
        self.A, self.B = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        return linear(x, *self.frozen) + self.scale * linear(linear(x, self.A), self.B)

    weight = property(lambda self: self.frozen[0])


def unshared(adapted, backbone) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A deep copy of the backbone with written adapters of the same values; what is trained of it, by stored name."""
    net, values, learned = copy.deepcopy(backbone).requires_grad_(False), trained(adapted), {}
    for name, p in values.items():
        module, _, rest = name.partition(".lora_A.")
        if rest:
            parent, _, leaf = module.rpartition(".")
            made = Written(net.get_submodule(module), p, values[f"{module}.lora_B.weight"], CONFIG.alpha / CONFIG.rank)
            holder = net.get_submodule(parent)
            holder.add_module(leaf, made)
            learned |= {name: made.A, f"{module}.lora_B.weight": made.B}
        elif ".lora_B." not in name:
            learned[name] = net.get_parameter(name).requires_grad_(True)
            learned[name].data.copy_(p)
    return net, learned


def test_a_dmd_step_is_that_of_three_networks_with_adapters_of_their_own(tmp_path):
    """Two steps of the cadence, by hand on deep copies: loss, backward, clipped norm, AdamW."""
    backbone = a_backbone()
    roles = roles_over(backbone)
    for i, role in enumerate(roles.values()):
        stir(role.net, seed=40 * i)
    nets, learned = {}, {}
    for name, role in roles.items():
        nets[name], learned[name] = unshared(role.net, backbone)
    apart = {
        "student": CausalWan(nets["student"], make_spec(**SMALL)),
        "fake_score": AvatarTeacher(nets["fake_score"]),
        "teacher": AvatarTeacher(copy.deepcopy(backbone)),
    }
    trainer = Trainer(Ranks(), train_config(), roles, "student", tmp_path)
    method = dmd.build(METHOD, {**roles, "teacher": AvatarTeacher(backbone)})
    written = dmd.build(METHOD, apart)
    config = trainer.config.optimizers["student"]
    optimizers = {
        name: torch.optim.AdamW(params.values(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True)
        for name, params in learned.items()
    }
    position, start = 0, {name: {k: p.detach().clone() for k, p in params.items()} for name, params in learned.items()}
    for step in range(2):
        for role in method.roles_to_update(step):
            metrics = trainer.update(role, method, batches_of(), 0, 10)
            for name, params in learned.items():
                for p in params.values():
                    p.requires_grad_(name == role)
            rngs = [
                trainer.engine.generator(0, "loss", position),
                trainer.engine.generator(0, "shared", position, shared=True),
            ]
            loss = written.loss(role, batches_of()(position), *rngs)
            loss.value.backward()
            norm = nn.utils.clip_grad_norm_(learned[role].values(), config.clip)
            optimizers[role].step()
            optimizers[role].zero_grad()
            assert float(metrics[f"{role}/grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
            assert float(norm) > 1e-3
            position += 1
    for name, role in roles.items():
        ours = trained(role.net)
        assert set(ours) == set(learned[name])
        for key, p in ours.items():
            torch.testing.assert_close(p, learned[name][key], rtol=1e-6, atol=1e-6)
        moved = [key for key, p in ours.items() if (p - start[name][key]).abs().max() > 1e-3]
        assert len(moved) == len(ours), "every trained tensor moves"


@pytest.mark.parametrize("objective", ["both", "through"])
def test_checkpointed_blocks_give_equal_gradients_with_two_adapters_in_one_graph(objective):
    """`both`: one backward over student and fake score; `through`: the student's loss goes through the fake score's adapter."""
    gradients = []
    for checkpointing in (False, True):
        backbone = a_backbone()
        roles = roles_over(backbone)
        for i, role in enumerate(roles.values()):
            stir(role.net, seed=40 * i)
            if checkpointing:
                role.net.enable_gradient_checkpointing()
        given, x, sigma = some_conditions(frames=4), some_latents(frames=4), torch.tensor([0.3, 0.8])
        x0 = roles["student"].denoise_clip(x, sigma.view(2, 1).expand(2, 2), given, x)
        other = roles["fake_score"].denoise(x0 if objective == "through" else x0.detach(), sigma, given)
        with torch.no_grad():
            AvatarTeacher(backbone).denoise(x, sigma, given)
        (x0.square().mean() + (other - x).square().mean()).backward()
        params = {f"{name} {key}": p for name, role in roles.items() for key, p in trained(role.net).items()}
        gradients.append({key: p.grad for key, p in params.items()})
        assert all(p.grad is None for p in backbone.parameters())
    plain, checkpointed = gradients
    assert all(g is not None and g.abs().max() > 0 for g in plain.values())
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


# Training ---------------------------------------------------------------------------------------------------------------


def test_training_leaves_the_backbone_bit_for_bit_and_keeps_adapters_alone(tmp_path):
    done = run(tmp_path)
    after = snapshot(done.backbone)
    assert all(torch.equal(done.before[name], after[name]) for name in done.before)
    given, x, sigma = some_conditions(frames=4), some_latents(frames=4), torch.tensor([0.3, 0.8])
    plain = AvatarTeacher(make_net(0))
    assert torch.equal(done.teacher.denoise(x, sigma, given), plain.denoise(x, sigma, given))
    learned = {name for name, p in done.roles["student"].named_parameters() if p.requires_grad}
    assert set(done.trainer.ema.shadow) == learned
    stored = {name.split("/", 2)[2] for name in everything(done.trainer) if name.startswith("student/")}
    assert stored == learned
    assert all(".lora_" in name or name.startswith(tuple(f"net.{module}" for module in FULL)) for name in learned)
    assert set(done.trainer.averaged()) == learned


def test_optimizer_and_gradients_are_a_tenth_of_full_training(tmp_path):
    """Bytes of tensors, on a network 256 wide: a rank is small beside it."""

    def size(roles: dict) -> int:
        trainer = Trainer(Ranks(), train_config(), roles, "student", tmp_path)
        for name, role in roles.items():
            trainer._require_grad(name)
            held, given = trainer.held[name], some_conditions(frames=4)
            x, sigma = some_latents(frames=4), torch.tensor([0.3, 0.8])
            if name == "student":
                value = role.denoise_clip(x, sigma.view(2, 1).expand(2, 2), given, x).square().mean()
            else:
                value = role.denoise(x, sigma, given).square().mean()
            held.backward(value, True)
        trainer._require_grad(*roles)
        found = [p.grad for role in roles.values() for p in role.parameters() if p.grad is not None]
        for held in trainer.held.values():
            held.step(1e-3)
            found += [x for state in held.optimizer.state.values() for x in state.values()]
        return sum(x.numel() * x.element_size() for x in found)

    spec = make_spec(**SMALL)
    wide = {"num_heads": 4, "head_dim": 64, "ffn_dim": 1024}
    backbone = make_backbone(make_net(0, **wide), "fp32")
    full = {"student": CausalWan(make_net(0, **wide), spec), "fake_score": AvatarTeacher(make_net(0, **wide))}
    ours, theirs = size(roles_over(backbone, LoraRoles(rank=8, full=FULL))), size(full)
    assert 0.01 * theirs < ours <= 0.1 * theirs


@pytest.mark.parametrize("position", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_never_killed(tmp_path, position):
    """Stopped before batch 4 (step 2 of 3) or the last; checkpointing on, as the recipe has it."""
    whole = everything(run(tmp_path / "whole", checkpointing=True).trainer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=position, checkpointing=True)
    resumed = everything(run(tmp_path / "cut", checkpointing=True).trainer)
    assert set(whole) == set(resumed)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_bf16_backbone_fp32_adapters(tmp_path):
    """The frozen weights are held in bf16, what is trained in fp32; a forward under autocast, validation included."""
    backbone = make_backbone(make_net(0), "bf16")
    roles = roles_over(backbone)
    assert backbone.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert {p.dtype for role in roles.values() for p in trained(role.net).values()} == {torch.float32}

    class Narrow(Ranks):
        def autocast(self):
            return torch.autocast("cpu", dtype=torch.bfloat16)

    method = dmd.build(METHOD, {**roles, "teacher": AvatarTeacher(backbone)})
    engine = Narrow()
    trainer = Trainer(engine, train_config(num_steps=1, validate_every=1), roles, "student", tmp_path)
    given = some_conditions(frames=4)

    def validate() -> dict[str, float]:
        with torch.inference_mode():
            levels = torch.full((2, 2), 0.5)
            x0 = roles["student"].denoise_clip(some_latents(frames=4), levels, given, some_latents(frames=4))
        return {"score": float(x0.square().mean())}

    log = MetricsLog(tmp_path / "metrics.jsonl")
    train(trainer, method, batches_of(), stage="distill", seed=0, log=log, validate=validate)
    row = next(row for row in log.rows() if "student/grad_norm" in row)
    assert 0 < row["student/grad_norm"] < float("inf")
    assert {x.dtype for x in trainer.ema.shadow.values()} == {torch.float32}


def worker(folder: Path) -> None:
    """One of two ranks."""
    engine = Engine(EngineConfig(kind="ddp", precision="fp32"))
    done = run(folder / "two", engine=engine, num_steps=1)
    same = all(torch.equal(done.before[name], p) for name, p in done.backbone.named_parameters())
    engine.is_main = True  # what this rank would store
    save_tensors(
        folder / f"rank{engine.rank}.safetensors", {**everything(done.trainer), "backbone": torch.tensor(same)}
    )
    engine.close()


def test_two_ranks_keep_one_adapter(tmp_path):
    from safetensors.torch import load_file

    run_ranks(__file__, tmp_path, 2)
    one, two = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert bool(one["backbone"])
    assert bool(two["backbone"])
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    alone = everything(run(tmp_path / "one", num_steps=1).trainer)
    apart = [name for name, x in alone.items() if "weight/" in name and not torch.equal(one[name], x)]
    assert apart, "two ranks see other rows than one"

"""LoRA roles: one set of frozen weights, the arithmetic of three networks, exports that agree, a plan that knows."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.commands import plan as command
from distill.compose import RECIPES
from distill.data.order import batch_rows
from distill.methods import Batch, dmd
from distill.pipeline.stages import Pipeline
from distill.planning.estimate import job_of, make_plan, peak_bytes, rank_bytes, suggest_fix
from distill.recipe import load_recipe, to_dict
from distill.training import lora
from distill.training.config import OptimizerConfig, TrainConfig
from distill.training.engine import Engine, EngineConfig
from distill.training.loop import Trainer, train
from distill.training.lora import LoraRoles, adapt, make_backbone, trained
from distill.training.metrics_log import MetricsLog
from students.networks.causal_wan import CausalWan
from students.weights.adapter import Base, digest, fold, read_adapter
from students.weights.checkpoint import Bundle, load_student, save_student
from teachers.config import convert
from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.networks.kind import AvatarTeacher
from tests.support.processes import run_ranks
from tests.support.tiny import (
    CHANNELS,
    Ranks,
    a_bundle,
    a_train_set,
    make_net,
    make_spec,
    randn,
    randomise,
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
    return {name: x.clone() for name, x in trainer.tensors()}


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


@pytest.mark.parametrize("position", [4, 8])
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


# Export -----------------------------------------------------------------------------------------------------------------


def a_run(folder: Path) -> tuple[CausalWan, Bundle, LoraRoles]:
    """A trained student over a base on the disk (as a stage leaves it), its adapter's file, and a bundle of the merged student."""
    bundle = a_bundle(prediction="velocity", **SMALL)
    net = randomise(make_net(0), 5).requires_grad_(False)
    save_tensors(folder / "base.safetensors", net.state_dict())
    student = CausalWan(stir(adapt(net, CONFIG, 0, "student")), make_spec(**SMALL))
    save_tensors(folder / "adapter.safetensors", {name: p.detach() for name, p in trained(student.net).items()})
    merged = copy.deepcopy(net)
    fold(merged, CONFIG.adapter({name: p.detach() for name, p in trained(student.net).items()}), folder)
    return student, replace(bundle, student=CausalWan(merged, bundle.spec)), CONFIG


def exported(folder: Path) -> tuple[CausalWan, Bundle, Base]:
    student, bundle, config = a_run(folder)
    base = Base(path=folder / "base.safetensors", ours=True, digest=digest(folder / "base.safetensors", None))
    adapter = config.adapter({name: p.detach() for name, p in trained(student.net).items()})
    save_student(folder / "merged", bundle, "# A card\n")
    save_student(folder / "adapter", bundle, "# A card\n", (adapter, base))
    return student, bundle, base


def clip_of(student: CausalWan) -> Tensor:
    given, x = some_conditions(frames=4), some_latents(frames=4)
    with torch.no_grad():
        return student.denoise_clip(x, torch.tensor([[0.9, 0.3], [0.2, 0.6]]), given, x)


def test_merged_and_adapter_exports_are_the_trained_student(tmp_path):
    student, _, base = exported(tmp_path)
    merged, adapter = (load_student(tmp_path / name) for name in ("merged", "adapter"))
    expected = clip_of(student)
    ours, theirs = clip_of(merged.student), clip_of(adapter.student)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    plain = CausalWan(make_net(0), make_spec(**SMALL))
    plain.net.load_state_dict(load_base(base))
    assert (clip_of(plain) - expected).abs().max() > 0.1
    assert merged.spec == adapter.spec
    assert merged.fingerprint == adapter.fingerprint
    assert not any(p.requires_grad for p in adapter.student.parameters())
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "codec.safetensors",
        "spec.json",
        "text",
    }
    assert json.loads((tmp_path / "adapter" / "spec.json").read_text())["base"]["path"] == str(base.path)
    assert "base" not in json.loads((tmp_path / "merged" / "spec.json").read_text())


def load_base(base: Base) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(base.path)


def test_peft_itself_reads_the_adapter(tmp_path):
    from peft import PeftModel

    student, _, base = exported(tmp_path)
    net = make_net(0)
    net.load_state_dict(load_base(base))
    theirs = PeftModel.from_pretrained(net, str(tmp_path / "adapter"))
    x, sigma, given = randn(2, 2 * CHANNELS + 1, 4, 4, 4), torch.tensor([0.3, 0.8]), some_conditions(frames=4)
    with torch.no_grad():
        ours = student.net(x, sigma, given.text, given.audio)[0]
        assert torch.equal(theirs(x, sigma, given.text, given.audio)[0], ours)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_student(folder)
    assert "\n" not in str(error.value)


def test_an_adapter_without_its_base_is_refused_by_name(tmp_path):
    exported(tmp_path)
    folder, base = tmp_path / "adapter", tmp_path / "base.safetensors"
    tensors, whole = load_base(Base(path=base, digest="")), base.read_bytes()
    save_tensors(base, tensors | {"proj_out.bias": tensors["proj_out.bias"] + 1e-3})
    refused(folder, r"base of the adapter .*adapter has changed: .*base\.safetensors holds other weights")
    base.unlink()
    refused(
        folder,
        r"base of the adapter .*adapter is not at .*base\.safetensors; put it there, or fix base in .*spec\.json",
    )
    base.write_bytes(whole)
    load_student(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, r"adapter of another kind: .*adapter_config\.json has use_dora True"),
        ({"rank_pattern": {"to_q": 2}}, r"has rank_pattern"),
        ({"r": 4}, r"weights do not fit: .*lora_A\.weight is \[3, 32\] where \[4, 32\] is needed"),
        ({"target_modules": ["to_q"]}, r"weights do not fit: .*unexpected blocks\.0\."),
        ({"modules_to_save": None}, r"unexpected audio_cond_projs\.0\.bias"),
        ({"target_modules": ["to_z"]}, r"lora\.targets: no module is called 'to_z'; did you mean"),
        ({"r": "many"}, r"damaged adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, change, words):
    exported(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(tmp_path / "adapter", words)


def test_a_damaged_adapter_is_refused(tmp_path):
    exported(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "adapter", r"damaged adapter: .*adapter")
    file.unlink()
    refused(tmp_path / "adapter", r"no adapter: .* lacks adapter_config\.json or adapter_model\.safetensors")


def test_what_a_file_holds_is_what_was_trained(tmp_path):
    """A round trip through the stage's file and through peft's layout; a missing tensor is named."""
    student, _, _ = exported(tmp_path)
    own = trained(student.net)
    kept = read_adapter(tmp_path / "adapter")
    assert (kept.rank, kept.alpha) == (3, 1.5)
    assert set(kept.tensors) == set(own)
    assert all(torch.equal(kept.tensors[name], p) for name, p in own.items())
    fresh = adapt(make_net(0), CONFIG, 1, "student")
    lora.load(fresh, dict(kept.tensors), tmp_path)
    assert all(torch.equal(p, own[name]) for name, p in trained(fresh).items())
    few = {name: x for name, x in kept.tensors.items() if not name.startswith("audio_proj.")}
    with pytest.raises(UserError, match=r"missing audio_proj\.proj\.weight"):
        lora.load(fresh, few, tmp_path)


# Recipe -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "lora: got rank 0"),
        ({"targets": []}, "lora.targets: names no module"),
        ({"targets": ["to_w"]}, "lora.targets: no module is called 'to_w'; did you mean"),
        (
            {"targets": ["patch_embedding"]},
            "lora.targets: patch_embedding is a Conv3d, no linear map; put it in lora.full",
        ),
        ({"full": ["audio"]}, "lora.full: the network has no module 'audio'; "),
        ({"full": ["blocks.1"]}, "lora.full: blocks.1.attn1.to_q is in it and one of lora.targets too"),
        ({"ranks": 3}, "unknown key 'lora.ranks': recipe; did you mean 'rank'"),
    ],
)
def test_lora_of_a_recipe_is_read_strictly(change, words):
    with pytest.raises(UserError) as error:
        adapt(a_backbone(), convert(LoraRoles, change, "lora"), 0, "student")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_engines_that_shard_weights_are_refused(engine):
    with pytest.raises(UserError, match=f"^lora: {engine} shards weights, which LoRA roles share; use engine=ddp"):
        lora.check("fp32", "fp32", engine)
    lora.check("fp32", "fp32", "zero1")


def test_the_backbone_is_held_as_the_engine_computes():
    with pytest.raises(UserError, match=r"held in precision fp32, engine\.precision is bf16; set both to one value"):
        lora.check("fp32", "bf16", "ddp")


def stage_configs(folder: Path, *overrides: str) -> dict[str, dict]:
    """The config of every stage of a recipe, which are not run."""
    found: dict[str, dict] = {}
    engine = Engine(EngineConfig(kind="ddp", precision="fp32"))
    try:
        recipe = load_recipe(
            RECIPES / "dmd_avatar.yaml", [f"run_dir={folder / str(len(os.listdir(folder)))}", *overrides]
        )
        pipeline: Any = Pipeline(recipe, engine)
        pipeline.artifacts.folder.stage = lambda name, config, inputs, body: found.update({name: config})
        for name in pipeline.stages:
            pipeline.stage(name)
    finally:
        engine.close()
    return found


def test_lora_is_read_by_the_stages_that_train_adapters_and_its_export_by_export(tmp_path):
    plain, ours = stage_configs(tmp_path), stage_configs(tmp_path, "lora={rank: 4, alpha: 2}")
    other = stage_configs(tmp_path, "lora={rank: 4, alpha: 2, export: adapter}")
    assert plain["export"] == {"name": "dmd_avatar", "lora.export": None}
    assert [name for name in plain if plain[name] != ours[name]] == ["init", "distill", "export"]
    wanted = {"lora.rank": 4, "lora.alpha": 2.0, "lora.targets": list(lora.TARGETS), "lora.full": []}
    assert {name: value for name, value in ours["init"].items() if name.startswith("lora")} == wanted
    assert [name for name in ours if ours[name] != other[name]] == ["export"]
    assert to_dict(load_recipe(RECIPES / "dmd_avatar.yaml"))["lora"] is None


# Plan -------------------------------------------------------------------------------------------------------------------


def one_gpu(*overrides: str):
    """The recipe at its real width, with one chunk and one exit, which change no weight."""
    short = ("teacher.path=anywhere", "data.world.num_frames=9", "distill.method.exit_step=last")
    return load_recipe(RECIPES / "omniavatar_one_gpu.yaml", [*short, *overrides])


def by_hand(config: LoraRoles) -> int:
    """Trained elements of OmniAvatar-1.3B: rank (in + out) of ten matrices a block; 33-channel patches, audio."""
    width, ffn, layers, hidden = 1536, 8960, 30, 32
    pack = 4 * 10752 * hidden + hidden + 2 * hidden
    full = 33 * 4 * width + width + pack + 14 * (hidden * width + width)
    return config.rank * layers * (8 * 2 * width + 2 * (width + ffn)) + full


def test_the_plan_of_the_real_size_knows_adapters_and_one_backbone():
    recipe = one_gpu()
    assert recipe.lora is not None
    assert recipe.lora.alpha / recipe.lora.rank == 0.5
    plan = make_plan(replace(job_of(recipe), stages={"distill": recipe.distill}, trajectories=None))
    count = plan.parameters["teacher"]
    assert set(plan.parameters.values()) == {1_421_187_232}
    assert plan.lora["student"] == plan.lora["fake_score"] == by_hand(recipe.lora)
    update = replace(
        plan.updates[0], points=dict.fromkeys([(), ("checkpointing",), ("checkpointing", "lora")], ((0, 0),))
    )
    plan = replace(plan, updates=(update,))
    parts = rank_bytes(plan, update, "ddp", 1)
    assert parts["backbone weights"] == 2 * count
    assert parts["teacher weights"] == 0
    assert parts["student weights"] == parts["fake_score weights"] == 4 * by_hand(recipe.lora)
    full = replace(plan, adapted=frozenset(), backbone=frozenset())
    learned, whole = (
        found["gradients"] + found["student moments"] + found["fake_score moments"]
        for found in (parts, rank_bytes(full, update, "ddp", 1))
    )
    assert whole == (4 + 8 + 8) * count
    assert 0.05 * whole < learned <= 0.1 * whole
    text = command.as_text(plan, "name", [1], ["ddp", "fsdp2"], 80.0)
    assert "backbone     one set of weights for teacher, student, fake_score" in text
    assert f"a LoRA of {by_hand(recipe.lora):,}" in text
    assert "FSDP2   shards weights, which LoRA roles share: use ddp, zero1 or zero2" in text
    assert suggest_fix(plan, "zero3", 8, 1e15) is None


def test_lora_is_named_as_the_switch_that_makes_it_fit():
    recipe = one_gpu("lora=null", "teacher.network.num_layers=3")
    plan = make_plan(replace(job_of(recipe), stages={"distill": recipe.distill}, trajectories=None))
    assert plan.backbone == {"student", "fake_score", "teacher"}
    update = replace(
        plan.updates[0], points=dict.fromkeys([(), ("checkpointing",), ("checkpointing", "lora")], ((0, 0),))
    )
    plan = replace(plan, updates=(update,))
    full, switched = (peak_bytes(plan, "ddp", 1, on) for on in ((), ("checkpointing", "lora")))
    assert switched < 0.3 * full
    assert suggest_fix(plan, "ddp", 1, 0.5 * full) == ("checkpointing", "lora")
    assert "fits with checkpointing + lora" in command.as_text(plan, "name", [1], ["ddp"], 0.5 * full / 2**30)

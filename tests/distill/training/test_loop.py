"""The loop: its average, its data order, accumulation, resume as replay, and a stop that names the step."""

import os
import signal

import pytest
import torch
from torch import nn

from distill.data.order import batch_rows
from distill.methods import Batch, Loss
from distill.training import checkpoint
from distill.training.config import OptimizerConfig, TrainConfig, learning_rate
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import EMA, Trainer
from teachers import files
from teachers.errors import UserError
from tests.support.tiny import Ranks, randn

DATA, TARGET = randn(24, 3), randn(24, 2, seed=1)


class Regression:
    """Roles a (twice a step) and b (every other step): linear regression, with noise from the generators if asked."""

    def __init__(self, roles, noise: float = 0.0):
        self.roles, self.noise = roles, noise

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("a", "a", "b") if step % 2 else ("a", "a")

    def loss(self, role, batch, rng, shared) -> Loss:
        x, y = batch.x0
        x = x + self.noise * (torch.randn(x.shape, generator=rng) + torch.randn(1, generator=shared))
        value = (self.roles[role](x) - y).square().mean()
        return Loss(value, {"loss": value.detach()})


def nets() -> dict[str, nn.Module]:
    roles = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    with torch.no_grad():
        for i, net in enumerate(roles.values()):
            net.weight.copy_(randn(2, 3, seed=i + 5))
            net.bias.copy_(randn(2, seed=i + 9))
    return roles


def config(**changes) -> TrainConfig:
    optimizer = OptimizerConfig(lr=0.05, warmup=2, final=0.1)
    facts = {"num_steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "ema_decay": 0.9}
    return TrainConfig(**(facts | {"optimizers": {"a": optimizer, "b": optimizer}} | changes))


def batches_of(size: int, until: int | None = None):
    def batches(position: int) -> Batch:
        if position == until:
            raise KeyboardInterrupt
        rows = batch_rows(24, size, position, seed=0)
        return Batch(conditions=None, x0=(DATA[rows], TARGET[rows]))

    return batches


def run(folder, roles=None, batches=None, validate=None, noise: float = 0.3, **changes) -> Trainer:
    folder.mkdir(exist_ok=True)
    roles = roles or nets()
    trainer = Trainer(Ranks(), config(**changes), roles, "a", folder)
    log = MetricsLog(folder / "metrics.jsonl")
    train(trainer, Regression(roles, noise), batches or batches_of(4), stage="s", seed=0, log=log, validate=validate)
    return trainer


def everything(trainer: Trainer) -> dict:
    """Every tensor and number that training leaves behind."""
    out = {name: x.clone() for name, _, _, x in trainer.pieces()}
    return out | {"numbers": torch.tensor([trainer.step, trainer.position, *trainer.updates.values()])}


def test_the_average_has_its_closed_form():
    net = nn.Linear(1, 1, bias=False).double()
    ema = EMA(net, decay=0.5)
    expected = net.weight.item()
    for n in range(1, 12):
        with torch.no_grad():
            net.weight.fill_(n)
        ema.update(net)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-5)
    assert ema.shadow["weight"].dtype == torch.float32
    ema.copy_to(net)
    assert net.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_average_steps_with_its_role_only(tmp_path):
    roles = nets()
    trainer = Trainer(Ranks(), config(), roles, "a", tmp_path)
    method = Regression(roles)
    before = {k: v.clone() for k, v in trainer.ema.shadow.items()}
    trainer.update("b", method, batches_of(4), 0, 10)
    assert all(torch.equal(before[k], v) for k, v in trainer.ema.shadow.items())
    trainer.update("a", method, batches_of(4), 0, 10)
    assert trainer.ema.num_updates == 1
    assert not torch.equal(before["weight"], trainer.ema.shadow["weight"])


def test_an_update_moves_its_role_only(tmp_path):
    roles = nets()
    trainer = Trainer(Ranks(), config(), roles, "a", tmp_path)
    before = {role: net.weight.detach().clone() for role, net in roles.items()}
    metrics = trainer.update("b", Regression(roles), batches_of(4), 0, 10)
    assert torch.equal(roles["a"].weight, before["a"])
    assert not torch.equal(roles["b"].weight, before["b"])
    assert set(metrics) == {"b/loss", "b/grad_norm"}
    assert all(p.grad is None for net in roles.values() for p in net.parameters())


@pytest.mark.parametrize(("size", "batch", "world"), [(24, 4, 1), (24, 4, 3), (10, 4, 2), (7, 5, 1), (3, 8, 2)])
def test_every_epoch_holds_every_row_once(size, batch, world):
    num = 3 * size
    rows = []
    for position in range(-(-num // (batch * world))):
        parts = [batch_rows(size, batch, position, 0, rank, world) for rank in range(world)]
        assert all(len(part) == batch for part in parts)
        rows += torch.cat(parts).tolist()
    epochs = [rows[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 7 or (epochs[0] != epochs[1] and epochs[0] != list(range(size)))
    assert not torch.equal(batch_rows(24, 12, 0, 0), batch_rows(24, 12, 0, 1))


def test_two_batches_of_four_are_one_of_eight(tmp_path):
    small = run(tmp_path / "small", noise=0.0, batches=batches_of(4), accumulation=2)
    large = run(tmp_path / "large", noise=0.0, batches=batches_of(8))
    assert small.position == 2 * large.position
    for name, net in small.roles.items():
        assert torch.allclose(net.weight, large.roles[name].weight, atol=1e-5)
    logs = [MetricsLog(tmp_path / name / "metrics.jsonl").rows("s") for name in ("small", "large")]
    for one, other in zip(*logs, strict=True):
        assert one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, rel=1e-4)


def test_two_ranks_are_one_of_twice_the_batch(tmp_path):
    """The mean of two ranks' gradients is the gradient of the joint batch: reduced by hand, as the engine does."""
    joint = nets()["a"]
    (joint(DATA[batch_rows(24, 8, 0, 0)]) - TARGET[batch_rows(24, 8, 0, 0)]).square().mean().backward()
    grads = []
    for rank in range(2):
        net, rows = nets()["a"], batch_rows(24, 4, 0, 0, rank, 2)
        (net(DATA[rows]) - TARGET[rows]).square().mean().backward()
        grads.append(net.weight.grad)
    assert torch.allclose(sum(grads) / 2, joint.weight.grad, atol=1e-6)


@pytest.mark.parametrize("killed_at", [1, 5, 7, 9, 13])
def test_killed_and_resumed_is_never_killed(tmp_path, killed_at):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batches=batches_of(4, until=killed_at))
    again = run(tmp_path / "cut")
    ours, theirs = everything(again), everything(whole)
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert run(tmp_path / "cut", batches=batches_of(4, until=0)).step == 6, "a finished stage runs again"


def test_the_best_average_is_kept_and_training_goes_on_from_the_weights(tmp_path):
    scores, seen, roles = iter([3.0, 1.0, 2.0]), [], nets()

    def validate():
        seen.append(roles["a"].weight.detach().clone())
        return {"score": next(scores), "sync": 0.5}

    trainer = run(tmp_path / "validated", roles, validate=validate, validate_every=2)
    plain = run(tmp_path / "plain")
    assert torch.equal(roles["a"].weight, plain.roles["a"].weight), "validation changed the training"
    assert trainer.best == {"score": 1.0, "sync": 0.5, "step": 4}
    best = trainer.averaged()
    assert torch.equal(best["weight"], seen[1])
    (found,) = checkpoint.saved(tmp_path / "validated", checkpoint.BEST)
    assert found.name == "best-00000004", "the one of step 2 was deleted"
    assert set(checkpoint.Reader(found).found) == {"ema/weight", "ema/bias"}
    assert torch.equal(plain.averaged()["weight"], plain.ema.shadow["weight"]), "without a validation the last"
    assert torch.equal(seen[2], trainer.ema.shadow["weight"])
    rows = MetricsLog(tmp_path / "validated/metrics.jsonl").rows("s")
    assert [row["step"] for row in rows if "validate/score" in row] == [2, 4, 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_and_names_the_step(tmp_path, bad):
    def batches(position: int) -> Batch:
        x, y = batches_of(4)(position).x0
        return Batch(conditions=None, x0=(x, y + bad if position >= 7 else y))

    with pytest.raises(
        UserError, match=r"^training diverged: loss and gradient of a are not finite at step 3; lower [^\n]*$"
    ):
        run(tmp_path, batches=batches)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["checkpoint-00000002"]


class Frozen(Regression):
    """Trains against a frozen network, as distillation does against its teacher."""

    def __init__(self, roles, teacher):
        super().__init__(roles)
        self.teacher = teacher

    def loss(self, role, batch, rng, shared) -> Loss:
        x = DATA[:4] if batch.x0 is None else batch.x0
        value = (self.roles[role](x) - self.teacher(x)).square().mean()
        return Loss(value, {"loss": value.detach()})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            "data",
            r"^the data are not finite: x0 of a clip, so that loss and gradient of a are not finite at step 0; check",
        ),
        ("teacher", r"^the weights of teacher are not finite: weight, so that loss and gradient of a are not finite"),
        ("rate", r"^training diverged: loss and gradient of a are not finite at step 0; lower"),
    ],
)
def test_what_is_not_finite_is_blamed_on_its_cause(tmp_path, spoil, message):
    roles, teacher, data = nets(), nn.Linear(3, 2), DATA[:4].clone()
    with torch.no_grad():
        if spoil == "data":
            data[2, 1] = float("nan")
        (teacher if spoil == "teacher" else roles["a"] if spoil == "rate" else nn.Linear(1, 1)).weight.fill_(
            float("inf")
        )
    trainer = Trainer(Ranks(), config(), roles, "a", tmp_path)
    with pytest.raises(UserError, match=message):
        trainer.update("a", Frozen(roles, teacher), lambda _: Batch(conditions=None, x0=data), 0, 10)


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    scores = iter([float("nan"), 3.0, float("inf"), 2.0, float("nan")])
    trainer = run(tmp_path / "a", validate=lambda: {"score": next(scores)}, validate_every=1, num_steps=5)
    assert trainer.best == {"score": 2.0, "step": 4}
    trainer.hand_on(tmp_path / "given", lambda state: files.save_tensors(tmp_path / "given", state))
    assert torch.equal(files.load_tensors(tmp_path / "given")["weight"], trainer.averaged()["weight"])
    best = tmp_path / "a" / "best-00000004" / "00000-00000.safetensors"
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    again = Trainer(Ranks(), config(num_steps=5), nets(), "a", tmp_path / "a")
    again.load()
    with pytest.raises(UserError, match=rf"^damaged weights: {best} is not what was written; delete {tmp_path / 'a'}"):
        again.hand_on(tmp_path / "given", lambda _: None)
    trainer = run(tmp_path / "b", validate=lambda: {"score": float("nan")}, validate_every=1)
    assert trainer.best is None
    assert not checkpoint.saved(tmp_path / "b", checkpoint.BEST)


def test_a_few_updates_that_are_not_finite_are_skipped_and_counted(tmp_path):
    """The first update of step 3 is at position 7: skipped, as if step 3 had one update of `a` fewer."""

    def batches(position: int) -> Batch:
        x, y = batches_of(4)(position).x0
        return Batch(conditions=None, x0=(x, y + float("inf") if position in bad else y))

    bad = (7,)
    trainer = run(tmp_path / "one", batches=batches, skip_nonfinite=1)
    assert (trainer.skipped, trainer.updates) == (1, {"a": 11, "b": 3})
    assert trainer.ema.num_updates == 11
    assert all(p.isfinite().all() for p in trainer.roles["a"].parameters())
    rows = MetricsLog(tmp_path / "one/metrics.jsonl").rows("s")
    assert [row["step"] for row in rows if row.get("a/skipped") == 1] == [4]
    assert run(tmp_path / "one", batches=batches, skip_nonfinite=1).skipped == 1, "read from the checkpoint"
    bad = (7, 10)
    with pytest.raises(UserError, match=r"not finite at step 4 after 1 skipped updates; lower"):
        run(tmp_path / "two", batches=batches, skip_nonfinite=1)


def test_the_rate_warms_up_and_falls():
    optimizer = OptimizerConfig(lr=1.0, warmup=4, final=0.1)
    rates = [learning_rate(optimizer, i, 24) for i in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.55)
    assert rates[24] == pytest.approx(0.1)
    assert learning_rate(OptimizerConfig(lr=2.0), 0, 1) == 2.0


def test_a_role_without_an_optimizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no optimizer for role 'b': give train\.optimizers\.b\.lr"):
        Trainer(Ranks(), config(optimizers={"a": OptimizerConfig(lr=1.0)}), nets(), "a", tmp_path)


def test_gradients_are_clipped(tmp_path):
    roles, norms = nets(), []
    optimizer = OptimizerConfig(lr=0.01, clip=1e-3)
    trainer = Trainer(Ranks(), config(optimizers={"a": optimizer, "b": optimizer}), roles, "a", tmp_path)
    trainer.held["a"].optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in roles["a"].parameters()]).norm())
    )
    metrics = trainer.update("a", Regression(roles), batches_of(4), 0, 10)
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)
    assert metrics["a/grad_norm"] > 0.1


def test_a_metric_alone_that_is_not_finite_is_named(tmp_path):
    trainer = Trainer(Ranks(), config(), nets(), "a", tmp_path)
    before = trainer.roles["a"].weight.clone()

    class Bad(Regression):
        def loss(self, role, batch, rng, shared) -> Loss:
            loss = super().loss(role, batch, rng, shared)
            return Loss(loss.value * float("inf"), {"fine": loss.value.detach(), "spread": torch.tensor(float("nan"))})

    with pytest.raises(UserError, match="spread and gradient of a are not finite at step 0"):
        trainer.update("a", Bad(trainer.roles), batches_of(4), 0, 10)
    assert torch.equal(trainer.roles["a"].weight, before), "a broken gradient was stepped"


@pytest.mark.parametrize(
    ("number", "at", "accumulation", "name"),
    [
        (signal.SIGTERM, 5, 1, "checkpoint-00000002-01"),  # the first of two updates of step 2
        (signal.SIGTERM, 10, 2, "checkpoint-00000002"),  # the first of its two micro-steps: it is dropped
        (signal.SIGUSR1, 9, 2, "checkpoint-00000002"),  # the last micro-step of a step
        (signal.SIGTERM, 14, 1, "checkpoint-00000006"),  # the last of all
    ],
)
def test_a_signal_saves_after_the_micro_step_and_stops(tmp_path, number, at, accumulation, name):
    def batches(position: int) -> Batch:
        if position == at:
            os.kill(os.getpid(), number)
        return batches_of(4)(position)

    changes = {"checkpoint_every": 0, "accumulation": accumulation}
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "cut", batches=batches, **changes)
    assert stopped.value.code == 128 + number
    assert [path.name for path in checkpoint.saved(tmp_path / "cut")] == [name]
    assert signal.getsignal(number) is signal.SIG_DFL
    ours, theirs = everything(run(tmp_path / "cut", **changes)), everything(run(tmp_path / "whole", **changes))
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(("world", "batch", "steps"), [(1, 8, 3), (2, 4, 3), (3, 8, 1), (3, 2, 4)])
def test_accumulation_follows_from_the_global_batch(world, batch, steps):
    assert config(batch_size=batch, global_batch=24).micro_steps(world) == steps


def test_a_global_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^train.global_batch: 8 is no multiple of 6, 3 processes of batch_size 2; [^\n]*$"
    ):
        Trainer(Ranks(world_size=3), config(batch_size=2, global_batch=8), nets(), "a", tmp_path)
    with pytest.raises(UserError, match="twice"):
        config(accumulation=2, global_batch=8).micro_steps(1)


def test_other_processes_continue_at_the_same_row(tmp_path):
    run(tmp_path, num_steps=2)
    trainer = Trainer(Ranks(world_size=2), config(batch_size=2), nets(), "a", tmp_path)
    assert trainer.load()
    assert trainer.position == 5, "five batches of 4 rows are five of 2 x 2"
    with pytest.raises(UserError, match="after 20 rows, which 3 processes of batch_size 4 never reach"):
        Trainer(Ranks(world_size=3), config(), nets(), "a", tmp_path).load()


def test_frozen_parameters_stay_frozen_and_out_of_the_checkpoint(tmp_path):
    roles = nets()
    roles["a"].bias.requires_grad_(False)
    before = roles["a"].bias.clone()
    trainer = run(tmp_path, roles)
    assert torch.equal(roles["a"].bias, before)
    assert not roles["a"].bias.requires_grad
    assert roles["b"].bias.requires_grad
    assert set(trainer.ema.shadow) == {"weight"}
    assert "a/weight/bias" not in {piece.name for piece in trainer.pieces()}

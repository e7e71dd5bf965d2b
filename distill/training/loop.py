"""The one training loop: steps of a trainer, validation, checkpoints, and the signals that end it. Resume is replay.

Randomness and data are functions of (seed, stage, step, position, rank), so a killed run continues bit for bit.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from tqdm import tqdm

from distill.methods import Adaptive, Batch, Method
from distill.training import checkpoint
from distill.training.lifecycle.selection import LEFT, validations
from distill.training.lifecycle.signals import terminations
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from teachers.errors import UserError


def train(
    trainer: Trainer,
    method: Method,
    batches: Callable[[int], Batch],
    *,
    stage: str,
    seed: int,
    log: MetricsLog,
    validate: Callable[[], dict[str, Any]] | None = None,
    alarm: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> None:
    """Run `method` to config.num_steps, from the newest checkpoint if there is one. The average is in trainer.ema.

    validate() sees the averaged weights loaded into the averaged role and returns numbers with a "score" (lower is better) and
    perhaps LEFT; `Selection` decides which are kept, as folder/best-<step>, and where config.stop ends training. Where alarm(those
    numbers) gives a reason to stop, UserError says it, the best and the last checkpoint being older; with config.stop training ends
    there with the kept weights, where there are some. On SIGTERM or SIGUSR1 the micro-step is finished and the
    training saved, then SystemExit (128 + the signal) is raised.
    """
    config, engine, writer = trainer.config, trainer.engine, trainer.writer
    trainer.adaptive = method if isinstance(method, Adaptive) and method.watched else None
    trainer.load()
    log.resume(stage, trainer.step + 1)
    totals = dict.fromkeys(trainer.roles, 0)
    for step in range(config.num_steps):
        for role in method.roles_to_update(step):
            totals[role] += 1
    bar = tqdm(total=config.num_steps, initial=trainer.step, desc=stage, disable=not engine.is_main, mininterval=1.0)
    due = set(validations(config.validate_every, config.num_steps, config.stop))
    saved = time.monotonic()
    with bar, _finishing(writer), terminations() as received:
        while trainer.step < config.num_steps and not trainer.selection.ended:
            metrics = trainer.advance(method, batches, seed, totals, lambda: writer.any_rank(bool(received)))
            if metrics is None:
                trainer.save()
                writer.finish()
                _stop(trainer, stage, received)
            bar.update(1)
            done = trainer.step == config.num_steps
            if done or _is_due(config.log_every, trainer.step):
                values = trainer.reduced(metrics)
                log.write(stage, trainer.step, values)
                bar.set_postfix({k.split("/")[-1]: f"{v:.3g}" for k, v in values.items() if "grad_norm" not in k})
            if validate and trainer.step in due:
                _validate(trainer, validate, alarm, stage, log)
            over = done or bool(trainer.selection.ended)
            late = 0 < config.checkpoint_minutes * 60 < time.monotonic() - saved
            if checkpoint.any_rank(engine, over or late or _is_due(config.checkpoint_every, trainer.step)):
                trainer.save()
                saved = time.monotonic()
        if config.num_steps == 0:
            trainer.save()
        writer.finish()
        if writer.any_rank(bool(received)):  # while the last step ran, or its validation
            _stop(trainer, stage, received)
    engine.barrier()


@contextmanager
def _finishing(writer: "checkpoint.Writer") -> Iterator[None]:
    """Of one process that fails inside, what was begun is put in its place all the same; several may no longer be able to agree."""
    try:
        yield
    except BaseException:
        if writer.engine.world_size == 1:
            with suppress(UserError):
                writer.finish()
        raise


def _is_due(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _stop(trainer: Trainer, stage: str, received: Sequence[int]) -> NoReturn:
    number = received[0] if received else signal.SIGTERM  # another rank's
    if trainer.engine.is_main:
        words = f"{stage} is saved after step {trainer.step}; the same command continues"
        tqdm.write(f"distill: {signal.Signals(number).name}: {words}", file=sys.stderr)
    raise SystemExit(128 + number)


def _validate(
    trainer: Trainer,
    validate: Callable[[], dict[str, Any]],
    alarm: Callable[[Mapping[str, Any]], str | None] | None,
    stage: str,
    log: MetricsLog,
) -> None:
    """Score the averaged weights, keep them if they are better than what is kept, and see whether training ends here: UserError
    when they set off the alarm and nothing is kept, or no rule may end the stage. What rank 0 measured decides on every rank."""
    # fsdp2 gathers blocks in bf16, and what is under an adapter may be held in it
    held = {p.dtype for p in trainer.roles[trainer.average].parameters()}
    narrow = trainer.engine.autocast() if trainer.kind == "fsdp2" or len(held) > 1 else nullcontext()
    with trainer.showing_average(), narrow:
        values = trainer.engine.from_main(validate())
    selection, stop = trainer.selection, trainer.config.stop
    shown = {name: value for name, value in values.items() if name != LEFT}
    if selection.best is not None:
        shown["gain"], shown["gain_error"] = selection.gain(values)
    log.write(stage, trainer.step, {x if "/" in x else f"validate/{x}": value for x, value in shown.items()})
    reason = alarm(values) if alarm else None
    if reason and stop is not None and selection.best is not None:
        selection.ended = f"the student has collapsed: {reason}"
    elif reason:
        trainer.writer.finish()
        kept = "this was the first validation: there are no better weights"
        if trainer.best:
            path = checkpoint.best_in(trainer.folder, trainer.best)
            kept = f"the best weights, of step {trainer.best['step']:.0f}, are in {path}"
        raise UserError(f"{stage} collapsed at step {trainer.step}: {reason}; {kept}; health.stop=false goes on")
    elif selection.take(values, trainer.step, trainer.config.sure, stop):
        trainer.save_best()
    if selection.is_over(stop) and trainer.engine.is_main:
        tqdm.write(f"distill: {stage} ends at step {trainer.step}: {selection.ended}", file=sys.stderr)

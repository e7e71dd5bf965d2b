"""What the launcher asked for, and whether that is what runs: processes, engine, precision, offload (accelerate, torchrun, MPI)."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from distill.training.config import EngineConfig, check_offload
from distill.training.role import Kind
from teachers.errors import UserError


def requested_processes(environ: Mapping[str, str]) -> int:
    """Processes that the launcher was asked for: WORLD_SIZE, else MPI's, else 1."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if (value := environ.get(name) or "").isdigit():
            return int(value)
    return 1


def check_world_size(requested: int, got: int, on_cpu: bool) -> None:
    """UserError when fewer or more processes train together than were asked for."""
    if requested != got:
        raise UserError(
            f"{requested} processes were asked for but {got} would train: launcher; {right_command(requested, on_cpu)}"
        )


def check_launcher(environ: Mapping[str, str], config: EngineConfig) -> Kind:
    """The engine that recipe and launcher agree on; UserError for a flag of the launcher that would have no effect."""
    kind, flags = launched_kind(environ)
    if kind and config.kind and kind != config.kind:
        raise UserError(f"{flags} asks for {kind}, but engine={config.kind}: launcher; remove one")
    offload = _offload_flag(environ)
    if offload and not config.offload:
        raise UserError(f"{offload} would have no effect: launcher; set engine.offload=[student,fake_score]")
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise UserError(f"--gradient_accumulation_steps {steps} would have no effect: launcher; use train.accumulation")
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked != "no" and asked != config.precision:
        fix = f"engine.precision={asked}" if asked == "bf16" else "--mixed_precision no"
        raise UserError(f"mixed precision {asked}, but engine.precision={config.precision}: launcher; use {fix}")
    if int(environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "--max-restarts: processes that are started again would find the addresses of those before in the launcher's store: "
            "launcher; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-endpoint HOST:PORT ..."
        )
    kind = kind or config.kind or "ddp"
    check_offload(kind, config.offload)
    return kind


def launched_kind(environ: Mapping[str, str]) -> tuple[Kind | None, str]:
    """The engine that accelerate's flags name, and those flags; None where they name none. UserError for one we lack."""
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("--use_megatron_lm would have no effect: launcher; remove it, see engine=")
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
        version = environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(
                f"--use_fsdp with --fsdp_version {version}: launcher; FSDP2 is supported, use --fsdp_version 2"
            )
        return "fsdp2", "--use_fsdp"
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        if file := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "").replace("None", ""):
            raise UserError(
                f"--deepspeed_config_file {file} would have no effect: launcher; use engine= and --zero_stage"
            )
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        kinds: dict[str, Kind] = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}
        if stage not in kinds:
            raise UserError(f"--zero_stage {stage} is none: launcher; it is 0, 1, 2 or 3")
        return kinds[stage], f"--use_deepspeed --zero_stage {stage}"
    return None, ""


@contextmanager
def hidden_flags(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Without the flags that `check_launcher` reads: accelerate shall not wrap what `distill.training.role` holds."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    found = {name: environ.pop(name) for name in names if name in environ}
    try:
        yield
    finally:
        environ.update(found)


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes")


def _offload_flag(environ: Mapping[str, str]) -> str | None:
    if _is_on(environ, "ACCELERATE_USE_FSDP") and _is_on(environ, "FSDP_OFFLOAD_PARAMS"):
        return "--fsdp_offload_params true"
    for what in ("optimizer", "param") if _is_on(environ, "ACCELERATE_USE_DEEPSPEED") else ():
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none").lower()
        if device != "none":
            return f"--offload_{what}_device {device}"
    return None


def right_command(count: int, on_cpu: bool) -> str:
    if count == 1:
        return "start it without WORLD_SIZE and other launchers' variables"
    where = "" if not on_cpu else " (works on a CPU; --cpu does not)"
    return f"use accelerate launch --multi_gpu --num_processes {count} RECIPE, or torchrun{where}"

"""The engine: keyed randomness, true process groups, and refusals instead of accelerate's silent traps."""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine, _buckets
from distill.training.lifecycle.launcher import check_launcher, check_world_size, hidden_flags, requested_processes
from teachers.errors import UserError
from teachers.flow import keyed_generator
from tests.support.processes import CONTEXT, kill

CONFIG = EngineConfig(precision="fp32")
WORKER = """\
import json, pathlib, sys
import torch
from distill.training.engines.engine import Engine
from distill.training.config import EngineConfig
from teachers.errors import UserError
try:
    engine = Engine(EngineConfig(precision="fp32", bucket_mib=1))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(engine.description)
grads = [torch.full((3,), float(engine.rank)), torch.full((300_000,), 2.0 * engine.rank, dtype=torch.float64)]
engine.all_reduce_mean(grads)
own = torch.randn(1, generator=engine.generator(0, "noise", 5)).item()
both = torch.randn(1, generator=engine.generator(0, "exit", 5, shared=True)).item()
engine.close()
row = [engine.rank, engine.world_size, str(engine.device), grads[0][0].item(), grads[1][-1].item(), own, both]
pathlib.Path(sys.argv[0]).with_name(f"{engine.rank}.json").write_text(json.dumps(row))
"""
RESTARTED = {"TORCHELASTIC_MAX_RESTARTS": "3"}
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture
def alone(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_generator_is_a_function_of_seed_and_keys():
    def draw(*keys):
        return torch.randn(4, generator=keyed_generator(*keys))

    state = torch.random.get_rng_state()
    assert torch.equal(draw(1, "dmd", 3), draw(1, "dmd", 3))
    others = [draw(2, "dmd", 3), draw(1, "dmd", 4), draw(1, "init", 3), draw(1, "dmd", "3"), draw(1, "dmd3")]
    assert all(not torch.equal(draw(1, "dmd", 3), other) for other in others)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator moved"
    assert keyed_generator(1, "dmd", 3).initial_seed() == 1678547247474298057


def test_one_process_alone(alone):
    engine = Engine(CONFIG, threads=1)
    try:
        assert (engine.rank, engine.world_size, engine.is_main) == (0, 1, True)
        grad = torch.ones(2)
        engine.all_reduce_mean([grad])
        assert torch.equal(grad, torch.ones(2))
        engine.barrier()
        with engine.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    finally:
        engine.close()
    engine = Engine(EngineConfig(precision="bf16"))
    with engine.autocast():
        assert torch.nn.functional.linear(*[torch.ones(2, 2, device=engine.device)] * 2).dtype == torch.bfloat16
    engine.close()


def test_what_is_missing_is_shared_out_anew(tmp_path):
    """After a kill all ranks have something to make, whichever of them was behind."""
    files = [tmp_path / str(number) for number in range(8)]
    for number in (0, 1, 2, 4, 6):
        files[number].touch()
    found = []
    for rank in range(2):
        fake: Any = SimpleNamespace(is_main=True, from_main=lambda value: value, data_rank=rank, data_ranks=2)
        found.append(Engine.missing(fake, files))
    assert found == [[3, 7], [5]]


def test_buckets_keep_order_size_and_type():
    tensors = [torch.zeros(n) for n in (100, 100, 300, 10)] + [torch.zeros(10, dtype=torch.float64)]
    buckets = _buckets(tensors, 800)
    assert [[t.numel() for t in bucket] for bucket in buckets] == [[100, 100], [300], [10], [10]]
    assert [id(t) for bucket in buckets for t in bucket] == [id(t) for t in tensors]


@pytest.mark.parametrize(
    ("environ", "count"),
    [({}, 1), ({"WORLD_SIZE": "4"}, 4), ({"OMPI_COMM_WORLD_SIZE": "3"}, 3), ({"WORLD_SIZE": ""}, 1)],
)
def test_what_the_launcher_requested(environ, count):
    assert requested_processes(environ) == count


def test_a_wrong_world_is_refused_with_the_right_command():
    check_world_size(2, 2, on_cpu=True)
    with pytest.raises(UserError, match=r"2 processes were asked for but 1 would train.*--multi_gpu --num_processes 2"):
        check_world_size(2, 1, on_cpu=True)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(stage: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm would have no effect"),
        ({"ACCELERATE_USE_FSDP": "true"}, "use --fsdp_version 2"),
        (
            FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"},
            "--fsdp_offload_params true .* set engine.offload=\\[student,fake_score\\]",
        ),
        (zero("3") | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "--offload_param_device cpu"),
        (zero("2") | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "--deepspeed_config_file ds.json"),
        (zero("2") | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "use train.accumulation"),
        (zero("4"), "--zero_stage 4"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "use engine.precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "use --mixed_precision no"),
        (
            RESTARTED | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d",
        ),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(environ, words):
    with pytest.raises(UserError, match=words):
        check_launcher(environ, CONFIG)
    check_launcher({"ACCELERATE_MIXED_PRECISION": "bf16"}, EngineConfig(precision="bf16"))
    check_launcher(RESTARTED | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, CONFIG)


@pytest.mark.parametrize(
    ("environ", "kind", "runs"),
    [
        ({}, None, "ddp"),
        ({}, "zero2", "zero2"),
        (zero("3"), None, "zero3"),
        (zero("1"), "zero1", "zero1"),
        (zero("0"), None, "ddp"),
        (FSDP2, None, "fsdp2"),
        (FSDP2, "fsdp2", "fsdp2"),
    ],
)
def test_recipe_and_launcher_agree_on_the_engine(environ, kind, runs):
    assert check_launcher(environ, EngineConfig(kind=kind, precision="fp32")) == runs


def test_recipe_and_launcher_at_odds_are_refused():
    with pytest.raises(UserError, match="--use_fsdp asks for fsdp2, but engine=zero2"):
        check_launcher(FSDP2, EngineConfig(kind="zero2", precision="fp32"))
    with pytest.raises(
        UserError, match=r"engine\.offload: ddp keeps a trained student on the device; name teacher alone"
    ):
        check_launcher({}, EngineConfig(precision="fp32", offload=("teacher", "student")))
    assert check_launcher({}, EngineConfig(precision="fp32", offload=("teacher",))) == "ddp"
    check_launcher(zero("2") | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}, CONFIG)


def test_accelerate_itself_does_not_see_the_flags():
    environ = {**FSDP2, "RANK": "0"}
    with hidden_flags(environ):
        assert "ACCELERATE_USE_FSDP" not in environ
    assert environ == {**FSDP2, "RANK": "0"}


@pytest.mark.parametrize(
    "change", [{"bucket_mib": 0}, {"keep_checkpoints": 0}, {"kind": "ddp", "offload": ("student",)}]
)
def test_a_setting_that_cannot_be_is_refused(change):
    with pytest.raises(UserError, match=r"^engine\."):
        EngineConfig(**({"precision": "fp32"} | change))


def launch(words: list[str], output: Path) -> None:
    """`accelerate launch WORDS` in this process, what it and its processes say in `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in NAMES:
        os.environ.pop(name, None)
    sys.argv = ["accelerate-launch", *words]
    runpy.run_module("accelerate.commands.launch", run_name="__main__")


def started(folder: Path, *words: str) -> str:
    """What `accelerate launch WORDS` of the worker says; it has to end well."""
    script, output = folder / "worker.py", folder / "output"
    script.write_text(WORKER)
    process = CONTEXT.Process(target=launch, args=([*words, str(script)], output))
    process.start()
    process.join(120)
    if process.exitcode is None:
        kill(process)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the traps of a machine without GPU")
def test_two_processes_are_one_group_on_a_cpu(tmp_path):
    started(tmp_path, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [row[:5] for row in rows] == [[rank, 2, "cpu", 0.5, 1.0] for rank in (0, 1)]
    assert rows[0][5] != rows[1][5], "ranks draw the same noise"
    assert rows[0][6] == rows[1][6], "ranks draw different shared values"


def test_what_runs_is_printed(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process and says so nowhere: the description does."""
    assert "1 process, ddp, cpu, fp32, " in started(tmp_path, "--cpu", "--num_processes", "2")

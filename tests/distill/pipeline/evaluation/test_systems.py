"""The clips of all systems, kept in the stage: each once, whatever was left by a start of other settings."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill.pipeline.evaluation import systems
from teachers.guidance import Guidance
from tests.support.tiny import Ranks, make_spec, some_conditions


def some_artifacts(batch: int) -> Any:
    settings = SimpleNamespace(guidance=Guidance())
    evaluation = SimpleNamespace(batch_size=batch, condition_seed=1, num_samples=2)
    encoders = SimpleNamespace(decode=lambda x0, _: x0.to(torch.uint8).expand(-1, 3, -1, 16, 16))
    return SimpleNamespace(
        recipe=SimpleNamespace(trajectories=settings, eval=evaluation),
        spec=make_spec(),
        engine=Ranks(),
        encoders=encoders,
        release=lambda _: None,
    )


def test_another_batch_size_after_a_kill_counts_no_clip_twice(tmp_path, monkeypatch):
    """Files of the first start hold other rows each."""
    made, kill = [], [2]

    def generate(_conditions, rows: Tensor, *_keys) -> Tensor:
        if len(made) == kill[0]:
            raise KeyboardInterrupt
        made.append(rows.tolist())
        return rows.view(-1, 1, 1, 1, 1).float()

    monkeypatch.setattr(systems, "teacher_systems", lambda *_: {"teacher": generate})
    monkeypatch.setattr(systems, "student_systems", lambda *_: {"student": generate})
    sets: Any = {"test": (some_conditions(5), 1)}
    for batch, most in ((2, 2), (3, 99)):
        kill[0] = most
        try:
            systems.generate_all(some_artifacts(batch), {}, tmp_path, sets)
        except KeyboardInterrupt:
            assert batch == 2
    assert made == [[0, 1], [2, 3], [0, 1, 2], [3, 4], [0, 1, 2], [3, 4]]
    where = systems.clips_folder(some_artifacts(3), tmp_path)
    for system in ("teacher", "student"):
        assert systems.generated(where, "test", system, 0)[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
        assert len(systems.generated(where, "test", system, 0, "samples")) == 2

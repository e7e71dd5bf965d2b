"""The last stage: every system on the same held-out conditions, what each costs, report.json and report.html."""

import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.expect import SHOWN, SYSTEMS, Bounds, compare
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.evaluation.clip_sets import ClipSet
from distill.pipeline.evaluation.costs import measure_costs
from distill.pipeline.evaluation.health import logged, seam_frames
from distill.pipeline.evaluation.systems import SAME_NOISE, LastStudent, clips_folder, generate_all, generated
from distill.pipeline.run_folder import revision, versions
from eval.cards import Card
from eval.embedded.evaluation import Evaluation
from eval.embedded.protocol import EvalConfig, Geometry, run_card
from eval.report.run_report import target, write_report
from teachers import media


def evaluate(artifacts: Artifacts, folder: Path) -> dict:
    """Score floor, codec and the systems, measure costs, write the report; returns the scores."""
    config = artifacts.recipe.eval
    test = clip_sets.draw(artifacts, folder, "test", config.num_conditions, samples=max(1, config.num_samples))
    reference = clip_sets.draw(artifacts, folder, "reference", config.num_reference, encode=False)
    sets, spread = {"test": (test.conditions, config.num_seeds)}, []
    if "diversity" not in artifacts.source.left_out:
        spread = draw_spread(artifacts, folder)
        rows = torch.arange(config.diversity_conditions).repeat_interleave(config.diversity_seeds)
        sets["diversity"] = (spread[0].conditions.select(rows), 1)
    with artifacts.codec_alone():
        generate_all(artifacts, LastStudent(artifacts), folder, sets)
    return _report(artifacts, folder, test, reference, spread) if artifacts.engine.is_main else {}


def _report(
    artifacts: Artifacts,
    folder: Path,
    test: ClipSet,
    reference: ClipSet,
    spread: Sequence[ClipSet],
) -> dict:
    """Scores, costs and pages of the clips that were generated."""
    config = artifacts.recipe.eval
    card = card_of(artifacts, replace(config, num_conditions=len(test), num_reference=len(reference)))
    world = torch.stack([clips.decoded for clips in spread], dim=1) if spread else None
    real = clip_sets.as_metrics_take(artifacts, test.clips)
    seams = seam_frames(artifacts.spec)
    evaluation = Evaluation(card, artifacts.probes, real, test.decoded, reference.clips.video, seams, world)
    scores, floor, sheets = score_systems(artifacts, folder, test, evaluation)
    with artifacts.engine.apart():  # the other ranks wait
        costs = measure_costs(artifacts, test)
    systems = {name: {"metrics": scores[name], "cost": costs[name]} for name in scores}
    report = assemble(artifacts, systems, floor, card, evaluation.left_out)
    videos = write_samples(artifacts, test)
    curves = read_curves(artifacts.log.rows())
    shown = {name: video[: config.sheet_conditions] for name, video in sheets.items()}
    captions = named(test.clips.text)[: config.sheet_conditions]
    write_report(report, curves, shown, videos, artifacts.folder.path, captions, config.sheet_frames)

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    flat = {name: {k: finite(v["mean"]) for k, v in metrics.items()} for name, metrics in scores.items()}
    return {"scores": flat, "ratios": {name: finite(value) for name, value in report["ratios"].items()}}


def score_systems(
    artifacts: Artifacts, folder: Path, test: ClipSet, evaluation: Evaluation
) -> tuple[dict[str, dict], dict[str, dict], dict[str, Tensor]]:
    """(Scores of every system; of real clips and of the codec's ceiling; name -> clips uint8 [N, 3, T, H, W] of one noise seed)
    from the clips that `generate_all` stored."""
    config, world = artifacts.recipe.eval, evaluation.world
    floor = {"real": evaluation.score(test.clips.video[None]), "codec": evaluation.score(test.decoded[None], world)}
    scores, sheets = {}, {"real": test.clips.video, "codec": test.decoded}

    clips = partial(generated, clips_folder(artifacts, folder))

    beside = {"teacher": clips("test", "teacher", 0), SAME_NOISE: clips("test", SAME_NOISE, 0)}
    for name in (name for name in SYSTEMS if name != "ar_teacher" or artifacts.recipe.has_custom_network):
        seeds = [clips("test", name, seed) for seed in range(config.num_seeds)]
        spread = None if world is None else clips("diversity", name, 0).unflatten(0, (-1, config.diversity_seeds))
        others = beside if name in ("zero_shot", "init", "student") else None
        scores[name] = evaluation.score(torch.stack(seeds), spread, others)
        sheets[name] = seeds[0]
    return scores, floor, sheets


def draw_spread(artifacts: Artifacts, folder: Path) -> list[ClipSet]:
    """The world's own clips for the diversity conditions, a set for each of other nuisance; the first has the conditions."""
    config = artifacts.recipe.eval
    num, motions = config.diversity_conditions, range(config.diversity_seeds)
    return [clip_sets.draw(artifacts, folder, "diversity", num, motion=motion) for motion in motions]


def card_of(artifacts: Artifacts, counted: EvalConfig) -> Card:
    """The run's card; `counted` states how many clips there were."""
    recipe, world = artifacts.recipe, artifacts.recipe.data.world
    extractors = (artifacts.folder.finished("extractors") or {})["metrics"]
    return run_card(
        counted,
        Geometry(frames=world.num_frames, height=world.size[0], width=world.size[1], fps=artifacts.spec.fps),
        extractors["sha256"],
        extractors["admitted"],
        {"conditions": recipe.eval.condition_seed, "training": recipe.seed},
    )


def assemble(artifacts: Artifacts, systems: dict, floor: dict, card: Card, refused: dict[str, str]) -> dict:
    """report.json as design section 6 has it; `refused`: metrics of the card that cannot be had, and why."""
    recipe, done = artifacts.recipe, artifacts.folder.finished
    stages = {}
    for name in artifacts.folder.names:
        facts = done(name) or {}
        stages[name] = {key: facts.get(key) for key in ("seconds", "fingerprint", "metrics")}
    left_out = {**artifacts.source.left_out, **refused}
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "revision": revision(),
        "versions": versions(),
        "device": {
            "kind": str(artifacts.engine.device),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": artifacts.engine.world_size,
        },
        "stages": stages,
        "systems": systems,
        "floor": floor["real"],
        "codec": floor["codec"],
        "health": health_of(stages),
        "ratios": ratios(systems),
        "targets": targets(systems, recipe.expect, left_out),
        "columns": {name: column.plain() for name, column in card.columns.items()},
        "protocol": card.plain(),
        **({"left_out": left_out} if left_out else {}),
        **({"notes": notes} if (notes := [*artifacts.source.notes, *skipped_notes(stages)]) else {}),
    }


def skipped_notes(stages: dict) -> list[str]:
    """What a reader has to know of files that the data stage skipped: a sentence, or none."""
    facts = (stages.get("data") or {}).get("metrics") or {}
    if not (number := facts.get("skipped_files")):
        return []
    named, more = ", ".join(facts["skipped"]), number - len(facts["skipped"])
    rest = f" and {more:,} more" if more else ""
    return [f"Files that cannot be read were skipped, {number:,} of those that were drawn: {named}{rest}."]


def health_of(stages: dict) -> dict[str, Any]:
    """The health metrics that the stages stored: of teacher, ar_teacher, init and student; the quality gate after init, and the
    student's alarms."""
    found: dict[str, Any] = {}
    for name in ("init", "ar_teacher"):
        found |= ((stages.get(name) or {}).get("metrics") or {}).get("health") or {}
    best = ((stages["distill"].get("metrics") or {}).get("best")) or {}
    student = logged(best)
    words = (stages["distill"].get("metrics") or {}).get("outcome")
    return found | ({"student": student} if student else {}) | ({"outcome": words} if words else {})


def ratios(systems: dict) -> dict[str, float]:
    """Every comparison of `distill.expect.SHOWN` that is measured; NaN over a score of 0."""
    found = {name: compare(name, systems) for name in SHOWN}
    return {name: value for name, value in found.items() if value is not None}


def targets(systems: dict, expect: Mapping[str, Bounds], left_out: Collection[str]) -> dict[str, dict]:
    """Each expectation of the recipe with its value and whether it is met; one of a measure that is `left_out` is skipped."""
    out = {}
    for name, bounds in expect.items():
        value = compare(name, systems)
        if value is not None:
            out[name] = target(value, at_least=bounds.at_least, at_most=bounds.at_most)
        elif not any(name.startswith(f"{measure}_") for measure in left_out):
            shown = target(0.0, at_least=bounds.at_least, at_most=bounds.at_most)
            out[name] = {**shown, "value": None, "passed": None}
    return out


def write_samples(artifacts: Artifacts, test: ClipSet) -> dict[str, dict[str, Path]]:
    """Playable samples with sound, condition -> system -> file: real, teacher, init and student on the same conditions."""
    folder = artifacts.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    where = clips_folder(artifacts, artifacts.folder.stage_dir("evaluate"))
    samples: dict[str, dict[str, Path]] = {}
    for i in range(min(artifacts.recipe.eval.num_samples, len(test.clips.text))):
        for name in ("real", "teacher", "init", "student"):
            if name == "real":
                video = test.samples[i]
            else:
                video = generated(where, "test", name, 0, "samples")[i]
            path = folder / f"{i}-{name}.mp4"
            frames = video.permute(1, 2, 3, 0).contiguous()
            media.write_video(
                path,
                frames,
                artifacts.spec.fps,
                test.clips.mixed[i],
                upscale=max(1, 192 // video.shape[-2]),
                smooth=True,
            )
            samples.setdefault(named(test.clips.text)[i], {})[name] = path
    return samples


def named(texts: list[str]) -> list[str]:
    """The texts themselves; numbered where two clips have the same, or none."""
    if len(set(texts)) == len(texts) and all(texts):
        return texts
    return [f"clip {i} {text}".strip() for i, text in enumerate(texts)]


def read_curves(rows: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Rows of metrics.jsonl as curves: "stage: quantity" -> role -> (step, value) pairs; health metrics have a table."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step") and not name.startswith("health/"):
                role, _, quantity = name.rpartition("/")
                title = f"{row['stage']}: {role} {quantity}" if role == "validate" else f"{row['stage']}: {quantity}"
                curves.setdefault(title, {}).setdefault(role, []).append((row["step"], value))
    return curves

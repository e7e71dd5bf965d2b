"""`distill eval`: clips against real ones under a protocol card, and its verbs compare, benchmark and clips."""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.commands import devices
from distill.scoring.clip_io import read_clip
from distill.scoring.clip_sets import Entry, open_set
from distill.scoring.generate import GenerateJob
from distill.scoring.scoring import Job, check_number, generate_clips, match, put_scores, score
from eval.cards import Card, label_of, load_card
from eval.embedded.extractors import Probes
from eval.external import read_scores
from eval.metric import Score
from eval.networks.loaded import Networks
from eval.report.clip_report import headline, published, report_tables
from eval.report.figures import contact_sheets
from eval.report.page import Page, write_page
from eval.report.tables import OTHERS
from eval.scores import IN_CLIPS, chosen
from students.serving.optimize import Speed
from teachers.errors import UserError
from teachers.files import make_folder

REFUSED = 3
VERBS = {
    "compare": ("distill.commands.eval.compare", "two reports of one protocol, clip by clip"),
    "benchmark": ("distill.commands.eval.benchmark", "students on data sets, beside the rows that papers print"),
    "clips": ("distill.commands.eval.clips", "real clips of a run's procedural world, to score its student with"),
    "multiturn": (
        "distill.commands.eval.multiturn",
        "scripted conversations with a served student: latency, drift, sync",
    ),
}
SHEETS, SHEET_SIDE = 3, 128


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for every set that one command scores: how, what a student generates from, and what the run refused."""

    job: Job
    not_admitted: tuple[str, ...]
    seed: int
    text: str | None
    speed: Speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill eval` and its verbs."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--student", type=Path, metavar="DIR", help="an exported student, which generates the clips first"
    )
    source.add_argument("--generated", type=Path, metavar="DIR", help="clips that are there, named as the real ones")
    parser.add_argument("--real", type=Path, metavar="DIR|MANIFEST", help="clips, prepared shards or manifest.parquet")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="a manifest's videos or shards (default: beside it)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="eval.json, eval.md, eval.html and kept features")
    parser.add_argument("--name", help="what the row is called (default: the folder's name)")
    parser.add_argument(
        "--scores", type=Path, nargs="+", default=[], metavar="JSON", help="of other programs (eval/external.py)"
    )
    add_settings(parser)
    verbs = parser.add_subparsers(dest="eval_verb", metavar="VERB")
    for name, (module, summary) in VERBS.items():
        importlib.import_module(module).add_arguments(verbs.add_parser(name, help=summary))


def add_settings(parser: argparse.ArgumentParser, **given: Any) -> None:
    """Options that `distill eval` and `distill eval benchmark` share; `given` replaces every default."""

    def default(value: Any) -> Any:
        return given.get("default", value)

    parser.add_argument(
        "--protocol",
        default=default(None),
        metavar="NAME",
        help="livetalk, omniavatar, syncnet_v2, strict, embedded, or the path of a card.yaml",
    )
    parser.add_argument("--metrics", default=default(None), metavar="A,B", help="some of the card's (eval/protocols)")
    parser.add_argument(
        "--extractors", type=Path, default=default(None), metavar="DIR", help="RUN/stages/extractors of `embedded`"
    )
    parser.add_argument(
        "--processes", type=int, default=default(0), metavar="N", help="beside this one (default 0: all is done here)"
    )
    parser.add_argument("--batch-size", type=int, default=default(32), help="frames that a network sees at once")
    parser.add_argument("--seed", type=int, default=default(0), help="of a student's noise (default 0)")
    parser.add_argument("--text", default=default(None), help="for a student, where a clip has none")
    devices.add_arguments(parser, **given)


def run(args: argparse.Namespace) -> int:
    """Score, write the reports and print the table: 0, or 3 when a metric was refused."""
    if args.eval_verb:
        return importlib.import_module(VERBS[args.eval_verb][0]).run(args)
    for name in ("real", "out", "protocol"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing: distill eval; see distill eval --help")
    if args.student is None and args.generated is None:
        raise UserError("--student or --generated is missing: distill eval; see distill eval --help")
    source = args.student or args.generated
    settings = setting(args, source, args.out / "features")
    if args.student is not None and not is_student(args.student):
        raise UserError(f"no student: {args.student} has no spec.json; give the student/ folder of a finished run")
    real = open_set(args.real, args.videos)
    report = evaluate(settings, source, real, args.out, args.name or source.resolve().name, args.real.stem, args.scores)
    sys.stdout.write((args.out / "eval.md").read_text(encoding="utf-8"))
    return REFUSED if report["refused"] else 0


def is_student(folder: Path) -> bool:
    """Whether a folder is an exported student's, and not one of clips."""
    return (folder / "spec.json").is_file()


def setting(args: argparse.Namespace, source: Path, cache: Path) -> Setting:
    """The options as one value, features being kept in `cache`; raises UserError for options that cannot be."""
    devices.alone("distill eval")
    if args.protocol is None:
        raise UserError("--protocol is missing: distill eval; see distill eval --help")
    card = load_card(args.protocol)
    probes, admitted = None, None
    if card.embedded:
        probes = args.extractors or _extractors_beside(source)
        card = card.resolved(Probes.load(probes).sha256)
        admitted = _admitted(probes)
    elif args.extractors is not None:
        raise UserError(f"--extractors would have no effect: the protocol {card.name} has published ones; remove it")
    offers = IN_CLIPS | Networks(probes).offers
    metrics = chosen(card, None if args.metrics is None else args.metrics.split(","), offers)
    hidden = tuple(key for key in metrics if key in card.metrics and not _shown(card, key, admitted))
    if args.processes < 0 or args.batch_size < 1:
        raise UserError(f"--processes from 0, --batch-size from 1: got {args.processes}, {args.batch_size}")
    device, speed = devices.choose(args, "student" if is_student(source) else "")
    job = Job(
        card=card,
        metrics=tuple(m for m in metrics if m not in hidden),
        cache=cache,
        probes=probes,
        device=str(device),
        batch_size=args.batch_size,
        processes=args.processes,
    )
    return Setting(job=job, not_admitted=hidden, seed=args.seed, text=args.text, speed=speed)


def evaluate(
    settings: Setting,
    source: Path,
    real: Mapping[str, Entry],
    out: Path,
    name: str,
    data: str,
    others: Sequence[Path] = (),
) -> dict[str, Any]:
    """Score a student's or given clips against `real` and write eval.json, eval.md and eval.html into `out`."""
    if name in ("ground_truth", "floor"):
        raise UserError(f"--name {name} is taken by a row of every table; choose another")
    job, card, generates = settings.job, settings.job.card, is_student(source)
    check_number(real, card)
    if not generates:
        generated = open_set(source)
        match(generated, real, card)
    adapted = [read_scores(path, sorted(real), card.columns) for path in others]
    make_folder(out)
    if generates:
        generate = GenerateJob(source, settings.seed, settings.text, out / "generated", job.device, settings.speed)
        generated = generate_clips(generate, real, card, job.processes)
    report = score(job, name, generated, real)
    report |= {"data": data, "source": str(source), "adapters": {}}
    shown = published()["columns"]
    if generates:
        report["generated"] = {"seed": settings.seed, "text": settings.text}
    for metric in settings.not_admitted:
        report["refused"][metric] = f"{metric} refused: the run's extractors did not rank known cases right"
    for one in adapted:
        report["adapters"][one.metric] = one.made_by
        column = {"label": one.metric, **shown.get(one.metric, {}), "table": OTHERS}
        report["columns"][one.metric] = column
        for role, values in one.values.items():
            row = report["rows"][name if role == "generated" else "ground_truth"]
            put_scores(row, {one.metric: Score.over(values)})
    _write(report, out, name, generated, real, card)
    return report


def _write(report: dict[str, Any], out: Path, name: str, generated: Mapping, real: Mapping, card: Card) -> None:
    lines = headline(report)
    lines += [f"{metric} was made by {who}." for metric, who in report["adapters"].items()]
    sheets = []
    for clip in report["clips"][:SHEETS]:
        pairs = (("real", read_clip(real[clip], card, False)), (name, read_clip(generated[clip], card, True)))
        step = max(1, min(pairs[0][1].video.shape[2:]) // SHEET_SIDE)
        sheets.append((clip, [(label, one.video[:, :, ::step, ::step]) for label, one in pairs]))
    facts = {key: report[key] for key in ("source", "clips", "versions", "adapters")}
    page = Page(
        title=f"{name} on {report['data']}",
        lines=lines,
        tables=report_tables(report),
        refused=report["refused"],
        sheets=contact_sheets(sheets),
        choices=report["card"]["choices"],
        details={
            f"Card {label_of(report['card'])}": json.dumps(report["card"], indent=1),
            "Clips and versions": json.dumps(facts, indent=1),
        },
    )
    write_page(page, report, out, "eval")


def _shown(card: Card, key: str, admitted: Mapping[str, bool] | None) -> bool:
    """False where the run tried the admission of what the metric stands on, and refused it."""
    bases = {column.stands_on for column in card.metrics[key].columns.values()}
    return admitted is None or all(admitted.get(base, True) for base in bases if base is not None)


def _extractors_beside(source: Path) -> Path:
    """stages/extractors of the run that a student lies in."""
    places = [source.resolve().parent / "stages" / "extractors", source.resolve().parent.parent / "extractors"]
    for place in places:
        if (place / "probes.json").is_file():
            return place
    raise UserError(f"no extractors beside {source}: the embedded protocol wants --extractors RUN/stages/extractors")


def _admitted(folder: Path) -> dict[str, bool] | None:
    """What the run's stage says of each metric; None where it is not there."""
    try:
        return json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))["metrics"]["admitted"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None

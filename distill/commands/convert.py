"""`distill convert`: weights from one published layout to another, strictly and with one shard in memory; with a recipe that says
what else a stream needs, a published student as a student folder; or a student folder for other programs: its step as an ONNX
graph, or a repository of a modular pipeline for diffusers."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from teachers.checkpoints.layouts import LAYOUTS
from teachers.checkpoints.strict import listed
from teachers.errors import UserError

STUDENT, ONNX, MODULAR = "student", "onnx", "modular"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill convert`."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a file of weights or its folder; the layout is recognised"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; for self-forcing a .pt file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of --recipe")
    parser.add_argument(
        "--to",
        choices=(*LAYOUTS, STUDENT, ONNX, MODULAR),
        required=True,
        help="layout to write, or a student folder; of a student folder its step as ONNX, or a diffusers modular pipeline",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="RECIPE", help="with --to student: of which the weights are a student"
    )
    parser.add_argument("--base", type=Path, metavar="BASE", help="Wan weights that a LoRA (OmniAvatar) was trained on")
    parser.add_argument(
        "--lora",
        choices=("fold", "adapter"),
        help="fold a LoRA into the weights (default), or keep it as a peft adapter",
    )
    parser.add_argument(
        "--widen", action="store_true", help="consent to reference and mask channels that start at zero (16 -> 33)"
    )
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="of a .pt file with several (default generator_ema, generator, model or state_dict)",
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors that are not taken, such as '_cls_pred_branch.*' of a GAN critic; may be given more than once",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print one line on what was written; return 0. Raises UserError, and then no file remains."""
    from teachers.checkpoints.convert import check_target, plan

    if (args.to == STUDENT) != (args.recipe is not None):
        raise UserError(
            f"--to {STUDENT} and --recipe go together: the recipe says chunks, history and encoders; give both"
        )
    if args.to == STUDENT:
        return _student(args)
    if args.overrides:
        raise UserError(f"{args.overrides[0]} would have no effect: it is of --recipe; remove it")
    if args.to in (ONNX, MODULAR):
        return _for_others(args)
    check_target(args.target, args.to)
    options = {"lora": args.lora, "widen": args.widen, "entry": args.entry, "leave_out": args.leave_out}
    conversion = plan(args.source, args.to, base=args.base, **options)
    with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc="convert", file=sys.stderr) as progress:
        conversion.write(args.target, tick=progress.update)
    source = conversion.source
    lora = f" and a LoRA of rank {conversion.adapter.rank}" if conversion.adapter else ""
    ignored = f"; ignored: {listed(source.ignored)}" if source.ignored else ""
    sys.stdout.write(
        f"{args.target}: {args.to}, {len(conversion.tensors)} tensors, {conversion.num_parameters:,} parameters{lora}, "
        f"from {source.layout} ({source.path}){ignored}\n"
    )
    return 0


def _student(args: argparse.Namespace) -> int:
    """Write the student folder of weights that are published as a student's, and one line on it; return 0."""
    from distill.pipeline.pretrained import published_student
    from distill.recipe import load_recipe
    from students.weights.card import model_card
    from students.weights.checkpoint import save_student
    from teachers.checkpoints.convert import check_target
    from teachers.files import staged

    _refuse_options(args, "convert to ours first, and give that as SRC")
    check_target(args.target, STUDENT)
    recipe = load_recipe(args.recipe, args.overrides)
    bundle = published_student(recipe, args.source, args.base)
    net = bundle.student.net
    facts = {"weights": args.source.name, "over": args.base.name if args.base else "", "recipe": recipe.name}
    title = f"{args.source.name}, a published student"
    card = model_card(bundle.spec, title=title, facts={name: value for name, value in facts.items() if value})
    with staged(args.target, sum(p.numel() * p.element_size() for p in net.parameters())) as temporary:
        save_student(temporary, bundle, card)
    count = sum(p.numel() for p in net.parameters())
    sys.stdout.write(f"{args.target}: a student of {count:,} parameters, from {args.source}\n")
    return 0


def _for_others(args: argparse.Namespace) -> int:
    """Write what other programs read of a student folder, and one line on it; return 0."""
    from students.weights.checkpoint import load_student
    from teachers.checkpoints.convert import check_target
    from teachers.files import staged

    _refuse_options(args, "remove it")
    if args.base:
        raise UserError(f"--base has no effect with --to {args.to}: remove it")
    check_target(args.target, args.to)
    if args.to == MODULAR:
        from students.export.modular import write_repository

        with staged(args.target) as temporary:
            write_repository(temporary, args.source)
        sys.stdout.write(f"{args.target}: a modular pipeline for diffusers, of the student {args.source}\n")
        return 0
    from students.export.onnx_step import check_exportable, write_onnx

    bundle = load_student(args.source)
    check_exportable(bundle.spec)
    with staged(args.target) as temporary:
        written = write_onnx(temporary, bundle)
    sys.stdout.write(
        f"{args.target}: the step of {args.source}, {written.num_bytes / 2**20:.1f} MiB; over {written.chunks} chunks its latents "
        f"differ from the student's by {written.error:.2g} at most\n"
    )
    return 0


def _refuse_options(args: argparse.Namespace, fix: str) -> None:
    given = {"--lora": args.lora, "--widen": args.widen, "--entry": args.entry, "--leave-out": args.leave_out}
    if wrong := [name for name, value in given.items() if value]:
        raise UserError(f"{wrong[0]} has no effect with --to {args.to}: {fix}")

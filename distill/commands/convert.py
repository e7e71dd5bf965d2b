"""`distill convert`: weights from one published layout to another, strictly and with one shard in memory."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from teachers.checkpoints.layouts import LAYOUTS
from teachers.checkpoints.strict import listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill convert`."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a file of weights or its folder; the layout is recognised"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; for self-forcing a .pt file")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="layout to write")
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

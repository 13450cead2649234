"""Inspect a checkpoint or published weights; export an encoder for other programs.

Examples:
  python -m engine.checkpoint inspect checkpoints/exp/last.pth
  python -m engine.checkpoint export checkpoints/exp/last.pth --format safetensors --half --out exp.safetensors
  python -m engine.checkpoint export pretrained:dgcnn_cls --format onnx --out dgcnn_cls.onnx
  python -m engine.checkpoint export pretrained:dgcnn_cls --format torch_export --out dgcnn_cls.pt2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.checkpoint import load_checkpoint
from engine.export import FORMATS, TOLERANCE, describe_weights, export
from engine.inspection import inspect, report
from engine.load_model import encoder_from_checkpoint, find_weights
from models import ENCODER_ALIASES, ENCODERS
from utils.cli import HelpFormatter, log_to_screen, positive_int, run, write_json
from utils.errors import UserError
from utils.files import sha256

SOURCE = "checkpoint, published weights, or weights of this repository: pretrained[:NAME]"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.checkpoint", description=__doc__, formatter_class=HelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect", help="list what a file contains, and name the encoder it fits", formatter_class=HelpFormatter
    )
    command.set_defaults(function=inspect_command)
    command.add_argument("source", metavar="FILE", help=SOURCE)
    command.add_argument("--json", metavar="FILE", help="also write it to FILE as one JSON object")
    command = commands.add_parser("export", help="write an encoder for other programs", formatter_class=HelpFormatter)
    command.set_defaults(function=export_command)
    command.add_argument("source", metavar="SOURCE", help=SOURCE)
    command.add_argument(
        "--format",
        required=True,
        choices=list(FORMATS),
        help="safetensors: weights only, which the scripts here read too; torch_export, onnx: a program for any number "
        "of clouds and points",
    )
    command.add_argument("--out", required=True, metavar="FILE", help="file to write")
    command.add_argument("--overwrite", action="store_true", help="replace --out")
    command.add_argument("--half", action="store_true", help="safetensors: round matrices to float16, half the size")
    command.add_argument("--model", choices=[*ENCODERS, *ENCODER_ALIASES], help="encoder of published weights")
    command.add_argument("--k", type=positive_int, help="neighbors per point (default: the checkpoint's)")
    command.add_argument("--json", metavar="FILE", help="also write a summary to FILE as one JSON object")
    return parser


def inspect_command(args: argparse.Namespace) -> dict[str, Any]:
    """Print the description of a file; return it."""
    found = inspect(find_weights(args.source))
    print("\n".join(report(found)))
    return found


def export_command(args: argparse.Namespace) -> dict[str, Any]:
    """Export an encoder; return the summary."""
    out, suffix = Path(args.out), FORMATS[args.format]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: a file of --format {args.format} ends in {suffix}")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists; choose another --out, or --overwrite")
    path = find_weights(args.source, model=args.model)
    encoder = encoder_from_checkpoint(path, model=args.model, k=args.k)
    about = describe_weights(encoder, load_checkpoint(path))
    difference = export(encoder, out, args.format, about=about, half=args.half)
    found = {"file": str(out), "bytes": out.stat().st_size, "sha256": sha256(out), **about}
    found["difference"] = None if difference is None else difference._asdict()
    settings = ", ".join(f"{key} {value}" for key, value in about["encoder"]["kwargs"].items())
    print(f"{out}: {about['encoder']['name']} ({settings}), {found['bytes']:,} bytes")
    if difference is None:
        print("not compared with PyTorch: pip install onnxruntime")
    else:
        print(
            f"its features differ from the encoder's by at most {difference.largest:.1e} of the largest one, "
            f"by {difference.norm:.1e} in norm"
        )
        if difference.largest > TOLERANCE and not args.half:
            print(f"warning: that is more than {TOLERANCE}; neighbors at equal distances may differ")
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run a command; return what ``--json`` writes.

    Raises:
        UserError: a file or a setting is wrong.
    """
    args = build_parser().parse_args(argv)
    log_to_screen()
    found = args.function(args)
    write_json(args.json, found)
    return found


if __name__ == "__main__":
    run(main)

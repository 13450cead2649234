r"""Put an encoder into weights/: the file, its entry in the index, and its model card.

The file holds the encoder alone, its matrices in float16 (--full: in float32, unchanged). When weights are published
again, the text of their card from "## Limits" on is kept; everything above it follows from the index.

Examples:
  # a checkpoint of a row of docs/results.md: its commands and scores are taken from results/
  python -m benchmarks.publish_weights runs/reproduce/generated12k-con/seed_1/last.pth \
      --row modelnet10-generated12k-con --data "12,096 generated shapes (docs/generated_shapes.md)"
  # any other; again with rows that score pretrained:NAME once those are recorded
  python -m benchmarks.publish_weights checkpoints/long/last.pth --data "20,000 generated shapes (CC0)" \
      --command "python train_crossnet_con.py --data_root data/shapes.h5 --exp_name long" --hours 3.1
  python -m benchmarks.publish_weights checkpoints/long/last.pth ... --row modelnet10-weights demo-weights --overwrite
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from benchmarks.plan import PLAN, Plan
from benchmarks.result_pages import Records, mean_and_deviation
from engine.checkpoint import load_checkpoint
from engine.export import describe_weights, export
from engine.load_model import encoder_from_checkpoint
from models import ENCODERS, pretrained
from utils.cli import HelpFormatter, log_to_screen, run, write_json
from utils.errors import UserError
from utils.files import replacing, sha256
from utils.weight_files import SUFFIX

MOST_BYTES = 4_000_000
KEPT = "## Limits"
# What the index says, and the rows of a card.
ROWS = {name: name for name in "encoder data command commit steps hours seed".split()} | {
    "stored": "stored in",
    "license": "license",
    "sha256": "SHA-256",
}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("source", metavar="CHECKPOINT", help="checkpoint of pretraining")
    parser.add_argument("--name", help="of the weights (default: that of the encoder)")
    parser.add_argument("--data", required=True, metavar="TEXT", help="what they are trained on, with its license")
    parser.add_argument("--command", metavar="TEXT", help="command, or commands, that trained them")
    parser.add_argument(
        "--row",
        nargs="+",
        default=[],
        metavar="NAME",
        help="rows of the plan that have scored the checkpoint or these weights: scores for the card; those of a "
        "checkpoint also give --command",
    )
    parser.add_argument("--plan", default=str(PLAN), metavar="FILE", help="plan of --row")
    parser.add_argument("--results", default="results", metavar="DIR", help="records of --row")
    parser.add_argument("--hours", type=float, metavar="H", help="of training")
    parser.add_argument("--steps", type=int, help="of training, all runs together (default: the checkpoint's)")
    parser.add_argument(
        "--score", nargs="+", default=[], metavar="WHAT=VALUE", help="scores, with their deviation over seeds"
    )
    parser.add_argument("--license", default="MIT, as the code", metavar="TEXT", help="of the weights")
    parser.add_argument("--full", action="store_true", help="keep float32")
    parser.add_argument("--overwrite", action="store_true", help="replace weights of this name")
    return parser


def recorded(
    name: str, *, plan: Plan, results: Path, checkpoint: str, weights: Mapping[str, Any]
) -> tuple[str | None, dict[str, str]]:
    """Return what a row of the plan has recorded for a checkpoint, or for the weights exported from it.

    Args:
        name: the row.
        plan: its plan.
        results: folder of the records.
        checkpoint: SHA-256 of the checkpoint.
        weights: what records of rows that score the weights say of them, by ``pretrained:NAME``.

    Returns:
        The commands that trained a checkpoint, None for a row that scores weights; and the scores over seeds.

    Raises:
        UserError: the plan lacks the row, or none of its records scores the checkpoint or the weights.
    """
    records = Records(plan, results)
    row = records.rows.get(name)
    if row is None:
        raise UserError(f"--row {name}: the plan has no such row; python -m benchmarks.reproduce --list shows all")
    trained = [each for each in records.of(row) if each.get("checkpoint_sha256") == checkpoint]
    found = trained or [each for each in records.of(row) if weights.items() <= each["flags"].items()]
    if not found:
        raise UserError(f"{results / name} has no record of these weights; run the row first")
    seeds = [record["seed"] for record in found]
    scores = {}
    for title, place in plan.tables[row.table].columns.items():
        if values := [value for seed, value in records.values(row, place).items() if seed in seeds]:
            scores[f"{name}, {title}"] = mean_and_deviation(values)
    return "; ".join(trained[0]["commands"][:-1]) if trained else None, scores  # the last command scores


def card(name: str, entry: Mapping[str, Any], rest: str) -> str:
    """Return a model card: what the entry of the index says, then ``rest``."""
    encoder, stored = entry["encoder"], f"{entry['dtype']}, unchanged"
    if entry["dtype"] == "float16":
        stored = f"float16; that changes features by {entry['rounding']} of their norm"
    settings = ", ".join(f"{key} {value}" for key, value in encoder["kwargs"].items())
    shown = {
        **entry,
        "encoder": f"{encoder['name']} ({settings}), {entry['parameters']:,} parameters",
        "command": f"`{entry['command']}`",
        "stored": stored,
        "sha256": f"`{entry['sha256']}`",
    }
    lines = [
        f"# {name}",
        "",
        f"A point encoder pretrained without labels: `models.load({name!r})`. How to use it: "
        "[docs/weights.md](../docs/weights.md).".replace("'", '"'),
        "",
        "| | |",
        "| --- | --- |",
        f"| file | [{entry['file']}]({entry['file']}), {entry['bytes']:,} bytes |",
        *(f"| {title} | {shown[key]} |" for key, title in ROWS.items() if shown.get(key) is not None),
        "",
    ]
    if entry["scores"]:
        lines += [
            "## Scores",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {k} | {v} |" for k, v in entry["scores"].items()),
            "",
        ]
    return "\n".join([*lines, rest])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Publish, and return the entry of the index.

    Raises:
        UserError: a wrong setting, or a file that cannot be read or written.
    """
    args = build_parser().parse_args(argv)
    log_to_screen()
    scores, command = dict(score.rpartition("=")[::2] for score in args.score), args.command
    if "" in scores:
        raise UserError("--score takes WHAT=VALUE, such as 'ModelNet10, linear SVM=93.5 ± 0.3'")
    if args.name is not None and not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"--name {args.name}: files are called this; use letters, digits and . _ -")
    encoder, payload = encoder_from_checkpoint(args.source), load_checkpoint(args.source)
    about = describe_weights(encoder, payload)
    name, index = args.name or about["encoder"]["name"], pretrained.pretrained_index()
    if name in index and not args.overwrite:
        raise UserError(f"there are weights {name!r}; replace them with --overwrite, or choose another --name")
    path = pretrained.WEIGHTS / f"{name}{SUFFIX}"
    with tempfile.TemporaryDirectory() as folder:  # the old weights stay if a record is missing
        file = Path(folder) / path.name
        rounding = export(encoder, file, "safetensors", about=about, half=not args.full)
        weights = {f"pretrained:{name}": {"sha256": sha256(file)}}
        plan, measured = Plan.read(Path(args.plan), {}), {}
        for row in args.row:
            trained_by, found = recorded(
                row, plan=plan, results=Path(args.results), checkpoint=sha256(args.source), weights=weights
            )
            command, measured = command or trained_by, measured | found
        if command is None:
            raise UserError("give --command, or a --row that has scored the checkpoint: cards say how to train it")
        with replacing(path) as temporary:
            shutil.copyfile(file, temporary)
    entry = {
        "file": path.name,
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "dtype": "float32" if args.full else "float16",
        "encoder": about["encoder"],
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "data": args.data,
        "command": command,
        "commit": payload.get("git_commit"),
        "steps": args.steps or about.get("step"),
        "hours": args.hours,
        "seed": payload.get("arguments", {}).get("seed"),
        "rounding": None if args.full else f"{rounding.norm:.1e}",
        "license": args.license,
        "scores": measured | scores,
    }
    order = {known: i for i, known in enumerate(ENCODERS)}
    index = dict(sorted({**index, name: entry}.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    write_json(pretrained.WEIGHTS / pretrained.INDEX, index)
    page = path.with_suffix(".md")
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    rest = old[old.index(KEPT) :] if KEPT in old else f"{KEPT}\n\nNot written yet.\n"
    with replacing(page) as temporary:
        temporary.write_text(card(name, entry, rest), encoding="utf-8")
    change = "unchanged" if args.full else f"features changed by {rounding.norm:.1e} in norm"
    print(f"{path}: {entry['bytes']:,} bytes of {entry['dtype']}, {change}; card: {page}")
    if entry["bytes"] > MOST_BYTES:
        print(f"warning: that is more than {MOST_BYTES:,} bytes")
    return entry


if __name__ == "__main__":
    run(main)

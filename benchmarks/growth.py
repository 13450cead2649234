r"""Show how features grow along pretraining: scores of kept checkpoints against steps, drawn on to ten times the steps.

Runs trained with --keep_every are scored at every step_<n>.pth and at last.pth:

  all labels, 1 label   percent; linear SVM on the labeled set, as downstream/classification/main.py
  mAP                   percent; cosine retrieval within its test split
  R@1 views             percent of views whose nearest other view is of the same cloud; on held-out pairs, projections
  alignment, uniformity of the projections of two views (Wang and Isola, arXiv:2005.10242); less is better

The pairs are those that the run held out (--val_fraction) or, the same for every run, --pairs_count ones of --pairs,
which no run may have trained on. Two curves are fitted to each percentage: a + b log(steps), and c - d steps^-p, which
saturates. Both are drawn on to ten times the steps. That is an extrapolation, not a measurement: the first knows no
upper bound, and its interval says how far checkpoints scatter around it, not whether it holds. Checkpoints along a run
with a cosine schedule are not the ends of shorter runs, since the rate falls at the end.

Examples:
  python -m benchmarks.growth --run real=checkpoints/real --run generated=checkpoints/generated \
      --data_root data/modelnet10 --dataset modelnet10 --picture docs/growth.png --json growth.json

A call that was stopped continues when it is repeated: checkpoints that were scored are kept in --work_dir.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from benchmarks.frame import Benchmark, file_name, named
from benchmarks.measure import text_table
from benchmarks.recipes import held_out_pairs
from benchmarks.spread import LEVEL
from datasets.pair_sources import draw_shapes, open_source
from datasets.registry import CLASSIFICATION_SETS
from downstream.classification import main as classification
from downstream.classification.eval_inputs import open_splits
from downstream.features import evaluating
from downstream.figures import PICTURE_TYPES, check_output_path
from downstream.pair_validation import view_scores
from engine.load_model import encoder_and_point_head
from models.base import pooled_features
from utils.cli import non_negative_int, positive_int, read_json, run, write_json
from utils.errors import UserError
from utils.files import sha256

PERCENT = ("all labels", "1 label", "mAP", "R@1 views")
SCORES = (*PERCENT, "alignment", "uniformity")
TIMES = 10  # the steps extrapolated to, over those measured
PICTURE_PX = 16  # renderings are read with the pairs but not used


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    g = parser.add_argument_group("runs")
    g.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="a run folder; may be repeated")
    g.add_argument("--fit_from", type=non_negative_int, default=0, metavar="STEPS", help="fit from this step on")
    g = parser.add_argument_group("scores")
    g.add_argument("--data_root", required=True, metavar="DIR", help="folder of the labeled set")
    g.add_argument("--dataset", default="modelnet10", choices=CLASSIFICATION_SETS, help="labeled set")
    g.add_argument("--num_points", type=positive_int, default=1024, metavar="N", help="points per cloud")
    g.add_argument("--pairs", metavar="DIR", help="pairs that no run trained on (default: those that each held out)")
    g.add_argument("--pairs_count", type=positive_int, default=512, metavar="N", help="how many of --pairs, at most")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g = parser.add_argument_group("output")
    g.add_argument("--work_dir", default="runs/growth", metavar="DIR", help="scores of each checkpoint")
    g.add_argument("--picture", metavar="FILE", help="draw the curves (.png, .pdf)")


def read_runs(words: Sequence[str]) -> dict[str, list[Path]]:
    """Return the checkpoints of each ``NAME=FOLDER``: ``step_<n>.pth`` in order, then ``last.pth``.

    Raises:
        UserError: a word is not ``NAME=FOLDER``, or a folder has none of them.
    """
    found = {}
    for name, folder in named(words, "--run", "FOLDER").items():
        steps = {
            int(match[1]): path
            for path in Path(folder).glob("step_*.pth")
            if (match := re.fullmatch(r"step_(\d+)\.pth", path.name))
        }
        last = Path(folder) / "last.pth"
        found[name] = [path for _, path in sorted(steps.items())] + ([last] if last.exists() else [])
        if not found[name]:
            raise UserError(f"{folder} has neither step_<n>.pth nor last.pth; train with --keep_every STEPS")
    return found


class Scorer:
    """Scores of checkpoints; each is kept in a file."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        words = ["--dataset", args.dataset, "--data_root", args.data_root, "--num_points", str(args.num_points)]
        words += ["--shots", "1", "--model_path", "-", "--device", str(device), "--seed", str(args.seed)]
        self.config = classification.SVMConfig.from_flags(classification.build_parser().parse_args(words))
        self.splits = open_splits(args.dataset, args.data_root, variant=self.config.variant, num_points=args.num_points)
        names = ("dataset", "data_root", "num_points", "pairs", "pairs_count", "seed")
        self.settings = {name: getattr(args, name) for name in names}
        self.views: dict[str, list[dict[str, torch.Tensor]]] = {}

    def __call__(self, name: str, path: Path) -> dict[str, Any]:
        """Score a checkpoint of the run ``name``, or return what an earlier call found; with its ``step``."""
        kept = Path(self.args.work_dir) / file_name(name) / f"{path.stem}.json"
        key = {**self.settings, "sha256": sha256(path)}
        if kept.exists():
            found = read_json(kept)
            if found.get("settings") == key:
                return found["scores"]
        encoder, head, payload = encoder_and_point_head(path)
        record = classification.evaluate(encoder, *self.splits, self.config).record
        scores = {
            "step": payload["progress"]["step"],
            "all labels": record["test_accuracy"],
            "1 label": record["shots"]["1"][0],
            "mAP": record["retrieval_map"],
        }
        if views := self.held_out_views(payload):
            scores |= self.label_free(encoder, head.to(self.device), views)
        print(f"{name}, step {scores['step']}: 1 label {scores['1 label']:.1f}", file=sys.stderr, flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"settings": key, "scores": scores})
        return scores

    def held_out_views(self, payload: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
        """Return batches of two views of the pairs for a checkpoint; none if its run held out no pairs."""
        root = self.args.pairs or payload["arguments"]["data_root"]
        held_out = payload.get("held_out", [])
        if self.args.pairs:
            chosen = draw_shapes(open_source(root).ids, self.args.pairs_count, seed=self.args.seed)
            same = Path(root).resolve() == Path(payload["arguments"]["data_root"]).resolve()
            if same and not set(chosen) <= set(held_out):
                raise UserError(
                    f"--pairs {root} are the pairs that a run trained on; leave --pairs out, or name others"
                )
            held_out = chosen
        key = "\n".join([root, *held_out])
        if held_out and key not in self.views:
            sizes = {"num_points": self.args.num_points, "image_size": PICTURE_PX, "modality": "gray"}
            validation, augment = held_out_pairs(
                root, held_out, **sizes, seed=self.args.seed, points_flag="--num_points"
            )
            self.views[key] = [augment(batch, epoch=0, device=self.device) for batch in validation.batches]
        return self.views.get(key, [])

    @staticmethod
    def label_free(
        encoder: torch.nn.Module, head: torch.nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, float]:
        """Score the projections of two views of every pair."""
        with evaluating(encoder), evaluating(head):
            first, second = (
                torch.cat([head(pooled_features(encoder, batch[view].mT)).float().cpu() for batch in batches])
                for view in ("view1", "view2")
            )
        found = view_scores(first, second)
        return {
            "R@1 views": found["val_view_to_view_r1"],
            "alignment": found["val_alignment"],
            "uniformity": found["val_uniformity"],
        }


@dataclass(frozen=True)
class Fit:
    """Curves through a score at several steps, and what they give at ``at`` steps: extrapolated, not measured.

    Attributes:
        at: steps extrapolated to.
        log: a and b of a + b log(steps).
        log_value: that at ``at``.
        log_interval: 95 % prediction interval there, None without a degree of freedom.
        power: c, d, p of c - d steps^-p; None if fewer than four points or no fit.
        power_value: that at ``at``.
    """

    at: int
    log: tuple[float, float]
    log_value: float
    log_interval: tuple[float, float] | None
    power: tuple[float, float, float] | None
    power_value: float | None


def saturating(steps: np.ndarray, c: float, d: float, p: float) -> np.ndarray:
    """Return c - d steps^-p."""
    return c - d * steps**-p


def fit(steps: Sequence[float], values: Sequence[float]) -> Fit | None:
    """Fit both curves by least squares; None for fewer than two different steps.

    Args:
        steps: above 0.
        values: in percent, which bounds the level at which the second curve saturates.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(np.unique(x)) < 2:
        return None
    at = TIMES * int(x.max())
    line = stats.linregress(np.log(x), y)
    value, interval = line.intercept + line.slope * np.log(at), None
    if len(x) > 2:
        residual = y - line.intercept - line.slope * np.log(x)
        centered = np.log(x) - np.log(x).mean()
        leverage = 1 + 1 / len(x) + (np.log(at) - np.log(x).mean()) ** 2 / (centered**2).sum()
        half = stats.t.ppf((1 + LEVEL) / 2, len(x) - 2) * np.sqrt((residual**2).sum() / (len(x) - 2) * leverage)
        interval = (float(value - half), float(value + half))
    power = None
    if len(x) > 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            try:
                start = (min(100.0, y.max()), max(y.max() - y.min(), 1e-3) * x.min() ** 0.5, 0.5)
                bounds = ([0, 0, 0.01], [100, np.inf, 3])
                power = tuple(map(float, optimize.curve_fit(saturating, x, y, p0=start, bounds=bounds)[0]))
            except RuntimeError:
                pass  # did not converge
    return Fit(
        at=at,
        log=(float(line.intercept), float(line.slope)),
        log_value=float(value),
        log_interval=interval,
        power=power,
        power_value=None if power is None else float(saturating(np.float64(at), *power)),
    )


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Score every checkpoint of every run and fit the curves."""
    runs = read_runs(args.run)
    scorer, result = Scorer(args, device), {}
    for name, paths in runs.items():
        scores = {
            found["step"]: found for found in (scorer(name, path) for path in paths)
        }  # last.pth may repeat a step
        points = [scores[step] for step in sorted(scores)]
        fits = {}
        for score in PERCENT:
            used = [(p["step"], p[score]) for p in points if p["step"] >= max(1, args.fit_from) and score in p]
            if used and (found := fit(*zip(*used, strict=True))):
                fits[score] = asdict(found)
        result[name] = {"points": points, "fits": fits}
    if args.picture:
        draw(result, Path(args.picture))
    return {"runs": result}


def score_lines(runs: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table of the scores by run and step, heading first."""
    lines = [("run", "steps", *SCORES)]
    for name, found in runs.items():
        for point in found["points"]:
            cells = [f"{point[s]:.{1 if s in PERCENT else 3}f}" if s in point else "-" for s in SCORES]
            lines.append((name, f"{point['step']:,}", *cells))
    return lines


def percent_text(value: float) -> str:
    """Format an extrapolated percentage, which may lie where none can be."""
    return "over 100" if value > 100 else f"{value:.1f}"


def fit_lines(runs: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a table of what the fitted curves give at ten times the steps, heading first."""
    lines = [("extrapolated, not measured", "score", "at steps", "a + b log(steps)", "saturating")]
    for name, found in runs.items():
        for score, curve in found["fits"].items():
            line, interval = percent_text(curve["log_value"]), ""
            if curve["log_interval"] is not None and curve["log_value"] <= 100:
                interval = f" [{', '.join(map(percent_text, curve['log_interval']))}]"
            other = "-" if curve["power_value"] is None else percent_text(curve["power_value"])
            lines.append((name, score, f"{curve['at']:,}", line + interval, other))
    return lines


def table(result: Mapping[str, Any]) -> str:
    """Format the scores by step, and the extrapolations."""
    tables = (score_lines(result["runs"]), fit_lines(result["runs"]))
    return "\n\n".join(text_table([(*line, "") for line in lines]) for lines in tables)


def draw(runs: Mapping[str, Any], path: Path) -> None:
    """Draw every score against steps, a line for each run; fitted curves are dashed from the last step on."""
    from utils.pictures import Figure, LogLocator, save_figure

    shown = [score for score in SCORES if any(score in point for found in runs.values() for point in found["points"])]
    figure = Figure(figsize=(4.2 * min(3, len(shown)), 3.3 * -(-len(shown) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 3), min(3, len(shown)), squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, score in zip(axes, shown, strict=False):
        for number, (name, found) in enumerate(runs.items()):
            points = [(p["step"], p[score]) for p in found["points"] if score in p and p["step"] > 0]
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), ".-", color=f"C{number}", label=name)
            if curve := found["fits"].get(score):
                ahead = np.geomspace(points[-1][0], curve["at"], 50)
                axis.plot(ahead, curve["log"][0] + curve["log"][1] * np.log(ahead), "--", color=f"C{number}", alpha=0.6)
                if curve["power"]:
                    axis.plot(ahead, saturating(ahead, *curve["power"]), ":", color=f"C{number}", alpha=0.8)
        axis.set(title=score + (" (%)" if score in PERCENT else ""), xlabel="steps", xscale="log")
        if score in PERCENT:
            axis.set_ylim(top=min(100.0, axis.get_ylim()[1]))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"Dots: measured. Beyond, extrapolated to {TIMES} times the steps: dashed a + b log(steps), dotted saturating",
        fontsize=10,
    )
    save_figure(figure, path, dpi=110)


def check(args: argparse.Namespace) -> None:
    """Raise UserError if the picture cannot be drawn or there are too few pairs."""
    if args.picture:
        check_output_path(args.picture, PICTURE_TYPES)
    if args.pairs and (count := min(args.pairs_count, len(open_source(args.pairs).ids))) < 2:
        raise UserError(f"--pairs {args.pairs} --pairs_count {args.pairs_count}: {count} pairs; scores need 2 or more")


BENCHMARK = Benchmark("growth", __doc__, add_arguments, measure, table, repeats=None, threads=1, check=check)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main)

"""Price a plan of ``benchmarks.reproduce``: the hours of what is missing, by row and in all."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import train_crossnet_con
from benchmarks.measure import seconds_of, text_table
from benchmarks.plan import Row
from benchmarks.reproduce import PRETRAINING_SCRIPT, Runner, command_line
from benchmarks.svm import synthetic_features
from datasets.modelnet import ModelNet10, ModelNet40
from datasets.pair_sources import open_source
from downstream.classification import main as classification
from downstream.retrieval import average_precisions
from downstream.svm import few_label_svm, linear_svm
from utils.cli import read_json

SVM_SCRIPT = "downstream/classification/main.py"
# Settings that a step's time depends on; pretrainings that agree in all are measured once.
COST_SETTINGS = (
    *("batch_size", "accumulate", "chunk_size", "num_points", "objective", "image_modality", "image_model"),
    *("image_size", "model", "k", "emb_dims", "amp", "channels_last", "compile", "workers", "device", "use_sgd"),
)
# Clouds and classes of labeled sets, so that rows can be priced without them.
SIZES: Mapping[str, tuple[Mapping[str, int], int]] = {
    "modelnet40": (ModelNet40.official_sizes, 40),
    "modelnet10": (ModelNet10.official_sizes, 10),
    "demo": ({"train": 189, "test": 104}, 15),
    "scanobjectnn OBJ_BG": ({"train": 2309, "test": 581}, 15),
    "scanobjectnn OBJ_ONLY": ({"train": 2309, "test": 581}, 15),
    "scanobjectnn PB_T50_RS": ({"train": 11416, "test": 2882}, 15),
}
NOT_PRICED = "starts of processes, reading labeled sets, scoring of held-out pairs, data that is made"
# Words of the training script, pairs to read (None: a stand-in), points of the clouds whose features are timed.
Measure = Callable[[Sequence[str], "str | None", int], Mapping[str, float]]


def say(text: str) -> None:
    """Tell what takes the time; the table comes last."""
    print(text, file=sys.stderr, flush=True)


class Prices:
    """Hours of pretraining and scoring from unit costs, each measured once.

    Args:
        runner: of the plan.
        measure: returns ``seconds_per_step``, ``checkpoint_seconds``, ``cloud_seconds`` (features of one cloud) and
            ``dims`` of the features.
        shapes: pairs of a set that is neither here nor described by the plan.
        cpu: count processor time.
    """

    def __init__(self, runner: Runner, measure: Measure, *, shapes: int, cpu: bool = False) -> None:
        self.runner, self.measure, self.shapes, self.cpu = runner, measure, shapes, cpu
        self.costs: dict[tuple, Mapping[str, float]] = {}
        self.svms: dict[tuple, float] = {}

    def training(self, row: Row) -> tuple[list[str], str | None]:
        """Return the words of the row's pretraining and its data, None if that is not here.

        Without pretraining, the words of a small one of the same encoder.
        """
        if row.pretraining:
            given = self.runner.plan.pretrainings[row.pretraining]
            flags = self.runner.flags(PRETRAINING_SCRIPT, given.flags)
            data = None if self.runner.plan.missing(given.needs) else flags.get("data_root")
            here = data if data and Path(data).exists() else None
            return command_line("", {**flags, "data_root": None})[2:], here
        encoder = {name: row.flags.get(name) for name in ("model", "k", "emb_dims")}
        small = {"batch_size": 4, "num_points": 256, "image_model": "resnet18", "image_size": 32, "workers": 0}
        return command_line("", {**small, **encoder})[2:], None

    def cost(self, row: Row) -> Mapping[str, float]:
        """Return the unit costs of a row."""
        words, data = self.training(row)
        settings = train_crossnet_con.build_parser().parse_args(words)
        points = self.svm_settings(row).num_points if row.script == SVM_SCRIPT else 1024
        key = (*(getattr(settings, name) for name in COST_SETTINGS), data, points)
        if key not in self.costs:
            say(f"{row.name}: timing a training step of {settings.model}, {settings.batch_size} objects")
            self.costs[key] = self.measure(words, data, points)
        return self.costs[key]

    def pretraining(self, row: Row) -> float:
        """Return the hours of one seed of the row's pretraining from its start."""
        words, data = self.training(row)
        settings = train_crossnet_con.build_parser().parse_args(words)
        needs, made = self.runner.plan.pretrainings[row.pretraining].needs, self.runner.plan.made
        if data:
            shapes = len(open_source(data).ids)
        else:
            shapes = next((made[need].flags["shapes"] for need in needs if need in made), self.shapes)
        steps = round(shapes * (1 - settings.val_fraction)) // (settings.batch_size * settings.accumulate)
        saves = 1 + (steps // settings.save_every if settings.save_every else 0)
        cost = self.cost(row)
        return settings.epochs * (steps * cost["seconds_per_step"] + saves * cost["checkpoint_seconds"]) / 3600

    def svm_settings(self, row: Row) -> argparse.Namespace:
        """Return the settings of a row that is scored by a linear SVM."""
        return classification.build_parser().parse_args(command_line("", self.runner.flags(row.script, row.flags))[2:])

    def scoring(self, row: Row) -> float | None:
        """Return the hours of one seed's scoring script; None if they can be neither modeled nor looked up.

        Linear SVMs are modeled. Other scripts take as long as in the seeds of the row that are recorded.
        """
        if row.script != SVM_SCRIPT:
            records = (self.runner.results / row.name).glob("seed_*/row.json")
            minutes = [read_json(path).get("command_minutes") for path in records]
            return statistics.mean(each[-1] for each in minutes if each) / 60 if any(minutes) else None
        settings = self.svm_settings(row)
        name = f"scanobjectnn {settings.variant}" if settings.dataset == "scanobjectnn" else settings.dataset
        if name not in SIZES:
            return None
        clouds, classes = SIZES[name]
        cost = self.cost(row)
        key = (name, cost["dims"], *settings.svm_c, settings.cv_folds, *settings.shots, settings.shot_draws)
        if key not in self.svms:
            say(f"{row.name}: timing linear SVMs on {name}")
            self.svms[key] = row_seconds(settings, clouds, classes=classes, dims=int(cost["dims"]), cpu=self.cpu)
        return (sum(clouds.values()) * cost["cloud_seconds"] + self.svms[key]) / 3600


def row_seconds(
    settings: argparse.Namespace, clouds: Mapping[str, int], *, classes: int, dims: int, cpu: bool = False
) -> float:
    """Return the seconds of a row's SVMs and retrieval: each kind is timed once on made-up features and multiplied."""
    sample = synthetic_features(train=clouds["train"], test=clouds["test"], classes=classes, dims=dims)
    values, folds = len(settings.svm_c), settings.cv_folds
    # A fold's Gram matrix has the square of its share of the training clouds.
    fits = values * (1 + (folds * (1 - 1 / folds) ** 2 if values > 1 else 0))
    linear = seconds_of(lambda: linear_svm(*sample), cpu=cpu)
    few = sum(
        seconds_of(lambda shots=shots: few_label_svm(*sample, shots=shots, draws=1), cpu=cpu)
        for shots in settings.shots
    )
    retrieval = seconds_of(lambda: average_precisions(*sample[2:]), cpu=cpu)
    return fits * linear + settings.shot_draws * few + retrieval


def price(rows: Sequence[Row], seeds: Sequence[int] | None, prices: Prices) -> dict[str, Any]:
    """Price the seeds of rows that are not recorded yet; a pretraining counts for the first row that needs it.

    Returns:
        ``rows``: for each row that lacks a seed its ``seeds``, ``hours_of`` pretraining and scoring (None: not priced)
        and ``missing_data``; ``hours`` of all together, ``hours_here`` of those whose data is here; ``not_priced``.
    """
    runner, counted, priced = prices.runner, set(), {}
    for row in rows:
        todo = [seed for seed in seeds or row.seeds if runner.recorded(row, seed) is None]
        if not todo:
            continue
        new = [seed for seed in todo if row.pretraining and (row.pretraining, seed) not in counted]
        counted |= {(row.pretraining, seed) for seed in new}
        left = sum(1 - runner.share_done(row.pretraining, seed) for seed in new)
        scoring = prices.scoring(row)
        priced[row.name] = {
            "seeds": todo,
            "hours_of": {
                "pretraining": left * prices.pretraining(row) if left else 0.0,
                "scoring": None if scoring is None else len(todo) * scoring,
            },
            "missing_data": runner.missing(row),
        }

    def total(entries: Sequence[Mapping[str, Any]]) -> float:
        return sum(hours or 0.0 for entry in entries for hours in entry["hours_of"].values())

    unpriced = [f"scoring of {name}" for name, entry in priced.items() if entry["hours_of"]["scoring"] is None]
    return {
        "rows": priced,
        "hours": total(list(priced.values())),
        "hours_here": total([entry for entry in priced.values() if not entry["missing_data"]]),
        "not_priced": [*unpriced, NOT_PRICED],
    }


def table(result: Mapping[str, Any]) -> str:
    """Format the prices for people."""

    def cell(hours: float | None) -> str:
        return "not priced" if hours is None else f"{hours:.2f}"

    lines = [("row", "seeds", "pretraining, h", "scoring, h", "data")]
    for name, entry in result["rows"].items():
        seeds, hours = ", ".join(map(str, entry["seeds"])), entry["hours_of"]
        data = "not here" if entry["missing_data"] else "here"
        lines.append((name, seeds, cell(hours["pretraining"]), cell(hours["scoring"]), data))
    return "\n".join(
        [
            text_table(lines),
            f"in all {result['hours']:.2f} hours, {result['hours_here']:.2f} of them with data that is here; a "
            "pretraining that rows share is in the first of them",
            f"not priced: {'; '.join(result['not_priced'])}",
        ]
    )

r"""Compare recipes of pretraining at equal time, judged without labels, to choose one for a long run.

Each recipe trains for as many steps as fit into --minutes (on a CPU of processor time, which other work on the machine
does not change), or for --steps, with a cosine schedule to its end. All are then scored alike, in eval mode, on the
same held-out pairs, whatever number of points or batch size they were trained with: clouds of --eval_points points, two
augmented views of each, pictures of the recipe's size. A recipe may train on other pairs (--data_root among its flags);
it is scored on held-out pairs of this command's.

  R@1 views     percent of clouds whose nearest cloud among the other views of all is their own; features of the encoder
  R@1 pictures  percent of pictures whose nearest cloud is their own, and the reverse, mean; projections
  loss          the objective at the default temperature with all held-out pairs in one batch
  alignment, uniformity  of the projections of two views (Wang and Isola, arXiv:2005.10242)

Examples:
  python -m benchmarks.recipes --data_root data/generated/12096.h5 --minutes 8 --work_dir runs/recipes
  python -m benchmarks.recipes --data_root data/generated/12096.h5 --recipe 'base=' --recipe 'ave=--objective ave'
  python -m benchmarks.recipes --data_root data/shapenet2k --steps 114 --recipe 'own=' \
      --recipe 'generated=--data_root data/generated/12096.h5'

A call that was stopped continues when it is repeated: finished recipes are kept. A recipe that cannot be trained is
named in the table, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
import train_crossnet_con
from benchmarks.frame import Benchmark, file_name, named
from benchmarks.measure import markdown_table, now
from datasets.pair_sources import held_out_shapes, open_source
from datasets.shapenet_render import ShapeNetRender
from datasets.transforms import PairAugmentation, RenderPixels
from downstream.features import evaluating
from downstream.pair_validation import PairValidation, recall_at_1
from engine.device import resolve_device
from engine.load_model import crossnet_from_checkpoint
from models.base import pooled_features
from models.losses import RELEASED_TEMPERATURE
from utils.cli import explain, positive_float, positive_int, read_json, run, write_json
from utils.errors import UserError

BASE = "--batch_size 32 --num_points 512 --image_model resnet18 --image_size 64 --channels_last"
RECIPES = {
    "base": "",
    "256 points": "--num_points 256",
    "1024 points": "--num_points 1024",
    "batch 64": "--batch_size 64",
    "rate 0.003": "--lr 0.003",
    "48 px": "--image_size 48",
}
TRIAL = 8  # steps of the run that measures the time of a step; the first two do not count
# Settings that the results of all recipes depend on.
SETTINGS = ("base", "minutes", "steps", "held_out", "eval_points", "data_root", "seed", "threads")
COLUMNS = ("r1_views", "r1_pictures", "loss", "alignment", "uniformity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the comparison."""
    g = parser.add_argument_group("what")
    g.add_argument("--data_root", required=True, metavar="DIR", help="pairs of pretraining")
    g.add_argument(
        "--recipe",
        action="append",
        metavar="NAME=FLAGS",
        help=f"name and flags of train_crossnet_con.py, added to those of --base (default: {', '.join(RECIPES)})",
    )
    g.add_argument("--base", default=BASE, metavar="FLAGS", help="flags of every recipe")
    length = g.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=positive_float, default=8.0, metavar="M", help="time of a recipe's steps, see above"
    )
    length.add_argument("--steps", type=positive_int, metavar="N", help="as many steps for every recipe instead")
    g.add_argument("--held_out", type=positive_int, default=512, metavar="N", help="pairs that no recipe trains on")
    g.add_argument("--eval_points", type=positive_int, default=1024, metavar="N", help="points of a cloud in scoring")
    g.add_argument("--device", default="auto", help="of the training: auto, cpu, cuda or cuda:N")
    g.add_argument("--work_dir", default="runs/recipes", metavar="DIR", help="checkpoints and results of recipes")


def read_recipes(words: Sequence[str] | None) -> dict[str, str]:
    """Read ``NAME=FLAGS`` entries; None means the built-in recipes.

    Raises:
        UserError: an entry without ``=``, or a name that is not that of a folder or is given twice.
    """
    return RECIPES if words is None else named(words, "--recipe", "FLAGS")


def held_out_pairs(
    root: str, shapes: Sequence[str], *, num_points: int, image_size: int, modality: str, seed: int, points_flag: str
) -> tuple[PairValidation, PairAugmentation]:
    """Return the scores of held-out pairs, and what augments their batches, alike at every call.

    Raises:
        DataError: the clouds are smaller than ``num_points``, the value of ``points_flag``.
    """
    pairs = ShapeNetRender(root, seed=seed, transform=RenderPixels(image_size), num_points=num_points)
    pairs.check_points(num_points, flag=points_flag)
    augment = PairAugmentation(num_points=num_points, image_size=image_size, modality=modality, seed=seed)
    return PairValidation(pairs.subset(shapes), batch_size=32), augment


class Comparison:
    """Recipes on the same pairs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work_dir = Path(args.work_dir)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        ids = open_source(args.data_root).ids
        if len(ids) - args.held_out < 2:
            raise UserError(
                f"--held_out {args.held_out} of {len(ids)} pairs of {args.data_root}; 2 at least must remain"
            )
        self.held_out = held_out_shapes(ids, args.held_out / len(ids), seed=args.seed)
        # Before anything is trained.
        ShapeNetRender(args.data_root, num_points=args.eval_points).check_points(args.eval_points, flag="--eval_points")

    def shapes(self, root: str) -> list[str]:
        """Return the shapes of a data set that are not held out, in random order."""
        held_out = self.held_out if Path(root).resolve() == Path(self.args.data_root).resolve() else ()
        left = sorted(set(open_source(root).ids) - set(held_out))
        order = torch.randperm(len(left), generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        return [left[i] for i in order]

    def train(self, name: str, flags: Sequence[str], *, steps: int) -> tuple[Path, list[float]]:
        """Train for a number of steps; return the run folder and the time in seconds after each step."""
        config = self.config(flags)
        shapes = self.shapes(config.data_root)
        samples = steps * config.batch_size
        epochs = -(-samples // len(shapes))
        chosen = self.work_dir / f"{name}.txt"
        if (self.work_dir / name).exists() and not chosen.exists():
            raise UserError(f"{self.work_dir / name} is not from this benchmark; choose another --work_dir")
        chosen.write_text("\n".join(shapes[: samples // epochs]) + "\n")
        argv = [*flags, "--list", str(chosen), "--epochs", str(epochs)]
        argv += ["--output_dir", str(self.work_dir), "--exp_name", name, "--overwrite"]
        times: list[float] = []
        device = resolve_device(config.device)
        on_cpu = device.type == "cpu"  # where other work on the machine must not count
        hook = register_optimizer_step_post_hook(lambda *_: times.append(now(device, cpu=on_cpu)))
        try:
            train_crossnet_con.main(argv)
        finally:
            hook.remove()
        return self.work_dir / name, times

    @staticmethod
    def config(flags: Sequence[str]) -> train_crossnet_con.PretrainConfig:
        """Return the settings that flags of ``train_crossnet_con.py`` mean."""
        return train_crossnet_con.PretrainConfig.from_flags(train_crossnet_con.build_parser().parse_args(list(flags)))

    def score(self, path: Path, config: train_crossnet_con.PretrainConfig) -> dict[str, float]:
        """Score a checkpoint on the held-out pairs, without labels."""
        args = self.args
        model, _ = crossnet_from_checkpoint(path)
        model.temperature = RELEASED_TEMPERATURE[model.objective]
        sizes = {"num_points": args.eval_points, "image_size": config.image_size, "modality": config.image_modality}
        validation, augment = held_out_pairs(
            args.data_root, self.held_out, **sizes, seed=args.seed, points_flag="--eval_points"
        )

        def inputs_of(batch: dict[str, Any]) -> dict[str, Tensor]:
            return augment(batch, epoch=0, device=torch.device("cpu"))

        found = validation(model, inputs_of=inputs_of)
        with evaluating(model):
            views = [
                torch.cat(
                    [pooled_features(model.point_encoder, inputs_of(batch)[view].mT) for batch in validation.batches]
                )
                for view in ("view1", "view2")
            ]
        first, second = (view.numpy() for view in views)
        return {
            "r1_views": (recall_at_1(first, second) + recall_at_1(second, first)) / 2,
            "r1_pictures": (found["val_image_to_cloud_r1"] + found["val_cloud_to_image_r1"]) / 2,
            "loss": found["val_loss"],
            "alignment": found["val_alignment"],
            "uniformity": found["val_uniformity"],
        }

    def flags(self, name: str, words: str) -> list[str]:
        """Return the flags of a recipe.

        Raises:
            UserError: the words cannot be split.
        """
        args = self.args
        flags = ["--data_root", args.data_root, "--workers", "0", "--eval_every", "0", "--save_every", "0"]
        flags += ["--device", args.device]
        try:
            return [*flags, "--seed", str(args.seed), *shlex.split(args.base), *shlex.split(words)]
        except ValueError as error:
            raise UserError(f"the flags of recipe {name!r} cannot be read: {error}") from error

    def run(self, name: str, words: str) -> dict[str, Any]:
        """Train and score a recipe, or return what an earlier call found.

        Raises:
            UserError: an earlier call had other settings, or the recipe cannot be trained.
        """
        args, slug = self.args, file_name(name)
        finished = self.work_dir / f"{slug}.json"
        settings = {key: getattr(args, key) for key in SETTINGS} | {"recipe": words}
        if finished.exists():
            result = read_json(finished)
            before = result.get("settings", {})
            if changed := [key for key in settings if before.get(key) != settings[key]]:
                words = ", ".join(f"--{key} {before.get(key)!r} there, {settings[key]!r} here" for key in changed)
                raise UserError(f"{finished} was made with {words}; choose another --work_dir, or delete it")
            return result
        flags = self.flags(name, words)
        config = self.config(flags)
        seconds = statistics.median(np.diff(self.train(f"{slug}_trial", flags, steps=TRIAL)[1])[1:])
        steps = args.steps or max(round(60 * args.minutes / seconds), 1)
        print(f"{name}: {seconds:.2f} s a step, {steps} steps", file=sys.stderr, flush=True)
        folder, times = self.train(slug, flags, steps=steps)
        result = {"flags": words, "seconds_per_step": seconds, "steps": steps, "seconds": times[-1] - times[0]}
        result["scores"] = self.score(folder / "last.pth", config)
        result["settings"] = settings
        write_json(finished, result)
        return result

    def run_or_fail(self, name: str, words: str) -> dict[str, Any]:
        """Return the result of ``run``, or ``failed``, what prevents it: the other recipes are compared without it."""
        try:
            return self.run(name, words)
        except Exception as error:
            explained = explain(error)
            if explained is None:
                raise
            print(f"{name}: {explained[0]}", file=sys.stderr, flush=True)
            return {"flags": words, "failed": explained[0].removeprefix("error: ")}


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run every recipe."""
    recipes, comparison = read_recipes(args.recipe), Comparison(args)
    for name, words in recipes.items():
        comparison.config(comparison.flags(name, words))  # unknown flags end the command before an hour of training
    return {
        "held_out": len(comparison.held_out),
        "recipes": {name: comparison.run_or_fail(name, words) for name, words in recipes.items()},
    }


def table(result: Mapping[str, Any]) -> str:
    """Format the comparison."""
    rows = [("recipe", "steps", "s/step", "R@1 views", "R@1 pictures", "loss", "alignment", "uniformity")]
    for name, found in result["recipes"].items():
        if "failed" in found:
            rows.append((name, f"failed: {found['failed']}".replace("|", "/"), *[""] * 6))
            continue
        numbers = [f"{found['scores'][column]:.1f}" for column in COLUMNS[:2]]
        numbers += [f"{found['scores'][column]:.3f}" for column in COLUMNS[2:]]
        rows.append((name, str(found["steps"]), f"{found['seconds_per_step']:.2f}", *numbers))
    return markdown_table(rows)


BENCHMARK = Benchmark("recipes", __doc__, add_arguments, measure, table, repeats=None, threads=1)
main = BENCHMARK.main

if __name__ == "__main__":
    run(main, failed=lambda result: any("failed" in found for found in result["recipes"].values()))

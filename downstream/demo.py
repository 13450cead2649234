"""Pretrain, classify and segment on the embedded demo set, in minutes on two CPU cores: `make demo`.

Does pretraining help? Each task runs without and with it, all else being equal, and with the weights of this repository
where there are any (the row "shipped"):
  classification  linear SVM on frozen DGCNN-cls features; without pretraining, batch-norm statistics are set first
  parts           part segmentation of shapes, fine-tuned from scratch and from the pretrained encoder
  rooms           semantic segmentation of furnished rooms, likewise; tested on area 5
Pretraining uses 811 furniture models as clouds and pictures, without labels. Tables, curves and pictures are written to
runs/demo/report.html, the numbers to runs/demo/report.json.

Examples:
  python -m downstream.demo
  python -m downstream.demo --tasks parts rooms --seeds 1 2 3 --output_dir runs/seeds

To continue a stopped demo, repeat the command: finished parts are kept.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
import train_crossnet_con
from datasets.shapenet_render import ShapeNetRender
from downstream.classification import main as linear_svm
from downstream.demo_report import write_page
from downstream.finetuning import reported_entry
from downstream.segmentation import main_partseg, main_semseg, visualize
from downstream.svm import mean_and_std
from engine.load_model import DEFAULT_ENCODER
from models.pretrained import pretrained_index
from utils.cli import Settings, check_writable, flag, positive_int, run, seed_number, write_json
from utils.errors import UserError
from utils.reproducible import provenance

# Small enough for two CPU cores; all other settings are the released ones.
PRETRAINING = {"batch_size": 32, "image_model": "resnet18", "workers": 1, "eval_every": 0, "log_every": 5}
CLASSIFICATION = {"epochs": 3, "num_points": 512, "image_size": 64}
SVM_C = ("0.01", "0.1", "1", "10")
TASKS = ("classification", "parts", "rooms")
STARTS = ("scratch", "pretrained")
SHIPPED = "shipped"  # weights of this repository
UNFINISHED = "unfinished.json"  # settings of a demo that has not written its report


@dataclass(kw_only=True)
class DemoConfig(Settings):
    """Settings of the demo; ``keep`` is whether it continues a stopped one."""

    data_root: str = flag("data/demo", metavar="DIR", help="the demo set")
    output_dir: str = flag("runs/demo", metavar="DIR", help="output; a finished demo is replaced")
    resume: bool = flag(
        False, exclusive="start", help="continue a stopped demo even if the code has changed since (not advised)"
    )
    overwrite: bool = flag(False, exclusive="start", help="start a stopped demo over")
    tasks: Sequence[str] = flag(TASKS, nargs="+", choices=TASKS, help="tasks to run")
    seeds: list[int] = flag(
        [1], type=seed_number, nargs="+", metavar="S", help="random seeds; several give mean and standard deviation"
    )
    epochs: int | None = flag(type=positive_int, metavar="E", help="of each pretraining (default: the task's)")
    num_points: int | None = flag(type=positive_int, metavar="N", help="points of a cloud (default: the task's)")
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N")
    keep: bool = False


class Score(NamedTuple):
    """A score in the report."""

    heading: str
    path: tuple[str, ...]  # keys below a run's "test"


class Segmentation(NamedTuple):
    """A fine-tuning task: settings of pretraining and fine-tuning, and the scores to show.

    The settings were chosen on the validation split, with a separate seed.
    """

    script: Callable[[list[str]], dict[str, Any]]
    encoder: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    fine_tuning: Mapping[str, Any]
    validation: Score  # chooses the best epoch; its path is the name in metrics.jsonl
    scores: Mapping[str, Score]
    pictures: Mapping[str, Any]


SEGMENTATION = {
    "parts": Segmentation(
        script=main_partseg.main,
        encoder={"model": "dgcnn_partseg", "k": 8, "emb_dims": 128},
        pretraining={"epochs": 3, "num_points": 256, "image_size": 32},
        fine_tuning={"epochs": 30, "num_points": 256, "batch_size": 8, "label_fraction": 0.1, "eval_every": 3},
        validation=Score("instance mIoU, validation shapes", ("val_instance_miou",)),
        scores={
            "instance_miou": Score("instance mIoU", ("instance_miou",)),
            "class_miou": Score("class mIoU", ("class_miou",)),
        },
        pictures={"items": 8},
    ),
    "rooms": Segmentation(
        script=main_semseg.main,
        encoder={"model": "dgcnn_semseg", "k": 8, "emb_dims": 128},
        pretraining={"epochs": 3, "num_points": 256, "image_size": 32},
        fine_tuning={
            # num_points None: all points of a block; whole rooms are cut into blocks of that size.
            **{"epochs": 8, "num_points": None, "batch_size": 8, "eval_every": 2},
            **{"train_area": "1,2", "test_area": 5, "protocol": "both"},
        },
        validation=Score("mIoU, held-out rooms", ("val_mean_iou",)),
        scores={
            f"{protocol}_{key}": Score(f"{text}, {where}", (protocol, key))
            for protocol, where in (("blocks", "blocks"), ("rooms", "whole rooms"))
            for key, text in (("overall_accuracy", "OA"), ("mean_iou", "mIoU"))
        },
        pictures={"items": 3, "test_area": 5},
    ),
}


def flags(**settings: Any) -> list[str]:
    """Turn keyword settings into command-line words, leaving out None."""
    given = {name: value for name, value in settings.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]


def asked(config: DemoConfig) -> dict[str, int]:
    """Return the pretraining settings that the command line overrides."""
    return {name: value for name in ("epochs", "num_points") if (value := getattr(config, name)) is not None}


def finished(
    config: DemoConfig, script: Callable[[list[str]], dict[str, Any]], words: list[str], result: Path
) -> dict[str, Any]:
    """Run a script, or read its result if a continued demo has already finished it.

    Args:
        config: settings of the demo.
        script: the script's ``main``.
        words: its command line.
        result: the JSON file that it writes when it ends.
    """
    if config.keep and result.exists():
        print(f"kept: {result}", flush=True)
        return json.loads(result.read_text(encoding="utf-8"))
    result.unlink(missing_ok=True)
    return script([*words, *flags(json=result)])


def stopped_demo(config: DemoConfig, settings: Mapping[str, Any]) -> bool:
    """Return whether the folder holds a stopped demo that this call continues.

    Args:
        config: settings of this call.
        settings: the same as the stopped demo recorded them.

    Raises:
        UserError: ``--resume``, but the settings differ from those of the stopped demo.
    """
    path = Path(config.output_dir) / UNFINISHED
    if config.overwrite or not path.exists():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in settings if before.get(key) != settings[key])
    except (ValueError, AttributeError):  # truncated, or another file
        changed = [UNFINISHED]
    changed = [key for key in changed if not (config.resume and key in ("git_commit", "versions"))]
    if changed and config.resume:
        raise UserError(f"{path.parent} holds a stopped demo with other {', '.join(changed)}: --overwrite starts over")
    if changed:
        print(f"{path.parent} holds a stopped demo with other {', '.join(changed)}: starting over")
    return not changed


def pretrain(config: DemoConfig, task: str, seed: int, **settings: Any) -> Path:
    """Pretrain on the demo pairs; return the checkpoint."""
    print(f"\n{task}: pretraining, seed {seed}", flush=True)
    folder, name = Path(config.output_dir) / task, f"pretraining_{seed}"
    train_crossnet_con.main(
        [
            *flags(data_root=config.data_root, output_dir=folder, exp_name=name, seed=seed, device=config.device),
            *flags(**{**PRETRAINING, **settings, **asked(config)}),
            "--resume" if config.keep else "--overwrite",
            "--channels_last",
        ]
    )
    return folder / name / "last.pth"


def classify(config: DemoConfig) -> dict[str, Any]:
    """Score frozen encoders, untrained and pretrained: linear SVM, few-label SVM and retrieval on the demo classes."""
    folder, scores = Path(config.output_dir) / "classification", {}
    points = config.num_points or CLASSIFICATION["num_points"]

    def score(name: str, *encoder: str) -> None:
        print(f"\nclassification: linear SVM on frozen features, {name} encoder", flush=True)
        words = [
            *encoder,
            *flags(dataset="demo", data_root=config.data_root, num_points=points, svm_c=SVM_C, shots=(1, 5)),
            *flags(seed=config.seeds[0], device=config.device, retrieval_sheet=folder / f"retrieval_{name}.png"),
            *flags(confusion_matrix=folder / f"confusion_{name}.png"),
        ]
        scores[name] = finished(config, linear_svm.main, words, folder / f"svm_{name}.json")

    score("untrained", "--random_init", "--calibrate_bn", *flags(seeds=config.seeds))
    checkpoints = [pretrain(config, "classification", seed, **CLASSIFICATION) for seed in config.seeds]
    score("pretrained", *flags(model_path=checkpoints))
    if DEFAULT_ENCODER in pretrained_index():
        score(SHIPPED, *flags(model_path=f"pretrained:{DEFAULT_ENCODER}"))
    return scores


def segment(config: DemoConfig, name: str) -> dict[str, Any]:
    """Fine-tune from scratch and from pretrained encoders; draw predictions of the first seed's ``pretrained`` model.

    Returns:
        Scores by start, with mean and deviation over seeds; the runs; the settings.
    """
    task, folder = SEGMENTATION[name], Path(config.output_dir) / name
    points = config.num_points or task.fine_tuning["num_points"]
    tuning = {**task.fine_tuning, "num_points": points}
    shipped = [SHIPPED] if task.encoder["model"] in pretrained_index() else []
    runs: dict[str, list[dict[str, Any]]] = {start: [] for start in (*STARTS, *shipped)}
    for seed in config.seeds:
        checkpoint = pretrain(config, name, seed, **task.encoder, **task.pretraining)
        origins = {
            "scratch": task.encoder,
            "pretrained": {"pretrain_path": checkpoint},
            SHIPPED: {"pretrain_path": f"pretrained:{task.encoder['model']}"},
        }
        for start, found in runs.items():
            print(f"\n{name}: fine-tuning, {start}, seed {seed}", flush=True)
            words = [
                *flags(data_root=config.data_root, output_dir=folder, exp_name=f"{start}_{seed}", seed=seed),
                *flags(device=config.device, workers=0, **origins[start], **tuning),
                "--resume" if config.keep else "--overwrite",
            ]
            found.extend(finished(config, task.script, words, folder / f"{start}_{seed}.json")["runs"])
    visualize.main(
        [
            *flags(data_root=config.data_root, model_path=reported_checkpoint(runs["pretrained"][0])),
            *flags(output_dir=folder / "pictures", device=config.device, workers=0, **task.pictures),
            *(flags(num_points=points) if name == "parts" else ()),
        ]
    )
    return {
        **{
            start: {key: spread(found, score.path) for key, score in task.scores.items()}
            for start, found in runs.items()
        },
        "validation": {"key": task.validation.path[0], "heading": task.validation.heading},
        "reported": reported_entry(runs["pretrained"][0])[0],
        "encoder": dict(task.encoder),
        "pretraining": {**task.pretraining, **asked(config)},
        "fine_tuning": tuning,
        "runs": runs,
    }


def reported_checkpoint(record: Mapping[str, Any]) -> Path:
    """Return the checkpoint that a fine-tuning run's reported scores belong to."""
    return Path(record["folder"]) / ("last.pth" if record["best"] in (None, record["last"]) else "best.pth")


def spread(runs: list[dict[str, Any]], path: tuple[str, ...]) -> dict[str, Any]:
    """Return one score over runs: mean, standard deviation (0 for a single run) and values."""
    values = []
    for record in runs:
        value: Any = reported_entry(record)[1]["test"]
        for key in path:
            value = value[key]
        values.append(value)
    mean, std = mean_and_std(values)
    return {"mean": mean, "std": std, "values": values}


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the main numbers, one per line."""
    lines = []
    for name in ("untrained", "pretrained", SHIPPED):
        if name in report:
            accuracy, precision = report[name]["test_accuracy_mean"], report[name]["retrieval_map"]
            lines.append(f"classification, {name}: SVM {accuracy:.1f} %, retrieval mAP {precision:.1f} %")
    for name, task in SEGMENTATION.items():
        for start in report[name]["runs"] if name in report else ():
            scores = report[name][start]
            shown = ", ".join(
                f"{score.heading} {scores[key]['mean']:.1f} +- {scores[key]['std']:.1f}"
                for key, score in task.scores.items()
            )
            lines.append(f"{name}, {start}: {shown}")
    return lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the demo; return the content of report.json."""
    config = DemoConfig.from_flags(DemoConfig.parser(prog="python -m downstream.demo").parse_args(argv))
    folder = Path(config.output_dir)
    check_writable(folder)
    settings = {name: value for name, value in asdict(config).items() if name not in ("resume", "overwrite", "keep")}
    settings = provenance(**json.loads(json.dumps(settings)))
    config.keep = stopped_demo(config, settings)
    write_json(folder / UNFINISHED, settings)
    try:
        return make_report(config, folder)
    except (KeyboardInterrupt, SystemExit, UserError):
        print(f"\nthe demo in {folder} is not finished: the same command continues it and keeps its finished parts")
        raise


def make_report(config: DemoConfig, folder: Path) -> dict[str, Any]:
    """Run the tasks and write the report; return the content of report.json."""
    start = time.perf_counter()
    report: dict[str, Any] = {"tasks": [task for task in TASKS if task in config.tasks], "minutes": {}}
    report["continued"] = config.keep  # if so, times count from the continuation
    for task in report["tasks"]:
        begin = time.perf_counter()
        if task == "classification":
            report.update(classify(config))
        else:
            report[task] = segment(config, task)
        report["minutes"][task] = round((time.perf_counter() - begin) / 60, 1)
    report["pairs"] = len(ShapeNetRender(config.data_root))
    report["seconds"] = round(time.perf_counter() - start, 1)
    report.update(provenance(seeds=config.seeds))
    write_json(folder / "report.json", report)
    path = write_page(folder, report, data_root=config.data_root, headings=headings())
    (folder / UNFINISHED).unlink()
    print("\n" + "\n".join(summary(report)))
    print(f"report: {path} ({report['seconds'] / 60:.1f} minutes)")
    return report


def headings() -> dict[str, dict[str, str]]:
    """Return the headings of each segmentation task's scores."""
    return {name: {key: score.heading for key, score in task.scores.items()} for name, task in SEGMENTATION.items()}


if __name__ == "__main__":
    run(main)

"""Run every benchmark, collect the results, and write benchmarks.md with its pictures.

Each benchmark runs in a separate process. One that cannot run here, for lack of a package or a GPU, gets the row "not
run" with the reason. --quick takes sizes that say nothing, to see that everything works. The page of this repository,
docs/benchmarks.md, was written with --output_dir docs.

  python -m benchmarks.run_all                                 # about 25 minutes on two quiet cores
  python -m benchmarks.run_all --data_root data                # with your pairs for the loader
  python -m benchmarks.run_all --quick
  python -m benchmarks.run_all --redraw                        # page and pictures from benchmarks/results.json below it
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path

import torch

from benchmarks.measure import FORMULATIONS, ROOT, compare, markdown_table
from utils.cli import HelpFormatter, run, write_json
from utils.errors import UserError
from utils.pictures import Figure, LogLocator, save_figure
from utils.reproducible import commit_of

RESULTS = "results.json"
NAVIGATION = (
    "Documentation: [quick start](../README.md), [data sets](datasets.md), [generated "
    "shapes](generated_shapes.md), [pretraining](pretraining.md), [evaluation](evaluation.md), "
    "[weights](weights.md), [on a GPU](gpu.md), [results](results.md), [ablations](ablations.md), "
    "[measurements](measurements.md), [fidelity](fidelity.md), [reliability](reliability.md), [several "
    "processes](distributed.md), **benchmarks**, [adding an encoder or a data set](extending.md)."
)
# glibc keeps what is freed for the next allocation, where it would give large blocks back to the system.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
PLAIN_KERNELS = {"CROSSNET_KERNELS": "torch"}
COLORS = {"ours": "tab:blue", "textbook": "tab:orange"}


class Job(NamedTuple):
    """One run of one benchmark."""

    name: str  # key of the results
    module: str
    arguments: str
    quick: str | None = "--quick"  # arguments of a try-out; None leaves it out
    environment: Mapping[str, str] = {}


def jobs(data_root: str | None, gpu: bool) -> list[Job]:
    """Return the runs, in order."""
    data = f" --data_root {shlex.quote(data_root)}" if data_root else ""
    run_ = "--shapes 2033 --epochs 6 --num_points 512 --image_model resnet18 --image_size 64 --channels_last"
    run_ += " --workers 0 --seconds 15 --check --device cpu"
    small = "--batch_size 4 --k 4 --emb_dims 16 --image_model resnet18 --image_size 32 --num_points 64 --device cpu"
    todo = [
        Job("encoder", "edgeconv", "--repeats 2"),
        Job("encoder_kept", "edgeconv", "--repeats 2", None, KEEP_MEMORY),
        Job("encoder_8192", "edgeconv", "--alone --batch 4 --points 8192 --repeats 1", "--quick --alone"),
        Job("encoder_partseg", "edgeconv", "--model dgcnn_partseg --batch 2 --repeats 1", None),
        Job("encoder_semseg", "edgeconv", "--model dgcnn_semseg --batch 2 --repeats 1", None),
        Job("points_1024", "edgeconv", "--batch 4 --points 1024 --repeats 2"),
        *(Job(f"points_{n}", "edgeconv", f"--batch 4 --points {n} --repeats 2", None) for n in (512, 2048)),
        *(Job(f"k_{k}", "edgeconv", f"--batch 4 --points 1024 --k {k} --repeats 2", None) for k in (10, 40)),
        *(Job(f"batch_{b}", "edgeconv", f"--batch {b} --points 1024 --repeats 2", None) for b in (2, 8)),
        Job("neighbours", "neighbours", ""),
        Job("neighbours_8192", "neighbours", "--batch 4 --points 8192 --widths 3 --repeats 3", None),
        Job("step", "step", "--repeats 1 --batch 4 --batches 16 64"),
        Job("layer", "dynamic_edgeconv", ""),
        Job("loss", "losses", ""),
        Job("loader", "loader", f"--workers 2{data}"),
        Job("svm", "svm", "--svm_repeats 2"),
        Job("svm_kept", "svm", "--svm_repeats 3 --clouds 4 --points 256", None, KEEP_MEMORY),
        Job("scores", "metrics", ""),
        Job(
            "estimate",
            "estimate",
            f"{run_} --batch_size 32 --threads 2 --memory_gb 11",
            f"--shapes 100 --epochs 2 --seconds 0.1 --threads 1 --workers 0 --check {small}",
        ),
        Job("estimate_two", "estimate", f"{run_} --batch_size 16 --threads 1 --gpus 2", None),
    ]
    step = "--batch_size 64 --channels_last --amp"
    todo += [
        Job("roofline_bf16", "roofline", f"{step} bf16", "--quick"),
        Job("roofline_ranks", "roofline", f"{step} bf16 --ranks 4", None),
        Job("roofline_float32", "roofline", f"{step} off", None),
    ]
    if gpu:
        todo += [
            Job("gpu_encoder", "edgeconv", "--device cuda --repeats 10", "--quick --device cuda"),
            Job("gpu_encoder_plain", "edgeconv", "--device cuda --repeats 10", None, PLAIN_KERNELS),
            Job("gpu_neighbours", "neighbours", "--device cuda", "--quick --device cuda"),
            Job("gpu_step", "step", "--device cuda --batch 32 --amp bf16", "--quick --device cuda"),
            Job("gpu_layer", "dynamic_edgeconv", "--device cuda --repeats 10", "--quick --device cuda"),
            Job("gpu_loss", "losses", "--device cuda", "--quick --device cuda"),
            Job("gpu_estimate", "estimate", "--amp bf16 --channels_last --batch_size 200 --check", None),
        ]
    glibc = platform.libc_ver()[0] == "glibc"  # elsewhere KEEP_MEMORY changes nothing
    return [job for job in todo if glibc or job.environment != KEEP_MEMORY]


def check_gpu(out: Path) -> None:
    """Run ``benchmarks.gpu_check`` before anything is measured.

    Raises:
        UserError: a check fails.
    """
    command = ["-m", "benchmarks.gpu_check", "--output_dir", str((out / "gpu").absolute())]
    print(f"\n$ python {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        raise UserError(f"the GPU fails a check: see {out / 'gpu' / 'report.html'}; --only NAME runs jobs anyway")


def run_job(job: Job, *, quick: bool, folder: Path) -> dict[str, Any]:
    """Run one benchmark in a fresh process; return its result or ``not_run``: why, with seconds and command."""
    words = shlex.split((job.quick or "") if quick else job.arguments)
    out = folder / f"{job.name}.json"
    command = ["-m", f"benchmarks.{job.module}", *words]
    shown = " ".join([*(f"{key}={value}" for key, value in job.environment.items()), "python", shlex.join(command)])
    print(f"\n$ {shown}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, **job.environment},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    about = {"command": shown, "wall_seconds": round(time.perf_counter() - start, 1)}
    if done.returncode or not out.is_file():
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        print(f"not run: {reason}", flush=True)
        return {"not_run": reason, **about}
    return json.loads(out.read_text(encoding="utf-8")) | about


def number(value: float) -> str:
    """Format a number with three significant digits, thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def found(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a benchmark's result, or None if it was not run."""
    result = results.get(name)
    return None if result is None or "not_run" in result else result


# Results of the table of ratios: row without a result, row with one (its settings and numbers put in), unit.
COMPARED = {
    ("encoder", "encoder_kept", "encoder_partseg", "encoder_semseg", "gpu_encoder", "gpu_encoder_plain"): (
        "training step of the encoder",
        "training step of {model}, {batch} x {points:,} points, k {k}, {device}",
        "s",
    ),
    ("step", "gpu_step"): (
        "whole pretraining step",
        "whole pretraining step, ours with images in channels_last, {batch} x {points:,} points, two {image_model} at "
        "{image_size} px, amp {amp}, {device}",
        "s",
    ),
    ("layer", "gpu_layer"): (
        "one EdgeConv layer against torch_geometric",
        "one EdgeConv layer with its neighbor search against torch_geometric's {textbook_is}, {batch} x {points} "
        "points, {device}",
        "s",
    ),
    ("loss", "gpu_loss"): ("NT-Xent against lightly's", "NT-Xent against lightly's, {batch} pairs, {device}", "ms"),
}
# Variants that need no row where they were not run: what is special about them.
VARIANTS = {
    "encoder_kept": ", both with freed memory kept (see [Encoder step](#encoder-step))",
    "gpu_encoder_plain": ", ours without Triton kernels",
}


def comparison_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the table of all ratios."""
    rows = [["what", "ours", "textbook", "ratio", "peak memory, MB: ours", "textbook", "ratio"]]

    def add(text: str, part: dict[str, Any] | None, unit: str, name: str = "") -> None:
        if part is None:
            why = results.get(name, {}).get("not_run", "no GPU here" if name.startswith("gpu_") else "")
            rows.append([text, "not run" + (f": {why}" if why else ""), "not run", "", "", "", ""])
            return
        scale = {"s": 1.0, "ms": 1e3}[unit]
        times = [f"{number(scale * part[form]['seconds_median'])} {unit}" for form in FORMULATIONS]
        memory = ["", "", ""]
        if "memory_ratio" in part:
            step = part["step_memory_ratio"]
            ratio = f"{part['memory_ratio']:.1f}" + (f"; of the step alone {step:.1f}" if step else "")
            memory = [*(number(part[form]["peak_mb"]) for form in FORMULATIONS), ratio]
        ratios = part["time_ratios"]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} rounds" if len(ratios) > 1 else "one round"
        rows.append([text, *times, f"**{part['time_ratio']:.1f}** ({spread})", *memory])

    for names, (without, text, unit) in COMPARED.items():
        for name in names:
            if part := found(results, name):
                add(text.format(**part | part["settings"]) + VARIANTS.get(name, ""), part, unit)
            elif name not in VARIANTS:
                add(f"{without} ({name})", None, unit, name)
    loader = found(results, "loader")
    add("a data worker's part of a sample; ours leaves augmentation to the training device", loader, "ms", "loader")
    if loader:
        whole = compare({"ours": loader["whole"]["seconds"], "textbook": loader["textbook"]["seconds"]})
        add("the whole sample, batch augmentation on the same core", whole, "ms")
    svm_text = "linear SVM, {train:,} + {test:,} x {dims:,}, {classes} classes"
    if svm := found(results, "svm"):
        add(svm_text.format(**svm["settings"]), svm["svm"], "s")
    else:
        add("linear SVM", None, "s", "svm")
    if kept := found(results, "svm_kept"):
        text = "{}, both with freed memory kept (see [Linear SVM](#linear-svm))"
        add(text.format(svm_text.format(**kept["settings"])), kept["svm"], "s")
    size = ", {clouds} clouds of {points:,} points".format(**svm["settings"]) if svm else ""
    add(f"feature extraction{size}", svm and svm["features"], "s", "svm")
    scores = found(results, "scores")
    for text, key in (("masks", "masks"), ("a loop over points", "points")):
        add(f"segmentation scores against {text}, CPU time", scores and scores[key], "ms", "scores")
    return rows


def neighbor_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the table of neighbor searches; empty if none was run."""
    rows = [["clouds", "channels", "way", "ms", "times ours", "differ"]]
    for name in ("neighbours", "neighbours_8192", "gpu_neighbours"):
        part = found(results, name) or {"widths": {}}
        for width, ways in part["widths"].items():
            s = part["settings"]
            for way, times in ways.items():
                seconds = times["seconds_median"]
                ratio = number(seconds / ways["ours"]["seconds_median"])
                place = f"{s['batch']} x {s['points']:,} points, {s['device']}"
                rows.append([place, width, way, number(1e3 * seconds), ratio, f"{times['different']:.0e}"])
    return rows if len(rows) > 1 else []


def sweep(results: dict[str, Any], key: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the finished runs of a sweep, sorted by the setting ``key``."""
    runs = [result for name in names if (result := found(results, name))]
    return sorted(runs, key=lambda result: result["settings"][key])


SWEEPS = {
    "points": ("points_512", "points_1024", "points_2048"),
    "k": ("k_10", "points_1024", "k_40"),
    "batch": ("batch_2", "points_1024", "batch_8"),
}


def new_figure(columns: int) -> tuple[Figure, Any]:
    """Make a row of axes."""
    figure = Figure(figsize=(4.2 * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_cost(results: dict[str, Any], path: Path) -> bool:
    """Draw seconds per step against points, k and batch, and clouds per second; return False if nothing was run."""
    if not any(sweep(results, key, names) for key, names in SWEEPS.items()):
        return False
    figure, axes = new_figure(4)
    for ax, (key, names) in zip(axes, SWEEPS.items(), strict=False):
        runs = sweep(results, key, names)
        for form in FORMULATIONS:
            x = [result["settings"][key] for result in runs]
            ax.plot(x, [result[form]["seconds_median"] for result in runs], "o-", color=COLORS[form], label=form)
        ax.set(xscale="log", yscale="log", xlabel=key, ylabel="seconds per step", xticks=x, xticklabels=x)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    runs = sweep(results, "batch", SWEEPS["batch"])
    for form in FORMULATIONS:
        x = [result["settings"]["batch"] for result in runs]
        y = [result["settings"]["batch"] / result[form]["seconds_median"] for result in runs]
        axes[3].plot(x, y, "o-", color=COLORS[form], label=form)
    axes[3].set(xlabel="batch", ylabel="clouds per second", ylim=(0, None), xticks=x)
    axes[0].legend()
    save_figure(figure, path, dpi=90)
    return True


def draw_shares(bars: dict[str, dict[str, float]], title: str, unit: str, path: Path) -> None:
    """Draw a stacked bar of stages for each form."""
    figure, (ax,) = new_figure(1)
    figure.set_size_inches(9, 1.1 + 0.75 * len(bars))
    stages = list(dict.fromkeys(stage for parts in bars.values() for stage in parts))
    colors = [f"C{i % 10}" for i in range(len(stages))]
    left = dict.fromkeys(bars, 0.0)
    for stage, color in zip(stages, colors, strict=True):
        widths = [parts.get(stage, 0.0) for parts in bars.values()]
        ax.barh(list(bars), widths, left=list(left.values()), color=color, label=stage, edgecolor="white")
        left = {form: start + width for (form, start), width in zip(left.items(), widths, strict=True)}
    ax.invert_yaxis()
    ax.set(title=title, xlabel=unit)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path, dpi=90)


def draw_memory(step: dict[str, Any], path: Path) -> None:
    """Draw the peak memory of a step against the batch, in one pass and in chunks."""
    figure, (ax,) = new_figure(1)
    for chunked, label in ((False, "one pass"), (True, f"chunks of {step['settings']['chunk_size']}")):
        runs = [run_ for run_ in step["large_batches"] if bool(run_["chunk_size"]) == chunked]
        ax.plot([run_["batch"] for run_ in runs], [run_["peak_mb"] for run_ in runs], "o-", label=label)
    ax.set(xlabel="batch", ylabel="peak memory, MB", ylim=(0, None))
    ax.legend()
    save_figure(figure, path, dpi=90)


def loader_bars(loader: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the milliseconds by stage of the textbook form, of our worker, and of ours with the batch augmentation."""
    stages = loader["stages_ms"]
    ours = {name.rstrip("*"): value for name, value in stages["ours"].items()}
    return {
        "textbook, worker": {name.rstrip("*"): value for name, value in stages["textbook"].items()},
        "ours, worker": {name: value for name, value in stages["ours"].items() if not name.endswith("*")},
        "ours, with the batch part": ours,
    }


def draw_speed(loader: dict[str, Any], path: Path) -> None:
    """Draw samples per second of a worker, ours and textbook."""
    figure, (ax,) = new_figure(1)
    forms = {"textbook": "textbook", "whole": "ours, with\nthe batch part", "ours": "ours, worker"}
    rates = [loader[form]["samples_per_second"] for form in forms]
    ax.bar_label(ax.bar(list(forms.values()), rates, color=["tab:orange", "tab:cyan", "tab:blue"]), fmt="%.0f")
    ax.axhline(62.5, color="gray", linestyle=":", label="1,000 shapes/s on 16 cores")
    ax.margins(y=0.25)
    ax.set(ylabel="shapes per second and core")
    ax.legend(fontsize=8)
    save_figure(figure, path, dpi=90)


def sections(results: dict[str, Any], folder: Path, link: str) -> list[str]:
    """Return the page below its head; draw the pictures into ``folder``."""
    text = ["## All ratios", markdown_table(comparison_rows(results))]
    if draw_cost(results, folder / "cost.png"):
        text += [
            "## Encoder step",
            "Cost of a training step of DGCNN-cls (4 x 1,024 points, k 20, unless stated otherwise).",
            f"![seconds against points, k and batch]({link}/cost.png)",
        ]
    if found(results, "encoder_kept"):
        settings = " ".join(f"{key}={value}" for key, value in KEEP_MEMORY.items())
        text.append(
            "The textbook form spends much of its time getting fresh memory for its edge tensors from the system. "
            f"With `{settings}` in the environment, glibc keeps freed memory, which helps both forms, the textbook "
            "form more; the row with freed memory kept shows the remaining ratio."
        )
    if alone := found(results, "encoder_8192"):
        s, ours = alone["settings"], alone["ours"]
        text.append(
            f"At {s['batch']} x {s['points']:,} points a step takes {number(ours['seconds_median'])} s, and the "
            f"process uses at most {number(ours['peak_mb'])} MB."
        )
    if step := found(results, "encoder"):
        draw_shares(
            {"textbook (before)": step["profile"]["textbook"], "ours (after)": step["profile"]["ours"]},
            "training step of DGCNN-cls",
            "per cent of each form's own time",
            folder / "profile.png",
        )
        text.append(f"![shares of the step by kind of operation]({link}/profile.png)")
    if rows := neighbor_rows(results):
        text += [
            "## Neighbor search",
            "All methods are exact; `tree` is SciPy's k-d tree, for coordinates only, on a CPU. The last column is the "
            "fraction of entries in the sorted lists that differ from a search in float64.",
            markdown_table(rows),
        ]
    for name in ("step", "gpu_step"):
        if part := found(results, name):
            s, picture = part["settings"], f"memory_{name}.png"
            draw_memory(part, folder / picture)
            text += [
                f"## Whole step, {s['device']}",
                f"Memory of one step, {s['memory_points']} points, {s['memory_image_model']} at "
                f"{s['memory_image_size']} px: in one pass, and in chunks of {s['chunk_size']} (`--chunk_size`), "
                "where it stays flat although the loss sees the whole batch.",
                f"![memory against the batch]({link}/{picture})",
            ]
    if loader := found(results, "loader"):
        draw_shares(loader_bars(loader), "a pretraining sample", "milliseconds on one core", folder / "loader.png")
        draw_speed(loader, folder / "speed.png")
        stages = loader["stages_ms"]
        rows = [["stage, ms per sample", "ours", "textbook"]]
        for name in {**stages["ours"], **stages["textbook"]}:
            rows.append([name, *(f"{stages[f][name]:.3f}" if name in stages[f] else "" for f in FORMULATIONS)])
        s, rate = loader["settings"], loader["ours"]["samples_per_second"]
        text += [
            "## Data path",
            f"{s['shapes']} shapes of {s['data']}, {s['points']:,} points, both images at {s['image_size']} px; CPU "
            f"time of one thread. One of our workers delivers {number(rate)} samples/s. Sixteen would "
            f"deliver {number(16 * rate)}: extrapolated, not measured.",
        ]
        if workers := loader.get("with_workers"):
            text.append(
                f"PyTorch's loader with {workers['workers']} workers, wall-clock time of an epoch on the machine as it "
                f"was: ours {number(workers['ours'])} samples/s without augmentation, textbook "
                f"{number(workers['textbook'])} with it."
            )
        text += [
            markdown_table(rows),
            "Stages marked * run in batches on the training device in our code; the table has their cost on one core.",
            f"![stages of a sample]({link}/loader.png)",
            f"![samples per second]({link}/speed.png)",
        ]
    if found(results, "svm") or found(results, "svm_kept"):
        text.append("## Linear SVM")
    if svm := found(results, "svm"):
        text += [
            f'{svm["svm"]["agreement"]:.2%} of the predictions agree with `SVC(kernel="linear")`; Gram matrix in '
            f"float64; accuracy on these synthetic features {svm['svm']['ours']['accuracy']:.2f} and "
            f"{svm['svm']['textbook']['accuracy']:.2f} %.",
        ]
    if kept := found(results, "svm_kept"):
        s = kept["settings"]
        ratios = ", ".join(f"{ratio:.1f}" for ratio in kept["svm"]["time_ratios"])
        text.append(
            f"Ours fills {number(8e-6 * s['train'] ** 2)} MB with the Gram matrix, which is slow if the system "
            "must provide that memory first. The row with freed memory kept repeats the same call in one process: "
            f"{ratios} times the textbook's speed in successive calls."
        )
    rows = [["run", "shapes/s", "hours", "peak memory, MB", "bottleneck", "check: predicted / measured s per step"]]
    for name in ("estimate", "estimate_two", "gpu_estimate"):
        if part := found(results, name):
            s = part["settings"]
            check = part["check"]
            rows.append(
                [
                    f"{s['shapes']:,} shapes, {s['epochs']} epochs, {s['gpus']} process(es), batch {s['batch_size']}, "
                    f"{s['num_points']} points, {s['image_model']} at {s['image_size']} px, amp {s['amp']}",
                    number(part["shapes_per_s"]),
                    number(part["hours"]),
                    number(part["peak_mb"]),
                    part["bottleneck"],
                    f"{number(check['predicted_seconds'])} / {number(check['measured_seconds'])} "
                    f"({check['error_percent']:+.0f} %)",
                ]
            )
    if len(rows) > 1:
        text += [
            "## Predicting a run",
            "`python -m benchmarks.estimate`, checked by a following epoch in the same number of processes. The "
            "estimate measures one process: what several lose on one machine, by sharing its memory and waiting for "
            "each other, only shows in the check. `--plan FILE` prices the missing rows of a plan of "
            "`benchmarks.reproduce` instead.",
            markdown_table(rows),
        ]
    return text


def roofline_section(results: dict[str, Any]) -> list[str]:
    """Return the counted table by stage; results named ``..._before`` are of an earlier commit."""
    titles = {"roofline_bf16": "bf16", "roofline_ranks": "bf16, 4 cards", "roofline_float32": "float32"}
    columns = [
        (f"{title}{', before' if kind else ''}", part)
        for name, title in titles.items()
        for kind in ("_before", "")
        if (part := found(results, name + kind))
    ]
    if not columns:
        return []
    stages = dict.fromkeys(stage for _, part in columns for stage in part["stages"])
    rows = [["stage: ms (GB)", *(title for title, _ in columns)]]
    for stage in [*stages, "all"]:
        costs = [part["total"] if stage == "all" else part["stages"].get(stage) for _, part in columns]
        rows.append([stage, *(f"{1e3 * c['seconds']:.1f} ({c['bytes'] / 1e9:.1f})" if c else "" for c in costs)])
    rows.append(["launches", *(f"{part['total']['launches']:,}" for _, part in columns)])
    rows.append(["all-reduces besides gradients", *(str(part["collectives"]) for _, part in columns)])
    rows.append(["**shapes/s a card, at most**", *(f"**{part['shapes_per_s']:.0f}**" for _, part in columns)])
    s, gpu = columns[-1][1]["settings"], columns[-1][1]["assumptions"]
    now, before = (
        ", ".join(sorted({commit_of(part)[:12] for title, part in columns if ("before" in title) == earlier}))
        for earlier in (False, True)
    )
    before = before and f"; before: commit {before}"
    return [
        "## Roofline of a pretraining step on a GPU",
        f"**Counted, not measured.** `python -m benchmarks.roofline`, "
        f"{s['batch_size']} objects x {s['num_points']:,} points a card, {s['model']}, two {s['image_model']} at "
        f"{s['image_size']} px, channels_last; commit {now}{before}. Assumed: "
        f"{gpu['memory'] / 1e12:.1f} TB/s of memory, {gpu['float32'] / 1e12:.0f} TFLOP/s in exact float32, "
        f"{gpu['half'] / 1e12:.0f} in half precision, {gpu['half_convolution'] / 1e12:.0f} in its convolutions and "
        f"{gpu['tf32_convolution'] / 1e12:.0f} in float32's (TF32, cuDNN's default), {1e6 * gpu['launch']:.0f} us a "
        f"launch, {gpu['link'] / 1e9:.0f} GB/s between cards and {1e6 * gpu['collective']:.0f} us an all-reduce. "
        "Compiled blocks count as if each reads its inputs and writes its outputs once. Gradients' all-reduces "
        "overlap with the backward pass and are left out.",
        markdown_table(rows),
    ]


def write_page(results: dict[str, Any], out: Path) -> Path:
    """Write ``benchmarks.md`` and the pictures below ``out``; return the page's path."""
    folder = out / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    runs = [result for result in results["benchmarks"].values() if "machine" in result]
    about = runs[0] if runs else {"machine": {"cpu": "?", "cores": 0}, "versions": {"torch": "?", "python": "?"}}
    commits = sorted({commit_of(result)[:12] for result in runs})
    load = max((result["machine"]["load_average_before"] or 0 for result in runs), default=0)
    gpu = next((result["machine"]["gpu"] for result in runs if result["machine"]["gpu"]), None)
    minutes = sum(result["wall_seconds"] for result in results["benchmarks"].values()) / 60
    head = [
        "# Benchmarks",
        NAVIGATION,
        "Generated by `python -m benchmarks.run_all`; edit that script, not this page. Each benchmark compares our "
        "code with a reference (`benchmarks/reference/textbook.py`, `benchmarks/reference/textbook_pairs.py`, "
        "scikit-learn, lightly, torch_geometric), alternating on the same machine, so that ratios hold even if other "
        "work slows both down. A ratio is the median over rounds, with its range and their number. Each script's "
        "`--help` says what it compares, and how.",
        f"Machine: {about['machine']['cpu']}, {about['machine']['cores']} cores; GPU: {gpu or 'none, not run'}; Python "
        f"{about['versions']['python']}, torch {about['versions']['torch']}; commit {', '.join(commits) or '?'}; load "
        f"average up to {load:.1f} when a benchmark began; {minutes:.0f} minutes in all.",
        *(["**A try-out at sizes that say nothing (`--quick`).**"] if results["quick"] else []),
    ]
    commands = "\n".join(result["command"] for result in results["benchmarks"].values())
    body = [*sections(results["benchmarks"], folder, "benchmarks"), *roofline_section(results["benchmarks"])]
    parts = [*head, *body, "## Commands", f"```\n{commands}\n```"]
    page = out / "benchmarks.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything, or redraw; return the results by name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_all", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--data_root", metavar="DIR", help="real pairs for the loader (default: the demo's)")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder of the page; default: runs/benchmarks, of --quick runs/benchmarks_quick",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="run these only, and keep the other results there are"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to see that everything works")
    parser.add_argument("--redraw", action="store_true", help="run nothing, write the page anew")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args(argv)
    if args.data_root and not Path(args.data_root).exists():
        raise UserError(f"--data_root {args.data_root} does not exist; without it the demo's pairs are read")
    # Benchmarks run in ROOT, wherever this command does.
    path = Path(args.data_root or "").absolute()
    data_root = args.data_root and str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    # Without separate folders, a try-out would overwrite half an hour of measurements.
    out = Path(args.output_dir or ROOT / "runs" / ("benchmarks_quick" if args.quick else "benchmarks"))
    stored = out / "benchmarks" / RESULTS
    results: dict[str, Any] = {"quick": args.quick, "benchmarks": {}}
    if args.redraw and not stored.is_file():
        raise UserError(f"{stored} does not exist: run something first, without --redraw")
    if args.redraw or (args.only and stored.is_file()):
        results = json.loads(stored.read_text(encoding="utf-8"))
    if not args.redraw:
        todo = jobs(data_root, torch.cuda.is_available())
        if torch.cuda.is_available() and not args.only:
            check_gpu(out)
        if unknown := set(args.only or ()) - {job.name for job in todo}:
            raise UserError(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(j.name for j in todo)}")
        with tempfile.TemporaryDirectory(prefix="crossnet-benchmarks-") as folder:
            for job in todo:
                if job.name in (args.only or [job.name]) and not (args.quick and job.quick is None):
                    result = run_job(job, quick=args.quick, folder=Path(folder))
                    if "not_run" in result and found(results["benchmarks"], job.name):
                        print(f"the earlier result of {job.name} stays", flush=True)
                    else:
                        results["benchmarks"][job.name] = result
                        write_json(stored, results)  # now: what follows takes half an hour
    print(f"\nwrote {write_page(results, out)}")
    write_json(args.json, results)
    return results


if __name__ == "__main__":
    run(main)

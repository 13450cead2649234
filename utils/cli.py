"""The command line's common part: help texts, common flags, errors, the JSON result."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NoReturn

from utils.errors import UserError, plain_message

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# What PyTorch's allocators, CUDA, cuBLAS and cuDNN write when memory runs out; only the first is an exception class.
OUT_OF_MEMORY = "CUDA out of memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default and keeps the line breaks of descriptions, so that examples can be pasted."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def explain(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code for an error that the user can fix; None for any other."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, UserError):
        return f"error: {plain_message(error)}", EXIT_USER_ERROR
    if isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)):
        words = ". ".join(str(error).strip().splitlines()[0].split(". ")[:3])
        return (
            f"error: not enough memory ({words}): use a smaller --batch_size (--test_batch_size in tests), --amp bf16, "
            "or for pretraining --chunk_size, which keeps the loss of the whole batch; a run continues with --resume",
            EXIT_USER_ERROR,
        )
    return None


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a script's ``main``: an error the user can fix ends with one message and exit code 2, Ctrl-C with 130.

    With ``CROSSNET_TRACEBACK=1`` in the environment the traceback comes before the message.
    """
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        if os.environ.get("CROSSNET_TRACEBACK") == "1":
            traceback.print_exception(error)
        print(message, file=sys.stderr)
        sys.exit(code)
    sys.exit(0)


def log_to_screen() -> None:
    """Show the project's log on standard output; other libraries' only from warnings on. May be called again."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("crossnet").setLevel(logging.INFO)


def add_common_arguments(parser: argparse.ArgumentParser, *, seed: bool = True, workers: bool = True) -> None:
    """Add the flags that every script understands in the same way."""
    group = parser.add_argument_group("common")
    group.add_argument("--data_root", default="data", metavar="DIR", help="folder that holds the data sets")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto takes a GPU when there is one")
    if workers:
        group.add_argument(
            "--workers",
            type=non_negative_int,
            default=min(4, os.cpu_count() or 1),
            metavar="W",
            help="processes that read data; 0 reads in this one",
        )
    if seed:
        group.add_argument("--seed", type=seed_number, default=1, metavar="S", help="seed of everything random")
    group.add_argument("--json", metavar="FILE", help="also write the final metrics to FILE as one JSON object")


def add_run_arguments(parser: argparse.ArgumentParser, *, exp_name: str, save_every: int) -> None:
    """Add the flags of a run folder: its name, resuming, how often it is written."""
    g = parser.add_argument_group("run")
    g.add_argument("--exp_name", type=run_name, default=exp_name, metavar="NAME", help="name of the run folder")
    g.add_argument("--output_dir", default="checkpoints", metavar="DIR", help="folder of the run folders")
    start = g.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from the run's newest whole checkpoint (auto, or without a value) or from PATH, mid-epoch too",
    )
    start.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    g.add_argument(
        "--save_every",
        type=non_negative_int,
        default=save_every,
        metavar="STEPS",
        help="also save within an epoch; 0 = at its end",
    )
    g.add_argument(
        "--log_every", type=positive_int, default=20, metavar="STEPS", help="steps between looks at the loss"
    )
    g.add_argument(
        "--wandb", choices=("disabled", "offline", "online"), default="disabled", help="mirror to Weights & Biases"
    )
    g.add_argument(
        "--no_sync_bn",
        action="store_true",
        help="under torchrun: batch norm by each process's own batch; default: by the batch of all",
    )
    g.add_argument(
        "--deterministic",
        action="store_true",
        help="only algorithms whose result is the same every time, where a GPU has them; slower",
    )


def run_name(text: str) -> str:
    """Argparse type: the name of a folder below ``--output_dir``."""
    path = PurePath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder below --output_dir")
    return text


def positive_int(text: str) -> int:
    """Argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_int(text: str) -> int:
    """Argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seed_number(text: str) -> int:
    """Argparse type: a seed that every library takes."""
    value = non_negative_int(text)
    if value >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2^32")
    return value


def non_negative_float(text: str) -> float:
    """Argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def write_json(path: str | os.PathLike[str] | None, metrics: Mapping[str, Any]) -> None:
    """Write one JSON object to ``path`` in one step; ``None`` writes nothing.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder and try a file in it, so that a long run does not fail at its first checkpoint.

    Raises:
        UserError: it cannot be made or written to.
    """
    probe = Path(folder) / ".write-test"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error

"""What the scripts' command lines share: help formatting, common flags, error messages, JSON output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError, plain_message
from utils.files import replacing

Config = TypeVar("Config", bound="Settings")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# Out-of-memory messages of PyTorch's allocators, CUDA, cuBLAS and cuDNN; only the first has its own exception class.
OUT_OF_MEMORY = "CUDA out of memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default and keep line breaks in descriptions, so that examples can be pasted."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class Settings:
    """Base of the dataclasses that hold a script's settings; a field has the name of its flag."""

    @classmethod
    def from_flags(cls: type[Config], args: argparse.Namespace) -> Config:
        """Take the settings from a parsed command line; a field ``flags`` takes all of it."""
        values = {"flags": dict(vars(args)), **vars(args)}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the message and exit code for an error the user can fix, or None for any other error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, UserError):
        return f"error: {plain_message(error)}", EXIT_USER_ERROR
    if isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)):
        words = ". ".join(str(error).strip().splitlines()[0].split(". ")[:3])
        return (
            f"error: not enough memory ({words}): use a smaller --batch_size (--test_batch_size in tests), --amp bf16, "
            "or for pretraining --chunk_size, which keeps the loss of the whole batch; continue the run with --resume",
            EXIT_USER_ERROR,
        )
    return None


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a script's ``main``; exit with one message and code 2 on an error the user can fix, with 130 on Ctrl-C.

    With ``CROSSNET_TRACEBACK=1`` in the environment the traceback is printed before the message.
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
    """Log to standard output: INFO and above from this project, warnings from other libraries. Idempotent."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("crossnet").setLevel(logging.INFO)


def add_common_arguments(parser: argparse.ArgumentParser, *, seed: bool = True, workers: bool = True) -> None:
    """Add the flags that all scripts share."""
    group = parser.add_argument_group("common")
    group.add_argument("--data_root", default="data", metavar="DIR", help="folder with the data sets")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto uses a GPU if available")
    if workers:
        group.add_argument(
            "--workers",
            type=non_negative_int,
            default=min(4, os.cpu_count() or 1),
            metavar="W",
            help="data-loading processes; 0 loads in the main process",
        )
    if seed:
        group.add_argument("--seed", type=seed_number, default=1, metavar="S", help="random seed")
    group.add_argument("--json", metavar="FILE", help="also write the final metrics to FILE as one JSON object")


def add_run_arguments(parser: argparse.ArgumentParser, *, exp_name: str, save_every: int) -> None:
    """Add the flags of a training run: run folder, resuming, saving and logging."""
    g = parser.add_argument_group("run")
    g.add_argument("--exp_name", type=run_name, default=exp_name, metavar="NAME", help="name of the run folder")
    g.add_argument("--output_dir", default="checkpoints", metavar="DIR", help="parent of the run folders")
    start = g.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="continue from the run's newest valid checkpoint (auto, or no value) or from PATH, also mid-epoch",
    )
    start.add_argument("--overwrite", action="store_true", help="replace an existing run of this name")
    g.add_argument(
        "--save_every",
        type=non_negative_int,
        default=save_every,
        metavar="STEPS",
        help="also save every STEPS steps within an epoch; 0 saves only at its end",
    )
    g.add_argument("--log_every", type=positive_int, default=20, metavar="STEPS", help="log every N steps")
    g.add_argument(
        "--wandb", choices=("disabled", "offline", "online"), default="disabled", help="mirror to Weights & Biases"
    )
    g.add_argument(
        "--no_sync_bn",
        action="store_true",
        help="under torchrun: batch-norm statistics per process instead of over the global batch",
    )
    g.add_argument(
        "--deterministic",
        action="store_true",
        help="use deterministic algorithms where the GPU has them; slower",
    )


def run_name(text: str) -> str:
    """Parse the name of a folder below ``--output_dir`` (argparse type)."""
    path = PurePath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder below --output_dir")
    return text


def positive_int(text: str) -> int:
    """Parse an integer of at least 1 (argparse type)."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_int(text: str) -> int:
    """Parse an integer of at least 0 (argparse type)."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seed_number(text: str) -> int:
    """Parse a seed that every library accepts, in [0, 2^32) (argparse type)."""
    value = non_negative_int(text)
    if value >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2^32")
    return value


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0 (argparse type)."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0 (argparse type)."""
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def fraction(text: str) -> float:
    """Parse a number in [0, 1) (argparse type)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def share(text: str) -> float:
    """Parse a number between 0 and 1, both excluded (argparse type)."""
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def write_json(path: str | os.PathLike[str] | None, metrics: Mapping[str, Any]) -> None:
    """Write one JSON object to ``path`` atomically; do nothing if ``path`` is None.

    Raises:
        UserError: the file cannot be written.
    """
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Create a folder and a test file in it, so that a long run does not fail at its first checkpoint.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    probe = Path(folder) / ".write-test"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error

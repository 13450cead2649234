"""What the scripts' command lines share: help formatting, common flags, error messages, JSON output."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError, plain_message
from utils.files import replacing
from utils.processes import available_cores

Config = TypeVar("Config", bound="Settings")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# Out-of-memory messages of PyTorch's allocators, CUDA, cuBLAS and cuDNN; only the first has its own exception class.
OUT_OF_MEMORY = "CUDA out of memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every default and keep line breaks in descriptions, so that examples can be pasted."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []) or action.default is False or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the message and exit code for an error the user can fix, or None for any other error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, UserError):
        return f"error: {plain_message(error)}", EXIT_USER_ERROR
    if isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)):
        words = ". ".join(str(error).strip().splitlines()[0].split(". ")[:3])
        return (
            f"error: not enough memory ({words}): of what --help lists, use a smaller --batch_size or "
            "--num_points (in tests --test_batch_size), or --amp bf16; in pretraining --chunk_size keeps the loss of "
            "the whole batch. A run that was trained for a while continues with --resume",
            EXIT_USER_ERROR,
        )
    return None


def run(main: Callable[[], Any], *, failed: Callable[[Any], Any] = lambda result: False) -> NoReturn:
    """Run a script's ``main``; exit with one message and code 2 on an error the user can fix, with 130 on Ctrl-C.

    With ``CROSSNET_TRACEBACK=1`` in the environment the traceback is printed before the message.

    Args:
        main: returns the script's result.
        failed: whether a result means exit code 1.
    """
    try:
        code = 1 if failed(main()) else 0
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        if os.environ.get("CROSSNET_TRACEBACK") == "1":
            traceback.print_exception(error)
        print(message, file=sys.stderr)
    sys.exit(code)


def log_to_screen() -> None:
    """Log to standard output: INFO and above from this project, warnings from other libraries. Idempotent."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("crossnet").setLevel(logging.INFO)


def run_name(text: str) -> str:
    """Parse the name of a folder below ``--output_dir`` (argparse type)."""
    path = PurePath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder below --output_dir")
    return text


def _number_type(
    name: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], problem: str
) -> Callable[[str], Any]:
    """Build an argparse type: a number that ``kind`` parses and that fits; ``problem`` is what others are."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    parse.__name__ = name  # argparse: "invalid positive_int value"
    return parse


positive_int = _number_type("positive_int", int, lambda n: n >= 1, "is not at least 1")
non_negative_int = _number_type("non_negative_int", int, lambda n: n >= 0, "is negative")
# What every library accepts as a seed.
seed_number = _number_type("seed_number", non_negative_int, lambda n: n < 1 << 32, "is not below 2^32")
non_negative_float = _number_type(
    "non_negative_float", float, lambda x: 0 <= x < math.inf, "is not a finite number of at least 0"
)
positive_float = _number_type("positive_float", non_negative_float, lambda x: x > 0, "is not above 0")
fraction = _number_type("fraction", float, lambda x: 0 <= x < 1, "is not in [0, 1)")
share = _number_type("share", fraction, lambda x: x > 0, "is not above 0")


def flag(default: Any = None, *names: str, group: str = "", exclusive: str = "", **options: Any) -> Any:
    """Declare a field of :class:`Settings` that is a flag of its name.

    Args:
        default: of the flag; with False it is a switch.
        names: further names of the flag.
        group: heading in the help, also of the flags that follow in the class.
        exclusive: name of a set of flags of which at most one may be given; with ``required``, exactly one must be.
        options: as for ``ArgumentParser.add_argument``.
    """
    if default is False:
        options.setdefault("action", "store_true")
    about = {"names": names, "group": group, "exclusive": exclusive, "options": {"default": default, **options}}
    return dataclasses.field(default_factory=lambda: default, metadata=about)


class Settings:
    """Base of the dataclasses that hold a script's settings: a field for each flag."""

    @classmethod
    def parser(cls, description: str | None = None, **options: Any) -> argparse.ArgumentParser:
        """Build the command line of the fields that are declared with :func:`flag`.

        Args:
            description: shown in the help as it is; None means the docstring of the class's module.
            options: as for ``ArgumentParser``.
        """
        description = description or sys.modules[cls.__module__].__doc__
        parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, **options)
        about = {field.name: field.metadata for field in dataclasses.fields(cls) if field.metadata}
        # Base classes come first; a field that a subclass declares again belongs to the subclass.
        owners = {name: kind for kind in reversed(cls.__mro__) for name in inspect.get_annotations(kind)}
        groups, exclusive = {"": parser}, {}
        for kind in reversed(cls.__mro__):
            heading = ""
            for name in [name for name in inspect.get_annotations(kind) if owners[name] is kind and name in about]:
                heading = about[name]["group"] or heading
                group = groups[heading] = groups.get(heading) or parser.add_argument_group(heading)
                options = dict(about[name]["options"])
                if key := about[name]["exclusive"]:
                    required = options.pop("required", False)
                    group = exclusive[key] = exclusive.get(key) or group.add_mutually_exclusive_group(required=required)
                group.add_argument(f"--{name}", *about[name]["names"], **options)
        return parser

    @classmethod
    def from_flags(cls: type[Config], args: argparse.Namespace) -> Config:
        """Take the settings from a parsed command line; a field ``flags`` takes all of it."""
        values = {"flags": dict(vars(args)), **vars(args)}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})


@dataclass(kw_only=True)
class CommonSettings(Settings):
    """Settings that most scripts have."""

    data_root: str = flag("data", group="common", metavar="DIR", help="folder with the data sets")
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N; auto uses a GPU if available")
    seed: int = flag(1, type=seed_number, metavar="S", help="random seed")
    json: str | None = flag(metavar="FILE", help="also write the final metrics to FILE as one JSON object")


def workers_flag() -> Any:
    """Declare ``workers``, for scripts that read data in other processes."""
    return flag(
        min(4, available_cores()),
        group="common",
        type=non_negative_int,
        metavar="W",
        help="data-loading processes; 0 loads in the main process",
    )


def write_json(path: str | os.PathLike[str] | None, metrics: Mapping[str, Any]) -> None:
    """Write one JSON object to ``path`` atomically; do nothing if ``path`` is None.

    Raises:
        UserError: the file cannot be written.
    """
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} ({reason}); bring it back, or delete it to make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; bring it back, or delete it to make it again")
    return content


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

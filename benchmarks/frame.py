"""The frame of a benchmark's command: read the flags, measure, print a table, write one JSON object.

The JSON object holds what the benchmark measured and

- ``settings``: the flags, the device and what else was chosen;
- ``machine``, ``versions``, ``git_commit``: see ``benchmarks.measure.provenance``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks.measure import in_fresh_process, provenance
from downstream.figures import check_output_path
from engine.device import resolve_device
from utils.cli import HelpFormatter, positive_int, seed_number, write_json
from utils.errors import UserError

# Flags that do not belong to the settings of a result: they name places on this machine or how it was called.
NOT_SETTINGS = ("json", "data_root", "picture", "part", "argv")


def named(words: Sequence[str], flag: str, value: str) -> dict[str, str]:
    """Read the words ``NAME=VALUE`` of a flag.

    Args:
        words: to read.
        flag: for messages.
        value: what VALUE is called in messages.

    Raises:
        UserError: a word without ``=``, or a name that cannot be a file name or is given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{flag} {word!r} has no '='; write {flag} 'NAME={value}'")
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise UserError(f"{flag} {word!r}: files are called NAME; use letters, digits, blanks and . _ + -")
        if file_name(name) in map(file_name, found):
            raise UserError(f"{flag} {word!r}: there is another NAME like this; its files would be the same")
        found[name] = text
    return found


def enough_points(args: argparse.Namespace, *, flag: str = "points") -> None:
    """Check that a cloud has at least as many points as ``--k`` neighbors.

    Args:
        args: flags, among them ``k``.
        flag: name of the one that gives the points of a cloud.

    Raises:
        UserError: it has fewer.
    """
    points = getattr(args, flag)
    if args.k > points:
        raise UserError(f"--k {args.k} neighbors need at least as many points, not --{flag} {points}")


def file_name(name: str) -> str:
    """Return the name of the files of what ``named`` read."""
    return name.replace(" ", "_")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its command line.

    Attributes:
        name: module below ``benchmarks``.
        description: text of ``--help``.
        add_arguments: adds the flags that say what is measured.
        measure: (flags, device) -> result; may add to ``settings``.
        table: result -> text.
        repeats: default of ``--repeats``; None: the benchmark has no rounds, and neither this flag nor ``--quick``.
        quick: values of flags with ``--quick``.
        threads: default of ``--threads``.
        check: raises UserError if the flags do not fit together.
        part: (flags, words) -> what ``fresh`` returns.
    """

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], Any]
    measure: Callable[[argparse.Namespace, torch.device], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    repeats: int | None = 3
    quick: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 2
    check: Callable[[argparse.Namespace], None] = lambda args: None
    part: Callable[[argparse.Namespace, Sequence[str]], dict[str, Any]] | None = None

    @property
    def module(self) -> str:
        """The module's full name."""
        return f"benchmarks.{self.name}"

    def parser(self) -> argparse.ArgumentParser:
        """Build the command line."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}", description=self.description, formatter_class=HelpFormatter
        )
        self.add_arguments(parser)
        g = parser.add_argument_group("how")
        if self.repeats is not None:
            g.add_argument("--quick", action="store_true", help="a try-out of seconds at sizes that say nothing")
            g.add_argument(
                "--repeats", type=positive_int, default=self.repeats, metavar="R", help="timed rounds of each form"
            )
        g.add_argument("--threads", type=positive_int, default=self.threads, metavar="T", help="CPU threads")
        g.add_argument("--seed", type=seed_number, default=1, metavar="S", help="seed of everything random")
        g.add_argument("--json", metavar="FILE", help="also write the result, with machine and versions, to FILE")
        parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # what ``fresh`` asks a process for
        return parser

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Read the command line.

        Raises:
            UserError: flags that do not fit together, or --json that cannot be written.
        """
        args = self.parser().parse_args(argv)
        args.argv = list(sys.argv[1:] if argv is None else argv)
        if vars(args).get("quick"):
            vars(args).update(self.quick)
        if args.json:
            check_output_path(args.json)
        self.check(args)
        return args

    def fresh(self, args: argparse.Namespace, *words: object) -> dict[str, Any]:
        """Return ``part`` of the same flags and these words, computed in a fresh process."""
        return in_fresh_process(self.module, [*args.argv, "--part", *map(str, words)])

    def main(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Measure, print the table, write the JSON object."""
        args = self.parse_args(argv)
        device, before = resolve_device(getattr(args, "device", "cpu")), torch.get_num_threads()
        torch.set_num_threads(args.threads)
        try:
            with threadpool_limits(args.threads, user_api="blas"):  # NumPy's; else they are as many as the cores
                if args.part:
                    result = self.part(args, args.part)
                    print(json.dumps(result))
                    return result
                about = provenance(device)
                result = self.measure(args, device)
        finally:
            torch.set_num_threads(before)
        settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
        result["settings"] = {**settings, "device": str(device), **result.get("settings", {})}
        result |= about
        print(self.table(result))
        write_json(args.json, result)
        return result

"""Fill the tables of docs/results.md: run what is missing, record it, write the page.

A plan (benchmarks/reproduce.toml) holds roots (where data lies), data that can be made, pretrainings, tables and rows.
A row is one way of scoring, of a pretrained encoder or of none, for every seed. Variants are rows whose pretraining
differs from another row's in a few flags (benchmarks/ablations.toml). Each seed gets a folder
results/<row>/seed_<s>/ with
  row.json       commands, commit, machine, versions, minutes, SHA-256 of the checkpoint
  scores.json    what the scoring script reported
  config.json, metrics.jsonl  of the run that trained the weights that were scored
Rows whose data or weights (pretrained:NAME, docs/weights.md) are not there are skipped and shown as "not run". A call
that was stopped continues when it is repeated: finished seeds are kept, and training resumes from its last checkpoint.
--jobs runs several seeds or rows at a time, each with its share of the cores.

Examples:
  python -m benchmarks.reproduce --list
  python -m benchmarks.reproduce --root pairs2k=/data/pairs --root modelnet10=/data/mn10 --rows 'modelnet10-*'
  python -m benchmarks.reproduce --tables                     # only write docs/results.md from results/
  python -m benchmarks.reproduce --rows modelnet10-untrained --check --seeds 1
  python -m benchmarks.reproduce --quick                      # every row at a tiny size on the demo set
  python -m benchmarks.reproduce --plan benchmarks/ablations.toml --discard --seeds 1 2 --jobs 2  # docs/ablations.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from benchmarks.commands import Commands
from benchmarks.measure import ROOT, machine_name, provenance
from benchmarks.plan import PLAN, Plan, Row
from benchmarks.result_pages import recorded_scores, value_at, write_page
from models.pretrained import pretrained_index
from utils.cli import HelpFormatter, check_writable, positive_int, read_json, run, seed_number, write_json
from utils.errors import UserError
from utils.files import sha256
from utils.processes import available_cores
from utils.reproducible import commit_of

PRETRAINING_SCRIPT = "train_crossnet_con.py"
QUICK_JOBS = 4  # each needs about a gigabyte of memory
# Scripts that train keep a run folder and resume; the others only score.
TRAINING_SCRIPTS = {
    PRETRAINING_SCRIPT,
    "downstream/classification/finetune.py",
    "downstream/segmentation/main_partseg.py",
    "downstream/segmentation/main_semseg.py",
}


def command_line(script: str, flags: Mapping[str, Any]) -> list[str]:
    """Return a script's command line; True is a bare flag, a list several values, None and False leave the flag out."""
    words = ["python", script]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.extend(map(str, value if isinstance(value, list) else [value]))
    return words


def weights_of(row: Row) -> list[str]:
    """Return the names of this repository's weights that a row starts from or scores."""
    texts = [value for value in row.flags.values() if isinstance(value, str)]
    return [text.removeprefix("pretrained:") for text in texts if text.startswith("pretrained:")]


class Runner:
    """Runs rows and records them.

    Args:
        plan: what to run.
        work: folder of checkpoints and logs.
        results: folder of the records.
        quick: flags by script that replace a row's, for a try-out.
        jobs: how many seeds run at a time.
    """

    def __init__(
        self, plan: Plan, *, work: Path, results: Path, quick: Mapping[str, Mapping[str, Any]], jobs: int = 1
    ) -> None:
        self.plan, self.work, self.results, self.quick = plan, work, results, quick
        self.processes = Commands(jobs=jobs, folder=ROOT)

    def flags(self, script: str, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's flags with the roots put in; a try-out's values replace them."""
        merged = {**flags, **self.quick.get(script, {})}
        return {key: self.plan.placed(value) for key, value in merged.items()}

    def run_folder(self, name: str, seed: int) -> Path:
        """Return the folder of a training run's checkpoints."""
        return self.work / name / f"seed_{seed}"

    def record_folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a seed's record."""
        return self.results / row.name / f"seed_{seed}"

    def share_done(self, name: str, seed: int) -> float:
        """Return the share of a training run's epochs that are done and saved."""
        folder = self.run_folder(name, seed)
        if not all((folder / file).exists() for file in ("last.pth", "config.json", "metrics.jsonl")):
            return 0.0
        epochs = read_json(folder / "config.json")["arguments"]["epochs"]
        return min(1.0, len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) / epochs)

    def training_command(self, name: str, script: str, flags: Mapping[str, Any], seed: int) -> list[str]:
        """Return the command line of a training run, which resumes an earlier one."""
        folder = self.run_folder(name, seed)
        placed = {"output_dir": folder.parent, "exp_name": folder.name, "seed": seed, "resume": True}
        return command_line(script, {**self.flags(script, flags), **placed})

    def needs(self, row: Row) -> list[str]:
        """Return the data of a row and of its pretraining."""
        pretraining = self.plan.pretrainings[row.pretraining].needs if row.pretraining else ()
        return list(dict.fromkeys([*pretraining, *row.needs]))

    def making(self, row: Row) -> dict[Path, list[str]]:
        """Return the commands that make a row's data, by the path that each writes."""
        made = {need: self.plan.made[need] for need in self.needs(row) if need in self.plan.made}
        return {
            self.plan.path(need): command_line(
                entry.script, {**self.flags(entry.script, entry.flags), "out": self.plan.path(need)}
            )
            for need, entry in made.items()
        }

    def commands(self, row: Row, seed: int) -> list[list[str]]:
        """Return the commands of one seed of a row, in order, without those that make data."""
        commands, flags = [], dict(row.flags)
        if row.pretraining:
            pretraining = self.plan.pretrainings[row.pretraining]
            commands.append(self.training_command(pretraining.name, PRETRAINING_SCRIPT, pretraining.flags, seed))
            folder = self.run_folder(pretraining.name, seed)
            for key, value in flags.items():
                if isinstance(value, str):
                    value = value.replace("{pretrained}", str(folder / "last.pth"))
                    flags[key] = value.replace("{run_folder}", str(folder))
        report = {"json": self.work / row.name / f"seed_{seed}.json"}
        if row.script in TRAINING_SCRIPTS:
            commands.append(self.training_command(row.name, row.script, flags, seed) + command_line("", report)[2:])
        else:
            commands.append(command_line(row.script, {**self.flags(row.script, flags), "seed": seed, **report}))
        return commands

    def recorded(self, row: Row, seed: int) -> dict[str, Any] | None:
        """Return the record of a finished seed, or None.

        Raises:
            UserError: it was made by other commands than the plan's.
        """
        path = self.record_folder(row, seed) / "row.json"
        if not path.exists():
            return None
        record = read_json(path)
        if record.get("flags") != self.identity(row):
            raise UserError(
                f"{path.parent} was recorded with other settings than the plan's; move it away to run the row again, "
                "or give the row another name"
            )
        return record

    def identity(self, row: Row) -> dict[str, Any]:
        """Return the settings and weights that identify a record; where data lies is not among them."""
        pretraining = self.plan.pretrainings[row.pretraining] if row.pretraining else None
        given = {row.script: row.flags, **({PRETRAINING_SCRIPT: pretraining.flags} if pretraining else {})}
        given |= {made.script: made.flags for need, made in self.plan.made.items() if need in self.needs(row)}
        index = pretrained_index()  # weights of a name may be published again
        given |= {f"pretrained:{name}": {"sha256": index[name]["sha256"]} for name in weights_of(row) if name in index}
        return {script: {**flags, **self.quick.get(script, {})} for script, flags in given.items()}

    def missing(self, row: Row) -> list[str]:
        """Return the data and weights that a row needs and that are missing; data of a try-out is the demo set."""
        index = pretrained_index()
        weights = [f"pretrained:{name}" for name in weights_of(row) if name not in index]
        return weights + ([] if self.quick else self.plan.missing(self.needs(row)))

    def discard(self, row: Row, seed: int) -> None:
        """Delete the checkpoints of a row's pretraining if every row that scores them is recorded."""
        scored = [other for other in self.plan.rows if row.pretraining and other.pretraining == row.pretraining]
        if scored and all(self.recorded(other, seed) for other in scored):
            for path in self.run_folder(str(row.pretraining), seed).glob("*.pth"):
                path.unlink(missing_ok=True)

    def run_all(self, tasks: Sequence[tuple[Row, int]]) -> Iterator[tuple[Row, int]]:
        """Run and record seeds of rows, and yield each when it is recorded.

        Raises:
            UserError: as :meth:`run_seed`; the other commands are stopped.
        """
        yield from self.processes.run_all(self.run_seed, tasks)

    def run_seed(self, row: Row, seed: int) -> None:
        """Run one seed of a row and record it.

        Raises:
            UserError: a command failed; its output is in the row's log.
        """
        start, commands, making = time.time(), self.commands(row, seed), self.making(row)
        log = self.work / row.name / f"seed_{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        about = provenance()  # before the run: the commit may change meanwhile
        minutes = []
        with log.open("a", encoding="utf-8") as output:
            made = {tuple(command): path for path, command in making.items()}
            for command in (*making.values(), *commands):
                with self.processes.turn(command) as succeeded:  # rows share data and pretrainings
                    if succeeded or (tuple(command) in made and made[tuple(command)].exists()):
                        continue
                    print(f"{row.name}, seed {seed}: {shlex.join(command)}", flush=True)
                    begun = time.time()
                    code = self.processes.run(command, output)
                if code:
                    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
                    raise UserError(f"{shlex.join(command)} ended with exit code {code}; see {log}, which ends: {last}")
                minutes.append(round((time.time() - begun) / 60, 2))
        scores = read_json(self.work / row.name / f"seed_{seed}.json")
        trained = self.run_folder(row.name if row.script in TRAINING_SCRIPTS else row.pretraining or "", seed)
        checkpoint = trained / "last.pth"
        record = {
            "name": row.name,
            "seed": seed,
            "flags": self.identity(row),
            "commands": [shlex.join(command) for command in (*making.values(), *commands)],
            "minutes": round((time.time() - start) / 60, 1),
            "command_minutes": minutes,  # of those that ran: not of what was made or trained before
            "date": time.strftime("%Y-%m-%d", time.gmtime(start)),
            "threads": self.processes.threads,
            **about,
            "checkpoint_sha256": sha256(checkpoint) if checkpoint.exists() else None,
        }
        target = self.record_folder(row, seed)
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "scores.json", json.loads(self.plan.portable(json.dumps(scores))))
        for name in ("config.json", "metrics.jsonl"):
            if (trained / name).exists():
                text = self.plan.portable((trained / name).read_text(encoding="utf-8"))
                (target / name).write_text(text, encoding="utf-8")
        # Last: its presence says that the seed is finished.
        write_json(target / "row.json", json.loads(self.plan.portable(json.dumps(record))))


def check_row(row: Row, seed: int, *, recorded: Runner, again: Runner, tolerance: float) -> bool:
    """Run a recorded seed again in a separate folder; return whether the table's columns agree."""
    folder = recorded.record_folder(row, seed)
    before = recorded_scores(folder)
    shutil.rmtree(again.work, ignore_errors=True)
    list(again.run_all([(row, seed)]))
    after = recorded_scores(again.record_folder(row, seed))
    columns = recorded.plan.tables[row.table].columns
    pairs = {column: (value_at(before, path), value_at(after, path)) for column, path in columns.items()}
    agree = any(old is not None for old, _ in pairs.values())
    if not agree:
        print(
            f"{row.name}, seed {seed}: none of the columns {', '.join(columns)} is in {folder / 'scores.json'}: DIFFERS"
        )
    for column, (old, new) in pairs.items():
        if old is None and new is None:  # a column of other rows
            continue
        same = old == new or (old is not None and new is not None and abs(old - new) <= tolerance)
        agree &= same
        print(f"{row.name}, seed {seed}, {column}: recorded {old}, now {new}: {'agrees' if same else 'DIFFERS'}")
    if not agree:
        changes = changed(read_json(folder / "row.json"), read_json(again.record_folder(row, seed) / "row.json"))
        unchanged = "commit, machine, threads and versions are those recorded"
        print(f"{row.name}, seed {seed}: {'; '.join(changes) or unchanged}")
    return agree


def changed(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what two records of a seed were not made with alike, which may explain other scores."""

    def about(record: Mapping[str, Any]) -> dict[str, str]:
        threads = record.get("threads", "not recorded")
        named = {"commit": commit_of(record), "machine": machine_name(record["machine"]), "threads": threads}
        return {**named, **record["versions"]}

    old, new = about(recorded), about(now)
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)]


def chosen_rows(plan: Plan, patterns: Sequence[str]) -> list[Row]:
    """Return the rows whose names match one of the patterns; all without patterns.

    Raises:
        UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in plan.rows):
            raise UserError(f"no row matches {pattern!r}; see --list")
    return [row for row in plan.rows if not patterns or any(fnmatch.fnmatchcase(row.name, p) for p in patterns)]


def root_setting(text: str) -> tuple[str, str]:
    """Parse a value of ``--root``."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, folder


def add_plan_arguments(parser: Any, *, plan: Path | None) -> None:
    """Add the flags that choose rows of a plan and say where their data and records lie, to a parser or a group."""
    parser.add_argument("--plan", default=plan and str(plan), metavar="FILE", help="the plan")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these rows; * is any text")
    parser.add_argument("--seeds", type=seed_number, nargs="+", metavar="S", help="only these seeds")
    parser.add_argument(
        "--root", type=root_setting, action="append", default=[], metavar="NAME=PATH", help="where a root's data lies"
    )
    parser.add_argument("--work_dir", default="runs/reproduce", metavar="DIR", help="checkpoints and logs")
    parser.add_argument("--results", default="results", metavar="DIR", help="records, a folder a row and seed")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce", description=__doc__, formatter_class=HelpFormatter
    )
    add_plan_arguments(parser, plan=PLAN)
    parser.add_argument("--page", metavar="FILE", help="the page that is written (default: the plan's)")
    parser.add_argument("--list", action="store_true", help="show the rows and what each lacks, then stop")
    parser.add_argument("--tables", action="store_true", help="only write the page from what is recorded")
    parser.add_argument(
        "--check", action="store_true", help="run recorded rows again and compare; exit code 1 if any differs"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="T", help="--check: difference in percent that still agrees"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every row with the plan's quick settings, one seed, in a folder below --work_dir",
    )
    parser.add_argument(
        "--discard",
        action="store_true",
        help="delete a pretraining's checkpoints, half a gigabyte a seed, once all rows that score them are recorded",
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help=f"how many run at a time (default: 1; with --quick the number of cores, at most {QUICK_JOBS})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write what was done to FILE")
    return parser


def prepare(args: argparse.Namespace) -> tuple[Runner, Path]:
    """Return the runner of a command line, and the page it writes."""
    plan = Plan.read(Path(args.plan), dict(args.root))
    work, results, page, quick = Path(args.work_dir), Path(args.results), Path(args.page or plan.page), {}
    if args.quick:
        plan = Plan(**{**vars(plan), "roots": {**plan.roots, **plan.quick.get("roots", {}), **dict(args.root)}})
        quick = plan.quick.get("flags", {})
        work = work / "quick"
        results, page = work / "results", work / Path(plan.page).name
    jobs = args.jobs or (min(available_cores(), QUICK_JOBS) if args.quick else 1)
    return Runner(plan, work=work, results=results, quick=quick, jobs=jobs), page


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the missing rows and write the page; return the state of every chosen row.

    Raises:
        UserError: a plan that cannot be read, a row that does not exist, or a command that failed.
    """
    args = build_parser().parse_args(argv)
    runner, page = prepare(args)
    rows = chosen_rows(runner.plan, args.rows)
    if not (args.list or args.tables):
        check_writable(runner.work)
        check_writable(runner.results)
    state: dict[str, Any] = {}
    todo: list[tuple[Row, int]] = []
    for row in rows:
        seeds = args.seeds or (row.seeds[:1] if args.quick else row.seeds)
        missing = runner.missing(row)
        done = [seed for seed in seeds if runner.recorded(row, seed)]
        state[row.name] = {"recorded": done, "missing_data": missing}
        if args.list or args.tables:
            what = f"lacks {', '.join(missing)}" if missing else "can run"
            if args.list:
                print(f"{row.name}: seeds {done or 'none'} of {list(seeds)} recorded; {what}")
        elif args.check:
            again = Runner(
                runner.plan, work=runner.work / "check", results=runner.work / "check_results", quick=runner.quick
            )
            if not done:
                print(f"{row.name}: nothing to check, no seed of {list(seeds)} is recorded in {runner.results}")
            agree = [check_row(row, seed, recorded=runner, again=again, tolerance=args.tolerance) for seed in done]
            state[row.name]["agrees"] = all(agree) if agree else None
        elif missing:
            print(f"{row.name}: not run, {', '.join(missing)} is not there (python -m data.check_data)")
        else:
            todo += [(row, seed) for seed in seeds if seed not in done]
            for seed in done if args.discard else ():
                runner.discard(row, seed)
    for row, seed in runner.run_all(todo):
        state[row.name]["recorded"] = sorted([*state[row.name]["recorded"], seed])
        if args.discard:
            runner.discard(row, seed)
    if not (args.list or args.check):
        write_page(runner.plan, runner.results, page)
        print(f"wrote {page}")
    write_json(args.json, state)
    return state


if __name__ == "__main__":
    run(main, failed=lambda state: any(row.get("agrees") is False for row in state.values()))

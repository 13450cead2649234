"""A plan file: where data lies, what is trained, how it is scored, and where the numbers go."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from benchmarks.measure import ROOT
from utils.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Entry = TypeVar("Entry")
PLAN = ROOT / "benchmarks" / "reproduce.toml"
RESERVED = ("check", "check_results", "quick")  # folders of benchmarks.reproduce beside those of rows
KEYS = ("title", "navigation", "intro", "page", "roots", "made", "pretraining", "tables", "rows", "variants", "quick")
DEFAULT_SEEDS = (1, 2, 3)


class PlanError(Exception):
    """What is wrong in a plan."""


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value of a TOML file has the type of a field."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) is Sequence:
        return isinstance(value, list) and all(fits(entry, inner[0]) for entry in value)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(fits(entry, inner[1]) for entry in value.values())
    return any(fits(value, each) for each in inner) if inner else type(value) is kind


def entry_of(kind: type[Entry], entry: Mapping[str, Any], where: str) -> Entry:
    """Build an entry of a plan.

    Raises:
        PlanError: a field is unknown, missing, or of another type; the message names entry and field.
    """
    known = get_type_hints(kind)
    if unknown := [name for name in entry if name not in known]:
        raise PlanError(f"{where} has the unknown field {unknown[0]}; there are {', '.join(known)}")
    required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in required if name not in entry]:
        raise PlanError(f"{where} lacks {missing[0]}")
    for name, value in entry.items():
        if not fits(value, known[name]):
            raise PlanError(f"{where} has {name} = {value!r}, which is not of the type {known[name]}")
    return kind(**entry)


@dataclass(frozen=True)
class Pretraining:
    """An encoder to pretrain, once per seed; several rows may score it."""

    name: str
    flags: Mapping[str, Any]
    needs: Sequence[str] = ()


@dataclass(frozen=True)
class Made:
    """Data that a command makes if it is missing: a script and its flags."""

    script: str
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of the page: heading, explanation, and columns as paths into ``scores.json``.

    A path that begins with ``training.`` leads into the last epoch of the run that trained what was scored. ``digits``
    are those behind the point, by column. With ``effects``, rows are shown as differences to the row that they name in
    ``against``, and drawn into the file ``picture`` beside the page, a panel for each of the columns ``pictured``. With
    ``growth``, rows are those of ``benchmarks/growth.py``, shown and drawn step by step.
    """

    title: str
    note: str
    columns: Mapping[str, str]
    digits: Mapping[str, int] = field(default_factory=dict)
    effects: bool = False
    growth: bool = False
    picture: str | None = None
    pictured: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One row of a table: a scoring script and its flags, for each seed.

    Attributes:
        against: rows to which the table shows differences.
    """

    name: str
    table: str
    label: str
    script: str
    flags: Mapping[str, Any]
    needs: Sequence[str] = ()
    pretraining: str | None = None
    seeds: Sequence[int] = DEFAULT_SEEDS
    published: str = "not available"
    reproduced: str = "none known"
    against: Sequence[str] = ()
    factor: str = ""


@dataclass(frozen=True)
class Variants:
    """Variants of a row: its pretraining with other flags, named by the factor and the case."""

    of: str
    factor: str
    cases: Mapping[str, Mapping[str, Any]]

    def expand(self, row: Row, pretraining: Pretraining) -> tuple[list[Row], dict[str, Pretraining]]:
        """Return a row and a pretraining for each case."""
        rows, pretrainings = [], {}
        for case, flags in self.cases.items():
            name = "-".join([row.name, *(re.sub(r"[^a-z0-9.]+", "_", text.lower()) for text in (self.factor, case))])
            rows.append(replace(row, name=name, label=case, pretraining=name, against=[row.name], factor=self.factor))
            pretrainings[name] = replace(pretraining, name=name, flags={**pretraining.flags, **flags})
        return rows, pretrainings


@dataclass(frozen=True)
class Plan:
    """The content of a plan file.

    Raises:
        UserError: a row names a table, pretraining or row that is not in the file, or a name is given twice.
    """

    title: str
    roots: Mapping[str, str]
    pretrainings: Mapping[str, Pretraining]
    tables: Mapping[str, Table]
    rows: Sequence[Row]
    made: Mapping[str, Made] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    navigation: str = ""
    intro: str = ""
    page: str = "docs/results.md"
    named_roots: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, roots: Mapping[str, str]) -> Plan:
        """Read a plan; ``roots`` replace those of the file."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            if unknown := sorted(content.keys() - KEYS):
                raise PlanError(f"{unknown[0]} is not a part of a plan; there are {', '.join(KEYS)}")
            for key in ("title", "roots", "tables", "rows"):
                if key not in content:
                    raise PlanError(f"{key} is missing")
            rows = [entry_of(Row, entry, f"row {number}") for number, entry in enumerate(content["rows"], 1)]
            pretrainings = {
                name: entry_of(Pretraining, {"name": name, **entry}, f"pretraining {name}")
                for name, entry in content.get("pretraining", {}).items()
            }
            for number, entry in enumerate(content.get("variants", ()), 1):
                variants = entry_of(Variants, entry, f"variants {number}")
                base = {row.name: row for row in rows}.get(variants.of)
                if base is None or base.pretraining not in pretrainings:
                    why = "which is not there" if base is None else "which has no pretraining to vary"
                    raise PlanError(f"variants {number} are of the row {variants.of}, {why}")
                more = variants.expand(base, pretrainings[base.pretraining])
                rows, pretrainings = rows + more[0], pretrainings | more[1]
            plan = entry_of(
                cls,
                {
                    "title": content["title"],
                    "roots": {**content["roots"], **roots},
                    "pretrainings": pretrainings,
                    "tables": {
                        name: entry_of(Table, entry, f"table {name}") for name, entry in content["tables"].items()
                    },
                    "rows": rows,
                    "made": {
                        made: entry_of(Made, entry, f"made {made}") for made, entry in content.get("made", {}).items()
                    },
                    "named_roots": content["roots"],
                    **{name: content[name] for name in ("quick", "navigation", "intro", "page") if name in content},
                },
                "the plan",
            )
            plan.check()
        except (OSError, ValueError, AttributeError, TypeError, PlanError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read as a plan: {reason}; compare it with {PLAN.name}") from error
        unknown_roots = sorted(roots.keys() - content["roots"].keys())
        if unknown_roots:
            raise UserError(f"--root {unknown_roots[0]}: {path} has the roots {', '.join(content['roots'])}")
        return plan

    def check(self) -> None:
        """Check that what the entries name is there.

        Raises:
            PlanError: it is not.
        """
        names = [row.name for row in self.rows]
        for row in self.rows:
            if row.table not in self.tables:
                raise PlanError(f"row {row.name} names a table that is not there: {row.table}")
            if row.pretraining and row.pretraining not in self.pretrainings:
                raise PlanError(f"row {row.name} names a pretraining that is not there: {row.pretraining}")
            if absent := [name for name in row.against if name not in names]:
                raise PlanError(f"row {row.name} is compared with a row that is not there: {absent[0]}")
            if names.count(row.name) > 1:
                raise PlanError(f"two rows are called {row.name}")
        for name in (*names, *self.pretrainings):
            if not re.fullmatch(r"\w[\w.+-]*", name) or name in RESERVED:
                raise PlanError(
                    f"{name!r} is the name of a folder too: letters, digits, and . _ + - after the first; not "
                    f"{', '.join(RESERVED)}"
                )
        for entry in (*self.rows, *self.pretrainings.values(), *self.made.values()):
            what = f"{type(entry).__name__.lower()} {getattr(entry, 'name', '')}".strip()
            script = getattr(entry, "script", "")
            if script and not (ROOT / script).is_file():
                raise PlanError(f"{what} names a script that is not there: {script}")
            for name in re.findall(r"\{(\w+)\}", str(list(entry.flags.values()))):
                if name not in self.roots and name not in ("pretrained", "run_folder", "area"):
                    raise PlanError(f"{what} names a root that is not there: {{{name}}}")
            for choice in (choice for need in getattr(entry, "needs", ()) for choice in need.split("|")):
                if choice.partition("/")[0] not in self.roots:
                    raise PlanError(f"{what} needs {choice}, which begins with none of the roots")

    def place(self, text: str) -> str:
        """Put the roots into a flag's text: ``{data}`` becomes the folder of that name."""
        for name, folder in self.roots.items():
            text = text.replace(f"{{{name}}}", folder)
        return text

    def placed(self, value: Any) -> Any:
        """Put the roots into a flag's text, or into each text of a list."""
        if isinstance(value, list):
            return [self.placed(entry) for entry in value]
        return self.place(value) if isinstance(value, str) else value

    def portable(self, text: str) -> str:
        """Replace folders given by ``--root`` by those of the plan file: a record is for every machine."""
        for name, folder in sorted(self.roots.items(), key=lambda item: -len(item[1])):
            if folder != self.named_roots[name]:
                text = text.replace(folder, self.named_roots[name])
        return text

    def path(self, need: str) -> Path:
        """Return the path of a needed file, given as ``root/rest``."""
        root, _, rest = need.partition("/")
        return Path(self.roots[root]) / rest

    def missing(self, needs: Iterable[str]) -> list[str]:
        """Return the needed files that are neither there nor can be made; ``root/a|root/b`` needs one of the two.

        A root that is a file, such as packed pairs, has what its folder would have.
        """
        absent = []
        for need in needs:
            choices = [self.path(choice) for choice in need.split("|")]
            if need not in self.made and not any(choice.exists() or choice.parent.is_file() for choice in choices):
                absent.append(" or ".join(map(str, choices)))
        return absent

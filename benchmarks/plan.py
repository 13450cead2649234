"""A plan file: where data lies, what is trained, how it is scored, and where the numbers go."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from utils.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLAN = ROOT / "benchmarks" / "reproduce.toml"
DEFAULT_SEEDS = (1, 2, 3)


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
    ``against``, and drawn into the file ``picture`` beside the page, a panel for each of the columns ``pictured``.
    """

    title: str
    note: str
    columns: Mapping[str, str]
    digits: Mapping[str, int] = field(default_factory=dict)
    effects: bool = False
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
            rows = [Row(**entry) for entry in content["rows"]]
            pretrainings = {
                name: Pretraining(name=name, **entry) for name, entry in content.get("pretraining", {}).items()
            }
            for variants in [Variants(**entry) for entry in content.get("variants", ())]:
                base = {row.name: row for row in rows}[variants.of]
                more = variants.expand(base, pretrainings[base.pretraining or ""])
                rows, pretrainings = rows + more[0], pretrainings | more[1]
            plan = cls(
                title=content["title"],
                roots={**content["roots"], **roots},
                pretrainings=pretrainings,
                tables={name: Table(**entry) for name, entry in content["tables"].items()},
                rows=rows,
                made={path: Made(**entry) for path, entry in content.get("made", {}).items()},
                named_roots=content["roots"],
                **{name: content[name] for name in ("quick", "navigation", "intro", "page") if name in content},
            )
        except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a plan: {error}; compare it with {PLAN.name}") from error
        unknown_roots = sorted(roots.keys() - content["roots"].keys())
        if unknown_roots:
            raise UserError(f"--root {unknown_roots[0]}: {path} has the roots {', '.join(content['roots'])}")
        names = [row.name for row in plan.rows]
        for row in plan.rows:
            if row.table not in plan.tables:
                raise UserError(f"{path}: row {row.name} names a table that is not there: {row.table}")
            if row.pretraining and row.pretraining not in plan.pretrainings:
                raise UserError(f"{path}: row {row.name} names a pretraining that is not there: {row.pretraining}")
            if absent := [name for name in row.against if name not in names]:
                raise UserError(f"{path}: row {row.name} is compared with a row that is not there: {absent[0]}")
            if names.count(row.name) > 1:
                raise UserError(f"{path}: two rows are called {row.name}")
        return plan

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

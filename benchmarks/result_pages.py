"""Pages and pictures of recorded rows: tables of scores, and differences with their spread."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_name, markdown_table
from benchmarks.plan import Plan, Row, Table
from benchmarks.spread import Difference, difference, differences_to_base
from utils.cli import read_json
from utils.errors import UserError
from utils.files import replacing
from utils.reproducible import commit_of

SPREAD_NOTE = "~ marks a difference **within the spread**: the interval contains 0, so it supports no claim."
INTERVAL_NOTE = (
    "Interval: 95 %, Student's t; paired over the seeds that both rows have, which share data order and drawn labels, "
    f"or Welch's where they share fewer than two. {SPREAD_NOTE}"
)
EFFECT_NOTE = (
    "Interval: 95 % for all variants of a column at once (Bonferroni), Student's t of an analysis of variance by "
    "variant and seed: seeds share data order and drawn labels, and the variance of what neither explains is pooled "
    f"over the variants. {SPREAD_NOTE}"
)
WITHIN, BEYOND = "#8c8c8c", "#b5482a"


def recorded_scores(folder: Path) -> dict[str, Any]:
    """Return ``scores.json`` of a seed's record and, as ``training``, the last epoch of the run that was scored."""
    scores, metrics = read_json(folder / "scores.json"), folder / "metrics.jsonl"
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        try:
            scores = {**scores, "training": json.loads(lines[-1]) if lines else {}}
        except json.JSONDecodeError as error:
            raise UserError(
                f"the last line of {metrics} is not JSON ({error}); delete {folder} to run it again"
            ) from error
    return scores


def value_at(scores: Any, path: str) -> float | None:
    """Return a number of a script's JSON by its path of keys and list positions, with dots between; None if missing.

    ``reported`` is the entry of a fine-tuning run that is reported: the best on held-out data, or else the last; ``*``
    is the only entry of a mapping.
    """
    for key in path.split("."):
        if key == "reported":
            scores = scores.get("best") or scores.get("last")
        elif isinstance(scores, list) and int(key) < len(scores):
            scores = scores[int(key)]
        elif key == "*" and isinstance(scores, Mapping) and len(scores) == 1:
            (scores,) = scores.values()
        elif isinstance(scores, Mapping) and key in scores:
            scores = scores[key]
        else:
            return None
    return float(scores) if scores is not None else None


def mean_and_deviation(values: Sequence[float], *, digits: int = 1) -> str:
    """Format mean and sample deviation over seeds; none for a single seed, or where all seeds give the same."""
    if len(set(values)) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


class Records:
    """What is recorded of a plan's rows."""

    def __init__(self, plan: Plan, results: Path) -> None:
        self.plan, self.results = plan, results
        self.rows = {row.name: row for row in plan.rows}

    def folders(self, row: Row) -> list[Path]:
        """Return the folders of a row's finished seeds."""
        found = (self.results / row.name).glob("seed_*/row.json")
        return sorted(path.parent for path in found if re.fullmatch(r"seed_\d+", path.parent.name))

    def of(self, row: Row) -> list[dict[str, Any]]:
        """Return the records of a row's finished seeds."""
        return [read_json(path / "row.json") for path in self.folders(row)]

    def values(self, row: Row, path: str) -> dict[int, float]:
        """Return a column's value by seed."""
        found = {
            record["seed"]: value_at(recorded_scores(folder), path)
            for folder, record in zip(self.folders(row), self.of(row), strict=True)
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def difference(self, row: Row, other: str, path: str) -> Difference | None:
        """Compare a row with one that it names; None without two seeds of both."""
        return difference(self.values(row, path), self.values(self.rows[other], path))

    def effects(self, rows: Sequence[Row], path: str) -> dict[str, Difference]:
        """Compare the variants among rows with their bases, by name; those without an interval are left out."""
        found: dict[str, Difference | None] = {}
        for base in dict.fromkeys(row.against[0] for row in rows if row.against):
            scores = {row.name: self.values(row, path) for row in rows if base in row.against[:1]}
            found |= differences_to_base({base: self.values(self.rows[base], path), **scores}, base)
        return {name: effect for name, effect in found.items() if effect is not None}


def commits_and_machines(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the commits and machines of records."""
    commits = sorted({commit_of(record)[:7] for record in records})
    machines = sorted({machine_name(record["machine"]) for record in records})
    return f"{', '.join(commits)}, {', '.join(machines)}"


def seeds_of(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the seeds of records."""
    return ", ".join(str(record["seed"]) for record in found)


def record_cell(row: Row, found: Sequence[Mapping[str, Any]]) -> str:
    """Return a row's name; with records as a link to them, with their commits and machines."""
    return f"[{row.name}](../results/{row.name}), {commits_and_machines(found)}" if found else f"`{row.name}`"


def commands_block(row: Row, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines that show the commands of a row's first record."""
    return [f"`{row.name}`, seed {found[0]['seed']}:", "", "```", *found[0]["commands"], "```", ""]


def folded(blocks: Sequence[str]) -> list[str]:
    """Return the lines of a section that a reader unfolds to see the commands; none without commands."""
    return ["<details><summary>Commands</summary>", "", *blocks, "</details>", ""] if blocks else []


def score_table(records: Records, table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of scores, and the commands of its rows.

    What others published and reproduced is shown where the plan knows of any.
    """
    quoted = any((row.published, row.reproduced) != (Row.published, Row.reproduced) for row in rows)
    others = ["published", "reproduced by others"] if quoted else []
    lines = [["row", *table.columns, "seeds", *others, "record"]]
    blocks: list[str] = []
    for row in rows:
        found = records.of(row)
        cells = []
        for column, path in table.columns.items():
            values = list(records.values(row, path).values())
            cells.append(mean_and_deviation(values, digits=table.digits.get(column, 1)) if values else "not run")
        if found:
            blocks += commands_block(row, found)
        quotes = [row.published, row.reproduced] if quoted else []
        lines.append([row.label, *cells, seeds_of(found) or "-", *quotes, record_cell(row, found)])
    return [markdown_table(lines), "", *difference_table(records, table, rows), *folded(blocks)]


def difference_table(records: Records, table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the lines of the differences between rows and those they name; none without two seeds of both."""
    lines = []
    for ours, other in [(row, other) for row in rows for other in row.against]:
        cells = [
            found.text(table.digits.get(column, 1)) if (found := records.difference(ours, other, path)) else "-"
            for column, path in table.columns.items()
        ]
        if any(cell != "-" for cell in cells):
            lines.append([ours.label, records.rows[other].label, *cells])
    if not lines:
        return []
    return [markdown_table([["difference of", "to", *table.columns], *lines]), "", INTERVAL_NOTE, ""]


def effect_table(records: Records, table: Table, rows: Sequence[Row], page: Path) -> list[str]:
    """Return the lines of a table of variants: scores of the base, differences of the others; draw their picture.

    Variants without a record are named below the table.
    """
    lines = [["factor", "variant", *table.columns, "seeds"]]
    not_run: dict[str, list[str]] = {}
    effects = {column: records.effects(rows, path) for column, path in table.columns.items()}
    for row in rows:
        found = records.of(row)
        if not found:
            not_run.setdefault(row.factor, []).append(row.label)
            continue
        cells = []
        for column, path in table.columns.items():
            digits, values = table.digits.get(column, 1), list(records.values(row, path).values())
            if not values:
                cells.append("-")
            elif not row.against:
                cells.append(f"**{mean_and_deviation(values, digits=digits)}**")
            else:
                effect = effects[column].get(row.name)
                cells.append(effect.text(digits) if effect else f"{statistics.mean(values):.{digits}f} (no interval)")
        lines.append([row.factor, f"[{row.label}](../results/{row.name})", *cells, seeds_of(found)])
    shown = [row for row in rows if any(row.name in found for found in effects.values())]
    picture = []
    if shown and table.picture:
        drawn = {column: effects[column] for column in table.pictured or table.columns}
        draw_effects(drawn, shown, page.with_name(table.picture))
        picture = [f"![differences to the base over seeds]({table.picture})", ""]
    first = next((records.of(row)[0]["commands"] for row in rows if not row.against and records.of(row)), [])
    blocks = ["```", *first, "```", ""] if first else []
    if every := [record for row in rows for record in records.of(row)]:
        blocks = [f"Commit and machine: {commits_and_machines(every)}. The base:", "", *blocks]
    missing = [f"- {factor}: {'; '.join(labels)}" for factor, labels in not_run.items()]
    if missing:
        missing = ["Not run:", "", *missing, ""]
    return [markdown_table(lines), "", EFFECT_NOTE, "", *picture, *missing, *blocks]


def growth_table(records: Records, table: Table, rows: Sequence[Row], page: Path) -> list[str]:
    """Return the lines of tables of scores along runs, and what their curves give beyond; draw their picture."""
    from benchmarks.growth import draw, fit_lines, score_lines

    runs: dict[str, Any] = {}
    lines, blocks = [["row", "seeds", "record"]], []
    for row in rows:
        found = records.of(row)
        if found:
            blocks += commands_block(row, found)
        for record, folder in zip(found, records.folders(row), strict=True):
            (scores,) = read_json(folder / "scores.json")["runs"].values()
            runs[row.label if len(found) == 1 else f"{row.label}, seed {record['seed']}"] = scores
        lines.append([row.label, seeds_of(found) or "not run", record_cell(row, found)])
    if not runs:
        return [markdown_table(lines), ""]
    picture = table.picture or f"{page.stem}_growth.png"
    draw(runs, page.with_name(picture))
    return [
        *(markdown_table(lines), ""),
        *(markdown_table(score_lines(runs)), "", markdown_table(fit_lines(runs)), ""),
        *(f"![Scores against steps, with curves extrapolated to ten times the steps]({picture})", ""),
        *folded(blocks),
    ]


def draw_effects(effects: Mapping[str, Mapping[str, Difference]], rows: Sequence[Row], path: Path) -> None:
    """Draw differences to the base: a dot for each seed, mean and interval for each variant, a panel for each column.

    The axes hold every interval, but end at twice the farthest dot, since dots beside a very wide interval would merge.

    Args:
        effects: differences by column and row.
        rows: variants, from top to bottom.
        path: of the picture.
    """
    from utils.pictures import Figure, save_figure

    figure = Figure(figsize=(3.2 + 2.9 * len(effects), 1.2 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for axis, (column, found) in zip(panels, effects.items(), strict=True):
        dots = ends = 0.0
        for place, row in enumerate(rows):
            effect = found.get(row.name)
            if effect is None:
                continue
            color = WITHIN if effect.within_spread else BEYOND
            axis.plot([effect.low, effect.high], [place, place], color=color, linewidth=1.2)
            axis.plot(effect.each, [place] * len(effect.each), ".", color=color, alpha=0.5, markersize=5)
            axis.plot(effect.mean, place, "D", color=color, markersize=4)
            dots = max([dots, abs(effect.mean), *map(abs, effect.each)])
            ends = max(ends, abs(effect.low), abs(effect.high))
        reach = 1.05 * min(ends, 2 * dots) or 1.0
        axis.set(xlim=(-reach, reach), title=column)
        axis.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(rows):
            if place and row.factor != rows[place - 1].factor:
                axis.axhline(place - 0.5, color="#dddddd", linewidth=0.8)
    panels[0].set_yticks(range(len(rows)), [f"{row.factor}: {row.label}" for row in rows], fontsize=8)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle("Difference to the base: seeds, mean and 95 % interval (gray: within the spread)", fontsize=10)
    save_figure(figure, path, dpi=110)


def write_page(plan: Plan, results: Path, page: Path) -> None:
    """Write the page of a plan from its records; cells without one say ``not run``.

    Raises:
        UserError: a record cannot be read, or the page cannot be written.
    """
    records = Records(plan, results)
    lines = [f"# {plan.title}", ""]
    for part in (plan.navigation, plan.intro):
        lines += [part.strip(), ""] if part else []
    for name, table in plan.tables.items():
        rows = [row for row in plan.rows if row.table == name]
        lines += [f"## {table.title}", "", table.note.strip(), ""]
        if table.effects or table.growth:
            lines += (effect_table if table.effects else growth_table)(records, table, rows, page)
        else:
            lines += score_table(records, table, rows)
    with replacing(page) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")

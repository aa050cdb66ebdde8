"""The cells as a table and a figure."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fmlightning.runs.files import atomic_write
from fmlightning.studies.report.figures import quality

ASIDE = ("_std", "_low", "_high", "_floor", "_real")
"""How scores end that stand beside others."""
NOT_DRAWN = ("path_energy", "transport_cost", "straightness", "nll_difference")
"""Scores that a figure has no panel for: of the path, or of the metric's own solver."""


def show(folder: Path, records: list[dict[str, Any]]) -> None:
    """Print the table; write it, the records and the figure."""
    folder.mkdir(exist_ok=True)
    rows = table(records)
    printed = Table(*rows[0], box=None)
    for row in rows[1:]:
        printed.add_row(*row)
    Console(width=None if os.isatty(1) else 200).print(printed)
    for name, text in {
        "table.md": markdown(rows),
        "evaluations.json": json.dumps(records, indent=2) + "\n",
    }.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    done = [r for r in records if "error" not in r]
    for record in records:
        if "error" in record:
            print(f"{record['label']}, {record['budget']}: {record['error']}")
    drawn = headline(done)
    if drawn:
        quality(done, drawn).savefig(folder / "nfe.png", dpi=130)
    print(f"written: {folder}/table.md, evaluations.json{', nfe.png' if drawn else ''}")


def names_of(records: list[dict[str, Any]]) -> list[str]:
    """The scores that a record has, without their spreads; a likelihood that was no good is not in every one."""
    names = (n for r in records for n in r["metrics"])
    return [n for n in dict.fromkeys(names) if not n.endswith(ASIDE)]


def headline(records: list[dict[str, Any]]) -> list[str]:
    """The scores to draw."""
    return [n for n in names_of(records) if n not in NOT_DRAWN]


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """A header and a row for each cell."""
    names = names_of([r for r in records if "error" not in r])
    ways = {"grid": "grid", "averaged": "ema"}  # columns of what differs
    ways = {
        name: key
        for name, key in ways.items()
        if len({r[key] for r in records if r[key] != ""}) > 1
    }
    rows = [["solver", "budget", *ways, "NFE", "w", *names, "ms/sample"]]
    for r in records:
        start = [
            r["method"],
            r["budget"],
            *(str(r[key]).removesuffix("()") for key in ways.values()),
        ]
        scale = f"{r['guidance']['scale']:g}"
        if "error" in r:
            rows.append([*start, "-", scale, *("failed" for _ in names), "-"])
            continue
        scores = [f"{r['metrics'][n]:.4g}" if n in r["metrics"] else "-" for n in names]
        rows.append([*start, str(r["nfe"]), scale, *scores, f"{1e3 * r['seconds_per_sample']:.3g}"])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Rows as a table of Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

r"""`expected.json`: what runs scored, from the runs, and whether others score alike.

For each cell and metric it holds the values of the seeds, their mean m, sample standard deviation s and number n. The
mean of r runs agrees with it where it lies within

    m ± max(t(0.995; n - 1) s √(1/n + 1/r), 0.001 |m|)                                  (1)

which r further seeds of the same method do in 99 of 100 cases; the second bound is the rounding of another machine.
One value has no spread, and is not checked.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmlightning.runs.compare import by_the_clock
from fmlightning.runs.directory import read_json
from fmlightning.studies.report.axes import called
from fmlightning.studies.report.cells import ReportCells
from fmlightning.studies.report.formats import number, with_n
from fmlightning.studies.report.intervals import Estimate
from fmlightning.studies.report.reading import FoundRuns
from fmlightning.studies.report.records import ASIDE, FINAL
from fmlightning.studies.report.table import require_fair, tabulate, twice

LEVEL, ROUNDING = 0.01, 1e-3
RULE = (
    "a mean of r runs agrees where it lies within mean +- max(t(0.995; n - 1) std sqrt(1/n + 1/r), 0.001 |mean|), "
    "the 99 % prediction interval of Student's distribution"
)


def expected(found: FoundRuns, kinds: Sequence[ReportCells], command: str) -> dict[str, Any]:
    """The content of the file."""
    content: dict[str, Any] = {
        "command": command,
        "rule": RULE,
        "runs": [described(t.run.path, t.manifest) for t in found.trained],
        "versions": found.trained[0].manifest.get("versions", {}),
        "cells": [cell for cells in kinds for cell in cells_of_kind(cells)],
    }
    if found.left_out:
        lost = found.left_out
        content["left_out"] = [{"run": str(x.path), "status": x.status, "why": x.why} for x in lost]
    return content


def described(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A run by what its manifest says."""
    git = manifest.get("git") or {}
    named = {key: manifest.get(key) for key in ("config_hash", "seed")}
    return {"run": str(path), **named, "commit": git.get("commit"), "dirty": git.get("dirty")}


def cells_of_kind(cells: ReportCells) -> Iterator[dict[str, Any]]:
    """Each row of the table with every score."""
    names = [n for n in cells.metrics if "/" not in n and not by_the_clock(n)]
    table = tabulate(cells, metrics=names)
    for key in table.keys:
        scores = {h.metric: table.seeds(key, h) for h in table.heads if table.seeds(key, h)}
        yield {
            "scores": cells.all[0].record.kind,
            "axes": dict(zip(table.rows, key, strict=True)),
            "metrics": {name: summary(seeds) for name, seeds in scores.items()},
        }


def summary(seeds: dict[int, float]) -> dict[str, Any]:
    values = [seeds[s] for s in sorted(seeds)]
    estimate = Estimate.of(values)
    spread = {"mean": estimate.mean, "std": estimate.std, "n": estimate.n}
    return {**spread, "values": values, "seeds": sorted(seeds)}


# -- comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One number beside what was expected of it."""

    cell: str
    metric: str
    here: Estimate | None
    expected: Estimate

    @property
    def margin(self) -> float | None:
        """Half width of (1), or None where no spread is known."""
        if self.here is None:
            return None
        half = self.expected.prediction(self.here.n, LEVEL)
        return None if half is None else max(half, ROUNDING * abs(self.expected.mean))

    @property
    def verdict(self) -> str:
        if self.here is None:
            return "missing"
        if self.margin is None:
            return "no spread known"
        # nan agrees with nan: a score that cannot be computed still cannot
        if math.isnan(self.here.mean) and math.isnan(self.expected.mean):
            return "within"
        return "within" if abs(self.here.mean - self.expected.mean) <= self.margin else "outside"

    @property
    def failed(self) -> bool:
        return self.verdict in ("missing", "outside")

    def words(self) -> list[str]:
        margin = "" if self.margin is None else f"± {number(self.margin, self.margin)}"
        here = "-" if self.here is None else with_n(self.here)
        return [self.cell, self.metric, here, with_n(self.expected), margin, self.verdict]


def read_expected(path: Path, option: str) -> list[dict[str, Any]]:
    """The cells in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")
    try:
        content = read_json(path)
        if "cells" not in content:  # a file of one cell
            content = {"cells": [{"scores": FINAL, "axes": {}, "metrics": content["metrics"]}]}
        for cell in content["cells"]:
            for row in cell["metrics"].values():
                _ = cell["scores"], dict(cell["axes"]), row["mean"], row["std"], row["n"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{option} {path}: not what fmlightning report --write_expected writes ({error})"
        ) from error
    return content["cells"]


def checks(expectations: Sequence[dict[str, Any]], kinds: Sequence[ReportCells]) -> list[Check]:
    """Every expected score beside that of the runs.

    Raises:
        ValueError: the runs differ in more than the expected cells do.
    """
    found: list[Check] = []
    by_kind = {cells.all[0].record.kind: cells for cells in kinds}
    for cell in expectations:
        cells = by_kind.get(cell["scores"])
        if cells:
            require_fair(cells, list(cell["axes"]))
        scores = matching(cells, cell["axes"]) if cells else {}
        name = ", ".join(f"{a}={called(v)}" for a, v in cell["axes"].items()) or cell["scores"]
        for metric, row in cell["metrics"].items():
            if not (metric.endswith(ASIDE) or by_the_clock(metric)):
                here = scores.get(metric)
                mine = Estimate.of(list(here.values())) if here else None
                found.append(Check(name, metric, mine, Estimate(row["mean"], row["std"], row["n"])))
    return found


def matching(cells: ReportCells, axes: dict[str, Any]) -> dict[str, dict[int, float]]:
    """The scores by metric and seed of the cells at some values."""
    scores: dict[str, dict[int, float]] = {}
    first: dict[int, Any] = {}
    for cell in cells.all:
        if all(json.dumps(cell.values.get(a)) == json.dumps(v) for a, v in axes.items()):
            if first.setdefault(cell.seed, cell) is not cell:
                raise ValueError(twice(first[cell.seed], cell))
            for name, value in cell.metrics.items():
                scores.setdefault(name, {})[cell.seed] = value
    return scores

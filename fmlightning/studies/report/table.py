"""Cells into a table of means over seeds, and into paired differences.

Rows and columns are values of axes. An axis on neither side has to have one value in all cells: a comparison across
two would be confounded, and is refused with the names of what differs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fmlightning.studies.report.axes import ABSENT, Value, called
from fmlightning.studies.report.cells import Key, ReportCell, ReportCells, headline
from fmlightning.studies.report.intervals import LEVEL, Estimate, holm

Seeds = dict[int, float]
"""A score for each seed."""

Better = Literal["higher", "lower", "neither", "unknown"]
"""Which scores of a metric are better; of one for which neither is, a table says what a method does, not how well."""

KNOWN: dict[str, Better] = {
    **dict.fromkeys(
        ("accuracy", "precision", "recall", "density", "coverage", "inception_score", "classifier_score",
         "log_prob", "log_likelihood"),
        "higher",
    ),
    **dict.fromkeys(
        ("w2", "energy", "npe", "frechet", "fid", "sfid", "kid", "nll", "kl", "bits_per_dimension", "solver_error",
         "loss", "seconds_per_sample"),
        "lower",
    ),
    **dict.fromkeys(("nfe", "path_energy", "transport_cost", "straightness", "lr"), "neither"),
}  # fmt: skip
"""By the beginning of a metric's name, for records that do not declare `higher_is_better`."""


def better(cells: ReportCells, metric: str) -> Better:
    """Which way a metric is better: by the records, or else by its name; unknown where neither says, or they differ."""
    declared = {
        c.record.higher_is_better[metric] for c in cells.all if metric in c.record.higher_is_better
    }
    if len(declared) > 1:
        return "unknown"
    if declared:
        words: dict[bool | None, Better] = {True: "higher", False: "lower", None: "neither"}
        return words[declared.pop()]
    name = metric.rpartition("/")[2]  # val/loss
    found = [known for known in KNOWN if re.match(rf"{known}(?![a-z0-9])", name)]
    return KNOWN[max(found, key=len)] if found else "unknown"


@dataclass(frozen=True)
class Column:
    """A metric, at some values of the axes that are columns."""

    at: Key
    metric: str
    better: Better = "lower"

    @property
    def ranked(self) -> bool:
        """True where it is known which of two scores is better."""
        return self.better in ("higher", "lower")


@dataclass(frozen=True)
class Table:
    """Scores by row and column.

    Attributes:
        rows: the axes that are rows.
        columns: the axes that are columns.
        keys: the rows, in order.
        heads: the columns, in order.
        scores: of each row and column by seed.
        blocks: rows of equal data, by row: only these are held against each other.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    keys: list[Key]
    heads: list[Column]
    scores: Mapping[tuple[Key, Column], Seeds]

    def seeds(self, key: Key, head: Column) -> Seeds:
        return self.scores.get((key, head), {})

    def estimate(self, key: Key, head: Column) -> Estimate | None:
        found = self.seeds(key, head)
        return Estimate.of(list(found.values())) if found else None

    def count(self, key: Key) -> int:
        """The seeds that a row rests on at most."""
        return max((len(self.seeds(key, head)) for head in self.heads), default=0)

    def named(self, key: Key) -> str:
        """A row in words."""
        pairs = zip(self.rows, key, strict=True)
        return ", ".join(f"{axis}={called(v)}" for axis, v in pairs) or "all runs"

    def block(self, key: Key) -> Key:
        """The data of a row: a score on one data set is no better than a score on another."""
        data = [k for k, axis in enumerate(self.rows) if axis.split(".")[0] == "data"]
        return tuple(key[k] for k in data)

    @property
    def best(self) -> set[tuple[Key, Column]]:
        """The best row of each column, where its paired differences from every other row say so.

        They do where all of them exclude 0 after Holm's correction.
        """
        found = set()
        for head in (h for h in self.heads if h.ranked):
            for block in dict.fromkeys(map(self.block, self.keys)):
                keys = [k for k in self.keys if self.block(k) == block and self.seeds(k, head)]
                if len(keys) > 1 and (key := winner(self, keys, head)) is not None:
                    found.add((key, head))
        return found


def winner(table: Table, keys: Sequence[Key], head: Column) -> Key | None:
    """The best of some rows, if it differs from all others."""
    sign = -1 if head.better == "higher" else 1
    best = min(keys, key=lambda k: sign * Estimate.of(list(table.seeds(k, head).values())).mean)
    mine = table.seeds(best, head)
    tests = [paired(mine, table.seeds(k, head)) for k in keys if k != best]
    apart = all(t is not None and sign * t.mean < 0 for t in tests)
    return best if apart and max(holm([t.p for t in tests if t])) < LEVEL else None


def paired(mine: Seeds, others: Seeds) -> Estimate | None:
    """Mine less the others', over the seeds that both have; None where they share none."""
    shared = sorted(mine.keys() & others.keys())
    return Estimate.of([mine[s] - others[s] for s in shared]) if shared else None


def tabulate(
    cells: ReportCells,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
) -> Table:
    """A table; by default each axis that differs is a row axis, and each score a column.

    Raises:
        ValueError: an axis or a metric is not there, cells differ in more than the axes, or a seed is there twice.
    """
    across = tuple(cells.axis(name, "--columns") for name in columns)
    if rows is None:
        down = tuple(axis for axis in cells.axes if axis not in across)
    else:
        down = tuple(cells.axis(name, "--rows") for name in rows)
    require_fair(cells, (*down, *across))
    names = [cells.metric(m) for m in metrics] if metrics else headline(cells)
    if not names:
        raise Unscored(
            f"{cells.all[0].trained.run.path} has no scores in evaluation.json: it was trained without metrics; "
            "name a column of metrics.csv with --metric, such as val/loss"
        )
    directions = {name: better(cells, name) for name in names}
    heads = [Column(at, name, directions[name]) for at in cells.keys(across) for name in names]
    return Table(down, across, cells.keys(down), heads, by_seed(cells.all, down, across, heads))


class Unscored(ValueError):
    """No run has a score of the kind."""


def require_fair(cells: ReportCells, axes: Sequence[str]) -> None:
    """Refuse a comparison of cells that differ in more than its axes.

    Raises:
        ValueError: naming what else differs.
    """
    left = [axis for axis in (*cells.confounders, *cells.axes) if axis not in axes]
    if left:
        named = "; ".join(f"{a} ({values_of(cells, a)})" for a in left[:6])
        compared = ", ".join(axes) or "the seed"
        raise ValueError(
            f"the runs differ in more than {compared}, so a comparison would be confounded: they differ in {named} "
            "too. Take these up in --rows or --columns, or choose one with --where"
        )


def values_of(cells: ReportCells, axis: str) -> str:
    return ", ".join(called(v) for v in cells.along(axis)[:6])


def by_seed(
    cells: Iterable[ReportCell],
    rows: Sequence[str],
    columns: Sequence[str],
    heads: Sequence[Column],
) -> dict[tuple[Key, Column], Seeds]:
    """The scores of each entry.

    Raises:
        ValueError: two cells of an entry have the same seed.
    """
    at: dict[Key, list[Column]] = {}
    for head in heads:
        at.setdefault(head.at, []).append(head)
    scores: dict[tuple[Key, Column], Seeds] = {}
    first: dict[tuple[Key, Key, int], ReportCell] = {}
    for cell in cells:
        key, place = cell.key(rows), cell.key(columns)
        other = first.setdefault((key, place, cell.seed), cell)
        if other is not cell:
            raise ValueError(twice(other, cell))
        for head in at[place]:
            if head.metric in cell.metrics:
                scores.setdefault((key, head), {})[cell.seed] = cell.metrics[head.metric]
    return scores


def twice(one: ReportCell, other: ReportCell) -> str:
    """The reason why two cells cannot both count."""
    a, b = one.trained.run.path, other.trained.run.path
    where = f"{a} and {b}" if a != b else f"{a}/evaluations"
    return (
        f"seed {one.seed} is there more than once: {where} differ in nothing that changes the result, and one seed "
        "counts once. Name each run once"
    )


def confounded(cells: ReportCells, axes: Sequence[str]) -> list[str]:
    """Notes on options that never change alone, so that nothing tells which of them made a difference."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for axis in axes:
        first: dict[Value, int] = {}
        for k, cell in enumerate(cells.all):
            first.setdefault(cell.values.get(axis, ABSENT), k)
        if (
            len(first) > 1
        ):  # each cell by the first that has its value: two axes that part them alike
            pattern = tuple(first[cell.values.get(axis, ABSENT)] for cell in cells.all)
            groups.setdefault(pattern, []).append(axis)
    return [
        f"{', '.join(group)} change together: no row tells them apart, so a difference is confounded"
        for group in groups.values()
        if len(group) > 1
    ]


def unranked(table: Table) -> list[str]:
    """A note on the metrics of which nothing says which scores are better."""
    lost = dict.fromkeys(head.metric for head in table.heads if head.better == "unknown")
    if not lost:
        return []
    return [
        f"{', '.join(lost)}: nothing is bold, as no record declares whether higher is better, or the records differ "
        "(a metric class declares it: higher_is_better)"
    ]


def fewer(table: Table, seeds: Sequence[int]) -> list[str]:
    """Notes on rows and entries that rest on fewer seeds than others."""
    lost: dict[str, list[str]] = {}
    for key in table.keys:
        had = {head: set(table.seeds(key, head)) for head in table.heads}
        most = set().union(*had.values())
        if most != set(seeds):
            lost.setdefault(without(most, seeds), []).append(table.named(key))
        for head, some in had.items():
            if some and some != most:
                at = f"{head.metric} of {table.named(key)}"
                lost.setdefault(without(some, seeds), []).append(at)
    return [f"{listed(cells)}: {words}" for words, cells in lost.items()]


def without(some: Iterable[int], seeds: Sequence[int]) -> str:
    there = set(some)
    missing = ", ".join(str(s) for s in seeds if s not in there)
    return f"only {len(there)} of {len(seeds)} seeds, without {missing}"


def listed(names: Sequence[str], shown: int = 3) -> str:
    more = f"; and {len(names) - shown} more" if len(names) > shown else ""
    return "; ".join(names[:shown]) + more


# -- against a baseline ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A row less its baseline, over the seeds that both have.

    Attributes:
        estimate: mean and spread of the differences.
        p: by Holm's correction over the rows of the column.
    """

    estimate: Estimate
    p: float


def differences(
    table: Table, baseline: Mapping[str, Value]
) -> tuple[dict[tuple[Key, Column], Difference], list[str]]:
    """Each row against that which has the baseline's values and is like it in all else; and what has none."""
    partner = {key: swapped(table.rows, key, baseline) for key in table.keys}
    others = [key for key in table.keys if partner[key] != key]
    found: dict[tuple[Key, Column], Difference] = {}
    for head in (h for h in table.heads if h.better != "neither"):
        pairs = {k: paired(table.seeds(k, head), table.seeds(partner[k], head)) for k in others}
        there = {k: e for k, e in pairs.items() if e}
        tested = [k for k, e in there.items() if e.n > 1]  # one seed is no test, and costs none
        corrected = dict(zip(tested, holm([there[k].p for k in tested]), strict=True))
        for key, estimate in there.items():
            found[key, head] = Difference(estimate, corrected.get(key, 1.0))
    alone = [key for key in others if not any((key, head) in found for head in table.heads)]
    return found, [unpaired(table, key, partner[key]) for key in alone]


def swapped(rows: Sequence[str], key: Key, baseline: Mapping[str, Value]) -> Key:
    return tuple(baseline.get(axis, v) for axis, v in zip(rows, key, strict=True))


def unpaired(table: Table, key: Key, partner: Key) -> str:
    if partner in table.keys:
        lost = f"{table.named(key)} shares no seed with its baseline {table.named(partner)}"
        mine, others = (
            {h.at: set(table.seeds(k, h)) for h in table.heads if table.seeds(k, h)}
            for k in (key, partner)
        )
        if mine.keys() & others.keys():
            return lost
        at = [", ".join(dict.fromkeys(at_columns(table, a) for a in x)) for x in (mine, others)]
        return (
            f"{table.named(key)} and its baseline {table.named(partner)} have no column in common: the one has scores "
            f"at {at[0] or 'none'}, the other at {at[1] or 'none'}"
        )
    return f"{table.named(key)} has no baseline: there is no row {table.named(partner)}, so others differ in more"


def at_columns(table: Table, at: Key) -> str:
    pairs = zip(table.columns, at, strict=True)
    return ", ".join(f"{axis}={called(v)}" for axis, v in pairs) or "its own scores"

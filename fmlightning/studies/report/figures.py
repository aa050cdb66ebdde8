"""Curves over seeds: quality against NFE, and training. A line is a mean, a band its 95 % interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmlightning.runs.metrics_csv import read_columns
from fmlightning.studies.report.axes import Value, called
from fmlightning.studies.report.cells import Cell, Cells, Key
from fmlightning.studies.report.intervals import Estimate
from fmlightning.studies.report.records import ADAPTIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#00798c", "#d1495b", "#edae49", "#30638e", "#6a994e", "#8e5572", "#7a7a7a", "#b5651d", "#2a9d8f", "#5f0f40",
)  # fmt: skip
MARKERS = "os^Dv<>pX*"
REAL = "#444444"
WIDTH, HEIGHT = 4.0, 3.3
PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Curve:
    """Points with an estimate each, in order of x."""

    points: list[tuple[float, Estimate]]

    @classmethod
    def of(cls, values: Mapping[float, Sequence[float]]) -> "Curve":
        finite = {x: [y for y in ys if math.isfinite(y)] for x, ys in sorted(values.items())}
        return cls([(x, Estimate.of(ys)) for x, ys in finite.items() if ys])

    def draw(self, axis: "Axes", look: dict[str, Any]) -> None:
        if not self.points:
            return
        x = [x for x, _ in self.points]
        mean = [e.mean for _, e in self.points]
        half = [e.half_width or 0.0 for _, e in self.points]
        axis.plot(x, mean, linewidth=1.4, markersize=4, **look)
        low = [m - h for m, h in zip(mean, half, strict=True)]
        high = [m + h for m, h in zip(mean, half, strict=True)]
        if not any(half):
            return
        if len(x) > 1:
            axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
        else:
            axis.vlines(x, low, high, color=look["color"], linewidth=1.2)


def against_nfe(cells: Cells, metric: str) -> "Figure | None":
    """A score against the evaluations it cost, or None where all cost the same.

    A curve for each value of the first axis that differs, a panel for each of the others.
    """
    costs = {cell.metrics.get("nfe") for cell in cells.all if metric in cell.metrics}
    if len(costs - {None}) < 2:
        return None
    axes = [a for a in cells.axes if a not in ("nfe", "budget")]
    lines, panels = axes[:1], axes[1:]
    keys = panel_keys(cells, panels)
    across = len(cells.along(panels[-1])) if panels else 1
    figure, places = grid(keys, across if 1 < across <= 4 else PANELS_IN_A_ROW, shared=True)
    for key, axis in places.items():
        inside = [c for c in cells.all if c.key(panels) == key and metric in c.metrics]
        for line in cells.keys(lines):
            mine = [c for c in inside if c.key(lines) == line]
            style = look(cells, lines, line)
            for curve in curves_of(mine, metric):
                curve.draw(axis, style)
        real_samples(axis, inside, metric)
        axis.set(xlabel="NFE", ylabel=metric, xscale="log", title=named(panels, key))
        axis.label_outer()
    ticks(axis, cells.all)
    logarithmic(axis, metric, cells.all)
    legend(figure, list(places.values()))
    return figure


def panel_keys(cells: Cells, axes: Sequence[str]) -> list[Key]:
    return cells.keys(axes) if axes else [()]


def curves_of(cells: Sequence[Cell], metric: str) -> list[Curve]:
    """Budgets joined to a line; an adaptive solver's points on a line of their own."""
    groups: dict[bool, dict[Value, list[Cell]]] = {}
    for cell in cells:
        adaptive = cell.values.get("solver") in ADAPTIVE
        groups.setdefault(adaptive, {}).setdefault(cell.values.get("nfe"), []).append(cell)
    return [
        Curve.of({mean_nfe(same): [c.metrics[metric] for c in same] for same in group.values()})
        for group in groups.values()
    ]


def mean_nfe(cells: Sequence[Cell]) -> float:
    return math.fsum(c.metrics["nfe"] for c in cells) / len(cells)


def real_samples(axis: "Axes", cells: Sequence[Cell], metric: str) -> None:
    """What held-out real samples score, as a dashed line."""
    for name in references(metric):
        found = [c.metrics[name] for c in cells if name in c.metrics]
        if found:
            level = Estimate.of(found).mean
            axis.axhline(level, color=REAL, linestyle="--", linewidth=1, label="real samples")


def references(metric: str) -> tuple[str, str]:
    """The scores of real samples that stand beside a metric."""
    return f"{metric}_real", f"{metric}_floor"


def ticks(axis: "Axes", cells: Sequence[Cell]) -> None:
    """Name the budgets, where they are few, and what adaptive solvers took."""
    fixed = [c for c in cells if c.values.get("solver") not in ADAPTIVE]
    costs = sorted({round(c.metrics["nfe"]) for c in fixed if "nfe" in c.metrics})
    others = [c.metrics["nfe"] for c in cells if c not in fixed and "nfe" in c.metrics]
    middle = round(statistics.median(others)) if others else 0
    shown: list[int] = []
    for n in sorted([*costs, middle] if middle else costs):
        if not shown or n >= 1.25 * shown[-1]:  # else labels overlap: paths may differ by one
            shown.append(n)
    if len(shown) <= 8:
        axis.set_xticks(shown, [str(n) for n in shown])
        axis.minorticks_off()


def logarithmic(axis: "Axes", metric: str, cells: Sequence[Cell]) -> None:
    """A logarithmic axis where positive scores span more than a factor of ten."""
    shown = (metric, *references(metric))
    scores = [y for c in cells for k in shown if math.isfinite(y := c.metrics.get(k, math.nan))]
    if scores and min(scores) > 0 and max(scores) > 10 * min(scores):
        low, high = min(scores) / 1.6, max(scores) * 1.6
        axis.set(yscale="log", ylim=(low, high))  # a band that reaches 0 would hide the rest


def training(cells: Cells, columns: Sequence[str]) -> "Figure | None":
    """Columns of metrics.csv against the step: a panel for each, a curve for each row of the table."""
    runs = {c.trained.run.path: c for c in cells.all}
    read = {path: read_columns(path / "metrics.csv") for path in runs}
    there = [name for name in columns if any(len(r.get(name, [])) > 1 for r in read.values())]
    if not there:
        return None
    axes = [a for a in cells.axes if a not in cells.all[0].record.options]
    figure, places = grid([(name,) for name in there])
    for (name,), axis in places.items():
        shown: list[float] = []
        for line in panel_keys(cells, axes):
            values: dict[float, list[float]] = {}
            for path, cell in runs.items():
                if cell.key(axes) == line:
                    for step, y in read[path].get(str(name), []):
                        values.setdefault(step, []).append(y)
            curve = Curve.of(values)
            curve.draw(axis, look(cells, axes, line) | {"marker": ""})
            shown += [e.mean for _, e in curve.points]
        axis.set(xlabel="step", title=name)
        if shown and min(shown) > 0 and max(shown) > 10 * min(shown):
            axis.set(yscale="log", ylim=(min(shown) / 1.3, max(shown) * 1.3))
    legend(figure, list(places.values()))
    return figure


# -- the frame ------------------------------------------------------------------------------------


def grid(
    keys: Sequence[Key], across: int = PANELS_IN_A_ROW, shared: bool = False
) -> "tuple[Figure, dict[Key, Axes]]":
    """Small multiples, on the same scales where they are shared."""
    from matplotlib.figure import Figure

    across = min(across, len(keys))
    down = -(-len(keys) // across)
    figure = Figure(figsize=(WIDTH * across + 0.4, HEIGHT * down + 0.5), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharex=shared, sharey=shared).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(10)
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    return figure, dict(zip(keys, axes, strict=False))


def look(cells: Cells, axes: Sequence[str], key: Key) -> dict[str, Any]:
    """Colour, marker and name of a curve: the same in every panel."""
    place = cells.keys(axes).index(key) if axes else 0
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": ("-", "--", ":", "-.")[place // len(COLOURS) % 4],
        "label": named(axes, key) or None,
    }


def named(axes: Sequence[str], key: Key) -> str:
    """Values in words."""
    return ", ".join(word(axis, v) for axis, v in zip(axes, key, strict=True))


def word(axis: str, v: Value) -> str:
    """A value, with its axis where it is no name itself."""
    name = isinstance(v, str) and v[:1].isalpha()
    return str(v) if name else f"{axis.split('.')[-1]} = {called(v)}"


def legend(figure: "Figure", axes: "Sequence[Axes]") -> None:
    """One for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    if found:
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 4),
            fontsize=8, frameon=False,
        )  # fmt: skip

"""Curves over seeds: quality against NFE, and training.

An adaptive solver has no budget, and what it takes would stretch an axis of budgets until these cannot be told apart.
So it is one open marker beyond them, at its tightest tolerance, with the number of evaluations that it took.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmlightning.metrics.style import REAL, in_words, looks
from fmlightning.runs.metrics_csv import read_columns
from fmlightning.studies.report.axes import Value, called
from fmlightning.studies.report.cells import Key, ReportCell, ReportCells
from fmlightning.studies.report.intervals import Estimate
from fmlightning.studies.report.records import ADAPTIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Look = dict[str, Any]

WIDTH, HEIGHT = 3.6, 3.2
PANELS_IN_A_ROW = 3
MOST_TICKS = 8
BARS = 12
"""Intervals at most along a training curve, where they are bars."""
REAL_SAMPLES = "real samples"
BEYOND = 1.9
"""The factor by which the marker of an adaptive solver stands beyond the largest budget, or beyond another such."""


@dataclass(frozen=True)
class Curve:
    """Points with an estimate each, in order of x.

    Attributes:
        label: its name.
        adaptive: the adaptive solver that it is of, or ''.
    """

    label: str
    points: list[tuple[float, Estimate]]
    adaptive: str = ""

    @classmethod
    def of(cls, label: str, values: Mapping[float, Sequence[float]], adaptive: str = "") -> "Curve":
        finite = {x: [y for y in ys if math.isfinite(y)] for x, ys in sorted(values.items())}
        return cls(label, [(x, Estimate.of(ys)) for x, ys in finite.items() if ys], adaptive)


@dataclass(frozen=True)
class Panel:
    """Curves of one metric, and what real samples score."""

    title: str
    metric: str
    curves: list[Curve]
    real: float | None = None


# -- quality against NFE --------------------------------------------------------------------------


def against_nfe(cells: ReportCells, metric: str) -> "Figure | None":
    """A score against the evaluations it cost, or None where all cost the same.

    A curve for each value of the first axis that differs, a panel for each of the others.
    """
    costs = {cell.metrics.get("nfe") for cell in cells.all if metric in cell.metrics}
    if len(costs - {None}) < 2:
        return None
    axes = [a for a in cells.axes if a not in ("nfe", "budget")]
    lines, across = axes[:1], axes[1:]
    there = [c for c in cells.all if metric in c.metrics and "nfe" in c.metrics]
    own = panel_keys(cells, across, there)
    panels = []
    for key in own:
        # an adaptive solver stands in the panels of the others, which are like its own in all else
        rest = [(a, v) for a, v in zip(across, key, strict=True) if a != "solver"]
        inside = [c for c in there if c.key(across) == key or (is_adaptive(c) and key_of(c, rest))]
        found = [curve for line in cells.keys(lines) for curve in curves_of(inside, lines, line, metric)]  # fmt: skip
        real = real_score([c.metrics for c in inside], metric)
        panels.append(Panel(named(across, key), metric, found, real))
    columns = len({key[-1] for key in own}) if across else 1
    return nfe_figure(panels, columns if 1 < columns <= 4 else PANELS_IN_A_ROW, shared=True)


def quality(records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> "Figure":
    """Scores of one model against the number of evaluations: a panel for each, a curve for each label.

    Args:
        records: with `label`, `method`, `nfe` and `metrics`, where a score may be missing.
        metrics: the scores to draw.
    """
    panels = []
    for name in metrics:
        found = []
        for label in dict.fromkeys(r["label"] for r in records):
            mine = [r for r in records if r["label"] == label]
            values = {float(r["nfe"]): [r["metrics"][name]] for r in mine if name in r["metrics"]}
            method = str(mine[0].get("method", ""))
            found.append(Curve.of(label, values, method if method in ADAPTIVE else ""))
        panels.append(Panel("", name, found, real_score([r["metrics"] for r in records], name)))
    return nfe_figure(panels, len(panels), shared=False)


def is_adaptive(cell: ReportCell) -> bool:
    return cell.values.get("solver") in ADAPTIVE


def key_of(cell: ReportCell, values: Sequence[tuple[str, Value]]) -> bool:
    return all(cell.key([axis]) == (value,) for axis, value in values)


def panel_keys(cells: ReportCells, axes: Sequence[str], there: Sequence[ReportCell]) -> list[Key]:
    """The panels; none for an adaptive solver alone, where there are others."""
    keys: list[Key] = cells.keys(axes) if axes else [()]
    budgets = [k for k in keys if any(c.key(axes) == k and not is_adaptive(c) for c in there)]
    return budgets or keys


def curves_of(
    cells: Sequence[ReportCell], axes: Sequence[str], line: Key, metric: str
) -> Iterator[Curve]:
    """The budgets of a line, and each adaptive solver by itself."""
    groups: dict[str, dict[Value, list[ReportCell]]] = {}
    for cell in (c for c in cells if c.key(axes) == line):
        adaptive = str(cell.values["solver"]) if is_adaptive(cell) else ""
        groups.setdefault(adaptive, {}).setdefault(cell.values.get("nfe"), []).append(cell)
    for adaptive, group in sorted(groups.items()):  # budgets first
        values = {
            math.fsum(c.metrics["nfe"] for c in same) / len(same): [c.metrics[metric] for c in same]
            for same in group.values()
        }
        yield Curve.of(named(axes, line), values, adaptive)


def real_score(scores: Sequence[Mapping[str, float]], metric: str) -> float | None:
    """The score of held-out real samples that stands beside a metric."""
    for name in (f"{metric}_real", f"{metric}_floor"):
        if found := [s[name] for s in scores if name in s]:
            return Estimate.of(found).mean
    return None


def nfe_figure(panels: Sequence[Panel], across: int, shared: bool) -> "Figure":
    """Panels of curves against the number of evaluations.

    Args:
        panels: the panels.
        across: how many stand beside each other.
        shared: whether they are of one metric, on the same scales.
    """
    figure, places = grid(len(panels), across, shared)
    every = [curve for panel in panels for curve in panel.curves]
    labels = list(dict.fromkeys(curve.label for curve in every))
    style = dict(zip(labels, looks(labels), strict=True))
    slots = slots_of(every)
    for panel, axis in zip(panels, places, strict=True):
        for curve in panel.curves:
            if curve.adaptive in slots:
                draw_marker(axis, curve, style[curve.label], slots[curve.adaptive])
            else:
                draw_bars(axis, curve, style[curve.label], 1.02 ** centred(labels, curve.label))
        if panel.real is not None:
            axis.axhline(panel.real, color=REAL, linestyle="--", linewidth=1, label=REAL_SAMPLES)
        if slots:
            edge = min(slot.x for slot in slots.values()) / math.sqrt(BEYOND)
            axis.axvline(edge, color="0.85", linewidth=1)
        axis.set_xscale("log")
        axis.set(xlabel="NFE", ylabel=in_words(panel.metric))
        axis.set_title(panel.title, fontsize=10)
        ticks(axis, every, slots)
        logarithmic(axis, panels if shared else [panel])
        if shared:
            axis.label_outer()
    legend(figure, places)
    return figure


@dataclass(frozen=True)
class Slot:
    """Place of an adaptive solver's markers, beyond the budgets."""

    x: float
    tick: str
    labels: list[str]


def slots_of(every: Sequence[Curve]) -> dict[str, Slot]:
    """A slot for each adaptive solver; none where there are no budgets to stand beside."""
    budgets = [x for curve in every if not curve.adaptive for x, _ in curve.points]
    adaptive = [curve for curve in every if curve.adaptive and curve.points]
    found: dict[str, Slot] = {}
    for solver in dict.fromkeys(curve.adaptive for curve in adaptive if budgets):
        mine = [curve for curve in adaptive if curve.adaptive == solver]
        costs = [round(curve.points[-1][0]) for curve in mine]
        cost = "-".join(map(str, dict.fromkeys((min(costs), max(costs)))))
        x = max(budgets) * BEYOND ** (len(found) + 1)
        labels = list(dict.fromkeys(curve.label for curve in mine))
        found[solver] = Slot(x, f"{solver}\n({cost})", labels)
    return found


def centred(labels: Sequence[str], label: str) -> float:
    """Place of a label, from the middle: bars of the same budget stand beside each other."""
    return labels.index(label) - (len(labels) - 1) / 2


def draw_marker(axis: "Axes", curve: Curve, look: "Look", slot: Slot) -> None:
    """The point of an adaptive solver at its tightest tolerance, in its slot."""
    if curve.points:
        last = Curve(curve.label, [(slot.x, curve.points[-1][1])])
        hollow = {"markerfacecolor": "white", "linestyle": "none"}
        draw_bars(axis, last, look | hollow, 1.1 ** centred(slot.labels, curve.label))


def draw_bars(axis: "Axes", curve: Curve, look: "Look", shift: float) -> None:
    """Means with bars: a band around a symmetric interval would run into the floor of a logarithmic axis.

    Args:
        shift: a factor of x that sets the bars of curves apart, too small to read as another budget.
    """
    half = [e.half_width or 0.0 for _, e in curve.points]
    size = 8 if look["marker"] == "*" else 4.5
    axis.errorbar(
        [shift * x for x, _ in curve.points], [e.mean for _, e in curve.points],
        yerr=half if any(half) else None, linewidth=1.4, elinewidth=1.0, markersize=size, label=curve.label, **look,
    )  # fmt: skip


def ticks(axis: "Axes", every: Sequence[Curve], slots: Mapping[str, Slot]) -> None:
    """Name the budgets, where labels do not overlap, and the adaptive solvers."""
    budgets = [c for c in every if c.adaptive not in slots]
    costs = sorted({round(x) for curve in budgets for x, _ in curve.points})
    ratio = 1.26  # paths may differ by one evaluation
    while len(shown := apart(costs, ratio)) > MOST_TICKS:
        ratio *= 1.3
    axis.set_xticks(
        [*shown, *(slot.x for slot in slots.values())], [*map(str, shown), *(slot.tick for slot in slots.values())]
    )  # fmt: skip
    axis.minorticks_off()


def apart(costs: Sequence[int], ratio: float) -> list[int]:
    """Numbers that lie apart by a ratio at least."""
    shown: list[int] = []
    for n in costs:
        if not shown or n >= ratio * shown[-1]:
            shown.append(n)
    return shown


def logarithmic(axis: "Axes", panels: Sequence[Panel]) -> None:
    """A logarithmic axis where positive scores span more than a factor of ten."""
    means = [e.mean for p in panels for c in p.curves for _, e in c.points]
    log_scale(axis, [*means, *(p.real for p in panels if p.real is not None)])


def log_scale(axis: "Axes", shown: Sequence[float]) -> None:
    """Decades with plain numbers, and what lies between in few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not shown or min(shown) <= 0 or max(shown) <= 10 * min(shown):
        return
    low, high = min(shown) / 1.6, max(shown) * 1.6  # an interval that reaches 0 would hide the rest
    axis.set(yscale="log", ylim=(low, high))
    decades = math.log10(high / low)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


# -- training -------------------------------------------------------------------------------------


def training(cells: ReportCells, columns: Sequence[str]) -> "Figure | None":
    """Columns of metrics.csv against the step: a panel for each, a curve for each row of the table.

    Lines are means, with bands of their 95 % intervals.
    """
    runs = {c.trained.run.path: c for c in cells.all}
    read = {path: read_columns(path / "metrics.csv") for path in runs}
    there = [name for name in columns if any(len(r.get(name, [])) > 1 for r in read.values())]
    if not there:
        return None
    axes = [a for a in cells.axes if a not in cells.all[0].record.options]
    keys: list[Key] = cells.keys(axes) if axes else [()]
    style = looks([named(axes, key) for key in keys])
    figure, places = grid(len(there))
    for name, axis in zip(there, places, strict=False):
        found = []
        for key in keys:
            values: dict[float, list[float]] = {}
            for path in (p for p, cell in runs.items() if cell.key(axes) == key):
                for step, y in read[path].get(name, []):
                    values.setdefault(step, []).append(y)
            found.append(Curve.of(named(axes, key), values))
        axis.set(xlabel="Step", ylabel=in_words(name))
        log_scale(axis, [e.mean for curve in found for _, e in curve.points])
        for curve, look in zip(found, style, strict=True):
            draw_band(axis, curve, look | {"marker": ""})
    legend(figure, places)
    return figure


def draw_band(axis: "Axes", curve: Curve, look: "Look") -> None:
    """A line with the band of its interval; with some bars where a band would run into the floor of the axis."""
    x = [x for x, _ in curve.points]
    mean = [e.mean for _, e in curve.points]
    half = [e.half_width or 0.0 for _, e in curve.points]
    low = [m - h for m, h in zip(mean, half, strict=True)]
    high = [m + h for m, h in zip(mean, half, strict=True)]
    axis.plot(x, mean, linewidth=1.4, label=curve.label or None, **look)
    if any(half) and axis.get_yscale() == "log" and min(low) <= axis.get_ylim()[0]:
        every = -(-len(x) // BARS)
        axis.vlines(x[::every], low[::every], high[::every], color=look["color"], linewidth=1.0)
    elif any(half):
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


# -- the frame ------------------------------------------------------------------------------------


def grid(
    count: int, across: int = PANELS_IN_A_ROW, shared: bool = False
) -> "tuple[Figure, list[Axes]]":
    """Small multiples, on the same scales where they are shared."""
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(WIDTH * across + 0.4, HEIGHT * down + 0.5), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharex=shared, sharey=shared).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(which="both", labelsize=8)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def named(axes: Sequence[str], key: Key) -> str:
    """Values in words, each with its axis where it is no name itself."""
    words = (
        str(v) if isinstance(v, str) and v[:1].isalpha() else f"{axis.split('.')[-1]} = {called(v)}"
        for axis, v in zip(axes, key, strict=True)
    )
    return ", ".join(words)


def legend(figure: "Figure", axes: "Sequence[Axes]") -> None:
    """One for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)  # a curve before the open marker of an adaptive solver
    found.pop("", None)
    found |= {name: found.pop(name) for name in [REAL_SAMPLES] if name in found}  # at the end
    if found:
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 4),
            fontsize=8, frameon=False,
        )  # fmt: skip

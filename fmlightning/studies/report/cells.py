"""All scores at hand, by the axes they lie on: choosing some, and naming in what they differ.

A cell is one run under one evaluation. Cells that differ in their seed alone are averaged. What else differs is an
axis; one that a comparison leaves out confounds it, and is named instead of being averaged over.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fmlightning.cli.argparser import choices
from fmlightning.studies.report.axes import ABSENT, Labels, Options, Value, called, differing, same
from fmlightning.studies.report.reading import FoundRuns, Trained
from fmlightning.studies.report.records import ASIDE, EVALUATIONS, ScoreRecord

Key = tuple[Value, ...]


@dataclass(frozen=True)
class ReportCell:
    """One run under one evaluation, with the values of all axes."""

    trained: Trained
    record: ScoreRecord
    values: Options = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.trained.seed

    @property
    def metrics(self) -> dict[str, float]:
        return self.record.metrics

    def key(self, axes: Iterable[str]) -> Key:
        return tuple(self.values.get(axis, ABSENT) for axis in axes)


@dataclass(frozen=True)
class ReportCells:
    """Cells of one kind.

    Attributes:
        all: the cells.
        axes: what they differ in, training first.
        confounders: training options that differ where all axes of a sweep are the same.
        order: values of axes, as they are to be listed.
    """

    all: tuple[ReportCell, ...]
    axes: tuple[str, ...]
    confounders: tuple[str, ...]
    order: Mapping[str, Sequence[Value]]

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell in self.all})

    @property
    def metrics(self) -> list[str]:
        """Every metric that some cell has."""
        return list(dict.fromkeys(name for cell in self.all for name in cell.metrics))

    @property
    def known(self) -> list[str]:
        """Every axis that can be named."""
        return list(dict.fromkeys(name for cell in self.all for name in cell.values))

    def axis(self, name: str, option: str) -> str:
        """An axis by its name, or by the end of it where that is enough.

        Raises:
            ValueError: no run has it.
        """
        ends = [known for known in self.known if known.endswith(f".{name}")]
        if name in self.known:
            return name
        if len(ends) == 1:
            return ends[0]
        # those that differ are what is most likely meant
        known = list(dict.fromkeys((*self.axes, *self.known)))
        raise ValueError(f"{option} {name}: no run has such an axis; {choices(name, known)}")

    def metric(self, name: str) -> str:
        """A metric by its name.

        Raises:
            ValueError: no run has it.
        """
        if name not in self.metrics:
            raise ValueError(
                f"--metric {name}: no run has such a metric; {choices(name, self.metrics)}"
            )
        return name

    def along(self, axis: str) -> list[Value]:
        """The values on an axis, in their order."""
        seen = list(dict.fromkeys(cell.values.get(axis, ABSENT) for cell in self.all))
        planned = list(self.order.get(axis, ()))
        place = {v: k for k, v in enumerate(v for v in planned if v in seen)}
        return sorted(seen, key=lambda v: (place.get(v, len(place)), *natural(v)))

    def keys(self, axes: Sequence[str]) -> list[Key]:
        """The combinations on some axes that there are, in order."""
        places = {axis: self.along(axis) for axis in axes}
        seen = dict.fromkeys(cell.key(axes) for cell in self.all)
        return sorted(
            seen, key=lambda key: [places[a].index(v) for a, v in zip(axes, key, strict=True)]
        )


def natural(v: Value) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    number = isinstance(v, int | float)
    return (not number, float(v) if number else 0.0, str(v))  # type: ignore[arg-type]


def cells_of(found: FoundRuns, kind: str, where: Mapping[str, Sequence[str]]) -> ReportCells | None:
    """The cells of a kind at the given values of axes, or None where there are none of the kind.

    Raises:
        ValueError: an axis or a value is not there.
    """
    bare = [ReportCell(t, r) for t in found.trained for r in t.records if r.kind == kind]
    if not bare:
        return None
    cells = with_axes(bare, found)
    kept = list(cells.all)
    for name, wanted in where.items():
        axis = cells.axis(name, "--where")
        for text in wanted:
            if not any(same(text, v) for v in cells.along(axis)):
                known = [called(v) for v in cells.along(axis)]
                raise ValueError(f"--where {name}={text}: no run has it; {choices(text, known)}")
        kept = [c for c in kept if any(same(text, c.values.get(axis, ABSENT)) for text in wanted)]
    if not kept:
        chosen = ", ".join(f"{name}={','.join(wanted)}" for name, wanted in where.items())
        raise ValueError(f"--where {chosen}: no run has all of these at once")
    return with_axes(kept, found) if where else cells


def with_axes(bare: Sequence[ReportCell], found: FoundRuns) -> ReportCells:
    """Cells with the values of all axes."""
    training = list({id(c.trained): c.trained.options for c in bare}.values())
    evaluation = [c.record.options for c in bare]
    odd, ways = differing(training), differing(evaluation)
    plan = [a for a in found.axes if len({planned_value(c, a) for c in bare}) > 1]
    named = {axis: Labels.of(axis, training) for axis in odd}
    named |= {axis: Labels.of(axis, evaluation) for axis in ways}
    cells = tuple(ReportCell(c.trained, c.record, values(c, named, found.axes)) for c in bare)
    if not found.axes:
        return ReportCells(cells, (*odd, *ways), (), {})
    confounders = inside(cells, list(found.axes))
    # what differs between two sweeps and is no axis of them is a row of its own, as it is between runs
    besides = [name for name in unnamed(found, odd) if name not in confounders]
    return ReportCells(cells, (*plan, *besides, *ways), tuple(confounders), found.axes)


def values(cell: ReportCell, named: Mapping[str, Labels], plan: Iterable[str]) -> Options:
    """The values of every axis of a cell; those that differ by the labels that tell them apart."""
    trained, record = cell.trained, cell.record
    found = trained.options | record.extra | record.options
    for axis, labels in named.items():
        found[axis] = labels(record.options if has(record.options, axis) else trained.options)
    return found | {axis: planned_value(cell, axis) for axis in plan}


def has(options: Options, axis: str) -> bool:
    return axis in options or any(name.startswith(f"{axis}.") for name in options)


def planned_value(cell: ReportCell, axis: str) -> Value:
    return cell.trained.planned.get(axis, cell.trained.options.get(axis, ABSENT))


def inside(cells: Sequence[ReportCell], axes: Sequence[str]) -> list[str]:
    """Training options that differ between cells at the same place of a plan."""
    groups: dict[Key, dict[int, Options]] = {}
    for cell in cells:
        groups.setdefault(cell.key(axes), {})[id(cell.trained)] = cell.trained.options
    some = (differing(list(group.values())) for group in groups.values())
    return list(dict.fromkeys(name for names in some for name in names))


def unnamed(found: FoundRuns, odd: Sequence[str]) -> list[str]:
    """Training options that differ, and that no axis of a plan sets."""
    known = {*found.axes, *found.varied}
    return [name for name in odd if not any(covers(axis, name) for axis in known)]


def covers(axis: str, option: str) -> bool:
    return option == axis or option.startswith(f"{axis}.")


def headline(cells: ReportCells) -> list[str]:
    """The metrics that are shown where none is named: scores, and not what stands beside them or is an axis."""
    known = [n for n in cells.metrics if not n.endswith(ASIDE) and "/" not in n]
    cost = {"seconds_per_sample"} if cells.all[0].record.kind == EVALUATIONS else set()
    if "nfe" in cells.axes and not any(isinstance(v, str) for v in cells.along("nfe")):
        cost.add("nfe")
    return [n for n in known if n not in cost]

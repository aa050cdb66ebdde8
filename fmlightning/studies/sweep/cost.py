r"""The remaining cost of a sweep, from the cells that are done.

A training takes its steps times the seconds a step took in finished cells of the same combination, or else in all
finished cells; an evaluation takes what the others took. Where nothing is known, there is no estimate.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from fmlightning.runs.checksum import recorded_step
from fmlightning.runs.directory import Run, read_json
from fmlightning.studies.sweep.cells import SweepCell
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.status import Status, stamp


@dataclass(frozen=True)
class Cost:
    """Seconds that are left, one cell at a time; None where they are not known.

    Attributes:
        source: what they rest on.
    """

    training: float | None
    evaluating: float | None
    source: str

    @property
    def total(self) -> float | None:
        if self.training is None or self.evaluating is None:
            return None
        return self.training + self.evaluating


def cost(plan: Plan, state: dict[Path, Status], seconds_per_step: float | None = None) -> Cost:
    """Estimate the remaining seconds.

    Args:
        seconds_per_step: a rate to take instead of the measured one.
    """
    rates = {cell.run: rate for cell in plan.cells if (rate := step_seconds(Run(cell.run)))}
    scoring = [s for cell in plan.cells if (s := scoring_seconds(plan, cell))]
    left = [c for c in plan.cells if state[c.run].word != "finished"]
    corrupt = {
        c.run for c in left if state[c.run].word == "corrupt"
    }  # trained again, from the start
    done = finished(left) - corrupt
    training = [
        seconds_left(c, 0 if c.run in corrupt else reached(c), plan, rates, seconds_per_step)
        for c in left
        if c.run not in done
    ]
    evaluating = [fmean(scoring) if scoring else None for _ in left if plan.evaluate is not None]
    measured = f"{len(rates)} finished trainings and {len(scoring)} evaluations"
    given = "" if seconds_per_step is None else f"{seconds_per_step:g} s a step as given; "
    return Cost(total(training), total(evaluating), f"{given}{measured}")


def total(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def finished(cells: list[SweepCell]) -> set[Path]:
    """The directories of those whose training is over."""

    def over(cell: SweepCell) -> Iterator[Path]:
        with suppress(ValueError, OSError):
            if Run(cell.run).status == "finished":
                yield cell.run

    return {path for cell in cells for path in over(cell)}


def seconds_left(
    cell: SweepCell, step: int, plan: Plan, rates: dict[Path, float], given: float | None
) -> float | None:
    """Seconds that a training still takes from a step on."""
    alike = [
        rates[c.run] for c in plan.cells if c.combination == cell.combination and c.run in rates
    ]
    known = [given] if given is not None else alike or list(rates.values())
    if not known or cell.max_steps < 0:
        return None
    return fmean(known) * max(0, cell.max_steps - step)


def reached(cell: SweepCell) -> int:
    """The step of the newest checkpoint."""
    with suppress(ValueError, OSError):
        newest = Run(cell.run).last_checkpoint
        return (recorded_step(newest) or 0) if newest else 0
    return 0


def step_seconds(run: Run) -> float | None:
    """Seconds that a step of a finished run took, with its share of validation and scores."""
    with suppress(ValueError, OSError, KeyError):
        found: dict[str, Any] = run.manifest
        steps = found["end_step"] - found.get("start_step", 0)
        if found["status"] == "finished" and steps > 0:
            span = datetime.fromisoformat(found["end"]) - datetime.fromisoformat(found["start"])
            return max(span.total_seconds(), 0.5) / steps  # times are written in whole seconds
    return None


def scoring_seconds(plan: Plan, cell: SweepCell) -> float | None:
    """Seconds that the evaluation of a run took."""
    with suppress(ValueError, OSError):
        record = read_json(stamp(Run(cell.run), plan.requested(cell) or ()))
        return float(record["seconds"]) if "seconds" in record else None
    return None


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"

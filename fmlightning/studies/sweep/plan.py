"""The plan of a sweep: its cells with their run directories, found by one child process."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from fmlightning.cli.allowed import named
from fmlightning.runs.directory import Run, runs_root
from fmlightning.studies.sweep.cells import SweepCell, cells, evaluate_arguments, fit_arguments
from fmlightning.studies.sweep.file import Sweep
from fmlightning.studies.sweep.job import Job


class Request(TypedDict):
    """Request to the child; its answer has `gpus`, `scores`, `cells`, and `error` where it stopped at one."""

    combinations: list[list[str]]
    seeds: list[int]
    evaluate: list[str] | None
    allow: list[str]


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run.

    Attributes:
        cells: in the order in which they are run.
        evaluate: the arguments of `fmlightning evaluate` for each run; None for no evaluation.
        scores: how many cells evaluate has for each run.
        gpus: how many there are here.
    """

    sweep: Sweep
    cells: tuple[SweepCell, ...]
    evaluate: tuple[str, ...] | None
    scores: int
    gpus: int

    @property
    def folder(self) -> Path:
        """The directory of the runs."""
        return runs_root() / self.sweep.name

    def job(self, cell: SweepCell, *share: str) -> Job:
        """The commands of a cell; `share` names its part of the machine, for its training."""
        arguments = [*fit_arguments(self.sweep, cell.options), *share]
        return Job(
            cell,
            command("fit", *arguments, f"--seed_everything={cell.seed}"),
            command("evaluate", str(cell.run), *(self.requested(cell) or ())),
            self.requested(cell),
            self.folder / "logs" / f"{cell.run.name}.log",
        )

    def requested(self, cell: SweepCell) -> tuple[str, ...] | None:
        """The arguments of evaluate for one run, with its metrics where it was trained under others."""
        if self.evaluate is None or "metrics" in self.sweep.evaluate or not cell.metrics:
            return self.evaluate
        with suppress(ValueError, OSError):
            if (Run(cell.run).config.get("evaluation") or {}).get("metrics") != list(cell.metrics):
                return (*self.evaluate, f"--metrics={json.dumps(cell.metrics)}")
        return self.evaluate


def command(*words: str) -> tuple[str, ...]:
    """A command of ours in a process of its own."""
    allow = [word for module in named.get() for word in ("--allow", module)]
    return (sys.executable, "-m", "fmlightning", *words, *allow)


def plan(sweep: Sweep) -> Plan:
    """Resolve every cell.

    Raises:
        ValueError: a cell cannot be trained or evaluated, or two of them are the same.
    """
    wanted = cells(sweep)
    distinct = {cell.combination: cell for cell in wanted}
    evaluate = evaluate_arguments(sweep) if sweep.evaluate else None
    answer = resolve_in_child(
        {
            "combinations": [fit_arguments(sweep, cell.options) for cell in distinct.values()],
            "seeds": list(sweep.seeds),
            "evaluate": evaluate,
            "allow": list(named.get()),
        }
    )
    if "error" in answer:
        wrong = list(distinct.values())[len(answer["cells"])]
        raise ValueError(f"{sweep.path}: {placed(answer['error'], sweep, wrong)}")
    found = dict(zip(distinct, answer["cells"], strict=True))
    placed_cells = [
        replace(
            cell,
            run=Path(found[cell.combination]["runs"][sweep.seeds.index(cell.seed)]),
            max_steps=found[cell.combination]["max_steps"],
            metrics=tuple(found[cell.combination]["metrics"]),
        )
        for cell in wanted
    ]
    require_distinct(sweep, placed_cells)
    requested = None if evaluate is None else tuple(evaluate)
    return Plan(sweep, tuple(placed_cells), requested, answer["scores"], answer["gpus"])


def placed(error: str, sweep: Sweep, cell: SweepCell) -> str:
    """An error with the place in the file that it is about."""
    for axis in sweep.axes:
        for option in {option for level in axis.levels for option in level.options}:
            if option in cell.options and mentions(error, option):
                return f"axes.{axis.name}: {error}"
    if any(mentions(error, option) for option in sweep.settings):
        return f"set: {error}"
    if error.startswith("evaluate"):
        return error
    return f"{error} (in the cell {cell.label})" if cell.combination else error


def mentions(error: str, option: str) -> bool:
    return bool(re.search(rf"(?<![\w.]){re.escape(option)}(?!\w)", error))


def require_distinct(sweep: Sweep, cells: Sequence[SweepCell]) -> None:
    """Refuse two cells that are one training."""
    seen: dict[Path, SweepCell] = {}
    for cell in cells:
        other = seen.setdefault(cell.run, cell)
        if other is not cell:
            raise ValueError(
                f"{sweep.path}: axes: the cells ({other.label}) and ({cell.label}) are the same training, {cell.run}: "
                "remove one; what changes only the solver or the guidance belongs to evaluate"
            )


def resolve_in_child(request: Request) -> dict[str, Any]:
    """Start the child, and read its answer."""
    child = subprocess.run(
        [sys.executable, "-m", "fmlightning.studies.sweep.resolve"],
        input=json.dumps(request), capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"the options of the cells could not be read:\n{child.stderr}")
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer

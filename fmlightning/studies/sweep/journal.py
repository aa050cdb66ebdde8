"""`sweep.json` beside the runs: the cells with their axes and how far they are, for `fmlightning report`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmlightning.studies.sweep.cells import SweepCell
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.status import Status, write_whole


@dataclass
class SweepState:
    """The state of every cell of a plan, on disk after each change.

    Attributes:
        state: by run directory.
    """

    plan: Plan
    state: dict[Path, Status] = field(default_factory=dict)

    def note(self, cell: SweepCell, status: Status) -> None:
        """A cell has come to another state."""
        self.state[cell.run] = status
        self.write()

    def write(self) -> None:
        write_whole(self.plan.folder / "sweep.json", self.content())

    def content(self) -> dict[str, Any]:
        sweep = self.plan.sweep
        names = dict.fromkeys(name for cell in self.plan.cells for name in cell.axes)
        values = {n: unique(c.axes[n] for c in self.plan.cells) for n in names}
        return {
            "file": str(sweep.path),
            "sweep": sweep.content,
            "axes": values,
            "seeds": list(sweep.seeds),
            "evaluate": sweep.evaluate,
            "cells": [self.row(cell) for cell in self.plan.cells],
        }

    def row(self, cell: SweepCell) -> dict[str, Any]:
        status = self.state[cell.run]
        return {
            "run": str(cell.run),
            "axes": cell.axes,
            "options": cell.options,
            "seed": cell.seed,
            "status": status.word,
            "error": status.why if status.word in ("failed", "corrupt") else "",
        }


def unique(values: Any) -> list[Any]:
    """Each value once, in order."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found

"""Progress of a sweep: a table on a terminal, and lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fmlightning.cli.argparser import console
from fmlightning.runs.metrics_csv import last_step
from fmlightning.studies.sweep.cost import cost, duration
from fmlightning.studies.sweep.pool import ActiveJob, Pool

SECOND = 1.0


@dataclass
class LiveTable:
    """Shows a pool at work.

    Attributes:
        live: None where the output is no terminal.
        left: seconds that remain, as estimated at the last change.
    """

    live: Live | None = None
    drawn: float = 0.0
    left: float | None = None
    stale: bool = True
    began: float = field(default_factory=time.monotonic)

    def log(self, line: str) -> None:
        """A cell has come further."""
        self.stale = True
        if self.live is None:
            print(line, flush=True)
        else:
            self.live.console.print(line, highlight=False, markup=False)

    def refresh(self, pool: Pool) -> None:
        """Draw what is going on, once a second."""
        if self.live is None or time.monotonic() - self.drawn < SECOND:
            return
        if self.stale:
            estimate = cost(pool.plan, pool.journal.state).total
            self.left, self.stale = estimate, False
        self.drawn = time.monotonic()
        self.live.update(self.drawing(pool), refresh=True)

    def drawing(self, pool: Pool) -> Group:
        table = Table("running", "", "step", "for", box=None, padding=(0, 2, 0, 0))
        for active in pool.running:
            table.add_row(
                active.job.cell.label, active.step.name, progress(active), elapsed(active.began)
            )
        counts = Counter(status.word for status in pool.journal.state.values())
        words = ", ".join(f"{n} {word}" for word, n in counts.items())
        left = "" if self.left is None else f"; about {duration(self.left / pool.jobs)} left"
        return Group(table, Text(f"{words}; {elapsed(self.began)}{left}"))


@contextmanager
def board(terminal: bool) -> Iterator[LiveTable]:
    """A board for as long as a sweep runs."""
    if not terminal:
        yield LiveTable()
        return
    with Live(console=console(), auto_refresh=False, transient=True) as live:
        yield LiveTable(live)


def progress(active: ActiveJob) -> str:
    if active.step.name != "training":
        return ""
    steps = active.job.cell.max_steps
    return f"{last_step(active.job.cell.run / 'metrics.csv')}{f' of {steps}' if steps > 0 else ''}"


def elapsed(began: float) -> str:
    return duration(time.monotonic() - began)

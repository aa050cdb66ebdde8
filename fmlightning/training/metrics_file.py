"""`metrics.csv`: the one file of a run's metrics, and the truth that W&B mirrors."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fmlightning.runs.files import explain_write_errors, write_text
from fmlightning.runs.metrics_csv import read_rows


class MetricsFile(Logger):
    """A logger that appends one row a step to `metrics.csv`.

    A new metric adds a column: the file is then written anew. A resumed run first drops the rows of the steps
    it will take again.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        self.read = False

    def load(self) -> None:
        """Take the rows that are there; on first use, when the directory is known to be this run's."""
        if self.path.is_file() and not self.read:
            columns, rows = read_rows(self.path)
            self.rows = list(rows)
            self.columns = columns or self.columns
            if not self.path.read_bytes().endswith(b"\n"):
                self.write()
        self.read = True

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def root_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the hyperparameters are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.load()
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        if not values:
            return
        row, last = self.row(step or 0), self.rows[-1]
        before = dict(row)
        row.update(values)
        if row == before:  # the row of a checkpoint's step, which was written early
            return
        new = [k for k in values if k not in self.columns]
        self.columns += new
        if new or len(before) > 1 or row is not last or not self.path.is_file():
            self.write()
        else:
            with explain_write_errors(self.path), self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(self.rows[-1])

    def row(self, step: int) -> dict[str, Any]:
        """The row of a step, which may be an earlier one: scores are a step ahead of losses."""
        place = len(self.rows)
        while place and int(self.rows[place - 1]["step"]) >= step:
            place -= 1
        if place == len(self.rows) or int(self.rows[place]["step"]) != step:
            self.rows.insert(place, {"step": step})
        return self.rows[place]

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget the rows after a step that is being resumed from."""
        self.load()
        kept = [row for row in self.rows if int(row["step"]) <= step]
        if len(kept) < len(self.rows):
            self.rows = kept
            self.write()

    def write(self) -> None:
        """The whole file, put in place at once."""
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        with explain_write_errors(self.path):
            write_text(self.path, content.getvalue())

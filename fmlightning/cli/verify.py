"""`fmlightning verify`: the theorems of flow matching, checked on every path, as a table."""

import itertools
import warnings
from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmlightning.cli.argparser import Parser
from fmlightning.flow.theory.theorems import SCHEDULES, Row, verify


def table(rows: Iterable[Row]) -> Table:
    """The rows, under the name of their path."""
    printed = Table("theorem", "measured", "", "allowed", "")
    for name, group in itertools.groupby(rows, key=lambda row: row.path):
        printed.add_row(Text(name, style="bold"))
        for row in group:
            verdict = "pass" if row.passed else "FAIL"
            measured, allowed = f"{row.value:.2g}", f"{row.tolerance:.2g}"
            printed.add_row(f"  {row.name}", measured, row.relation, allowed, verdict)
        printed.add_section()
    return printed


def main(argv: Sequence[str] | None = None) -> int:
    """`fmlightning verify`: print the table; non-zero where a row fails."""
    names = list(dict.fromkeys(type(schedule).__name__ for schedule in SCHEDULES))
    parser = Parser("verify", "Check the theorems of flow matching on known distributions.")
    parser.add_argument("--path", action="append", choices=names, help="this path only; repeatable")
    # torch's own, from the first use of forward-mode autodiff
    warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated")
    chosen = parser.parse_args(argv).path or names
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other
    rows = verify(schedule for schedule in SCHEDULES if type(schedule).__name__ in chosen)
    failed = sum(not row.passed for row in rows)
    console = Console()
    console.print(table(rows))
    console.print(f"{len(rows) - failed} of {len(rows)} rows pass")
    return int(failed > 0)

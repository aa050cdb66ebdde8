r"""Tables as Markdown, LaTeX and CSV.

Markdown and LaTeX (booktabs) show a mean in as many digits as its interval bears; CSV has all digits, and the standard
deviation. An interval of one seed is 'n = 1'.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmlightning.studies.report.axes import called
from fmlightning.studies.report.intervals import LEVEL, Estimate
from fmlightning.studies.report.table import Column, Difference, Key, Table

INTERVAL = "95 %"


@dataclass(frozen=True)
class TableCell:
    """Text in one place of a table."""

    text: str
    bold: bool = False


Grid = list[list[TableCell]]
"""A header and rows."""


def text_grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Grid:
    """A table without bold cells."""
    return [[TableCell(text) for text in row] for row in (heads, *rows)]


def digits(half: float | None) -> int | None:
    """Decimals that show two digits of an interval, or None where it has no width."""
    if half is None or not math.isfinite(half) or half <= 0:
        return None
    return max(0, 1 - math.floor(math.log10(half)))


def number(value: float, half: float | None) -> str:
    decimals = digits(half)
    return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"


def interval(estimate: Estimate) -> str:
    """The half width, or that there is one seed."""
    half = estimate.half_width
    if half is None:
        return "n = 1"
    return f"± {number(half, half)}"


def with_n(estimate: Estimate) -> str:
    """A mean with its interval and number of seeds, in one place."""
    mean = number(estimate.mean, estimate.half_width)
    return f"{mean} {interval(estimate)}" + (f" (n = {estimate.n})" if estimate.n > 1 else "")


def title(table: Table, head: Column) -> str:
    """A column's name, with an arrow where less or more is better."""
    pairs = zip(table.columns, head.at, strict=True)
    at = ", ".join(f"{axis} = {called(v)}" for axis, v in pairs)
    if at and len({h.metric for h in table.heads}) == 1:
        return at
    return " ".join(filter(None, [at, head.metric, arrow(head)]))


def arrow(head: Column) -> str:
    return {"higher": "↑", "lower": "↓"}.get(head.better, "")


# -- scores and differences as grids --------------------------------------------------------------


def score_grid(table: Table) -> Grid:
    """Rows, how many seeds they rest on, and for each column mean and interval."""
    best = table.best
    heads = [part for head in table.heads for part in (title(table, head), INTERVAL)]
    grid = [[TableCell(t) for t in (*table.rows, "n", *heads)]]
    for key in table.keys:
        n = table.count(key)
        row = [*(TableCell(called(v)) for v in key), TableCell(str(n))]
        for head in table.heads:
            row += entry(table.estimate(key, head), n, (key, head) in best)
        grid.append(row)
    return grid


def entry(estimate: Estimate | None, n: int, bold: bool) -> list[TableCell]:
    """Mean and interval, with the number of seeds where it is not the row's."""
    if estimate is None:
        return [TableCell("-"), TableCell("-")]
    apart = f" (n = {estimate.n})" if 1 < estimate.n < n else ""
    mean = number(estimate.mean, estimate.half_width)
    return [TableCell(mean, bold), TableCell(interval(estimate) + apart)]


def difference_grid(table: Table, found: dict[tuple[Key, Column], Difference]) -> Grid:
    """For each row the paired difference from its baseline, its interval and its p."""
    columns = [head for head in table.heads if head.better != "neither"]
    heads = [p for head in columns for p in (title(table, head), INTERVAL, "p (Holm)")]
    grid = [[TableCell(t) for t in (*table.rows, "n", *heads)]]
    for key in (k for k in table.keys if any((k, head) in found for head in table.heads)):
        row = [TableCell(called(v)) for v in key]
        there = [found.get((key, head)) for head in columns]
        n = max(d.estimate.n for d in there if d)
        row.append(TableCell(str(n)))
        for head, difference in zip(columns, there, strict=True):
            row += difference_entry(difference, n, head.ranked)
        grid.append(row)
    return grid


def difference_entry(difference: Difference | None, n: int, ranked: bool) -> list[TableCell]:
    if difference is None:
        return [TableCell("-")] * 3
    estimate, p = difference.estimate, difference.p
    mean = number(estimate.mean, estimate.half_width)
    mean = f"+{mean}" if estimate.mean > 0 else mean
    shown = "-" if estimate.std is None else f"{p:.3g}"
    return [TableCell(mean, ranked and p < LEVEL), entry(estimate, n, False)[1], TableCell(shown)]


# -- grids as text --------------------------------------------------------------------------------


def markdown(grid: Grid) -> str:
    lines = [[markdown_piece(p) for p in row] for row in grid]
    lines.insert(1, ["---"] * len(grid[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_piece(piece: TableCell) -> str:
    text = piece.text.replace("|", "\\|").replace("*", "\\*")
    return f"**{text}**" if piece.bold else text


ESCAPED = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "<": r"$<$", ">": r"$>$", "−": r"$-$", "→": r"$\rightarrow$", "×": r"$\times$",
    "[": "{[}", "*": "{*}",  # which LaTeX would take for an argument of the line break before them
}  # fmt: skip


def latex(grid: Grid, words: int) -> str:
    """A booktabs tabular.

    Args:
        grid: the table.
        words: how many columns on the left are words; the others are numbers.
    """
    body = [" & ".join(map(latex_piece, row)) + r" \\" for row in grid]
    columns = "l" * words + "r" * (len(grid[0]) - words)
    lines = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex_piece(piece: TableCell) -> str:
    text = "".join(ESCAPED.get(sign, sign) for sign in piece.text)
    return rf"\textbf{{{text}}}" if piece.bold else text


def score_csv(table: Table) -> str:
    """For each column mean, half width of the interval or 'n = 1', standard deviation and number of seeds."""
    names = ("", f" {INTERVAL}", " std", " n")
    heads = [f"{plain_title(table, h)}{name}" for h in table.heads for name in names]
    rows: list[list[object]] = [[*table.rows, *heads]]
    for key in table.keys:
        found = [table.estimate(key, head) for head in table.heads]
        rows.append([*key, *(value for e in found for value in exact(e))])
    return comma_separated(rows)


def difference_csv(table: Table, found: dict[tuple[Key, Column], Difference]) -> str:
    """The same of differences, with p by Holm's correction."""
    names = ("", f" {INTERVAL}", " std", " n", " p")
    columns = [head for head in table.heads if head.better != "neither"]
    heads = [f"{plain_title(table, h)}{name}" for h in columns for name in names]
    rows: list[list[object]] = [[*table.rows, *heads]]
    for key in table.keys:
        there = [found.get((key, head)) for head in columns]
        if any(there):
            values = [
                v for d in there for v in (*exact(d.estimate if d else None), d.p if d else "")
            ]
            rows.append([*key, *values])
    return comma_separated(rows)


def plain_title(table: Table, head: Column) -> str:
    pairs = zip(table.columns, head.at, strict=True)
    at = [f"{axis}={called(v)}" for axis, v in pairs]
    return " ".join([head.metric, *at])


def exact(estimate: Estimate | None) -> tuple[object, ...]:
    if estimate is None:
        return ("", "", "", 0)
    half = estimate.half_width
    spread = ("n = 1", "") if half is None else (half, estimate.std)
    return (estimate.mean, *spread, estimate.n)


def comma_separated(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

"""Reading `metrics.csv`: one row a step, one column a metric.

A full disk may cut the last line off; its step is after every checkpoint, so no reader counts it.
"""

import csv
import os
from pathlib import Path

Points = list[tuple[int, float]]
"""The values of a metric with their steps."""

LAST_BYTES = 8192
"""More than the length of a row."""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the columns and the complete rows, as text; none of either where there is no file."""
    if not path.is_file():
        return [], []
    lines = path.read_bytes().decode().splitlines(keepends=True)
    reader = csv.DictReader((line for line in lines if line.endswith("\n")), strict=True)
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def read_columns(path: Path) -> dict[str, Points]:
    """The values of each metric, by step; empty where there is no file.

    Raises:
        ValueError: the file is corrupt.
    """
    columns: dict[str, Points] = {}
    try:
        for row in read_rows(path)[1]:
            step = int(row.pop("step"))
            for name, text in row.items():
                if text != "":
                    columns.setdefault(name, []).append((step, float(text)))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return columns


def last_step(path: Path) -> int:
    """The step of the last complete row, from the end of the file alone; 0 before the first."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            rows = file.read().decode(errors="replace").split("\n")[1:-1]
        return int(rows[-1].split(",")[0]) if rows else 0
    except (OSError, ValueError):
        return 0

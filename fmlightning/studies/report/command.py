"""`fmlightning report DIR...`: its options, and the files and exit status it comes to."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fmlightning.cli.argparser import Parser, choices
from fmlightning.runs.files import write_text
from fmlightning.studies.report.axes import Value, called, same, split
from fmlightning.studies.report.cells import ReportCells, cells_of
from fmlightning.studies.report.document import TITLES, Document
from fmlightning.studies.report.expected import checks, expected, read_expected
from fmlightning.studies.report.reading import PLAN, FoundRuns, collect
from fmlightning.studies.report.table import Table, Unscored, tabulate

DESCRIPTION = """Tables of mean and 95 % interval over seeds (Markdown, LaTeX, CSV), paired differences, curves of
quality against NFE and of training, and a page with all of it and the images: from run directories alone. A row
is a value of an axis: of an option of training such as model.path, or of an evaluation such as solver, nfe or
guidance. Runs that differ in their seed alone are averaged, and no others."""


def main(argv: list[str]) -> int:
    """Read the runs, write the report, and return 1 where a check fails."""
    options = parse(argv)
    known = expectations(options)
    found = collect(options.runs)
    kinds, reasons = chosen(found, options)
    document = Document(found, reasons, " ".join(["fmlightning", "report", *argv]))
    tables = [table_of(cells, options) for cells in kinds]
    against = baselines(tables, kinds, options.baseline)
    for cells, table, baseline in zip(kinds, tables, against, strict=True):
        document.scores(cells, table)
        if baseline:
            document.differences(cells, table, baseline)
        document.curves(cells, table)
    document.show()
    status = document.beside(checks(known, kinds), bool(options.check)) if known else 0
    document.images(kinds[0])
    document.write(options.out or beside(options.runs), options.format)
    if options.write_expected:
        write_expected(found, kinds, options.write_expected, document.command)
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    """The options.

    Raises:
        ValueError: one is unknown, or --out is a file.
    """
    parser = Parser("report", DESCRIPTION)
    for flags, settings in OPTIONS.items():
        parser.add_argument(*flags.split(), **settings)  # type: ignore[arg-type]
    options = parser.parse_args(argv)
    out = options.out
    if out and (out.suffix == ".json" or out.is_file()):
        raise ValueError(
            f"--out {out}: is the report's directory; for an expected.json: --write_expected {out}"
        )
    return options


def names(text: str) -> list[str]:
    return [name for name in split(text) if name]


def pair(text: str) -> tuple[str, list[str]]:
    axis, equals, value = text.partition("=")
    if not (axis and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} must be AXIS=VALUE, such as model.path=Linear")
    return axis.strip(), names(value)


OPTIONS: dict[str, dict[str, object]] = {
    "runs": {
        "nargs": "+",
        "type": Path,
        "help": "run directories, or directories of runs or of a sweep",
    },
    "--out": {"type": Path, "help": "directory of the report; by default report/ beside the runs"},
    "--scores": {
        "choices": tuple(TITLES),
        "help": "those at the end of training, or those of fmlightning evaluate; by default both",
    },
    "--metric": {
        "type": names,
        "metavar": "NAME[,NAME]",
        "help": "metrics; also columns of metrics.csv, for their last value",
    },
    "--rows": {
        "type": names,
        "metavar": "AXIS[,AXIS]",
        "help": "axes that are rows; by default all that differ",
    },
    "--columns": {
        "type": names,
        "default": [],
        "metavar": "AXIS[,AXIS]",
        "help": "axes whose values are columns, such as nfe",
    },
    "--where": {
        "type": pair,
        "action": "append",
        "default": [],
        "metavar": "AXIS=VALUE[,VALUE]",
        "help": "only these; may stand several times",
    },
    "--baseline": {
        "metavar": "AXIS=VALUE[,AXIS=VALUE]",
        "help": "the row that others are held against, seed by seed",
    },
    "--format": {"choices": ("png", "pdf"), "default": "png", "help": "of the figures"},
    "--write_expected": {
        "type": Path,
        "metavar": "FILE",
        "help": "also write the scores with their spread: an expected.json",
    },
    "--expected": {"type": Path, "metavar": "FILE", "help": "show the scores beside such a file"},
    "--check": {
        "type": Path,
        "metavar": "FILE",
        "help": "the same, and exit with 1 where a score is outside its spread or missing",
    },
}


def expectations(options: argparse.Namespace) -> list[dict[str, object]]:
    """The cells of the file that the scores are to stand beside, if one is named."""
    for name in ("check", "expected"):
        if file := vars(options)[name]:
            return read_expected(file, f"--{name}")
    return []


def chosen(found: FoundRuns, options: argparse.Namespace) -> tuple[list[ReportCells], list[str]]:
    """The cells of each kind of score that can be reported as requested, and why another kind cannot.

    Raises:
        ValueError: none can.
    """
    where: dict[str, list[str]] = {}
    for axis, wanted in options.where:
        where.setdefault(axis, []).extend(wanted)
    kinds: list[ReportCells] = []
    errors: dict[str, ValueError] = {}
    for kind in [options.scores] if options.scores else TITLES:
        try:
            if cells := cells_of(found, kind, where):
                table_of(cells, options)
                kinds.append(cells)
        except ValueError as error:
            errors[kind] = error
    if kinds:
        lost = {k: e for k, e in errors.items() if not isinstance(e, Unscored)}
        return kinds, [f"{TITLES[kind]}: left out, because {error}" for kind, error in lost.items()]
    if errors:
        raise next(iter(errors.values()))
    raise ValueError(
        f"--scores {options.scores}: no run has any; fmlightning evaluate RUN computes those by solver"
    )


def table_of(cells: ReportCells, options: argparse.Namespace) -> Table:
    return tabulate(cells, options.rows, options.columns, options.metric)


def baselines(
    tables: Sequence[Table], kinds: Sequence[ReportCells], text: str | None
) -> list[dict[str, Value]]:
    """The baseline's values in each table; empty where a table has no such row.

    Raises:
        ValueError: none has.
    """
    found: list[dict[str, Value]] = []
    errors: list[ValueError] = []
    for table, cells in zip(tables, kinds, strict=True):
        try:
            found.append(baseline_of(table, cells, text) if text else {})
        except ValueError as error:
            found.append({})
            errors.append(error)
    if errors and not any(found):
        raise errors[-1]
    return found


def baseline_of(table: Table, cells: ReportCells, text: str) -> dict[str, Value]:
    """The values of a baseline.

    Raises:
        ValueError: an axis or a value is not there.
    """
    found: dict[str, Value] = {}
    for part in split(text):
        name, equals, wanted = part.partition("=")
        axis = cells.axis(name.strip(), "--baseline")
        if axis not in table.rows:
            raise ValueError(
                f"--baseline {part}: {axis} is no row of the table; {choices(axis, table.rows)}"
            )
        values = cells.along(axis)
        match = [v for v in values if same(wanted, v)]
        if not equals or not match:
            raise ValueError(
                f"--baseline {part}: no row has it; {choices(wanted, map(called, values))}"
            )
        found[axis] = match[0]
    return found


def beside(runs: Sequence[Path]) -> Path:
    """`report` in the one directory given, or in that which all share."""
    places = [p.parent if p.name == PLAN or p.suffix == ".ckpt" else p for p in runs]
    if len(places) == 1:
        return places[0] / "report"
    shared = Path(os.path.commonpath([p.resolve() for p in places])) / "report"
    return shared.relative_to(Path.cwd()) if shared.is_relative_to(Path.cwd()) else shared


def write_expected(
    found: FoundRuns, kinds: Sequence[ReportCells], path: Path, command: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(expected(found, kinds, command), indent=2) + "\n")
    print(f"written: {path}")

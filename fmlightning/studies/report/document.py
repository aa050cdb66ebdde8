"""A report as it grows: tables as text, figures, and the sections of the page."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from fmlightning.cli.argparser import console
from fmlightning.runs.files import atomic_write, write_text
from fmlightning.studies.report import figures, formats, page
from fmlightning.studies.report.axes import Value, called
from fmlightning.studies.report.cells import ReportCells
from fmlightning.studies.report.expected import Check
from fmlightning.studies.report.formats import Grid, text_grid
from fmlightning.studies.report.page import Section
from fmlightning.studies.report.reading import PAGE, FoundRuns
from fmlightning.studies.report.records import EVALUATIONS, FINAL
from fmlightning.studies.report.table import Table, confounded, differences, fewer, unranked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {FINAL: "Scores at the end of training", EVALUATIONS: "Scores by solver and budget"}
"""Both kinds of score, in the order of the page."""

RULES = (
    f"{formats.INTERVAL}: half width of Student's interval of the mean over n seeds.",
    "Bold: the best of its column, whose paired differences from every other row (same seeds, same noise) all exclude "
    "0 after Holm's correction at 5 %.",
)
PAIRED_RULES = (
    "Differences seed by seed from the row that has the baseline's values and is like it in all else, with Student's "
    "interval; bold: p is below 5 % after Holm's correction over the column.",
)
MOST_SHOWN = 60
"""Expected scores that all hold and are still printed; the page has them all."""

NFE_RULE = (
    "Point: mean over seeds; bar: its 95 % interval. An open marker beyond the budgets: an adaptive solver at its "
    "tightest tolerance, with the evaluations that it took."
)
TRAINING_RULE = "Line: mean over seeds; band: its 95 % interval."


@dataclass
class Document:
    """The tables, figures and sections that are printed and written.

    Attributes:
        found: the runs.
        reasons: why a kind of score is not in it.
        command: that makes it again.
        sections: of the page, in order.
        texts: the tables by file name.
        drawn: the figures by name.
    """

    found: FoundRuns
    reasons: list[str]
    command: str
    sections: list[Section] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    drawn: dict[str, "Figure"] = field(default_factory=dict)

    def scores(self, cells: ReportCells, table: Table) -> None:
        """The table of one kind of score."""
        kind = cells.all[0].record.kind
        head = table.heads[0]
        one = table.columns and len({h.metric for h in table.heads}) == 1
        title = f"{TITLES[kind]}: {head.metric} {formats.arrow(head)}" if one else TITLES[kind]
        axes = (*table.rows, *table.columns)
        notes = [*unranked(table), *fewer(table, cells.seeds), *confounded(cells, axes)]
        self.table(title.strip(), formats.score_grid(table), len(table.rows), RULES, notes)
        self.files(kind, formats.score_csv(table))

    def differences(self, cells: ReportCells, table: Table, baseline: Mapping[str, Value]) -> None:
        """Each row against the baseline."""
        title = f"Differences from {', '.join(f'{a}={called(v)}' for a, v in baseline.items())}"
        found, alone = differences(table, baseline)
        if len(alone) > 6:
            alone[6:] = [f"and {len(alone) - 6} more rows without a baseline"]
        if not found:
            notes = ["no row has a baseline to be held against", *alone]
            self.sections.append(Section(title, notes=notes))
            return
        grid = formats.difference_grid(table, found)
        self.table(title, grid, len(table.rows), PAIRED_RULES, alone)
        self.files(f"{cells.all[0].record.kind}_differences", formats.difference_csv(table, found))

    def table(
        self, title: str, grid: Grid, words: int, rules: Sequence[str], notes: Sequence[str]
    ) -> None:
        self.sections.append(Section(title, [(grid, words)], list(rules), list(notes)))

    def files(self, name: str, csv: str) -> None:
        """The last table in its three formats."""
        section = self.sections[-1]
        grid, words = section.tables[0]
        below = "".join(f"\n{note}\n" for note in (*section.rules, *section.notes))
        self.texts[f"{name}.md"] = formats.markdown(grid) + below
        self.texts[f"{name}.tex"] = formats.latex(grid, words)
        self.texts[f"{name}.csv"] = csv

    def curves(self, cells: ReportCells, table: Table) -> None:
        """Quality against NFE of every metric that is shown, and training once."""
        metrics = list(dict.fromkeys(head.metric for head in table.heads))
        if cells.all[0].record.kind == EVALUATIONS:
            for name in (m for m in metrics if m != "nfe"):
                drawn = figures.against_nfe(cells, name)
                self.figure(f"nfe_{name}", f"{name} against NFE", drawn, NFE_RULE)
        if "training" not in self.drawn:
            logged = [m for m in metrics if "/" in m]
            names = ["train/loss", "val/loss", *logged, *(f"eval/{m}" for m in metrics)]
            drawn = figures.training(cells, list(dict.fromkeys(names)))
            self.figure("training", "Training", drawn, TRAINING_RULE)

    def figure(self, name: str, title: str, drawn: "Figure | None", rule: str) -> None:
        if drawn is not None:
            self.drawn[name] = drawn
            self.sections.append(Section(title, rules=[rule], images=[(title, png(drawn))]))

    def images(self, cells: ReportCells) -> None:
        """Samples and trajectories of the runs."""
        if shown := page.run_images(cells):
            rule = "The last images of the lowest seed in each row."
            self.sections.append(Section("Images", rules=[rule], images=shown, small=True))

    # -- to the terminal --------------------------------------------------------------------------

    def show(self) -> None:
        """Print the tables, and their notes."""
        out = console()
        for section in self.sections:
            if section.tables or section.notes:
                out.print(f"[bold]{escape(section.title)}[/]")
            for grid, _ in section.tables:
                out.print(printed(grid))
            lines(out, section.notes)
        lines(out, [*self.found.notes, *self.reasons])
        if self.found.left_out:
            out.print(f"[bold]in no table[/] ({len(self.found.left_out)})")
            lines(out, (f"{x.path}: {x.why}" for x in self.found.left_out))

    def beside(self, rows: Sequence[Check], strict: bool) -> int:
        """The scores beside expected ones; 1 where the check is strict and fails."""
        wrong = [row for row in rows if row.failed]
        self.sections.append(Section("Beside what was expected", [(check_grid(rows), 2)]))
        if shown := wrong if strict and wrong else rows if len(rows) <= MOST_SHOWN else ():
            console().print(printed(check_grid(shown)))
        within = sum(row.verdict == "within" for row in rows)
        print(
            f"{within} of {len(rows)} expected scores are within their spread, {len(wrong)} are outside or missing"
        )
        return int(strict and (bool(wrong) or not within))

    # -- to files ---------------------------------------------------------------------------------

    def write(self, folder: Path, extension: str) -> None:
        """All files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.texts.items():
            write_text(folder / name, text)
        for name, figure in self.drawn.items():
            save(figure, folder / f"{file_name(name)}.{extension}")
        sections = [*self.sections, *self.rest()]
        write_text(folder / PAGE, page.page(self.title, sections, self.command))
        drawn = [f"{file_name(name)}.{extension}" for name in self.drawn]
        print(f"written: {folder}/{', '.join([PAGE, *self.texts, *drawn])}")

    @property
    def title(self) -> str:
        folders = dict.fromkeys(t.run.path.resolve().parent.name for t in self.found.trained)
        return ", ".join(folders)

    def rest(self) -> list[Section]:
        """Notes, and the runs that are in no table."""
        notes = [*self.found.notes, *self.reasons]
        sections = [Section("Notes", notes=notes)] if notes else []
        if self.found.left_out:
            rows = [[str(x.path), x.status, x.why] for x in self.found.left_out]
            sections.append(
                Section("Runs in no table", [(text_grid(["run", "status", "why"], rows), 3)])
            )
        return sections


def printed(grid: Grid) -> Printed:
    head, *rows = grid
    table = Printed(*(escape(p.text) for p in head), box=None)
    for row in rows:
        table.add_row(*(f"[bold]{escape(p.text)}[/]" if p.bold else escape(p.text) for p in row))
    return table


def lines(out: Console, notes: Iterable[str]) -> None:
    for note in notes:
        out.print(f"  {escape(note)}", highlight=False, soft_wrap=True)


def check_grid(rows: Sequence[Check]) -> Grid:
    heads = ["cell", "metric", "here", "expected", "spread allowed", "verdict"]
    return text_grid(heads, [row.words() for row in rows])


def file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", name)


def png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def save(figure: "Figure", path: Path) -> None:
    # without a date: the same runs give the same file
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)

"""The report as one HTML page that needs no other file: tables, curves, and pictures of the runs."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from fmlightning.studies.report.axes import called
from fmlightning.studies.report.cells import Cells
from fmlightning.studies.report.formats import Grid, TableCell
from fmlightning.studies.report.reading import SkippedRun

WIDEST = 1200
"""Pixels of a picture at most; wider ones are made smaller."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
th { border-top: 2px solid #222; border-bottom: 1px solid #222; font-weight: 600; }
tr:last-child td { border-bottom: 2px solid #222; }
th.word, td.word { text-align: left; }
img { max-width: 100%; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; max-width: 100%; }
figure.run { max-width: 36rem; }
figcaption, .note, footer { color: #555; font-size: .88rem; }
"""


@dataclass
class Section:
    """A heading with what stands below it.

    Attributes:
        title: the heading.
        tables: each with how many columns on its left are words.
        rules: how the tables and figures are to be read.
        notes: what is to be known of these.
        images: PNG files with what they show.
        small: whether images stand beside each other.
    """

    title: str
    tables: list[tuple[Grid, int]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: list[tuple[str, bytes]] = field(default_factory=list)
    small: bool = False


def page(title: str, sections: Sequence[Section], footer: str) -> str:
    body = "".join(html_section(s) for s in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}<footer>{escape(footer)}</footer>\n</html>\n"
    )


def html_section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>\n"]
    parts += [html_table(grid, words) for grid, words in section.tables]
    parts += [f'<p class="note">{escape(note)}</p>\n' for note in (*section.rules, *section.notes)]
    parts += [html_image(name, png, section.small) for name, png in section.images]
    return "".join(parts)


def html_table(grid: Grid, words: int) -> str:
    head, *rows = grid
    lines = [html_row(head, words, "th"), *(html_row(row, words, "td") for row in rows)]
    return f"<table>\n{''.join(lines)}</table>\n"


def html_row(row: Iterable[TableCell], words: int, tag: str) -> str:
    cells = []
    for place, piece in enumerate(row):
        text = f"<b>{escape(piece.text)}</b>" if piece.bold else escape(piece.text)
        kind = ' class="word"' if place < words else ""
        cells.append(f"<{tag}{kind}>{text}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>\n"


def html_image(name: str, png: bytes, small: bool) -> str:
    data = base64.b64encode(png).decode()
    kind = ' class="run"' if small else ""
    return (
        f'<figure{kind}><img alt="{escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(name)}</figcaption></figure>\n"
    )


# -- pictures of runs -----------------------------------------------------------------------------


def pictures(cells: Cells) -> list[tuple[str, bytes]]:
    """The last pictures of the run with the lowest seed in each row of training axes."""
    axes = [a for a in cells.axes if a not in cells.all[0].record.options]
    found: list[tuple[str, bytes]] = []
    for key in cells.keys(axes):
        mine = [c for c in cells.all if c.key(axes) == key]
        run = min(mine, key=lambda c: c.seed).trained.run.path
        row = ", ".join(f"{axis}={called(v)}" for axis, v in zip(axes, key, strict=True))
        for path in last_pictures(run):
            found.append((": ".join(filter(None, [row, f"{run.name}, {path.stem}"])), shrunk(path)))
    return found


def last_pictures(run: Path) -> list[Path]:
    """Of each kind of picture the one of the highest step: `samples-00000700.png`."""
    files = sorted((run / "samples").glob("*.png"))
    return list({p.stem.rpartition("-")[0] or p.stem: p for p in files}.values())


def shrunk(path: Path) -> bytes:
    """A picture as PNG, not wider than a page shows."""
    from PIL import Image

    with Image.open(path) as image:
        if image.width <= WIDEST:
            return path.read_bytes()
        size = (WIDEST, round(image.height * WIDEST / image.width))
        out = io.BytesIO()
        image.convert("RGB").resize(size).save(out, "PNG")
        return out.getvalue()


def left_out_grid(left_out: Sequence[SkippedRun]) -> Grid:
    """The runs that are in no table."""
    rows = [[str(x.path), x.status, x.why] for x in left_out]
    return [[TableCell(t) for t in row] for row in [["run", "status", "why"], *rows]]

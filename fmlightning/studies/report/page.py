"""The report as one HTML page that needs no other file: tables, curves, and images of the runs."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fmlightning.studies.report.axes import called
from fmlightning.studies.report.cells import ReportCells
from fmlightning.studies.report.formats import Grid

WIDEST = 1200
"""Pixels of an image at most; wider ones are made smaller."""


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
    """Fill the template `page.html.jinja`, in which all text is escaped."""
    templates = Environment(
        loader=PackageLoader("fmlightning.studies", "report"),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    template = templates.get_template("page.html.jinja")
    return template.render(
        title=title,
        sections=sections,
        footer=footer,
        base64=lambda png: base64.b64encode(png).decode(),
    )


# -- images of runs -------------------------------------------------------------------------------


def run_images(cells: ReportCells) -> list[tuple[str, bytes]]:
    """The last images of the run with the lowest seed in each row of training axes."""
    axes = [a for a in cells.axes if a not in cells.all[0].record.options]
    found: list[tuple[str, bytes]] = []
    for key in cells.keys(axes):
        mine = [c for c in cells.all if c.key(axes) == key]
        run = min(mine, key=lambda c: c.seed).trained.run.path
        row = ", ".join(f"{axis}={called(v)}" for axis, v in zip(axes, key, strict=True))
        # of each kind the one of the highest step: `samples-00000700.png`
        files = sorted((run / "samples").glob("*.png"))
        for path in {p.stem.rpartition("-")[0] or p.stem: p for p in files}.values():
            found.append((": ".join(filter(None, [row, f"{run.name}, {path.stem}"])), shrunk(path)))
    return found


def shrunk(path: Path) -> bytes:
    """An image as PNG, not wider than a page shows."""
    from PIL import Image

    with Image.open(path) as image:
        if image.width <= WIDEST:
            return path.read_bytes()
        size = (WIDEST, round(image.height * WIDEST / image.width))
        out = io.BytesIO()
        image.convert("RGB").resize(size).save(out, "PNG")
        return out.getvalue()

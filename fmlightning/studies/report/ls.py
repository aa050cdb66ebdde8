"""`fmlightning ls`: the runs below a directory, in what they differ, how they ended and what they scored."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fmlightning.cli.argparser import Parser, choices, console
from fmlightning.runs.config_hash import result_parts
from fmlightning.runs.directory import Run, find, runs_root
from fmlightning.studies.report.axes import (
    Labels,
    Options,
    Value,
    called,
    differing,
    flat,
    same,
    split,
)
from fmlightning.studies.report.records import ASIDE, final_scores

FACTS = ("run", "status", "step", "started")
"""Facts that every run has, and can be sorted and chosen by besides its options and scores."""


@dataclass(frozen=True)
class ListedRun:
    """A run, or what is wrong with it."""

    run: Run
    status: str
    step: Value = None
    started: str = ""
    experiment: str = ""
    options: Options = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    wrong: str = ""

    def value(self, name: str) -> Any:
        """A fact, an option or a score by its name, or None."""
        if name == "run":
            return str(self.run.path)
        if name in FACTS:
            return getattr(self, name)
        return self.scores.get(name, self.options.get(name))


def main(argv: list[str]) -> int:
    """List runs."""
    options = parse(argv)
    rows = [read(run) for run in find(options.root)]
    if not rows:
        raise FileNotFoundError(
            f"{options.root} holds no runs; train one with fmlightning fit --config ..."
        )
    for name, wanted in options.where:
        axis = named(name, rows, "--where")
        rows = [r for r in rows if any(same(text, r.value(axis)) for text in wanted)]
    if not rows:
        raise ValueError(f"--where: none of the runs below {options.root} is like that")
    if options.sort:
        descending = options.sort.startswith("-")
        axis = named(options.sort.removeprefix("-"), rows, "--sort")
        rows = ordered(rows, axis, descending)
    console().print(table(rows))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "ls",
        "List the runs below a directory, with the options in which they differ, status and scores.",
    )
    parser.add_argument(
        "root", nargs="?", type=Path, default=runs_root(), help="by default $FMLIGHTNING_RUNS or runs/"
    )  # fmt: skip
    parser.add_argument(
        "--sort", help="run, status, step, started, a score or an option; -NAME for descending; write --sort=-NAME"
    )  # fmt: skip
    parser.add_argument(
        "--where", type=condition, action="append", default=[], metavar="NAME=VALUE[,VALUE]",
        help="only runs of which this holds: status=failed, model.path=Linear",
    )  # fmt: skip
    return parser.parse_args(argv)


def condition(text: str) -> tuple[str, list[str]]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, such as status=failed")
    return name.strip(), list(split(value))


def read(run: Run) -> ListedRun:
    """A row, whatever state the run is in."""
    try:
        manifest, config = run.manifest, run.trained_config
        return ListedRun(
            run,
            run.status,
            manifest.get("end_step"),
            str(manifest.get("start", ""))[:16],
            str(config.get("experiment")),
            renamed(dict(flat(result_parts(config)))),
            headline(run),
            str(manifest.get("error") or "").partition("\n")[0][:120],
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return ListedRun(run, "corrupt", wrong=wrong(run, error))


def renamed(options: Options) -> Options:
    return {"seed": options.pop("seed_everything", None), **options}


def wrong(run: Run, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(str(error.filename)).name} is missing"
    return " ".join(str(error).split()).removeprefix(f"{run.path}/")


def headline(run: Run) -> dict[str, float]:
    """The scores a list has room for: the model's, not those that stand beside them."""
    return {k: v for k, v in final_scores(run).items() if not k.endswith((*ASIDE, "nfe"))}


def named(name: str, rows: Sequence[ListedRun], option: str) -> str:
    """The fact, score or option that is meant by a name, or by the end of it.

    Raises:
        ValueError: no run has it.
    """
    known = dict.fromkeys((*FACTS, *(n for r in rows for n in (*r.scores, *r.options))))
    ends = [n for n in known if n.endswith(f".{name}")]
    if name in known or len(ends) == 1:
        return name if name in known else ends[0]
    raise ValueError(f"{option} {name}: no run has it; {choices(name, known)}")


def ordered(rows: Sequence[ListedRun], name: str, descending: bool) -> list[ListedRun]:
    """Rows by a value, numbers before words; those that have none come last."""
    there = [r for r in rows if r.value(name) is not None]
    there.sort(key=lambda r: rank(r.value(name)), reverse=descending)
    return there + [r for r in rows if r.value(name) is None]


def rank(value: Any) -> tuple[bool, Any]:
    number = isinstance(value, int | float)
    return (not number, value if number else str(value))


def table(rows: Sequence[ListedRun]) -> Table:
    """Options and scores as columns where all runs are of one experiment, as words otherwise."""
    odd = list(differing_values(rows))
    one = len({r.experiment for r in rows if r.experiment}) <= 1
    axes = list(dict.fromkeys(name for values in odd for name in values))
    scores = list(dict.fromkeys(name for r in rows for name in r.scores))
    printed = Table(*FACTS, *((*axes, *scores) if one else ("differs in", "scores")), box=None)
    for row, values in zip(rows, odd, strict=True):
        step = "" if row.step is None else str(row.step)
        words = [str(row.run.path), row.status, step, row.started]
        words += columns(row, values, axes, scores) if one else in_words(row, values)
        printed.add_row(*map(escape, words))
        if row.wrong:
            printed.add_row(escape(f"  {row.wrong}"))
    return printed


def columns(
    row: ListedRun, values: Options, axes: Sequence[str], scores: Sequence[str]
) -> list[str]:
    middle = [called(values[a]) if a in values else "" for a in axes]
    return middle + [f"{row.scores[s]:.4g}" if s in row.scores else "" for s in scores]


def in_words(row: ListedRun, values: Options) -> list[str]:
    middle = " ".join(f"{axis}={called(v)}" for axis, v in values.items())
    return [middle, "  ".join(f"{name} {v:.4g}" for name, v in row.scores.items())]


def differing_values(rows: Sequence[ListedRun]) -> Iterator[Options]:
    """The values of each run where the runs of its experiment differ."""
    peers: dict[str, list[Options]] = {}
    for row in (r for r in rows if r.options):
        peers.setdefault(row.experiment, []).append(row.options)
    labels = {e: {a: Labels.of(a, some) for a in differing(some)} for e, some in peers.items()}
    for row in rows:
        named = labels[row.experiment].items() if row.options else ()
        yield {axis: label(row.options) for axis, label in named}

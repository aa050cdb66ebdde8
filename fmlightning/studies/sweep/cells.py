"""The cells of a sweep: the product of its axes and seeds, and the command line of each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fmlightning.studies.sweep.file import Sweep, same_label


@dataclass(frozen=True)
class SweepCell:
    """One training.

    Attributes:
        axes: the value or label of each axis.
        options: what the axes set.
        seed: of the run.
        run: its directory.
        max_steps: its length, -1 where only the clock or the epochs end it.
        metrics: those of its config.
    """

    axes: dict[str, Any]
    options: dict[str, Any]
    seed: int
    run: Path = Path()
    max_steps: int = -1
    metrics: tuple[Any, ...] = ()

    @property
    def combination(self) -> str:
        """Its axes in words, without the seed."""
        return ", ".join(f"{name}={label}" for name, label in self.axes.items())

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.combination, f"seed={self.seed}")))


def cells(sweep: Sweep) -> list[SweepCell]:
    """All cells that are not excluded, one seed after the other: a sweep that is stopped has whole comparisons.

    Raises:
        ValueError: none is left, or a rule excludes nothing.
    """
    every = [SweepCell(*combined, seed) for seed in sweep.seeds for combined in combinations(sweep)]
    for rule in sweep.exclude:
        if not any(excluded(cell, rule) for cell in every):
            raise ValueError(f"{sweep.path}: exclude: no cell is {rule}")
    kept = [c for c in every if not any(excluded(c, rule) for rule in sweep.exclude)]
    if not kept:
        raise ValueError(f"{sweep.path}: exclude: no cell is left of {len(every)}")
    return kept


def combinations(sweep: Sweep) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Labels and options of the product of the axes."""
    for levels in product(*(axis.levels for axis in sweep.axes)):
        labels: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for level in levels:
            labels |= level.label
            options |= level.options
        yield labels, options


def excluded(cell: SweepCell, rule: dict[str, list[Any]]) -> bool:
    labels = {**cell.axes, "seed": cell.seed}
    return all(
        any(same_label(labels[name], value) for value in values) for name, values in rule.items()
    )


def fit_arguments(sweep: Sweep, options: dict[str, Any]) -> list[str]:
    """The command line of a training, without its seed."""
    files = [word for name in sweep.configs for word in ("--config", name)]
    given = {**sweep.settings, **options}
    # a class before its own arguments, which a change of the class would drop
    words = [f"--{o}={shown(given[o])}" for o in sorted(given, key=lambda o: o.count("."))]
    return [*files, f"--experiment={sweep.name}", *words]


def evaluate_arguments(sweep: Sweep) -> list[str]:
    """The options of `fmlightning evaluate` for each run."""
    words = {
        k: json.dumps(v) if k in ("metrics", "grids") else listed(v)
        for k, v in sweep.evaluate.items()
    }
    return [f"--{key}={value}" for key, value in words.items()]


def listed(value: Any) -> str:
    """A list as evaluate reads it, with commas."""
    return ",".join(map(shown, value)) if isinstance(value, list) else shown(value)


def shown(value: Any) -> str:
    """A value as it stands on the command line."""
    return value if isinstance(value, str) else json.dumps(value)

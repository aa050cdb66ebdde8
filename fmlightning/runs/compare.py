r"""Two runs of one config held against each other.

A metric of the first run, a_k in row k, and b_k of the second differ by

    difference = max_k |a_k - b_k| / max(|a_k|, |b_k|, median_k |a_k|)                          (1)

where the median keeps a metric that crosses zero from being held against zero. Tensors a and b differ by
|a - b| / |a|, over all of a group together. A difference is 0 only where all bits are the same.
"""

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmlightning.runs.directory import Run
from fmlightning.runs.metrics_csv import read_columns

if TYPE_CHECKING:
    from torch import Tensor

WALL_CLOCK = re.compile(r"(^|[/_])(seconds|time|elapsed|wall|[a-z]+_per_(s|sec|second))($|[/_])")


@dataclass(frozen=True)
class Record:
    """The results of a run.

    Attributes:
        manifest: of the run.
        metrics: for each column of metrics.csv and each score its values by step; a score has one.
        tensors: for the weights, their average and the optimiser's state the tensors by name.
    """

    manifest: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    tensors: dict[str, dict[str, "Tensor"]]

    @classmethod
    def read(cls, run: Run) -> "Record":
        """All of a run.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
        """
        metrics = read_metrics(run) | read_scores(run)
        return cls(run.manifest, metrics, read_tensors(run.checkpoint()))


def read_metrics(run: Run) -> dict[str, dict[str, float]]:
    """The columns of metrics.csv, by step."""
    path = run.path / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{run.path} has no metrics.csv, so there is nothing to compare")
    columns = read_columns(path)
    return {n: {f"step {step}": v for step, v in points} for n, points in columns.items()}


def read_scores(run: Run) -> dict[str, dict[str, float]]:
    scores = run.evaluation.get("metrics", {})
    try:
        return {f"evaluation.json {name}": {"the end": float(v)} for name, v in scores.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{run.path / 'evaluation.json'} is damaged: {error}") from error


def read_tensors(path: Path) -> dict[str, dict[str, "Tensor"]]:
    """The tensors of a checkpoint, in groups."""
    from fmlightning.runs.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("shadow", {})
    groups = {
        "weights": checkpoint["state_dict"],
        "EMA": average,
        "optimiser": checkpoint.get("optimizer_states", []),
    }
    return {name: found for name, tree in groups.items() if (found := dict(flat_tensors(tree)))}


def flat_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, "Tensor"]]:
    """The tensors of nested dicts and lists, by dotted name."""
    import torch

    if isinstance(tree, torch.Tensor):
        yield name, tree
    branches = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
    for key, branch in branches.items() if isinstance(branches, dict) else ():
        yield from flat_tensors(branch, f"{name}.{key}" if name else str(key))


@dataclass(frozen=True)
class Row:
    """The comparison of one metric or group of tensors.

    Attributes:
        name: of the metric or group of tensors.
        count: values compared.
        difference: as in (1); 0 only where all are identical, infinite where one is missing.
        where: the step or the tensor of the largest difference.
    """

    name: str
    count: int
    difference: float
    where: str = ""

    def verdict(self, rtol: float) -> str:
        if self.difference == 0:
            return "identical"
        return "within tolerance" if self.difference <= rtol else "different"


def by_the_clock(name: str) -> bool:
    """True for a metric that measures the machine and not the model."""
    return bool(WALL_CLOCK.search(name))


def compare(then: Record, now: Record) -> list[Row]:
    """All rows but those of the wall clock."""
    metrics = [n for n in {**then.metrics, **now.metrics} if not by_the_clock(n)]
    rows = [compare_metric(n, then.metrics.get(n, {}), now.metrics.get(n, {})) for n in metrics]
    groups = {**then.tensors, **now.tensors}
    return rows + [
        compare_tensors(n, then.tensors.get(n, {}), now.tensors.get(n, {})) for n in groups
    ]


def compare_metric(name: str, then: dict[str, float], now: dict[str, float]) -> Row:
    """Equation (1)."""
    size = len(then.keys() | now.keys())
    if then.keys() != now.keys():
        return Row(name, size, math.inf, missing(list(then), list(now)))
    typical = statistics.median([abs(v) for v in then.values() if math.isfinite(v)] or [0.0])
    where = max(then, key=lambda step: relative(then[step], now[step], typical))
    difference = relative(then[where], now[where], typical)
    return Row(name, size, difference, where if difference else "")


def relative(a: float, b: float, typical: float) -> float:
    """The difference of two numbers; two that are not finite are the same, or infinitely far apart."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    difference = abs(a - b) / max(abs(a), abs(b), typical)
    return difference if math.isfinite(difference) else math.inf


def compare_tensors(name: str, then: dict[str, "Tensor"], now: dict[str, "Tensor"]) -> Row:
    """|a - b| / |a| over all tensors of a group; zero where `torch.equal` says so of each."""
    import torch

    size = len(then.keys() | now.keys())
    if then.keys() != now.keys():
        return Row(name, size, math.inf, missing(list(then), list(now)))
    for key, tensor in then.items():
        if tensor.shape != now[key].shape or tensor.dtype != now[key].dtype:
            return Row(name, size, math.inf, key)
    unequal = [key for key in then if not torch.equal(then[key], now[key])]
    if not unequal:
        return Row(name, size, 0.0)
    apart = {key: float((then[key].double() - now[key].double()).norm()) for key in unequal}
    # without scalars: the steps an optimiser has counted would outweigh its moments
    norm = math.hypot(*(float(tensor.double().norm()) for tensor in then.values() if tensor.ndim))
    difference = math.hypot(*apart.values()) / norm if norm else math.inf
    where = max(unequal, key=lambda key: apart[key])
    return Row(name, size, difference if difference < math.inf else math.inf, where)


def missing(then: list[str], now: list[str]) -> str:
    """The first name that only one of two runs has."""
    lost = [name for name in then if name not in now]
    return f"no {lost[0]} now" if lost else f"no {next(n for n in now if n not in then)} then"

"""Two interfaces: metrics of generated samples, and metrics of the trained model itself.

Both are torchmetrics' metrics that are fitted to reference data, name what they return, and say in which direction
each of these numbers is better. `evaluator.py` runs them.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fmlightning.flow.shapes import Labels, Points
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Source
from fmlightning.metrics.reference import ReferenceData

ASIDE = ("_std", "_se", "_low", "_high", "_floor", "_real")
"""Endings of numbers that stand beside a score: its spread, or the score of real samples."""


def by_name(**higher_is_better: bool | None) -> Any:
    """The `higher_is_better` of a metric that returns several numbers; None: neither, as for a diagnostic."""
    return higher_is_better


class FlowMetric(Metric):
    """What both kinds of metric share; inherit from `SampleMetric` or `ModelMetric`.

    `fit_reference`, or `prepare`, is called once with real samples; `compute` returns named numbers. A name that ends
    in `_floor` or `_real` is the score of real samples: what a perfect model would reach with as many samples.

    Attributes:
        higher_is_better: whether more is better, for all numbers alike, or by name, where `kid` stands for `kid@350`
            and `kid_digits@350` too. None in such a table: neither. Each metric must give it.
    """

    full_state_update = False
    higher_is_better: Any = None

    def __init__(self) -> None:
        super().__init__()
        if type(self).higher_is_better is None:
            raise ValueError(
                f"{type(self).__name__}.higher_is_better is missing: without it no report knows which of two scores is "
                "better. Set it to True, to False, or to {name of a score: True, False or None}"
            )

    def fit_reference(self, real: ReferenceData) -> None:
        """Take the real samples of a DataModule: whole, but for metrics of sets that fit into no memory."""
        reference, held_out = real.eval_samples("reference"), real.eval_samples("test")
        labels = (reference["y"], held_out["y"]) if "y" in held_out else None
        self.prepare(reference["x1"], held_out["x1"], labels, real.num_bins)

    def provenance(self) -> dict[str, str]:
        """The files that the scores depend on beside the samples, by name, for their record."""
        return {}

    @abstractmethod
    def prepare(
        self,
        reference: Points,
        held_out: Points,
        labels: tuple[Labels, Labels] | None,
        num_bins: int | None,
    ) -> None:
        """Take the real samples.

        Args:
            reference: what generated samples are compared with, or classifiers are trained on.
            held_out: as many real samples as the metric wants, independent of the reference.
            labels: the classes of both, if there are any.
            num_bins: number of values of a pixel, as in `FlowData.num_bins`.

        Raises:
            ValueError: the data do not suit this metric.
        """

    def check(self, held_out: Points, y: Labels | None, num_bins: int | None) -> None:
        """Refuse early, and at no cost, what `prepare` would refuse.

        Raises:
            ValueError: the data do not suit this metric.
        """

    def shrink(self, found: int) -> None:
        """Want fewer real samples, where the data have no more; by default what is wanted stays, and is checked.

        Args:
            found: the held-out samples that there are.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]: ...

    def directions(self, names: Iterable[str]) -> dict[str, bool | None]:
        """Whether more is better, for each of the numbers that `compute` returned."""
        return {name: self.direction(name) for name in names}

    def direction(self, name: str) -> bool | None:
        if name.endswith(ASIDE):
            return None
        if isinstance(self.higher_is_better, bool):
            return self.higher_is_better
        stem = name.partition("@")[0]
        for known in sorted(self.higher_is_better, key=len, reverse=True):
            if stem == known or stem.startswith(f"{known}_"):
                return self.higher_is_better[known]
        warnings.warn(
            f"{type(self).__name__}.higher_is_better does not name {stem}, which counts as neither better nor worse",
            stacklevel=1,
        )
        return None

    def state_tensors(self, name: str) -> Tensor:
        """A list state as one tensor, before or after synchronisation."""
        value: Any = getattr(self, name)
        return torch.cat(value) if isinstance(value, list) else value


class SampleMetric(FlowMetric):
    """Scores generated samples, beside the same score of held-out real ones.

    `update` is called with the generated samples, in any order and on any process.
    """

    num_samples: int
    """Generated samples that it wants, at least 1."""

    @abstractmethod
    def update(self, x: Points, index: Labels, y: Labels | None = None) -> None:
        """Take generated samples, their numbers and the classes they were requested for."""


class ModelMetric(FlowMetric):
    """Scores the trained model itself, whatever samples are drawn with: its likelihood, or the energy of its paths."""

    @abstractmethod
    def evaluate_model(
        self,
        field: TrainedField,
        source: Source,
        distribution: Source | None,
        rank: int,
        world_size: int,
    ) -> None:
        """Take the model.

        Args:
            field: the trained velocity field.
            source: the distribution it starts from.
            distribution: that of the data, where it is known.
            rank: this process, which takes its share of the work.
            world_size: the number of processes.
        """

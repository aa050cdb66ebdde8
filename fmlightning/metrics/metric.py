"""What a metric of generated samples is: a torchmetrics metric that also says what real samples score."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fmlightning.flow.shapes import Labels, Points
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Source
from fmlightning.metrics.reference import ReferenceData


class Judge(Metric):
    """Scores generated samples, beside the same score of held-out real ones.

    `meet`, or `prepare`, is called once with real samples; `update` with the generated ones, in any order and on any
    process; `compute` returns named numbers. A name that ends in `_floor` or `_real` is the score of real
    samples: what a perfect model would reach with as many samples.
    """

    full_state_update = False

    num_samples: int
    """How many generated samples it wants; 0 for none."""

    def meet(self, real: ReferenceData) -> None:
        """Take the real samples of a DataModule: whole, but for judges of sets that fit into no memory."""
        reference, held_out = real.eval_samples("reference"), real.eval_samples("test")
        labels = (reference["y"], held_out["y"]) if "y" in held_out else None
        self.prepare(reference["x1"], held_out["x1"], labels, real.num_bins)

    def rests_on(self) -> dict[str, str]:
        """What the scores depend on beside the samples, by name, for their record."""
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
            held_out: as many real samples as the judge wants, independent of the reference.
            labels: the classes of both, if there are any.
            num_bins: number of values of a pixel, as in `FlowData.num_bins`.

        Raises:
            ValueError: the data do not suit this judge.
        """

    def look(
        self, field: TrainedField, source: Source, law: Source | None, rank: int, world_size: int
    ) -> None:
        """Take the model itself, for scores that its samples do not tell; most judges have no use for it.

        Args:
            field: the trained velocity field.
            source: the law it starts from.
            law: the law of the data, where there is one.
            rank: this process, which takes its share of the work.
            world_size: the number of processes.
        """

    def check(self, held_out: Points, y: Labels | None, num_bins: int | None) -> None:
        """Say early, and at no cost, what `prepare` would refuse.

        Raises:
            ValueError: the data do not suit this judge.
        """

    @abstractmethod
    def update(self, x: Points, index: Labels, y: Labels | None = None) -> None:
        """Take generated samples, their numbers and the classes they were asked for."""

    @abstractmethod
    def compute(self) -> dict[str, float]: ...

    def state_tensors(self, name: str) -> Tensor:
        """A list state as one tensor, before or after synchronisation."""
        value: Any = getattr(self, name)
        return torch.cat(value) if isinstance(value, list) else value

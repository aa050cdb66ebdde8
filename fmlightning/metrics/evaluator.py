"""The evaluation of a flow, in one place: for training, `evaluate` and `sample`.

    sample numbers -> labels -> solver -> decoded samples -> metrics

Sample k is a function of its number, so the blocks can be dealt to any number of processes.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from fmlightning.flow.shapes import Labels, Points
from fmlightning.flow.solvers.solution import Solution, SolverError
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Source
from fmlightning.metrics.metric import FlowMetric, ModelMetric, SampleMetric
from fmlightning.metrics.reference import ReferenceData, SampledData, rank_and_size


@dataclass(frozen=True)
class Block:
    """Generated samples.

    Attributes:
        index: their numbers, (B,).
        y: the labels they were requested for, (B,).
        x: the samples, decoded, (B, *S).
        solution: as the solver gave them; None where the block is empty.
    """

    index: Tensor
    y: Labels | None
    x: Points
    solution: Solution | None


class Cost(NamedTuple):
    """What generated samples cost: the largest NFE of a block, and seconds over all processes."""

    samples: int
    nfe: int
    seconds: float


@dataclass
class Scores:
    """Numbers by name, and for each whether more of it is better; None: neither."""

    values: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)

    def add(self, values: dict[str, float], higher_is_better: dict[str, bool | None]) -> None:
        self.values |= values
        self.higher_is_better |= higher_is_better


def unlabelled(index: Tensor) -> None:
    """No labels."""


def as_it_is(x: Points) -> Points:
    """A sample that needs no decoding."""
    return x


@dataclass(frozen=True)
class Evaluator:
    """The loop over blocks of sample numbers.

    Args:
        solve: the samples with some numbers and labels.
        device: where they are made.
        batch_size: samples made at once. The NFE of an adaptive solver depends on it; the number of processes does
            not change it.
        labels: the labels of sample numbers.
        decode: from samples of the flow to samples of `event_shape`.
        event_shape: of one decoded sample; needed where a process may have no share.
        before_block: called by every process before each round of blocks.
    """

    solve: Callable[[Tensor, Labels | None], Solution]
    device: torch.device
    batch_size: int
    labels: Callable[[Tensor], Labels | None] = unlabelled
    decode: Callable[[Points], Points] = as_it_is
    event_shape: tuple[int, ...] = ()
    before_block: Callable[[], None] = lambda: None

    def blocks(self, index: Tensor) -> Iterator[tuple[Block, float]]:
        """This process's blocks of some samples, and the seconds that each took: as many blocks on every process."""
        rank, world_size = rank_and_size()
        for first in range(0, len(index), self.batch_size * world_size):
            self.before_block()
            start = first + rank * self.batch_size
            yield self.block(index[start : start + self.batch_size].to(self.device))

    def block(self, index: Tensor) -> tuple[Block, float]:
        """The samples with these numbers; with none, an empty block, for a process without a share."""
        y = self.labels(index)
        if not len(index):
            return Block(index, y, torch.zeros(0, *self.event_shape, device=self.device), None), 0.0
        began = self.now()
        solution = self.solve(index, y)
        seconds = self.now() - began
        return Block(index, y, self.decode(solution.x), solution), seconds

    def now(self) -> float:
        """The time when the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def update(
        self,
        metrics: Sequence[SampleMetric],
        total: int,
        observe: Callable[[Block], None] = lambda block: None,
    ) -> Cost:
        """Update each metric with its samples.

        Args:
            metrics: each takes as many as it wants of the first samples.
            total: samples to make.
            observe: called with each block that has samples.

        Raises:
            SolverError: some samples could not be integrated.
        """
        nfe, seconds = 0, 0.0
        for block, took in self.blocks(torch.arange(total)):
            if block.solution is not None:
                require_all(block.solution, block.index)
                observe(block)
                nfe, seconds = max(nfe, block.solution.nfe), seconds + took
            for metric in metrics:
                mine = block.index < metric.num_samples
                y = None if block.y is None else block.y[mine]
                metric.update(block.x[mine], block.index[mine], y)
        return Cost(total, int(self.over_all(nfe, "max")), self.over_all(seconds, "sum"))

    def over_all(self, value: float, how: str) -> float:
        """A number over all processes."""
        if rank_and_size()[1] == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total, getattr(distributed.ReduceOp, how.upper()))
        return float(total)


def of_samples(metrics: Iterable[FlowMetric]) -> list[SampleMetric]:
    return [metric for metric in metrics if isinstance(metric, SampleMetric)]


def of_model(metrics: Iterable[FlowMetric]) -> list[ModelMetric]:
    return [metric for metric in metrics if isinstance(metric, ModelMetric)]


def fit_reference(
    metrics: Iterable[FlowMetric],
    real: ReferenceData,
    device: torch.device,
    own: ReferenceData | None = None,
) -> None:
    """Give every metric the real samples.

    Args:
        metrics: of samples or of the model.
        real: what samples are compared with, after decoding.
        device: of the metrics.
        own: the data as the model sees them, for its own metrics; None where they are the same.
    """
    for metric in metrics:
        metric.to(device)
        metric.fit_reference(own if own is not None and isinstance(metric, ModelMetric) else real)


def evaluate_model(
    metrics: Iterable[FlowMetric],
    field: TrainedField,
    source: Source,
    distribution: Source | None,
) -> None:
    """Give the model to the metrics of a model."""
    for metric in of_model(metrics):
        metric.evaluate_model(field, source, distribution, *rank_and_size())


def computed(metrics: Iterable[FlowMetric]) -> Scores:
    """The scores of all metrics, which then start anew."""
    scores = Scores()
    for metric in metrics:
        values = metric.compute()
        scores.add(values, metric.directions(values))
        metric.reset()
    return scores


def provenance(metrics: Iterable[FlowMetric]) -> dict[str, str]:
    """The files that the scores depend on, by name."""
    return {k: v for metric in metrics for k, v in metric.provenance().items()}


def check_metrics(metrics: Iterable[FlowMetric], data: SampledData) -> None:
    """Refuse metrics that do not suit the data.

    Raises:
        ValueError: one of them says so, or scores the density of latents as if it were that of images.
    """
    held_out = data.pixel_data.shapes("test")
    for metric in metrics:
        if getattr(data, "exhausted", False):
            metric.shrink(len(held_out["x1"]))
        metric.check(held_out["x1"], held_out.get("y"), data.num_bins)
        if isinstance(metric, ModelMetric) and data.pixel_data.event_shape != data.event_shape:
            raise ValueError(
                f"evaluation.metrics: {type(metric).__name__} scores the model on images, and this one is of the "
                f"latents of {type(data).__name__}; take metrics of samples, such as Frechet"
            )


def require_all(solution: Solution, index: Tensor) -> None:
    """Refuse to score an incomplete set: without the samples that failed it is no sample of the model.

    Raises:
        SolverError: some failed.
    """
    failed = index[solution.failed].tolist()
    if failed:
        raise SolverError(
            f"{len(failed)} of {len(index)} samples could not be integrated (numbers {failed[:5]}), so they are not "
            "scored: loosen the tolerances (model.solver.rtol and atol; --tolerances of evaluate), or use a fixed-step "
            "method"
        )

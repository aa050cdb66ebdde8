"""Real samples that metrics compare with: read in blocks, or whole by metrics that need them so."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fmlightning.flow.shapes import Labels, Points

Batch = dict[str, Tensor]


class ReferenceData(Protocol):
    """Real samples in two splits, `reference` and `test`; every `FlowData` is one.

    Batches are `{"x1": (B, *S), "y": (B,)?}`.
    """

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def num_bins(self) -> int | None: ...

    @property
    def fingerprint(self) -> str | None:
        """A digest of the reference, or None: then nothing about it is kept."""

    def shapes(self, split: str) -> Batch:
        """Tensors of the shapes of `eval_samples`, perhaps without content."""

    def eval_samples(self, split: str) -> Batch:
        """A whole split."""

    def eval_batches(self, split: str) -> Iterable[Batch]:
        """This process's share of a split in blocks, with the `index` of each sample."""


class SampledData(Protocol):
    """The data of a flow, as far as its evaluation needs them; every `FlowData` is one."""

    @property
    def pixel_data(self) -> ReferenceData:
        """The data that generated samples are compared with, after decoding."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the flow."""

    @property
    def num_bins(self) -> int | None: ...


@dataclass(frozen=True)
class ReferenceSamples:
    """Real samples that every process holds whole.

    Args:
        reference: what generated samples are compared with.
        held_out: independent of the reference.
        labels: the classes of both, if there are any.
        num_bins: number of values of a pixel, as in `FlowData.num_bins`.
    """

    reference: Points
    held_out: Points
    labels: tuple[Labels, Labels] | None = None
    num_bins: int | None = None
    fingerprint: str | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.reference.shape[1:])

    @property
    def num_classes(self) -> int:
        return int(self.labels[0].max()) + 1 if self.labels else 0

    def shapes(self, split: str) -> Batch:
        return self.eval_samples(split)

    def eval_samples(self, split: str) -> Batch:
        number = ("reference", "test").index(split)
        x1 = (self.reference, self.held_out)[number]
        return {"x1": x1, "y": self.labels[number]} if self.labels else {"x1": x1}

    def eval_batches(self, split: str) -> Iterator[Batch]:
        samples = self.eval_samples(split)
        index = torch.arange(len(samples["x1"]))
        rank, world_size = rank_and_size()
        for rows in index.tensor_split(world_size)[rank].split(500):
            yield {name: value[rows] for name, value in samples.items()} | {"index": rows}


def rank_and_size() -> tuple[int, int]:
    """This process among all of them."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def spread(size: int, count: int) -> Tensor:
    """`count` numbers below `size` in even steps: of a set sorted by class, as many of each."""
    return torch.arange(count) * size // count

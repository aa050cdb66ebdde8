r"""Distances of optimal transport between samples.

    W2(p, q)^2 = min over couplings of E |x - y|^2                                 (1)

The distance between two samples of one distribution is not zero: it falls with the sample size, in the plane about as
n^(-1/2). So it is given with that size, and beside the distance between two samples of the data.

Source: Peyre and Cuturi 2019, Computational Optimal Transport, arXiv:1803.00567.
"""

import warnings

import ot
import torch
from torch import Tensor

from fmlightning.flow.shapes import Labels, Points, flat
from fmlightning.metrics.metric import SampleMetric, by_name


def wasserstein2(x: Points, y: Points) -> float:
    """The 2-Wasserstein distance (1) between two samples, exactly, by POT's network simplex."""
    cost = ot.dist(flat(x).double().cpu(), flat(y).double().cpu())
    a, b = (torch.full((len(z),), 1 / len(z), dtype=torch.float64) for z in (x, y))
    return float(ot.emd2(a, b, cost, numItermax=2_000_000)) ** 0.5


class Wasserstein(SampleMetric):
    """The 2-Wasserstein distance to the data: `w2`, its spread over subsets `w2_std`, and the floor.

    Args:
        subsets: number of disjoint subsets; fewer of them where a file has fewer rows, which is warned of.
        size: samples in each; at most those rows.
    """

    higher_is_better = by_name(w2=False)
    samples: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, subsets: int = 5, size: int = 2000) -> None:
        super().__init__()
        if subsets < 1 or size < 1:
            raise ValueError(f"subsets={subsets} and size={size} must be at least 1")
        self.subsets, self.size = subsets, size
        self.num_samples = subsets * size
        self.add_state("samples", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def prepare(
        self,
        reference: Points,
        held_out: Points,
        labels: tuple[Labels, Labels] | None,
        num_bins: int | None,
    ) -> None:
        for x in (reference, held_out):
            self.check(x, None, num_bins)
        self.held_out = held_out[: self.num_samples]
        self.floor = self.distances(reference[: self.num_samples])

    def check(self, held_out: Points, y: Labels | None, num_bins: int | None) -> None:
        if len(held_out) < self.num_samples:
            raise ValueError(
                f"evaluation.metrics: Wasserstein needs subsets x size = {self.num_samples} real samples and the data "
                f"has {len(held_out)}; choose fewer or a larger data.test_size"
            )

    def shrink(self, found: int) -> None:
        """Compare with fewer real samples, where there are no more; subsets keep their size as far as they can."""
        if found >= self.num_samples:
            return
        wanted, self.size = f"{self.subsets} of {self.size}", min(self.size, found)
        self.subsets = found // self.size
        self.num_samples = self.subsets * self.size
        warnings.warn(
            f"evaluation.metrics: the data has {found} different real samples for testing and no more: w2 is of "
            f"subsets x size = {self.subsets} of {self.size} and not {wanted}",
            stacklevel=1,
        )

    def distances(self, x: Points) -> torch.Tensor:
        """The distance of each subset to one of held-out data."""
        pairs = zip(x.split(self.size), self.held_out.split(self.size), strict=True)
        return torch.tensor([wasserstein2(a, b) for a, b in pairs])

    def update(self, x: Points, index: Labels, y: Labels | None = None) -> None:
        self.samples.append(x)
        self.numbers.append(index)

    def compute(self) -> dict[str, float]:
        x, index = self.state_tensors("samples"), self.state_tensors("numbers")
        w2 = self.distances(x[index.argsort()])  # subsets are the same on any number of processes
        return {**summary("w2", w2), **summary("w2_floor", self.floor)}


def summary(name: str, values: Tensor) -> dict[str, float]:
    """The mean of the subsets and, where there are several, their standard deviation."""
    mean = {name: float(values.mean())}
    return mean | {f"{name}_std": float(values.std())} if len(values) > 1 else mean

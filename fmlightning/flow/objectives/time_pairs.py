r"""Pairs of training times s <= t, for flow maps: from which time, to which.

As the times of `time_samplers`, pairs are made of keyed uniform numbers, two of them here, and placed on the interval
of the path; time runs from the source at 0 to the data at 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmlightning.flow.objectives.time_samplers import TimeSampler, Uniform
from fmlightning.flow.shapes import PerSample


class TimePairs(ABC):
    """A distribution of two times s <= t of [0, 1]."""

    @abstractmethod
    def of(self, u: PerSample, v: PerSample) -> tuple[PerSample, PerSample]:
        """The pair (s, t) of two independent uniform numbers of (0, 1)."""

    def draw(
        self, u: PerSample, v: PerSample, t_range: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[PerSample, PerSample]:
        """Pairs on the interval of a path."""
        low, high = t_range
        s, t = self.of(u, v)
        return low + (high - low) * s, low + (high - low) * t


@dataclass(frozen=True)
class SortedPairs(TimePairs):
    """Two times of one distribution, in order; of the uniform one the pairs fill their triangle evenly.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, sec. 4.3, with LogitNormal.

    Args:
        times: the distribution of both.
    """

    times: TimeSampler = field(default_factory=Uniform)

    def of(self, u: PerSample, v: PerSample) -> tuple[PerSample, PerSample]:
        s, t = self.times.draw(u), self.times.draw(v)
        return torch.minimum(s, t), torch.maximum(s, t)


@dataclass(frozen=True)
class DyadicPairs(TimePairs):
    """A step of length 2^-k, each k equally often, from one of its multiples: the times of shortcut models.

    Source: Frans et al. 2024, arXiv:2410.12557, sec. 3.

    Args:
        levels: k = 0 ... levels - 1; 7 has steps down to 1/64, whose halves are the 128 of the paper.
    """

    levels: int = 7

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels={self.levels} must be at least 1")

    def of(self, u: PerSample, v: PerSample) -> tuple[PerSample, PerSample]:
        # rounding may bring u to 1
        steps = 2.0 ** (u * self.levels).floor().clamp(max=self.levels - 1)
        s = (v * steps).floor().minimum(steps - 1) / steps
        return s, s + 1 / steps


@dataclass(frozen=True)
class ToTheEnd(TimePairs):
    """From a time of the distribution to the end of the path: all that one-step models and distillation need.

    Args:
        times: the distribution of s.
    """

    times: TimeSampler = field(default_factory=Uniform)

    def of(self, u: PerSample, v: PerSample) -> tuple[PerSample, PerSample]:
        s: Tensor = self.times.draw(u)
        return s, torch.ones_like(s)

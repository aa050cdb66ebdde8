r"""Distributions that can be drawn from: where a flow starts.

A distribution is a map of uniform and normal numbers to points, so that it can be drawn in two ways: a whole batch
from one generator (`sample`), or row by row from keyed streams (`sample_keyed`), where row i is the same in any batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import PerSample, Points, flat


class Source(ABC):
    """A distribution p0 or q. `num_uniforms` and `transform` define it; `log_prob` where it is known."""

    num_uniforms: int = 0
    """Uniform numbers that one sample takes, beside one normal number for each of its dimensions."""

    event_shape: tuple[int, ...] | None = None
    """The shape of one sample, or None if the distribution exists in every shape."""

    gaussian: bool = False
    """True for N(0, I), which scores and stochastic samplers need."""

    paired: bool = False
    """True where each x0 comes with its x1, from the data: there is nothing to draw."""

    @abstractmethod
    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        """Points from uniform numbers u (B, num_uniforms) in (0, 1) and normal numbers z (B, *S)."""

    def log_prob(self, x: Points) -> PerSample:
        """Log-density in nats.

        Raises:
            ValueError: the density of this distribution is not known.
        """
        raise ValueError(
            f"{type(self).__name__} has no known density; use a source that has one, such as Gaussian"
        )

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A batch of shape (B, *S), drawn on the generator's device."""
        self.check(shape)
        device = generator.device
        u = torch.rand(shape[0], self.num_uniforms, generator=generator, device=device, dtype=dtype)
        z = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return self.transform(u, z)

    def sample_keyed(
        self, streams: KeyedStreams, event_shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """One sample for each row of a keyed stream, (B, *S)."""
        self.check((len(streams.index), *event_shape))
        u = streams.uniform((self.num_uniforms,), stream=1, dtype=dtype)
        return self.transform(u, streams.normal(event_shape, dtype=dtype))

    def part(self, split: str) -> "Source":
        """The distribution of a split of the data: itself, unless it is a finite set that is shared out."""
        return self

    def check(self, shape: Sequence[int]) -> None:
        if hasattr(type(self), "uniforms"):
            raise ValueError(
                f"{type(self).__name__} says uniforms, which is called num_uniforms now: rename it"
            )
        if self.event_shape is not None and tuple(shape[1:]) != self.event_shape:
            raise ValueError(
                f"{type(self).__name__} gives samples of shape {self.event_shape}, "
                f"but {tuple(shape[1:])} was asked for"
            )


@dataclass(frozen=True)
class Gaussian(Source):
    """The standard normal distribution N(0, I), in any shape."""

    gaussian = True

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        return z

    def log_prob(self, x: Points) -> PerSample:
        x = flat(x)
        return -0.5 * (x.square().sum(1) + x.shape[1] * math.log(2 * math.pi))


@dataclass(frozen=True, eq=False)
class PairedSource(Source):
    """Points that come with the data: sample k starts at the k-th of them, in turn.

    Training takes each x0 from its batch, beside the x1 that it belongs to; sampling starts from the points held here.

    Args:
        points: held-out x0, (N, *S); none where the data has not been read.
    """

    points: Tensor = field(repr=False)

    paired = True

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.points.shape[1:])

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        """Nothing is drawn.

        Raises:
            ValueError: always.
        """
        raise ValueError("x0 comes with the data: there is no distribution to draw it from")

    def sample_keyed(
        self, streams: KeyedStreams, event_shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if not len(self.points):
            raise ValueError(
                "x0 comes with the data, and this model was loaded without it: give x0 to the solver yourself"
            )
        self.check((len(streams.index), *event_shape))
        chosen = streams.index.to(self.points.device) % len(self.points)
        return self.points[chosen].to(streams.index.device, dtype)

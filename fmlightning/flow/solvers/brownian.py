r"""Brownian paths: W(t) of sample k is a function of (seed, k, t) alone, whatever the steps of a solver.

The path on [0, 1] starts at W(0) = 0 with W(1) normal, and is refined by Levy's construction: in the middle of a
cell [a, b],

    W((a + b) / 2) = (W(a) + W(b)) / 2 + sqrt(b - a) / 2 z                                         (1)

Cell n of level l, of length 2^-l, has its own normal number z: draw 2^l + n of the sample's keyed stream; draw 0 is
W(1). A time between the cells of level `DEPTH` is met by one more draw, the Brownian bridge over its cell,

    W(t) = ((b - t) W(a) + (t - a) W(b)) / (b - a) + sqrt((t - a) (b - t) / (b - a)) z             (2)

so that increments over steps no shorter than 2^-DEPTH are independent N(0, h), exactly. Shorter steps are refused.

The cells around the last time are kept. A walk of N = 2^m equal steps draws N numbers, any other one about
N (DEPTH + 2 - log2 N), all numbers of a step in one call.

Source: Levy 1948, Processus stochastiques et mouvement brownien; Li et al. 2020, arXiv:2001.01328, sec. 4, and
Jelincic et al. 2024, arXiv:2405.06464, whose single-seed trees these are.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import Points

DEPTH = 16
RESOLUTION = 2.0**-DEPTH
"""The shortest step, 1.5e-5."""

CHUNK = 2**20
"""Normal numbers drawn at once: one call for all cells of a step is fast where points are small."""


@runtime_checkable
class Brownian(Protocol):
    """Brownian motion, as a solver sees it."""

    def increment(self, t0: float, t1: float) -> Points:
        """W(t1) - W(t0), (B, *S)."""


class Cell(NamedTuple):
    """A dyadic interval with the path at its ends."""

    level: int
    number: int
    left: Tensor
    right: Tensor

    def bounds(self) -> tuple[float, float]:
        width = 2.0**-self.level
        return self.number * width, (self.number + 1) * width

    def halves(self, z: Tensor) -> tuple["Cell", "Cell"]:
        """Equation (1)."""
        level, number, left, right = self
        middle = (left + right) / 2 + 2 ** (-level / 2 - 1) * z
        return (
            Cell(level + 1, 2 * number, left, middle),
            Cell(level + 1, 2 * number + 1, middle, right),
        )


class BrownianPath:
    """The Brownian paths of the samples of a batch.

    Args:
        streams: keyed streams of the samples, for this path alone.
        like: the points that it moves, (B, *S): their shape and precision, of float32 at least.

    Raises:
        ValueError: the streams do not match the points.
    """

    def __init__(self, streams: KeyedStreams, like: Points) -> None:
        if len(streams.index) != len(like):
            raise ValueError(
                f"{len(streams.index)} streams of noise do not match {len(like)} samples"
            )
        self.streams, self.shape, self.out = streams, like.shape[1:], like.dtype
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        (one,) = self.normals([0])
        self.whole = Cell(0, 0, torch.zeros_like(one), one)
        self.cells = [self.whole]
        """The cells from the last time on, the nearest last: each is split once in a walk forwards."""
        self.last = 0.0, self.whole.left

    def increment(self, t0: float, t1: float) -> Points:
        """W(t1) - W(t0), (B, *S).

        Raises:
            ValueError: the times leave [0, 1], or are nearer to each other than the path is resolved.
        """
        if not (t0 >= 0 and t0 + RESOLUTION <= t1 <= 1):
            raise ValueError(
                f"a Brownian path runs forwards over [0, 1] in steps of at least {RESOLUTION:.2g}, and not from "
                f"t={t0:g} to {t1:g}: take fewer steps, or UniformGrid"
            )
        before = self.last[1] if self.last[0] == t0 else self.at(t0)
        self.last = t1, self.at(t1)
        return (self.last[1] - before).to(self.out)

    def at(self, t: float) -> Points:
        """W(t), (B, *S)."""
        while self.cells and t > self.cells[-1].bounds()[1]:
            self.cells.pop()
        if not self.cells or t < self.cells[-1].bounds()[0]:
            self.cells = [self.whole]
        for z in self.normals(draws(t, self.cells[-1])):
            if self.cells[-1].level == DEPTH:
                return bridge(t, self.cells[-1], z)
            left, right = self.cells.pop().halves(z)
            self.cells += [right] if t > left.bounds()[1] else [right, left]
        cell = self.cells[-1]
        return cell.left if t == cell.bounds()[0] else cell.right

    def normals(self, draws: list[int]) -> list[Tensor]:
        """The normal numbers of some cells, each (B, *S)."""
        many = max(1, CHUNK // max(1, len(self.streams.index) * math.prod(self.shape)))
        found: list[Tensor] = []
        for first in range(0, len(draws), many):
            found += self.normals_at_once(draws[first : first + many])
        return found

    def normals_at_once(self, draws: list[int]) -> tuple[Tensor, ...]:
        words, index = self.streams
        stream = torch.tensor(draws, device=index.device).repeat_interleave(len(index))
        repeated = KeyedStreams(words, index.repeat(len(draws)))
        return repeated.normal(self.shape, stream, self.dtype).chunk(len(draws))


def draws(t: float, cell: Cell) -> list[int]:
    """The draws that lead from a cell around t to W(t): those of the cells that t lies inside."""
    level, number, found = cell.level, cell.number, []
    while level <= DEPTH and t * 2**level not in (number, number + 1):
        found.append(2**level + number)
        level += 1
        number = int(t * 2**level)
    return found


def bridge(t: float, cell: Cell, z: Tensor) -> Points:
    """Equation (2)."""
    low, high = cell.bounds()
    weight = (t - low) / (high - low)
    std = math.sqrt(weight * (high - t))
    return torch.lerp(cell.left, cell.right, weight) + std * z

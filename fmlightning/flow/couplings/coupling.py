"""The abstract coupling, and the refusals that all share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fmlightning.flow.couplings.potential import Potential
from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels, Points, flat
from fmlightning.flow.sources import Source

Conditions = Labels | Float[Tensor, "B K"]
"""Conditions that the network takes with each sample: a class, or K numbers."""

Indices = Int[Tensor, " B"]
Pairs = tuple[Indices, Indices]
Matrix = Float[Tensor, "B B"]


WIDE = 256
"""Dimensions from which on distances of float32 points are multiplied in float32."""


class Coupling(ABC):
    """A way to pair a batch of source points with a batch of data."""

    independent: bool = False
    """True where x0 is independent of x1: only then does a velocity give the score. Such pairs stay as they come."""

    identity: bool = False
    """True where points stay paired as they are drawn: there is nothing to solve."""

    fitted: bool = False
    """True where training pairs come from a potential that `fit` finds once, for a fixed set as a whole."""

    ot_batch_size: int | None = None
    """Number of points that are paired at a time; None for those of a global batch."""

    @abstractmethod
    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        """Index pairs: x0[i] belongs with x1[j] and y[j].

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            y: conditions of x1, if the network sees them: class labels, (B,), or numbers, (B, K).
            generator: the only source of randomness, drawn from where the plan is not a permutation.

        Raises:
            ValueError: x0 would depend on the labels, or the batches do not match.
        """

    def fit(self, x1: Points, source: Source, key: Key) -> Float[Tensor, " N"]:
        """The potential of a data set (N, *S), where the coupling is `fitted`: a function of the set and the key."""
        raise ValueError(f"{type(self).__name__} pairs batches, and fits no potential")

    def potential(self, x1: Points, g: Float[Tensor, " N"]) -> Potential:
        """A data set with its fitted potential, which gives training its pairs."""
        raise ValueError(f"{type(self).__name__} pairs batches, and has no potential")


@dataclass(frozen=True)
class Independent(Coupling):
    """Every source point with every data point equally: the pairs as they come."""

    independent = True
    identity = True

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        require_equal(x0, x1, y)
        everything = torch.arange(len(x1), device=x1.device)
        return everything, everything


def pair_blockwise(
    size: int | None,
    pairs: Callable[[Points, Points, Conditions | None], Pairs],
    x0: Points,
    x1: Points,
    y: Conditions | None = None,
) -> Pairs:
    """The pairs of each `size` points in a row, or of all."""
    if size is None or size >= len(x1):
        return pairs(x0, x1, y)
    parts = []
    for block in torch.arange(len(x1), device=x1.device).split(size):
        i, j = pairs(x0[block], x1[block], None if y is None else y[block])
        parts.append((block[i], block[j]))
    of_x0, of_x1 = zip(*parts, strict=True)
    return torch.cat(of_x0), torch.cat(of_x1)


def require_equal(x0: Points, x1: Points, y: Conditions | None) -> None:
    if x0.shape != x1.shape or (y is not None and len(y) != len(x1)):
        labels = "" if y is None else f" and y {tuple(y.shape)}"
        raise ValueError(
            f"x0 {tuple(x0.shape)}, x1 {tuple(x1.shape)}{labels} must have one shape, with a label for each sample"
        )


LARGEST = 20_000
"""Points whose matrix of costs, in float64, fills 3 GB; to pair them takes an hour."""


def require_size(ot_batch_size: int | None) -> None:
    if ot_batch_size is not None and not 1 <= ot_batch_size <= LARGEST:
        raise ValueError(
            f"ot_batch_size={ot_batch_size} must be from 1 to {LARGEST}, or null for the global batch; to pair with a "
            "whole data set: SemidiscreteOT"
        )


def refuse_labels(coupling: Coupling, y: Conditions | None) -> None:
    if y is not None:
        name = type(coupling).__name__
        raise ValueError(
            f"{name} with labels: x0 would depend on the label through x1, while sampling "
            "draws it without looking at the label, so every class would come out wrong. "
            f"{coupling_for_labels(name)}"
        )


def coupling_for_labels(name: str) -> str:
    """The remedy; a potential of the whole data set has no part for each class."""
    whole = "Use ClasswiseOT() or Independent, or leave the labels out."
    return (
        whole
        if name == "SemidiscreteOT"
        else f"Use ClasswiseOT(within={name}(...)) or Independent."
    )


def squared_distances(x0: Points, x1: Points) -> Matrix:
    """|x0_i - x1_j|^2 in float64, for points of any shape and precision."""
    if x0.shape != x1.shape:
        raise ValueError(
            f"x0 {tuple(x0.shape)} and x1 {tuple(x1.shape)} must have one shape (B, *S)"
        )
    a, b = flat(x0), flat(x1)
    # of so many dimensions the products are the longest part, and their rounding is far below the differences
    wide = a.shape[1] > WIDE and a.dtype != torch.float64
    a, b = (x.to(torch.float32 if wide else torch.float64) for x in (a, b))
    squares = [x.square().sum(1).double() for x in (a, b)]
    if not all(bool(s.isfinite().all()) for s in squares):
        raise ValueError(
            "x0 or x1 holds values that are not finite: there is no distance between them"
        )
    with torch.autocast(a.device.type, enabled=False):
        return (squares[0][:, None] + squares[1]).sub_((a @ b.T).double(), alpha=2)


def draw_columns(weights: Float[Tensor, "B N"], generator: torch.Generator) -> Indices:
    """A column for each row, with probabilities proportional to the row's weights."""
    return torch.multinomial(weights, 1, generator=generator)[:, 0]

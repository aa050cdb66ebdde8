r"""What objectives of flow maps share: rows on the diagonal, pairs of times elsewhere, and the weight of both.

On the diagonal, t = s, the average velocity u is the velocity, and is learned by regression as any flow:

    L = share * E |u(x_s, s, s) - u_s|^2  +  (1 - share) * L_off                                        (1)

L_off, one loss for each row of another t, makes u the average velocity of that flow.
"""

import warnings
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmlightning.flow.flow_maps import AverageVelocity, FlowMapField, takes_two_times
from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.objectives.cfm import mean_square
from fmlightning.flow.objectives.objective import Draw, Losses, Nets, Objective, Recipe
from fmlightning.flow.objectives.time_pairs import SortedPairs, TimePairs
from fmlightning.flow.shapes import PerSample, Points, require_positive

HIGH_FREQUENCY = 100.0
"""Above it the derivative in time of a fresh network is many times what it is to learn."""


@dataclass(frozen=True)
class AdaptiveWeight:
    """A weight of each row that falls with its own loss l, the sum over dimensions: 1 / (l + c)^p.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, eq. 22.

    Args:
        p: 1 makes every row count alike, whatever its error; 0 is no weight.
        c: keeps the weight of a small error finite.
    """

    p: float = 1.0
    c: float = 0.01

    def __post_init__(self) -> None:
        require_positive(self, "p", "c")

    def __call__(self, loss: PerSample, dimensions: int) -> PerSample:
        return loss / (loss.detach() * dimensions + self.c) ** self.p


class Pair(NamedTuple):
    """Rows off the diagonal: points of the path at s, and where they are to go.

    Attributes:
        x: x_s, (B, *S).
        v: its conditional velocity u_s, (B, *S).
        s: where they are, (B,).
        t: where they go, (B,).
        g: uniform numbers, (B,), for a time between the two.
    """

    x: Points
    v: Points
    s: PerSample
    t: PerSample
    g: PerSample

    @property
    def h(self) -> Tensor:
        """t - s, in the shape that multiplies x."""
        return (self.t - self.s).reshape(-1, *(1,) * (self.x.ndim - 1))


@dataclass(frozen=True)
class FlowMapObjective(Objective):
    """Equation (1); a subclass has `off`.

    Args:
        diagonal: the share of rows with t = s, trained as by CFM at the run's times.
        pairs: the distribution of (s, t) of the others.
        adaptive: a weight that falls with a row's own loss; none counts squared errors as they are.
    """

    diagonal: float = 0.75
    pairs: TimePairs = field(default_factory=SortedPairs)
    adaptive: AdaptiveWeight | None = None

    num_times: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if not 0 <= self.diagonal <= 1:
            raise ValueError(f"diagonal={self.diagonal} is a share of the rows, in [0, 1]")

    @abstractmethod
    def off(self, u: AverageVelocity, pair: Pair) -> PerSample:
        """The loss of rows off the diagonal, (B,), divided by their number of dimensions."""

    def check(self, recipe: Recipe, network: nn.Module, data: Any) -> None:
        name = f"model.objective={type(self).__name__}"
        if not takes_two_times(network):
            raise ValueError(
                f"{name} needs a network of two times, which {type(network).__name__} is not as it was built: set "
                "model.network.two_times=true"
            )
        if recipe.path.stochastic:
            raise ValueError(
                f"{name} needs a path that is one curve for each pair, and model.path={recipe.path} adds noise of its "
                "own (gamma > 0): take Linear, or another path without it"
            )
        highest = max(
            (float(b.max()) for n, b in network.named_buffers() if n.endswith("frequencies")),
            default=0.0,
        )
        if highest > HIGH_FREQUENCY and data is None:
            warnings.warn(
                f"{name} differentiates the network in time, and its frequencies reach {highest:g}: above "
                f"{HIGH_FREQUENCY:g} the derivative is mostly noise. model.network.frequencies=[1, 30] suits it",
                stacklevel=2,
            )

    def draw_times(self, recipe: Recipe, u: Any) -> Tensor:
        """A time of the run for the diagonal, the pair (s, t), and a number for a time between."""
        low, high = t_range = self.t_range(recipe.path)
        pair = self.pairs.draw(u[1], u[2], t_range)
        return torch.stack([recipe.times.draw(u[0], t_range), *pair, low + (high - low) * u[3]], 1)

    def model(self, nets: Nets, recipe: Recipe) -> FlowMapField:
        return FlowMapField(
            nets.network, recipe.path, source=recipe.source, independent=recipe.coupling.independent
        )

    def loss(self, nets: Nets, recipe: Recipe, draw: Draw) -> Losses:
        """Both losses of every row, in their shares: what held-out rows are scored by."""
        shares = (self.diagonal, self.on_diagonal), (1 - self.diagonal, self.off_diagonal)
        losses = [(share, loss(nets, recipe, draw)) for share, loss in shares if share > 0]
        weighted = [share * self.weighted(loss, draw.x1[0].numel()) for share, loss in losses]
        plain = [share * loss for share, loss in losses]
        return Losses(torch.stack(weighted).sum(0), torch.stack(plain).sum(0))

    def mean(self, nets: Nets, recipe: Recipe, draw: Draw) -> Float[Tensor, ""]:
        """The mean loss; each row has one of the two, and those on the diagonal cost no more than by CFM."""
        rows = parts(draw.first, len(draw.x1), self.diagonal, draw.x1.device)
        losses = [
            self.weighted(loss(nets, recipe, chosen(draw, part)), draw.x1[0].numel())
            for part, loss in zip(rows, (self.on_diagonal, self.off_diagonal), strict=True)
            if len(part)
        ]
        return torch.cat(losses).mean()

    def weighted(self, loss: PerSample, dimensions: int) -> PerSample:
        """Each row's loss as it is trained on."""
        return loss if self.adaptive is None else self.adaptive(loss, dimensions)

    def on_diagonal(self, nets: Nets, recipe: Recipe, draw: Draw) -> PerSample:
        """The loss of CFM."""
        point = draw.on(recipe.path)
        u = AverageVelocity(nets.network, recipe.path, draw.y, nets.streams(draw))
        return mean_square(u(point.xt, point.t) - point.ut)

    def off_diagonal(self, nets: Nets, recipe: Recipe, draw: Draw) -> PerSample:
        _, first, second, between = draw.times.unbind(1)
        s, t = torch.minimum(first, second), torch.maximum(first, second)
        low, high = self.t_range(recipe.path)
        point = recipe.path.sample(draw.x0, draw.x1, s)
        u = AverageVelocity(nets.network, recipe.path, draw.y, nets.streams(draw))
        return self.off(u, Pair(point.xt, point.ut, s, t, (between - low) / (high - low)))


@lru_cache
def parts(first: int, size: int, diagonal: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows are on the diagonal and which off, spread evenly over the global batch, on any number of processes."""
    rows, share = range(first, first + size), 1 - diagonal + 1e-9  # 0.1 of ten rows is one row
    off = [int((k + 1) * share) > int(k * share) for k in rows]
    each = ([k for k, other in enumerate(off) if other == which] for which in (False, True))
    on, away = (torch.tensor(numbers, dtype=torch.long, device=device) for numbers in each)
    return on, away


def chosen(draw: Draw, rows: Tensor) -> Draw:
    """The draw of some rows."""
    y, dropped = (None if v is None else v[rows] for v in (draw.y, draw.dropped))
    streams = draw.streams and KeyedStreams(draw.streams.words, draw.streams.index[rows])
    return Draw(draw.x0[rows], draw.x1[rows], draw.times[rows], None, y, dropped, streams)

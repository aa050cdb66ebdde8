r"""Objectives: what a network is trained to do.

    (network, points of the path, keyed draws) -> one loss a sample                                   (1)

A `Recipe` says what is drawn: pairs (x0, x1) of the source, the data and the coupling, times, and the noise of a path
that has its own. An objective makes losses of a `Draw`, and a `Model` of the trained network.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmlightning.flow.couplings.coupling import Coupling
from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.models import Model
from fmlightning.flow.objectives.time_samplers import TimeSampler
from fmlightning.flow.paths.path import Path, PathSample
from fmlightning.flow.sources import Source


@dataclass(frozen=True)
class Recipe:
    """Training of a flow, apart from its network and its data.

    Args:
        path: how a pair is joined.
        source: the distribution of x0.
        coupling: which pairs there are.
        times: the distribution of training times.
        objective: what the network is trained to do.
    """

    path: Path
    source: Source
    coupling: Coupling
    times: TimeSampler
    objective: "Objective"


class Nets(NamedTuple):
    """The networks of a run.

    Attributes:
        network: `net(x, t, y=None) -> like x`.
        keyed: whether the network takes keyed streams, as `fmlightning.nets.UNet` does for its dropout.
        modules: the objective's own, from `Objective.modules`.
    """

    network: nn.Module
    keyed: bool = False
    modules: nn.Module | None = None

    def streams(self, draw: "Draw") -> KeyedStreams | None:
        """The keyed streams for the network; None where it takes none."""
        return draw.streams if self.keyed else None


class Draw(NamedTuple):
    """All that a batch is made of.

    Attributes:
        x0: source points, (B, *S).
        x1: data points, (B, *S).
        times: training times, (B, num_times).
        noise: standard normal noise of a stochastic path, (B, *S).
        y: conditions of x1; those that are dropped are the null already.
        dropped: where the condition is dropped, (B,); None where none can be.
        streams: keyed streams of the samples, for networks and objectives that draw.
        first: the row of the global batch that is this draw's first.
    """

    x0: Tensor
    x1: Tensor
    times: Tensor
    noise: Tensor | None = None
    y: Tensor | None = None
    dropped: Tensor | None = None
    streams: KeyedStreams | None = None
    first: int = 0

    @property
    def t(self) -> Tensor:
        """The first time of each sample, (B,)."""
        return self.times[:, 0]

    def on(self, path: Path) -> PathSample:
        """The points of the path at the first times."""
        return path.sample(self.x0, self.x1, self.t, self.noise)

    def rows(self, chosen: slice) -> "Draw":
        """The draw of some samples."""

        def part(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[chosen]

        noise, y, dropped = map(part, (self.noise, self.y, self.dropped))
        x0, x1, times = self.x0[chosen], self.x1[chosen], self.times[chosen]
        return Draw(x0, x1, times, noise, y, dropped, self.streams)


class Losses(NamedTuple):
    """The loss of each sample, (B,): as it is trained on, and without its weight."""

    weighted: Tensor
    unweighted: Tensor


class Objective(ABC):
    """A training objective."""

    num_times: ClassVar[int] = 1
    """Times drawn for each sample; with 0 the loss is not shown by time."""

    unit: ClassVar[str] = "squared error"
    """Unit of the loss."""

    draws: ClassVar[bool] = False
    """Whether the objective itself draws from the keyed streams."""

    second_order: ClassVar[bool] = False
    """Whether the loss holds derivatives of the network, which torch.compile cannot differentiate again."""

    def check(self, recipe: Recipe, network: nn.Module, data: Any) -> None:  # noqa: B027 - most fit all
        """Refuse what does not fit, before any training.

        Args:
            recipe: with the source that the data bring, where they do.
            network: the network.
            data: the DataModule; None before it is known.

        Raises:
            ValueError: the path, source, coupling, network or data do not suit this objective.
        """

    def t_range(self, path: Path) -> tuple[float, float]:
        """Where the prediction is regular: training times are drawn here."""
        return path.t_range

    def draw_times(self, recipe: Recipe, u: Sequence[Tensor]) -> Tensor:
        """Training times from uniform numbers, `num_times` of (B,) each, as (B, num_times).

        A sampler may look at the whole global batch, which these numbers are of.
        """
        t_range = self.t_range(recipe.path)
        return torch.stack([recipe.times.draw(each, t_range) for each in u], 1)

    def modules(self, network: nn.Module) -> nn.Module | None:
        """Modules that are trained or kept beside the network, and saved with it: a teacher, a learned weight."""
        return None

    @abstractmethod
    def loss(self, nets: Nets, recipe: Recipe, draw: Draw) -> Losses:
        """The loss of each sample."""

    def mean(self, nets: Nets, recipe: Recipe, draw: Draw) -> Float[Tensor, ""]:
        """The mean loss of a batch, which is trained on."""
        return self.loss(nets, recipe, draw).weighted.mean()

    @abstractmethod
    def model(self, nets: Nets, recipe: Recipe) -> Model:
        """The trained model, as solvers, metrics and `load` are given it."""

r"""From a network to a velocity field.

A network is any `net(x, t, y=None) -> like x`. A field is `(x, t) -> v`: solvers, likelihoods and metrics see
nothing else. `NetworkField` makes one from the other, whatever the network predicts.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fmlightning.flow.keys import Rows
from fmlightning.flow.predictions import EndPoints, Prediction, domain, to_endpoints, to_velocity
from fmlightning.flow.schedules import Schedule
from fmlightning.flow.shapes import Field, Labels, Points, Times, expand_like


class Network(Protocol):
    """A prediction of x's shape from a point x (B, *S), its time t (B,) and perhaps a label y (B,).

    A network that drops out while training takes one more argument, `rows`, and draws from it, so that its
    masks are keyed by sample (see `fmlightning.nets.embeddings.Dropout`).
    """

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, /, **kwargs: Any
    ) -> Tensor: ...


def evaluate(
    network: Network,
    schedule: Schedule,
    x: Points,
    t: Times,
    y: Labels | None = None,
    rows: Rows | None = None,
) -> Points:
    """The network's output, for an input scaled as the schedule asks and a time for each sample."""
    t = t.expand(len(x))
    scale = schedule.input_scale(t)
    x = x if scale is None else expand_like(scale, x) * x
    keyed = {} if rows is None else {"rows": rows}
    return network(x, t, **keyed) if y is None else network(x, t, y, **keyed)


class NetworkField(nn.Module):
    """The velocity field of a network.

    Args:
        network: `net(x, t, y=None) -> like x`.
        schedule: the curves of the path it was trained on.
        predicts: what it predicts.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, predicts: Prediction = "velocity"
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.predicts: Prediction = predicts
        self.interval = domain(predicts, schedule)
        """Where the field exists and was trained."""

    def forward(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The velocity at x (B, *S) and t, (B,) or ()."""
        return to_velocity(
            self.predicts, evaluate(self.network, self.schedule, x, t, y), x, t, self.schedule
        )

    def endpoints(self, x: Points, t: Times, y: Labels | None = None) -> EndPoints:
        """The data point and noise that the network expects x to have come from."""
        return to_endpoints(
            self.predicts, evaluate(self.network, self.schedule, x, t, y), x, t, self.schedule
        )

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """E[x1 | x_t = x]: the step that ends sampling where the field stops short of t = 1."""
        prediction = evaluate(self.network, self.schedule, x, t, y)
        if self.predicts == "data":
            return prediction
        return to_endpoints(self.predicts, prediction, x, t, self.schedule).x1

    def given(self, y: Labels | None) -> Field:
        """The field for one label of each sample."""
        return self if y is None else lambda x, t: self(x, t, y)


def at(t: float, like: Tensor) -> Tensor:
    """A scalar time on the device and in the precision of a tensor."""
    return torch.tensor(t, dtype=like.dtype, device=like.device)

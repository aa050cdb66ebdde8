r"""From a network to a velocity field.

A network is any `net(x, t, y=None) -> like x`. A field is `(x, t) -> v`: solvers, likelihoods and metrics see
nothing else. `NetworkField` makes one from the other, whatever the network predicts.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.paths.predictions import (
    EndPoints,
    Prediction,
    domain,
    to_endpoints,
    to_velocity,
)
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Field, Labels, Points, Times, expand_like, require_times
from fmlightning.flow.shapes import at as at
from fmlightning.flow.solvers.score import noise_to_score, require_score
from fmlightning.flow.solvers.solver import TrainedField as TrainedField
from fmlightning.flow.sources import Source


@runtime_checkable
class Network(Protocol):
    """A prediction of x's shape from a point x (B, *S), its time t (B,) and perhaps a label y (B,).

    A network that drops out while training takes one more argument, `streams`, and draws from it, so that its
    masks are keyed by sample (see `fmlightning.nets.embeddings.Dropout`); one whose `draws` is false is not given it.
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
    streams: KeyedStreams | None = None,
) -> Points:
    """The network's output in x's precision, for an input scaled as the schedule asks and a time for each sample.

    The path is computed in the precision of x, the network in that of its weights.

    Raises:
        ValueError: t is no time of the path, or the output has not the shape of x.
    """
    require_times(t, len(x))
    return output(network, schedule, x, t, y, streams)


def output(
    network: Network,
    schedule: Schedule,
    x: Points,
    t: Times,
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
) -> Points:
    """`evaluate` at times that have been looked at, as those of a `PathSample` have."""
    t, dtype = t.expand(len(x)), x.dtype
    scale = schedule.input_scale(t)
    x = x if scale is None else expand_like(scale, x) * x
    if isinstance(network, nn.Module):
        wanted = precision(network) or dtype
        x = x if x.dtype == wanted else x.to(wanted)
    keyed = {} if streams is None else {"streams": streams}
    out = network(x, t, **keyed) if y is None else network(x, t, y, **keyed)
    if out.shape != x.shape:
        raise ValueError(
            f"{type(network).__name__} maps points {tuple(x.shape)} to {tuple(out.shape)}; a prediction has the "
            "shape of its point"
        )
    return out if out.dtype == dtype else out.to(dtype)


def precision(module: nn.Module) -> torch.dtype | None:
    """That of a module's first parameter: `parameters()` would take as long as three layers of a small network."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter.dtype
    for child in module._modules.values():
        if child is not None and (found := precision(child)) is not None:
            return found
    return None


class NetworkField(nn.Module):
    """The velocity field of a network.

    Args:
        network: `net(x, t, y=None) -> like x`.
        schedule: the curves of the path it was trained on.
        predicts: what it predicts.
        source: the law of x0 it was trained with; needed for a score, which follows from a Gaussian one only.
        independent: whether its coupling drew x0 independently of x1, which a score needs as well.

    Raises:
        ValueError: on a path with gamma > 0, a prediction that does not give the velocity of this source or
            coupling.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        predicts: Prediction = "velocity",
        *,
        source: Source | None = None,
        independent: bool = False,
    ) -> None:
        super().__init__()
        if predicts != "velocity":
            require_one_noise(f"predicts={predicts!r}", schedule, source, independent)
        self.source, self.independent = source, independent
        self.network = network
        self.schedule = schedule
        self.predicts: Prediction = predicts
        self.interval = domain(predicts, schedule)
        """Where the field exists and was trained."""

    def forward(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The velocity at x (B, *S) and t, (B,) or ()."""
        prediction = evaluate(self.network, self.schedule, x, t, y)
        if self.predicts == "velocity":
            return prediction
        return to_velocity(self.predicts, prediction, x, t, self.schedule)

    def endpoints(self, x: Points, t: Times, y: Labels | None = None) -> EndPoints:
        """The data point and noise that the network expects x to have come from."""
        return to_endpoints(
            self.predicts, evaluate(self.network, self.schedule, x, t, y), x, t, self.schedule
        )

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """E[x1 | x_t = x]: the step that ends sampling where the field stops short of t = 1.

        With gamma > 0 under a coupling it is as far off as the margin that sampling stops short of.
        """
        prediction = evaluate(self.network, self.schedule, x, t, y)
        if self.predicts == "data":
            return prediction
        return to_endpoints(self.predicts, prediction, x, t, self.schedule).x1

    def score(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The gradient of log p_t, for a Gaussian source independent of the data.

        Raises:
            ValueError: the field was made for another source or coupling, or was not told for which; or the score
                does not exist at t.
        """
        require_score(self.source, self.independent)
        if self.predicts == "score":
            return evaluate(self.network, self.schedule, x, t, y)
        return noise_to_score(self.endpoints(x, t, y).x0, t, self.schedule)

    def given(self, y: Labels | None) -> Field:
        """The field for one label of each sample."""
        return self if y is None else lambda x, t: self(x, t, y)


def require_one_noise(
    use: str, schedule: Schedule, source: Source | None, independent: bool
) -> None:
    """Refuse to take sigma x0 + gamma eps for one noise where it is known to be two."""
    if schedule.stochastic and source is not None and not (source.gaussian and independent):
        raise ValueError(
            f"{use} on {schedule}, which has gamma > 0: x0 and its noise are one Gaussian noise only for a Gaussian "
            f"source independent of the data, and not for source={source} with independent={independent}. Predict "
            "and sample the velocity along the path trained on, or take a path with gamma = 0."
        )

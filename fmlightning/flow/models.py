r"""Models: what a trained network is.

A network is any `net(x, t, y=None) -> like x`. A model is what solvers, likelihoods and metrics see of it, and says
what it offers: a velocity (x, t) -> v, a jump (x, s, t) -> X_{s,t}(x) of its flow map, or a posterior
(x, t) -> probabilities. `NetworkField` makes a velocity of a network, whatever the network predicts.
"""

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.path import Path
from fmlightning.flow.paths.predictions import (
    EndPoints,
    Prediction,
    affine,
    domain,
    to_endpoints,
    to_velocity,
)
from fmlightning.flow.shapes import Field, Labels, Points, Times, expand_like, require_times
from fmlightning.flow.solvers.score import noise_to_score, require_score
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


def takes_streams(network: nn.Module) -> bool:
    """Whether a network takes keyed streams, and draws from them in training."""
    takes = "streams" in inspect.signature(network.forward).parameters
    return takes and getattr(network, "draws", True)


def evaluate(
    network: Network,
    path: Path,
    x: Points,
    t: Times,
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
    to: Times | None = None,
) -> Points:
    """The network's output in x's precision, for an input scaled as the path asks and a time for each sample.

    The path is computed in the precision of x, the network in that of its weights. A network of two times is given
    *to* as well.

    Raises:
        ValueError: t is no time of the path, or the output has not the shape of x.
    """
    require_times(t, len(x))
    return evaluate_checked(network, path, x, t, y, streams, to)


def evaluate_checked(
    network: Network,
    path: Path,
    x: Points,
    t: Times,
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
    to: Times | None = None,
) -> Points:
    """`evaluate` at times that have been looked at, as those of a `PathSample` have."""
    t, dtype = t.expand(len(x)), x.dtype
    scale = path.input_scale(t)
    x = x if scale is None else expand_like(scale, x) * x
    if isinstance(network, nn.Module):
        wanted = precision(network) or dtype
        x = x if x.dtype == wanted else x.to(wanted)
    more: dict[str, Any] = {} if streams is None else {"streams": streams}
    if to is not None:
        more["to"] = to.expand(len(x))
    out = network(x, t, **more) if y is None else network(x, t, y, **more)
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


class Model(nn.Module):
    """A trained model; a subclass has the methods that it offers.

    Attributes:
        offers: of "velocity", "jump" and "posterior".
        path: the path it was trained on.
        t_range: the times at which it exists and was trained.
    """

    offers: frozenset[str] = frozenset()
    path: Any
    t_range: tuple[float, float]

    def velocity(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The velocity at x (B, *S) and t, (B,) or ()."""
        raise ValueError(f"{type(self).__name__} offers no velocity")

    def jump(self, x: Points, s: Times, t: Times, y: Labels | None = None) -> Points:
        """The point at time t of the flow that passes through x (B, *S) at time s."""
        raise ValueError(f"{type(self).__name__} offers no jump")

    def posterior(self, x: Points, t: Times, y: Labels | None = None) -> Tensor:
        """The probabilities of the data given x_t = x."""
        raise ValueError(f"{type(self).__name__} offers no posterior")

    def forward(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The velocity: a model is a field `(x, t) -> v` where it offers one."""
        return self.velocity(x, t, y)

    def given(self, y: Labels | None) -> Field:
        """The field for one label of each sample."""
        return self if y is None else lambda x, t: self(x, t, y)


class NetworkField(Model):
    """The velocity field of a network.

    Args:
        network: `net(x, t, y=None) -> like x`.
        path: the path it was trained on.
        prediction: what it predicts.
        source: the distribution of x0 it was trained with; needed for a score, which follows from a Gaussian one only.
        independent: whether its coupling drew x0 independently of x1, which a score needs as well.

    Raises:
        ValueError: on a path with gamma > 0, a prediction that does not give the velocity of this source or
            coupling.
    """

    offers = frozenset({"velocity"})

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        prediction: Prediction = "velocity",
        *,
        source: Source | None = None,
        independent: bool = False,
    ) -> None:
        super().__init__()
        if prediction != "velocity":
            require_one_noise(f"prediction={prediction!r}", path, source, independent)
        self.source, self.independent = source, independent
        self.network = network
        self.path = path
        self.prediction: Prediction = prediction
        self.t_range = domain(prediction, path)
        """Where the field exists and was trained."""

    @property
    def affine(self) -> AffinePath:
        """The path, which end points and scores need to have curves.

        Raises:
            ValueError: it has none.
        """
        return affine(self.path, "the data point or score of a model")

    def velocity(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The velocity at x (B, *S) and t, (B,) or ()."""
        output = evaluate(self.network, self.path, x, t, y)
        if self.prediction == "velocity":
            return output
        return to_velocity(self.prediction, output, x, t, self.affine)

    def endpoints(self, x: Points, t: Times, y: Labels | None = None) -> EndPoints:
        """The data point and noise that the network expects x to have come from."""
        output = evaluate(self.network, self.path, x, t, y)
        return to_endpoints(self.prediction, output, x, t, self.affine)

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """E[x1 | x_t = x]: the step that ends sampling where the field stops short of t = 1.

        With gamma > 0 under a coupling it is as far off as the margin that sampling stops short of.
        """
        output = evaluate(self.network, self.path, x, t, y)
        if self.prediction == "data":
            return output
        return to_endpoints(self.prediction, output, x, t, self.affine).x1

    def score(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The gradient of log p_t, for a Gaussian source independent of the data.

        Raises:
            ValueError: the field was made for another source or coupling, or was not told for which; or the score
                does not exist at t.
        """
        require_score(self.source, self.independent)
        if self.prediction == "score":
            return evaluate(self.network, self.path, x, t, y)
        return noise_to_score(self.endpoints(x, t, y).x0, t, self.affine)


def require_one_noise(use: str, path: Path, source: Source | None, independent: bool) -> None:
    """Refuse to take sigma x0 + gamma eps for one noise where it is known to be two."""
    if path.stochastic and source is not None and not (source.gaussian and independent):
        raise ValueError(
            f"{use} on {path}, which has gamma > 0: x0 and its noise are one Gaussian noise only for a Gaussian "
            f"source independent of the data, and not for source={source} with independent={independent}. Predict "
            "and sample the velocity along the path trained on, or take a path with gamma = 0."
        )

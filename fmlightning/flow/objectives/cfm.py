r"""The conditional flow matching loss.

    L_CFM = E |network(x_t, t) - u_t|^2,   t ~ distribution of times, (x0, x1) ~ coupling                  (1)

Its gradient is that of the flow matching loss E |network(x_t, t) - u_t(x_t)|^2, whose target, the marginal
velocity, nobody can compute on real data; the two differ by a constant.

Source: Lipman et al. 2023, arXiv:2210.02747, Theorem 2.
"""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.models import Network, NetworkField, evaluate_checked, require_one_noise
from fmlightning.flow.objectives.objective import Draw, Losses, Nets, Objective, Recipe
from fmlightning.flow.objectives.weightings import Unweighted, Weighting
from fmlightning.flow.paths.path import Path, PathSample
from fmlightning.flow.paths.predictions import Prediction, check, domain, target
from fmlightning.flow.shapes import Labels, PerSample, flat


@dataclass(frozen=True)
class CFM(Objective):
    """Conditional flow matching, equation (1).

    Args:
        prediction: what the network outputs: velocity, data, noise or score.
        weighting: how much the loss counts at each time: Unweighted, AsVelocity, EDM, MinSNR.
    """

    prediction: Prediction = "velocity"
    weighting: Weighting = field(default_factory=Unweighted)

    def __post_init__(self) -> None:
        check(self.prediction)

    def check(self, recipe: Recipe, network: nn.Module, data: Any) -> None:
        use, source = f"model.objective.prediction={self.prediction}", recipe.source
        if self.prediction == "score" and not (source.gaussian and recipe.coupling.independent):
            raise ValueError(
                f"{use} needs a Gaussian source that is independent of the data, and not source={source} with "
                f"coupling={recipe.coupling}: predict velocity, data or noise"
            )
        if self.prediction != "velocity":
            require_one_noise(use, recipe.path, source, recipe.coupling.independent)

    def t_range(self, path: Path) -> tuple[float, float]:
        return domain(self.prediction, path)

    @property
    def weight(self) -> Weighting | None:
        """The weighting, where it is not 1."""
        return None if isinstance(self.weighting, Unweighted) else self.weighting

    def loss(self, nets: Nets, recipe: Recipe, draw: Draw) -> Losses:
        point = draw.on(recipe.path)
        loss = cfm_loss(
            nets.network,
            recipe.path,
            point,
            prediction=self.prediction,
            y=draw.y,
            streams=nets.streams(draw),
        )
        weight = self.weight
        weighted = loss if weight is None else weight(point.t, recipe.path, self.prediction) * loss
        return Losses(weighted, loss)

    def mean(self, nets: Nets, recipe: Recipe, draw: Draw) -> Float[Tensor, ""]:
        """The mean loss; in one pass where no weight asks for the loss of each sample."""
        if self.weight is not None:
            return self.loss(nets, recipe, draw).weighted.mean()
        return mean_cfm_loss(
            nets.network,
            recipe.path,
            draw.on(recipe.path),
            prediction=self.prediction,
            y=draw.y,
            streams=nets.streams(draw),
        )

    def model(self, nets: Nets, recipe: Recipe) -> NetworkField:
        return NetworkField(
            nets.network,
            recipe.path,
            self.prediction,
            source=recipe.source,
            independent=recipe.coupling.independent,
        )


def cfm_loss(
    network: Network,
    path: Path,
    sample: PathSample,
    *,
    prediction: Prediction = "velocity",
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
    weight: Weighting | None = None,
) -> PerSample:
    """The loss (1) of each sample, divided by its number of dimensions.

        path = Linear()
        loss = cfm_loss(network, path, path.sample(x0, x1, t)).mean()

    Args:
        network: `net(x, t, y=None) -> like x`.
        path: the path of the sample.
        sample: from `path.sample`.
        prediction: what the network outputs; the loss is taken on that output.
        y: class labels, (B,), for a conditional network.
        streams: keyed streams of the samples, for networks with dropout.
        weight: how much each time counts; `AsVelocity` makes predictions comparable.
    """
    output = evaluate_checked(network, path, sample.xt, sample.t, y, streams)
    loss = mean_square(output - target(prediction, sample, path))
    return loss if weight is None else weight(sample.t, path, prediction) * loss


def mean_cfm_loss(
    network: Network,
    path: Path,
    sample: PathSample,
    *,
    prediction: Prediction = "velocity",
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
) -> Float[Tensor, ""]:
    """The mean of `cfm_loss` over a batch, in one pass."""
    output = evaluate_checked(network, path, sample.xt, sample.t, y, streams)
    return F.mse_loss(output, target(prediction, sample, path))


def mean_square(error: Tensor) -> PerSample:
    """|error|^2 / D of each sample."""
    return flat(error.square()).mean(1)

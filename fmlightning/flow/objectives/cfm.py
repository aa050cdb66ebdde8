r"""The conditional flow matching loss.

    L_CFM = E |network(x_t, t) - u_t|^2,   t ~ law of times, (x0, x1) ~ coupling                  (1)

Its gradient is that of the flow matching loss E |network(x_t, t) - u_t(x_t)|^2, whose target, the marginal
velocity, nobody can compute on real data; the two differ by a constant.

Source: Lipman et al. 2023, arXiv:2210.02747, Theorem 2.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.models import Network, output
from fmlightning.flow.objectives.weightings import Weighting
from fmlightning.flow.paths.affine import PathSample
from fmlightning.flow.paths.predictions import Prediction, target
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Labels, PerSample


def cfm_loss(
    network: Network,
    schedule: Schedule,
    sample: PathSample,
    *,
    predicts: Prediction = "velocity",
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
    weight: Weighting | None = None,
) -> PerSample:
    """The loss (1) of each sample, divided by its number of dimensions.

        path = AffinePath(Linear())
        loss = cfm_loss(network, path.schedule, path.sample(x0, x1, t)).mean()

    Args:
        network: `net(x, t, y=None) -> like x`.
        sample: from `AffinePath.sample`.
        predicts: what the network outputs; the loss is taken on that output.
        y: class labels, (B,), for a conditional network.
        streams: keyed streams of the samples, for networks with dropout.
        weight: how much each time counts; `AsVelocity` makes predictions comparable.
    """
    prediction = output(network, schedule, sample.xt, sample.t, y, streams)
    loss = mean_square(prediction - target(predicts, sample, schedule))
    return loss if weight is None else weight(sample.t, schedule, predicts) * loss


def mean_cfm_loss(
    network: Network,
    schedule: Schedule,
    sample: PathSample,
    *,
    predicts: Prediction = "velocity",
    y: Labels | None = None,
    streams: KeyedStreams | None = None,
    weight: Weighting | None = None,
) -> Float[Tensor, ""]:
    """The mean of `cfm_loss` over a batch; in one pass where no weight asks for the loss of each sample."""
    if weight is not None:
        return cfm_loss(
            network, schedule, sample, predicts=predicts, y=y, streams=streams, weight=weight
        ).mean()
    prediction = output(network, schedule, sample.xt, sample.t, y, streams)
    return F.mse_loss(prediction, target(predicts, sample, schedule))


def mean_square(error: Tensor) -> PerSample:
    """|error|^2 / D of each sample."""
    return error.square().flatten(1).mean(1)

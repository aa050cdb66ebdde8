r"""Flow maps: from any time of the flow to any other in one evaluation.

    X_{s,t}(x) = x + (t - s) u(x, s, t),    u(x, s, s) = v(x, s)                                        (1)

X_{s,t} takes the point that the flow has at time s to the one at t; u is the average velocity on the way. A network of
two times predicts u: on the diagonal, t = s, it is an ordinary velocity field, for every solver and likelihood.

Source: Boffi, Albergo, Vanden-Eijnden 2024, arXiv:2406.07507; Geng et al. 2025 (MeanFlow), arXiv:2505.13447.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.models import Network, NetworkField, evaluate, evaluate_checked
from fmlightning.flow.paths.path import Path
from fmlightning.flow.shapes import Labels, Points, Times, expand_like


def takes_two_times(network: nn.Module) -> bool:
    """Whether a network predicts average velocities: it takes *to*, and was not built without it."""
    takes = "to" in inspect.signature(network.forward).parameters
    return takes and getattr(network, "duration", network) is not None


@dataclass(frozen=True)
class AverageVelocity:
    """u of (1) for the rows of a batch: their labels and keyed streams are fixed, points and times are not.

    Args:
        network: of two times.
        path: the path, which may scale what the network sees.
        y: labels, (B,).
        streams: keyed streams; one evaluation and its derivative see the same dropout.
    """

    network: Network
    path: Path
    y: Labels | None = None
    streams: KeyedStreams | None = None

    def __call__(self, x: Points, s: Times, t: Times | None = None) -> Points:
        """u(x, s, t); without t the velocity at s."""
        return evaluate_checked(self.network, self.path, x, s, self.y, self.streams, to=t)

    def along(self, point: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """u at (x, s, t), and its derivative along tangents of these three.

        Attention has no fused forward derivative, so it takes its plain form here and only here; mixed precision is
        off, for the derivative in time of bfloat16 is noise.
        """
        device = point[0].device.type
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
            value, derivative = torch.func.jvp(self.__call__, tuple(point), tuple(tangents))[:2]
        return value, derivative


class FlowMapField(NetworkField):
    """The flow map of a network of two times, and on its diagonal the velocity.

    Args:
        network: `net(x, t, y=None, to=None) -> like x`, the average velocity from t to *to*.
        path: the path it was trained on.
    """

    offers = frozenset({"velocity", "jump"})

    def average_velocity(self, x: Points, s: Times, t: Times, y: Labels | None = None) -> Points:
        """u(x, s, t) of (1) at x (B, *S), with times (B,) or ()."""
        return evaluate(self.network, self.path, x, s, y, to=t)

    def jump(self, x: Points, s: Times, t: Times, y: Labels | None = None) -> Points:
        """X_{s,t}(x) of (1) by one evaluation."""
        return x + expand_like(t - s, x) * self.average_velocity(x, s, t, y)

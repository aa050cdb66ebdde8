r"""Probability paths: how a pair of points is joined.

    (x0, x1, t) -> x_t, and the conditional velocity u_t that a network learns from it            (1)

A path leads from the source at t = 0 to the data at t = 1. A path of one's own is a class with `sample`; one of the
form x_t = alpha x1 + sigma x0 + gamma eps is an `AffinePath`, which has much more to give.

Source: Lipman et al. 2024, arXiv:2412.06264, sec. 4.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from fmlightning.flow.shapes import Points, Times, require_time

T_EPS = 1e-3
"""Distance from a singular end at which training and sampling stop, unless another is given."""


class PathSample(NamedTuple):
    """A point on the path with all that it was made of: the input of an objective."""

    xt: Tensor
    ut: Tensor
    t: Tensor
    x0: Tensor
    x1: Tensor
    noise: Tensor | None


class Path(ABC):
    """A way from source to data."""

    t_range: tuple[float, float] = (0.0, 1.0)
    """Where E|u_t|^2 is finite: training times are drawn and solvers run here."""

    @property
    def stochastic(self) -> bool:
        """Whether the path adds noise of its own, which `sample` is then given."""
        return False

    @abstractmethod
    def sample(self, x0: Points, x1: Points, t: Times, noise: Points | None = None) -> PathSample:
        """The point x_t and the conditional velocity u_t of a pair.

        Args:
            x0: source points, (B, *S).
            x1: data points, (B, *S).
            t: times in [0, 1], (B,) or ().
            noise: standard normal noise, (B, *S); needed by stochastic paths and unused by the others.
        """

    def start(self, x0: Points, t: float = 0.0, noise: Points | None = None) -> Points:
        """The points where sampling starts, of a path that starts at the source itself.

        Raises:
            ValueError: t is no time of a path.
        """
        require_time("t", t)
        return x0

    def start_scales(self, t: float) -> tuple[float, float]:
        """Standard deviation of `start` for a standard normal source, and of the noise of the path in it."""
        require_time("t", t)
        return 1.0, 0.0

    def input_scale(self, t: Times) -> Times | None:
        """Factor on x_t before a network sees it; None leaves it as it is."""
        return None

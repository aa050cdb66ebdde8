r"""Optimal transport between the distribution of x0 and the whole data set.

The data are N points x_1 ... x_N of weight 1/N, the source is a distribution that can be drawn from. A number
g_k for each data point, the dual potential, decides where each source point goes,

    k(x0) = argmax_k g_k - |x0 - x_k|^2                                                            (1)

and is optimal where every cell {x0: k(x0) = k} has mass m_k = 1/N. It is the maximum of a concave function,

    F(g) = E min_k (|x0 - x_k|^2 - g_k) + sum_k g_k / N,    dF/dg_k = 1/N - m_k                    (2)

that is climbed once, before training. Training then draws x0 and looks up (1): no assignment, and no bias of a small
batch. How far the cells are from equal is

    chi^2 = N sum_k m_k^2 - 1                                                                      (3)

estimated without bias by how often two source points fall into one cell.

The climb begins with blurred cells, p_k(x0) ~ exp((g_k - |x0 - x_k|^2) / reg), whose masses few draws tell: Sinkhorn's
steps g_k -= reg log(N E p_k), with reg halved time and again, place g on all scales down to that of some cells. From
there on it goes by stochastic gradients of (2) and the average of the iterates. Where reg > 0 is asked for, halving
ends there, and a cell is drawn with the probabilities p_k, by adding Gumbel noise in (1).

Source: Mousavi-Hosseini et al. 2025, arXiv:2509.25519; Genevay et al. 2016, arXiv:1605.08527.
"""

import math
from dataclasses import dataclass
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from fmlightning.flow.couplings.coupling import Conditions, Coupling, Pairs, refuse_labels
from fmlightning.flow.couplings.exact import MinibatchOT
from fmlightning.flow.couplings.potential import BLOCK, Potential
from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Points, flat
from fmlightning.flow.sources import Source


@dataclass(frozen=True)
class SemidiscreteOT(Coupling):
    """Optimal transport between the source and the whole training set, by a potential that is fitted once.

    The set must be finite, and each of its samples one fixed point. Points that have no potential, those of
    validation, are paired by `MinibatchOT`.

    Args:
        tolerance: chi^2 of (3) at which the fit ends; 0.05 is a spread of the cells' masses of about 22 %.
        reg: weight of the entropy, in squared units of the data; 0 is optimal transport.
        batch_size: source points in a step of the fit.
        max_steps: steps after which the fit gives up.
        rate: first step of the stochastic gradients, in units of the last reg before them.
    """

    tolerance: float = 0.05
    reg: float = 0.0
    batch_size: int = 1024
    max_steps: int = 10_000
    rate: float = 0.1

    fitted = True

    def __post_init__(self) -> None:
        for name in ("tolerance", "batch_size", "max_steps", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.reg < math.inf:
            raise ValueError(f"reg={self.reg} must be finite and not negative; 0 has no entropy")

    def pairs(
        self, x0: Points, x1: Points, y: Conditions | None, generator: torch.Generator
    ) -> Pairs:
        refuse_labels(self, y)
        return MinibatchOT().pairs(x0, x1, None, generator)

    def potential(self, x1: Points, g: Float[Tensor, " N"]) -> Potential:
        return Potential(x1, g, self.reg)

    def fit(self, x1: Points, source: Source, key: Key) -> Float[Tensor, " N"]:
        """The potential of a data set, in float64.

        Args:
            x1: the whole data set, (N, *S).
            source: the distribution of x0.
            key: of the source points that are drawn; the result is a function of it.

        Raises:
            ValueError: the cells are not equal enough after `max_steps`.
        """
        climb = Climb(self, x1, source, key)
        chi2 = math.inf
        while climb.step < self.max_steps:
            climb.on(min(CHECK, self.max_steps - climb.step))
            chi2 = climb.chi2()
            if chi2 <= self.tolerance:
                return climb.mean
        raise ValueError(
            f"SemidiscreteOT: the masses of the {len(x1)} cells have chi^2 = {chi2:.3g} > tolerance={self.tolerance:g} "
            f"after max_steps={self.max_steps}: allow more steps, a larger batch_size or a larger tolerance"
        )


CHECK = 100
"""Steps between two looks at chi^2."""

SINKHORN = 6
"""Sinkhorn's steps for each reg."""

TOLD = 20
"""Draws for each cell that tell its mass to about a fifth."""


class Climb:
    """The climb of (2): blurred cells, then stochastic gradients scaled as in Adam.

    The rate falls like 1 / sqrt(step), and of the average the last third counts most: weights ~ step^3.
    """

    def __init__(self, settings: SemidiscreteOT, x1: Points, source: Source, key: Key) -> None:
        self.settings, self.x1, self.source, self.key = settings, x1, source, key
        self.step = 0
        self.g, self.first, self.second = torch.zeros(
            3, len(x1), dtype=torch.float64, device=x1.device
        )
        self.blur = self.sharpen()
        self.mean = self.g.clone()

    def draw(self, size: int, *name: int | str) -> tuple[Points, torch.Generator]:
        generator = self.key.fold(*name).generator(self.x1.device)
        shape = (size, *self.x1.shape[1:])
        return self.source.sample(shape, generator, dtype=self.x1.dtype), generator

    # -- blurred cells ----------------------------------------------------------------------------

    def sharpen(self) -> float:
        """Sinkhorn's steps down to the smallest blur at which a batch still tells the masses."""
        reg, size = self.spread(), self.settings.batch_size
        for halved in count():
            for number in range(SINKHORN):
                masses, cells = self.blurred(reg, halved, number)
                self.g -= reg * (len(self.g) * masses).clamp(min=1e-6).log()
                self.g -= self.g.mean()  # (1) does not change with a constant
            if reg <= self.settings.reg or cells < max(2.0, TOLD * len(self.g) / size):
                break
            reg = max(reg / 2, self.settings.reg)
        return reg

    def spread(self) -> float:
        """Standard deviation of |x0 - x_k|^2 over k, at most of the first thousand points."""
        x0, _ = self.draw(256, "spread")
        points = flat(self.x1[:1000])
        costs = points.square().sum(1) - 2 * flat(x0) @ points.T
        return float(costs.std(1, correction=0).mean()) or 1.0

    def blurred(self, reg: float, *name: int) -> tuple[Tensor, float]:
        """E p_k of a batch, (N,), and how many cells a source point is spread over."""
        x0, _ = self.draw(self.settings.batch_size, "blurred", *name)
        potential, n = self.settings.potential(self.x1, self.g), len(self.g)
        masses, spread = torch.zeros_like(self.g), 0.0
        for part in flat(x0).split(max(1, BLOCK // n)):
            p = (next(potential.scores(part, n))[1] / reg).softmax(1)
            masses += p.sum(0)
            spread += float((1 / p.square().sum(1)).sum())
        return masses / len(x0), spread / len(x0)

    # -- stochastic gradients ---------------------------------------------------------------------

    def on(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.climb()

    def climb(self) -> None:
        size, n = self.settings.batch_size, self.step
        gradient = 1 - self.counts(self.g, size, "step", n) * (len(self.g) / size)
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient.square(), 0.001)
        direction = self.first / (1 - 0.9**n) / ((self.second / (1 - 0.999**n)).sqrt() + 1e-3)
        self.g += self.settings.rate * self.blur * min(1.0, (50 / n) ** 0.5) * direction
        self.g -= self.g.mean()
        self.mean.lerp_(self.g, 4 / (n + 3))

    def counts(self, g: Tensor, size: int, *name: int | str) -> Tensor:
        return self.settings.potential(self.x1, g).counts(*self.draw(size, *name))

    def chi2(self) -> float:
        """(3) of the average; the estimate has a standard error of about 0.014."""
        size = math.ceil(100 * math.sqrt(2 * len(self.g)))
        counts, rest, part = torch.zeros_like(self.g), size, 0
        while rest:
            now = min(rest, self.settings.batch_size)
            counts += self.counts(self.mean, now, "chi2", self.step, part)
            rest, part = rest - now, part + 1
        return float(len(counts) * (counts * (counts - 1)).sum() / (size * (size - 1)) - 1)

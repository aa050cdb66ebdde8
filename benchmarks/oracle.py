"""The oracle at 100,000 points and 64 components in the plane, against the formulas written straight down.

    python benchmarks/oracle.py --out oracle.json

The other side makes every (points, components, dimensions) array at once, and takes the log-density from
torch.distributions. Both see the same points at the same time and have to agree to 1e-3, in float32.
"""

from functools import partial

import torch
from ratios import row
from timing import report, settings, side_by_side
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.theory.mixture import GaussianMixture

POINTS, COMPONENTS, TIME = 100_000, 64, 0.6


def mixture(generator: torch.Generator) -> GaussianMixture:
    """Random weights, centres in a disc of a few units, widths between 0.2 and 0.7."""
    weights = torch.rand(COMPONENTS, generator=generator) + 0.1
    means = 2 * torch.randn(COMPONENTS, 2, generator=generator)
    stds = 0.2 + 0.5 * torch.rand(COMPONENTS, generator=generator)
    return GaussianMixture(weights / weights.sum(), means, stds)


class StraightDown:
    """The mixture on the linear path at one time, by broadcasting."""

    def __init__(self, law: GaussianMixture, t: float) -> None:
        self.law, self.t = law, t
        self.variance = t**2 * law.stds**2 + (1 - t) ** 2

    def log_prob(self, x: Tensor) -> Tensor:
        components = Normal(self.t * self.law.means, self.variance.sqrt()[:, None])
        return MixtureSameFamily(
            Categorical(self.law.weights), Independent(components, 1)
        ).log_prob(x)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Responsibilities and differences."""
        difference = x[:, None] - self.t * self.law.means
        squares = difference.square().sum(-1) / self.variance
        return torch.softmax(
            self.law.weights.log() - squares / 2 - self.variance.log(), 1
        ), difference

    def velocity(self, x: Tensor) -> Tensor:
        r, difference = self.parts(x)
        slope = (self.t * self.law.stds**2 - (1 - self.t)) / self.variance
        return (r[..., None] * (self.law.means + slope[:, None] * difference)).sum(1)

    def score(self, x: Tensor) -> Tensor:
        r, difference = self.parts(x)
        return -(r[..., None] * difference / self.variance[:, None]).sum(1)


def main() -> None:
    flags = settings(__doc__ or "", repeats=7)
    generator = Key(0).generator()
    law = mixture(generator)
    path, plain = law.along(Linear()), StraightDown(law, TIME)
    x, t = 2 * torch.randn(POINTS, 2, generator=generator), torch.tensor(TIME)
    found = {
        name: side_by_side(
            partial(getattr(path, name), x, t),
            partial(getattr(plain, name), x),
            repeats=flags.repeats,
            atol=1e-3,  # log-densities reach -100 and scores 30 in float32
        )
        for name in ("log_prob", "velocity", "score")
    }
    rows = [
        row(f"oracle, {name}", "straight down", one["pairs_s"], at_least=1.0)
        for name, one in found.items()
    ]
    result = {"rows": rows, "points": POINTS, "components": COMPONENTS, "quantities": found}
    report(result, flags)


if __name__ == "__main__":
    main()

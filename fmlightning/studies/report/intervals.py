r"""Statistics of a few seeds.

Of n independent values with mean m and sample standard deviation s, the mean lies in

    m ± t(1 - a/2; n - 1) s / √n                                                        (1)

with probability 1 - a where they are normal; t(q; k) is the quantile q of Student's distribution with k degrees of
freedom. The mean of r further values lies in

    m ± t(1 - a/2; n - 1) s √(1/n + 1/r)                                                (2)

Two methods that met the same seeds are compared by their differences seed by seed, of which (1) and the two-sided

    p = 2 (1 - T(|m| √n / s; n - 1))                                                    (3)

hold. Of k such tests with p_(1) <= ... <= p_(k), Holm's

    q_(i) = max_{j <= i} min(1, (k - j + 1) p_(j))                                      (4)

keep the probability of any false rejection below a where q <= a rejects.

Source: Student 1908, Biometrika 6; Holm 1979, Scandinavian Journal of Statistics 6; (2): Hahn and Meeker 1991.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05
"""a of the intervals: 95 %."""

ROUNDING = 1e-12
"""Relative differences that are no spread: each seed says the same."""


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of n values; std is None for one value."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        n = len(values)
        mean = math.fsum(values) / n if all(map(math.isfinite, values)) else sum(values) / n
        if n < 2:
            return cls(mean, None, n)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
        return cls(mean, 0.0 if std <= ROUNDING * abs(mean) else std, n)

    @property
    def half_width(self) -> float | None:
        """Half width of the interval (1), or None for one value."""
        if self.std is None:
            return None
        return quantile(1 - LEVEL / 2, self.n - 1) * self.std / math.sqrt(self.n)

    @property
    def p(self) -> float:
        """(3), that the mean is 0; 1 for one value, and where a value is not finite."""
        if self.std is None or self.mean == 0 or not math.isfinite(self.mean):
            return 1.0
        if self.std == 0:  # each seed says the same
            return 0.0
        return two_sided(abs(self.mean) * math.sqrt(self.n) / self.std, self.n - 1)

    def prediction(self, further: int, level: float) -> float | None:
        """Half width of (2) for the mean of further values, or None where no spread is known."""
        if self.std is None:
            return None
        scale = math.sqrt(1 / self.n + 1 / further)
        return quantile(1 - level / 2, self.n - 1) * self.std * scale


def quantile(q: float, degrees: int) -> float:
    """t(q; degrees)."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, q))


def two_sided(t: float, degrees: int) -> float:
    """The probability of more than |t| on either side."""
    from scipy.special import stdtr

    return 2 * float(stdtr(degrees, -abs(t)))


def holm(p: Sequence[float]) -> list[float]:
    """(4), in the order of p."""
    adjusted, running = [1.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = running
    return adjusted

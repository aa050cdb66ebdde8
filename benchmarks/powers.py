r"""How a cost grows with a size: a power law, by least squares on logarithms, with the 95 % interval of Student's t.

log seconds = a + p log n                                                                     (1)
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy import stats


class Exponent(NamedTuple):
    """p of (1), and its interval."""

    value: float
    low: float
    high: float


def exponent(sizes: Sequence[float], times: Sequence[float]) -> Exponent:
    """The power law of some measurements; three at least."""
    fit = stats.linregress([math.log(n) for n in sizes], [math.log(t) for t in times])
    half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return Exponent(*(float(v) for v in (fit.slope, fit.slope - half, fit.slope + half)))


def grown(name: str, over: str, measured: dict[int, list[float]]) -> dict[str, Any]:
    """What was measured at each size, in seconds, with its exponent."""
    sizes = [n for n, times in measured.items() for _ in times]
    p = exponent(sizes, [t for times in measured.values() for t in times])
    return {
        "name": name,
        "over": over,
        "exponent": p.value,
        "low": p.low,
        "high": p.high,
        "ms": {n: 1e3 * statistics.median(times) for n, times in measured.items()},
    }


def words(found: dict[str, Any]) -> str:
    return (
        f"{found['name']}: seconds ~ {found['over']}^{found['exponent']:.2f} "
        f"[{found['low']:.2f}, {found['high']:.2f}]"
    )

r"""What pairs of measurements say about a ratio, and whether a bar is met.

Two ways a and b to one result are measured by turns. A busy machine slows both of a pair, so the ratio is taken in each
pair, and its median over the n pairs is what is stated, with the interval between two of the sorted ratios

    [r_(k), r_(n+1-k)],   k the largest with  2 P(Bin(n, 1/2) < k) <= 0.05                    (1)

which encloses the median of any continuous law with 95 % at least. (The percentile bootstrap of a median falls on the
same few values, and is too narrow where pairs are few: of 7 it encloses the median with 88 %.)

A bar counts as met when the whole interval is on its good side, as missed when all of it is on the other, and is
not resolved in between: more pairs or a quieter machine would tell. Fewer than 6 pairs have no such k: all of them are
the interval, and nothing is resolved.

Source: David & Nagaraja 2003, "Order Statistics", sec. 7.1.
"""

import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from scipy import stats

LEVEL, FEWEST = 0.95, 6

Verdict = Literal["met", "missed", "not resolved", ""]


class Interval(NamedTuple):
    """A median and the interval around it, equation (1)."""

    median: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """The median of some values and its interval."""
    ordered, n = sorted(values), len(values)
    # the first count that 2.5 % of samples do not exceed; of fewer than 6 it is 0
    k = max(int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5)), 1)
    return Interval(statistics.median(values), ordered[k - 1], ordered[n - k])


def verdict(
    ratio: Interval, pairs: int, at_least: float | None = None, at_most: float | None = None
) -> Verdict:
    """Whether a bar is met by so many pairs; "" without one."""
    if at_least is not None:
        good, bad = ratio.low >= at_least, ratio.high < at_least
    elif at_most is not None:
        good, bad = ratio.high <= at_most, ratio.low > at_most
    else:
        return ""
    if pairs < FEWEST or not (good or bad):
        return "not resolved"
    return "met" if good else "missed"


def row(
    name: str,
    peer: str,
    pairs: Sequence[tuple[float, float]],
    *,
    quantity: str = "speed",
    at_least: float | None = None,
    at_most: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One line of the table: ours over the peer's, with its bar.

    Args:
        name: what was done: "training step, U-Net at 32 x 32".
        peer: what it is held against: "TorchCFM's U-Net, bare loop".
        pairs: (ours, theirs), measured by turns. Seconds where `quantity` is "speed", whose ratio is theirs / ours:
            2 is twice as fast. Amounts otherwise ("memory", "error"), and then the ratio is ours / theirs.
        at_least: the ratio that was promised, where more is better.
        at_most: the same where less is better.
        more: anything else to keep in the JSON file.
    """
    fast = quantity == "speed"
    ratio = interval([b / a if fast else a / b for a, b in pairs])
    return {
        "name": name,
        "peer": peer,
        "quantity": quantity,
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "pairs": len(pairs),
        "bar": None if at_least is at_most is None else words(at_least, at_most),
        "verdict": verdict(ratio, len(pairs), at_least, at_most),
        **more,
    }


def words(at_least: float | None, at_most: float | None) -> str:
    return f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"


def require_equal_work(ours: dict[str, Any], theirs: dict[str, Any], rtol: float = 0.0) -> None:
    """Refuse a comparison of two sides that did not do the same.

        require_equal_work({"parameters": 35, "steps": 200}, {"parameters": 35, "steps": 200})

    Args:
        rtol: how far numbers may differ, relative to theirs.

    Raises:
        ValueError: a quantity differs, or one side does not state it.
    """
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        close = numbers(a, b) and abs(a - b) <= rtol * abs(b)  # type: ignore[operator, arg-type]
        if a is None or b is None or not (a == b or close):
            raise ValueError(f"unequal work: {name} is {a} on our side and {b} on the other")


def require_equal_losses(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Refuse final losses of several seeds that differ by more than the seeds do.

    Raises:
        ValueError: the means are more than four standard deviations apart, and more than a fifth.
    """
    mine, its = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    spread = max(*(float(v.std(correction=0)) for v in (mine, its)), 0.05 * abs(float(its.mean())))
    if not abs(float(mine.mean() - its.mean())) <= 4 * spread:
        raise ValueError(f"the final losses {ours} and {theirs} differ by more than seeds do")


def numbers(*values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)

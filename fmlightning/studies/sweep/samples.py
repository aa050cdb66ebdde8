r"""Values of continuous options: random, or of low discrepancy.

Point k of a digital sequence in base 2, with a random shift of its bits, is

    u_k = (b_k XOR s) 2^-30 + 2^-31,    b_k the 30 bits of Sobol's point k,   s keyed by seed and option      (1)

which is uniform on (0, 1) and keeps what makes the sequence even: of 2^m points, one lies in each interval of length
2^-m, in every option. A random point is keyed by its number, so in both methods more points leave the first as they
are. u is then mapped to a value by the inverse of its distribution function:

    uniform: a + (b - a) u      log_uniform: a (b / a)^u      integers: a + floor((b - a + 1) u)              (2)

Source: Owen 2003, "Variance with alternative scramblings of digital nets"; the points are scipy's, Joe and Kuo 2008.
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

SAMPLING = ("n", "method", "seed")
METHODS = ("sobol", "random")
BITS = 30

InverseCDF = Callable[[float, float, float], float]
DISTRIBUTIONS: dict[str, InverseCDF] = {
    "uniform": lambda a, b, u: a + (b - a) * u,
    "log_uniform": lambda a, b, u: a * (b / a) ** u,
    "integers": lambda a, b, u: a + math.floor((b - a + 1) * u),
}


def sampled(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The points, each a value by option.

    Raises:
        ValueError: what is wrong with the section `samples`.
    """
    n, method, seed = content.get("n"), content.get("method", "sobol"), content.get("seed", 0)
    if type(n) is not int or n < 1:
        raise ValueError(f"samples.n: {n} must be a whole number above 0")
    if method not in METHODS:
        raise ValueError(f"samples.method: {method} must be one of {', '.join(METHODS)}")
    if type(seed) is not int:
        raise ValueError(f"samples.seed: {seed} must be a whole number")
    distributions = {
        option: distribution(option, spec)
        for option, spec in content.items()
        if option not in SAMPLING
    }
    if not distributions:
        raise ValueError(
            "samples: names no option; such as model.optimizer.lr: {log_uniform: [1.0e-4, 1.0e-2]}"
        )
    numbers = {"sobol": sobol, "random": random}[method](list(distributions), n, seed)
    return [
        {o: distributions[o](u) for o, u in zip(distributions, row, strict=True)} for row in numbers
    ]


def distribution(option: str, spec: Any) -> Callable[[float], float | int]:
    """A distribution of the file, as a function of u in (0, 1)."""
    place = f"samples.{option}"
    kind = next(iter(spec), None) if isinstance(spec, dict) and len(spec) == 1 else None
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"{place}: {spec} must be {{{' | '.join(DISTRIBUTIONS)}: [low, high]}}")
    ends = spec[kind]
    if not (
        isinstance(ends, list) and len(ends) == 2 and all(type(e) in (int, float) for e in ends)
    ):
        raise ValueError(f"{place}.{kind}: {ends} must be two numbers [low, high]")
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{place}.{kind}: {ends} must be finite, the lower end first")
    if kind == "log_uniform" and low <= 0:
        raise ValueError(f"{place}.{kind}: {ends} must be above 0")
    if kind == "integers":
        if type(low) is not int or type(high) is not int:
            raise ValueError(f"{place}.{kind}: {ends} must be whole numbers")
        return lambda u: int(DISTRIBUTIONS["integers"](low, high, u))
    # six digits: what is printed is what is run, on any machine
    return lambda u: float(f"{DISTRIBUTIONS[kind](low, high, u):.6g}")


def word(seed: int, *names: int | str) -> int:
    """BITS random bits that belong to a name."""
    digest = blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - BITS)


def random(options: list[str], n: int, seed: int) -> list[list[float]]:
    return [[centre(word(seed, option, k)) for option in options] for k in range(n)]


def sobol(options: list[str], n: int, seed: int) -> list[list[float]]:
    """Equation (1)."""
    from scipy.stats.qmc import Sobol

    points = Sobol(len(options), scramble=False, bits=BITS).random_base2(math.ceil(math.log2(n)))
    shifts = [word(seed, option) for option in options]
    return [
        [centre(int(u * 2**BITS) ^ s) for u, s in zip(row, shifts, strict=True)]
        for row in points[:n]
    ]


def centre(bits: int) -> float:
    return (bits + 0.5) * 2.0**-BITS

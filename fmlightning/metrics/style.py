"""Looks of figures, in one place and without torch: a colour and a marker for each solver and path, names in words.

A solver or a path looks the same in every figure, whatever stands beside it. Other curves take the colours in turn.
"""

import re
from collections.abc import Sequence
from typing import Any

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f0f40", "#8c6d31", "#7a7a7a", "#222222",
)  # fmt: skip
"""The first six are told apart by colour-blind readers too (Okabe and Ito 2008)."""

MARKERS = "osD^v<>pXh"
LINES = ("-", "--", ":", "-.")
REAL = "#444444"
"""Of what real samples score."""

FIXED = {
    # solvers
    "euler": (0, "o"), "midpoint": (5, "s"), "heun2": (1, "s"), "heun3": (3, "^"), "rk4": (2, "D"),
    "ab2": (4, "v"), "ab3": (7, "<"), "ab4": (6, ">"), "dpmpp_2m": (9, "P"),
    "explicit_adams": (8, "p"), "implicit_adams": (8, "h"),
    "dopri5": (9, "*"), "dopri8": (6, "*"), "bosh3": (7, "*"), "fehlberg2": (8, "*"), "adaptive_heun": (4, "*"),
    "euler_maruyama": (0, "X"), "stochastic_heun": (1, "X"),
    # paths
    "Linear": (0, "o"), "Trigonometric": (1, "s"), "VariancePreserving": (4, "^"), "VarianceExploding": (2, "D"),
    "LinearVP": (3, "v"), "Polynomial": (5, "<"), "IndependentCFM": (6, ">"), "SchrodingerBridge": (7, "p"),
}  # fmt: skip
"""Colour and marker of each solver and path."""

METRICS = {
    "frechet": "Frechet distance", "fid": "FID", "sfid": "sFID", "kid": "KID", "accuracy": "accuracy",
    "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage",
    "inception_score": "Inception score", "classifier_score": "classifier score", "w2": "Wasserstein-2 distance",
    "w2_squared": "squared Wasserstein-2 distance", "kl": "KL divergence in nats",
    "nll": "negative log-likelihood in nats", "bits_per_dimension": "bits per dimension",
    "solver_error": "RMS distance from the exact solution", "path_energy": "path energy", "energy": "path energy",
    "npe": "normalised path energy", "transport_cost": "transport cost", "straightness": "straightness",
    "loss": "loss", "nfe": "NFE", "seconds_per_sample": "seconds per sample",
}  # fmt: skip
FEATURES = {"digits": "digits classifier", "textures": "textures", "inception": "Inception network"}
SPLITS = {"train": "training", "val": "validation"}
LONGEST = 40
"""Letters of an axis label in one line."""


def looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, marker and line of curves: those of a solver or path that is there twice differ by their line."""
    words = [re.match(r"\w*", name) for name in names]
    bases = [m[0] if m and m[0] in FIXED else name for m, name in zip(words, names, strict=True)]
    others = [base for base in dict.fromkeys(bases) if base not in FIXED]
    taken = {FIXED[base][0] for base in bases if base in FIXED}
    free = [k for k in range(len(PALETTE)) if k not in taken] or list(range(len(PALETTE)))
    found = []
    for k, base in enumerate(bases):
        line, turn = bases[:k].count(base), others.index(base) if base in others else 0
        colour, marker = FIXED.get(base, (free[turn % len(free)], MARKERS[turn % len(MARKERS)]))
        style = LINES[(line + turn // len(free)) % len(LINES)]
        found.append({"color": PALETTE[colour], "marker": marker, "linestyle": style})
    return found


def in_words(metric: str) -> str:
    """A metric for the label of an axis: `frechet_digits@350` as Frechet distance (digits classifier), 350 samples.

    A metric that has no words here keeps its name.
    """
    split, _, score = metric.rpartition("/")
    name, _, number = score.partition("@")
    base, _, kind = name.rpartition("_")
    features = FEATURES[kind] if kind in FEATURES and base in METRICS else ""
    if (name if not features else base) not in METRICS:
        return metric
    words = f"{METRICS[base]} ({features})" if features else METRICS[name]
    if split and split != "eval":
        words = f"{SPLITS.get(split, split)} {words}"
    words = words[0].upper() + words[1:] if words[1:2].islower() else words
    samples = "infinitely many" if number == "inf" else number
    notes = [f"{samples} samples"] if number else []
    notes += ["during training"] if split == "eval" else []
    long = sum(map(len, (words, *notes))) > LONGEST
    return (
        ", ".join([words, *notes])
        if not long
        else ",\n".join(filter(None, [words, ", ".join(notes)]))
    )

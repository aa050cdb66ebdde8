r"""Couplings: which source point goes to which data point.

    pairs (x0, x1) of a batch;   OT: the pairing with the least   mean |x0 - x1|^2  (1)

Independent pairs cross, so their marginal flow has to bend. Optimal transport of a batch takes most crossings away,
more the larger the batch; the entropic coupling lies between.

Source: Tong et al. 2024, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772.
"""

from collections.abc import Iterator

import torch
from matplotlib.figure import Figure

from fmlightning.flow.couplings import (
    Coupling,
    Independent,
    MinibatchOT,
    Pairs,
    SchrodingerBridgeCoupling,
)
from fmlightning.flow.shapes import Points
from fmlightning.metrics.figures import DATA as RED
from fmlightning.metrics.figures import SOURCE, finish

from .scene import DATA, F64, KEY, LIMITS, Detail, dots, noise, tracks

POINTS = 192
PANELS: dict[str, tuple[Coupling, int]] = {
    "independent": (Independent(), POINTS),
    "OT, batches of 16": (MinibatchOT(), 16),
    f"OT, one batch of {POINTS}": (MinibatchOT(), POINTS),
    "Schrödinger bridge, s = 0.7": (SchrodingerBridgeCoupling(0.7), POINTS),
}


def draw(detail: Detail) -> Iterator[tuple[str, Figure]]:
    figure = Figure(figsize=(13, 3.95), layout="constrained")
    x0 = noise(detail.particles)[:POINTS]
    x1 = DATA.sample(tuple(x0.shape), KEY.fold("coupled").generator(), F64)
    for axis, (name, (coupling, size)) in zip(figure.subplots(1, 4), PANELS.items(), strict=True):
        i, j = paired(coupling, x0, x1, size)
        tracks(axis, torch.stack((x0[i], x1[j])), colors="k", linewidths=0.5, alpha=0.5)
        dots(axis, x0, SOURCE, 9)
        dots(axis, x1, RED, 9)
        cost = float((x0[i] - x1[j]).square().sum(1).mean())
        finish(axis, f"{name}\nmean squared length {cost:.2f}", LIMITS)
    yield "couplings.png", figure


def paired(coupling: Coupling, x0: Points, x1: Points, size: int) -> Pairs:
    """Index pairs, coupled batch by batch."""
    generator = KEY.fold("pairs").generator()
    batches = torch.arange(len(x0)).split(size)
    pairs = [(b, coupling.pairs(x0[b], x1[b], None, generator)) for b in batches]
    return torch.cat([b[i] for b, (i, _) in pairs]), torch.cat([b[j] for b, (_, j) in pairs])

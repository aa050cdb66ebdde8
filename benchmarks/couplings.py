"""What it takes to pair a batch: the exact solvers side by side, and against TorchCFM's.

    benchmarks/.venv/bin/python benchmarks/couplings.py --out couplings.json

Points in the plane are 8 Gaussians and two moons; images are Gaussian noise and uniform pixels, 3 x 32 x 32. Both sides
of a comparison get the same points and must find plans of the same cost. Where `MinibatchOT` changes over from scipy's
assignment to POT's network simplex, and from when on it finds prices first, is decided by these lines. Beside them: a
potential's lookup instead of an assignment, blocks and pools for each batch of 256, and how the time grows with the
number of points. Entropic plans
take a regularisation, which is another problem; their line states by how much their pairs are longer.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from ratios import require_equal_work, row
from scipy.optimize import linear_sum_assignment
from timing import by_turns, report, seconds, settings
from torch import Tensor

from fmlightning.flow.couplings import Entropic, MinibatchOT, Potential, squared_distances
from fmlightning.flow.couplings.exact import fastest
from fmlightning.flow.couplings.warm_start import warm_started, without_least
from fmlightning.flow.keys import Key
from fmlightning.flow.toys import EightGaussians, Moons

try:
    from torchcfm.optimal_transport import OTPlanSampler
except ImportError:  # only in the environment of the benchmarks
    OTPlanSampler = None

Batch = tuple[Tensor, Tensor]
Law = Literal["plane", "images"]

BATCHES = 4
MANY = 4096
"""Points whose pairing takes seconds: one batch and few pairs of times."""
SIZES: dict[Law, tuple[int, ...]] = {
    "plane": (64, 128, 256, 512, 1024, 4096),
    "images": (64, 128, 256, 512),
}
DATA = 5000


def batches(law: Law, size: int) -> list[Batch]:
    """Some batches, as solvers take longer for one than for another."""
    generator, count = Key(size).fold(law).generator(), BATCHES if size < MANY else 1
    if law == "plane":
        shape = (size, 2)
        return [
            (EightGaussians().sample(shape, generator), Moons().sample(shape, generator))
            for _ in range(count)
        ]
    shape = (size, 3072)
    return [
        (torch.randn(shape, generator=generator), 2 * torch.rand(shape, generator=generator) - 1)
        for _ in range(count)
    ]


def paired(coupling: Any, batch: Batch) -> Batch:
    """The points of a batch, pair by pair."""
    x0, x1 = batch
    i, j = coupling.pairs(x0, x1, None, Key(0).generator())
    return x0[i], x1[j]


def mean_cost(x0: Tensor, x1: Tensor) -> float:
    return float((x0.double() - x1.double()).square().sum(1).mean())


def in_turn(pair: Callable[[Any], Any], of: list[Any]) -> Callable[[], Any]:
    """A call that takes the next batch."""
    rest = cycle(of)
    return lambda: pair(next(rest))


def of_solvers(law: Law, size: int, repeats: int) -> dict[str, Any]:
    """Our choice against the other solver."""
    found = batches(law, size)
    ours = fastest(size, found[0][0].shape[1])
    other: Any = "assignment" if ours == "simplex" else "simplex"
    mine, its = MinibatchOT(method=ours), MinibatchOT(method=other)
    for batch in found:  # also the warm-up
        first, second = ({"cost": mean_cost(*paired(c, batch))} for c in (mine, its))
        require_equal_work(first, second, rtol=1e-6)
    pairs = by_turns(
        in_turn(partial(paired, mine), found),
        in_turn(partial(paired, its), found),
        repeats if size < MANY else min(repeats, 7),
    )
    return row(f"pairs of {size}, {law}: {ours}", other, pairs)


def of_prices(law: Law, size: int, repeats: int) -> dict[str, Any]:
    """scipy's assignment from prices, against what it takes without."""
    costs = [squared_distances(*batch) for batch in batches(law, size)]

    def without(cost: Tensor) -> Tensor:
        reduced, _ = without_least(cost)
        return torch.from_numpy(linear_sum_assignment(reduced.numpy())[1])

    def with_prices(cost: Tensor) -> Tensor:
        return torch.from_numpy(linear_sum_assignment(warm_started(cost).numpy())[1])

    for cost in costs:
        if not torch.equal(without(cost), with_prices(cost)):
            raise ValueError("the two assignments differ")
    pairs = by_turns(in_turn(with_prices, costs), in_turn(without, costs), repeats)
    return row(f"pairs of {size}, {law}: from prices", "from none", pairs)


def of_torchcfm(law: Law, size: int, repeats: int) -> dict[str, Any]:
    """Our exact pairs against TorchCFM's."""
    found, peer = batches(law, size), OTPlanSampler(method="exact")
    for batch in found:
        plan = torch.as_tensor(peer.get_map(*batch))
        distances = torch.cdist(batch[0].double(), batch[1].double()).square()
        its = {"cost": float((plan * distances).sum())}
        # it computes distances in float32
        require_equal_work({"cost": mean_cost(*paired(MinibatchOT(), batch))}, its, rtol=1e-4)
    pairs = by_turns(
        in_turn(partial(paired, MinibatchOT()), found),
        in_turn(lambda batch: peer.sample_plan(*batch), found),
        repeats,
    )
    bar = 1.0 if law == "images" else None
    return row(f"pairs of {size}, {law}", "TorchCFM's sample_plan", pairs, at_least=bar)


def of_lookup(repeats: int) -> dict[str, Any]:
    """A potential of 5,000 points of data against the assignment of a batch."""
    found = batches("plane", 256)
    data = Moons().sample((DATA, 2), Key(0).generator())
    # of what it holds the time does not depend on
    potential = Potential(data, torch.zeros(DATA, dtype=torch.float64))
    pairs = by_turns(
        in_turn(lambda batch: potential.targets(batch[0], Key(0).generator()), found),
        in_turn(partial(paired, MinibatchOT()), found),
        repeats,
    )
    return row("pairs of 256, plane: lookup among 5000", "assignment", pairs)


def of_entropic(repeats: int) -> dict[str, Any]:
    """Sinkhorn with a twentieth of the mean cost as entropy."""
    found = batches("plane", 256)
    reg = 0.05 * mean_cost(*found[0])
    entropic = Entropic(reg=reg)
    longer = [
        mean_cost(*paired(entropic, batch)) / mean_cost(*paired(MinibatchOT(), batch))
        for batch in found
    ]
    pairs = by_turns(
        in_turn(partial(paired, MinibatchOT()), found),
        in_turn(partial(paired, entropic), found),
        max(3, repeats // 3),
    )
    times = statistics.mean(longer)
    return row("pairs of 256, plane", "entropic", pairs, pairs_longer_by=times)


def of_pools(repeats: int) -> dict[str, Any]:
    """Cost and seconds for each batch of 256 that is paired in blocks, alone, or in a pool."""
    points = batches("plane", 1024)
    found: dict[str, Any] = {}
    for size in (64, 128, 256, 512, 1024):
        coupling = MinibatchOT(ot_batch_size=size)
        costs = [mean_cost(*paired(coupling, batch)) for batch in points]
        took = [seconds(partial(paired, coupling, batch)) / 4 for batch in points * repeats]
        found[str(size)] = {"cost": statistics.mean(costs), "ms": 1e3 * statistics.median(took)}
    return found


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The exponent of the time of our pairs in the number of points, from the two largest sizes."""
    exponents: dict[str, float] = {}
    for law, sizes in SIZES.items():
        times = [r["ours"] for r in rows if f", {law}: " in r["name"]]
        exponents[law] = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
    return exponents


def main() -> None:
    flags = settings(__doc__ or "", repeats=15)
    cells = [(law, size) for law, sizes in SIZES.items() for size in sizes]
    solvers = [of_solvers(law, size, flags.repeats) for law, size in cells]
    prices = [of_prices(law, size, flags.repeats) for law, size in cells if 128 <= size <= 512]
    few = [(law, size) for law, size in cells if size < MANY]
    peers = [of_torchcfm(law, size, flags.repeats) for law, size in few] if OTPlanSampler else []
    others = [of_lookup(flags.repeats), of_entropic(flags.repeats)]
    exponents = growth(solvers)
    for law, exponent in exponents.items():
        print(f"time of pairs ~ size^{exponent:.2f} ({law})")
    report(
        {
            "rows": [*solvers, *prices, *peers, *others],
            "exponents": exponents,
            "pools": of_pools(max(1, flags.repeats // 5)),
        },
        flags,
    )


if __name__ == "__main__":
    main()

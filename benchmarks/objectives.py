"""Seconds of a training step: by maximum likelihood, against flow matching.

    python benchmarks/objectives.py --mixture RUN --likelihood RUN --out objectives.json

Both sides take steps of one optimiser on one batch with networks of one shape, by turns, the Trainer left out. How many
evaluations a solver needs depends on the flow that was learned, so the networks are those of finished runs, of
configs/toy/mixture.yaml and configs/toy/likelihood.yaml, and untrained ones without.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from ratios import row
from timing import begin, by_turns, report
from torch import Tensor, nn

import fmlightning
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.cfm import cfm_loss
from fmlightning.flow.objectives.maximum_likelihood import MaximumLikelihood
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture
from fmlightning.nets.mlp import TimeMLP

BATCH = 256
LAW = GaussianMixture(
    [0.4, 0.3, 0.2, 0.1],
    [[-2.0, 0.0], [1.5, 1.5], [1.0, -2.0], [-1.0, 2.5]],
    [0.6, 0.4, 0.5, 0.3],
)


def network(run: Path | None) -> nn.Module:
    """The network of a run, or an untrained one."""
    if run is not None:
        return fmlightning.load(run).network.train().requires_grad_(True)
    with seeded(Key(0)):
        return TimeMLP(dim=2, width=64, depth=4)


def stepper(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One step of the optimiser; a learning rate of zero leaves the flow as it is."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixture", type=Path, help="a run directory")
    parser.add_argument("--likelihood", type=Path, help="a run directory")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file; printed if not given")
    flags = parser.parse_args()
    begin(flags)

    generator, path = Key(0).generator(), Linear()
    x1, x0 = LAW.sample((BATCH, 2), generator), torch.randn(BATCH, 2, generator=generator)
    t = torch.rand(BATCH, generator=generator)
    matched, likely = network(flags.mixture), network(flags.likelihood)
    field, objective = NetworkField(likely, path), MaximumLikelihood()
    cfm = stepper(matched, lambda: cfm_loss(matched, path, path.sample(x0, x1, t)))
    cnf = stepper(likely, lambda: objective(field, x1, Gaussian()))
    cfm(), cnf()  # the warm-up
    pairs = by_turns(cfm, cnf, flags.repeats)
    result = {
        "rows": [row("training step, points", "maximum likelihood", pairs)],
        "batch": BATCH,
        "flow_matching_s": statistics.median(a for a, _ in pairs),
        "maximum_likelihood_s": statistics.median(b for _, b in pairs),
        "times_slower": statistics.median(b / a for a, b in pairs),
        "evaluations": evaluations(objective, field, x1),
    }
    report(result, flags)


def evaluations(objective: MaximumLikelihood, field: NetworkField, x1: Tensor) -> int:
    """How often one likelihood calls the network."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = field.network.register_forward_hook(count)
    with torch.no_grad():
        objective(field, x1, Gaussian())
    handle.remove()
    return calls


if __name__ == "__main__":
    main()

"""The exact log-likelihood of 2,000 points in the plane, against the usual loop.

    python benchmarks/likelihood.py --out likelihood.json

The other side is what most codebases hold: torchdiffeq on the pair (x, l), where every evaluation of the
field also takes one backward pass for each dimension. Both sides take the same steps of the same method with
the same network, call it as often, and have to agree to 1e-4 nats. What differs is where the divergence is taken:
ours leaves it out at the stages whose slope does not enter the step: one of two in midpoint, one of three in
heun3, none in heun2 and rk4, which are here to show that nothing else differs.
"""

from functools import partial

import torch
from ratios import row
from timing import report, settings, side_by_side
from torch import Tensor
from torchdiffeq import odeint

from fmlightning.flow.keys import Key
from fmlightning.flow.likelihood import log_prob
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import Method, ODESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.nets.mlp import TimeMLP

POINTS, STEPS = 2000, 20
METHODS: tuple[Method, ...] = "midpoint", "heun3", "heun2", "rk4"
SKIPPING = "midpoint", "heun3"  # have stages without a divergence


class Calls:
    """A field that counts its calls."""

    def __init__(self, field: NetworkField) -> None:
        self.field, self.count = field, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return self.field(x, t)


def network(generator: torch.Generator) -> TimeMLP:
    """An untrained network whose velocities are of order one."""
    net = TimeMLP(dim=2, width=64, depth=3)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return net


def loop(field: Calls, x1: Tensor, method: str) -> Tensor:
    """log p1 by one backward pass for each dimension in every evaluation."""

    def rates(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = field(x, t)
            trace = torch.zeros(len(x))
            for i in range(x.shape[1]):
                trace += torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i]
        return v.detach(), trace

    times = torch.linspace(1, 0, STEPS + 1)
    with torch.no_grad():
        x, integral = odeint(rates, (x1, torch.zeros(len(x1))), times, method=method)
    return Gaussian().log_prob(x[-1]) + integral[-1]


def main() -> None:
    flags = settings(__doc__ or "", repeats=15)
    generator = Key(0).generator()
    field, x1 = (
        NetworkField(network(generator), Linear()),
        torch.randn(POINTS, 2, generator=generator),
    )
    methods, rows = {}, []
    for method in METHODS:
        solver = ODESolver(method, STEPS)
        mine, other = Calls(field), Calls(field)
        found = side_by_side(
            partial(log_prob, mine, x1, Gaussian(), Linear(), solver),
            partial(loop, other, x1, method),
            repeats=flags.repeats,
            atol=1e-4,
        )
        if mine.count != other.count:
            raise ValueError(f"{method}: {mine.count} evaluations against {other.count}")
        found["evaluations"] = mine.count / (flags.repeats + 1)
        methods[method] = found
        bar = 1.0 if method in SKIPPING else None
        rows.append(row(f"log-likelihood, {method}", "torchdiffeq", found["pairs_s"], at_least=bar))
    report({"rows": rows, "points": POINTS, "steps": STEPS, "methods": methods}, flags)


if __name__ == "__main__":
    main()

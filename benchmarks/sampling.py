"""Fixed-step sampling: our solver, a loop written by hand around the bare network, and torchdiffeq called directly.

    python benchmarks/sampling.py --out sampling.json

All take the same steps of the same method with the same velocity, call it as often, and have to agree to 1e-4. The hand
loop knows its method and its grid and checks nothing; ours counts its evaluations, checks every shape, takes any field
and grid, and says when and which samples were lost. The solver is given the bare network's velocity, as the others are,
and then also a `NetworkField`, which checks times, shapes and precision around it at every call.
"""

from collections.abc import Callable
from functools import partial

import torch
from ratios import require_equal_work, row
from timing import by_turns, report, settings
from torch import Tensor, nn
from torchdiffeq import odeint

from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.nets.mlp import TimeMLP

NFE = 100
BATCHES = 256, 10_000
LARGE = 1000
"""Points from which on the network takes nearly all the time, whatever calls it."""
WITHIN = 0.95  # of the hand loop's speed
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}

Velocity = Callable[[Tensor, Tensor], Tensor]
Call = Callable[[Tensor, float], Tensor]


def network() -> TimeMLP:
    """An untrained network whose velocities are of order one."""
    net, generator = TimeMLP(dim=2, width=64, depth=4), Key(0).generator()
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    return net.eval().requires_grad_(False)


def euler(v: Call, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * v(x, t)


def midpoint(v: Call, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


def heun2(v: Call, x: Tensor, t: float, h: float) -> Tensor:
    k = v(x, t)
    return x + h / 2 * (k + v(x + h * k, t + h))


def rk4(v: Call, x: Tensor, t: float, h: float) -> Tensor:
    """The 3/8 rule, which is torchdiffeq's."""
    a = v(x, t)
    b = v(x + h / 3 * a, t + h / 3)
    c = v(x + h * (b - a / 3), t + 2 * h / 3)
    d = v(x + h * (a - b + c), t + h)
    return x + h / 8 * (a + 3 * (b + c) + d)


STEPS = {"euler": euler, "midpoint": midpoint, "heun2": heun2, "rk4": rk4}


def velocity(net: nn.Module) -> Velocity:
    """The velocity at one time for all."""
    return lambda x, t: net(x, t.expand(len(x)))


def by_hand(net: nn.Module, x: Tensor, method: str, num_steps: int) -> Tensor:
    step, h, v = STEPS[method], 1 / num_steps, velocity(net)
    with torch.no_grad():
        for k in range(num_steps):
            x = step(lambda x, t: v(x, x.new_full((), t)), x, k * h, h)
    return x


def by_torchdiffeq(net: nn.Module, x: Tensor, method: str, num_steps: int) -> Tensor:
    times = torch.linspace(0, 1, num_steps + 1)
    with torch.no_grad():
        v = velocity(net)
        return odeint(lambda t, x: v(x, t), x, times, method=method)[-1]


def by_solver(net: nn.Module, x: Tensor, method: str, num_steps: int) -> Tensor:
    with torch.no_grad():
        solver = ODESolver(method, num_steps)  # type: ignore[arg-type]
        return solver.solve(velocity(net), x).x


def by_field(net: nn.Module, x: Tensor, method: str, num_steps: int) -> Tensor:
    with torch.no_grad():
        return ODESolver(method, num_steps).solve(NetworkField(net, Linear()), x).x  # type: ignore[arg-type]


COMPARED = (
    ("solver", by_solver, "hand loop", by_hand, WITHIN),
    ("solver", by_solver, "torchdiffeq", by_torchdiffeq, None),
    ("solver and field", by_field, "hand loop", by_hand, None),
)


def calls(net: nn.Module, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """How often a solve calls the network, and what it returns."""
    count = 0

    def tick(*_: object) -> None:
        nonlocal count
        count += 1

    handle = net.register_forward_hook(tick)
    x = run()
    handle.remove()
    return count, x


def main() -> None:
    flags = settings(__doc__ or "", repeats=21)
    net, rows = network(), []
    for size in BATCHES:
        x = torch.randn(size, 2, generator=Key(1).generator())
        for method, stages in STAGES.items():
            for name, mine, peer, run, bar in COMPARED if size < LARGE else COMPARED[:1]:
                ours, theirs = (partial(f, net, x, method, NFE // stages) for f in (mine, run))
                (n, a), (m, b) = calls(net, ours), calls(net, theirs)
                require_equal_work({"NFE": n}, {"NFE": m})
                if not float((a - b).abs().max()) < 1e-4:  # float32 over a hundred evaluations
                    raise ValueError(
                        f"{method}: {name} and {peer} differ by {float((a - b).abs().max()):g}"
                    )
                # a solve of the large batch takes a second: it is long enough for few pairs to tell
                repeats = flags.repeats if size < LARGE else min(flags.repeats, 15)
                pairs = by_turns(ours, theirs, repeats)
                what = f"{name}: {method}, {n} evaluations, batch {size}"
                rows.append(row(what, peer, pairs, at_least=bar))
    report({"rows": rows}, flags)


if __name__ == "__main__":
    main()

r"""The theorems of flow matching, checked on distributions whose answers are known in closed form.

For each path, on the interval where it lives, with q a Gaussian mixture and a Gaussian source:

    d_t log p + div u + u . grad log p = 0        the continuity equation                           (1)
    sum_k r_k u(x | z_k) = u(x)                   the marginalisation trick                         (2)
    L_CFM = L_FM + C,   equal gradients           why regression on conditional velocities works    (3)
    log p_b(x_b) = log p_a(x_a) - int_a^b div u   transport by the flow, point by point             (4)
    int p = 1                                     mass is kept                                      (5)

(1) holds for u + w exactly if div(p w) = 0: one such w must pass and a like one must fail. (3) is computed by
quadrature in one dimension, where the trapezoidal rule converges exponentially for analytic functions with Gaussian
tails, and again by Monte Carlo in two. Where the start of sampling is not the true p_0 the difference, in nats,
is what no solver can remove: the Kullback-Leibler divergence is unchanged by the flow.

Source: Lipman et al. 2023, arXiv:2210.02747, Theorems 1 and 2; Lipman et al. 2024, arXiv:2412.06264, sec. 3.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from scipy.special import roots_legendre
from torch import Tensor, nn

from fmlightning.flow.keys import Key
from fmlightning.flow.likelihood import log_prob
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.cfm import cfm_loss
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.path import PathSample
from fmlightning.flow.paths.predictions import PREDICTIONS, Prediction
from fmlightning.flow.paths.schedules import (
    Curves,
    IndependentCFM,
    Linear,
    LinearVP,
    Polynomial,
    SchrodingerBridge,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from fmlightning.flow.shapes import Field, PerSample, Points, Times
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, MixturePath, OracleNetwork
from fmlightning.flow.theory.sde_bias import DIFFUSIONS, variance_bias

F64 = torch.float64


KEY = Key(0).fold("verify")


LINE = GaussianMixture([0.5, 0.3, 0.2], [[-1.5], [0.4], [1.8]], [0.5, 0.35, 0.4])


PLANE = GaussianMixture([0.5, 0.3, 0.2], [[-1.5, 0.0], [1.2, 1.0], [0.5, -1.6]], [0.5, 0.35, 0.4])


POINTS = GaussianMixture(
    torch.arange(1, 13, dtype=F64) / 78,
    PLANE.sample((12, 2), KEY.fold("points").generator(), F64),
    0.0,
)


SCHEDULES: tuple[AffinePath, ...] = (
    Linear(),
    Linear(sigma_min=0.1),
    IndependentCFM(),
    SchrodingerBridge(),
    VariancePreserving(),
    VarianceExploding(),
    Trigonometric(),
    Polynomial(),
    LinearVP(),
    Curves(lambda t: t**2 * (3 - 2 * t), lambda t: (1 - t) * (1 + t / 2)),
)


BIAS_STEPS = 40, 160


class Row(NamedTuple):
    """One theorem on one path: what was measured and what it may be."""

    name: str
    path: str
    value: float
    tolerance: float
    passed: bool
    relation: str = "<="


def at_most(name: str, schedule: AffinePath, value: Tensor, tolerance: float) -> Row:
    measured = float(value)  # nan fails
    return Row(name, label(schedule), measured, tolerance, measured <= tolerance)


def label(schedule: AffinePath) -> str:
    """The name of a path, its settings that are not the default, and its interval."""
    name = type(schedule).__name__
    if dataclasses.is_dataclass(schedule):
        settings = [
            (f.name, getattr(schedule, f.name), f.default) for f in dataclasses.fields(schedule)
        ]
        changed = [f"{key}={value}" for key, value, default in settings if value != default]
        name += f"({', '.join(changed)})" if changed else ""
    low, high = schedule.t_range
    return f"{name} on [{low:g}, {high:g}]"


def continuity(schedule: AffinePath) -> Row:
    path = PLANE.along(schedule)
    residual = continuity_residual(path, path.velocity, *cloud(path))
    return at_most("continuity equation", schedule, residual.max(), 1e-10)


def continuity_kept(schedule: AffinePath) -> Row:
    """w = V rot(grad p) / p has div(p w) = 0: another velocity of the same path."""
    path = PLANE.along(schedule)

    def turned(x: Tensor, t: Tensor) -> Tensor:
        return path.velocity(x, t) + drift(path, x, t).flip(1) * torch.tensor([-1, 1], dtype=F64)

    residual = continuity_residual(path, turned, *cloud(path))
    return at_most("continuity, div(p w) = 0", schedule, residual.max(), 1e-10)


def continuity_broken(schedule: AffinePath) -> Row:
    """w = V grad p / p, the same vector not turned, has div(p w) != 0 and must be noticed."""
    path = PLANE.along(schedule)
    residual = continuity_residual(
        path, lambda x, t: path.velocity(x, t) + drift(path, x, t), *cloud(path)
    )
    value = float(residual.median())
    return Row("continuity, div(p w) != 0", label(schedule), value, 1e-3, value > 1e-3, ">")


def drift(path: MixturePath, x: Points, t: Times) -> Points:
    """V grad log p: of the size of x at all times, so that it weighs against any velocity."""
    return path.path.variance(t)[:, None] * path.score(x, t)


def continuity_residual(path: MixturePath, field: Field, x: Points, t: Times) -> PerSample:
    """|sum of the terms of (1)| / sum of |terms|: densities by autograd, nothing from the closed forms of u."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    score, d_log_p = torch.autograd.grad(path.log_prob(x, t).sum(), (x, t))
    v = field(x, t)
    rows = [torch.autograd.grad(v_i.sum(), x, retain_graph=True)[0] for v_i in v.unbind(1)]
    div = torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)
    terms = torch.stack((d_log_p, div, (v * score).sum(1))).detach()
    return terms.sum(0).abs() / terms.abs().sum(0)


def cloud(path: MixturePath, num_times: int = 24, per_time: int = 64) -> tuple[Points, Times]:
    """Points where the path is likely, and twice as far out, at times that avoid both ends."""
    low, high = path.t_range
    times = low + (high - low) * (torch.arange(num_times, dtype=F64) + 0.5) / num_times
    generator = KEY.fold("cloud").generator()
    shape = (per_time, *(path.mixture.event_shape or ()))
    x = torch.cat([path.marginal(float(t)).sample(shape, generator, F64) for t in times])
    return torch.cat((x, 2 * x)), times.repeat_interleave(per_time).repeat(2)


def marginalisation(schedule: AffinePath) -> Row:
    """(2) for a finite data set, with the posterior by Bayes' rule on the conditional paths."""
    path, conditional = POINTS.along(schedule), schedule
    x, t = cloud(path)
    alpha, variance = schedule.alpha(t)[:, None], schedule.variance(t)[:, None]
    each = [conditional.velocity(x, y.expand_as(x), t) for y in POINTS.means]
    likelihood = [torch.distributions.Normal(alpha * y, variance.sqrt()) for y in POINTS.means]
    posterior = (
        torch.stack([law.log_prob(x).sum(1) for law in likelihood]) + POINTS.weights[:, None].log()
    )
    terms = posterior.softmax(0)[..., None] * torch.stack(each)
    error = (terms.sum(0) - path.velocity(x, t)).norm(dim=1) / terms.norm(dim=2).sum(0)
    return at_most("marginalisation trick", schedule, error.max(), 1e-12)


def parameterisations(schedule: AffinePath) -> Row:
    """A perfect network gives the same velocity whether it predicts velocity, data, noise or score."""
    path = PLANE.along(schedule)
    x, t = cloud(path)
    names: Iterable[Prediction] = PREDICTIONS  # type: ignore[assignment]
    fields = [NetworkField(OracleNetwork(path, name), schedule, name) for name in names]
    u = path.velocity(x, t)
    error = torch.stack([(field(x, t) - u).norm(dim=1) for field in fields])
    return at_most(
        "four parameterisations", schedule, (error / (u.norm(dim=1) + x.norm(dim=1))).max(), 1e-8
    )


class Waves(nn.Module):
    """A small smooth network with poles no nearer than pi/2, so that quadrature converges."""

    def __init__(self, dim: int, hidden: int = 6) -> None:
        super().__init__()
        generator = KEY.fold("waves").generator()
        draw = torch.rand(hidden, 2 * dim + 2, generator=generator, dtype=F64) * 2 - 1
        self.inner = nn.Parameter(draw[:, : dim + 2] / dim)
        self.outer = nn.Parameter(draw[:, dim + 2 :])

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        features = torch.cat((x, t[:, None], torch.ones_like(t)[:, None]), 1)
        return torch.tanh(features @ self.inner.T) @ self.outer


class Spring(nn.Module):
    """A network unlike the other: linear, unbounded, and far from the truth."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return 0.7 - 2 * (1 + t[:, None]) * x


def constant(schedule: AffinePath) -> Row:
    """L_CFM - L_FM - C relative to L_CFM, by quadrature."""
    network = Waves(1)
    with torch.no_grad():
        cfm, (fm, C) = conditional_loss(network, schedule), marginal_loss(network, schedule)
    return at_most("L_CFM - L_FM = C", schedule, (cfm - fm - C).abs() / cfm, 1e-6)


def gradient(schedule: AffinePath) -> Row:
    """|grad L_CFM - grad L_FM| relative to |grad L_CFM|, by quadrature."""
    network = Waves(1)
    losses = conditional_loss(network, schedule), marginal_loss(network, schedule)[0]
    parameters = list(network.parameters())
    of_cfm, of_fm = (
        nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)) for loss in losses
    )
    return at_most(
        "grad L_CFM = grad L_FM", schedule, (of_cfm - of_fm).norm() / of_cfm.norm(), 1e-6
    )


def conditional_loss(network: nn.Module, schedule: AffinePath, num_nodes: int = 33) -> Tensor:
    """L_CFM on the line: over time, component, and the normal numbers behind x1, x0 and eps."""
    times, time_weights = legendre(LINE.along(schedule).t_range)
    axes = 3 if schedule.stochastic else 2
    nodes = torch.linspace(-8, 8, num_nodes, dtype=F64)
    normal = torch.cartesian_prod(*[nodes] * axes)
    density = torch.exp(-normal.square().sum(1) / 2)
    z = normal.repeat(len(LINE.means), 1)
    k = torch.arange(len(LINE.means)).repeat_interleave(len(normal))
    x1 = LINE.means[k] + LINE.stds[k, None] * z[:, :1]
    weights = LINE.weights[k] * density.repeat(len(LINE.means)) / density.sum()
    path, total = schedule, torch.zeros((), dtype=F64)
    for t, weight in zip(times, time_weights, strict=True):
        time = t.repeat(len(x1))
        sample = path.sample(z[:, 1:2], x1, time, z[:, 2:] if axes == 3 else None)
        total = total + weight * (weights * cfm_loss(network, schedule, sample)).sum()
    return total


def marginal_loss(network: nn.Module, schedule: AffinePath) -> tuple[Tensor, Tensor]:
    """L_FM and C on the line: over time and x."""
    path, field = LINE.along(schedule), NetworkField(network, schedule)
    fm, C = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for t, weight in zip(*legendre(path.t_range), strict=True):
        law = path.marginal(float(t))
        reach = 10 * float(law.stds.max())
        ends = float(law.means.min()) - reach, float(law.means.max()) + reach
        x = torch.linspace(*ends, 1201, dtype=F64)[:, None]
        mass = weight * path.log_prob(x, t).exp() * (x[1] - x[0])
        fm = fm + (mass * path.fm_loss(field, x, t)).sum()
        C = C + (mass * path.spread(x, t)).sum()
    return fm, C


def legendre(interval: tuple[float, float], num_nodes: int = 8) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights for the mean over an interval."""
    nodes, weights = (torch.from_numpy(a) for a in roots_legendre(num_nodes))
    low, high = interval
    return low + (high - low) * (nodes + 1) / 2, weights / 2


def monte_carlo(schedule: AffinePath) -> Row:
    """Standard errors by which L_CFM - L_FM - C is off, for two unlike networks and for their difference."""
    path, sample = PLANE.along(schedule), plane_sample(schedule, 2**16)
    C = path.spread(sample.xt, sample.t)
    excess = []
    for network in (Waves(2), Spring()):
        field = NetworkField(network, schedule)
        with torch.no_grad():
            fm = path.fm_loss(field, sample.xt, sample.t)
            excess.append(cfm_loss(network, schedule, sample) - fm)
    first, second = excess
    z = torch.stack([standard_errors(d) for d in (first - C, second - C, first - second)])
    return at_most("L_CFM - L_FM = C in 2-D, s.e.", schedule, z.abs().max(), 4.0)


def plane_sample(schedule: AffinePath, count: int) -> PathSample:
    """A training batch of the independent coupling."""
    generator = KEY.fold("monte carlo").generator()
    x1 = PLANE.sample((count, 2), generator, F64)
    x0, eps = torch.randn(2, count, 2, generator=generator, dtype=F64)
    low, high = PLANE.along(schedule).t_range
    t = low + (high - low) * torch.rand(count, generator=generator, dtype=F64)
    return schedule.sample(x0, x1, t, eps)


def standard_errors(values: PerSample) -> Tensor:
    return values.mean() / (values.std() / len(values) ** 0.5)


def transport(schedule: AffinePath) -> Row:
    """(4): largest error of log p along exact trajectories, in nats."""
    path = PLANE.along(schedule)
    low, high = path.t_range
    x = path.marginal(high).sample((256, 2), KEY.fold("transport").generator(), F64)
    start, change = backwards(path, x)
    error = path.marginal(low).log_prob(start) + change - path.marginal(high).log_prob(x)
    return at_most("transport, nats", schedule, error.abs().max(), 1e-6)


def transport_of_samples(schedule: AffinePath) -> Row:
    """Samples carried from p_0 against samples of p_1: log p, means and squares, in standard errors."""
    path = PLANE.along(schedule)
    low, high = path.t_range
    generator = KEY.fold("samples").generator()
    x0 = path.marginal(low).sample((4096, 2), generator, F64)
    carried = ODESolver(rtol=1e-6, atol=1e-6).solve(path.velocity, x0, low, high).x
    target = path.marginal(high)
    a, b = (
        torch.cat((target.log_prob(x)[:, None], x, x**2), 1)
        for x in (carried, target.sample((4096, 2), generator, F64))
    )
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / len(a)).sqrt()
    return at_most("transport of samples, s.e.", schedule, z.abs().max(), 4.0)


def mass(schedule: AffinePath) -> Row:
    """(5) for the density that sampling gives: from the start distribution it uses, by the flow, on a grid."""
    path, solver = PLANE.along(schedule), ODESolver("dopri8", rtol=1e-6, atol=1e-6)
    x, cell = grid(40, 4.8)
    log_p = log_prob(path, x, Gaussian(), schedule, solver, t_range=path.t_range)
    total = log_p.exp().sum() * cell
    return at_most("mass is kept", schedule, (total - 1).abs(), 1e-5)


def start_floor(schedule: AffinePath) -> Row:
    """KL(p_0 | start distribution) in nats, below the bound alpha^2 E|x1|^2 / 2V that convexity gives."""
    path = PLANE.along(schedule)
    low = path.t_range[0]
    time = torch.tensor(low, dtype=F64)
    true, used = path.marginal(low), path.start(low)
    x, cell = grid(160, 8 * float(used.stds))
    log_p = true.log_prob(x)
    kl = (log_p.exp() * (log_p - used.log_prob(x))).sum() * cell
    square = PLANE.weights @ (PLANE.means.square().sum(1) + 2 * PLANE.stds**2)
    bound = schedule.alpha(time) ** 2 * square / (2 * schedule.variance(time))
    return at_most("floor of the start distribution, nats", schedule, kl, float(bound) + 1e-12)


def backwards(path: MixturePath, x: Points) -> tuple[Points, PerSample]:
    """Where x came from, and minus the integral of the divergence on the way there."""
    low, high = path.t_range

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        x = state[:, :-1]
        return torch.cat((path.velocity(x, t), path.divergence(x, t)[:, None]), 1)

    state = torch.cat((x, torch.zeros_like(x[:, :1])), 1)
    solver = ODESolver("dopri8", rtol=1e-7, atol=1e-7)
    end = solver.solve(augmented, state, high, low).x
    return end[:, :-1], end[:, -1]


def grid(count: int, extent: float) -> tuple[Points, float]:
    """The cells' centres of a square around the origin, and the area of a cell."""
    side = 2 * extent / count
    axis = -extent + side * (torch.arange(count, dtype=F64) + 0.5)
    return torch.cartesian_prod(axis, axis), side**2


THEOREMS: tuple[Callable[[AffinePath], Row], ...] = (
    continuity,
    continuity_kept,
    continuity_broken,
    marginalisation,
    parameterisations,
    constant,
    gradient,
    monte_carlo,
    transport,
    transport_of_samples,
    mass,
    start_floor,
)


def stochastic_bias(name: str) -> Row:
    """The bias of Euler-Maruyama, printed with it, falls to about a quarter over four times the steps."""
    first, last = (abs(variance_bias(DIFFUSIONS[name], steps)) for steps in BIAS_STEPS)
    low, high = DIFFUSIONS[name].t_range
    title = f"{name} on [{low:g}, {high:g}], {first:.1e} to {last:.1e}: ratio"
    where = "SDE, bias of the variance from {} to {} steps".format(*BIAS_STEPS)
    return Row(title, where, last / first, 0.3, last <= 0.3 * first)


def verify(schedules: Iterable[AffinePath] = SCHEDULES) -> list[Row]:
    """Every theorem on every path, and the bias of the stochastic samplers."""
    rows = [theorem(schedule) for schedule, theorem in itertools.product(schedules, THEOREMS)]
    return rows + [stochastic_bias(name) for name in DIFFUSIONS]

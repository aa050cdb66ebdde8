"""Likelihoods against the closed form of the oracle, autograd Jacobians and counting arguments."""

import math

import pytest
import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.likelihood import (
    Likelihood,
    LikelihoodError,
    bits_per_dimension,
    divergence,
    hutchinson_probe,
    likelihood,
    log_abs_det,
    log_prob,
    push_forward,
    start_log_prob,
)
from fmlightning.flow.models import NetworkField
from fmlightning.flow.paths.schedules import (
    IndependentCFM,
    Linear,
    SchrodingerBridge,
    Trigonometric,
    VariancePreserving,
)
from fmlightning.flow.solvers.ode import FIXED, ODESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture
from fmlightning.flow.toys import EightGaussians
from fmlightning.nets.dit import DiT, Size
from fmlightning.nets.unet import UNet

MIXTURE = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])
TIGHT = ODESolver("dopri5", rtol=1e-8, atol=1e-8)


def data(n, seed=0):
    return MIXTURE.sample((n, 2), Key(seed).generator(), dtype=torch.float64)


def scalar(t):
    return torch.tensor(t, dtype=torch.float64)


KERNEL = 0.3 * torch.randn(2, 2, 3, 3, generator=Key(4).generator(), dtype=torch.float64)
KERNEL.requires_grad_()  # as a network's weights do


def images(x, t):
    """A velocity on images that mixes pixels, channels and time."""
    mixed = torch.nn.functional.conv2d(x, KERNEL, padding=1)
    return torch.tanh(mixed) * x + t * x.mean((1, 2, 3), keepdim=True)


IMAGES = torch.randn(3, 2, 4, 4, generator=Key(5).generator(), dtype=torch.float64)


def trace_of_jacobian(field, x, t):
    """By functorch, one sample at a time: no batching and other transforms."""
    traces = []
    for sample in x:
        jacobian = torch.func.jacrev(lambda s: field(s[None], t)[0])(sample)
        traces.append(jacobian.reshape(sample.numel(), -1).trace())
    return torch.stack(traces)


@pytest.mark.parametrize("shape", ["points", "images"])
def test_divergence_is_the_trace_of_the_jacobian(shape):
    field, x = (
        (MIXTURE.along(Linear()).velocity, data(5)) if shape == "points" else (images, IMAGES)
    )
    v, div = divergence(field, x, scalar(0.4))
    torch.testing.assert_close(v, field(x, scalar(0.4)))
    torch.testing.assert_close(
        div, trace_of_jacobian(field, x, scalar(0.4)), rtol=1e-10, atol=1e-12
    )


def test_divergence_is_the_closed_form_of_the_oracle():
    path, t = MIXTURE.along(Trigonometric()), torch.linspace(0.1, 0.9, 40, dtype=torch.float64)
    _, div = divergence(path.velocity, data(40), t)
    torch.testing.assert_close(div, path.divergence(data(40), t), rtol=1e-9, atol=1e-9)


def test_divergence_of_fields_that_ignore_x():
    for field in (lambda x, t: torch.ones_like(x), lambda x, t: t * torch.ones_like(x)):
        assert divergence(field, data(4), scalar(0.5))[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("shape", ["points", "images"])
def test_hutchinson_is_right_on_average(shape, law):
    field, x = (
        (MIXTURE.along(Linear()).velocity, data(2)) if shape == "points" else (images, IMAGES)
    )
    n, t = 20_000 if shape == "points" else 4000, scalar(0.7)
    for sample in x[:2]:
        many = sample[None].expand(n, *sample.shape).contiguous()
        probe = hutchinson_probe(Key(6).streams(torch.arange(n)), many, law)
        estimates = divergence(field, many, t, probe)[1]
        exact = trace_of_jacobian(field, sample[None], t)[0]
        # 4 standard errors; Rademacher's are zero for a diagonal Jacobian, hence the 1e-9
        assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(n) + 1e-9


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinson_has_the_variance_of_the_books(law):
    """2 sum_{i != j} S_ij^2, and 2 sum_i S_ii^2 more for Gaussian probes."""
    matrix = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 0.3], [0.4, 0.1, 0.7]], dtype=torch.float64)
    symmetric = (matrix + matrix.T) / 2
    diagonal = symmetric.diag().square().sum()
    expected = 2 * (symmetric.square().sum() - diagonal) + (
        2 * diagonal if law == "gaussian" else 0
    )
    n = 40_000
    x = torch.zeros(n, 3, dtype=torch.float64)
    probe = hutchinson_probe(Key(7).streams(torch.arange(n)), x, law)
    _, estimates = divergence(lambda x, t: x @ matrix.T, x, scalar(0.0), probe)
    # the relative error of a variance of heavy-tailed numbers, about sqrt(15 / n)
    assert estimates.var() == pytest.approx(float(expected), rel=4 * math.sqrt(15 / n))


def test_probes_are_keyed_by_sample():
    whole = hutchinson_probe(Key(1).streams(torch.arange(8)), torch.zeros(8, 3, 2))
    part = hutchinson_probe(Key(1).streams(torch.tensor([5, 2])), torch.zeros(2, 3, 2))
    assert torch.equal(part, whole[[5, 2]])
    assert set(whole.flatten().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("schedule", [Linear(), Trigonometric(), IndependentCFM(0.2)], ids=str)
def test_the_oracle_gets_its_own_likelihood(schedule):
    path, x = MIXTURE.along(schedule), data(40)
    found = log_prob(path.velocity, x, Gaussian(), schedule, TIGHT)
    # dopri5 at 1e-8 was measured to err by 1e-6 nats here
    torch.testing.assert_close(found, path.log_prob(x, scalar(1.0)), rtol=0, atol=1e-5)


def test_a_diffusion_path_has_a_floor_that_no_tolerance_removes():
    """It starts from N(0, sigma_0^2), not from its own p_0: about 1e-2 nats, and with p_0 nothing is left."""
    schedule = VariancePreserving()
    path, x, end = MIXTURE.along(schedule), data(20), schedule.interval[1]
    truth = path.log_prob(x, scalar(end))
    found = likelihood(path.velocity, x, Gaussian(), schedule, ODESolver(rtol=1e-6, atol=1e-6))
    floor = (found.log_prob - truth).abs()
    assert found.difference.max() < 1e-4
    assert 1e-3 < floor.max() < 5e-2
    start = TIGHT.solve(path.velocity, x, end, 0.0).x
    exact_start = path.log_prob(start, scalar(0.0)) - start_log_prob(Gaussian(), schedule, start)
    torch.testing.assert_close(found.log_prob + exact_start, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in FIXED if m != "dpmpp_2m"])
def test_fixed_steps_converge_to_the_likelihood(method):
    """Also those that leave the divergence out at some stages."""
    path, x = MIXTURE.along(Linear()), data(20)
    found = log_prob(path.velocity, x, Gaussian(), Linear(), ODESolver(method, 100))
    atol = 0.2 if method == "euler" else 5e-3  # errors of order 1 / 100 and at most 1 / 100^2
    torch.testing.assert_close(found, MIXTURE.log_prob(x), rtol=0, atol=atol)


def test_midpoint_takes_the_divergence_once_a_step():
    """A field whose gradient counts its backward passes: D of them at the stages that need it."""
    passes = []

    def field(x, t):
        v = MIXTURE.along(Linear()).velocity(x, t)
        if v.requires_grad:
            v.register_hook(lambda g: passes.append(1))
        return v

    for method, stages in {"midpoint": 1, "heun2": 2, "heun3": 2, "rk4": 4}.items():
        passes.clear()
        log_prob(field, data(6), Gaussian(), Linear(), ODESolver(method, 5))
        assert len(passes) == 5 * stages * 2


def test_hutchinson_likelihood_is_right_on_average():
    n, x = 400, data(1)
    path, many = MIXTURE.along(Linear()), x.expand(n, 2).contiguous()
    probe = hutchinson_probe(Key(8).streams(torch.arange(n)), many)
    solver = ODESolver("rk4", 40)
    found = log_prob(path.velocity, many, Gaussian(), Linear(), solver, probe=probe)
    exact = MIXTURE.log_prob(x)[0]
    # 4 standard errors, and what 40 steps of rk4 err by
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(n) + 1e-4


def test_images_agree_with_flat_points():
    solver, net = ODESolver("heun3", 6), images
    as_images = log_prob(net, IMAGES, Gaussian(), Linear(), solver)

    def flat(x, t):
        return net(x.reshape(-1, 2, 4, 4), t).flatten(1)

    as_points = log_prob(flat, IMAGES.flatten(1), Gaussian(), Linear(), solver)
    torch.testing.assert_close(as_images, as_points)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_it_runs_where_gradients_are_off(mode, method):
    net, solver = images, ODESolver(method, 3, rtol=0.1, atol=0.1)
    plain = log_prob(net, IMAGES, Gaussian(), Linear(), solver)
    with mode():
        inside = IMAGES * 1.0  # made inside: an inference tensor under inference_mode
        probe = hutchinson_probe(Key(0).streams(torch.arange(3)), inside)
        found = log_prob(net, inside, Gaussian(), Linear(), solver)
        log_prob(net, inside, Gaussian(), Linear(), solver, probe=probe)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    assert not plain.requires_grad


@pytest.mark.parametrize("method", ["midpoint", "ab2", "dopri5"])
def test_it_can_be_trained_on(method):
    """d log p / d parameter by autograd and by a difference quotient."""
    solver = ODESolver(method, 12, rtol=1e-9, atol=1e-9)
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def value(a, differentiable=False):
        def field(x, t):
            return torch.tanh(a * x + t) - x * a

        return log_prob(
            field, data(5), Gaussian(), Linear(), solver, differentiable=differentiable
        ).mean()

    (gradient,) = torch.autograd.grad(value(a, True), a)
    h = 1e-4
    quotient = (value(a.detach() + h) - value(a.detach() - h)) / (2 * h)
    torch.testing.assert_close(gradient, quotient, rtol=1e-5, atol=1e-6)


def test_samples_do_not_see_each_other():
    """Vectorised over the batch, and each row its own: fixed steps give the same alone."""
    path, solver = MIXTURE.along(Linear()), ODESolver("rk4", 10)
    whole = log_prob(path.velocity, data(6), Gaussian(), Linear(), solver)
    alone = [log_prob(path.velocity, x[None], Gaussian(), Linear(), solver) for x in data(6)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-12)


def test_memory_is_linear_in_the_batch():
    """The largest tensor that a backward pass makes holds a number for each sample and width, not for pairs."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[-1] = max(largest[-1], out.numel())
            return out

    def field(x, t):
        return torch.tanh(x @ torch.ones(2, 16, dtype=x.dtype)) @ torch.ones(16, 2, dtype=x.dtype)

    for n in (100, 400):
        largest.append(0)
        x = data(n)
        with Watch():
            divergence(field, x, scalar(0.5))
    assert largest == [1600, 6400]


def test_two_tolerances_stand_side_by_side():
    path, x = MIXTURE.along(Linear()), data(30)
    found = likelihood(path.velocity, x, Gaussian(), Linear(), ODESolver(rtol=1e-5, atol=1e-5))
    error = (found.log_prob - MIXTURE.log_prob(x)).abs()
    coarse_error = (found.coarse - MIXTURE.log_prob(x)).abs()
    assert error.max() < coarse_error.max() / 3  # a tenth of the tolerance
    # their difference tells the error of the coarser one
    torch.testing.assert_close(found.difference, coarse_error, rtol=0.5, atol=float(error.max()))
    assert found.verified(0.05) is found.log_prob
    with pytest.raises(LikelihoodError, match=r"within=1e-09.*Tighten"):
        found.verified(1e-9)


def test_too_few_steps_are_not_a_likelihood():
    path = MIXTURE.along(Linear())
    found = likelihood(path.velocity, data(30), Gaussian(), Linear(), ODESolver("euler", 4))
    with pytest.raises(LikelihoodError):
        found.verified(0.01)


def test_a_likelihood_that_is_not_a_number_is_not_verified():
    broken = torch.tensor([0.0, float("nan")])
    with pytest.raises(LikelihoodError):
        Likelihood(broken, broken, 1).verified(1.0)


def test_the_start_law_is_what_the_path_leaves_of_the_source():
    x = data(6)
    for schedule in (IndependentCFM(0.5), VariancePreserving()):
        time = scalar(0.0)
        std = math.sqrt(float(schedule.sigma(time)) ** 2 + float(schedule.gamma(time)) ** 2)
        normal = torch.distributions.Normal(scalar(0.0), std)
        torch.testing.assert_close(
            start_log_prob(Gaussian(), schedule, x), normal.log_prob(x).sum(1)
        )
    eight = EightGaussians()
    torch.testing.assert_close(start_log_prob(eight, Linear(), x), eight.log_prob(x))


def test_a_start_law_without_a_density_is_refused():
    with pytest.raises(ValueError, match=r"EightGaussians.*gamma = 0\.5"):
        start_log_prob(EightGaussians(), IndependentCFM(0.5), data(3))


def test_the_interval_is_the_paths_own_unless_named():
    times = []

    def field(x, t):
        times.append(float(t))
        return -x

    bridge = SchrodingerBridge(margin=0.01)
    log_prob(field, data(3), Gaussian(), bridge, ODESolver("heun2", 4))
    assert (min(times), max(times)) == pytest.approx((0.01, 0.99))
    times.clear()
    log_prob(field, data(3), Gaussian(), bridge, ODESolver("heun2", 4), interval=(0.2, 0.6))
    assert (min(times), max(times)) == pytest.approx((0.2, 0.6))


@pytest.mark.parametrize("num_bins", [2, 17, 256])
def test_bits_of_uniform_noise_are_the_bits_of_a_level(num_bins):
    """Uniform on [-1, 1]^d is uniform on the bins: log2 L bits, however they are counted."""
    d = 5
    bits = bits_per_dimension(torch.tensor([-d * math.log(2.0)]), d, num_bins)
    assert bits.item() == pytest.approx(math.log2(num_bins), abs=1e-6)


@pytest.mark.parametrize(("num_bins", "offset"), [(256, 7.0), (17, 3.087)])
def test_bits_offset_is_the_published_one(num_bins, offset):
    assert bits_per_dimension(torch.zeros(1), 3, num_bins).item() == pytest.approx(offset, abs=5e-4)


def test_bits_bound_the_discrete_likelihood():
    """A density that is constant on each bin loses nothing to dequantisation: bits = -log2 P(k)."""
    P = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    density = P / (2 / 4)  # bins of width 2 / L
    torch.testing.assert_close(bits_per_dimension(density.log(), 1, 4), -P.log2())


def test_bits_of_nothing_are_refused():
    for dims, num_bins in ((0, 256), (3, 1)):
        with pytest.raises(ValueError, match=f"dims={dims}"):
            bits_per_dimension(torch.zeros(1), dims, num_bins)


def test_a_probe_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="probe"):
        log_prob(lambda x, t: x, data(3), Gaussian(), Linear(), TIGHT, probe=data(2))


MAPS = [
    lambda x: x @ torch.tensor([[2.0, 0.3], [-0.5, 1.0]], dtype=x.dtype).T + 1,
    torch.sinh,
    lambda x: torch.stack((x[:, 0], x[:, 1] + x[:, 0] ** 2), 1),
    lambda x: x + 0.5 * torch.tanh(x.flip(1)),
]


def test_the_volumes_of_a_chain_of_maps_add_up():
    """Sum of log |det| over the chain, and the one-step density of the composition."""
    x = 0.5 * data(7)

    def chain(x):
        for f in MAPS:
            x = f(x)
        return x

    y, found = push_forward(MAPS, x, Gaussian().log_prob(x))
    jacobians = [torch.func.jacfwd(lambda s: chain(s[None])[0])(sample) for sample in x]
    volume = torch.stack([torch.linalg.det(j).abs().log() for j in jacobians])
    torch.testing.assert_close(y, chain(x))
    torch.testing.assert_close(found, Gaussian().log_prob(x) - volume)


def test_a_pushed_density_integrates_to_one():
    """x -> sinh(x) on a line: the density of the image, summed on a grid."""
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    y, found = push_forward([torch.sinh], x, Gaussian().log_prob(x))
    # the trapezoid's error on 4001 points; the tails beyond 6 hold 2e-9
    assert torch.trapezoid(found.exp(), y[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_the_jacobian_of_the_flow_map_is_the_integral_of_the_divergence():
    path, x0 = (
        MIXTURE.along(Linear()),
        Gaussian().sample((12, 2), Key(9).generator(), torch.float64),
    )
    solver = ODESolver("rk4", 60)
    x1, volume = log_abs_det(lambda x: solver.solve(path.velocity, x).x, x0)
    found = log_prob(path.velocity, x1, Gaussian(), Linear(), solver)
    # rk4's error on 60 steps, twice
    torch.testing.assert_close(found, Gaussian().log_prob(x0) - volume, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        volume, Gaussian().log_prob(x0) - MIXTURE.log_prob(x1), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_gradient_goes_through_attention(kind):
    size = Size(width=8, depth=1, heads=2, patch=2)
    net = (UNet(1, 8, (1,), 1, (0,), 4) if kind == "unet" else DiT(size, 1)).double()
    generator = Key(6).generator()
    for p in net.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x1 = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    probe = hutchinson_probe(Key(7).streams(torch.arange(2)), x1)

    def loss():
        field, solver = NetworkField(net, Linear()), ODESolver("midpoint", 2)
        args = field, x1, Gaussian(), Linear(), solver
        return -log_prob(*args, probe=probe, differentiable=True).sum()

    weights = list(net.parameters())
    slopes = torch.autograd.grad(loss(), weights, materialize_grads=True)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]
    expected = sum(float((s * w).sum()) for s, w in zip(slopes, ways, strict=True))
    h, ends = 1e-5, []  # central differences: an error of h^2 and of 1e-16 / h
    for sign in (1, -2):
        for p, w in zip(weights, ways, strict=True):
            p.data.add_(w, alpha=sign * h)
        ends.append(float(loss().detach()))
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)

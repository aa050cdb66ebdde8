"""Power-function averages: the profile against quadrature, and other widths against averages taken in the same run."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from scipy.integrate import quad

from fmlightning.data.toy import ToyData
from fmlightning.nets.mlp import TimeMLP
from fmlightning.training.ema.callback import EMA
from fmlightning.training.ema.power import (
    Profile,
    coefficients,
    exponent,
    fit_error,
    inner,
    power_decay,
    width,
)
from fmlightning.training.ema.snapshots import read_snapshot, reconstruct, snapshots
from fmlightning.training.module import FlowMatching

PROFILES = [Profile(40.0, 6.94), Profile(40.0, 16.97), Profile(17.0, 3.2), Profile(1.0, 0.0)]


def weigh(profile, tau):
    return float(profile(torch.tensor(tau, dtype=torch.float64)))


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.2, 0.28])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel):
    gamma = exponent(sigma_rel)
    assert width(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    profile = Profile(3.0, gamma)
    mass, mean, square = (
        quad(lambda tau, k=k: tau**k * weigh(profile, tau), 0, 3.0, limit=200)[0] for k in range(3)
    )
    assert mass == pytest.approx(1, rel=1e-8)
    assert math.sqrt(square - mean**2) / 3.0 == pytest.approx(sigma_rel, rel=1e-6)


def test_the_exponents_of_the_paper():
    # arXiv:2312.02696, sec. 3.1: gamma = 6.94 and 16.97 are widths of 0.10 and 0.05
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("gamma", [0.0, 6.94, 16.97])
def test_a_step_weighs_in_the_running_average_what_it_does_in_the_profile(gamma):
    steps = 30
    weights = torch.zeros(steps, dtype=torch.float64)
    for n in range(1, steps + 1):
        beta = power_decay(n, gamma)
        weights *= beta
        weights[n - 1] += 1 - beta
    profile = Profile(steps, gamma)
    expected = [quad(lambda t: weigh(profile, t), n - 1, n)[0] for n in range(1, steps + 1)]
    torch.testing.assert_close(
        weights, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-7
    )  # quad's


@pytest.mark.parametrize("a", PROFILES)
@pytest.mark.parametrize("b", PROFILES)
def test_the_inner_product_is_the_integral_of_the_product(a, b):
    integral = quad(lambda tau: weigh(a, tau) * weigh(b, tau), 0, min(a.step, b.step), limit=200)[0]
    assert inner(a, b) == pytest.approx(integral, rel=1e-7)
    assert inner(a, b) == pytest.approx(inner(b, a), rel=1e-12)


def test_the_coefficients_give_the_closest_profile():
    kept = [Profile(t, g) for t in (8.0, 16.0, 24.0, 32.0) for g in (6.94, 16.97)]
    wanted = Profile(32.0, exponent(0.08))
    x = coefficients(kept, wanted)
    tau = (torch.arange(20_000, dtype=torch.float64) + 0.5) * (32 / 20_000)
    made = sum(c * p(tau) for c, p in zip(x, kept, strict=True))
    error = float(((made - wanted(tau)) ** 2).mean().sqrt() / (wanted(tau) ** 2).mean().sqrt())
    assert error == pytest.approx(fit_error(kept, wanted, x), rel=1e-2)  # of the grid
    assert error < 0.05
    for k in range(len(x)):  # a minimum: whichever way one goes
        for h in (-1e-3, 1e-3):
            aside = x.clone()
            aside[k] += h
            assert fit_error(kept, wanted, aside) > fit_error(kept, wanted, x)


def test_a_profile_that_was_kept_is_given_back():
    kept = [Profile(t, g) for t in range(4, 41, 4) for g in (6.94, 16.97)]
    x = coefficients(kept, kept[-1])
    expected = torch.zeros(len(kept), dtype=torch.float64)
    expected[-1] = 1
    assert fit_error(kept, kept[-1], x) < 1e-6
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)  # neighbours are nearly parallel


# -- in training -----------------------------------------------------------------------------------


class Tracked(Callback):
    """The average of one width in float64, each step weighed by the integral of the profile, at the end of it all."""

    def __init__(self):
        self.weights = []

    def on_train_start(self, trainer, module):
        self.initial = [p.detach().double().clone() for p in module.network.parameters()]

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append([p.detach().double().clone() for p in module.network.parameters()])

    def average(self, sigma_rel, steps):
        g = exponent(sigma_rel) + 1
        mass = [((n / steps) ** g - ((n - 1) / steps) ** g) for n in range(1, steps + 1)]
        return [
            sum(m * w for m, w in zip(mass, each, strict=False))
            for each in zip(*self.weights, strict=True)
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("power")
    ema, tracked = EMA(decay=[0.99, 0.9], sigma_rel=[0.05, 0.10], snapshots=10), Tracked()
    module = FlowMatching(
        TimeMLP(width=16, depth=2), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)
    )
    trainer = Trainer(
        max_steps=204, callbacks=[ema, tracked], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, ToyData(batch_size=32, val_size=64, test_size=64, steps_per_epoch=500))
    return folder, ema, tracked


def distance(a, b):
    return math.sqrt(sum(float((x.double() - y).square().sum()) for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("name", ["sigma_rel=0.05", "sigma_rel=0.1"])
def test_the_running_average_is_the_sum_over_all_steps(run, name):
    _, ema, tracked = run
    track = next(t for t in ema.averages if t.name == name)
    expected = tracked.average(float(name.split("=")[1]), 204)
    for a, b in zip(track.shadow.values(), expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)  # 204 steps of float32


def test_snapshots_are_taken_evenly_and_at_the_end(run):
    folder, ema, _ = run
    files = snapshots(folder)
    assert [step for step, _ in files] == [*range(20, 201, 20), 204]
    last = read_snapshot(files[-1][1])
    assert list(last) == ["sigma_rel=0.05", "sigma_rel=0.1"]
    for track in ema.averages[2:]:
        assert all(torch.equal(last[track.name][k], v) for k, v in track.shadow.items())


@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.08, 0.10, 0.15])
@pytest.mark.parametrize("step", [200, 204])
def test_another_width_is_that_of_an_average_taken_in_the_same_run(run, sigma_rel, step):
    folder, _, tracked = run
    expected = tracked.average(sigma_rel, step)
    made = reconstruct(folder, sigma_rel, step)
    assert made.step == step
    # what is made is nearer to the truth, by far, than the width beside it or the weights themselves
    other = tracked.average(0.10 if sigma_rel != 0.10 else 0.08, step)
    error = distance(made.weights.values(), expected)
    assert error < 0.05 * distance(tracked.weights[step - 1], expected)
    assert error < 0.2 * distance(other, expected)
    assert made.fit_error < 0.05


@pytest.mark.parametrize("step", [10, 300])
def test_a_step_without_snapshots_around_it_is_refused(run, step):
    with pytest.raises(ValueError, match="between the first snapshot"):
        reconstruct(run[0], 0.08, step)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_a_width_that_no_power_function_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel"):
        EMA(sigma_rel=[sigma_rel])


def test_each_of_several_decays_is_its_own_average_and_the_first_is_used(run):
    _, ema, tracked = run
    assert [t.name for t in ema.averages[:2]] == ["decay=0.99", "decay=0.9"]
    assert ema.shadow is ema.averages[0].shadow
    for track, decay in zip(ema.averages, (0.99, 0.9), strict=False):
        expected = tracked.initial
        for n, weights in enumerate(tracked.weights, 1):
            d = min(decay, (1 + n) / (10 + n))
            expected = [d * e + (1 - d) * w for e, w in zip(expected, weights, strict=True)]
        for a, b in zip(track.shadow.values(), expected, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)  # as above

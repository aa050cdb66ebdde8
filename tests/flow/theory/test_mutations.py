"""Errors put into the library on purpose: each must turn a named theorem or law red.

A mutation wraps the real code, so the table also shows which theorem guards which line. The same theorems on the
same paths are green without mutation.
"""

import importlib.util
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fmlightning.flow import couplings, keys, likelihood, toys
from fmlightning.flow import models as fields
from fmlightning.flow.objectives import cfm as objectives
from fmlightning.flow.paths import affine as paths
from fmlightning.flow.paths import predictions
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.schedules import (
    IndependentCFM,
    Linear,
    Polynomial,
    SchrodingerBridge,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from fmlightning.flow.solvers import sde
from fmlightning.flow.theory import mixture
from fmlightning.flow.theory import sde_bias as bias
from fmlightning.flow.theory import theorems as verify


def eight_gaussians(schedule: AffinePath) -> verify.Row:
    """A law of its own: the mixture has the density of the toy it copies."""
    toy = toys.EightGaussians()
    x = 2 * toy.sample((200, 2), keys.Key(0).generator(), torch.float64)
    error = mixture.GaussianMixture.of_eight_gaussians(toy).log_prob(x) - toy.log_prob(x)
    return verify.at_most("eight Gaussians", schedule, error.abs().max(), 1e-10)


def law_of_samples(schedule: AffinePath) -> verify.Row:
    """A law of its own: points made by the path have the mean log-density of points of its marginal."""
    path, time = verify.PLANE.along(schedule), torch.tensor(0.6, dtype=torch.float64)
    g = keys.Key(0).generator()
    x0, eps = torch.randn(2, 20_000, 2, generator=g, dtype=torch.float64)
    x1 = verify.PLANE.sample((20_000, 2), g, torch.float64)
    made = path.log_prob(schedule.sample(x0, x1, time, eps).xt, time)
    true = path.log_prob(path.marginal(0.6).sample((20_000, 2), g, torch.float64), time)
    z = (made.mean() - true.mean()) / ((made.var() + true.var()) / 20_000) ** 0.5
    return verify.at_most("law of samples", schedule, z.abs(), 4.0)


class Mutation(NamedTuple):
    """Replace `owner.name` by `wrong(original)`; `theorem` on `schedule` must notice."""

    owner: Any
    name: str
    wrong: Callable[[Any], Any]
    theorem: Callable[[AffinePath], verify.Row]
    schedule: AffinePath


def scaled(factor):
    """The original's result times a factor."""
    return lambda original: lambda *a, **k: factor * original(*a, **k)


def last_negated(original):
    """Of several results, the last with the other sign."""

    def wrong(*a, **k):
        *first, last = original(*a, **k)
        return *first, -last

    return wrong


def unnormalised(original):
    """Joint densities in the place of responsibilities."""
    return property(lambda seen: seen.log_joint.exp())


def unweighted(original):
    return lambda weights, difference, variance: original(
        torch.ones_like(weights) / len(weights), difference, variance
    )


def without_volume(original):
    """-|x - m|^2 / 2V without -(D / 2) log V."""

    def wrong(weights, difference, variance):
        return weights.log() - difference.square().sum(1) / (2 * variance)

    return wrong


def reversed_time(original):
    return lambda self, x, t, *a: original(self, x, 1 - t, *a)


def swapped_ends(original):
    return lambda self, x0, x1, t, eps=None: original(self, x1, x0, t, eps)


def noise_of_the_source(original):
    """eps taken equal to x0."""
    return lambda self, x0, x1, t, eps=None: original(self, x0, x1, t, x0)


def without_gamma(original):
    return lambda self, t: self.sigma(t) ** 2


def only_sigma(original):
    return lambda self, t: self.sigma(t) * self.d_sigma(t)


def determinant_with_plus(original):
    """D = alpha' std + alpha std' for data predictions."""

    def wrong(prediction, schedule, t):
        a, b = original(prediction, schedule, t)
        return (a, schedule.d_alpha(t) + schedule.alpha(t) * a) if prediction == "data" else (a, b)

    return wrong


def score_without_std(original):
    return lambda self, x, t: -self.noise(x, t)


def network_sees_raw(original):
    return lambda network, schedule, x, t, y=None, streams=None: network(x, t.expand(len(x)))


def without_spread_of_means(original):
    """tr Cov = sum r c_k alone: the components' velocities taken as one."""
    return lambda r, values: torch.zeros_like(values)


def last_axis(original):
    """Per-sample coefficients on the last axis of the points."""
    return lambda c, x: c if c.ndim == 0 else c[: x.shape[-1]].reshape(1, -1)


Path, Oracle, ComponentTerms = AffinePath, mixture.MixturePath, mixture.ComponentTerms
MUTATIONS = {
    "sigma' has the other sign": Mutation(
        Linear, "d_sigma", scaled(-1), verify.continuity, Linear()
    ),
    "alpha' is halved": Mutation(Linear, "d_alpha", scaled(0.5), verify.continuity, Linear()),
    "alpha' lost its power": Mutation(
        Polynomial, "d_alpha", lambda f: lambda s, t: f(s, t) / s.n, verify.continuity, Polynomial()
    ),
    "V'/2 is V'": Mutation(
        VariancePreserving, "half_d_variance", scaled(2), verify.continuity, VariancePreserving()
    ),
    "V'/2 has the other sign": Mutation(
        VarianceExploding, "half_d_variance", scaled(-1), verify.transport, VarianceExploding()
    ),
    "the bridge's gamma gamma' is forgotten": Mutation(
        SchrodingerBridge, "half_d_variance", only_sigma, verify.continuity, SchrodingerBridge()
    ),
    "gamma^2 is not in V": Mutation(
        AffinePath, "variance", without_gamma, law_of_samples, IndependentCFM(0.5)
    ),
    "gamma' is halved": Mutation(
        SchrodingerBridge, "d_gamma", scaled(0.5), verify.constant, SchrodingerBridge()
    ),
    "time runs backwards": Mutation(
        Oracle, "velocity", reversed_time, verify.continuity, Trigonometric()
    ),
    "div has the other sign in the likelihood": Mutation(
        likelihood, "divergence", last_negated, verify.mass, Linear()
    ),
    "div has the other sign in the oracle": Mutation(
        Oracle, "divergence", scaled(-1), verify.transport, Linear()
    ),
    "responsibilities are not normalised": Mutation(
        ComponentTerms, "r", unnormalised, verify.marginalisation, Linear()
    ),
    "responsibilities forget the weights": Mutation(
        mixture, "log_joint", unweighted, verify.marginalisation, Linear()
    ),
    "responsibilities forget the volume": Mutation(
        mixture, "log_joint", without_volume, verify.continuity, Linear()
    ),
    "a density is off by a constant": Mutation(
        mixture,
        "log_joint",
        lambda f: lambda w, x, v: f(w, x, v) + 0.01,
        eight_gaussians,
        Linear(),
    ),
    "C forgets the spread of means": Mutation(
        mixture, "deviation", without_spread_of_means, verify.constant, Linear()
    ),
    "x0 and x1 are swapped": Mutation(
        Path, "sample", swapped_ends, verify.monte_carlo, Trigonometric()
    ),
    "times multiply the last axis": Mutation(
        paths, "expand_like", last_axis, verify.monte_carlo, Linear()
    ),
    "eps is x0 again": Mutation(
        Path, "sample", noise_of_the_source, verify.constant, IndependentCFM()
    ),
    "the conditional velocity forgets alpha'": Mutation(
        Path,
        "velocity",
        lambda f: lambda self, x, x1, t: f(self, x, x1, t) - x1,
        verify.marginalisation,
        Linear(),
    ),
    "the loss has a 1/2": Mutation(
        objectives, "mean_square", scaled(0.5), verify.constant, Linear()
    ),
    "the gradient goes the other way": Mutation(
        objectives, "mean_square", scaled(-1), verify.gradient, Linear()
    ),
    "D = alpha' sigma + alpha sigma'": Mutation(
        predictions,
        "velocity_coefficients",
        determinant_with_plus,
        verify.parameterisations,
        Linear(),
    ),
    "the score is the noise": Mutation(
        Oracle, "score", score_without_std, verify.parameterisations, Linear()
    ),
    "the network's input is not scaled": Mutation(
        fields, "evaluate", network_sees_raw, verify.parameterisations, VarianceExploding()
    ),
    "sampling starts at twice the width": Mutation(
        AffinePath, "std", scaled(2), verify.start_floor, Trigonometric()
    ),
    "the start law is a unit Gaussian": Mutation(
        AffinePath,
        "std",
        lambda f: lambda s, t: torch.ones_like(t),
        verify.start_floor,
        VarianceExploding(),
    ),
}
CONTROLS = {(m.theorem, m.schedule) for m in MUTATIONS.values()}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutation_is_noticed(mutation, monkeypatch):
    owner, name, wrong, theorem, schedule = mutation
    original = vars(owner)[name]
    monkeypatch.setattr(owner, name, wrong(original))
    row = theorem(schedule)
    assert not row.passed, f"{row} did not notice"


@pytest.mark.parametrize(
    ("theorem", "schedule"),
    sorted(CONTROLS, key=str),
    ids=lambda v: getattr(v, "__name__", None) or verify.label(v),
)
def test_without_mutation_all_is_green(theorem, schedule):
    row = theorem(schedule)
    assert row.passed, row


def test_every_theorem_guards_something():
    """Each row of the table, but those that test the table itself, is turned red by a mutation."""
    guards = {m.theorem for m in MUTATIONS.values()}
    selftests = {verify.continuity_kept, verify.continuity_broken, verify.transport_of_samples}
    assert set(verify.THEOREMS) - selftests <= guards


def half_missing(f):
    return lambda self, field, x, t, g2: 2 * f(self, field, x, t, g2) - field(x, t)


@pytest.mark.parametrize("name", bias.DIFFUSIONS)
def test_a_drift_without_its_half_is_noticed(name, monkeypatch):
    """dX = [v + g^2 score] dt + g dW: the bias no longer falls with the steps."""
    assert verify.stochastic_bias(name).passed
    monkeypatch.setattr(
        sde.MarginalPreservingSDE, "drift", half_missing(sde.MarginalPreservingSDE.drift)
    )
    assert not verify.stochastic_bias(name).passed


@pytest.mark.parametrize(
    ("room", "test", "owner", "name", "wrong", "arguments"),
    [
        ("test_likelihood", "test_bits_offset_is_the_published_one", None, "bits_per_dimension",
         lambda f: lambda log_p, d, num_bins: f(log_p, d, num_bins) - 2 * math.log2(num_bins / 2), [(256, 7.0)]),
        ("couplings/test_couplings", "test_minibatch_ot_is_the_best_of_all_permutations",
         couplings.exact, "squared_distances",
         lambda f: lambda *a: f(*a).sqrt(), [(6, seed) for seed in range(10)]),
    ],
    ids=["the bits have the offset's other sign", "the cost of transport is not squared"],
)  # fmt: skip
def test_a_mutation_turns_a_named_test_red(room, test, owner, name, wrong, arguments, monkeypatch):
    """Laws that are no row of the table: their own tests are run with and without the mutation."""
    path = pathlib.Path(__file__).parents[1] / f"{room}.py"
    spec = importlib.util.spec_from_file_location(f"mutated_{path.stem}", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)

    def law() -> None:
        for each in arguments:
            getattr(tests, test)(*each)

    law()
    owner = owner or tests  # the test's own import of the function
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(AssertionError):
        law()

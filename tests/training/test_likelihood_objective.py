"""Training by maximum likelihood: the objective against closed forms, and the score that judges it."""

import csv
import json
import math

import pytest
import torch
from torch import nn

from fmlightning.flow.keys import Key, KeyedStreams
from fmlightning.flow.likelihood import log_prob
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.maximum_likelihood import MaximumLikelihood
from fmlightning.flow.paths.schedules import Linear, VariancePreserving
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.mixture import GaussianMixture, OracleNetwork
from fmlightning.flow.toys import Moons
from fmlightning.metrics.likelihood import NegativeLogLikelihood
from fmlightning.nets.mlp import TimeMLP
from fmlightning.training.module import FlowMatching

LAW = GaussianMixture([0.6, 0.4], [[-1.0, 0.0], [1.0, 1.0]], [0.5, 0.7])


def points(n, seed=0, dtype=torch.float64):
    return LAW.sample((n, 2), Key(seed).generator(), dtype)


def exact_field():
    return NetworkField(OracleNetwork(LAW.along(Linear())), Linear())


def network(seed=0, width=8):
    """A small network that is not at rest."""
    net, generator = TimeMLP(2, width, 2).double(), Key(seed).generator()
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.shape[-1] ** -0.5)
    return net


# -- the objective ------------------------------------------------------------------------------


def test_the_loss_of_the_exact_velocity_is_the_density_of_the_law():
    x1 = points(500)
    loss = MaximumLikelihood(rtol=1e-7, atol=1e-7)(exact_field(), x1, Gaussian())
    assert torch.allclose(loss, -LAW.log_prob(x1), atol=1e-5)  # a hundred tolerances


def test_the_gradient_is_that_of_the_loss():
    net, x1 = network(), points(5)
    field, streams = NetworkField(net, Linear()), Key(2).streams(torch.arange(5))
    for divergence in ("exact", "hutchinson"):
        objective = MaximumLikelihood("dopri8", 1e-9, 1e-9, divergence)

        def loss(objective=objective):
            return objective(field, x1, Gaussian(), streams=streams).mean()

        parameters = list(net.parameters())
        gradient = torch.autograd.grad(loss(), parameters)
        direction = [torch.randn(p.shape, generator=Key(3).generator()).to(p) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        ends, h = [], 1e-3
        for side in (1, -2):  # to +h, then to -h
            for p, d in zip(parameters, direction, strict=True):
                p.data.add_(side * h * d)
            ends.append(float(loss().detach()))
        for p, d in zip(parameters, direction, strict=True):
            p.data.add_(h * d)
        # central differences: h^2, and the tolerance divided by h
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4, abs=1e-5)


def test_hutchinson_is_the_exact_loss_on_average():
    field, x1 = NetworkField(network(), Linear()), points(1).expand(2000, 2)
    exact, estimate = (
        MaximumLikelihood(rtol=1e-5, atol=1e-5, divergence=d)(
            field, x1, Gaussian(), streams=Key(4).streams(torch.arange(2000))
        ).detach()
        for d in ("exact", "hutchinson")
    )
    error = estimate.std() / 2000**0.5
    assert float(estimate.std()) > 1e-3  # the probes do matter here
    assert abs(float((estimate - exact).mean())) < 4 * float(error)


def test_a_diffusion_path_starts_at_its_own_law():
    field = NetworkField(network(), VariancePreserving())
    x1 = points(50)
    solver = ODESolver(rtol=1e-3, atol=1e-3)
    expected = -log_prob(field, x1, Gaussian(), VariancePreserving(), solver)
    assert torch.allclose(MaximumLikelihood()(field, x1, Gaussian()), expected)


def test_labels_are_looked_up_in_inference_mode_too():
    net = TimeMLP(2, 8, 2, num_classes=3)
    field, x1 = NetworkField(net, Linear()), points(6, dtype=torch.float32)
    y = torch.arange(6) % 3
    outside = MaximumLikelihood()(field, x1, Gaussian(), y=y).detach()
    metric = NegativeLogLikelihood(rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        inside = MaximumLikelihood()(field, x1 + 0, Gaussian(), y=y + 0)
        metric.prepare(x1 + 0, x1 + 0, (y + 0, y + 0), None)
        metric.evaluate_model(field, Gaussian(), None, 0, 1)
    assert torch.equal(inside, outside)
    # the tolerance; the network starts at rest
    assert metric.compute()["nll"] == pytest.approx(float(outside.mean()), abs=1e-3)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="rtol=0"):
        MaximumLikelihood(rtol=0.0)
    with pytest.raises(ValueError, match="streams=key"):
        MaximumLikelihood(divergence="hutchinson")(exact_field(), points(3), Gaussian())
    with pytest.raises(ValueError, match="no known density"):
        MaximumLikelihood()(exact_field(), points(3), Moons())
    with pytest.raises(ValueError, match="compile=true"):
        FlowMatching(TimeMLP(2, 4, 1), objective=MaximumLikelihood(), compile=True)


# -- as an option of training -------------------------------------------------------------------

SHORT = (
    "--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1",
    "--data.val_size=64", "--data.batch_size=32", "--model.network.width=8",
    "--model.objective.rtol=0.1", "--model.objective.atol=0.1", "--evaluation.metrics=[]",
)  # fmt: skip


def rows_of(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_steps_set_beforehand_are_refused(fmlightning, repository):
    path = repository / "configs/toy/likelihood.yaml"
    status, shown = fmlightning("fit", "--config", path, "--model.objective.method=midpoint")
    assert status == 2
    assert all(part in shown for part in ("--model.objective", "method", "midpoint", "dopri5"))
    assert "Traceback" not in shown


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_run_is_repeated_and_resumed_bit_for_bit(fit, divergence):
    options = (*SHORT, f"--model.objective.divergence={divergence}")
    whole = fit("toy/likelihood", *options, name="whole")
    part = fit(
        "toy/likelihood", *options, "--checkpoints.every_n_train_steps=2",
        "--checkpoints.save_top_k=-1", name="part",
    )  # fmt: skip
    kept = part / "checkpoints" / "00000002.ckpt"
    resumed = fit("toy/likelihood", *options, f"--ckpt_path={kept}", name="resumed")
    states = [
        torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for r in (whole, part, resumed)
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], p) for name, p in states[0].items())
    columns = rows_of(whole)[-1].keys()
    assert {"val/loss", "val/fm_error"} <= columns
    assert not [name for name in columns if "bin" in name]


@pytest.mark.slow
def test_it_is_chosen_by_name_for_labelled_images_too(fit):
    run = fit(
        "images/digits", "--model.objective=MaximumLikelihood",
        "--model.objective.divergence=hutchinson", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
        "--data.batch_size=8", "--model.network.channels=8", "--model.network.head_channels=8",
        "--model.network.dropout=0", "--evaluation.metrics=[]", "--trainer.log_every_n_steps=1",
        "--data.eval_batch_size=32", "--trainer.limit_val_batches=1",
    )  # fmt: skip
    last = rows_of(run)[-1]
    # the first prediction is rest, whose likelihood is that of the source: about D (ln 2 pi + E x^2) / 2
    assert 64 < float(last["val/loss"]) < 128


@pytest.mark.slow
def test_training_reaches_the_entropy_and_does_not_pass_it(fit):
    run = fit(
        "toy/likelihood", "--trainer.max_steps=250", "--trainer.val_check_interval=250", "--evaluation.at_end=true",
        "--evaluation.metrics=[{class_path: NegativeLogLikelihood, init_args: {size: 4000}}]",
    )  # fmt: skip
    scores = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert -4 * scores["kl_se"] < scores["kl"] < 0.15
    shown = [float(row["val/loss"]) for row in rows_of(run) if row["val/loss"]]
    # a network that plays with the solver shows a likelihood below the entropy: -4 was seen with 8 equal steps
    assert shown[-1] > scores["nll_floor"] - 0.1


# -- the score ----------------------------------------------------------------------------------


def scored(field, size=400, law=LAW, num_bins=None, world_size=1, x=None, **options):
    options = {"batch_size": 400, "rtol": 1e-5, "atol": 1e-5, **options}
    metric = NegativeLogLikelihood(size=size, **options)
    held_out = points(500, seed=1, dtype=torch.float32) if x is None else x
    metric.prepare(held_out, held_out, None, num_bins)
    for rank in range(world_size):
        metric.evaluate_model(field, Gaussian(), law, rank, world_size)
    return metric.compute()


def test_the_exact_velocity_is_at_the_floor():
    scores = scored(exact_field())
    x = points(500, seed=1, dtype=torch.float32)[:400]
    assert scores["nll_floor"] == pytest.approx(-float(LAW.log_prob(x).mean()), rel=1e-6)
    assert abs(scores["kl"]) < 1e-4  # the solver's tolerance
    assert scores["nll"] == pytest.approx(scores["nll_floor"] + scores["kl"], abs=1e-6)
    assert scores["nll_difference"] < 1e-3


def test_a_flow_at_rest_is_as_far_as_its_source():
    class Rest(nn.Module):
        def forward(self, x, t, y=None):
            return 0 * x

    scores = scored(NetworkField(Rest(), Linear()))
    x = points(500, seed=1, dtype=torch.float32)[:400].double()
    gap = LAW.log_prob(x) - Gaussian().log_prob(x)
    assert scores["kl"] == pytest.approx(float(gap.mean()), rel=1e-5)
    assert scores["kl_se"] == pytest.approx(float(gap.std()) / 20, rel=1e-4)


def test_the_score_does_not_depend_on_the_number_of_processes():
    one, three = (
        scored(exact_field(), world_size=n, batch_size=100, divergence="hutchinson", within=9)
        for n in (1, 3)
    )
    assert one == pytest.approx(three, rel=1e-9)


def test_there_is_no_likelihood_where_two_tolerances_differ():
    with pytest.warns(UserWarning, match="no likelihood: .*Tighten both"):
        scores = scored(exact_field(), rtol=0.3, atol=0.3, within=1e-6)
    assert scores.keys() == {"nll_difference"}


def test_a_law_without_a_density_has_no_floor():
    scores = scored(exact_field(), size=50, law=Moons())
    assert scores.keys() == {"nll_difference", "nll"}
    assert scored(exact_field(), size=50, law=None).keys() == scores.keys()


def test_images_are_judged_in_bits_per_dimension():
    scores = scored(exact_field(), size=50, num_bins=256)
    assert scores["bits_per_dimension"] == pytest.approx(
        scores["nll"] / (2 * math.log(2)) + 7, rel=1e-9
    )


def test_probes_are_keyed_by_the_sample():
    streams = Key(0).streams(torch.tensor([3, 5]))
    objective = MaximumLikelihood(divergence="hutchinson")
    both = objective.probe(streams, points(2))
    one = objective.probe(KeyedStreams(streams.words, streams.index[1:]), points(1))
    assert torch.equal(both[1:], one)

"""One run on any number of processes: the same draws bit for bit, and the same path to rounding."""

import csv
import json
import shutil
import signal

import numpy as np
import pytest
import torch

QUIET = ("--samples.at_end=false", "--trajectories.at_end=false", "--trainer.enable_progress_bar=false")  # fmt: skip
MOONS = (
    "--config", "configs/toy/moons.yaml", *QUIET, "--model.network.width=16", "--model.network.depth=2",
    "--model.coupling=MinibatchOT", "--data.batch_size=64", "--trainer.log_every_n_steps=1",
    # blocks of 64, 64 and 3 for up to 4 processes, and two judged blocks
    "--data.val_size=131", "--data.eval_batch_size=64", "--data.test_size=101", "--evaluation.batch_size=60",
    "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 1, size: 101}}]",
    "--model.solver={method: dopri5, rtol: 1.0e-3, atol: 1.0e-3}",
)  # fmt: skip
TOY = ("fit", *MOONS)
SGD = "--model.optimizer={class_path: SGD, init_args: {lr: 0.05, momentum: 0.9}}"
DOUBLE = "--trainer.precision=64-true"
IN_HALVES = (*TOY, SGD, DOUBLE, "--trainer.accumulate_grad_batches=2")
DIGITS = (
    "fit", "--config", "configs/images/digits.yaml", *QUIET, "--trainer.max_steps=3",
    "--model.network.channels=8", "--model.network.head_channels=8", "--model.network.dropout=0.2",
    "--model.class_dropout_prob=0.3", "--model.coupling=ClasswiseOT", "--trainer.val_check_interval=3",
    "--trainer.log_every_n_steps=1", "--model.solver={method: euler, num_steps: 3}", "--evaluation.batch_size=200",
)  # fmt: skip
TEMPORARY = 75
COUPLED = {
    "pool": (*TOY, "--model.coupling.ot_batch_size=256"),
    "blocks": (*TOY, "--model.coupling.ot_batch_size=24"),
    "in-the-step": (*TOY, "--model.coupling=MinibatchOT", "--model.prefetch=0"),
    "entropic": (*TOY, "--model.coupling=Entropic"),
    "unbalanced": (*TOY, "--model.coupling=UnbalancedOT"),
    "semidiscrete": (*TOY, "--model.coupling=SemidiscreteOT", "--data.train_size=128"),
    "c2ot": (*DIGITS, "--model.coupling=C2OT"),
}
BRIEFLY = ("pool", "semidiscrete", "c2ot")
"""What the short groups run: pairs of several batches, a fit of potentials, labels and images."""
FEW = ("--trainer.max_steps=6", "--trainer.val_check_interval=3", "--evaluation.metrics=[]")


def add_runs(group, steps):
    """What every group runs; the long ones also what takes long to part ways."""
    length = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps // 2}")
    epochs = f"--data.steps_per_epoch={steps * 3 // 4}"
    group.steps = steps
    group.in_halves = (*IN_HALVES, *length, epochs)
    group.add("adamw", *TOY, *length)
    group.add("digits", *DIGITS)
    group.add("whole", *group.in_halves)
    group.add("stopped", *group.in_halves, signal=[steps // 2 - 1, signal.SIGUSR1])
    fine = "--model.solver={method: dopri5, rtol: 1.0e-6, atol: 1.0e-6}"
    group.add("predicted", "predict", *MOONS, fine, run=group.folder / "adamw")
    for name in COUPLED if steps == LONG else BRIEFLY:
        group.add(name, *COUPLED[name], *FEW)
    if steps == LONG:
        group.add("sgd", *TOY, *length, SGD)
        group.add("double", *TOY, *length, SGD, DOUBLE)
    return group


def resume(group, name, other):
    """Go on, in a group, with a copy of the run that another stopped half-way."""
    run = group.folder / name
    shutil.copytree(other.folder / "stopped", run)
    group.add(name, *other.in_halves, "--ckpt_path=auto", run=run)
    return group


@pytest.fixture(scope="module")
def groups(group):
    """Groups by their size and the length of their runs, each started once."""
    started = {}

    def find(size, steps):
        if (size, steps) not in started:
            new = add_runs(group(size), steps)
            if size == 2:
                resume(new, "resumed", find(1, steps))
            started[size, steps] = new.start(torchrun=size > 1 and steps == LONG)
        return started[size, steps]

    return find


SHORT, LONG = 24, 200
PAIRS = [(2, SHORT), *(pytest.param((n, LONG), marks=pytest.mark.slow) for n in (2, 4))]


@pytest.fixture(params=PAIRS, ids=["two", "two-long", "four-long"])
def pair(request, groups):
    """One process, and several."""
    size, steps = request.param
    return groups(1, steps), groups(size, steps)


def weights(run):
    """The weights and their average at the end of a run."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 0
    return checkpoint["state_dict"], checkpoint["callbacks"]["EMA"]["shadow"]


def distance(one, other):
    """The largest difference of two sets of weights, relative to the largest weight."""
    largest = max(float(v.abs().max()) for v in one.values())
    return max(float((v - other[k]).abs().max()) for k, v in one.items()) / largest


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scores(run):
    return json.loads((run / "evaluation.json").read_text())["metrics"]


def require_same_metrics(one, other, within):
    mine, its = rows(one), rows(other)
    assert [r["step"] for r in mine] == [r["step"] for r in its]
    assert mine[0].keys() == its[0].keys()
    assert any(r["val/loss"] for r in mine)
    for a, b in zip(mine, its, strict=True):
        for k, v in a.items():
            same = v == b[k] == "" or float(b[k]) == pytest.approx(float(v), rel=within, abs=within)
            assert same, (k, v, b[k])
    assert scores(other) == pytest.approx(scores(one), rel=within)


@pytest.mark.parametrize("name", ["adamw", "digits", "whole", *COUPLED])
def test_every_step_draws_the_same_bits(pair, name):
    """Data, source points, pairs, times, noise and hidden labels of the global batch; labelled and in micro-batches."""
    if name in COUPLED and name not in BRIEFLY and pair[0].steps != LONG:
        pytest.skip("run by the long groups")
    mine, its = (group.draws(name) for group in pair)
    assert len(mine) == len(its) > 0
    for a, b in zip(mine, its, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    # rounding of sums in another order; the average is kept in float32
    ("name", "within", "average"),
    [("whole", 1e-9, 1e-6), ("double", 1e-9, 1e-6), ("sgd", 1e-5, 1e-5)],
)
def test_weights_take_the_same_path(pair, name, within, average):
    if name != "whole" and pair[0].steps != LONG:
        pytest.skip("run by the long groups")
    (mine, mean), (its, its_mean) = (weights(group.folder / name) for group in pair)
    assert distance(mine, its) <= within
    assert distance(mean, its_mean) <= average


@pytest.mark.parametrize("name", ["adamw", "digits", "whole"])
def test_losses_and_scores_are_the_same(pair, name):
    """In every step, of 131 = 64 + 64 + 3 held-out points in pairs, and of 101 samples of an adaptive solver."""
    alone, several = pair
    assert several.statuses(name) == [0] * several.size
    # AdamW divides by small numbers, and scores add float32 features
    require_same_metrics(alone.folder / name, several.folder / name, 1e-4)


def test_predictions_are_all_there_in_order(pair):
    mine, its = (np.load(group.folder / "adamw/samples/predictions.npz") for group in pair)
    assert its["index"].tolist() == mine["index"].tolist() == list(range(101))
    # weights of AdamW in float32; the solver sees other blocks, and adds its tolerance of 1e-6
    np.testing.assert_allclose(its["x"], mine["x"], atol=1e-3)


def test_a_signal_to_one_process_stops_all_after_the_same_step(pair):
    for group in pair:
        half = group.steps // 2
        assert group.statuses("stopped") == [TEMPORARY] * group.size
        saved = torch.load(group.folder / "stopped/checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == half  # it came in the first of the step's two micro-batches
        assert {len(rank["draws"]) for rank in group.of_ranks("stopped")} == {2 * half}


def require_resumed(whole, run):
    for mine, its, within in zip(
        weights(whole.folder / "whole"), weights(run), (1e-9, 1e-6), strict=True
    ):
        assert distance(mine, its) <= within
    require_same_metrics(whole.folder / "whole", run, 1e-6)


@pytest.mark.parametrize("steps", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_run_of_one_goes_on_as_two(groups, steps):
    require_resumed(groups(1, steps), groups(2, steps).folder / "resumed")


@pytest.mark.slow
def test_a_run_of_four_goes_on_as_one(groups, group):
    resumed = resume(group(1), "resumed", groups(4, LONG)).start()
    require_resumed(groups(1, LONG), resumed.folder / "resumed")

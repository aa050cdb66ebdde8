"""Pairs that are found ahead of the step: the same whenever they are ready, and no thread outlives its run."""

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from fmlightning.data.toy import ToyData
from fmlightning.flow.couplings import Coupling, Entropic, MinibatchOT, SemidiscreteOT
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Gaussian
from fmlightning.training.pairing import BatchPairing, PairedBatches, PairingContext
from fmlightning.training.prefetch import NAME, Prefetcher

SMALL = (
    "toy/moons", "--trainer.max_steps=10", "--data.batch_size=32", "--data.val_size=64", "--data.steps_per_epoch=4",
    "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=5",
)  # fmt: skip


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(NAME)]


# -- numbered work ------------------------------------------------------------------------------------


def test_numbers_are_read_in_order_in_the_thread_that_asks_and_made_in_others():
    read, made = [], {}

    def take(number):
        read.append((number, threading.current_thread()))
        return number

    def square(number):
        made[number] = threading.current_thread()
        return number**2

    ahead = Prefetcher(take, square, depth=2)
    assert [ahead(n) for n in range(5, 12)] == [n**2 for n in range(5, 12)]
    assert [n for n, _ in read] == list(range(5, 14))  # two more than were asked for
    assert {t for _, t in read} == {threading.main_thread()}
    assert threading.main_thread() not in made.values()
    ahead.close()
    assert not threads()


def test_results_are_made_side_by_side():
    """All that are under way wait for each other: one thread alone would never finish the first."""
    together = threading.Barrier(3)

    def meet(number):
        if number < 3:
            together.wait(timeout=120)
        return number

    ahead = Prefetcher(lambda n: n, meet, depth=3)
    assert [ahead(n) for n in range(3)] == [0, 1, 2]
    ahead.close()


def test_the_order_in_which_threads_finish_changes_nothing():
    first_waits = threading.Event()

    def late(number):
        if number == 0:
            assert first_waits.wait(timeout=120)
        if number == 1:
            first_waits.set()
        return -number

    ahead = Prefetcher(lambda n: n, late, depth=2)
    assert [ahead(n) for n in range(6)] == [0, -1, -2, -3, -4, -5]
    ahead.close()


def test_a_jump_starts_anew_and_depth_zero_has_no_threads():
    for depth in (0, 3):
        ahead = Prefetcher(lambda n: n, lambda n: 10 * n, depth)
        assert [ahead(n) for n in (4, 5, 100, 101, 2)] == [40, 50, 1000, 1010, 20]
        assert bool(threads()) == bool(depth)
        ahead.close()
    assert not threads()


@pytest.mark.parametrize("depth", [0, 2])
def test_what_fails_is_raised_at_its_own_number(depth):
    def fail(number):
        if number == 3:
            raise ValueError("the third cannot be paired")
        return number

    ahead = Prefetcher(lambda n: n, fail, depth)
    assert [ahead(n) for n in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third cannot be paired"):
        ahead(3)
    ahead.close()


# -- pairs --------------------------------------------------------------------------------------------


def share(batch_size, rows):
    return PairingContext(Key(1), Gaussian(), batch_size, rows, torch.device("cpu"))


def paired(coupling, depth, rows=slice(0, 16), steps=range(8)):
    data = ToyData(batch_size=16)
    everything = slice(0, 16)
    pairing = BatchPairing(
        coupling, share(16, rows), lambda n: data.train_batch(n, everything), lambda v: v
    )
    batches = PairedBatches(pairing, depth)
    found = [batches(n) for n in steps]
    batches.close()
    return found


def same(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("x0", "x1"))


@pytest.mark.parametrize("size", [None, 64, 8], ids=["batch", "pool", "blocks"])
def test_pairs_do_not_depend_on_how_far_ahead_they_are_found(size):
    coupling = MinibatchOT(ot_batch_size=size)
    assert same(paired(coupling, 0), paired(coupling, 2))
    # nor on the step that a run goes on from, in the middle of a pool
    assert same(paired(coupling, 2)[5:], paired(coupling, 2, steps=range(5, 8)))


def test_processes_share_out_the_rows_of_one_problem():
    whole = paired(MinibatchOT(ot_batch_size=32), 1)
    halves = [
        paired(MinibatchOT(ot_batch_size=32), 1, rows) for rows in (slice(0, 8), slice(8, 16))
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        for k in ("x0", "x1"):
            assert torch.equal(batch[k], torch.cat((first[k], second[k])))


def test_a_pool_is_paired_as_one_problem_and_spent_batch_by_batch():
    pool, single = paired(MinibatchOT(ot_batch_size=64), 1), paired(MinibatchOT(), 1)
    # the same points of the data in the same order, and the same source points within each pool of four batches
    assert all(torch.equal(a["x1"], b["x1"]) for a, b in zip(pool, single, strict=True))
    assert len(torch.cat([b["x0"] for b in pool]).unique(dim=0)) == 128  # every step draws its own
    for first in (0, 4):
        x0, x1 = (torch.cat([b[k] for b in pool[first : first + 4]]) for k in ("x0", "x1"))
        drawn = torch.cat([share(16, slice(0, 16)).x0(n, (2,)) for n in range(first, first + 4)])
        i, j = MinibatchOT().pairs(drawn, x1, None, Key(0).generator())
        assert j.tolist() == list(range(64))
        assert torch.equal(x0, drawn[i])


def test_pairs_that_are_drawn_are_drawn_anew_at_each_step():
    """Of the same points: else every step would make the same choice among its rows."""
    points = ToyData(batch_size=16).train_batch(0, slice(0, 16))["x1"]
    pairing = BatchPairing(
        Entropic(reg=100.0), share(16, slice(0, 16)), lambda n: {"x1": points}, lambda v: v
    )
    x0 = share(16, slice(0, 16)).x0(0, (2,))
    chosen = [pairing.solve((step, {"x0": x0, "x1": points}))[0]["x0"] for step in (0, 1, 0)]
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[1])


def cost(batches):
    return float(torch.cat([(b["x1"] - b["x0"]).square().sum(1) for b in batches]).mean())


def test_larger_pools_are_closer_to_transport():
    sizes = (4, None, 64)
    costs = [cost(paired(MinibatchOT(ot_batch_size=size), 1)) for size in sizes]
    assert costs[0] > costs[1] > costs[2]


# -- runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(Coupling):
    """Exact transport that breaks at the n-th call after the checks, from whatever thread."""

    at: int = 1_000_000

    def pairs(self, x0, x1, y, generator):
        if (
            len(x0) == 32
            and generator.initial_seed() == Key(0).fold("train").fold(self.at).fold("coupling").seed
        ):
            raise ValueError("these points cannot be paired: their cost is infinite")
        return MinibatchOT().pairs(x0, x1, y, generator)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "coupling", ["MinibatchOT", "{class_path: MinibatchOT, init_args: {ot_batch_size: 128}}"]
)
def test_a_run_is_the_same_for_every_depth_and_leaves_no_thread(fit, coupling):
    runs = [
        fit(
            *SMALL,
            f"--model.coupling={coupling}",
            f"--model.prefetch={depth}",
            name=f"ahead{depth}",
        )
        for depth in (0, 1, 4)
    ]
    assert not threads()
    first, *others = map(weights, runs)
    for other in others:
        assert all(torch.equal(first[k], other[k]) for k in first)
    rows = [(run / "metrics.csv").read_text() for run in runs]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_coupling_that_fails_ends_the_run_with_its_own_message(fmlightning, tmp_path, depth):
    run = tmp_path / "run"
    status, shown = fmlightning(
        "fit", "--config", f"configs/{SMALL[0]}.yaml", *SMALL[1:], "--allow", __name__, f"--run_dir={run}",
        f"--model.coupling={__name__}.Fails", "--model.coupling.at=6", f"--model.prefetch={depth}",
        "--wandb.mode=disabled", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--evaluation.metrics=[]", "--samples.at_end=false", "--trajectories.at_end=false",
    )  # fmt: skip
    assert status == 2, shown
    assert "these points cannot be paired: their cost is infinite" in shown
    assert "Traceback" not in shown
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    deadline = time.monotonic() + 120
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_the_independent_coupling_has_nothing_between_the_data_and_the_step(fit, monkeypatch):
    monkeypatch.setattr(PairedBatches, "__init__", None)
    fit(*SMALL, "--model.coupling=Independent")


def test_odd_sizes_are_refused(fmlightning):
    for option, words in (
        ("--model.coupling.ot_batch_size=1000000000", "ot_batch_size=1000000000 must be from 1 to 20000"),
        ("--model.coupling.ot_batch_size=48", "ot_batch_size=48 must be a multiple of data.batch_size=32"),
        ("--model.prefetch=-1", "prefetch=-1 must be from 0"),
        ("--model.prefetch=100000", "prefetch=100000 must be from 0, which solves within the step, to 64"),
    ):  # fmt: skip
        status, shown = fmlightning(
            "fit", "--config", f"configs/{SMALL[0]}.yaml", *SMALL[1:], "--model.coupling=MinibatchOT", option,
            "--wandb.mode=disabled",
        )  # fmt: skip
        assert status, shown
        assert words in shown


def test_a_potential_is_fitted_once_for_all_seeds(fit, monkeypatch):
    cells = (*SMALL, "--model.coupling=SemidiscreteOT", "--data.train_size=60")
    fit(*cells, "--trainer.enable_progress_bar=true", name="first")  # which says that it is fitted
    monkeypatch.setattr(SemidiscreteOT, "fit", None)
    fit(*cells, "--seed_everything=1", name="second")


def test_a_semidiscrete_run_goes_on_with_the_potential_of_its_checkpoint(
    fit, tmp_path, monkeypatch
):
    cells = (*SMALL, "--model.coupling=SemidiscreteOT", "--data.train_size=60")
    kept = ("--checkpoints.every_n_train_steps=5", "--checkpoints.save_top_k=-1")
    whole = fit(*cells, *kept, name="whole")
    # nothing in a cache, and it is not fitted again
    monkeypatch.setenv("FMLIGHTNING_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(SemidiscreteOT, "fit", None)
    half = fit(*cells, f"--ckpt_path={whole / 'checkpoints' / '00000005.ckpt'}", name="half")
    first, second = weights(whole), weights(half)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_potential_of_other_points_is_not_gone_on_with(fit, tmp_path):
    """As many points, of another law: the old potential would draw some of them too often, and say nothing."""
    cells = (*SMALL, "--model.coupling=SemidiscreteOT", "--data.train_size=60")
    other = (*cells, "--data.target=Checkerboard")
    # a checkpoint that lies in no run, whose options would be held against these
    begun = fit(*cells, name="begun").rename(tmp_path / "last") / "checkpoints" / "last.ckpt"
    (tmp_path / "last" / "config.yaml").unlink()
    ends = [
        fit(*other, f"--ckpt_path={begun}", "--trainer.max_steps=15", name="gone-on"),
        fit(*other, name="afresh"),
    ]
    found = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in ends]
    assert torch.equal(found[0]["potential"], found[1]["potential"])
    assert not torch.equal(found[0]["potential"], torch.load(begun, weights_only=True)["potential"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("toy/moons",), "data.train_size=null draws new points at every step"),
        (("images/digits",), "Use ClasswiseOT() or Independent, or leave the labels out"),
        (
            ("images/digits", "--data=PhotosData", "--data.labelled=false", "--data.flip=true"),
            "data.flip=true mirrors",
        ),
    ],
    ids=["endless", "labels", "mirrored"],
)
def test_semidiscrete_transport_says_what_it_needs(fmlightning, options, words):
    config, *rest = options
    status, shown = fmlightning(
        "fit",
        "--config",
        f"configs/{config}.yaml",
        *rest,
        "--model.coupling=SemidiscreteOT",
        "--wandb.mode=disabled",
    )
    assert status, shown
    assert words in shown

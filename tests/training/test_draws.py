"""The random numbers of a step depend on seed and step, and on nothing else."""

import pytest
import torch

from fmlightning.data.order import Shard, steps_per_draw
from fmlightning.data.toy import ToyData
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Gaussian
from fmlightning.training.draws import Noises

CPU = torch.device("cpu")
FEW, MANY = (64, 2), (96, 1, 10, 10)  # drawn for 64 steps at once, and for each


def numbers(shape=FEW, seed=0, rows=None):
    rows = slice(0, shape[0]) if rows is None else rows
    return Noises(Key(seed), shape, rows, CPU, Gaussian(), 1, stochastic=True, labels=True)


def tensors(noise):
    return noise.x0, *noise.u, noise.eps, noise.label


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("shape", [FEW, MANY], ids=str)
def test_they_do_not_depend_on_where_a_run_begins(shape):
    drawn = numbers(shape)
    sequence = [drawn(step) for step in range(130 if shape == FEW else 3)]
    for step in (0, 1, len(sequence) // 2, len(sequence) - 1, 0):  # back, too
        assert equal(numbers(shape)(step), sequence[step])
        assert equal(drawn(step), sequence[step])


@pytest.mark.parametrize("shape", [FEW, MANY], ids=str)
def test_no_two_steps_and_no_two_seeds_share_a_number(shape):
    steps = range(130 if shape == FEW else 3)
    kinds = zip(*(tensors(numbers(shape)(step)) for step in steps), strict=True)
    other = tensors(numbers(shape, seed=1)(0))
    for kind, of_other in zip(kinds, other, strict=True):
        flat = torch.cat([*(x.flatten() for x in kind), of_other.flatten()])
        # by chance some are: of n in [0, 1), which has 2^24 float32 numbers that are drawn, n^2 / 2^25 on average
        assert len(flat.unique()) > len(flat) * (1 - 10 * len(flat) / 2**25) - 10


@pytest.mark.parametrize("shape", [FEW, MANY], ids=str)
def test_the_kinds_are_independent_of_each_other(shape):
    """Labels that are hidden by the numbers of the times would be hidden at early times only."""
    x0, u, eps, label = tensors(numbers(shape)(0))
    assert not torch.equal(u, label)
    assert not torch.equal(x0, eps)
    for a, b in ((x0, eps), (u - 0.5, label - 0.5)):
        correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
        assert abs(correlation) < 4 / a.numel() ** 0.5


@pytest.mark.parametrize("shape", [FEW, MANY], ids=str)
def test_processes_share_out_the_numbers_of_one(shape):
    whole = numbers(shape)
    parts = [numbers(shape, rows=Shard(r, 2).rows(shape[0])) for r in range(2)]
    for step in (0, 5):
        one, two = (p(step) for p in parts)
        for kind in ("x0", "eps", "label"):
            both = torch.cat([getattr(one, kind), getattr(two, kind)])
            assert torch.equal(both, getattr(whole(step), kind))
        assert torch.equal(
            one.u[0], whole(step).u[0]
        )  # a sampler of times may need the whole batch


def test_further_times_leave_the_first_as_they_are():
    """An objective with two times sees the first ones of an objective with one."""
    two = Noises(Key(0), FEW, slice(0, FEW[0]), CPU, Gaussian(), 2, stochastic=True, labels=True)
    u, v = two(3).u
    assert torch.equal(u, numbers()(3).u[0])
    assert abs(float(torch.corrcoef(torch.stack((u, v)))[0, 1])) < 4 / len(u) ** 0.5
    none = Noises(Key(0), FEW, slice(0, FEW[0]), CPU, Gaussian(), 0, stochastic=True, labels=True)
    assert none(3).u == []


def test_images_are_drawn_step_by_step():
    assert steps_per_draw(MANY) == 1
    assert steps_per_draw(FEW) == 64
    key = Key(0).fold(7)
    assert torch.equal(numbers(MANY)(7).x0, torch.randn(MANY, generator=key.fold("x0").generator()))


def test_new_points_are_others_at_every_step_and_the_same_in_every_order():
    data = ToyData(batch_size=32)
    rows, together = slice(0, 32), data.steps_at_once
    assert together > 2
    steps = [0, 1, together - 1, together, 3 * together + 1]
    batches = [data.train_batch(step, rows)["x1"] for step in steps]
    assert len(torch.cat(batches).unique(dim=0)) == 32 * len(steps)
    for step, batch in reversed(list(zip(steps, batches, strict=True))):
        assert torch.equal(ToyData(batch_size=32).train_batch(step, rows)["x1"], batch)
        assert torch.equal(data.train_batch(step, rows)["x1"], batch)
    assert not torch.equal(ToyData(batch_size=32, seed=1).train_batch(0, rows)["x1"], batches[0])

"""The order of the data: a function of (seed, step), the same for any number of processes."""

import pytest
import torch

from fmlightning.data.images.digits import DigitsData
from fmlightning.data.order import Order, Shard, in_blocks, shared_blocks
from fmlightning.data.toy import ToyData
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import dequantise, quantise


def test_an_epoch_is_a_permutation_and_epochs_differ():
    order = Order(size=100, batch_size=10, key=Key(3))
    epochs = [torch.cat([order.indices(e * 10 + s) for s in range(10)]) for e in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(100))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("data", [ToyData(batch_size=32), ToyData(batch_size=32, train_size=100), DigitsData(32)],
                         ids=["endless", "finite", "digits"])  # fmt: skip
def test_processes_share_out_the_same_global_batch(data, world_size):
    for step in (0, 1, 57):
        whole = data.train_batch(step, slice(0, 32))
        parts = [data.train_batch(step, Shard(r, world_size).rows(32)) for r in range(world_size)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([p[name] for p in parts]), value)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_samples_are_seen_once_each(world_size):
    samples = {"x1": torch.arange(103.0)[:, None]}
    seen = [
        b["index"]
        for r in range(world_size)
        for b in in_blocks(samples, shared_blocks(torch.arange(103), 10, Shard(r, world_size)))
    ]
    assert torch.cat(seen).sort().values.tolist() == list(range(103))


def test_batches_resume_in_the_middle_of_an_epoch():
    data = DigitsData(batch_size=100)
    whole = data.train_dataloader()
    stream = [b["x1"] for _ in range(3) for b in whole]
    data.load_state_dict({"step": 17})
    rest = data.train_dataloader()
    resumed = [b["x1"] for _ in range(2) for b in rest]
    assert all(torch.equal(a, b) for a, b in zip(stream[17:], resumed, strict=False))


def test_a_batch_of_digits_is_its_callers_to_change():
    data = DigitsData()
    first = data.train_batch(3, slice(0, 8))
    kept = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.zero_()
    again = data.train_batch(3, slice(0, 8))
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_the_splits_of_the_digits_are_disjoint_and_do_not_move_with_the_seed():
    a, b = DigitsData(seed=0), DigitsData(seed=1)
    assert [len(a.images[s]) for s in ("train", "val", "test")] == [1297, 150, 350]
    for split in ("train", "val", "test"):
        assert torch.equal(a.images[split], b.images[split])
    # of all 1,797 images no two are equal, so shared rows would be shared samples
    rows = torch.cat([a.images[s].flatten(1) for s in ("train", "val", "test")])
    assert len(rows.unique(dim=0)) == 1797


def test_dequantisation_is_keyed_by_epoch_and_sample():
    data = DigitsData(batch_size=1297)
    first, again, later = (data.train_batch(s, slice(0, 1297))["x1"] for s in (0, 0, 1))
    assert torch.equal(first, again)
    order = [data.order.indices(s).argsort() for s in (0, 1)]
    a, b = first[order[0]], later[order[1]]  # the same images in two epochs
    assert torch.equal(quantise(a, 17), quantise(b, 17))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("num_bins", [2, 17, 256])
def test_every_level_comes_back(num_bins):
    k = torch.arange(num_bins).repeat(1000, 1)
    u = torch.rand(k.shape, generator=Key(0).generator()).clamp(1e-4, 1 - 1e-4)
    x = dequantise(k, u, num_bins)
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(quantise(x, num_bins).long(), k)


def test_labels_are_asked_for_in_turn():
    data = DigitsData()
    assert data.labels(torch.arange(12)).tolist() == [*range(10), 0, 1]
    y = data.labels(torch.arange(1297), "reference")
    assert torch.equal(y.bincount(), data.eval_samples("reference")["y"].bincount())
    assert ToyData().labels(torch.arange(3)) is None


@pytest.mark.parametrize(("size", "batch"), [(10, 0), (10, 11)])
def test_a_batch_that_cannot_be_filled_is_refused(size, batch):
    with pytest.raises(ValueError, match="batch_size"):
        Order(size, batch, Key(0))

"""A torch Dataset of one's own as training data: its items in a keyed order, and runs that resume exactly."""

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fmlightning.data.dataset import DatasetData
from fmlightning.data.images.base import ImageData, Splits
from fmlightning.data.images.datasets import InMemoryImages
from fmlightning.data.latents.base import LatentData
from fmlightning.data.order import Order
from fmlightning.flow.keys import Key

POINTS = torch.randn(60, 3, 2, generator=Key(0).generator())
PIXELS = torch.randint(0, 17, (60, 1, 8, 8), generator=Key(1).generator()).byte()
LABELS = torch.arange(60) % 4


class Changed(Dataset):
    """A good set with one item in the place of another."""

    def __init__(self, item, good=POINTS):
        self.item, self.good = item, good

    def __len__(self):
        return len(self.good)

    def __getitem__(self, number):
        if number != 7:
            return self.good[number]
        return self.item() if callable(self.item) else self.item


class Endless(IterableDataset):
    def __iter__(self):
        yield POINTS[0]


class InMemory(ImageData):
    title = "a set"
    num_bins = 17


def points(num_workers=0, **options):
    return DatasetData(
        TensorDataset(POINTS, LABELS),
        test_size=20,
        num_workers=num_workers,
        batch_size=8,
        **options,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_floats_are_taken_as_they_are_in_the_order_that_the_key_and_the_step_say(num_workers):
    data = points(num_workers, num_classes=4, seed=3)
    order = Order(40, 8, Key(3).fold("data"))
    assert (data.event_shape, data.num_bins, data.steps_per_epoch) == ((3, 2), None, 5)
    train = data.sets["train"].numbers
    for step in (6, 7, 2):  # beyond an epoch, and back again as after a resume
        batch = data.train_batch(step, slice(2, 6))
        chosen = train[order.indices(step)[2:6]]
        assert torch.equal(batch["x1"], POINTS[chosen])
        assert torch.equal(batch["y"], LABELS[chosen])
    held_out = data.eval_samples("test")
    assert len(held_out["x1"]) == 20
    assert not {*train.tolist()} & {*data.sets["test"].numbers.tolist()}
    data.teardown("fit")


def test_bytes_become_the_points_that_other_images_become():
    theirs = InMemoryImages(PIXELS, LABELS)
    images = InMemory(
        Splits({"train": theirs, "test": theirs}, tuple("abcd")), batch_size=8, flip=True
    )
    pairs = TensorDataset(PIXELS, LABELS)
    data = DatasetData(
        pairs, pairs, num_classes=4, num_bins=17, num_workers=0, batch_size=8, flip=True
    )
    for ours, expected in (
        (data.train_batch(11, slice(0, 8)), images.train_batch(11, slice(0, 8))),
        (data.eval_samples("val"), images.eval_samples("val")),
    ):
        assert torch.equal(ours["x1"], expected["x1"])
        assert torch.equal(ours["y"], expected["y"])
    assert LatentData(data, batch_size=8).event_shape == (
        2,
        4,
        4,
    )  # and other data can be made of them


def test_labels_may_be_ignored_or_missing():
    assert set(points().train_batch(0, slice(0, 8))) == {"x1"}
    alone = DatasetData(Changed(POINTS[7]), test_size=20, num_workers=0, batch_size=8)
    assert set(alone.train_batch(0, slice(0, 8))) == {"x1"}


def test_another_item_is_another_fingerprint():
    def fingerprint(item):
        return DatasetData(Changed(item), test_size=20, batch_size=8).fingerprint

    assert fingerprint(POINTS[7]) == fingerprint(POINTS[7].clone())
    assert fingerprint(POINTS[7]) != fingerprint(POINTS[7] + 1)


def broken():
    raise KeyError("column")


WRONG = {
    "text": (Changed("a"), {}, r"item 7: str is neither a tensor .* transform=torchvision"),
    "integers": (Changed(torch.zeros(3, 2).long()), {}, r"item 7: torch.int64 \(3, 2\) is neither"),
    "another shape": (Changed(POINTS[7, :2]), {}, r"item 7: .*\(2, 2\) is unlike the first, .*\(3, 2\)"),
    "bytes among floats": (Changed(PIXELS[7]), {}, "item 7: torch.uint8 .* is unlike the first"),
    "an error": (Changed(broken), {}, r"data.train=Changed: item 7: KeyError\('column'\)"),
    "no label": (Changed(POINTS[7]), {"num_classes": 4}, "item 0: the label is None, and data.num_classes=4"),
    "a large label": (TensorDataset(POINTS, LABELS), {"num_classes": 3}, "the label is 3, and data.num_classes=3"),
    "a large pixel": (TensorDataset(PIXELS, LABELS), {"num_bins": 16}, "pixel value 16 .* data.num_bins=16"),
    "nothing": (TensorDataset(POINTS[:0]), {}, "data.train=TensorDataset must have items"),
    "no numbers": (Endless(), {}, "data.train=Endless must have items, each with a number"),
    "mirrored points": (TensorDataset(POINTS), {"flip": True}, "data.flip=true mirrors images"),
    "classes below 0": (TensorDataset(POINTS), {"num_classes": -1}, "data.num_classes=-1"),
    "too many values": (TensorDataset(PIXELS), {"num_bins": 300}, "data.num_bins=300"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_trained_on_is_refused_in_one_message(name, num_workers):
    train, options, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        read(DatasetData(train, test_size=20, num_workers=num_workers, batch_size=8, **options))


def read(data):
    """An epoch and the held-out items."""
    for step in range(data.steps_per_epoch):
        data.train_batch(step, slice(0, 8))
    data.eval_samples("test")


MINE = """
import torch
from torch.utils.data import Dataset
class Ring(Dataset):
    def __init__(self, size: int = 96):
        self.angles = torch.linspace(0, 6, size)
    def __len__(self):
        return len(self.angles)
    def __getitem__(self, number):
        return torch.stack((self.angles[number].cos(), self.angles[number].sin()))
"""


@pytest.mark.slow
def test_a_config_names_it_and_a_run_goes_on_exactly_with_any_number_of_workers(
    fit, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    options = (
        "--data=DatasetData", "--data.train=mine.Ring", "--data.train.size=128", "--data.test_size=32",
        "--data.batch_size=16", "--allow=mine", "--model.scheduler=null", "--evaluation.metrics=[]",
        "--checkpoints.every_n_train_steps=5",
    )  # fmt: skip
    weights = []
    for name, parts in (("whole", [(0, 12)]), ("parts", [(2, 5), (1, 12)])):
        for workers, steps in parts:
            run = fit(
                "toy/moons", *options, f"--data.num_workers={workers}", f"--trainer.max_steps={steps}",
                "--ckpt_path=auto", name=name,
            )  # fmt: skip
        weights.append(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())

"""Pictures as points of a flow: scaling, keyed noise and flips, splits, the photographs."""

import pytest
import torch
from sklearn.datasets import load_sample_images

from fmlightning.data.images.base import ImageData, Splits
from fmlightning.data.images.datasets import InMemoryImages
from fmlightning.data.images.photos import BANDS, PhotosData, patches
from fmlightning.data.order import Shard
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import quantise


class SmallData(ImageData):
    """A collection made by the test."""

    title = "pictures of a test"


def random_bytes(*shape, seed=0):
    numbers = torch.randint(0, 256, shape, generator=Key(seed).generator())
    return numbers.to(torch.uint8)


def small(size=60, classes=3, test=20, **options):
    labels = torch.arange(size + test) % classes
    pixels = random_bytes(size + test, 3, 6, 6)
    sets = {
        "train": InMemoryImages(pixels[:size], labels[:size]),
        "test": InMemoryImages(pixels[size:], labels[size:]),
    }
    return SmallData(Splits(sets, tuple("abc"[:classes])), **{"batch_size": 12, **options})


@pytest.fixture(scope="module")
def photos():
    return PhotosData(batch_size=32)


def test_every_byte_comes_back_from_dequantised_pictures():
    """Exactly: a noise of up to 1 - 2**-24 would carry one pixel in 131,072 to the next level."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(4000).reshape(1000, 1, 32, 32)
    sets = {"train": InMemoryImages(levels, None), "test": InMemoryImages(levels, None)}
    data = SmallData(Splits(sets), labelled=False, batch_size=500)
    x = data.eval_samples("reference")["x1"]
    assert torch.equal(quantise(x, 256), levels)
    assert x.min() >= -1
    assert x.max() < 1


def test_without_dequantisation_pixels_stand_at_the_middle_of_their_level():
    data = small(dequantise=False)
    index = data.order.indices(4)
    middle = (data.sets["train"].pixels[index].double() + 0.5) / 128 - 1
    assert torch.equal(data.train_batch(4, slice(0, 12))["x1"].double(), middle)


def test_flips_mirror_half_of_the_pictures_by_epoch_and_sample():
    data = small(size=600, batch_size=600, flip=True, dequantise=False)
    plain = small(size=600, batch_size=600, dequantise=False)
    flipped = []
    for step in (0, 1):
        x, y = (d.train_batch(step, slice(0, 600))["x1"] for d in (data, plain))
        same = (x == y).flatten(1).all(1)
        assert torch.equal(x[~same], y[~same].flip(-1))
        flipped.append((~same)[data.order.indices(step).argsort()])
        # 600 fair coins: four standard deviations are 0.08
        assert abs(float(flipped[-1].float().mean()) - 0.5) < 0.08
    assert not torch.equal(*flipped)
    again = small(size=600, batch_size=60, flip=True, dequantise=False)  # other batches, same coins
    parts = torch.cat([again.train_batch(s, slice(0, 60))["x1"] for s in range(10)])
    assert torch.equal(parts, data.train_batch(0, slice(0, 600))["x1"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_out_one_global_batch_of_pictures(world_size):
    data = small(flip=True)
    for step in (0, 7):
        whole = data.train_batch(step, slice(0, 12))
        parts = [data.train_batch(step, Shard(r, world_size).rows(12)) for r in range(world_size)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([p[name] for p in parts]), value)


def test_held_out_batches_are_the_whole_in_blocks(photos):
    whole, blocks = photos.eval_samples("test"), list(photos.eval_batches("test"))
    assert torch.cat([b["index"] for b in blocks]).tolist() == list(range(len(whole["x1"])))
    for name, value in whole.items():
        assert torch.equal(torch.cat([b[name] for b in blocks]), value)


def test_an_shapes_has_the_shapes_of_the_whole_and_a_glimpse_its_samples(photos):
    whole, shapes, some = (
        photos.eval_samples("val"),
        photos.shapes("val"),
        photos.preview("val", 5),
    )
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in whole.items()}
    rows = [0, 445, 890, 1335, 1781]  # both ends and three between
    assert torch.equal(some["x1"], whole["x1"][rows])
    assert torch.equal(some["y"], whole["y"][rows])


def test_validation_takes_pictures_of_training_or_says_that_it_takes_none():
    kept = small(val_size=15)
    rows = torch.cat([kept.sets[s].pixels.flatten(1) for s in ("train", "val")])
    assert [len(kept.sets[s]) for s in ("train", "val", "test")] == [45, 15, 20]
    assert len(rows.unique(dim=0)) == 60
    assert torch.equal(small(val_size=15, seed=9).sets["val"].pixels, kept.sets["val"].pixels)
    assert "test images" in small().splits["val"]


def test_labels_are_of_their_pictures(photos):
    index = photos.order.indices(3)
    batch = photos.train_batch(3, slice(0, 32))
    assert torch.equal(batch["y"], photos.sets["train"].labels[index])
    assert set(small(labelled=False).train_batch(0, slice(0, 12))) == {"x1"}


def test_patches_of_the_photographs_are_where_they_should_be(photos):
    images = load_sample_images().images
    train = patches([torch.from_numpy(image.copy()) for image in images], "train")
    assert [len(photos.sets[s]) for s in BANDS] == [16632, 3564, 1782]
    # bands of 128 and 64 columns have 25 and 9 positions in each of 99 rows: the second photograph, its last band
    # (from column 512), the second row, the fourth patch
    number = 99 * (25 + 9 + 25 + 25) + 99 * (25 + 9 + 25) + 25 + 3
    patch = torch.from_numpy(images[1][4:36, 524:556].copy()).permute(2, 0, 1)
    assert torch.equal(train.pixels[number], patch)
    assert int(train.labels[number]) == 1
    shuffled = photos.sets["train"]
    (place,) = (shuffled.pixels == patch).flatten(1).all(1).nonzero().flatten().tolist()
    assert int(shuffled.labels[place]) == 1


def test_no_pixel_of_the_photographs_is_in_two_splits():
    """Each photograph becomes one whose pixel tells its place, which the patches then show."""
    place = torch.arange(427 * 640).reshape(427, 640)
    told = [torch.stack([place % 256, place // 256 % 256, place // 65536], -1).to(torch.uint8)] * 2
    times_seen = torch.zeros(427 * 640, dtype=torch.int64)
    for split in BANDS:
        pixels = patches(told, split).pixels.int()
        places = pixels[:, 0] + 256 * pixels[:, 1] + 65536 * pixels[:, 2]
        times_seen += torch.bincount(places.flatten(), minlength=427 * 640) > 0
    assert times_seen.max() == 1


def test_fingerprints_tell_data_apart_and_nothing_else():
    assert small().fingerprint == small(seed=3, batch_size=5).fingerprint
    changed = small()
    changed.sets["train"].pixels[0, 0, 0, 0] ^= 1
    assert changed.fingerprint != small().fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 61}, "batch_size=61 .* 60 training samples"),
        ({"val_size": 60}, "val_size=60 must lie between 1 and 59"),
        ({"val_size": -1}, "val_size=-1"),
        ({"classes": 0}, "labels of train run from 0 to 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, message):
    def build():
        if "classes" in options:
            SmallData(Splits({k: v for k, v in small().sets.items() if k != "val"}, ("a", "b")))
        else:
            small(**options)

    with pytest.raises(ValueError, match=message):
        build()


def test_a_set_without_labels_is_not_labelled():
    sets = {
        "train": InMemoryImages(random_bytes(9, 1, 4, 4), None),
        "test": InMemoryImages(random_bytes(3, 1, 4, 4), None),
    }
    with pytest.raises(ValueError, match="no labels for train"):
        SmallData(Splits(sets), batch_size=3)

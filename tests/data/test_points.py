"""Points from a file: read as they are, shared out, refused with one message; any two laws make a flow."""

import numpy as np
import pytest
import torch

from fmlightning.data.points import PointsFile
from fmlightning.data.toy import ToyData
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Gaussian
from fmlightning.flow.theory.random_mixture import RandomGaussianMixture
from fmlightning.flow.toys import (
    Checkerboard,
    EightGaussians,
    Funnel,
    Moons,
    Pinwheel,
    Rings,
    SCurve,
    Spirals,
    SwissRoll,
)


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).normal(size=(500, 3))


@pytest.fixture(scope="module")
def files(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("points")
    np.save(folder / "a.npy", table)
    np.savetxt(folder / "a.csv", table, delimiter=",", fmt="%.18e", header="x,y,z", comments="")
    np.savetxt(folder / "b.csv", table, delimiter=",", fmt="%.18e")
    return [folder / name for name in ("a.npy", "a.csv", "b.csv")]


def rows_of(points):
    return {tuple(row) for row in points.tolist()}


def test_every_format_gives_the_same_points(files, table):
    for file in files:
        assert np.array_equal(PointsFile(str(file)).points.numpy(), table)


def test_samples_are_rows_each_as_often_as_any(files, table):
    law, n = PointsFile(str(files[0])), 50_000
    x = law.sample((n, 3), Key(0).generator(), torch.float64)
    assert rows_of(x) <= rows_of(torch.from_numpy(table))
    counts = torch.unique(x, dim=0, return_counts=True)[1]
    assert len(counts) == 500
    # chi^2 with 499 degrees of freedom: mean 499, standard deviation 31.6
    assert abs(float(((counts - 100.0) ** 2 / 100).sum()) - 499) < 5 * 31.6


def test_splits_share_no_point(files):
    law = PointsFile(str(files[0]))
    parts = {split: rows_of(law.part(split).points) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [400, 50, 50]
    assert set.union(*parts.values()) == rows_of(law.points)


def test_training_never_sees_held_out_points(files):
    data = ToyData(PointsFile(str(files[0])), batch_size=256)
    held_out = rows_of(data.eval_samples("val")["x1"]) | rows_of(data.eval_samples("test")["x1"])
    for step in range(20):
        assert not rows_of(data.train_batch(step, slice(0, 256))["x1"]) & held_out


def test_standardized_columns(files):
    x = PointsFile(str(files[0]), standardize=True).points
    assert x.mean(0).abs().max() < 1e-12
    assert x.std(0, correction=0) == pytest.approx(1, abs=1e-12)


def test_the_fingerprint_follows_the_content_and_not_the_place(files, table, tmp_path):
    np.save(tmp_path / "copy.npy", table)
    np.save(tmp_path / "other.npy", table + 1e-9)
    prints = [
        ToyData(PointsFile(str(file))).fingerprint
        for file in (files[0], tmp_path / "copy.npy", tmp_path / "other.npy")
    ]
    assert prints[0] == prints[1] != prints[2]


def bad_files():
    yield "absent.csv", None, "no such file"
    yield "points.txt", "1,2\n" * 20, "must be a .npy or .csv file"
    yield "words.csv", "x,y\n" + "1,2\n" * 20 + "3,four\n", "row 20"
    yield "ragged.csv", "1,2\n" * 20 + "3\n", "row 20"
    yield "short.csv", "1,2\n" * 9, "at least 10"
    yield "empty.csv", "", "at least 10"
    yield "nan.csv", "1,2\n" * 20 + "nan,1\n", "first in row 20, column 0"
    yield "flat.npy", np.zeros(20), r"shape \(20,\)"
    yield "pickle.npy", np.array([{}] * 20), "not an array of numbers"
    yield "complex.npy", np.ones((20, 2)) * 1j, "its numbers are complex"
    yield "broken.npy", "not numpy", "not an array of numbers"
    yield "words.npy", np.array([["a", "b"]] * 20), "not an array of numbers"


@pytest.mark.parametrize(("name", "content", "cause"), list(bad_files()))
def test_a_file_without_a_table_is_refused(name, content, cause, tmp_path):
    file = tmp_path / name
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises((ValueError, FileNotFoundError), match=cause) as error:
        PointsFile(str(file))
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_a_constant_column_is_not_standardized(tmp_path):
    np.save(tmp_path / "c.npy", np.c_[np.arange(20), np.ones(20)])
    with pytest.raises(ValueError, match="column 1"):
        PointsFile(str(tmp_path / "c.npy"), standardize=True)


PLANE = [
    Gaussian(), EightGaussians(), Moons(), SCurve(), Checkerboard(), Spirals(), Pinwheel(),
    Rings(), SwissRoll(), Funnel(), RandomGaussianMixture(),
]  # fmt: skip


@pytest.mark.parametrize("source", PLANE, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("target", PLANE[1:], ids=lambda law: type(law).__name__)
def test_any_two_laws_are_source_and_data(source, target):
    x1 = ToyData(target, batch_size=4).train_batch(0, slice(0, 4))["x1"]
    x0 = source.sample(x1.shape, Key(0).generator())
    assert x0.shape == x1.shape == (4, 2)
    assert x0.isfinite().all()
    assert x1.isfinite().all()

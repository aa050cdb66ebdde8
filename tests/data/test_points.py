"""Points from a file: read as they are, shared out, refused with one message; any two laws make a flow."""

import json

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


# -- units, and sets smaller than a score ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """Points of the plane far from the origin, in columns of different widths."""
    file = tmp_path_factory.mktemp("units") / "a.npy"
    np.save(file, np.random.default_rng(1).normal(size=(4000, 2)) * [50.0, 0.02] + [1000.0, -7.0])
    return file


def test_standardised_points_go_back_to_the_units_of_the_file(scaled):
    data = ToyData(PointsFile(str(scaled), standardize=True))
    raw = torch.from_numpy(np.load(scaled)).float()
    x = data.eval_samples("test")["x1"]
    real = data.pixel_data.eval_samples("test")["x1"]
    assert x.abs().max() < 6
    assert len(x) == len(real) == 400
    torch.testing.assert_close(data.decode(x), real, rtol=1e-5, atol=0)
    assert rows_of(real) <= rows_of(raw)
    torch.testing.assert_close(data.units.from_data(real), x, rtol=0, atol=1e-2)


def test_a_likelihood_of_standardised_points_is_one_in_the_units_of_the_file(scaled):
    # a field at rest is N(0, I) of standardised points: the Gaussian fitted to those of the file
    from fmlightning.flow.models import NetworkField
    from fmlightning.flow.paths.schedules import Linear
    from fmlightning.metrics.evaluator import evaluate_model, fit_reference
    from fmlightning.metrics.likelihood import NegativeLogLikelihood

    class AtRest(torch.nn.Module):
        def forward(self, x, t, y=None):
            return 0 * x

    data, metric = ToyData(PointsFile(str(scaled), standardize=True)), NegativeLogLikelihood()
    fit_reference([metric], data.pixel_data, torch.device("cpu"), data)
    evaluate_model([metric], NetworkField(AtRest(), Linear(), "velocity"), Gaussian(), data.target)
    raw = torch.from_numpy(np.load(scaled))
    normal = torch.distributions.Normal(raw.mean(0), raw.std(0, correction=0))
    held_out = data.pixel_data.eval_samples("test")["x1"].double()
    expected = -float(normal.log_prob(held_out).sum(1).mean())
    assert metric.compute()["nll"] == pytest.approx(expected, abs=1e-4)


def test_fixed_sets_of_a_file_are_different_rows_and_are_counted(files, table):
    data = ToyData(PointsFile(str(files[0])), train_size=300, batch_size=50, test_size=10_000)
    for split, size in (("val", 50), ("test", 50), ("reference", 400)):
        points = data.eval_samples(split)["x1"]
        assert len(rows_of(points)) == len(points) == size
        assert data.splits.get(split, f"{size}").startswith(f"{size}")
    assert len(rows_of(data.fixed_set()["x1"])) == 300
    with pytest.raises(ValueError, match=r"data.train_size=401: .* has 400 for training"):
        ToyData(PointsFile(str(files[0])), train_size=401, batch_size=50)


def test_a_distance_to_fewer_points_than_it_wants_says_of_how_many(files):
    from fmlightning.metrics.evaluator import check_metrics
    from fmlightning.metrics.transport import Wasserstein

    data = ToyData(PointsFile(str(files[0])))
    for metric, shape in ((Wasserstein(5, 20), "2 of 20"), (Wasserstein(), "1 of 50")):
        with pytest.warns(UserWarning, match=f"has 50 different real samples .* {shape} and not"):
            check_metrics([metric], data)
        metric.fit_reference(data)
        assert metric.num_samples == metric.subsets * metric.size == len(metric.held_out)


@pytest.mark.parametrize("standardize", [False, True])
def test_a_number_that_float32_cannot_bear_is_named(tmp_path, standardize):
    file, points = tmp_path / "a.npy", np.random.default_rng(0).normal(size=(20, 2))
    points[3, 1] = 1e39
    np.save(file, points)
    with pytest.raises(ValueError, match=r"file=.*a.npy holds 1e\+39, and float32 takes at most"):
        PointsFile(str(file), standardize)
    np.save(file, points / 1e9)
    assert not standardize or PointsFile(str(file), True).points.abs().max() < 10


def test_a_run_and_its_export_give_samples_in_the_units_of_the_file(
    scaled, fit, fmlightning, tmp_path
):
    file = (
        "--data.target=PointsFile",
        f"--data.target.file={scaled}",
        "--data.target.standardize=true",
    )
    run = fit("toy/moons", *file, "--trainer.max_steps=60", "--trainer.val_check_interval=60")
    manifest = json.loads((run / "manifest.json").read_text())
    raw = np.load(scaled)
    assert manifest["data"]["units"]["mean"] == pytest.approx(raw.mean(0).tolist())
    assert manifest["data"]["units"]["std"] == pytest.approx(raw.std(0).tolist())
    exported = tmp_path / "exported"
    assert fmlightning("export", run, "--out", exported)[0] == 0
    assert "data = mean + std * x" in (exported / "README.md").read_text()
    found = []
    for place in (run, exported):
        out = tmp_path / f"samples of {place.name}"
        status, shown = fmlightning("sample", place, "--n=200", f"--out={out}", "--device=cpu")
        assert status == 0, shown
        found.append(np.load(out / "samples.npz")["x"])
    assert np.array_equal(*found)
    assert np.all(np.abs(found[0].mean(0) - raw.mean(0)) < 2 * raw.std(0))
    assert np.all(found[0].std(0) < 4 * raw.std(0))

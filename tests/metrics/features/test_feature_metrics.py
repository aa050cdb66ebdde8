"""Metrics on features: their laws, what they read, keep and hold, and the same scores on any number of processes."""

import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import warm
from projection import Projection, Streamed, images, scores
from random_inception import pictures, random_inception

from fmlightning.data.images.digits import DigitsData
from fmlightning.flow.keys import Key
from fmlightning.metrics.features.frechet import Frechet
from fmlightning.metrics.features.inception_score import Entropies, InceptionScore
from fmlightning.metrics.features.kernel import KernelDistance, kernel_distances, mmd2
from fmlightning.metrics.features.precision_recall import PrecisionRecall, covered, reach
from fmlightning.runs.cache import cache_folder
from fmlightning.studies.evaluate.scoring import instantiate_metrics

HERE = Path(__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Key(seed).generator(), dtype=torch.float64)


# -- laws -----------------------------------------------------------------------------------------


def test_the_kernel_distance_has_no_bias_and_sees_a_shift():
    """Its mean over samples of one law is zero; of shifted ones it is that of the kernel's expectation."""
    same = torch.stack(
        [mmd2(normal(20, 3, seed=s), normal(20, 3, seed=s + 500)) for s in range(200)]
    )
    assert abs(float(same.mean())) < 4 * float(same.std()) / math.sqrt(200)
    far = torch.stack(
        [mmd2(normal(20, 1, seed=s), normal(20, 1, seed=s + 500) + 2) for s in range(200)]
    )
    # E (ab + 1)^3 = 1 + 3 E a E b + 3 E a^2 E b^2 + E a^3 E b^3; the moments are 0, 1, 0 and 2, 5, 14
    expected = (1 + 3) + (1 + 3 * 4 + 3 * 25 + 14**2) - 2 * (1 + 3 * 5)
    assert float(far.mean()) == pytest.approx(expected, abs=4 * float(far.std()) / math.sqrt(200))


def test_the_mean_over_subsets_is_that_of_all():
    x, y = normal(60, 3), normal(60, 3, seed=1) + 1
    values = kernel_distances(x, y, subsets=80, size=30)
    # subsets overlap, so their spread is no bound for the whole; as an error of their mean it is generous
    assert float(values.mean()) == pytest.approx(float(mmd2(x, y)), abs=float(values.std()))


def test_precision_and_recall_of_points_on_a_line():
    x, y = (
        torch.tensor(v, dtype=torch.float64)[:, None] for v in ([0.0, 1, 2, 3], [2.5, 3.5, 9, 30])
    )
    assert reach(x, 1).tolist() == [1, 1, 1, 1]
    assert reach(y, 1).tolist() == [1, 1, 5.5, 21]
    # 9 - 5.5 = 3.5 and 30 - 21 = 9: of x, 2 and 3 lie within 1 of 2.5
    assert covered(x, y, reach(y, 1)) == 0.5
    assert covered(y, x, reach(x, 1)) == 0.5
    assert covered(x, x, reach(x, 1)) == 1


def test_precision_and_recall_tell_what_is_wrong():
    real = images(200, 1)
    few, wild = real[:20].repeat(10, 1, 1, 1), (images(200, 4) * 1.1).sign() * 0.98
    found = []
    for x in (few, wild):
        metric = PrecisionRecall(Projection(), 200)
        metric.prepare(real, images(200, 2), None, 256)
        metric.update(x, torch.arange(200))
        found.append(metric.compute())
    (few, wild), p, r = found, "precision_projection@200", "recall_projection@200"
    assert few[p] == 1  # each is a real image
    assert few[r] < 0.5 < few[f"{r}_real"]
    assert wild[p] < 0.8 * wild[f"{p}_real"]


def test_the_classifier_score_of_sure_and_of_unsure_answers():
    index = torch.arange(120)
    sure, unsure = torch.eye(6)[index % 6] * 200, torch.zeros(120, 6)
    for logits, expected in ((sure, 6), (unsure, 1), (sure[:1].expand(120, 6), 1)):
        score = Entropies(10, 120, 6)
        for rows in index.flip(0).split(50):
            score.update(logits[rows], rows)
        mean, std = score.compute()
        assert float(mean) == pytest.approx(expected, rel=1e-12)
        assert float(std) == pytest.approx(0, abs=1e-10)


# -- what is read, kept and held -------------------------------------------------------------------


def test_a_large_reference_is_streamed_and_read_once():
    first = Streamed(5000, test=300)
    network = Projection()
    metric = Frechet(network, 300)
    metric.fit_reference(first)
    assert first.read == ["reference", "test"]
    assert first.most <= 2  # one in the metric's hand and the one that follows
    assert network.images == 5000 + 300 + 1
    second = Streamed(5000, test=300)
    again = Frechet(Projection(), 300)
    again.fit_reference(second)
    assert second.read == ["test"]
    found = []
    for each in (metric, again):
        for rows in torch.arange(300).split(70):
            each.update(images(300, 5)[rows], rows)
        assert sum(v.numel() for v in each.generated.state_dict().values()) <= 6 * 6 + 6 + 1
        found.append(each.compute())
    assert found[0] == found[1]


def test_some_of_a_set_are_spread_over_it():
    """Of a folder in the order of its classes, the first would all be of one."""
    metric, real = Frechet(Projection(), 40), Streamed(95, block=30)
    metric.fit_reference(real)
    found = metric.features_of(real, "reference", 10)
    whole = torch.cat([batch["x1"] for batch in real.eval_batches("reference")])
    expected = metric.layers(whole[[0, 9, 19, 28, 38, 47, 57, 66, 76, 85]])["features"]
    assert torch.equal(found, expected)


def test_another_network_or_other_data_do_not_share_a_file():
    reference = Streamed(50)
    for change in (None, "weights", "data"):
        network, real = Projection(), Streamed(50)
        if change == "weights":
            network.weight *= 2
        if change == "data":
            real.fingerprint = "e" * 64
        metric = Frechet(network, 40)
        metric.fit_reference(real)
        assert real.read == ["reference"]
    Frechet(Projection(), 40).fit_reference(reference)
    assert reference.read == []


def test_a_torn_file_is_made_again():
    Frechet(Projection(), 40).fit_reference(Streamed(50))
    (path,) = cache_folder().glob("features-gaussian-*.pt")
    path.write_bytes(path.read_bytes()[:100])
    real = Streamed(50)
    with pytest.warns(UserWarning, match="cannot be read and is made again"):
        Frechet(Projection(), 40).fit_reference(real)
    assert real.read == ["reference"]
    assert torch.load(path, weights_only=True)["mean"].shape == (6,)
    assert not list(cache_folder().glob("*.tmp"))


def test_a_folder_that_takes_no_files_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FMLIGHTNING_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written.*FMLIGHTNING_CACHE"):
        Frechet(Projection(), 40).fit_reference(Streamed(50))


def test_the_classifier_is_trained_once(monkeypatch):
    from fmlightning.metrics.features import classifier

    data, calls = DigitsData(), []
    original = classifier.train_classifier
    monkeypatch.setattr(
        classifier, "train_classifier", lambda *a: calls.append(1) or original(*a, epochs=2)
    )
    found = []
    for metric in (
        Frechet("digits"),
        KernelDistance("digits"),
        PrecisionRecall("digits"),
        InceptionScore("digits"),
    ):
        metric.fit_reference(data)
        x = data.eval_samples("test")
        metric.update(x["x1"], torch.arange(350), x["y"])
        found.append(metric.compute())
    assert len(calls) == 1
    names = [name for each in found for name in each]
    assert [n for n in names if not n.endswith(("_std", "_real"))] == [
        "frechet_digits@350", "accuracy@350", "kid_digits@350", "precision_digits@350", "recall_digits@350",
        "classifier_score_digits@350",
    ]  # fmt: skip
    for each in found:  # the generated images are the held-out ones
        for name in each:
            if f"{name}_real" in each:
                assert each[name] == pytest.approx(each[f"{name}_real"], rel=1e-9), name


def test_judges_of_one_network_look_once():
    network, x, index = Projection(), images(60, 3), torch.arange(60)
    kinds = [Frechet(network, 60), KernelDistance(network, 60), PrecisionRecall(network, 60)]
    for metric in kinds:
        metric.prepare(images(80, 1), images(60, 2), None, 256)
    network.images = 0
    for metric in kinds:
        metric.update(x, index)
    assert network.images == 60
    before = [metric.compute() for metric in kinds]
    for metric in kinds:
        metric.reset()
        metric.update(x, index)
    assert [metric.compute() for metric in kinds] == before


def test_no_other_network_gives_a_fid():
    class Other(Projection):
        name = "inception"

    for metric, name in ((Frechet, "frechet_inception"), (KernelDistance, "kid_inception")):
        assert metric(Other(), 40).name == name


def test_judges_go_by_their_short_names():
    for name in ("Frechet", "KernelDistance", "PrecisionRecall", "InceptionScore"):
        config = {"class_path": name, "init_args": {"features": "digits", "num_samples": 200}}
        (metric,) = instantiate_metrics([config])
        assert type(metric).__name__ == name
        assert metric.num_samples == 200


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Frechet(Projection(), 1), "num_samples=1"),
        (lambda: Frechet(Projection(), 100, extrapolate=True), "150 or more"),
        (lambda: Frechet(Projection(), 100, bootstrap=-1), "bootstrap=-1"),
        (lambda: KernelDistance(Projection(), 50, subset_size=60), "subset_size=60"),
        (lambda: PrecisionRecall(Projection(), 3), "neighbour=3"),
        (lambda: InceptionScore(Projection(), 5), "splits=10"),
        (
            lambda: KernelDistance(Projection(), 50, subset_size=40).fit_reference(Streamed(30)),
            "30 training",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# -- several processes ------------------------------------------------------------------------------


def together(folder, *weights):
    """The scores of each of two processes."""
    command = [sys.executable, str(HERE / "projection.py"), str(folder)]
    with (folder / "shown").open("w") as shown:
        group = [warm.Warm([*command, str(rank), "2", *weights], shown) for rank in range(2)]
    try:
        assert [process.wait(timeout=300) for process in group] == [0, 0]
    finally:
        for process in group:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_give_the_scores_of_one(tmp_path):
    first, second = together(tmp_path)
    alone = scores(0, 1)
    assert first == second
    assert alone.keys() == first.keys()
    assert len(alone) == 22
    for name, value in alone.items():
        # sums of float64 in another order
        assert first[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@pytest.mark.slow
def test_two_processes_give_the_fid_of_one(tmp_path):
    path = tmp_path / "weights.pth"
    random_inception(path, pictures(8))
    weights = str(path), hashlib.sha256(path.read_bytes()).hexdigest()
    first, second = together(tmp_path, *weights)
    (name,) = (n for n in first if n.endswith("fid@8"))
    assert first == second
    # float32 convolutions of other batches
    assert first[name] == pytest.approx(scores(0, 1, weights)[name], rel=1e-4)

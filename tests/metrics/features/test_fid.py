"""The FID and its family are torch-fidelity's, with the same file of weights."""

import hashlib

import pytest
import torch
import torch_fidelity
from random_inception import pictures, random_inception
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from fmlightning.flow.pixels import dequantise
from fmlightning.metrics.features import networks as features
from fmlightning.metrics.features.frechet import Frechet
from fmlightning.metrics.features.gaussian import FeatureGaussian, frechet_distance
from fmlightning.metrics.features.inception_score import InceptionScore
from fmlightning.metrics.features.kernel import KernelDistance
from fmlightning.metrics.features.networks import Inception, inception_weights, verified
from fmlightning.metrics.features.precision_recall import PrecisionRecall

N = 6


class Bytes(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.images[number]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, generated, reference):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    random_inception(path, torch.cat((generated, reference)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"weights": str(path), "sha256": digest}


@pytest.fixture(scope="module")
def generated():
    return pictures(N, seed=1)


@pytest.fixture(scope="module")
def reference():
    return (pictures(N, seed=2).float() * 0.7 + 60).byte()


def points(images):
    """As a model gives them: anywhere within their level."""
    u = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    return dequantise(images, u, 256)


@pytest.fixture(scope="module")
def theirs(weights, generated, reference):
    return torch_fidelity.calculate_metrics(
        input1=Bytes(generated), input2=Bytes(reference), cuda=False, fid=True, kid=True, isc=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights["weights"], batch_size=4,
        kid_subsets=1, kid_subset_size=N, isc_splits=2, samples_shuffle=False, save_cpu_ram=True, verbose=False,
        cache=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(weights, generated, reference):
    kinds = (
        Frechet("inception", N, **weights),
        KernelDistance("inception", N, subsets=1, subset_size=N, **weights),
        InceptionScore("inception", N, splits=2, **weights),
        PrecisionRecall("inception", N, **weights),
        Frechet("spatial", N, **weights),
    )
    seen, scores = [], {}
    for metric in kinds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FMLIGHTNING_CACHE", str(weights["weights"]) + ".cache")
            metric.prepare(points(reference), points(reference)[:0], None, 256)
        for rows in torch.arange(N).flip(0).split(4):  # in any order
            metric.update(points(generated)[rows], rows)
        seen.append(metric.network)
        scores |= metric.compute()
    assert all(network is seen[0] for network in seen)
    return scores


pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular")


def test_features_are_those_of_torch_fidelity(weights, generated):
    network = Inception(verified(inception_weights(weights["weights"]), weights["sha256"]))
    layers = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", layers, weights["weights"])
    with torch.no_grad():
        expected, logits = theirs(generated[:4])
    found = network.layers(generated[:4], 256)
    assert 0.3 < float(expected.std(0).mean()) < 3  # else equal features say little
    torch.testing.assert_close(found["features"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-4)


BELOW = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c",
)  # fmt: skip
"""What lies below mixed_6 of the published graph, which counts its eleven blocks from mixed and mixed_1 on."""


@torch.no_grad()
def spatial(network, images):
    """The first 7 channels of mixed_6/conv, which in that graph is the name of the ReLU, layer by layer."""
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    x = (x - 128) / 128
    for name in BELOW:
        x = getattr(network, name)(x)
    branch = network.Mixed_6d.branch1x1
    return branch.bn(branch.conv(x))[:, :7].relu().flatten(1)


def test_spatial_features_and_the_sfid_are_those_of_the_published_layer(
    weights, generated, reference, ours
):
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights["weights"]).eval()
    made, real = (spatial(theirs, images) for images in (generated, reference))
    assert made.shape == (N, 7 * 17 * 17)
    assert 0.2 < float((made > 0).float().mean()) < 0.8  # else it says little of the ReLU
    network = Inception(verified(inception_weights(weights["weights"]), weights["sha256"]))
    found = network.layers(generated, 256)["spatial"]
    torch.testing.assert_close(found, made, rtol=0, atol=1e-4)
    # float32 features, one batch of N and batches of four
    expected = frechet_distance(FeatureGaussian.of(real), FeatureGaussian.of(made))
    assert ours[f"sfid@{N}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("ours_name", "theirs_name"),
    [
        (f"fid@{N}", "frechet_inception_distance"),
        (f"kid@{N}", "kernel_inception_distance_mean"),
        (f"inception_score@{N}", "inception_score_mean"),
        (f"inception_score@{N}_std", "inception_score_std"),
        (f"precision@{N}", "precision"),
        (f"recall@{N}", "recall"),
    ],
)
def test_scores_are_those_of_torch_fidelity(ours, theirs, ours_name, theirs_name):
    assert ours[ours_name] == pytest.approx(theirs[theirs_name], rel=1e-3)


def test_scores_tell_the_two_sets_apart(ours):
    """Else equal scores say little."""
    assert 10 < ours[f"fid@{N}"] < 20_000  # 2,048 features of variance one
    assert abs(ours[f"kid@{N}"]) > 1e-4
    assert ours[f"sfid@{N}"] > 0


def test_inception_without_its_weights_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth"):
        Frechet(features="inception")
    assert Frechet().name == "frechet_digits"
    monkeypatch.setenv("FMLIGHTNING_INCEPTION", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="no such file"):
        inception_weights(None)


def test_weights_of_another_digest_are_not_read(monkeypatch, tmp_path):
    def read(*args, **kwargs):
        raise AssertionError("read")

    monkeypatch.setattr(features.torch, "load", read)
    path = tmp_path / features.WEIGHTS
    path.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"begins with 6726825d.*sha256={digest}"):
        Frechet("inception", weights=str(path))
    with pytest.raises(ValueError, match="not sha256=000"):
        Frechet("inception", weights=str(path), sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        Frechet("inception", weights=str(path), sha256="6726825d")
    assert Frechet("inception", weights=str(path), sha256=digest).provenance() == {
        "inception_sha256": digest
    }


def test_weights_that_are_code_are_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Code()}, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Inception(features.WeightsFile(path, ""))
    assert not (tmp_path / "ran").exists()

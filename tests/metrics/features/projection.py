"""A feature network that costs nothing, real samples that count how they are read, and metrics at several processes.

python projection.py FOLDER RANK SIZE [WEIGHTS SHA256]
"""

import json
import os
import sys
import weakref
from pathlib import Path

import torch

from fmlightning.flow.keys import Key
from fmlightning.metrics.features.frechet import Frechet
from fmlightning.metrics.features.inception_score import InceptionScore
from fmlightning.metrics.features.kernel import KernelDistance
from fmlightning.metrics.features.knn_accuracy import KNNAccuracy
from fmlightning.metrics.features.networks import FeatureNetwork
from fmlightning.metrics.features.precision_recall import PrecisionRecall
from fmlightning.metrics.reference import ReferenceSamples


class Projection(FeatureNetwork):
    """Six numbers of an image, which are the logits of six classes too."""

    name = "projection"
    batch_size = 32
    images = 0

    def __init__(self):
        super().__init__()
        weight = torch.randn(16, 6, generator=Key(0).fold("projection").generator())
        self.register_buffer("weight", weight)

    def forward(self, images):
        self.images += len(images)
        # in float64, because a float32 product of fewer rows rounds otherwise on some processors
        features = (images.double().flatten(1) / 64 @ self.weight.double()).float()
        return {"features": features, "logits": features}


class Streamed:
    """Real images that are made as they are read."""

    num_classes, num_bins, fingerprint = 0, 256, "f" * 64

    def __init__(self, size, test=0, block=100):
        self.sizes, self.block = {"reference": size, "test": test}, block
        self.read, self.alive, self.most = [], 0, 0

    def shapes(self, split):
        return {"x1": torch.empty(self.sizes[split], 1, 4, 4, device="meta")}

    def eval_samples(self, split):
        raise AssertionError("a set that fits into no memory was read whole")

    def eval_batches(self, split):
        self.read.append(split)
        for index in torch.arange(self.sizes[split]).split(self.block):
            x1 = Key(1).fold(split).streams(index).uniform((1, 4, 4)) * 1.4 - 0.7
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(x1, self.gone)
            yield {"x1": x1, "index": index}

    def gone(self):
        self.alive -= 1


def images(count, seed):
    return Key(seed).fold("images").streams(torch.arange(count)).uniform((1, 4, 4)) * 1.8 - 0.9


def metrics(weights=None):
    if weights:
        return [Frechet("inception", 8, weights=weights[0], sha256=weights[1])]
    network = Projection()
    return [
        Frechet(network, 61),
        Frechet(network, 180, extrapolate=True, bootstrap=5),
        KernelDistance(network, 60, subsets=3, subset_size=20),
        InceptionScore(network, 61, splits=3),
        PrecisionRecall(network, 60),
        KNNAccuracy(network, 61),
        Frechet("digits", 40),
    ]


def scores(rank, size, weights=None):
    """All scores, of samples that are dealt to the processes in blocks; the last round leaves one with nothing."""
    reference, held_out = images(101, 1), images(67, 2)
    labels = torch.arange(101) % 3, torch.arange(67) % 3
    found = {}
    for metric in metrics(weights):
        n = metric.num_samples
        real = ReferenceSamples(reference[:9], held_out[:8], None, 256) if weights else None
        metric.fit_reference(real or ReferenceSamples(reference, held_out, labels, 256, "f" * 64))
        x, index, y = images(n, 3), torch.arange(n), torch.arange(n) % 3
        block = 5 if weights else 20
        for first in range(0, n, block * size):
            rows = index[first + rank * block : first + rank * block + block]
            metric.update(x[rows], rows, y[rows])
        found |= {f"{type(metric).__name__} {name}": v for name, v in metric.compute().items()}
    return found


if __name__ == "__main__":
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["FMLIGHTNING_CACHE"] = str(folder / f"cache{rank}")  # as on machines of their own
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    found = scores(rank, size, sys.argv[4:])
    if not sys.argv[4:]:
        # one of them has lost a file: all make it together once more
        if rank:
            for path in (folder / "cache1").iterdir():
                path.unlink()
        assert scores(rank, size) == found
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()

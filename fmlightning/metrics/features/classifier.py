"""A small classifier of images, which decides whether a generated digit is the one requested.

It is trained once on the reference, seeded, and kept in a file named by the data and by this module's own text.
"""

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.determinism import one_thread, seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import quantise
from fmlightning.metrics.features.networks import FeatureNetwork, Layers, Pixels
from fmlightning.metrics.reference import ReferenceData
from fmlightning.runs.cache import cached


class Classifier(FeatureNetwork):
    """Two convolutions and two linear layers; `features` is the layer before the last.

    Args:
        shape: of an image, (C, H, W).
        num_classes: number of labels.
        num_bins: pixel values run from 0 to num_bins - 1.
    """

    name = "digits"
    num_features = 64
    batch_size = 256

    def __init__(self, shape: tuple[int, int, int], num_classes: int, num_bins: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.scale = 1 / (num_bins - 1)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * -(-height // 2) * -(-width // 2), self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def embed(self, pixels: Tensor) -> Tensor:
        """The features of integer images, (B, 64)."""
        return self.features(pixels.float() * self.scale)

    def shown(self, pixels: Pixels, num_bins: int) -> Pixels:
        """Pixel values as they are, as in training."""
        return pixels

    def logits(self, pixels: Tensor) -> Tensor:
        """Those of integer images, (B, num_classes)."""
        return self.head(self.embed(pixels))

    def forward(self, images: Pixels) -> Layers:
        features = self.embed(images)
        return {"features": features, "logits": self.head(features)}


def classifier_of(real: ReferenceData, device: torch.device) -> Classifier:
    """The classifier of a data set's reference, trained now or before."""
    shape, num_bins = real.shapes("reference")["x1"].shape[1:], real.num_bins
    assert num_bins is not None
    with seeded(Key(0)):  # weights that are drawn and thrown away
        network = Classifier((shape[0], shape[1], shape[2]), real.num_classes, num_bins)

    def trained() -> dict[str, Tensor]:
        samples = real.eval_samples("reference")
        pixels, y = quantise(samples["x1"], num_bins).cpu(), samples["y"].cpu()
        return train_classifier(pixels, y, num_bins, real.num_classes).state_dict()

    name = None
    if real.fingerprint is not None:
        settings = f"{real.fingerprint}{num_bins}{real.num_classes}{torch.__version__}"
        text = settings.encode() + Path(__file__).read_bytes()
        name = f"classifier-{real.fingerprint[:24]}-{sha256(text).hexdigest()[:24]}"
    network.load_state_dict(cached(name, trained, device))
    return network.eval().requires_grad_(False)


@torch.inference_mode(False)
@torch.enable_grad()
@one_thread()
def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    num_bins: int,
    num_classes: int,
    epochs: int = 30,
    batch_size: int = 64,
    seed: int = 0,
) -> Classifier:
    """Train a classifier on integer images (B, C, H, W); a function of its arguments alone."""
    key = Key(seed).fold("classifier")
    channels, height, width = pixels.shape[1:]
    with seeded(key):
        network = Classifier((channels, height, width), num_classes, num_bins)
    network.to(pixels.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(pixels) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(pixels), generator=key.fold(epoch).generator())
        for rows in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(
                network.logits(pixels[rows]), labels[rows], label_smoothing=0.05
            ).backward()
            optimizer.step()
            scheduler.step()
    return network.eval().requires_grad_(False)

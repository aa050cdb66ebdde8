"""A small classifier of images: the judge of whether a generated digit is the one that was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.keys import Key
from fmlightning.flow.seeding import seeded


class Classifier(nn.Module):
    """Two convolutions and two linear layers; `features` is the layer before the last.

    Args:
        shape: of an image, (C, H, W).
        num_classes: number of labels.
        levels: pixel values run from 0 to levels - 1.
    """

    num_features = 64

    def __init__(self, shape: tuple[int, int, int], num_classes: int, levels: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.scale = 1 / (levels - 1)
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

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits of integer images, (B, num_classes)."""
        return self.head(self.embed(pixels))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: a sum over several depends on how many, and training makes the difference large."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode(False)
@torch.enable_grad()
@one_thread()
def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    levels: int,
    num_classes: int,
    epochs: int = 30,
    batch_size: int = 64,
    seed: int = 0,
) -> Classifier:
    """Train a classifier on integer images (B, C, H, W); a function of its arguments alone."""
    key = Key(seed).fold("classifier")
    channels, height, width = pixels.shape[1:]
    with seeded(key):
        network = Classifier((channels, height, width), num_classes, levels)
    network.to(pixels.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(pixels) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(pixels), generator=key.fold(epoch).generator())
        for rows in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(pixels[rows]), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            scheduler.step()
    return network.eval().requires_grad_(False)

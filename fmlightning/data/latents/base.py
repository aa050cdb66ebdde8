r"""Latents of images as training data: encoded once by a frozen autoencoder, and kept.

    x1 = scale (mean + std eps),   eps ~ N(0, I)   or   0                                          (1)

for the mean and standard deviation (std) of the encoder. Means and stds are kept in files named by the digests of
images and autoencoder; eps is keyed by epoch and sample. Samples of the flow are decoded, decode(x / scale), wherever
they leave the model: for metrics, in figures, on disk.

Source: Rombach et al. 2022, arXiv:2112.10752, secs. 3.1 and G: the scale, there 1 / std of the latents of one batch.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from fmlightning.data.latents.autoencoders import VAE, Autoencoder, SmallAutoencoder
from fmlightning.data.module import FlowData, MadeOfImages
from fmlightning.data.order import Batch, EvalBatches, Order
from fmlightning.flow.keys import Key
from fmlightning.runs.cache import cache_folder
from fmlightning.runs.files import atomic_folder

AT_ONCE = 64
"""Images encoded or decoded in one call."""

FORMAT = 1
"""Version of the files; another one makes them again."""


class LatentData(MadeOfImages):
    """The latents of a data set of images.

    The images are encoded before training, by one process while the others wait; the files lie in
    $FMLIGHTNING_CACHE and are read as they are needed, so they may be larger than the memory.

    Args:
        images: the images; the batches and the seed are those given here.
        autoencoder: SmallAutoencoder, trained here, or DiffusersAutoencoder, from a folder of weights.
        batch_size: samples in a training step, over all processes.
        scale: what latents are multiplied by: 0.18215 for Stable Diffusion's autoencoder; null is 1 / their standard
            deviation over the training set.
        sample_posterior: whether training draws latents from the encoder's Gaussian, anew in each epoch, or takes its
            mean.
        flip: whether training takes the latent of the mirrored image with probability one half, keyed.
        eval_batch_size: samples in a block of validation or testing.
        seed: of the order and the noise; the command line sets it to `seed_everything`.
    """

    def __init__(
        self,
        images: FlowData,
        autoencoder: Autoencoder = SmallAutoencoder(),  # noqa: B008 - frozen
        batch_size: int = 128,
        scale: float | None = None,
        sample_posterior: bool = True,
        flip: bool = False,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(images, batch_size, eval_batch_size, seed)
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"data.scale={scale} must be positive and finite, or null")
        self.event_shape = autoencoder.latent_shape(images.event_shape)
        self.autoencoder = autoencoder
        self.given_scale, self.sample_posterior, self.flip = scale, sample_posterior, flip
        size = len(images.shapes("reference")["x1"])
        self.order: Order = Order(size, batch_size, self.key)

    @property
    def splits(self) -> dict[str, str]:
        shape = " x ".join(map(str, self.event_shape))
        return {name: f"latents {shape} of {words}" for name, words in self.images.splits.items()}

    @property
    def fingerprint(self) -> str:
        text = f"{self.images.fingerprint} {self.digest} {self.scale} {self.sample_posterior} {self.flip}"
        return hashlib.sha256(text.encode()).hexdigest()

    def setup(self, stage: str) -> None:
        self.check(self.shard.world_size)
        _ = self.store  # encoded here, if never before, and by this process alone
        super().setup(stage)

    # -- the autoencoder ----------------------------------------------------------------------------

    @cached_property
    def network(self) -> VAE:
        return self.autoencoder.network(self.images)

    @cached_property
    def digest(self) -> str:
        """A digest of the autoencoder's weights."""
        total = hashlib.sha256()
        for name, value in sorted(cast(nn.Module, self.network).state_dict().items()):
            total.update(name.encode())
            total.update(value.cpu().contiguous().numpy().data)
        return total.hexdigest()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        cast(nn.Module, self.network).to(x.device)
        parts = [self.network.decode(z) for z in (x.float() / self.scale).split(AT_ONCE)]
        return torch.cat(parts) if parts else x.new_zeros(0, *self.images.event_shape)

    # -- the files ------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The folder of the latents, named by the images and the autoencoder."""
        of = {
            "images": [self.images.fingerprint, self.images.splits, self.num_classes],
            "flip": self.flip,
            "format": FORMAT,
        }
        name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:24]
        return cache_folder() / f"latents-{name}-{self.digest[:24]}"

    @cached_property
    def store(self) -> "LatentStore":
        """The latents, encoded now or before."""
        folder = self.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                print(f"encoding {type(self.images).__name__} into {folder}, once")
                self.encode(folder)
        return LatentStore(folder)

    def encode(self, folder: Path) -> None:
        """Encode all images into a folder, whole or not at all."""
        self.images.parent = None  # this process encodes all of them
        try:
            with atomic_folder(folder) as unfinished:
                for split in ("reference", "val", "test"):
                    self.encode_split(split, unfinished, split)
                if self.flip:
                    self.encode_split("reference", unfinished, "mirrored")
        finally:
            self.images.parent = self

    def encode_split(self, split: str, folder: Path, name: str) -> None:
        """Means, standard deviations and labels of a split; those of the mirrored images under the name `mirrored`."""
        size = len(self.images.shapes(split)["x1"])
        labels = []
        shape = (size, 2, *self.event_shape)
        file = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", "<f4", shape)
        for batch in self.images.eval_batches(split):
            x = batch["x1"].flip(-1) if name == "mirrored" else batch["x1"]
            file[batch["index"].cpu().numpy()] = self.moments(x).numpy()
            labels.append(batch.get("y", batch["index"]).cpu())
        file.flush()
        np.save(folder / f"{name}-y.npy", torch.cat(labels).numpy())
        if name == "reference":
            (folder / "scale.json").write_text(json.dumps(inverse_std(folder, size)) + "\n")

    @torch.no_grad()
    def moments(self, x: Tensor) -> Tensor:
        """Mean and standard deviation of the latents, (B, 2, *event_shape), on the CPU."""
        cast(nn.Module, self.network).to(self.device)
        pairs = [self.network.encode(part.to(self.device)) for part in x.split(AT_ONCE)]
        return torch.cat([torch.stack(pair, 1).float().cpu() for pair in pairs])

    @cached_property
    def scale(self) -> float:
        """The factor of (1)."""
        return self.store.inverse_std if self.given_scale is None else self.given_scale

    # -- batches --------------------------------------------------------------------------------------

    def train_batch(self, step: int, rows: slice) -> Batch:
        index, epoch = self.order.indices(step)[rows], self.order.epoch(step)
        moments, y = self.store.take("reference", index)
        if self.flip:
            mirrored = self.key.fold("flip", epoch).streams(index).bits(1)[:, 0] & 1 == 1
            moments[mirrored] = self.store.take("mirrored", index[mirrored])[0]
        return self.points(
            moments, y, self.key.fold("latent", epoch) if self.sample_posterior else None, index
        )

    def eval_samples(self, split: str) -> Batch:
        return self.fixed(split, torch.arange(self.store.size(split)))

    def all_labels(self) -> Tensor:
        return self.images.all_labels()

    def eval_batches(self, split: str) -> EvalBatches:
        blocks = self.eval_blocks(self.store.size(split))

        def batches() -> Iterator[Batch]:
            for index in blocks:
                yield self.fixed(split, index) | {"index": index}

        return EvalBatches(len(blocks), batches)

    def fixed(self, split: str, index: Tensor) -> Batch:
        """Some latents of a split, the same in every run."""
        key = Key(0).fold("latent", split) if self.sample_posterior else None
        return self.points(*self.store.take(split, index), key, index)

    def points(self, moments: Tensor, y: Tensor, noise: Key | None, index: Tensor) -> Batch:
        """Equation (1)."""
        x1 = moments[:, 0]
        if noise is not None:
            x1 = x1 + moments[:, 1] * noise.streams(index).normal(self.event_shape)
        batch = {"x1": self.scale * x1}
        return {**batch, "y": y} if self.num_classes else batch


class LatentStore:
    """A folder of latents.

    Args:
        folder: as `LatentData.encode` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, tuple[Any, Any]] = {}
        self.inverse_std: float = json.loads((folder / "scale.json").read_text())

    def open(self, split: str) -> tuple[Any, Any]:
        if split not in self.files:
            moments = np.load(self.folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(self.folder / f"{split}-y.npy", allow_pickle=False)
            self.files[split] = moments, labels
        return self.files[split]

    def size(self, split: str) -> int:
        return len(self.open(split)[1])

    def take(self, split: str, index: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (B, 2, *S) and labels of some samples."""
        moments, labels = self.open(split)
        chosen = index.numpy()
        return torch.from_numpy(moments[chosen]), torch.from_numpy(labels[chosen])


def inverse_std(folder: Path, size: int) -> float:
    """1 / the standard deviation of latents drawn from the moments of the training set, over all numbers in them."""
    moments = np.load(folder / "reference.npy", mmap_mode="r", allow_pickle=False)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, size, 10_000):
        mean, std = moments[start : start + 10_000].astype(np.float64).swapaxes(0, 1)
        count += mean.size
        total += float(mean.sum())
        squares += float((mean**2 + std**2).sum())
    return 1 / math.sqrt(squares / count - (total / count) ** 2)

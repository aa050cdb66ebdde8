"""Autoencoders for latent data sets: trained here, or read from a file of published weights."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fmlightning.data.module import FlowData
from fmlightning.data.order import Order
from fmlightning.flow.determinism import one_thread, seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.autoencoder import KLAutoencoder, train_autoencoder
from fmlightning.runs.cache import cached

WEIGHTS = "diffusion_pytorch_model.safetensors"
FETCH = "hf download stabilityai/sd-vae-ft-ema config.json {} --local-dir DIR"


class VAE(Protocol):
    """A network that encodes and decodes; frozen."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images."""

    def decode(self, z: Tensor) -> Tensor:
        """The images of latents."""


class Autoencoder(ABC):
    """Settings that give an autoencoder."""

    @abstractmethod
    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape of the latent of an image (C, H, W); known before there are weights.

        Raises:
            ValueError: it takes no such images.
        """

    @abstractmethod
    def network(self, images: FlowData) -> VAE:
        """The frozen network, on the CPU."""


@dataclass(frozen=True)
class SmallAutoencoder(Autoencoder):
    """A small KL autoencoder of ours, trained on the images once, in seconds to minutes, and kept.

    It stands in where no published weights are at hand: the way through the latents is the same. Its weights are a
    function of these settings and the images, and do not depend on the seed of the run.

    Args:
        latent_channels: channels of a latent.
        channels: of its convolutions, a multiple of 8.
        halvings: how often height and width are halved.
        steps: of its training.
        batch_size: images in a step of its training.
        rate: largest learning rate.
        beta: weight of the divergence of the latents from N(0, I).
        seed: of its weights, the order of the images and the noise.
    """

    latent_channels: int = 2
    channels: int = 32
    halvings: int = 1
    steps: int = 600
    batch_size: int = 64
    rate: float = 4e-3
    beta: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "halvings", "steps", "batch_size", "rate", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.channels < 8 or self.channels % 8:
            raise ValueError(f"channels={self.channels} must be a multiple of 8")

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return shrunk(image_shape, 2**self.halvings, self.latent_channels)

    def network(self, images: FlowData) -> VAE:
        key = Key(self.seed).fold("autoencoder")
        with seeded(key):
            network = KLAutoencoder(
                images.event_shape[0], self.latent_channels, self.channels, self.halvings
            )

        def trained() -> dict[str, Tensor]:
            x1 = images.eval_samples("reference")["x1"].cpu()
            order = Order(len(x1), min(self.batch_size, len(x1)), key)
            print(f"training the autoencoder of {type(images).__name__}: {self.steps} steps, once")
            with one_thread():
                train_autoencoder(
                    network, lambda n: x1[order.indices(n)], self.steps, self.rate, self.beta, key
                )
            return network.state_dict()

        settings = f"{self} {images.fingerprint} {images.event_shape} {torch.__version__}"
        name = f"autoencoder-{hashlib.sha256(settings.encode()).hexdigest()[:24]}"
        network.load_state_dict(cached(name, trained, torch.device("cpu")))
        return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class DiffusersAutoencoder(Autoencoder):
    """An AutoencoderKL of diffusers, such as Stable Diffusion's, from a folder; nothing is fetched and no code is read.

    Args:
        root: folder with config.json and diffusion_pytorch_model.safetensors.
        sha256: what the digest of the weights' file must be, which then counts for the hash of the run, as the folder
            does not; null takes any.
    """

    root: str
    sha256: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The folder's config.json."""
        folder = Path(self.root).expanduser()
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"data.autoencoder.root={self.root}: there is no {name} in it. It holds an AutoencoderKL of "
                    f"diffusers; to fetch one: {FETCH.format(WEIGHTS)}, with DIR the folder named here"
                )
        settings = json.loads((folder / "config.json").read_text())
        if settings.get("_class_name") != "AutoencoderKL":
            raise ValueError(
                f"data.autoencoder.root={self.root}: its config.json is of {settings.get('_class_name')} and not of "
                "AutoencoderKL"
            )
        return settings

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        settings = self.settings
        if image_shape[0] != settings["in_channels"]:
            raise ValueError(
                f"data.autoencoder: {self.root} takes images of {settings['in_channels']} channels, and the data has "
                f"{image_shape[0]}"
            )
        factor = 2 ** (len(settings["block_out_channels"]) - 1)
        return shrunk(image_shape, factor, settings["latent_channels"])

    def network(self, images: FlowData) -> VAE:
        self.check_digest()
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(
                "data.autoencoder=DiffusersAutoencoder needs the package diffusers: pip install "
                "'fmlightning[latents]', or take SmallAutoencoder, which is trained here"
            ) from error
        network = AutoencoderKL.from_pretrained(
            str(Path(self.root).expanduser()), local_files_only=True, use_safetensors=True
        )
        return OfDiffusers(network.float().eval().requires_grad_(False))

    def check_digest(self) -> None:
        with (Path(self.root).expanduser() / WEIGHTS).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self.sha256 not in (None, found):
            raise ValueError(
                f"data.autoencoder.sha256={self.sha256}: {self.root}/{WEIGHTS} has {found}; it is another file, or "
                "damaged"
            )


class OfDiffusers(nn.Module):
    """An AutoencoderKL of diffusers as a VAE of ours."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent = cast(Any, self.network).encode(x).latent_dist
        return latent.mean, latent.std

    def decode(self, z: Tensor) -> Tensor:
        return cast(Any, self.network).decode(z).sample


def shrunk(image_shape: tuple[int, ...], factor: int, channels: int) -> tuple[int, int, int]:
    """The shape of a latent that is smaller by a factor."""
    _, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(
            f"data.autoencoder: images of {height} x {width} pixels cannot be divided by {factor}; take another size"
        )
    return channels, height // factor, width // factor

r"""Networks whose features stand for images.

A metric compares images by what a network says of them: its `features` (B, D), and where it has them its `logits`
(B, K) and `spatial` features (B, D'). Features of the Inception network as torch-fidelity defines them are those of
the FID: 2,048 pooled ones from bytes, through the bilinear resize of TensorFlow 1 to 299 pixels.

Source: Szegedy et al. 2016, arXiv:1512.00567; torch-fidelity, Obukhov et al. 2020; the spatial features are the first
7 channels of mixed_6/conv, 17 x 17 pixels each, Nash et al. 2021, arXiv:2103.03841.
"""

import hashlib
import io
import os
import re
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
VARIABLE = "FMLIGHTNING_INCEPTION"

Layers = dict[str, Tensor]
Pixels = UInt8[Tensor, "B C H W"]


class FeatureNetwork(nn.Module, ABC):
    """A network whose layers metrics compare. Its weights must not change.

    `forward` takes bytes (B, C, H, W) and gives a dictionary of its layers, `features` among them.
    """

    name: str
    """Name of its scores: `frechet_NAME`, `kid_NAME`."""

    batch_size = 64
    """Images that it sees at once."""

    last: tuple[Tensor, Layers] | None = None

    @abstractmethod
    def forward(self, images: Pixels) -> Layers: ...

    def shown(self, pixels: Pixels, num_bins: int) -> Pixels:
        """Bytes, as the network takes them, of images with `num_bins` pixel values."""
        return (pixels.float() * (255 / (num_bins - 1))).round().byte()

    @property
    def digest(self) -> str:
        """A digest of all that the features depend on, for the names of files."""
        total = hashlib.sha256(f"{type(self).__module__}.{type(self).__qualname__}".encode())
        for name, value in self.state_dict().items():
            total.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    @torch.no_grad()
    def layers(self, pixels: Pixels, num_bins: int) -> Layers:
        """The layers of images; those of the last ones are kept, as metrics ask one after the other."""
        if not len(pixels):
            black = torch.zeros(1, *pixels.shape[1:], dtype=pixels.dtype, device=pixels.device)
            return {name: layer[:0] for name, layer in self.layers(black, num_bins).items()}
        last = self.last
        if last is None or last[0].device != pixels.device or not torch.equal(last[0], pixels):
            with torch.autocast(pixels.device.type, enabled=False):
                parts = [self(self.shown(p, num_bins)) for p in pixels.split(self.batch_size)]
            last = pixels, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self.last = last
        return last[1]


class WeightsFile(NamedTuple):
    """A file of Inception weights and its digest."""

    path: Path
    sha256: str


class Inception(FeatureNetwork):
    """Inception-v3 as torch-fidelity has it.

    Args:
        weights: file of its weights; read with `weights_only=True`, so it runs no code.
    """

    name = "inception"

    def __init__(self, weights: WeightsFile) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.weights = weights
        # torch-fidelity would unpickle the file as it is; it gets a copy that has been read safely
        safe = io.BytesIO()
        torch.save(torch.load(weights.path, weights_only=True, map_location="cpu"), safe)
        safe.seek(0)
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", layers, safe).eval()
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.see)

    def see(self, branch: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.spatial = output[:, :7].flatten(1)

    @property
    def digest(self) -> str:
        return self.weights.sha256

    def forward(self, images: Pixels) -> Layers:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        assert self.spatial is not None
        return {"features": features, "logits": logits, "spatial": self.spatial}


@lru_cache(maxsize=1)
def inception(weights: WeightsFile) -> Inception:
    """One network for all metrics that have the same weights."""
    return Inception(weights)


def hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def inception_weights(path: str | None) -> Path | None:
    """The file of Inception weights, or None if there is none where one is looked for.

    Raises:
        ValueError: a file that was named does not exist.
    """
    named = path or os.environ.get(VARIABLE)
    if not named:
        cached = hub_folder() / WEIGHTS
        return cached if cached.is_file() else None
    if not Path(named).is_file():
        raise ValueError(
            f"weights={named}: no such file; it must be torch-fidelity's {WEIGHTS}, named by weights or ${VARIABLE}"
        )
    return Path(named)


def verified(path: Path, sha256: str | None) -> WeightsFile:
    """A file of weights, held against the digest that was given or that the published one bears in its name.

    Raises:
        ValueError: it is another file.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"sha256={sha256!r} must be the 64 hexadecimal digits of a SHA-256")
        if found != sha256:
            raise ValueError(
                f"weights={path}: its sha256 is {found} and not sha256={sha256}; it was not read: fetch it again"
            )
    elif not found.startswith(published()):
        raise ValueError(
            f"weights={path}: its sha256 is {found}, and that of torch-fidelity's {WEIGHTS} begins with {published()}. "
            f"A FID from other weights compares with nobody's; if they are meant, say sha256={found}"
        )
    return WeightsFile(path, found)


def published() -> str:
    """The first digits of the digest of the published file."""
    return WEIGHTS.rsplit("-", 1)[-1].removesuffix(".pth")

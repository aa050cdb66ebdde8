r"""A small variational autoencoder of images.

An encoder maps an image x to the mean and the standard deviation of a Gaussian over latents z, a decoder maps z back:

    z = mean(x) + std(x) eps,   L = E |decode(z) - x|^2 / D + beta KL(N(mean, std^2) | N(0, I)) / D     (1)

for images of D pixels. With a small beta it is an autoencoder whose latents are smooth, and whose scale is near one
only roughly: whoever trains on them divides by their standard deviation.

Source: Kingma & Welling 2014, arXiv:1312.6114, eq. 10; the small beta: Rombach et al. 2022, arXiv:2112.10752, sec. 3.1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import PerSample, Points

GROUPS = 8


class KLAutoencoder(nn.Module):
    """Convolutions that halve an image some times and double it again.

    Args:
        in_channels: channels of the image.
        latent_channels: channels of a latent.
        channels: of the convolutions, a multiple of 8.
        halvings: how often height and width are halved.
    """

    def __init__(
        self, in_channels: int = 1, latent_channels: int = 4, channels: int = 32, halvings: int = 1
    ) -> None:
        super().__init__()
        down, up = [], []
        for _ in range(halvings):
            down += [Residual(channels), nn.Conv2d(channels, channels, 3, stride=2, padding=1)]
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1)]
            up += [Residual(channels)]
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            *down,
            Residual(channels),
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, channels, 3, padding=1),
            Residual(channels),
            *up,
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, in_channels, 3, padding=1),
        )

    def encode(self, x: Points) -> tuple[Points, Points]:
        """Mean and standard deviation of the latents of images (B, C, H, W)."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, z: Points) -> Points:
        return self.decoder(z)


class Residual(nn.Module):
    """x + conv(silu(norm(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


def elbo_loss(network: KLAutoencoder, x: Points, eps: Points, beta: float) -> PerSample:
    """The loss (1) of each image, for one draw of eps, of the shape of a latent."""
    mean, std = network.encode(x)
    error = (network.decode(mean + std * eps) - x).square().flatten(1).mean(1)
    divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1)
    return error + beta * divergence / x[0].numel()


@torch.inference_mode(False)
@torch.enable_grad()
def train_autoencoder(
    network: KLAutoencoder,
    batch: Callable[[int], Points],
    steps: int,
    rate: float,
    beta: float,
    key: Key,
) -> KLAutoencoder:
    """Train on the CPU with Adam, whose rate falls to zero; a function of its arguments alone.

    Args:
        batch: the images of a step.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for step in range(steps):
        x = batch(step)
        with torch.no_grad():
            shape = network.encode(x[:1])[0].shape[1:]
        eps = torch.randn(len(x), *shape, generator=key.fold("eps", step).generator())
        optimizer.zero_grad()
        elbo_loss(network, x, eps, beta).mean().backward()
        optimizer.step()
        scheduler.step()
    return network.eval().requires_grad_(False)

r"""A Gaussian mixture in any number of dimensions, scattered by a seed, with the oracle of `mixture`."""

import math

import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.theory.mixture import GaussianMixture


class RandomGaussianMixture(GaussianMixture):
    """Equal Gaussians whose centres are drawn from N(0, spread^2 I).

    Args:
        dim: number of dimensions.
        components: number of Gaussians.
        spread: standard deviation of the centres, in each dimension.
        std: standard deviation around each centre.
        seed: of the centres; not the seed of the run, which changes nothing in the distribution.

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(
        self,
        dim: int = 2,
        components: int = 8,
        spread: float = 3.0,
        std: float = 0.5,
        seed: int = 0,
    ) -> None:
        for name, size in (("dim", dim), ("components", components)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if not 0 <= spread < math.inf:
            raise ValueError(f"spread={spread} must be finite and not negative")
        generator = Key(seed).fold("scattered").generator()
        centres = torch.randn(components, dim, generator=generator, dtype=torch.float64)
        weights = torch.full((components,), 1 / components, dtype=torch.float64)
        super().__init__(weights, spread * centres, std)

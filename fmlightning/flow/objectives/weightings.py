r"""How much the loss of a sample counts, whatever the network predicts.

For a given x_t, an error e of one prediction is an error c e of another, with the c that converts them: an
error of the velocity is b(t) times that of the prediction (the second factor of `velocity_coefficients`), and
an error of the data point is

    1,   std / D,   std / alpha,   V / alpha                                                            (1)

times that of data, velocity, noise and score. Stated for one of them, a weighting means the same for all: then
four networks that make the same mistake have the same loss.

Source: Kingma and Gao 2023, arXiv:2303.00848; the distributions named below.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.path import Path
from fmlightning.flow.paths.predictions import Prediction, affine, check, velocity_coefficients
from fmlightning.flow.shapes import Times


class Weighting(ABC):
    """A factor on the squared error of a prediction."""

    @abstractmethod
    def __call__(self, t: Times, path: Path, prediction: Prediction) -> Times:
        """The factor at times t, for a network with these outputs on this path."""


@dataclass(frozen=True)
class Unweighted(Weighting):
    """The squared error of whatever the network predicts."""

    def __call__(self, t: Times, path: Path, prediction: Prediction) -> Times:
        return torch.ones_like(t)


@dataclass(frozen=True)
class AsVelocity(Weighting):
    """The squared error of the velocity: the CFM loss for every prediction."""

    def __call__(self, t: Times, path: Path, prediction: Prediction) -> Times:
        return velocity_coefficients(prediction, affine(path, "AsVelocity"), t)[1] ** 2


@dataclass(frozen=True)
class EDM(Weighting):
    """(s^2 + sigma_data^2) / (s sigma_data)^2 times the squared error of the data, with s = std / alpha.

    The loss of a network of EDM's preconditioning, whose effective targets have unit variance.
    Source: Karras et al. 2022, arXiv:2206.00364, table 1.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data={self.sigma_data} must be positive")

    def __call__(self, t: Times, path: Path, prediction: Prediction) -> Times:
        path = affine(path, type(self).__name__)
        return data_weight(t, path, prediction) * (
            path.alpha_over_sigma(t) ** 2 + self.sigma_data**-2
        )


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min((alpha / std)^2, gamma) times the squared error of the data.

    Source: Hang et al. 2023, arXiv:2303.09556.

    Args:
        gamma: where the weight stops growing with the signal.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive")

    def __call__(self, t: Times, path: Path, prediction: Prediction) -> Times:
        path = affine(path, type(self).__name__)
        return data_weight(t, path, prediction) * (path.alpha_over_sigma(t) ** 2).clamp(
            max=self.gamma
        )


def data_weight(t: Times, path: AffinePath, prediction: Prediction) -> Times:
    """What turns the squared error of a prediction into that of the data point: (1), squared."""
    check(prediction)
    alpha, std = path.alpha(t), path.std(t)
    if prediction == "velocity":
        d = path.d_alpha(t) * std - alpha * path.d_std(t)
        return (std / d) ** 2
    factor = {"data": torch.ones_like(t), "noise": std / alpha, "score": std**2 / alpha}
    return factor[prediction] ** 2

r"""The Frechet distance between two Gaussians, which is their 2-Wasserstein distance.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                                    (1)

for means m and covariances S. With factors S = F^T F,

    tr (S1 S2)^(1/2) = sum of the singular values of F1 F2^T                             (2)

as the eigenvalues of S1 S2 are the squares of those. No root is taken of a matrix with rounding in it, so (2) holds to
rounding for covariances of any rank, and (1), which is a distance, comes out negative by rounding at most.

Source: Dowson and Landau 1982, J. Multivariate Analysis 12, 450; Heusel et al. 2017, arXiv:1706.08500.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class FeatureGaussian(NamedTuple):
    """A mean (D,) and a factor F (R, D) of the covariance F^T F."""

    mean: Float[Tensor, " D"]
    factor: Float[Tensor, "R D"]

    @classmethod
    def of(cls, features: Float[Tensor, "N D"]) -> "FeatureGaussian":
        """Moments of a sample, with N - 1 in the covariance."""
        features = features.double()
        mean = features.mean(0)
        factor = (features - mean) / (len(features) - 1) ** 0.5
        if len(factor) > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        return cls(mean, factor)

    @classmethod
    def from_covariance(
        cls, mean: Float[Tensor, " D"], covariance: Float[Tensor, "D D"]
    ) -> "FeatureGaussian":
        values, vectors = torch.linalg.eigh(covariance)
        # what is left of a zero by rounding would come back as its root
        kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
        return cls(mean, values[kept].sqrt()[:, None] * vectors.T[kept])


def frechet_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """d^2 of (1), as the FID is; never negative."""
    shift = (a.mean - b.mean).square().sum()
    spread = a.factor.square().sum() + b.factor.square().sum()
    common = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    return max(0.0, float(shift + spread - 2 * common))

r"""The multilayer perceptron of the literature's experiments in the plane.

    h_0 = [x, t],    h_l = f(W_l h_(l-1)),    v = W_out h_depth                                    (1)

Every W is affine and initialised as torch does. Time is one number among the others.

Source: Tong et al. 2024, arXiv:2302.00482, whose `VelocityNet` is (1) with three layers of 64 and f = SELU.
"""

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import nn

from fmlightning.flow.shapes import Labels, PerSample, Points

Activation = Literal["selu", "silu", "relu", "elu", "gelu", "tanh"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "selu": nn.SELU, "silu": nn.SiLU, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "tanh": nn.Tanh,
}  # fmt: skip


class PlainMLP(nn.Module):
    """A velocity network for vectors of shape (B, dim), which knows no labels.

    Args:
        dim: length of a vector.
        width: units in a hidden layer.
        depth: number of hidden layers.
        activation: f of (1).
    """

    def __init__(
        self, dim: int = 2, width: int = 64, depth: int = 3, activation: Activation = "selu"
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={activation!r} is unknown; choose one of {', '.join(get_args(Activation))}"
            )
        self.dim = dim
        sizes = [dim + 1] + [width] * depth
        hidden = [
            layer
            for a, b in pairwise(sizes)
            for layer in (nn.Linear(a, b), ACTIVATIONS[activation]())
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x: Points, t: PerSample, y: Labels | None = None) -> Points:
        """The prediction at x (B, dim); labels are ignored.

        Raises:
            ValueError: x is not (B, dim).
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but PlainMLP(dim={self.dim}) takes (B, {self.dim}): "
                "set dim to the length of the vectors, or take a UNet for images"
            )
        return self.layers(torch.cat((x, t[:, None].to(x.dtype)), 1))

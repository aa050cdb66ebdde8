r"""A multilayer perceptron for vectors.

    h_1 = silu(W_1 [x, features(t)] + class(y)),    h_l = silu(W_l h_(l-1)),    v = W_out h_depth

Every W is affine. The last layer starts at zero, and with it the first prediction.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import Labels, PerSample, Points
from fmlightning.nets.embeddings import (
    MAX_FREQUENCY,
    ClassEmbedding,
    Dropout,
    Duration,
    TimeFeatures,
    refuse_second_time,
)

TIME_FEATURES = 16


class TimeMLP(nn.Module):
    """A velocity network for vectors of shape (B, dim).

    Args:
        dim: length of a vector.
        width: units in a hidden layer.
        depth: number of hidden layers.
        num_classes: number of labels; 0 makes a network without labels, which ignores them.
        dropout: probability of dropping a hidden unit; 0 switches it off.
        two_times: whether the network takes a second time *to*, as flow maps need, and predicts the average velocity
            from t to *to*. Its layers come last and start at zero, so that weights trained without them fit.
    """

    def __init__(
        self,
        dim: int = 2,
        width: int = 128,
        depth: int = 4,
        num_classes: int = 0,
        dropout: float = 0.0,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.dim, self.num_classes, self.draws = dim, num_classes, dropout > 0
        self.time = TimeFeatures(TIME_FEATURES, MAX_FREQUENCY)
        self.label = ClassEmbedding(num_classes, width) if num_classes else None
        sizes = [dim + TIME_FEATURES] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropouts = nn.ModuleList(Dropout(dropout, stream) for stream in range(depth))
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.duration = Duration(width) if two_times else None

    def forward(
        self,
        x: Points,
        t: PerSample,
        y: Labels | None = None,
        streams: KeyedStreams | None = None,
        to: PerSample | None = None,
    ) -> Points:
        """The prediction at x (B, dim).

        Args:
            y: labels; `num_classes`, or None for the whole batch, stands for "no label".
            streams: keyed streams of the samples, needed while training with dropout.
            to: the second time, (B,), of a network with `two_times`; None stands for t.

        Raises:
            ValueError: x is not (B, dim), streams are missing, or *to* is given to a network of one time.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but TimeMLP(dim={self.dim}) takes (B, {self.dim}): "
                "set dim to the length of the vectors, or take a UNet for images"
            )
        if self.duration is None:
            refuse_second_time(self, to)
        h = torch.cat((x, self.time(t)), 1)
        for layer, (linear, dropout) in enumerate(zip(self.hidden, self.dropouts, strict=True)):
            h = linear(h)
            if layer == 0 and self.label is not None:
                h = h + self.label(y)
            if layer == 0 and self.duration is not None:
                h = h + self.duration(t, to)
            h = dropout(F.silu(h), streams)
        return self.output(h).to(x.dtype)

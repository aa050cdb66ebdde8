r"""Embeddings of time and class, and dropout with keyed masks.

A time t in [0, 1] becomes n sines and n cosines at log-spaced frequencies:

    omega_k = omega_min (omega_max / omega_min)^(k / (n - 1)),  k = 0 ... n - 1                   (1)

A class has one learned row; the row after the last stands for "no label", which classifier-free guidance
trains and evaluates.

Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; Ho & Salimans 2022, arXiv:2207.12598.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import Labels, PerSample

MAX_FREQUENCY = 30.0
"""In radians per unit of time: flow maps are differentiated in time, and above 100 the derivative is mostly noise."""
DURATION_FEATURES = 32
HALF = 2**16
"""Values of a 16-bit lane: a keep probability is a multiple of 1 / HALF."""


class TimeFeatures(nn.Module):
    """Sines and cosines of a time, equation (1).

    Args:
        features: their number, even.
        max_frequency: the largest frequency in radians per unit of time.
        min_frequency: the smallest.

    Raises:
        ValueError: the number is odd, or the frequencies are not positive and in order.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int, max_frequency: float, min_frequency: float = 1.0) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise ValueError(
                f"features={features} must be even and positive: a sine and a cosine for each frequency"
            )
        if not 0 < min_frequency <= max_frequency:
            raise ValueError(
                f"frequencies={min_frequency, max_frequency} must be positive, the smallest first"
            )
        steps = torch.linspace(0, 1, features // 2)
        omega = min_frequency * (max_frequency / min_frequency) ** steps
        self.register_buffer("frequencies", omega.repeat(2), persistent=False)
        phases = torch.tensor([0.0, math.pi / 2]).repeat_interleave(features // 2)
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, t: PerSample) -> Float[Tensor, "B features"]:
        # half precision could not tell omega_max t from omega_max (t + 1e-3)
        wide = torch.promote_types(t.dtype, torch.float32)
        angles = t.to(wide)[:, None] * self.frequencies + self.phases
        return angles.sin().to(self.frequencies.dtype)


class Duration(nn.Module):
    """What a network learns of *to* - t, for one that has two times: zero at first, whatever the times.

    Args:
        width: of the embedding it is added to.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = TimeFeatures(DURATION_FEATURES, MAX_FREQUENCY)
        self.hidden = nn.Linear(DURATION_FEATURES, width)
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, t: PerSample, to: PerSample | None) -> Float[Tensor, "B width"]:
        """The embedding of *to* - t; without *to*, of zero."""
        h = torch.zeros_like(t) if to is None else to - t
        return self.output(F.silu(self.hidden(self.features(h))))


def refuse_second_time(network: nn.Module, to: Tensor | None) -> None:
    """One time is all that a network knows which was built without `two_times`.

    Raises:
        ValueError: it is given another.
    """
    if to is not None:
        raise ValueError(
            f"{type(network).__name__} has one time, and was given a second (to): build it with two_times=true"
        )


class ClassEmbedding(nn.Module):
    """A learned row for each class and, at index `num_classes`, one for "no label"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be positive, or 0 for no labels")
        self.rows = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Labels | None) -> Tensor:
        """The rows of the labels, (B, width); without labels the last row, (1, width)."""
        return self.rows.weight[-1:] if y is None else self.rows(y)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (key, sample index, stream, element).

    The batch a sample is in, its place there and the process that holds it do not matter. It acts in
    training mode only.

    Args:
        p: probability of dropping, in [0, 1), rounded to a multiple of 2**-16; 0 switches it off.
        stream: number of this layer, different from that of every other one in the network.
    """

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must lie in [0, 1); 0 switches it off")
        self.stream = stream
        self.kept = max(1, round((1 - p) * HALF))

    def forward(self, x: Tensor, streams: KeyedStreams | None) -> Tensor:
        """Elements of x (B, *S) set to zero at random, the others divided by the probability of staying.

        Raises:
            ValueError: training without streams.
        """
        if not self.training or self.kept == HALF:
            return x
        if streams is None:
            raise ValueError(
                f"dropout={1 - self.kept / HALF:.3g} needs random numbers while training: call the network with "
                "streams=key.streams(index), one index for each sample, or switch to network.eval()"
            )
        mask_bits = streams.mask_bits(x[0].numel(), self.stream).reshape(x.shape)
        # a product with numbers is twice as fast as torch.where with its backward; half precision would round them
        keep = (mask_bits < self.kept - HALF // 2).to(torch.promote_types(x.dtype, torch.float32))
        return (x * keep.mul_(HALF / self.kept)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={1 - self.kept / HALF:.4g}, stream={self.stream}"

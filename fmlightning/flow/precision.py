r"""The network in another precision, while time and state stay in theirs.

A solver adds small numbers to large ones, and a time feature multiplies time by frequencies of hundreds: both need
the digits that a network's products do not. So a field in another precision is

    v(x, t) = a(t) x + b(t) net(x, t)                                                               (1)

with the path, the sum and the state as before and only the inside of `net` rounded. fp64 and fp32 are the precision
of a copy of its weights. bf16 and fp16 are autocast: products and convolutions are rounded, and weights, norms and
time features are not.
"""

from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fmlightning.flow.models import NetworkField

Precision = Literal["fp64", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
WHOLE = {"fp64": torch.float64, "fp32": torch.float32}
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class InPrecision(nn.Module):
    """A network evaluated in another precision; it takes and gives points as before.

    Args:
        network: any `net(x, t, y=None)`; it is left as it is.
        precision: fp64, fp32, bf16 or fp16.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is unknown: choose {', '.join(PRECISIONS)}")
        whole = WHOLE.get(precision)
        self.network = network if whole is None else deepcopy(network).to(whole)
        self.precision = precision

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **keyed: Any) -> Tensor:
        """The prediction in the precision of x."""
        given = (x, t) if y is None else (x, t, y)
        mixed = MIXED.get(self.precision)
        with torch.autocast(x.device.type, mixed, enabled=mixed is not None):
            return self.network(*given, **keyed).to(x.dtype)

    def extra_repr(self) -> str:
        return self.precision


def in_precision(field: NetworkField, precision: Precision) -> NetworkField:
    """The field with its network in another precision; the field itself stays as it is."""
    return NetworkField(
        InPrecision(field.network, precision),
        field.path,
        field.prediction,
        source=field.source,
        independent=field.independent,
    ).train(field.training)

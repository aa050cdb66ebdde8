"""Fields that count their calls and watch that the state stays finite, while a solver calls them."""

import torch
from torch import Tensor

from fmlightning.flow.shapes import Field, require_like


class NFECounter:
    """A field that counts its calls and remembers the last."""

    def __init__(self, field: Field) -> None:
        self.field, self.nfe, self.t = field, 0, torch.tensor(float("nan"))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        v = self.field(x, t)
        if v.shape != x.shape:
            require_like("the velocity", v, "x", x)
        self.x, self.t, self.v = x, t, v
        return v


class TorchdiffeqField:
    """A field in torchdiffeq's order of arguments, watched step by step."""

    def __init__(self, field: NFECounter, low: float, high: float) -> None:
        self.field, self.low, self.high = field, low, high
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        # only an adaptive method's guess of its first step can pass the end, and the clamp holds it
        return self.field(x, t.to(x.dtype).clamp(self.low, self.high))

    def callback_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        """Note the step: torchdiffeq calls this before each fixed one. To read the value would make a GPU wait."""
        self.steps.append((t, x.isfinite().all()))

    def lost_at(self, end: Tensor, t1: float) -> float | None:
        """The time of the first state that is not finite."""
        if bool(end.isfinite().all()):
            return None
        return next((float(t) for t, finite in self.steps if not bool(finite)), t1)

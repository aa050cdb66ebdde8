"""How the network of a trained run is evaluated: in which precision, and compiled or not.

What compiling brings depends on the network, the batch and the machine, so it is measured and said: it costs seconds
to minutes once, and pays for convolutions rather than for a small MLP. Compiled samples differ by rounding.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmlightning.cli.load import TrainedFlow
from fmlightning.cli.quiet import say
from fmlightning.flow.models import evaluate
from fmlightning.flow.precision import Precision, in_precision

BUDGET = 1.0
"""Seconds of calls that are timed."""


@dataclass(frozen=True)
class Gain:
    """What compiling brought.

    Attributes:
        batch: samples in a call.
        once: seconds that compiling took.
        eager: seconds a call before.
        compiled: seconds a call after.
        difference: largest number by which the two predictions differ.
    """

    batch: int
    once: float
    eager: float
    compiled: float
    difference: float

    def __str__(self) -> str:
        words = (
            f"compile: {1e3 * self.compiled:.3g} ms a call of {self.batch} samples, {1e3 * self.eager:.3g} ms eager: "
            f"{self.eager / self.compiled:.2f} times as fast; the largest difference is {self.difference:.1g}"
        )
        if self.compiled >= self.eager:
            return f"{words}. It does not pay here: leave --compile out"
        return f"{words}. It took {self.once:.1f} s and pays after {self.pays_after} calls"

    @property
    def pays_after(self) -> int:
        """Calls after which the time of compiling is won back."""
        return round(self.once / (self.eager - self.compiled))


def as_asked(
    flow: TrainedFlow, precision: Precision | None, compile: bool, device: torch.device, batch: int
) -> TrainedFlow:
    """The flow with its network in a precision and compiled, as the command line wants it; says what that brings."""
    if precision is not None:
        slow = slow_bf16(f"--precision {precision}", device.type, "fp32 is the default")
        if slow:
            say(slow)
        weaker = None if flow.weaker is None else in_precision(flow.weaker, precision)
        flow = replace(flow, field=in_precision(flow.field, precision), weaker=weaker)
    if compile:
        say(str(compiled(flow, device, batch)))
    return flow


def compiled(flow: TrainedFlow, device: torch.device, batch: int) -> Gain:
    """Compile the network where it is, and measure what it brought."""
    field = flow.field.to(device)
    x = torch.zeros(batch, *flow.event_shape, device=device)
    t = torch.full((batch,), 0.5, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device) if flow.num_classes else None

    def call() -> Tensor:
        with torch.no_grad():
            return evaluate(field.network, field.path, x, t, y)

    before, eager = call(), seconds_of(call, device)
    field.network.compile()
    once, after = timed(call, device)
    return Gain(batch, once, eager, seconds_of(call, device), float((after - before).abs().max()))


def seconds_of(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds a call: the shortest of as many as fit into the budget, as what disturbs only adds."""
    spent, best = 0.0, float("inf")
    while spent < BUDGET:
        seconds, _ = timed(call, device)
        spent, best = spent + seconds, min(best, seconds)
    return best


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of one call, until the device has done it, and its result."""
    synchronise(device)
    begin = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - begin, result


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator()
        return (
            accelerator if accelerator and torch.accelerator.is_available() else torch.device("cpu")
        )
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} is not available here: {str(error).splitlines()[0]}"
        ) from error


SLOWER = 10
"""How many times slower a U-Net trained in bf16 than in fp32, measured on a processor with AVX2 alone."""


def native_bf16() -> bool:
    """Whether the CPU has instructions for bf16; torch imitates them where it has not."""
    if platform.machine() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in known if hasattr(torch.cpu, name))


def slow_bf16(option: str, device: str, cure: str) -> str | None:
    """A warning, where bf16 was asked for on a CPU that has none."""
    if device != "cpu" or "bf16" not in option or native_bf16():
        return None
    return (
        f"warning: {option}: this processor has no bf16 instructions, with which a U-Net was {SLOWER} times slower "
        f"than in fp32; {cure}"
    )

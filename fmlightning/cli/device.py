"""The network of a trained run as the command line wants it evaluated: on which device, in which precision, compiled.

Compiled samples differ from the others by rounding. What compiling brings is measured in `benchmarks/gpu.py`.
"""

import platform
from dataclasses import replace

import torch

from fmlightning.cli.load import TrainedFlow
from fmlightning.cli.quiet import say
from fmlightning.flow.precision import Precision, in_precision

COMPILES = (
    "note: --compile takes seconds to minutes at the first batch; it pays for many samples of a network with "
    "convolutions, and seldom for an MLP"
)


def prepare_flow(
    flow: TrainedFlow, precision: Precision | None, compile: bool, device: torch.device
) -> TrainedFlow:
    """The flow with its network in a precision and compiled."""
    if precision is not None:
        slow = slow_bf16(f"--precision {precision}", device.type, "fp32 is the default")
        if slow:
            say(slow)
        weaker = None if flow.weaker is None else in_precision(flow.weaker, precision)
        flow = replace(flow, field=in_precision(flow.field, precision), weaker=weaker)
    if compile:
        say(COMPILES)
        flow.field.network.compile()
    return flow


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
"""The factor by which a U-Net trained slower in bf16 than in fp32, measured on a processor with AVX2 alone."""


def native_bf16() -> bool:
    """True where the CPU has instructions for bf16; torch imitates them where it has not."""
    if platform.machine() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in known if hasattr(torch.cpu, name))


def slow_bf16(option: str, device: str, cure: str) -> str | None:
    """A warning, where bf16 is requested on a CPU that has no instructions for it."""
    if device != "cpu" or "bf16" not in option or native_bf16():
        return None
    return (
        f"warning: {option}: this processor has no bf16 instructions, with which a U-Net was {SLOWER} times slower "
        f"than in fp32; {cure}"
    )

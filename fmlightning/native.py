"""What the processor computes itself, and what it can only imitate."""

import platform

import torch

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

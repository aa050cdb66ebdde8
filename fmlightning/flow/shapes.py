"""The named shapes of the library, and the one broadcast helper.

    B   samples in a batch          *S  the shape of one sample: (D,) or (C, H, W)

`t` is one time for the whole batch, shape (), or one for each sample, shape (B,).
The aliases are read by people and type checkers, and checked at run time while the tests run; what would be
broadcast without a word is refused at all times, by the functions below.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Points = Float[Tensor, "B *S"]
PerSample = Float[Tensor, " B"]
Times = Float[Tensor, " B"] | Float[Tensor, ""]
Labels = Int[Tensor, " B"]

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity field `(x, t) -> v`: a network, the oracle, a guided model. Solvers see nothing else."""


def expand_like(c: Times, x: Tensor) -> Tensor:
    """Reshape per-sample coefficients (B,) to (B, 1, ..., 1) so that they multiply x, (B, *S).

    A scalar passes unchanged. Without this, a (B,) factor silently scales the last axis of an
    image whose width equals the batch size.
    """
    return c if c.ndim == 0 else c.reshape(-1, *(1,) * (x.ndim - 1))


def require_choice(owner: object, name: str, known: Sequence[str]) -> None:
    """Refuse an option of text that is none of those known.

    Raises:
        ValueError: it is another.
    """
    value = getattr(owner, name)
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")


def flat(x: Tensor) -> Tensor:
    """A vector for each sample, (B, D): of numbers (B,) as well, which have D = 1."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def at(t: float, like: Tensor) -> Tensor:
    """A scalar time in the precision of a tensor, filled on its device: no copy from the host."""
    return torch.full((), t, dtype=like.dtype, device=like.device)


def require_like(name: str, value: Tensor, other: str, x: Tensor) -> None:
    """Refuse a tensor of another shape: (B, 1) or (1, D) would be broadcast to (B, D) without a word."""
    if value.shape != x.shape:
        raise ValueError(
            f"{name} {tuple(value.shape)} must have the shape of {other} {tuple(x.shape)}"
        )


def require_times(t: Tensor, batch: int | None = None) -> None:
    """Refuse times of another shape than () or (B,), or outside [0, 1].

    The values are looked at on the CPU alone: elsewhere the answer would make the host wait for the device at
    every step, so that solvers check their ends beforehand (`require_time`).
    """
    if t.ndim and t.shape != (batch,):
        raise ValueError(
            f"t {tuple(t.shape)} must be one time, (), or one for each of {batch} samples, ({batch},)"
        )
    if t.device.type != "cpu" or not t.numel():
        return
    low, high = (float(end) for end in t.detach().aminmax()) if t.ndim else (t.item(),) * 2
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"t from {low:g} to {high:g} must lie in [0, 1], from the source to the data"
        )


def require_time(name: str, t: float) -> None:
    """Refuse a number that is no time of a path."""
    if not 0 <= t <= 1:
        raise ValueError(f"{name}={t:g} must lie in [0, 1], from the source to the data")


def require_t_range(t_range: tuple[float, float], name: str = "t_range") -> None:
    """Refuse what is no part of [0, 1]."""
    low, high = t_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name}={t_range} must satisfy 0 <= low < high <= 1")


def require_positive(settings: object, *names: str) -> None:
    """Refuse settings that are not positive."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name}={getattr(settings, name)} must be positive")

"""The named shapes of the library, and the one broadcast helper.

    B   samples in a batch          *S  the shape of one sample: (D,) or (C, H, W)

`t` is one time for the whole batch, shape (), or one for each sample, shape (B,).
The aliases are read by people and type checkers, and checked at run time while the tests run.
"""

from collections.abc import Callable

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

"""The result of an integration, or its failure."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from fmlightning.flow.shapes import flat

Mask = Bool[Tensor, " B"]


@dataclass(frozen=True)
class Solution:
    """The result of an integration.

    Attributes:
        x: the state at the end, (B, *S).
        nfe: how often the field was called.
        times: the times of `states`, (K,), in float64.
        states: the states at the requested times, (K, B, *S); K = 0 if there are none.
    """

    x: Tensor
    nfe: int
    times: Tensor
    states: Tensor

    @property
    def failed(self) -> Mask:
        """The samples that could not be integrated, where the solver does not raise for them, (B,)."""
        return ~flat(self.x).isfinite().all(1)


class SolverError(RuntimeError):
    """The integration failed: what the solver was doing, when, and with which samples.

    Attributes:
        suspects: the samples that seem to have stopped it, (B,); None where nothing is known of them.
        nfe: how often the field was called until then.
    """

    def __init__(self, message: str, suspects: Mask | None = None, nfe: int = 0) -> None:
        super().__init__(message)
        self.suspects, self.nfe = suspects, nfe

r"""Training a flow by maximum likelihood, as continuous normalising flows were before flow matching.

    L = -E log p_1(x_1),   log p_1(x_1) = log p_0(x_0) - int_0^1 div v(x_t, t) dt                (1)

Each evaluation of (1) solves the flow from t = 1 to 0, and its gradient goes back through every step of the
solver (discretise, then optimise). Only the two ends matter: what the flow does in between is left to the network,
while flow matching prescribes it.

L is a cross-entropy and cannot fall below the entropy of the data; what too few steps make of it can. A network
learns to put a large divergence where such a solver looks, and loses it where it does not. So the steps follow
from a tolerance, which holds the integral of (1) to account beside the state.

Source: Chen et al. 2018, arXiv:1806.07366, sec. 4; the estimate of the divergence, Grathwohl et al. 2019,
arXiv:1810.01367.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.likelihood import hutchinson_probe, log_prob
from fmlightning.flow.models import TrainedField
from fmlightning.flow.shapes import Labels, PerSample, Points
from fmlightning.flow.solvers.ode import AdaptiveMethod, ODESolver
from fmlightning.flow.sources import Source

Divergence = Literal["exact", "hutchinson"]


@dataclass(frozen=True)
class MaximumLikelihood:
    """The objective (1).

    The steps depend on the batch, so two processes with half a batch each agree with one to the tolerance only.

    Args:
        method: an adaptive method; with 8 equal steps a flow was seen 6 nats below the entropy.
        rtol: its relative tolerance.
        atol: its absolute tolerance.
        divergence: exact, D backward passes an evaluation, or hutchinson, one, with a keyed probe for each sample.
    """

    method: AdaptiveMethod = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    divergence: Divergence = "exact"

    @property
    def solver(self) -> ODESolver:
        return ODESolver(self.method, rtol=self.rtol, atol=self.atol)

    def __post_init__(self) -> None:
        _ = self.solver  # refuses tolerances that are not positive

    def __call__(
        self,
        field: TrainedField,
        x1: Points,
        source: Source,
        *,
        y: Labels | None = None,
        streams: KeyedStreams | None = None,
    ) -> PerSample:
        """-log p_1(x1) in nats, (B,); differentiable where gradients are on.

            loss = MaximumLikelihood()(NetworkField(net, Linear()), x1, Gaussian()).mean()

        Args:
            field: with its path, whose start says what law the source has there.
            x1: data, (B, *S).
            source: the law of x0, with a known density.
            y: labels, (B,).
            streams: keyed streams of the samples, for the probes of hutchinson.

        Raises:
            ValueError: the source has no density, or there are no streams for the probes.
            SolverError: the flow has become too stiff for the solver.
        """
        # labels that are looked up while gradients are on must not come from inference mode
        with torch.inference_mode(False):
            y = None if y is None else y.clone()
            probe = self.probe(streams, x1)
        return -log_prob(
            field.given(y),
            x1,
            source,
            field.schedule,
            self.solver,
            interval=field.interval,
            probe=probe,
            differentiable=torch.is_grad_enabled(),
        )

    def probe(self, streams: KeyedStreams | None, x1: Points) -> Points | None:
        """Hutchinson's z for each sample, one for the whole solve; None for the exact divergence."""
        if self.divergence == "exact":
            return None
        if streams is None:
            raise ValueError(
                "divergence='hutchinson' needs random numbers: pass streams=key.streams(index), or take 'exact'"
            )
        return hutchinson_probe(streams, x1).clone()

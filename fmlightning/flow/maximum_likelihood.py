r"""Training a flow by maximum likelihood, as continuous normalising flows were before flow matching.

    L = -E log p_1(x_1),   log p_1(x_1) = log p_0(x_0) - int_0^1 div v(x_t, t) dt                (1)

Each evaluation of (1) solves the flow from t = 1 to 0, and its gradient goes back through every step of the
solver (discretise, then optimise). Only the two ends matter: what the flow does in between is left to the network,
while flow matching prescribes it. E L is the cross-entropy, so it cannot fall below the entropy of the data.

Source: Chen et al. 2018, arXiv:1806.07366, sec. 4; the estimate of the divergence, Grathwohl et al. 2019,
arXiv:1810.01367.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fmlightning.flow.fields import TrainedField
from fmlightning.flow.keys import Rows
from fmlightning.flow.likelihood import hutchinson_probe, log_prob
from fmlightning.flow.ode import FIXED, FixedMethod, ODESolver
from fmlightning.flow.shapes import Labels, PerSample, Points
from fmlightning.flow.sources import Source

Divergence = Literal["exact", "hutchinson"]


@dataclass(frozen=True)
class MaximumLikelihood:
    """The objective (1).

    The solver's error is part of the objective: a network learns to exploit steps that are too large. Judge the
    trained flow with an adaptive solver, and take more steps where the two likelihoods differ.

    Args:
        method: a fixed-step method; midpoint needs the divergence at every other evaluation only.
        num_steps: its intervals.
        divergence: exact, D backward passes an evaluation, or hutchinson, one, with a keyed probe for each sample.
    """

    method: FixedMethod = "midpoint"
    num_steps: int = 8
    divergence: Divergence = "exact"

    def __post_init__(self) -> None:
        if self.method not in FIXED:
            raise ValueError(
                f"method={self.method!r} does not train: choose one of fixed steps, {', '.join(FIXED)}"
            )
        if self.divergence not in ("exact", "hutchinson"):
            raise ValueError(
                f"divergence={self.divergence!r} is unknown; choose exact or hutchinson"
            )
        _ = self.solver  # refuses a wrong number of steps

    @property
    def solver(self) -> ODESolver:
        return ODESolver(self.method, self.num_steps)

    def __call__(
        self,
        field: TrainedField,
        x1: Points,
        source: Source,
        *,
        y: Labels | None = None,
        rows: Rows | None = None,
    ) -> PerSample:
        """-log p_1(x1) in nats, (B,); differentiable where gradients are on.

            loss = MaximumLikelihood()(NetworkField(net, Linear()), x1, Gaussian()).mean()

        Args:
            field: with its path, whose start says what law the source has there.
            x1: data, (B, *S).
            source: the law of x0, with a known density.
            y: labels, (B,).
            rows: keyed streams of the samples, for the probes of hutchinson.

        Raises:
            ValueError: the source has no density, or there are no rows for the probes.
        """
        # labels that are looked up while gradients are on must not come from inference mode
        with torch.inference_mode(False):
            y = None if y is None else y.clone()
        return -log_prob(
            field.given(y),
            x1,
            source,
            field.schedule,
            self.solver,
            interval=field.interval,
            probe=self.probe(rows, x1),
            differentiable=torch.is_grad_enabled(),
        )

    def probe(self, rows: Rows | None, x1: Points) -> Points | None:
        if self.divergence == "exact":
            return None
        if rows is None:
            raise ValueError(
                "divergence='hutchinson' needs random numbers: pass rows=key.rows(index), or take 'exact'"
            )
        with torch.inference_mode(False):
            return hutchinson_probe(rows, x1).clone()

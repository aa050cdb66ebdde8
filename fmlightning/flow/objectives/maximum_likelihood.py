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
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.likelihood import hutchinson_probe, log_prob
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.cfm import CFM
from fmlightning.flow.objectives.objective import Draw, Losses, Nets, Objective, Recipe
from fmlightning.flow.paths.path import Path
from fmlightning.flow.paths.predictions import Prediction
from fmlightning.flow.shapes import Labels, PerSample, Points, require_choice
from fmlightning.flow.solvers.ode import ADAPTIVE, AdaptiveMethod, ODESolver
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Source

Divergence = Literal["exact", "hutchinson"]


@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """The objective (1); the coupling and the times have no effect.

    The steps depend on the batch, so two processes with half a batch each agree with one to the tolerance only.

    Args:
        method: an adaptive method; with 8 equal steps a flow was seen 6 nats below the entropy.
        rtol: its relative tolerance.
        atol: its absolute tolerance.
        divergence: exact, D backward passes an evaluation, or hutchinson, one, with a keyed probe for each sample.
        prediction: what the network outputs, as in CFM.
    """

    method: AdaptiveMethod = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    divergence: Divergence = "exact"
    prediction: Prediction = "velocity"

    num_times: ClassVar[int] = 0
    unit: ClassVar[str] = "nats"
    draws: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    @property
    def solver(self) -> ODESolver:
        return ODESolver(self.method, rtol=self.rtol, atol=self.atol)

    @property
    def regression(self) -> CFM:
        """The objective whose model this one trains."""
        return CFM(self.prediction)

    def __post_init__(self) -> None:
        require_choice(self, "method", ADAPTIVE)
        require_choice(self, "divergence", get_args(Divergence))
        _ = (
            self.solver,
            self.regression,
        )  # refuse tolerances that are not positive, and unknown predictions

    def check(self, recipe: Recipe, network: nn.Module, data: Any) -> None:
        self.regression.check(recipe, network, data)
        if recipe.source.paired:
            raise ValueError(
                f"model.objective={type(self).__name__} needs the density of x0, and {type(data).__name__} gives "
                "samples of it only; set model.objective=CFM"
            )

    def t_range(self, path: Path) -> tuple[float, float]:
        return self.regression.t_range(path)

    def model(self, nets: Nets, recipe: Recipe) -> NetworkField:
        return self.regression.model(nets, recipe)

    def loss(self, nets: Nets, recipe: Recipe, draw: Draw) -> Losses:
        model = self.model(nets, recipe)
        loss = self(model, draw.x1, recipe.source, y=draw.y, streams=draw.streams)
        return Losses(loss, loss)

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
            field: with its path, whose start says what distribution the source has there.
            x1: data, (B, *S).
            source: the distribution of x0, with a known density.
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
            field.path,
            self.solver,
            t_range=field.t_range,
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

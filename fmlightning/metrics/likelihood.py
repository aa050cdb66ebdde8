r"""The likelihood of held-out data under a flow, as a score.

    nll = -E log p_1(x_1),    nll >= entropy of the data,    nll - entropy = KL(data | flow)       (1)

It is computed with a solver and again at a tenth of its tolerances. Where the two disagree there is no likelihood to
report. For data whose density q is known, the entropy and the divergence in (1) are estimated on the same
points, so that what the draw of the points adds to both sides of (1) cancels.
"""

import warnings

import torch
from torch import Tensor

from fmlightning.flow.keys import Key
from fmlightning.flow.likelihood import bits_per_dimension, hutchinson_probe, likelihood
from fmlightning.flow.objectives.maximum_likelihood import Divergence
from fmlightning.flow.shapes import Labels, PerSample, Points, flat
from fmlightning.flow.solvers.ode import AdaptiveMethod, ODESolver
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Source
from fmlightning.metrics.metric import ModelMetric, by_name
from fmlightning.metrics.reference import ReferenceData


class NegativeLogLikelihood(ModelMetric):
    """`nll` of held-out data in nats, and `bits_per_dimension` of images.

    Beside it `nll_difference`, the most that a tenth of the tolerances changed for one sample, and for data with
    a known density `nll_floor`, the entropy, `kl`, how far the model is above it, and the standard error
    `kl_se`. All are of the same points. The score of real samples is the floor.
    A likelihood of standardised points is given in the units of the data, log |det| of their scale added.

    Args:
        size: how many held-out points.
        batch_size: points solved at once; the steps of an adaptive solver depend on it.
        method: an adaptive method.
        rtol: its relative tolerance.
        atol: its absolute tolerance.
        within: the largest difference to accept, in nats for one sample; beyond it there is a warning and no score.
        divergence: exact, D backward passes an evaluation, or hutchinson, one.
    """

    higher_is_better = by_name(nll=False, bits_per_dimension=False, kl=False, nll_difference=None)
    values: list[Tensor]

    def __init__(
        self,
        size: int = 2000,
        batch_size: int = 2000,
        method: AdaptiveMethod = "dopri5",
        rtol: float = 1e-6,
        atol: float = 1e-6,
        within: float = 0.01,
        divergence: Divergence = "exact",
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.size, self.batch_size, self.within = size, batch_size, within
        self.solver = ODESolver(method, rtol=rtol, atol=atol)
        self.divergence = divergence
        self.log_det = 0.0
        self.add_state("values", [], dist_reduce_fx="cat")

    def prepare(
        self,
        reference: Points,
        held_out: Points,
        labels: tuple[Labels, Labels] | None,
        num_bins: int | None,
    ) -> None:
        self.held_out = held_out[: self.size]
        self.labels = labels[1][: self.size] if labels else None
        self.num_bins = num_bins

    def fit_reference(self, real: ReferenceData) -> None:
        super().fit_reference(real)
        units = getattr(real, "units", None)
        self.log_det = 0.0 if units is None else units.log_det

    def update(self, values: Tensor) -> None:
        """Take the numbers that `score` gives for some points, (B, 3)."""
        self.values.append(values)

    def evaluate_model(
        self,
        field: TrainedField,
        source: Source,
        distribution: Source | None,
        rank: int,
        world_size: int,
    ) -> None:
        size = min(self.batch_size, -(-len(self.held_out) // world_size))  # some for each process
        blocks = torch.arange(len(self.held_out), device=self.device).split(size)
        for block in blocks[rank::world_size]:
            self.update(self.score(field, source, distribution, block))
        if rank >= len(blocks):  # a process with no share must still say so
            nothing = torch.zeros(0, 3, dtype=torch.float64, device=self.device)
            self.update(nothing)

    def score(
        self, field: TrainedField, source: Source, distribution: Source | None, index: Tensor
    ) -> Tensor:
        """log p_1, what the finer solver changed and log q (nan if unknown) of some points, (B, 3)."""
        # float32 would not bear a tenth of the tolerances
        x1 = self.held_out.to(index.device)[index].double()
        with torch.inference_mode(
            False
        ):  # where the network looks labels up while gradients are on
            y = None if self.labels is None else self.labels.clone().to(index.device)[index.clone()]
        streams = Key(0).fold("probe").streams(index)
        probe = hutchinson_probe(streams, x1) if self.divergence == "hutchinson" else None
        found = likelihood(
            field.given(y), x1, source, field.path, self.solver, t_range=field.t_range, probe=probe
        )  # fmt: skip
        return torch.stack((found.log_prob, found.difference, known_log_prob(distribution, x1)), 1)

    def compute(self) -> dict[str, float]:
        log_p, difference, log_q = self.state_tensors("values").unbind(1)
        worst = float(difference.max())
        scores = {"nll_difference": worst}
        if not worst <= self.within:
            warnings.warn(
                f"no likelihood: a tenth of rtol={self.solver.rtol:g} and atol={self.solver.atol:g} changes one by "
                f"{worst:.3g} nats, more than within={self.within:g}. Tighten both",
                stacklevel=1,
            )
            return scores
        scores["nll"] = self.log_det - float(log_p.mean())
        if self.num_bins is not None:
            dims = self.held_out[0].numel()
            scores["bits_per_dimension"] = float(
                bits_per_dimension(log_p, dims, self.num_bins).mean()
            )
        return scores if bool(log_q.isnan().any()) else scores | divergence_scores(log_p, log_q)


def divergence_scores(log_p: PerSample, log_q: PerSample) -> dict[str, float]:
    """The floor of the likelihood and the distance from it, on the same points."""
    gap = log_q - log_p
    return {
        "nll_floor": -float(log_q.mean()),
        "kl": float(gap.mean()),
        "kl_se": float(gap.std() / len(gap) ** 0.5),
    }


def known_log_prob(distribution: Source | None, x: Points) -> PerSample:
    """The log-density of the data's own distribution, or nan where it is not known."""
    unknown = torch.full_like(flat(x)[:, 0], float("nan"))
    if distribution is None:
        return unknown
    try:
        return distribution.log_prob(x)
    except ValueError:
        return unknown

r"""Change of variables: likelihoods under a flow.

An invertible map y = f(x) carries a density along, and a chain of maps adds up:

    log p(y) = log p(x) - log |det df/dx|                                           (1)

For the flow dx/dt = v(x, t), the limit of many small maps,

    log p_1(x_1) = log p_0(x_0) - int_0^1 div v(x_t, t) dt                          (2)

is integrated from t = 1 back to t = 0 beside the state. The divergence takes one backward pass for each dimension,
or one in all by Hutchinson's estimate z . (dv/dx) z with E z z^T = I, z fixed along the trajectory.

p_0 is the distribution at which integration ends: of sigma_0 x0 + gamma_0 eps, so N(0, (sigma_0^2 + gamma_0^2) I) for a
Gaussian source. Paths with alpha_0 > 0 (diffusion paths) do not quite start there; no tolerance removes that.

Source: Chen et al. 2018, arXiv:1806.07366, eq. 8; Grathwohl et al. 2019, arXiv:1810.01367.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.paths.path import Path
from fmlightning.flow.shapes import (
    Field,
    PerSample,
    Points,
    Times,
    flat,
    require_like,
    require_t_range,
)
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.sources import Source

Map = Callable[[Tensor], Tensor]


class LikelihoodError(RuntimeError):
    """Two tolerances disagree on a likelihood: it is not known yet."""


@dataclass(frozen=True)
class Likelihood:
    """A log-likelihood in nats, computed twice.

    Attributes:
        log_prob: with the solver at a tenth of its tolerances (or, of a fixed-step method, twice its steps), (B,).
        coarse: with the solver as given, (B,).
        nfe: evaluations of the field, both times together.
    """

    log_prob: PerSample
    coarse: PerSample
    nfe: int

    @property
    def difference(self) -> PerSample:
        """What the finer solver changed: stands beside every likelihood that is reported."""
        return (self.log_prob - self.coarse).abs()

    def verified(self, within: float) -> PerSample:
        """The log-likelihood, if both tolerances agree on every sample.

        Args:
            within: the largest difference to accept, in nats.

        Raises:
            LikelihoodError: they do not.
        """
        worst = float(self.difference.max())
        if not worst <= within:
            bad = int((~(self.difference <= within)).sum())
            raise LikelihoodError(
                f"the two tolerances differ by up to {worst:.3g} nats, on {bad} of {len(self.difference)} samples by "
                f"more than within={within:g}: this is not a likelihood yet. Tighten rtol and atol, or take more steps."
            )
        return self.log_prob


def likelihood(
    field: Field,
    x1: Points,
    source: Source,
    path: Path,
    solver: ODESolver,
    *,
    t_range: tuple[float, float] | None = None,
    probe: Tensor | None = None,
) -> Likelihood:
    """The log-likelihood (2) at a tolerance and at a tenth of it; arguments as in `log_prob`."""
    (coarse, m), (fine, n) = (
        integrate(field, x1, source, path, s, t_range, probe, differentiable=False)
        for s in (solver, solver.refined())
    )
    return Likelihood(fine, coarse, m + n)


def log_prob(
    field: Field,
    x1: Points,
    source: Source,
    path: Path,
    solver: ODESolver,
    *,
    t_range: tuple[float, float] | None = None,
    probe: Tensor | None = None,
    differentiable: bool = False,
) -> PerSample:
    """Log-density of data under the flow, equation (2), in nats.

    It runs under `no_grad` and `inference_mode`. Memory is linear in the batch. Report `likelihood` instead
    where the solver's error is not known.

    Args:
        field: the velocity.
        x1: data, (B, *S).
        source: the distribution of x0.
        path: the path, which says what is left of the source at the start.
        solver: any; a fixed-step method computes the divergence only where its step uses it.
        t_range: from the start distribution to the data; the path's if None.
        probe: Hutchinson's z, (B, *S), from `hutchinson_probe`; None for the exact divergence, D backward passes.
        differentiable: keep the graph, to train on the result.

    Raises:
        ValueError: the density of the start distribution is not known.
        SolverError: the integration failed.
    """
    return integrate(field, x1, source, path, solver, t_range, probe, differentiable)[0]


def integrate(
    field: Field,
    x1: Points,
    source: Source,
    path: Path,
    solver: ODESolver,
    t_range: tuple[float, float] | None,
    probe: Tensor | None,
    differentiable: bool,
) -> tuple[PerSample, int]:
    """Equation (2) and its NFE: the state is (x, l) with dl/dt = div v, flattened into one tensor."""
    if probe is not None:
        require_like("probe", probe, "x1", x1)
    t0, t1 = t_range or path.t_range
    require_t_range((t0, t1))

    def split(state: Tensor) -> Tensor:
        return state[:, :-1].reshape(x1.shape)

    def whole(state: Tensor, t: Tensor) -> Tensor:
        v, div = divergence(field, split(state), t, probe, differentiable)
        return torch.cat((flat(v), div[:, None]), 1)

    def state_only(state: Tensor, t: Tensor) -> Tensor:
        return torch.cat((flat(field(split(state), t)), torch.zeros_like(state[:, :1])), 1)

    with outside_inference(differentiable):
        x1 = x1.clone()
        state = torch.cat((flat(x1), x1.new_zeros(len(x1), 1)), 1)
        solution = solver.solve(whole, state, t1, t0, inner=state_only)
        end = solution.x
        return start_log_prob(source, path, split(end), t0) + end[:, -1], solution.nfe


@contextmanager
def outside_inference(differentiable: bool) -> Iterator[None]:
    """Autograd made possible again; tensors from inside have to be cloned."""
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        yield


def start_log_prob(source: Source, path: Path, x: Points, t: float = 0.0) -> PerSample:
    """Log-density of sigma x0 + gamma eps, where sampling starts, in nats.

    Raises:
        ValueError: unknown, for a source that is not Gaussian on a path with gamma > 0; t outside [0, 1].
    """
    std, noise = path.start_scales(t)
    if noise and not source.gaussian:
        raise ValueError(
            f"the density of {source} blurred by gamma = {noise:g} is not known: take the Gaussian source, "
            "or a path with gamma = 0 at its start"
        )
    return source.log_prob(x / std) - x[0].numel() * math.log(std)


def divergence(
    field: Field, x: Points, t: Times, probe: Tensor | None = None, differentiable: bool = False
) -> tuple[Points, PerSample]:
    """The velocity and its divergence at x, (B, *S), from one evaluation of the field.

    Args:
        probe: Hutchinson's z, (B, *S); None for the exact sum of D derivatives.
        differentiable: keep the graph.

    Raises:
        ValueError: the field's velocity, or the probe, has another shape than x.
    """
    with torch.enable_grad(), twice_differentiable(differentiable):
        x = x if differentiable and x.requires_grad else x.detach().requires_grad_()
        v = field(x, t)
        require_like("the velocity", v, "x", x)
        if probe is None:
            rows = jacobian_rows(v, x, differentiable)
            div = torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)
        else:
            require_like("probe", probe, "x", x)
            (row,) = gradients(v, x, probe, differentiable)
            div = flat(row * probe).sum(1)
    return (v, div) if differentiable else (v.detach(), div)


def twice_differentiable(wanted: bool) -> AbstractContextManager[None]:
    """Attention by plain products: its fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()


def jacobian_rows(y: Points, x: Points, differentiable: bool = False) -> Iterator[Tensor]:
    """The gradients (B, D) of y_1, ..., y_D, one backward pass each for the whole batch."""
    for direction in torch.eye(y[0].numel(), dtype=y.dtype, device=y.device):
        along = direction.reshape(y.shape[1:]).expand_as(y)
        (row,) = gradients(y, x, along, differentiable)
        yield flat(row)


def gradients(y: Tensor, x: Tensor, direction: Tensor, differentiable: bool) -> tuple[Tensor, ...]:
    if not y.requires_grad:
        return (torch.zeros_like(x),)  # a field that ignores x
    return torch.autograd.grad(
        y, x, direction, retain_graph=True, create_graph=differentiable, materialize_grads=True
    )


def hutchinson_probe(
    streams: KeyedStreams, like: Points, law: Literal["rademacher", "gaussian"] = "rademacher"
) -> Points:
    """Keyed noise z with E z z^T = I, one for each sample.

    Args:
        streams: keyed streams of the samples.
        like: the data, for shape and precision.
        law: rademacher, signs, has the least variance, 2 sum_{i != j} S_ij^2 with S the symmetric part of dv/dx;
            gaussian adds 2 sum_i S_ii^2.
    """
    if law not in ("rademacher", "gaussian"):
        raise ValueError(f"law={law!r} is unknown; choose rademacher or gaussian")
    if law == "gaussian":
        return streams.normal(like.shape[1:], dtype=like.dtype)
    return (2 * (streams.bits(like[0].numel()) & 1) - 1).to(like.dtype).reshape(like.shape)


def bits_per_dimension(log_prob: PerSample, dims: int, num_bins: int) -> PerSample:
    """Bits per dimension of dequantised data, from its log-density in nats.

        -log p / (dims ln 2) + log2(num_bins / 2)

    The offset is the width 2 / num_bins of a bin, for data scaled as x = 2 (k + u) / num_bins - 1: 7 for 8-bit images.

    Args:
        dims: numbers in one sample.
        num_bins: how many values a pixel has; 256 for 8-bit images.
    """
    if not (dims > 0 and num_bins > 1):
        raise ValueError(f"dims={dims} must be positive and num_bins={num_bins} at least 2")
    return -log_prob / (dims * math.log(2)) + math.log2(num_bins / 2)


def log_abs_det(f: Map, x: Points) -> tuple[Points, PerSample]:
    """f(x) and log |det df/dx| of each sample, for a map of the batch that treats samples apart."""
    with outside_inference(False), torch.enable_grad():
        x = x.clone().detach().requires_grad_()
        y = f(x)
        jacobian: Float[Tensor, "B D D"] = torch.stack(list(jacobian_rows(y, x)), 1)
        return y.detach(), torch.linalg.slogdet(jacobian).logabsdet


def push_forward(maps: Sequence[Map], x: Points, log_prob: PerSample) -> tuple[Points, PerSample]:
    """A point and its log-density after a chain of invertible maps, equation (1) once for each."""
    for f in maps:
        x, volume = log_abs_det(f, x)
        log_prob = log_prob - volume
    return x, log_prob

r"""How much farther a flow goes than it would have to.

    E = E int_0^1 |v(x_t, t)|^2 dt >= W2(p0, p1)^2,      NPE = |E - W2(p0, q)^2| / W2(p0, q)^2      (1)

Among all flows from p0 to p1 the optimal transport has the least energy, W2^2 (Benamou and Brenier). Of a trained
flow p1 is not quite the data's distribution q, so E may come out below W2(p0, q)^2 too.

The distance of two distributions is estimated from samples, and so is E, from the same source points, so that much of
what the draw adds to both sides of (1) cancels. A distance of samples is biased upwards, in the plane by about
log(n) / n: it is given with its n. The points are the same for every model, and so then is the distance.

Source: Tong et al. 2024, arXiv:2302.00482, sec. 5.1, with Euler's method in 100 steps.
"""

import torch
from torch import Tensor

from fmlightning.flow.shapes import Labels, Points
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import sample, source_points
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.flow.sources import Source
from fmlightning.metrics.metric import ModelMetric, by_name
from fmlightning.metrics.straightness import Straightness
from fmlightning.metrics.transport import wasserstein2

SEED = 0


class PathEnergy(ModelMetric):
    """The energy E of (1) as `energy`, W2(p0, q)^2 as `w2_squared` with its standard error, and `npe`.

    They are of the field, whatever solver samples are drawn with.

    Args:
        subsets: disjoint samples of both distributions, whose distances are averaged.
        size: n, points in each.
        num_steps: steps of Euler's method, whose energy sum_k |v_k|^2 h is exact at its own points.
    """

    higher_is_better = by_name(energy=None, w2_squared=None, npe=False)

    def __init__(self, subsets: int = 4, size: int = 2048, num_steps: int = 100) -> None:
        super().__init__()
        for name, value in (("subsets", subsets), ("size", size), ("num_steps", num_steps)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.subsets, self.size = subsets, size
        self.solver = ODESolver("euler", num_steps=num_steps)
        self.straightness = Straightness()
        self.squares = torch.zeros(0)

    def prepare(
        self,
        reference: Points,
        held_out: Points,
        labels: tuple[Labels, Labels] | None,
        num_bins: int | None,
    ) -> None:
        self.check(held_out, None, num_bins)
        self.held_out = held_out[: self.subsets * self.size]
        self.labels = labels[1][: self.subsets * self.size] if labels else None

    def check(self, held_out: Points, y: Labels | None, num_bins: int | None) -> None:
        if len(held_out) < self.subsets * self.size:
            raise ValueError(
                f"evaluation.metrics: PathEnergy needs subsets x size = {self.subsets * self.size} real samples and "
                f"the data has {len(held_out)}; choose fewer or a larger data.test_size"
            )

    def evaluate_model(
        self,
        field: TrainedField,
        source: Source,
        distribution: Source | None,
        rank: int,
        world_size: int,
    ) -> None:
        index = torch.arange(len(self.held_out), device=self.device)
        for block in index.split(self.size)[rank::world_size]:
            self.update(self.trajectories(field, source, block))
        x0 = source_points(source, SEED, index, self.held_out.shape[1:]).cpu()
        pairs = zip(x0.split(self.size), self.held_out.cpu().split(self.size), strict=True)
        self.squares = torch.tensor([wasserstein2(a, b) ** 2 for a, b in pairs])

    def trajectories(self, field: TrainedField, source: Source, index: Tensor) -> Tensor:
        """All states of some trajectories, (B, K, *S)."""
        y = None if self.labels is None else self.labels.to(index.device)[index]
        solution = sample(
            field, source, self.solver, index, self.held_out.shape[1:],
            seed=SEED, y=y, save_at=self.solver.num_steps + 1,
        )  # fmt: skip
        self.times = solution.times
        return solution.states.transpose(0, 1)

    def update(self, states: Tensor) -> None:
        """Take trajectories, (B, K, *S)."""
        self.straightness.update(states.transpose(0, 1), self.times)

    def compute(self) -> dict[str, float]:
        energy, square = self.straightness.compute()["path_energy"], float(self.squares.mean())
        scores = {"energy": energy, "w2_squared": square, "npe": abs(energy - square) / square}
        if self.subsets > 1:
            scores["w2_squared_se"] = float(self.squares.std() / self.subsets**0.5)
        return scores

    def reset(self) -> None:
        super().reset()
        self.straightness.reset()

r"""How straight a flow's trajectories are.

    path energy      E = E int_0^1 |dx/dt|^2 dt                                               (1)
    transport cost   C = E |x(1) - x(0)|^2                                                    (2)
    straightness     E / C >= 1, and 1 only for straight lines at constant speed              (3)

(1) is taken along the polygon through K states, which is the energy of Euler's method with K - 1 steps and never
more than that of the trajectory: by Jensen's inequality each piece gives the least energy between its ends.

Source: the energy is that of Tong et al. 2024, arXiv:2302.00482, who compare it with W2^2 instead of (2); the
straightness of Liu et al. 2023, arXiv:2209.03003, is E - C.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class Straightness(Metric):
    """Path energy, transport cost and their ratio, as means over samples; summed in float64 over processes."""

    full_state_update = False
    energy: Tensor
    cost: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        for name in ("energy", "cost", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, states: Float[Tensor, "K B *S"], times: Float[Tensor, " K"]) -> None:
        """Take trajectories: states at K times, from the source to the end."""
        h = times.diff().double().abs()
        for before, after, step in zip(states[:-1], states[1:], h, strict=True):
            self.energy += (after - before).double().square().sum() / step
        self.cost += (states[-1] - states[0]).double().square().sum() / (times[-1] - times[0]).abs()
        self.count += states.shape[1]

    def compute(self) -> dict[str, float]:
        if not self.count:
            return {}
        energy, cost = float(self.energy / self.count), float(self.cost / self.count)
        return {
            "path_energy": energy,
            "transport_cost": cost,
            "straightness": energy / cost if cost else math.nan,
        }

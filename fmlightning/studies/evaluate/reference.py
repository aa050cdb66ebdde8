"""Where trajectories end by a solver that is as good as exact, to tell a solver's own error from the network's."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor

from fmlightning.cli.load import TrainedFlow
from fmlightning.flow.shapes import Labels
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import generate, path_noise, source_points
from fmlightning.studies.evaluate.grid import Cell

METHOD: Final = "dopri5"


@dataclass
class Reference:
    """The ends of trajectories in float64, found once for all solvers of a field.

    Attributes:
        tolerance: rtol = atol, by dopri5.
        seed: of the noise.
        found: the ends of each block of samples.
    """

    tolerance: float
    seed: int
    found: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def ends(
        self, flow: TrainedFlow, guided: Any, cell: Cell, index: Tensor, y: Labels | None
    ) -> Tensor:
        """Where the samples with these numbers end."""
        block = (cell.guidance, cell.ema, int(index[0]), len(index))
        if block not in self.found:
            self.found[block] = self.solve(flow, guided, cell, index, y)
        return self.found[block]

    def solve(
        self, flow: TrainedFlow, guided: Any, cell: Cell, index: Tensor, y: Labels | None
    ) -> Tensor:
        # the noise of the cells, which is drawn in float32
        x0 = source_points(flow.source, self.seed, index, flow.event_shape)
        eps = path_noise(guided.path, self.seed, index, flow.event_shape)
        assert isinstance(cell.solver, ODESolver), "a stochastic sample has no exact end"
        solver = replace(cell.solver, method=METHOD, rtol=self.tolerance, atol=self.tolerance)
        exact = deepcopy(guided).double()
        return generate(
            exact, x0.double(), solver, y=y, eps=None if eps is None else eps.double()
        ).x

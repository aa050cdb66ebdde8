"""What is scored: a solver with its budget and grid, a guidance, and which weights."""

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

from fmlightning.cli.load import TrainedFlow
from fmlightning.cli.parser import FlowParser
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.solvers.ode import ADAMS, ADAPTIVE, FIXED, ODESolver
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid


@dataclass(frozen=True)
class Cell:
    """One combination: a solver with its budget and grid, a guidance, and averaged weights or raw ones.

    Attributes:
        auto: whether guidance is by a weaker run.
    """

    solver: ODESolver
    guidance: Guidance
    ema: bool = True
    auto: bool = False

    @property
    def budget(self) -> str:
        return (
            f"{self.solver.num_steps} steps" if self.solver.fixed else f"tol {self.solver.rtol:g}"
        )

    @property
    def label(self) -> str:
        """The curve this cell lies on."""
        by = " by a weaker run" if self.auto else ""
        guided = "" if self.guidance.is_identity else f", w = {self.guidance.scale:g}{by}"
        return f"{self.solver.method}{self.on_grid}{guided}{'' if self.ema else ', raw weights'}"

    @property
    def on_grid(self) -> str:
        """The grid of a fixed-step method, where its steps are not equal."""
        even = self.grid in ("", "UniformGrid()")
        return "" if even else f" on {self.grid.removesuffix('()')}"

    @property
    def grid(self) -> str:
        """The grid of a fixed-step method, with what is not its default."""
        grid: Any = self.solver.grid
        changed = [f for f in fields(grid) if getattr(grid, f.name) != f.default]
        inner = ", ".join(f"{f.name}={getattr(grid, f.name)}" for f in changed)
        return f"{type(grid).__name__}({inner})" if self.solver.fixed else ""


def cells(flow: TrainedFlow, options: Any) -> list[Cell]:
    """All combinations, in the order of the table.

    Raises:
        ValueError: a method is unknown, or no budget pays for a step of it; a weaker run has no scale to act with.
    """
    scales = options.guidance or [flow.guidance.scale]
    auto = flow.weaker is not None
    if auto and all(w == 1 for w in scales):
        raise ValueError(
            f"--weaker {options.weaker} does nothing at --guidance 1: add --guidance 1,2"
        )
    guidances = [replace(flow.guidance, scale=w) for w in scales]
    for guidance in guidances:
        flow.guided(guidance)  # refuses a model that was not trained for it
    solvers = [s for method in options.solvers for s in budgets(flow.solver, method, options)]
    return [
        Cell(s, w, ema, auto and not w.is_identity)
        for ema in options.ema
        for w in guidances
        for s in solvers
    ]


def budgets(solver: ODESolver, method: str, options: Any) -> list[ODESolver]:
    """A method at each of its budgets, and one with fixed steps on each grid."""
    if method in ADAPTIVE:
        return [replace(solver, method=method, rtol=t, atol=t) for t in options.tolerances]  # type: ignore[arg-type]
    if method not in FIXED:
        raise ValueError(f"--solvers {method}: choose from {', '.join(FIXED + ADAPTIVE)}")
    steps = {whole_steps(replace(solver, method=method), nfe) for nfe in options.nfe} - {0}  # type: ignore[arg-type]
    if not steps:
        raise ValueError(f"--nfe {options.nfe} pays for no step of {method}: choose a larger one")
    grids = time_grids(options.grids) or [solver.grid]
    if method in ADAMS:  # their weights are those of equal steps
        grids = [grid for grid in grids if grid == UniformGrid()]
    if not grids:
        raise ValueError(f"--grids: {method} takes equal steps only: name UniformGrid too")
    return [
        replace(solver, method=method, num_steps=n, grid=grid)  # type: ignore[arg-type]
        for grid in grids
        for n in sorted(steps)
    ]


def time_grids(configs: list[Any] | None) -> list[TimeGrid]:
    """The grids of a list of classes.

    Raises:
        ValueError: one is no grid.
    """
    parser = FlowParser()
    parser.add_argument("--grids", type=list[TimeGrid])
    specs = [{"class_path": c} if isinstance(c, str) else c for c in configs or []]
    return parser.instantiate(parser.parse_object({"grids": deepcopy(specs)})).grids


def whole_steps(solver: ODESolver, nfe: int) -> int:
    """How many steps a number of evaluations pays for."""
    steps = nfe
    while steps > 0 and (replace(solver, num_steps=steps).evaluations or steps) > nfe:
        steps -= 1
    return steps

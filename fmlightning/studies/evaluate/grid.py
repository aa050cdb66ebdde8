"""Cells: a solver with its budget and grid, a guidance, and averaged weights or raw ones."""

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

from fmlightning.cli.load import TrainedFlow
from fmlightning.cli.parser import FlowParser
from fmlightning.cli.sampling_options import guided
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.solvers.ode import ADAMS, ADAPTIVE, FIXED, ODESolver
from fmlightning.flow.solvers.sde import METHODS as STOCHASTIC
from fmlightning.flow.solvers.sde import MarginalPreservingSDE, SDESolver
from fmlightning.flow.solvers.solver import Solver
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid

BUDGET = {"num_steps", "rtol", "atol"}
"""Settings of a solver that --nfe and --tolerances set, unless the class is given with its own."""


@dataclass(frozen=True)
class Cell:
    """One combination: a solver with its budget and grid, a guidance, and averaged weights or raw ones.

    Attributes:
        auto: whether guidance is by another model.
    """

    solver: Solver
    guidance: Guidance
    ema: bool = True
    auto: bool = False

    @property
    def budget(self) -> str:
        if isinstance(self.solver, ODESolver) and not self.solver.fixed:
            return f"tol {self.solver.rtol:g}"
        steps = getattr(self.solver, "num_steps", None)
        return "its own" if steps is None else f"{steps} steps"

    @property
    def label(self) -> str:
        """The curve this cell lies on."""
        by = " by a weaker run" if self.auto else ""
        guided = "" if self.guidance.is_identity else f", w = {self.guidance.scale:g}{by}"
        return f"{self.solver.name}{self.on_grid}{guided}{'' if self.ema else ', raw weights'}"

    @property
    def on_grid(self) -> str:
        """The grid of a fixed-step method, where its steps are not equal."""
        even = self.grid in ("", "UniformGrid()")
        return "" if even else f" on {self.grid.removesuffix('()')}"

    @property
    def grid(self) -> str:
        """The grid of a fixed-step method, with what is not its default."""
        grid: Any = getattr(self.solver, "grid", None)
        if grid is None or not self.solver.fixed:
            return ""
        changed = [f for f in fields(grid) if getattr(grid, f.name) != f.default]
        inner = ", ".join(f"{f.name}={getattr(grid, f.name)}" for f in changed)
        return f"{type(grid).__name__}({inner})"


def cells(flow: TrainedFlow, options: Any) -> list[Cell]:
    """All combinations, in the order of the table.

    Raises:
        ValueError: a method is unknown, or does not suit the model, or no budget pays for a step of it; another run
            to be guided away from has no scale to act with.
    """
    settings = {k: v for k, v in options.guidance.as_dict().items() if k != "guide_model"}
    scales = settings.pop("scale") or [flow.guidance.scale]
    auto = flow.weaker is not None
    if auto and all(w == 1 for w in scales):
        raise ValueError(
            f"--guidance.guide_model {options.guidance.guide_model} does nothing at --guidance.scale 1: add "
            "--guidance.scale 1,2"
        )
    guidances = [Guidance(scale=w, **settings) for w in scales]
    solvers = [s for named in options.solvers for s in budgets(flow.solver, named, options)]
    for guidance in guidances:
        # refuses a model that was not trained for it, or another path without a common range
        field: Any = guided(flow, guidance, options.path)
        for solver in solvers:
            if isinstance(solver, SDESolver):  # refuses a source or a coupling without a score
                MarginalPreservingSDE(field.path, field.source, field.independent, solver.diffusion)
    return [
        Cell(s, w, ema, auto and not w.is_identity)
        for ema in options.ema
        for w in guidances
        for s in solvers
    ]


def budgets(own: Solver, named: Any, options: Any) -> list[Solver]:
    """A solver at each of its budgets, and one with fixed steps on each grid.

    Args:
        own: the solver of the run, whose other settings a method keeps.
        named: a method, or a class with or without a budget of its own.
        options: those of the command line.
    """
    solver, settings = solver_named(own, named)
    if settings & BUDGET or not hasattr(solver, "num_steps"):
        return [solver]
    if isinstance(solver, ODESolver) and not solver.fixed:
        return [replace(solver, rtol=t, atol=t) for t in options.tolerances]
    steps = {whole_steps(solver, nfe) for nfe in options.nfe} - {0}
    if not steps:
        raise ValueError(
            f"--nfe {options.nfe} pays for no step of {solver.name}: choose a larger one"
        )
    found: Any = solver
    grids = ([] if "grid" in settings else time_grids(options.grids)) or [found.grid]
    if solver.name in ADAMS:  # their weights are those of equal steps
        grids = [grid for grid in grids if grid == UniformGrid()]
    if not grids:
        raise ValueError(f"--grids: {solver.name} takes equal steps only: name UniformGrid too")
    return [replace(found, num_steps=n, grid=grid) for grid in grids for n in sorted(steps)]


def solver_named(own: Solver, named: Any) -> tuple[Solver, set[str]]:
    """The solver of a method or of a class, and the settings that were given with the class.

    Raises:
        ValueError: there is no such method or class.
    """
    if named in FIXED + ADAPTIVE:
        ode = own if isinstance(own, ODESolver) else ODESolver()
        return replace(ode, method=named), set()
    if named in STOCHASTIC:
        sde = own if isinstance(own, SDESolver) else SDESolver()
        return replace(sde, method=named), set()
    if isinstance(named, str) and not named[:1].isupper() and "." not in named:
        known = ", ".join(FIXED + ADAPTIVE + STOCHASTIC)
        raise ValueError(f"--solvers {named}: choose from {known}, or name a class")
    spec = {"class_path": named} if isinstance(named, str) else named
    parser = FlowParser()
    parser.add_argument("--solvers", type=Solver)
    made = parser.instantiate(parser.parse_object({"solvers": deepcopy(spec)})).solvers
    return made, set(spec.get("init_args") or {})


def time_grids(configs: list[Any] | None) -> list[TimeGrid]:
    """The grids of a list of classes.

    Raises:
        ValueError: one is no grid.
    """
    parser = FlowParser()
    parser.add_argument("--grids", type=list[TimeGrid])
    specs = [{"class_path": c} if isinstance(c, str) else c for c in configs or []]
    return parser.instantiate(parser.parse_object({"grids": deepcopy(specs)})).grids


def whole_steps(solver: Any, nfe: int) -> int:
    """How many steps a number of evaluations pays for."""
    steps = nfe
    while steps > 0 and (replace(solver, num_steps=steps).evaluations or steps) > nfe:
        steps -= 1
    return steps

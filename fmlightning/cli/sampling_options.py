"""Options that `sample` and `evaluate` share: solver, guidance and path, by default those of the run."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from jsonargparse import Namespace

from fmlightning.cli.load import TrainedFlow
from fmlightning.cli.parser import FlowParser
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.schedule_transform import ScheduleTransformedField
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.solver import Solver, TrainedField
from fmlightning.runs.directory import Run

ODE_SOLVER = "fmlightning.flow.ODESolver"
FLAGS = ("--overwrite", "--compile")


def add_flag(parser: FlowParser, name: str, help: str) -> None:
    """An option that needs no value; `true` and `false` are taken too."""
    parser.add_argument(name, nargs="?", const=True, type=bool, default=False, help=help)


def add_path(parser: FlowParser) -> None:
    parser.add_argument(
        "--path", type=AffinePath | None, default=None,
        help="Path to sample along, where it is not the one the network was trained on, such as Trigonometric.",
    )  # fmt: skip


def path_of(options: Namespace) -> AffinePath | None:
    """The path that was named, built."""
    parser = FlowParser()
    add_path(parser)
    return parser.instantiate(Namespace(path=options.path)).path


def add_guide_model(parser: FlowParser) -> None:
    parser.add_argument(
        "--guidance.guide_model", type=str | None, default=None,
        help="A run of the same path, trained less or smaller, to be guided away from: autoguidance.",
    )  # fmt: skip


def set_own(parser: FlowParser, argv: Sequence[str], *groups: str) -> None:
    """Take the defaults of `solver` and `guidance` from the config of the run, where there is one."""
    model: dict[str, Any] = {}
    with suppress(FileNotFoundError):  # whoever loads the run will say so
        model = Run.open(run_in(argv)).config["model"]
    if "solver" in groups:
        solver = model.get("solver") or {}
        spec = solver if "class_path" in solver else {"class_path": ODE_SOLVER, "init_args": solver}
        parser.set_defaults({"solver": spec})
    for name, value in (model.get("guidance") or {}).items():
        if name in groups:  # YAML has no tuples, and a default is not parsed
            value = tuple(value) if isinstance(value, list) else value
            parser.set_defaults({f"guidance.{name}": value})


def run_in(argv: Sequence[str]) -> str:
    """The run in a command line: the word that is neither an option nor the value of one."""
    for before, word in pairwise(("", *argv)):
        takes = before.startswith("--") and "=" not in before and before not in FLAGS
        switch = before in FLAGS and word in ("true", "false")
        if not (word.startswith("-") or takes or switch):
            return word
    return ""


def given(argv: Sequence[str], group: str) -> set[str]:
    """The options of a group in a command line: {"method"} for --solver.method heun2."""
    words = (w.partition("=")[0] for w in argv if w.startswith(f"--{group}."))
    return {word.split(".")[1] for word in words}


def require_solver_use(solver: Solver, names: set[str]) -> None:
    """Refuse options that do nothing with the method.

    Raises:
        ValueError: one was given.
    """
    if not isinstance(solver, ODESolver):
        return
    idle = {"rtol", "atol"} if solver.fixed else {"num_steps"}
    if solver.method == "implicit_adams":  # which iterates to a tolerance in each of its steps
        idle.clear()
    if solver.method != "dpmpp_2m":
        idle.add("lower_order_final")
    for name in sorted(names & idle):
        other = {"num_steps": "heun2", "lower_order_final": "dpmpp_2m"}.get(name, "dopri5")
        raise ValueError(
            f"solver.{name}={getattr(solver, name)} does nothing with the method {solver.method}: leave it out, or "
            f"add --solver.method {other}"
        )


def require_guidance_use(flow: TrainedFlow, guidance: Any, names: set[str]) -> None:
    """Refuse options that do nothing, as the scale is 1 and was not given.

    Raises:
        ValueError: one was given.
    """
    if "scale" in names or flow.guidance.scale != 1:
        return
    for name in ("guide_model", "rescale", "t_range"):
        if name in names and (value := guidance[name]):
            raise ValueError(
                f"guidance.{name}={value} does nothing at guidance.scale=1: add --guidance.scale 2"
            )


def guided(flow: TrainedFlow, guidance: Guidance, path: AffinePath | None) -> TrainedField:
    """The field that samples follow: guided, and along another path where one is given.

    Raises:
        ValueError: the model was not trained for the guidance, or the paths do not fit.
    """
    field: Any = flow.guided(guidance)
    if path is None:
        return field
    if path == field.path:
        raise ValueError(f"--path {path} is the path of the run itself: leave it out")
    return ScheduleTransformedField(field, path)


def described(field: TrainedField) -> str:
    """The change of path in words, with the noise that it starts above."""
    assert isinstance(field, ScheduleTransformedField)
    low, high = field.t_range
    return (
        f"trained along {field.field.path}, sampled along {field.path} from t = {low:.4g} to {high:.4g}; "
        f"floor, the ratio of data to noise at the start: {field.floor:.2g}"
    )

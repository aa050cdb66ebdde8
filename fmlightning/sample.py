"""`fmlightning sample RUN`: samples of a trained run, as a picture and as numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from fmlightning.cli import quiet
from fmlightning.flow.ode import Method, ODESolver
from fmlightning.flow.sampling import sample
from fmlightning.parser import FlowParser
from fmlightning.plotting import plane, tile
from fmlightning.runs import Run, TrainedFlow, load_flow

DESCRIPTION = """Generate samples from a trained run.

Sample number k depends on the seed and k, not on the batch size or the device. Writes samples.npz
(x: the samples, index: their numbers, y: their labels) and samples.png into the output folder."""


def main(argv: list[str]) -> int:
    """Parse the command line, generate and write."""
    options = parse(argv)
    with quiet():
        flow = load_flow(options.run, ema=options.ema)
    solver = override(flow.solver, options)
    folder = Path(options.out) if options.out else Run.open(options.run).path / "samples"
    if (folder / "samples.npz").exists() and not options.overwrite:
        raise ValueError(
            f"{folder / 'samples.npz'} exists: choose another folder with --out, or add --overwrite true"
        )
    index = torch.arange(options.first, options.first + options.n)
    labels = chosen_labels(flow, index, options.label)
    x, nfe = draw(flow, solver, index, labels, options)
    write(folder, flow, x, index, labels)
    print(
        f"{options.n} samples: {folder / 'samples.npz'} and {folder / 'samples.png'}\n"
        f"{solver.method}, NFE {nfe} at batch size {min(options.batch_size, options.n)}"
    )
    return 0


def parse(argv: list[str]) -> Any:
    parser = FlowParser(
        prog="fmlightning sample",
        usage="%(prog)s RUN [--OPTION VALUE ...]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="Run directory, or a checkpoint in one.")
    parser.add_argument("--n", type=PositiveInt, default=64, help="How many samples.")
    parser.add_argument(
        "--out", type=str | None, default=None, help="Output folder; by default RUN/samples."
    )
    parser.add_argument(
        "--batch_size", type=PositiveInt, default=1024, help="Samples generated at once."
    )
    parser.add_argument(
        "--seed", type=NonNegativeInt | None, default=None, help="By default the run's."
    )
    parser.add_argument(
        "--first", type=NonNegativeInt, default=0, help="Number of the first sample."
    )
    parser.add_argument(
        "--label",
        type=NonNegativeInt | None,
        default=None,
        help="One class; by default all in turn.",
    )
    parser.add_argument(
        "--ema", type=bool, default=True, help="Averaged weights rather than raw ones."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace samples that exist.")
    parser.add_class_arguments(Solver, "solver", help="Changes to the run's own solver.")
    return parser.parse_args(argv)


class Solver:
    """Changes to the run's own solver.

    Args:
        method: euler, midpoint, heun2, rk4, dopri5, ...; null keeps the run's, as everywhere below.
        num_steps: intervals of a fixed-step method.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
    """

    def __init__(
        self,
        method: Method | None = None,
        num_steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        """A bundle of options, read as they are."""


def override(solver: ODESolver, options: Any) -> ODESolver:
    """The run's solver with what the command line changes."""
    changes = {k: v for k, v in options.solver.as_dict().items() if v is not None}
    return replace(solver, **changes)


def chosen_labels(flow: TrainedFlow, index: Tensor, label: int | None) -> Tensor | None:
    """The class of each sample: all in turn, or one."""
    if label is None:
        return index % flow.num_classes if flow.num_classes else None
    if label >= flow.num_classes:
        known = (
            f"0 to {flow.num_classes - 1}"
            if flow.num_classes
            else "none: the run is not conditional"
        )
        raise ValueError(f"--label {label} is not a class of this run; its classes are {known}")
    return torch.full_like(index, label)


def draw(
    flow: TrainedFlow, solver: ODESolver, index: Tensor, labels: Tensor | None, options: Any
) -> tuple[Tensor, int]:
    """The samples, and the largest NFE of a batch."""
    device = pick_device(options.device)
    field, seed = flow.field.to(device), flow.seed if options.seed is None else options.seed
    parts, nfe = [], 0
    with Progress() as progress:
        task = progress.add_task("sampling", total=len(index))
        for rows in torch.arange(len(index)).split(options.batch_size):
            y = None if labels is None else labels[rows].to(device)
            numbers = index[rows].to(device)
            solution = sample(field, flow.source, solver, numbers, flow.event_shape, seed=seed, y=y)
            parts.append(solution.x.cpu())
            nfe = max(nfe, solution.nfe)
            progress.advance(task, len(rows))
    return torch.cat(parts), nfe


def pick_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator()
        return (
            accelerator if accelerator and torch.accelerator.is_available() else torch.device("cpu")
        )
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} is not available here: {str(error).splitlines()[0]}"
        ) from error


def write(folder: Path, flow: TrainedFlow, x: Tensor, index: Tensor, labels: Tensor | None) -> None:
    """samples.npz, and samples.png where a sample can be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"x": x.numpy(), "index": index.numpy()}
    if labels is not None:
        arrays["y"] = labels.numpy()
    np.savez(folder / "samples.npz", **arrays)
    if len(flow.event_shape) == 3:
        columns = flow.num_classes if 1 < flow.num_classes <= 20 else min(10, len(x))
        pixels = (tile(x[: 20 * columns], columns) * 255).round().astype(np.uint8)
        scale = max(1, 640 // pixels.shape[1])
        picture = Image.fromarray(pixels)
        picture.resize(
            (pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST
        ).save(folder / "samples.png")
    elif flow.event_shape == (2,):
        plane(x).savefig(folder / "samples.png", dpi=130)

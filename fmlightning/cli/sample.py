"""`fmlightning sample RUN`: samples of a trained run, as a picture and as numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from fmlightning.cli.build import instantiate_data
from fmlightning.cli.device import as_asked, pick_device
from fmlightning.cli.load import TrainedFlow, away_from, load_flow
from fmlightning.cli.parser import FlowParser
from fmlightning.cli.quiet import quiet
from fmlightning.data.module import FlowData
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.models import TrainedField
from fmlightning.flow.precision import Precision
from fmlightning.flow.solvers.ode import Method, ODESolver
from fmlightning.flow.solvers.sampling import sample
from fmlightning.metrics.figures import plane, restored, tile
from fmlightning.runs.directory import Run

DESCRIPTION = """Generate samples from a trained run.

Sample number k depends on the seed and k, not on the batch size or the device. Writes samples.npz
(x: the samples, index: their numbers, y: their labels) and samples.png into the output folder."""


def main(argv: list[str]) -> int:
    """Parse the command line, generate and write."""
    options = parse(argv)
    with quiet():
        flow = load_flow(options.run, ema=options.ema)
        data = data_of(flow, options)
        require_use(flow, options)
        if options.guidance.weaker:
            flow = away_from(flow, options.guidance.weaker, options.ema, "--guidance.weaker")
    if flow.paired and data is not None:
        flow = replace(flow, source=data.starts)
    solver = override(flow.solver, options)
    guided(flow, options)  # refuses what the run was not trained for, before anything is written
    folder = Path(options.out) if options.out else Run.open(options.run).path / "samples"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if (folder / "samples.npz").exists() and not options.overwrite:
        raise ValueError(
            f"{folder / 'samples.npz'} exists: choose another folder with --out, or add --overwrite"
        )
    index = torch.arange(options.first, options.first + options.n)
    labels = chosen_labels(flow, index, options.label)
    if flow.paired and data is not None:
        labels = data.labels(index)
    size = min(options.batch_size, options.n)
    device = pick_device(options.device)
    flow = as_asked(flow, options.precision, options.compile, device, size)
    x, nfe = draw(flow, guided(flow, options), solver, index, labels, options, data)
    files = write(folder, flow, x, index, labels)
    if flow.paired and data is not None and x.ndim == 4:
        rows = index[:100] % len(data.held_out["x1"])
        x0, x1 = (data.held_out[name][rows] for name in ("x0", "x1"))
        restored(x0, x[:100], x1).savefig(folder / "samples.png", dpi=130)
    failed = index[~x.flatten(1).isfinite().all(1)]
    if len(failed):
        print(
            f"warning: {len(failed)} samples could not be integrated and are NaN: {failed[:10].tolist()}"
        )
    print(
        f"{options.n} samples: {' and '.join(map(str, files))}\n"
        f"{solver.method}, NFE {nfe} at batch size {size}"
    )
    return 0


def data_of(flow: TrainedFlow, options: Any) -> FlowData | None:
    """The data of the run, where samples start from it or are decoded by it.

    Raises:
        ValueError: a class was asked for that samples cannot choose.
    """
    if not (flow.paired or flow.latent):
        return None
    if flow.paired and options.label is not None:
        raise ValueError(
            f"--label {options.label}: samples of this run start from held-out x0 and have their labels; leave it out"
        )
    return instantiate_data(Run.open(options.run).config)


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
    parser.add_argument(
        "--precision", type=Precision | None, default=None,
        help="Of the network alone: fp64, fp32, bf16 or fp16; time and samples keep theirs. By default the run's.",
    )  # fmt: skip
    parser.add_argument(
        "--compile", type=bool, default=False, help="Compile the network, and say what that brings."
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace samples that exist.")
    parser.add_class_arguments(Solver, "solver", help="Changes to the run's own solver.")
    parser.add_class_arguments(Guide, "guidance", help="Changes to the run's own guidance.")
    return parser.parse_args(argv)


class Solver:
    """Changes to the run's own solver.

    Args:
        method: euler, midpoint, heun2, rk4, dpmpp_2m, dopri5, ...; null keeps the run's, as everywhere below.
        num_steps: intervals of a fixed-step method.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
        failed: raise, or nan, which keeps the other samples where some cannot be integrated.
        lower_order_final: whether the last step of dpmpp_2m is of order one.
    """

    def __init__(
        self,
        method: Method | None = None,
        num_steps: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        failed: Literal["raise", "nan"] | None = None,
        lower_order_final: bool | None = None,
    ) -> None:
        """A bundle of options, read as they are."""


class Guide:
    """Changes to the run's own guidance.

    Args:
        scale: 1 is none, more pushes samples towards their labels; null keeps the run's, as everywhere below.
        interval: the times between which it acts.
        rescale: the rescaled form of CFG-Zero*.
        zero_until: the time up to which the velocity is zero; CFG-Zero* takes 0.04.
        weaker: a run of the same path, trained less or smaller, to be guided away from: autoguidance.
    """

    def __init__(
        self,
        scale: float | None = None,
        interval: tuple[float, float] | None = None,
        rescale: bool | None = None,
        zero_until: float | None = None,
        weaker: str | None = None,
    ) -> None:
        """A bundle of options, read as they are."""


def guided(flow: TrainedFlow, options: Any) -> TrainedField:
    """The field that samples follow."""
    given = options.guidance.as_dict().items()
    changes = {k: v for k, v in given if v is not None and k != "weaker"}
    guidance: Guidance = replace(flow.guidance, **changes)
    return flow.guided(guidance)


def require_use(flow: TrainedFlow, options: Any) -> None:
    """Refuse options that would do nothing, as the scale is 1 and was not said to be."""
    if options.guidance.scale is not None or flow.guidance.scale != 1:
        return
    for name in ("weaker", "rescale", "interval"):
        if value := getattr(options.guidance, name):
            raise ValueError(
                f"guidance.{name}={value} does nothing at guidance.scale=1: add --guidance.scale 2"
            )


def override(solver: ODESolver, options: Any) -> ODESolver:
    """The run's solver with what the command line changes.

    Raises:
        ValueError: it changes what the method does not have.
    """
    changes = {k: v for k, v in options.solver.as_dict().items() if v is not None}
    changed = replace(solver, **changes)
    idle = {"rtol", "atol"} if changed.fixed else {"num_steps"}
    if changed.method == "implicit_adams":  # which iterates to a tolerance in each of its steps
        idle.clear()
    if changed.method != "dpmpp_2m":
        idle.add("lower_order_final")
    for name in sorted(changes.keys() & idle):
        other = {"num_steps": "heun2", "lower_order_final": "dpmpp_2m"}.get(name, "dopri5")
        raise ValueError(
            f"solver.{name}={changes[name]} does nothing with the method {changed.method}: leave it out, or add "
            f"--solver.method {other}"
        )
    return changed


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
    flow: TrainedFlow,
    field: TrainedField,
    solver: ODESolver,
    index: Tensor,
    labels: Tensor | None,
    options: Any,
    data: FlowData | None = None,
) -> tuple[Tensor, int]:
    """The samples, decoded where they are latents, and the largest NFE of a batch."""
    device = pick_device(options.device)
    field, seed = field.to(device), flow.seed if options.seed is None else options.seed  # type: ignore[attr-defined]
    parts, nfe = [], 0
    with Progress() as progress:
        task = progress.add_task("sampling", total=len(index))
        for rows in torch.arange(len(index)).split(options.batch_size):
            y = None if labels is None else labels[rows].to(device)
            numbers = index[rows].to(device)
            solution = sample(field, flow.source, solver, numbers, flow.event_shape, seed=seed, y=y)
            parts.append((solution.x if data is None else data.decode(solution.x)).cpu())
            nfe = max(nfe, solution.nfe)
            progress.advance(task, len(rows))
    return torch.cat(parts), nfe


def write(
    folder: Path, flow: TrainedFlow, x: Tensor, index: Tensor, labels: Tensor | None
) -> list[Path]:
    """samples.npz, and samples.png where a sample can be seen; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"x": x.numpy(), "index": index.numpy()}
    if labels is not None:
        arrays["y"] = labels.numpy()
    numbers, seen = folder / "samples.npz", folder / "samples.png"
    np.savez(numbers, **arrays)
    if x.ndim == 4:
        columns = flow.num_classes if 1 < flow.num_classes <= 20 else min(10, len(x))
        pixels = (tile(x[: 20 * columns], columns) * 255).round().astype(np.uint8)
        scale = max(1, 640 // pixels.shape[1])
        picture = Image.fromarray(pixels)
        picture.resize(
            (pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST
        ).save(seen)
    elif flow.event_shape == (2,):
        plane(x).savefig(seen, dpi=130)
    else:
        return [numbers]
    return [numbers, seen]

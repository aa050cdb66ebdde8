"""`fmlightning sample RUN`: samples of a trained run, as an image and as numbers."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from fmlightning.cli.build import instantiate_data
from fmlightning.cli.device import pick_device, prepare_flow
from fmlightning.cli.load import TrainedFlow, away_from, load_flow
from fmlightning.cli.parser import FlowParser
from fmlightning.cli.quiet import quiet
from fmlightning.cli.sampling_options import (
    add_flag,
    add_guide_model,
    add_path,
    described,
    given,
    guided,
    require_guidance_use,
    require_solver_use,
    set_own,
)
from fmlightning.data.module import FlowData
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.labels import LabelOrder, balanced_labels, reference_labels
from fmlightning.flow.precision import Precision
from fmlightning.flow.shapes import flat
from fmlightning.flow.solvers.sampling import sample
from fmlightning.flow.solvers.solution import Solution
from fmlightning.flow.solvers.solver import Solver, TrainedField
from fmlightning.metrics.evaluator import Evaluator, as_it_is
from fmlightning.metrics.figures import plane, restored, tile
from fmlightning.runs.directory import Run
from fmlightning.runs.files import atomic_write

DESCRIPTION = """Generate samples from a trained run.

Sample number k depends on the seed and k, not on the batch size or the device. Writes samples.npz
(x: the samples, index: their numbers, y: their labels) and samples.png into the output folder."""


def main(argv: list[str]) -> int:
    """Parse the command line, generate and write."""
    options = parse(argv)
    with quiet():
        flow = load_flow(options.run, ema=options.ema)
        data = data_of(flow, options)
        require_guidance_use(flow, options.guidance, given(argv, "guidance"))
        if weaker := options.guidance.pop("guide_model"):
            flow = away_from(flow, weaker, options.ema, "--guidance.guide_model")
    if flow.paired and data is not None:
        flow = replace(flow, source=data.source_points)
    made = parser_of(argv).instantiate(options)
    solver, guidance, path = made.solver, made.guidance, made.path
    require_solver_use(solver, given(argv, "solver"))
    field = guided(flow, guidance, path)  # refuses what does not fit, before anything is written
    folder = Path(options.out) if options.out else Run.open(options.run).path / "samples"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if (folder / "samples.npz").exists() and not options.overwrite:
        raise ValueError(
            f"{folder / 'samples.npz'} exists: choose another folder with --out, or add --overwrite"
        )
    index = torch.arange(options.first, options.first + options.n)
    labels = labels_of(flow, data, options)
    size = min(options.batch_size, options.n)
    device = pick_device(options.device)
    flow = prepare_flow(flow, options.precision, options.compile, device)
    x, nfe = draw(flow, guided(flow, guidance, path), solver, index, labels, options, data)
    files = write(folder, flow, x, index, labels(index))
    if flow.paired and data is not None and x.ndim == 4:
        rows = index[:100] % len(data.held_out["x1"])
        x0, x1 = (data.held_out[name][rows] for name in ("x0", "x1"))
        restored(x0, x[:100], x1).savefig(folder / "samples.png", dpi=130)
    if path is not None:
        print(described(field))
    failed = index[~flat(x).isfinite().all(1)]
    if len(failed):
        print(
            f"warning: {len(failed)} samples could not be integrated and are NaN: {failed[:10].tolist()}"
        )
    print(
        f"{options.n} samples: {' and '.join(map(str, files))}\n"
        f"{solver.name}, NFE {nfe} at batch size {size}"
    )
    return 0


def data_of(flow: TrainedFlow, options: Any) -> FlowData | None:
    """The data of the run, where samples start from it or are decoded by it.

    Raises:
        ValueError: a class was asked for that samples cannot choose.
    """
    config = Run.open(options.run).config
    target = config["data"].get("init_args", config["data"]).get("target") or {}
    # a checkpoint of before does not hold the units
    lost = flow.units is None and (target.get("init_args") or {}).get("standardize", False)
    if not (flow.paired or flow.latent or lost):
        return None
    if flow.paired and options.label is not None:
        raise ValueError(
            f"--label {options.label}: samples of this run start from held-out x0 and have their labels; leave it out"
        )
    return instantiate_data(config)


def parse(argv: list[str]) -> Any:
    """The options, with the solver and the guidance of the run for their defaults."""
    return parser_of(argv).parse_args(argv)


def parser_of(argv: list[str]) -> FlowParser:
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
        help="One class; by default all.",
    )
    parser.add_argument(
        "--labels",
        type=LabelOrder | None,
        default=None,
        help="reference, as frequent as in the training data (the default), or balanced, each class in turn.",
    )
    parser.add_argument(
        "--ema", type=bool, default=True, help="Averaged weights rather than raw ones."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument(
        "--precision", type=Precision | None, default=None,
        help="Of the network alone: fp64, fp32, bf16 or fp16; time and samples keep theirs. By default the run's.",
    )  # fmt: skip
    add_flag(parser, "--compile", "Compile the network, and measure what that brings.")
    add_flag(parser, "--overwrite", "Replace samples that exist.")
    parser.add_argument(
        "--solver", type=Solver, help="ODESolver, SDESolver, ...; by default the run's own."
    )
    parser.add_class_arguments(Guidance, "guidance", help="By default the run's own.")
    add_guide_model(parser)
    add_path(parser)
    set_own(parser, argv, "solver", *(f.name for f in fields(Guidance)))
    return parser


def labels_of(
    flow: TrainedFlow, data: FlowData | None, options: Any
) -> Callable[[Tensor], Tensor | None]:
    """The class of each sample number: as frequent as in the reference, in turn, one, or that of a given x0.

    Raises:
        ValueError: the run does not have the class, or has no choice of labels.
    """
    label, order = options.label, options.labels
    if order and (flow.paired or not flow.num_classes or label is not None):
        reason = "samples of this run have the labels of the held-out x0 they start from"
        reason = reason if flow.paired else "this run is not conditional"
        reason = f"--label {label} is the label of all samples" if label is not None else reason
        raise ValueError(f"--labels {order} does nothing: {reason}; leave it out")
    if flow.paired and data is not None:
        return data.labels
    if label is None:
        return class_labels(flow, order or "reference")
    if label >= flow.num_classes:
        known = (
            f"0 to {flow.num_classes - 1}"
            if flow.num_classes
            else "none: the run is not conditional"
        )
        raise ValueError(f"--label {label} is not a class of this run; its classes are {known}")
    return lambda index: torch.full_like(index, label)


def class_labels(flow: TrainedFlow, order: LabelOrder) -> Callable[[Tensor], Tensor | None]:
    """All classes: as frequent as in the reference, or in turn."""
    if not flow.num_classes:
        return lambda index: None
    if order == "balanced":
        return partial(balanced_labels, num_classes=flow.num_classes)
    if flow.class_counts is None:
        print(
            "note: this checkpoint is of an earlier version and does not hold how frequent its classes are: samples "
            "take them in turn, as with --labels balanced"
        )
        return partial(balanced_labels, num_classes=flow.num_classes)
    return partial(reference_labels, counts=flow.class_counts)


def draw(
    flow: TrainedFlow,
    field: TrainedField,
    solver: Solver,
    index: Tensor,
    labels: Callable[[Tensor], Tensor | None],
    options: Any,
    data: FlowData | None = None,
) -> tuple[Tensor, int]:
    """The samples, decoded where they are latents, and the largest NFE of a batch."""
    device = pick_device(options.device)
    field, seed = field.to(device), flow.seed if options.seed is None else options.seed  # type: ignore[attr-defined]

    def solve(index: Tensor, y: Tensor | None) -> Solution:
        return sample(field, flow.source, solver, index, flow.event_shape, seed=seed, y=y)

    units = as_it_is if flow.units is None else flow.units.to_data
    decode = units if data is None else data.decode
    evaluator = Evaluator(solve, device, options.batch_size, labels, decode)
    parts, nfe = [], 0
    with Progress() as progress:
        task = progress.add_task("sampling", total=len(index))
        for block, _ in evaluator.blocks(index):
            assert block.solution is not None
            parts.append(block.x.cpu())
            nfe = max(nfe, block.solution.nfe)
            progress.advance(task, len(block.x))
    return torch.cat(parts), nfe


def by_class(x: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Images in rows with a column for each class, white where a class has no more; at most 20 rows."""
    columns = [x[y == k][:20] for k in range(num_classes)]
    rows = max(len(column) for column in columns)
    shown = torch.full((rows, num_classes, *x.shape[1:]), 1.0)
    for k, column in enumerate(columns):
        shown[: len(column), k] = column
    return shown.flatten(0, 1)


def write(
    folder: Path, flow: TrainedFlow, x: Tensor, index: Tensor, labels: Tensor | None
) -> list[Path]:
    """samples.npz, and samples.png where a sample can be seen; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"x": x.numpy(), "index": index.numpy()}
    if labels is not None:
        arrays["y"] = labels.numpy()
    numbers, seen = folder / "samples.npz", folder / "samples.png"
    with atomic_write(numbers) as file:
        np.savez(file, **arrays)
    if x.ndim == 4:
        columns = flow.num_classes if 1 < flow.num_classes <= 20 else min(10, len(x))
        several = labels is not None and columns == flow.num_classes and len(labels.unique()) > 1
        shown = (
            by_class(x, labels, columns) if several and labels is not None else x[: 20 * columns]
        )
        pixels = (tile(shown, columns) * 255).round().astype(np.uint8)
        scale = max(1, 640 // pixels.shape[1])
        picture = Image.fromarray(pixels)
        size = pixels.shape[1] * scale, pixels.shape[0] * scale
        with atomic_write(seen) as file:
            picture.resize(size, Image.Resampling.NEAREST).save(file, format="PNG")
    elif flow.event_shape == (2,):
        with atomic_write(seen) as file:
            plane(x).savefig(file, format="png", dpi=130)
    else:
        return [numbers]
    return [numbers, seen]

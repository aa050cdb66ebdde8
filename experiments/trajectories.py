"""Draw the ways that the samples of several runs take, side by side: in the plane as lines, images over time.

    python experiments/trajectories.py --out FILE TITLE=RUN [TITLE=RUN ...]

A RUN may be a sweep's folder with a cell of it, `runs/solvers:field=VP,seed=0`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from fmlightning.cli.load import load_flow
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import sample
from fmlightning.metrics.figures import frame, tile
from fmlightning.runs.directory import Run

POINTS, LINES, STATES = 2000, 120, 41
IMAGES, FRAMES = 8, 9


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--method", default="midpoint", help="with 100 steps")
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    options = parser.parse_args(argv)
    named = dict(text.split("=", 1) for text in options.runs)
    draw({t: states(run_of(where), options.method) for t, where in named.items()}).savefig(
        options.out, dpi=110
    )
    print(f"written: {options.out}")
    return 0


def run_of(where: str) -> Path:
    """A run directory, or the one of a cell of a sweep."""
    place, colon, cell = where.partition(":")
    if not colon:
        return Path(place)
    wanted = dict(part.split("=", 1) for part in cell.split(","))
    for row in json.loads((Path(place) / "sweep.json").read_text())["cells"]:
        labels = {**row["axes"], "seed": row["seed"]}
        if all(str(labels[axis]) == value for axis, value in wanted.items()):
            return Path(row["run"])
    raise ValueError(f"{place}/sweep.json has no cell {cell}")


def states(run: Path, method: str) -> Tensor:
    """Where samples are at equal times, (K, N, *S)."""
    flow = load_flow(run, ema=Run.open(run).config["ema"]["decay"] > 0)
    plane = len(flow.event_shape) == 1
    index = torch.arange(POINTS if plane else IMAGES)
    y = None if not flow.num_classes else index % flow.num_classes
    solver = ODESolver(method, num_steps=100)  # type: ignore[arg-type]
    return sample(
        flow.field, flow.source, solver, index, flow.event_shape,
        seed=0, y=y, save_at=STATES if plane else FRAMES,
    ).states  # fmt: skip


def draw(found: dict[str, Tensor]) -> Figure:
    """A panel for each run, all on the same scale."""
    ends = torch.cat([x[-1] for x in found.values()])
    figure = Figure(figsize=(3.4 * len(found), 3.7), layout="constrained")
    for axis, (title, x) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        lines(axis, x, ends) if x.ndim == 3 else strip(axis, x)
        axis.set(title=title, xticks=[], yticks=[])
    return figure


def lines(axis: Axes, x: Tensor, ends: Tensor) -> None:
    """Starts grey, ends dark, and the ways of some in between; the frame is that of `ends`."""
    axis.scatter(*x[0].T, s=1, color="#b8b8b8", linewidths=0)
    ways = list(x[:, :LINES].transpose(0, 1).numpy())
    axis.add_collection(LineCollection(ways, colors="#00798c", linewidths=0.5, alpha=0.6))
    axis.scatter(*x[-1].T, s=1.5, color="#1d1d1d", linewidths=0)
    left, right, bottom, top = frame(ends)  # a source of standard deviation 50 would hide the rest
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def strip(axis: Axes, x: Tensor) -> None:
    """A sample a row, time from left to right."""
    # noise is far outside of [-1, 1]: each time has its own scale
    scale = x.flatten(1).abs().quantile(0.99, 1).clamp(min=1).reshape(-1, *[1] * (x.ndim - 1))
    axis.imshow(tile((x / scale).transpose(0, 1).flatten(0, 1), len(x)), cmap="gray")


if __name__ == "__main__":
    sys.exit(main())

"""The error of solvers against what they cost, on velocities that are exact: a table and a figure.

python experiments/solvers_exact/errors.py [--out DIR] [--points N]

Nothing is trained: the field is that of a Gaussian mixture. The error of a sample is its distance from where dopri8 at
1e-10 in float64 takes it, divided by the size of a data point. Of the samples the median is taken: among 200 digits a
few start so near to a watershed that any solver takes them to another digit, and a mean would speak of those alone.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from fmlightning.flow.keys import Key
from fmlightning.flow.paths.schedules import Linear, VariancePreserving
from fmlightning.flow.solvers.ode import LogSNRGrid, ODESolver
from fmlightning.flow.solvers.time_grids import TimeGrid, UniformGrid
from fmlightning.flow.theory.mixture import GaussianMixture, MixturePath
from fmlightning.flow.toys import EightGaussians

STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4, "ab2": 1, "dpmpp_2m": 1}
EQUAL, LOG_SNR = UniformGrid(), LogSNRGrid()
BUDGETS = 4, 8, 16, 32, 64, 128
TOLERANCES = 1e-1, 1e-2, 1e-3, 1e-4, 1e-5
CURVES: tuple[tuple[str, TimeGrid], ...] = (
    ("euler", EQUAL),
    ("midpoint", EQUAL),
    ("heun2", EQUAL),
    ("rk4", EQUAL),
    ("ab2", EQUAL),
    ("dpmpp_2m", EQUAL),
    ("heun2", LOG_SNR),
    ("dpmpp_2m", LOG_SNR),
)


class Point(NamedTuple):
    """One solve: on which curve, at what cost, with what error."""

    curve: str
    nfe: int
    error: float


def paths() -> dict[str, MixturePath]:
    """The exact fields."""
    toy = GaussianMixture.of_eight_gaussians(EightGaussians())
    images = torch.from_numpy(load_digits().data[:200] / 8 - 1)
    digits = GaussianMixture(torch.full((200,), 1 / 200, dtype=torch.float64), images, 0.1)
    return {
        "8 Gaussians, linear path": toy.along(Linear()),
        "8 Gaussians, variance preserving path": toy.along(VariancePreserving()),
        "200 digits (8 x 8), linear path": digits.along(Linear()),
        "200 digits (8 x 8), variance preserving path": digits.along(VariancePreserving()),
    }


def errors(path: MixturePath, x0: Tensor) -> Iterator[Point]:
    """All solvers on one field."""
    ends = path.t_range
    exact = ODESolver("dopri8", rtol=1e-10, atol=1e-10).solve(path, x0, *ends).x
    size = exact.square().sum(1).mean().sqrt()

    def point(curve: str, solver: ODESolver) -> Point:
        solution = solver.solve(path, x0, *ends)
        return Point(curve, solution.nfe, float((solution.x - exact).norm(dim=1).median() / size))

    for method, grid in CURVES:
        name = method if grid is EQUAL else f"{method}, equal log-SNR steps"
        for nfe in BUDGETS:
            steps = nfe // STAGES[method] - (method == "ab2")  # its first step takes two
            yield point(name, ODESolver(method, steps, grid=grid))  # type: ignore[arg-type]
    for tolerance in TOLERANCES:
        yield point("dopri5", ODESolver("dopri5", rtol=tolerance, atol=tolerance))


def figure(found: dict[str, list[Point]]) -> Figure:
    """A panel for each field, a curve for each solver."""
    picture = Figure(figsize=(11, 8.4), layout="constrained")
    for axis, (title, points) in zip(picture.subplots(2, 2).flat, found.items(), strict=True):
        for k, curve in enumerate(dict.fromkeys(p.curve for p in points)):
            on_it = sorted((p.nfe, p.error) for p in points if p.curve == curve)
            dashed = "--" if "log-SNR" in curve else ":" if curve == "dopri5" else "-"
            of_method = (
                [m for m, _ in CURVES].index(curve.split(",")[0]) if curve != "dopri5" else 9
            )
            axis.loglog(
                *zip(*on_it, strict=True), dashed, marker="o", markersize=3.5, linewidth=1.4,
                color=f"C{of_method}", label=curve, zorder=10 - k / 10,
            )  # fmt: skip
        axis.set(title=title, xlabel="evaluations of the field", ylabel="relative error, median")
        axis.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    picture.axes[0].legend(fontsize=8, loc="lower left")
    return picture


def table(points: list[Point]) -> str:
    """Errors by solver and budget, the smallest of each budget bold; dopri5 with the NFE it took."""
    lines = ["| solver | " + " | ".join(f"NFE {n}" for n in BUDGETS) + " |", "|---" * 7 + "|"]
    fixed = [p for p in points if p.curve != "dopri5"]
    best = {n: min(p.error for p in fixed if p.nfe == n) for n in BUDGETS}
    for curve in dict.fromkeys(p.curve for p in fixed):
        row = [p for p in fixed if p.curve == curve]
        cells = [
            f"**{p.error:.1e}**" if p.error == best[n] else f"{p.error:.1e}"
            for n, p in zip(BUDGETS, row, strict=True)
        ]
        lines.append(f"| {curve} | " + " | ".join(cells) + " |")
    adaptive = ", ".join(f"{p.error:.1e} with {p.nfe}" for p in points if p.curve == "dopri5")
    return "\n".join(lines) + f"\n\ndopri5: {adaptive}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--points", type=int, default=128)
    flags = parser.parse_args()
    found = {}
    for title, path in paths().items():
        D = path.mixture.means.shape[1]
        std = path.path.std(torch.tensor(path.t_range[0], dtype=torch.float64))
        generator = Key(0).generator()
        x0 = std * torch.randn(flags.points, D, generator=generator, dtype=torch.float64)
        found[title] = list(errors(path, x0))
        print(f"## {title}\n\n{table(found[title])}", flush=True)
    flags.out.mkdir(parents=True, exist_ok=True)
    figure(found).savefig(flags.out / "errors.png", dpi=110)
    tables = "\n".join(f"## {title}\n\n{table(points)}" for title, points in found.items())
    (flags.out / "table.md").write_text(tables)


if __name__ == "__main__":
    main()

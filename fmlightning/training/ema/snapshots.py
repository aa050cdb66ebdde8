"""The power-function averages of a run at some of its steps, one file a step, and another width made of them.

A file is whole or not there. A run that is killed and goes on writes the same files again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmlightning.runs.checksum import append_checksum, recorded_step, verify_checksum
from fmlightning.runs.files import atomic_write, explain_write_errors
from fmlightning.training.ema.power import Profile, coefficients, exponent, fit_error

FOLDER = "ema"
WIDTH = "sigma_rel="

Averages = Mapping[str, Mapping[str, Tensor]]
"""Weights, by the name of an average and the name of a parameter."""


def write_snapshot(run: Path, step: int, averages: Averages) -> Path:
    """Write the averages of a step."""
    path = run / FOLDER / f"{step:08d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_write_errors(path), atomic_write(path) as file:
        torch.save({name: dict(shadow) for name, shadow in averages.items()}, file)
        append_checksum(file, step)
    return path


def read_snapshot(path: Path) -> Averages:
    """The averages of a file.

    Raises:
        ValueError: it is damaged.
    """
    with path.open("rb") as file:
        verify_checksum(file, path)
        return torch.load(file, map_location="cpu", weights_only=True)


def snapshots(run: Path) -> list[tuple[int, Path]]:
    """The files of a run with their steps, in order."""
    files = sorted(path for path in (run / FOLDER).glob("*.pt") if path.stem.isdigit())
    return [(recorded_step(path) or int(path.stem), path) for path in files]


@dataclass(frozen=True)
class Reconstruction:
    """An average of another width.

    Attributes:
        weights: the parameters.
        step: where it ends.
        count: of how many snapshots it was made.
        fit_error: how far its profile is from the one that was asked for, relative.
    """

    weights: dict[str, Tensor]
    step: int
    count: int
    fit_error: float


def reconstruct(run: Path, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """The average of some width up to a step, by default that of the last snapshot.

    Raises:
        ValueError: there are no snapshots, or none of the step or one before it.
    """
    files = snapshots(run)
    if not files:
        raise ValueError(
            f"{run} has no snapshots in {run / FOLDER}: train with --ema.sigma_rel [0.05,0.10]"
        )
    step = files[-1][0] if step is None else step
    if not files[0][0] <= step <= files[-1][0]:
        raise ValueError(
            f"step={step} must lie between the first snapshot of {run}, {files[0][0]}, and the last, {files[-1][0]}"
        )
    names = list(read_snapshot(files[0][1]))
    gammas = [exponent(float(name.removeprefix(WIDTH))) for name in names]
    profiles = [Profile(t, gamma) for t, _ in files for gamma in gammas]
    wanted = Profile(step, exponent(sigma_rel))
    x = coefficients(profiles, wanted)
    rows = x.reshape(len(files), len(names))
    weights = combination([path for _, path in files], rows, names)
    return Reconstruction(weights, step, len(profiles), fit_error(profiles, wanted, x))


def combination(paths: Sequence[Path], rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The sum of the averages in some files, each with its coefficient; one file in memory at a time."""
    total: dict[str, Any] = {}
    for path, row in zip(paths, rows.tolist(), strict=True):
        averages = read_snapshot(path)
        for name, factor in zip(names, row, strict=True):
            for key, value in averages[name].items():
                total[key] = total.get(key, 0) + factor * value.double()
    return {key: value.float() for key, value in total.items()}

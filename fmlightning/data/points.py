"""Points of one's own, read from a file: as data or as the source, like any toy distribution."""

import copy
import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Source

SHARES = {"train": (0.0, 0.8), "reference": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
"""The part of the rows, in a fixed random order, that each split draws from."""


LARGEST = 1e18
"""The largest number whose square, and the sum of some squares, is one of float32 too."""


@dataclass(frozen=True)
class Units:
    """The units of data that a flow sees standardised: data = mean + std * x, column by column."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_data(self, x: Tensor) -> Tensor:
        """Points in the units of the data, (B, D)."""
        return x.new_tensor(self.mean) + x.new_tensor(self.std) * x

    def from_data(self, x: Tensor) -> Tensor:
        """Standardised points, (B, D)."""
        return (x - x.new_tensor(self.mean)) / x.new_tensor(self.std)

    @property
    def log_det(self) -> float:
        """log |d data / dx| in nats: what a log-density is lower by in the units of the data."""
        return float(np.log(self.std).sum())


class PointsFile(Source):
    """The rows of a .npy or .csv file, each as likely as any other.

    As data, training draws from 80 % of the rows, and validation and test from 10 % each that it never sees. As
    the source, all rows are drawn from.

        fmlightning fit --config configs/toy/moons.yaml --data.target PointsFile --data.target.file my_points.csv

    Args:
        file: an array (N, D), or a table of numbers with commas between and, if it has one, a line of names.
        standardize: whether training sees each column shifted and scaled to mean 0 and standard deviation 1; samples,
            scores, likelihoods and figures are in the units of the file all the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no table of finite numbers, or too few rows to share out.
    """

    num_uniforms = 1

    def __init__(self, file: str, standardize: bool = False) -> None:
        self.file, self.standardize = file, standardize
        points = read(Path(file).expanduser())
        limit = float(np.finfo(np.float32).max) if standardize else LARGEST
        if (largest := np.abs(points).max()) > limit:
            raise ValueError(
                f"file={file} holds {largest:.3g}, and float32 takes at most {limit:.3g} here; give its columns in "
                "other units" + ("" if standardize else ", or set standardize=true")
            )
        self.units = units_of(points, file) if standardize else None
        """The units of the file, where points are standardised."""
        if self.units:
            points = (points - np.array(self.units.mean)) / np.array(self.units.std)
        self.points = torch.from_numpy(points)
        self.event_shape = (points.shape[1],)

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.points.numpy().tobytes()).hexdigest()[:8]
        return f"PointsFile({len(self.points)} points, {digest})"  # wherever the file lies

    def transform(self, u: Tensor, z: Tensor) -> Tensor:
        n = len(self.points)
        chosen = (n * u[:, 0].double()).long().clamp(max=n - 1)
        return self.points.to(z.device, z.dtype)[chosen.to(z.device)]

    def part(self, split: str) -> "PointsFile":
        n, (low, high) = len(self.points), SHARES[split]
        order = torch.randperm(n, generator=Key(0).fold("points file").generator())
        part = copy.copy(self)
        part.points = self.points[order[round(n * low) : round(n * high)]]
        return part

    def in_data_units(self) -> "PointsFile":
        """The rows as the file has them."""
        return PointsFile(self.file)


def read(path: Path) -> np.ndarray:
    """The table of numbers in a file, (N, D), float64."""
    if not path.is_file():
        raise FileNotFoundError(f"file={path}: there is no such file; name a .npy or .csv file")
    readers = {".npy": read_npy, ".csv": read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"file={path} must be a .npy or .csv file, not {path.suffix or 'without ending'}"
        )
    points = readers[path.suffix.lower()](path)
    if points.ndim != 2 or points.shape[1] < 1 or len(points) < 10:
        raise ValueError(
            f"file={path} holds an array of shape {points.shape}; what is needed is (N, D): a point a row, and at "
            "least 10 of them, since a tenth each is held out for validation and test"
        )
    wrong = np.argwhere(~np.isfinite(points))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"file={path}: {len(wrong)} numbers are not finite, the first in row {row}, column {column} "
            "(both from 0); leave such rows out"
        )
    return points


def read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)  # a pickle could run code
        if np.iscomplexobj(array):
            raise ValueError("its numbers are complex; give real and imaginary parts as columns")
        return np.ascontiguousarray(array, dtype=np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"file={path} is not an array of numbers: {error}") from error


def read_csv(path: Path) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"file={path} is not a table of text: {error}") from error
    if rows and not numeric(rows[0]):
        rows = rows[1:]  # the names of the columns
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or not numeric(row):
            raise ValueError(
                f"file={path}: row {number} (from 0, names aside) is {','.join(row)[:60]!r}; every row must hold "
                f"{len(rows[0])} numbers with commas between"
            )
    return np.array(rows, dtype=np.float64) if rows else np.empty((0, 0))


def numeric(row: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in row])
    except ValueError:
        return False


def units_of(points: np.ndarray, file: str) -> Units:
    """Mean and standard deviation of each column.

    Raises:
        ValueError: a column is constant.
    """
    std = points.std(0)
    if not (std > 0).all():
        raise ValueError(
            f"standardize=true: column {int(std.argmin())} (from 0) of {file} is constant; leave it out"
        )
    return Units(tuple(points.mean(0).tolist()), tuple(std.tolist()))

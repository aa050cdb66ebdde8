"""A table of what this library computes, to the last bit: a later version has to compute the same.

    python tests/replay/table.py --write                 # add this machine to digests.json, and float64.json
    python tests/replay/table.py --check                 # compute all again and compare
    python tests/replay/table.py --check --only 'path/*'
    python tests/replay/table.py --check --demo          # the runs of `make demo`, in demo.json

`digests.json` has a digest of each result, or its numbers, under the version of torch and the processor: only there
can bits be compared; so has `demo.json`. `float64.json` has a few numbers of the weights of each training in double
precision, where rounding is far below what any change would do, for every machine.

A digest reads tensors in the order of their file and never by name, so that parameters may be renamed.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: sums are in another order on two threads

import argparse
import csv
import hashlib
import inspect
import io
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import numpy as np
import torch
from torch import Tensor

from fmlightning.__main__ import main as fmlightning
from fmlightning.cli.load import load_flow
from fmlightning.flow import (
    Curves,
    Gaussian,
    GaussianMixture,
    Linear,
    MarginalPreservingSDE,
    Moons,
    PairedSource,
    SDESolver,
    Source,
)
from fmlightning.flow.keys import Key, KeyedStreams
from fmlightning.flow.likelihood import likelihood
from fmlightning.flow.solvers.brownian import BrownianPath

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
DIGESTS, FLOAT64, DEMO = (HERE / f"{name}.json" for name in ("digests", "float64", "demo"))

Result = str | dict[str, Any]
"""A digest, or numbers by name."""


def machine() -> str:
    """The key of `digests.json`: torch, and what decides how it rounds."""
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if (info := Path("/proc/cpuinfo")).is_file():
        pairs = [line.split(":") for line in info.read_text().split("\n\n")[0].splitlines()]
        about = {k.strip(): v[0].strip() for k, *v in pairs if v}
        # the libraries below torch choose their kernels by the model as well
        processor += [about[k] for k in ("vendor_id", "cpu family", "model") if k in about]
    return f"{torch.__version__}|{' '.join(processor)}"


def digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits for tensors in their order, with types and shapes."""
    total = hashlib.sha256()
    for x in tensors:
        total.update(f"{x.dtype} {tuple(x.shape)}".encode())
        total.update(x.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


# -- running ------------------------------------------------------------------------------------------


DRAWS = (
    Source.sample,
    Source.sample_keyed,
    PairedSource.sample_keyed,
    KeyedStreams.uniform,
    KeyedStreams.normal,
)
"""What draws in float32 unless it is told otherwise, `--trainer.precision` or not."""


@contextmanager
def double_draws() -> Iterator[None]:
    """Weights, points and noise in float64 from the start: in float32 they round as the processor likes."""
    functions = [inspect.unwrap(f) for f in DRAWS]
    single, default = [f.__defaults__ for f in functions], torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for f in functions:
        f.__defaults__ = tuple(
            torch.float64 if v is torch.float32 else v for v in f.__defaults__ or ()
        )
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        for f, defaults in zip(functions, single, strict=True):
            f.__defaults__ = defaults


class Workshop:
    """A folder in which each training is run when it is first asked for.

    Args:
        folder: an empty one, or a new one.
        double: whether to draw and train in float64.
    """

    def __init__(self, folder: Path, double: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.double = folder, double
        self.made: dict[str, Path] = {}

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """One thread, and nothing that is read or written outside the folder."""
        wandb = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
        changed = {name: str(self.folder / "wandb") for name in wandb} | {
            "FMLIGHTNING_RUNS": str(self.folder / "runs"),
            "FMLIGHTNING_CACHE": str(self.folder / "cache"),
            "WANDB_MODE": "offline",
        }
        threads = torch.get_num_threads()
        with patch.dict(os.environ, changed), double_draws() if self.double else nullcontext():
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def command(self, *args: str) -> None:
        """Run a command in this process, which is silent unless it fails.

        Raises:
            RuntimeError: it failed, with what it printed.
        """
        shown = io.StringIO()
        with self.surroundings(), redirect_stdout(shown), redirect_stderr(shown):
            status = fmlightning(list(args))
        if status:
            raise RuntimeError(f"{' '.join(args)}: exit status {status}\n{shown.getvalue()}")

    def fit(self, name: str, training: cases.Training) -> Path:
        """The run directory of a training."""
        if name not in self.made:
            folder = self.folder / "runs" / name
            config = REPOSITORY / cases.CONFIGS / f"{training.config}.yaml"
            options = [o.replace(cases.POINTS, str(self.points)) for o in training.options]
            double = cases.DOUBLE if self.double else ()
            self.command(
                "fit", "--config", str(config), *cases.FIT, cases.RUN_DIR.format(folder), *options, *double
            )  # fmt: skip
            self.made[name] = folder
        return self.made[name]

    @property
    def points(self) -> Path:
        """A file of points in three dimensions."""
        path = self.folder / cases.POINTS
        if not path.exists():
            generator = Key(0).fold("points").generator()
            np.save(path, torch.randn(500, 3, generator=generator, dtype=torch.float64).numpy())
        return path


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def network(run: Path) -> list[Tensor]:
    """The weights of a run, in their order."""
    return list(checkpoint(run)["state_dict"].values())


def averages(run: Path) -> list[Tensor]:
    """All averages of a run's weights, one after another."""
    state = checkpoint(run)["callbacks"]["EMA"]
    return [x for one in (state, *state["others"].values()) for x in one["shadow"].values()]


# -- what is computed -----------------------------------------------------------------------------------


def weights(name: str, training: cases.Training, shop: Workshop) -> str:
    """Network and averages after training."""
    run = shop.fit(name, training)
    return digest([*network(run), *averages(run)])


def samples(name: str, sampling: cases.Sampling, shop: Workshop) -> str:
    """What `sample` writes."""
    run = shop.fit(sampling.of, RUNS[sampling.of])
    out = shop.folder / "samples" / name
    shop.command("sample", str(run), *cases.SAMPLE, cases.OUT.format(out), *sampling.options)
    return sampled(out)


def sampled(out: Path) -> str:
    """The samples in a folder."""
    return digest([torch.from_numpy(np.load(out / "samples.npz")["x"])])


def last_rows(name: str, training: cases.Training, shop: Workshop) -> Result:
    """The last four rows of metrics.csv, each by its step: of training, validation and scores."""
    run = shop.fit(f"metrics/{name}", training)
    rows = list(csv.DictReader((run / "metrics.csv").open()))[-4:]
    return {
        f"{-k}": {c: float(v) for c, v in row.items() if v} for k, row in enumerate(rows[::-1], 1)
    }


def demo(name: str, shop: Workshop) -> Result:
    """The scores of a run of `make demo`, and its samples."""
    training, sampling = cases.DEMO[name]
    run, out = shop.fit(f"demo/{name}", training), shop.folder / "samples" / "demo" / name
    shop.command("sample", str(run), cases.OUT.format(out), *sampling)
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {**evaluation["metrics"], "samples": sampled(out)}


def scores(shop: Workshop) -> Result:
    """What `evaluate` says of the mixture."""
    run = shop.fit(cases.MIXTURE, cases.TRAININGS[cases.MIXTURE])
    shop.command("evaluate", str(run), *cases.EVALUATE)
    records = json.loads((run / "evaluations" / "evaluations.json").read_text())
    return {r["method"]: {"nfe": r["nfe"], **r["metrics"]} for r in records}


def log_likelihoods(shop: Workshop) -> Result:
    """The log-likelihoods of 50 moons under the trained flow, and their difference at a tenth of the tolerances."""
    flow = load_flow(shop.fit(cases.MOONS, cases.TRAININGS[cases.MOONS]))
    x1 = Moons().sample((50, 2), Key(0).fold("held out").generator())
    with shop.surroundings():
        found = likelihood(flow.field, x1, flow.source, flow.field.path, flow.solver)
    return {
        "log_prob": found.log_prob.tolist(),
        "difference": found.difference.tolist(),
        "nfe": found.nfe,
    }


def own_curves(shop: Workshop) -> str:
    """Points and velocities on a path of one's own curves, which no config can name."""
    path = Curves(lambda t: t**2, lambda t: (1 - t) ** 2)
    generator = Key(0).fold("curves").generator()
    x0, x1 = torch.randn(2, 64, 2, generator=generator)
    with shop.surroundings():
        point = path.sample(x0, x1, torch.rand(64, generator=generator))
    return digest([point.xt, point.ut])


def stochastic(method: str, shop: Workshop) -> str:
    """Samples of a stochastic solver on the exact velocity of a mixture."""
    law = GaussianMixture([0.5, 0.3, 0.2], [[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], [0.5, 0.4, 0.7])
    x0 = torch.randn(64, 2, generator=Key(0).fold("start").generator(), dtype=torch.float64)
    brownian = BrownianPath(Key(0).fold("sde").streams(torch.arange(64)), x0)
    sde = MarginalPreservingSDE(Linear(), Gaussian(), independent=True)
    with shop.surroundings():
        return digest(
            [SDESolver(method, 20).solve(sde, law.along(Linear()).velocity, x0, brownian).x]
        )


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        compute: what gives its result.
        training: what it trains, where its result is the weights.
        free: whether it is written down and not held.
    """

    compute: Callable[[Workshop], Result]
    training: cases.Training | None = None
    free: bool = False


RUNS = cases.TRAININGS | {f"grid/{name}": t for name, t in cases.ON_A_GRID.items()}
CASES: dict[str, Case] = {
    **{name: Case(partial(weights, name, t), t) for name, t in cases.TRAININGS.items()},
    **{f"samples/{name}": Case(partial(samples, name, s)) for name, s in cases.SAMPLINGS.items()},
    **{f"metrics/{name}": Case(partial(last_rows, name, t)) for name, t in cases.METRICS.items()},
    "evaluate": Case(scores),
    "likelihood": Case(log_likelihoods),
    "curves": Case(own_curves),
    # the random numbers of a step may come to be keyed in another way
    "sde/euler_maruyama": Case(partial(stochastic, "euler_maruyama"), free=True),
    "sde/stochastic_heun": Case(partial(stochastic, "stochastic_heun"), free=True),
}
DEMOS = {name: Case(partial(demo, name)) for name in cases.DEMO}


# -- in double precision ----------------------------------------------------------------------------------


def summary(tensors: Sequence[Tensor]) -> dict[str, float]:
    """Three numbers of all weights in their order: sum, sum of squares, and a product that tells places apart.

    Averages are not among them: they are kept in float32.
    """
    flat = torch.cat([x.flatten() for x in tensors])
    assert flat.dtype == torch.float64
    places = torch.arange(len(flat), dtype=torch.float64).cos()
    return {
        "sum": float(flat.sum()), "squares": float(flat @ flat), "product": float(flat @ places),
    }  # fmt: skip


def distance(a: dict[str, float], b: dict[str, float]) -> float:
    """The largest difference, in parts of the norm of the weights: sum and product may cancel to anything."""
    norm = math.sqrt(b["squares"])
    units = {"sum": norm, "squares": norm**2, "product": norm}
    return max(abs(a[k] - b[k]) / unit for k, unit in units.items())


RELATIVE = 1e-9
"""How far float64 may be from what was written. Other instruction sets were seen to differ by 1e-13 at most."""


# -- the files --------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def compute(
    table: dict[str, Case], folder: Path, show: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, Result], dict[str, dict[str, float]]]:
    """The results of some cases, and of those that train the numbers of float64."""
    single, double = Workshop(folder / "single"), Workshop(folder / "double", double=True)
    found: dict[str, Result] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, case in table.items():
        show(name)
        found[name] = case.compute(single)
        if case.training is not None:
            numbers[name] = summary(network(double.fit(name, case.training)))
    return found, numbers


def compare(
    file: Path,
    table: dict[str, Case],
    found: dict[str, Result],
    numbers: dict[str, dict[str, float]],
) -> list[str]:
    """The cases that are not as they were written, with what is not."""
    here, exact = read(file).get(machine()), read(FLOAT64)
    if here is None:
        print(f"{file.name} has nothing of {machine()}: float64 alone is compared")
    changed = [k for k, v in found.items() if here is not None and here.get(k) != v]
    for name in (k for k in changed if table[k].free):
        print(f"changed, as it may: {name}")
    far = {k: distance(v, exact[k]) if k in exact else math.inf for k, v in numbers.items()}
    return [k for k in changed if not table[k].free] + [
        f"{k} in float64, by {v:.2g}" for k, v in far.items() if not v <= RELATIVE
    ]


def main() -> int:
    """Write the table, or hold the code against it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write down what is computed")
    mode.add_argument("--check", action="store_true", help="compare what is computed")
    parser.add_argument("--only", default="*", help="cases by name, such as 'path/*'")
    parser.add_argument("--demo", action="store_true", help="the runs of make demo instead")
    options = parser.parse_args()
    file, table = (DEMO, DEMOS) if options.demo else (DIGESTS, CASES)
    table = {name: case for name, case in table.items() if fnmatch(name, options.only)}
    if not table:
        parser.error(f"--only {options.only}: there is no such case")
    with tempfile.TemporaryDirectory() as folder:
        found, numbers = compute(table, Path(folder), partial(print, flush=True))
    if options.write:
        written = read(file)
        written[machine()] = written.get(machine(), {}) | found
        write(file, written)
        exact = numbers | read(FLOAT64)  # what any machine wrote holds for all
        write(FLOAT64, {name: exact[name] for name in CASES if name in exact})
        return 0
    changed = compare(file, table, found, numbers)
    print(
        *(f"changed: {name}" for name in changed),
        f"{len(table)} cases, {len(changed)} changed",
        sep="\n",
    )
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())

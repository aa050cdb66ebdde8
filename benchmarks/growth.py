"""How costs grow: with the batch, the dimension, the data, the evaluations and the processes.

    benchmarks/.venv/bin/python benchmarks/growth.py --out growth.json

Every size is measured as often as `--repeats` says, by turns, and a power law is fitted. Small sizes are led by what a
call costs, so exponents below those of the arithmetic mean that the overhead still counts. With processes, n is their
number at one global batch, and an exponent of -1 would be perfect sharing; more processes than cores share nothing.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from loop import COMMON, Timed
from powers import grown, words
from timing import begin, parser, report, seconds
from torch import nn

from fmlightning.__main__ import main as fmlightning
from fmlightning.data.images.base import ImageData, Splits
from fmlightning.data.images.datasets import InMemoryImages
from fmlightning.flow.couplings import MinibatchOT
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.cfm import mean_cfm_loss
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.nets.mlp import TimeMLP

Run = Callable[[], Any]

STEPS = 20  # of training in one measurement with processes
GENERATOR = Key(0).fold("growth").generator()


class Pixels(ImageData):
    """Random grey pictures of 8 x 8."""

    title = "random pixels"

    def __init__(self, size: int) -> None:
        pixels = torch.randint(256, (size, 1, 8, 8), generator=GENERATOR, dtype=torch.uint8)
        super().__init__(
            Splits(
                {"train": InMemoryImages(pixels, None), "test": InMemoryImages(pixels[:100], None)}
            ),
            labelled=False,
        )


def training(batch: int, dim: int) -> Run:
    """A step of an MLP on points in some dimensions."""
    with seeded(Key(0)):
        net: nn.Module = TimeMLP(dim=dim, width=256, depth=3)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    x0, x1 = torch.randn(2, batch, dim, generator=GENERATOR)
    point = Linear().sample(x0, x1, torch.rand(batch, generator=GENERATOR))

    def step() -> None:
        optimizer.zero_grad()
        mean_cfm_loss(net, Linear(), point).backward()
        optimizer.step()

    return step


def assignment(size: int) -> Run:
    x0, x1 = torch.randn(2, size, 2, generator=GENERATOR)
    return lambda: MinibatchOT().pairs(x0, x1, None, GENERATOR)


def sampling(num_steps: int) -> Run:
    with seeded(Key(0)):
        field = NetworkField(TimeMLP(dim=2, width=64, depth=4).requires_grad_(False), Linear())
    x = torch.randn(1000, 2, generator=GENERATOR)
    return lambda: ODESolver("euler", num_steps).solve(field, x)


def set_up(size: int) -> Run:
    """A data set that is in memory, up to its first batch."""

    def first_batch() -> None:
        data = Pixels(size)
        data.train_batch(0, slice(0, data.batch_size))

    return first_batch


def batch_of(size: int) -> Run:
    """A batch of 128 within an epoch of a data set of some size."""
    data = Pixels(size)
    data.train_batch(0, slice(0, 128))
    return partial(data.train_batch, 1, slice(0, 128))


def listing(count: int) -> Run:
    """`fmlightning ls` of some finished runs with scores, whose seeds and learning rates differ."""
    folder = tempfile.TemporaryDirectory()
    text = (Path(__file__).parents[1] / "configs" / "toy" / "moons.yaml").read_text()
    config = yaml.safe_load(text)
    for k in range(count):
        run = Path(folder.name) / f"run-{k:05d}"
        run.mkdir()
        config["seed_everything"] = k
        config["model"]["optimizer"] = {
            "class_path": "Adam",
            "init_args": {"lr": 1e-3 * (1 + k % 5)},
        }
        (run / "config.yaml").write_text(text)
        manifest = {"status": "finished", "end_step": 100, "config": config}
        (run / "manifest.json").write_text(json.dumps(manifest))
        (run / "evaluation.json").write_text(json.dumps({"metrics": {"w2": 1 / (1 + k)}}))

    def run_command() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert fmlightning(["ls", folder.name]) == 0

    return run_command


LAWS: dict[str, tuple[str, tuple[int, ...], Callable[[int], Run]]] = {
    "training step, MLP": ("batch", (256, 512, 1024, 2048, 4096), lambda n: training(n, 2)),
    "training step, MLP 3 x 256": ("dimension", (2, 64, 256, 1024, 4096), lambda n: training(256, n)),
    "exact pairs in the plane": ("batch", (64, 128, 256, 512, 1024), assignment),
    "sampling, Euler": ("evaluations", (10, 20, 40, 80, 160), sampling),
    "data set in memory, first batch": ("pictures", (2000, 8000, 32_000, 128_000, 512_000), set_up),
    "a later batch of 128": ("pictures", (2000, 8000, 32_000, 128_000, 512_000), batch_of),
    "ls": ("runs", (62, 125, 250, 500, 1000), listing),
}  # fmt: skip


def law(name: str, repeats: int) -> dict[str, Any]:
    over, sizes, make = LAWS[name]
    runs = {n: make(n) for n in sizes}
    for run in runs.values():
        run()  # the warm-up
    measured: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeats):
        for n, run in runs.items():
            measured[n].append(seconds(run))
    return grown(name, over, measured)


# -- processes ----------------------------------------------------------------------------------


def processes(repeats: int) -> dict[str, Any]:
    """Seconds of a step of the digits' U-Net at one global batch."""
    counts = (1, 2)
    measured: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(repeats):
        for n in counts:
            measured[n].append(launched(n) / STEPS)
    return grown("training step, U-Net on digits", "processes", measured)


def launched(count: int) -> float:
    """Seconds of training on so many processes, each with one thread, starting up left out."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*command, __file__, f"--child={folder}"],
            env=environment, check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return float((Path(folder) / "seconds").read_text())


def child(folder: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    more = ["--trainer.strategy=ddp"] if size > 1 else []
    plain = [o for o in COMMON if not o.startswith("--trainer.devices")]
    with Timed(time.perf_counter) as timed, contextlib.redirect_stdout(io.StringIO()):
        status = fmlightning(
            [
                "fit", "--config=configs/images/digits.yaml", *plain, *more, f"--trainer.devices={size}",
                f"--trainer.max_steps={STEPS}", f"--run_dir={folder / 'run'}",
            ]
        )  # fmt: skip
    if status:
        sys.exit(status)
    if os.environ["RANK"] == "0":
        (folder / "seconds").write_text(str(timed.seconds))


def main() -> None:
    flags = parser(__doc__ or "", repeats=5)
    flags.add_argument("--launches", type=int, default=3, help="runs at each number of processes")
    flags.add_argument("--child", type=Path, help="of the launcher: where to write")
    chosen = flags.parse_args()
    begin(chosen)
    if chosen.child:
        return child(chosen.child)
    found = [law(name, chosen.repeats) for name in LAWS]
    found.append(processes(chosen.launches))
    for one in found:
        print(words(one))
    report({"growth": found}, chosen)


if __name__ == "__main__":
    main()

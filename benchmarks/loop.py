"""Steps per second of `fmlightning fit` with everything on, against a bare loop written by hand.

    python benchmarks/loop.py --out loop.json

Ours is the real command: average of the weights, rows of metrics, four checkpoints, the progress bar, the guard
against steps that are not finite, a schedule, and keyed randomness. The other side is `bare`: the same network, laws,
optimiser, schedule and average in thirty lines, with one generator and none of the rest. Both train at once, by turns
of some steps: after each stretch of ours the other takes as many, whose time is counted for itself. A pair is the
seconds of two such runs, ours from before the first step to after the last checkpoint; starting up is left out. Equal
steps and a final loss within the spread of seeds are asserted of both, and of ours that it has written all its rows,
checkpoints and lines of progress, of which the other side has none to write.

`--clock cpu` counts the processor time of this process, for a machine that others use too.
"""

import contextlib
import csv
import gc
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from ratios import require_equal_work, row
from timing import begin, parser, report
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.__main__ import main as fmlightning
from fmlightning.data.images.base import NUM_BINS
from fmlightning.data.images.digits import DigitsData
from fmlightning.data.images.photos import PhotosData
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import dequantise
from fmlightning.flow.toys import EightGaussians, Moons
from fmlightning.nets.mlp import TimeMLP
from fmlightning.nets.unet import UNet
from fmlightning.training.lightning.fast_loop import FastLoop

Draw = Callable[[], tuple[Tensor, Tensor, Tensor | None]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def bare(
    net: nn.Module, draw: Draw, steps: int, lr: float, decay: float, log_every: int
) -> Iterator[float | None]:
    """The loop by hand; waits before the first step and after each, and gives the loss of every so many."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0, fused=True)
    weights = [p.detach() for p in net.parameters()]
    average = [w.clone() for w in weights]
    yield None
    for n in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * n / steps)) / 2
        x0, x1, y = draw()
        t = torch.rand(len(x1), generator=GENERATOR)
        s = t.reshape(-1, *(1,) * (x1.ndim - 1))
        loss = F.mse_loss(net(s * x1 + (1 - s) * x0, t, y), x1 - x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, weights, 1 - min(decay, (2 + n) / (11 + n)))
        yield None if (n + 1) % log_every else loss.item()


GENERATOR = Key(0).fold("bare").generator()


def points() -> tuple[nn.Module, Draw]:
    shape = (256, 2)
    net = TimeMLP(dim=2, width=64, depth=4)
    return net, lambda: (
        EightGaussians().sample(shape, GENERATOR), Moons().sample(shape, GENERATOR), None
    )  # fmt: skip


def digits() -> tuple[nn.Module, Draw]:
    data = DigitsData()
    pixels, labels = data.images["train"], data.targets["train"]
    options: dict[str, Any] = {"channels": 16, "channel_mult": (1, 2, 2), "num_blocks": 1}
    net = UNet(
        in_channels=1, **options, attention_levels=(1,), head_channels=16, num_classes=10
    )  # fmt: skip

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        while True:
            order = torch.randperm(len(pixels), generator=GENERATOR)
            for index in order.split(96)[: len(pixels) // 96]:
                u = torch.rand(96, 1, 8, 8, generator=GENERATOR)
                x1 = dequantise(pixels[index], u, data.num_bins)
                yield torch.randn(96, 1, 8, 8, generator=GENERATOR), x1, labels[index]

    return net, batches().__next__


def photos() -> tuple[nn.Module, Draw]:
    train: Any = PhotosData().sets["train"]
    shape = (PHOTOS, 3, 32, 32)
    options: dict[str, Any] = {"channels": 16, "channel_mult": (1, 1, 2, 4), "num_blocks": 1}
    net = UNet(in_channels=3, **options, attention_levels=(2,), head_channels=16, num_classes=2)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        while True:
            order = torch.randperm(len(train), generator=GENERATOR)
            for index in order.split(PHOTOS)[: len(train) // PHOTOS]:
                pixels = train.pixels[index]
                mirrored = torch.rand(PHOTOS, 1, 1, 1, generator=GENERATOR) < 0.5
                pixels = torch.where(mirrored, pixels.flip(-1), pixels)
                x1 = dequantise(pixels, torch.rand(shape, generator=GENERATOR), NUM_BINS)
                yield torch.randn(shape, generator=GENERATOR), x1, train.labels[index]

    return net, batches().__next__


PHOTOS = 128
"""Pictures in a batch."""


@dataclass(frozen=True)
class Case:
    """What both sides train."""

    config: str
    make: Callable[[], tuple[nn.Module, Draw]]
    steps: int
    pairs: int
    lr: float
    decay: float
    at_least: float
    log_every: int = 50
    options: tuple[str, ...] = ()


SAVE_EVERY, LINES = 250, 10
"""Steps between two checkpoints, and the lines of progress of a run."""

CASES = {
    "points": Case("toy/moons", points, 1000, 15, 5e-3, 0.999, 0.74),
    "images of 8 x 8": Case("images/digits", digits, 200, 7, 2e-3, 0.99, 0.98),
    "images of 32 x 32": Case(
        "images/photos", photos, 20, 6, 7e-3, 0.99, 0.98, 4, (f"--data.batch_size={PHOTOS}",)
    ),
}
COMMON = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.metrics=[]",
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_val_batches=0", "--checkpoints.save_top_k=-1",
    "--trainer.gradient_clip_val=null", "--model.scheduler={class_path: Cosine, init_args: {warmup_steps: 0}}",
)  # fmt: skip


@dataclass
class Training:
    """Seconds of a training, the losses it logged, and what else it left behind."""

    seconds: float
    losses: list[float]
    work: dict[str, int]


class Timed:
    """Counts the seconds inside Lightning's fit loop: from before the first step to after the last checkpoint."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.run = clock, 0.0, _FitLoop.run

    def __enter__(self) -> "Timed":
        def run(loop: _FitLoop) -> None:
            gc.collect()
            begin = self.clock()
            self.run(loop)
            self.seconds = self.clock() - begin

        _FitLoop.run = run  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        _FitLoop.run = self.run  # type: ignore[method-assign]


class Beside:
    """The bare loop, which takes as many steps as ours whenever ours has taken some."""

    def __init__(self, case: Case, steps: int, seed: int, clock: Callable[[], float]) -> None:
        GENERATOR.manual_seed(seed)
        with seeded(Key(seed).fold("weights")):
            net, draw = case.make()
        self.steps = bare(net, draw, steps, case.lr, case.decay, case.log_every)
        next(self.steps)
        self.clock, self.seconds, self.taken = clock, 0.0, 0
        self.losses: list[float] = []
        self.advance = FastLoop.advance

    def __enter__(self) -> "Beside":
        def advance(stretches: FastLoop, fetcher: Any) -> None:
            self.advance(stretches, fetcher)
            self.follow(stretches.trainer.global_step)

        FastLoop.advance = advance  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        FastLoop.advance = self.advance  # type: ignore[method-assign]

    def follow(self, step: int) -> None:
        gc.disable()  # most of the garbage is ours to collect
        begin = self.clock()
        found = list(islice(self.steps, step - self.taken))
        self.seconds += self.clock() - begin
        gc.enable()
        self.taken += len(found)
        self.losses += [loss for loss in found if loss is not None]

    def training(self, steps: int) -> Training:
        """What it did, and the work that ours has to show for itself."""
        work = {
            "steps": self.taken,
            "averaged steps": self.taken,
            "rows": len(self.losses),
            "checkpoints": 1 + steps // min(steps, SAVE_EVERY),
            "lines of progress": LINES,
        }
        return Training(self.seconds, self.losses, work)


def together(
    case: Case, steps: int, seed: int, clock: Callable[[], float]
) -> tuple[Training, Training]:
    """Ours and the bare loop, by turns."""
    with Beside(case, steps, seed, clock) as beside:
        mine = ours(case, steps, seed, clock)
    return replace(mine, seconds=mine.seconds - beside.seconds), beside.training(steps)


def ours(case: Case, steps: int, seed: int, clock: Callable[[], float]) -> Training:
    """The command, in this process."""
    with tempfile.TemporaryDirectory() as folder, Timed(clock) as timed:
        run, shown = Path(folder) / "run", io.StringIO()
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # as Lightning leaves it
        with contextlib.redirect_stdout(shown):
            status = fmlightning(
                [
                    "fit", f"--config=configs/{case.config}.yaml", *COMMON, f"--run_dir={run}",
                    f"--seed_everything={seed}", f"--trainer.max_steps={steps}",
                    f"--checkpoints.every_n_train_steps={min(steps, SAVE_EVERY)}",
                    f"--trainer.log_every_n_steps={case.log_every}", *case.options,
                ]
            )  # fmt: skip
        if status:
            raise RuntimeError(shown.getvalue())
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        with (run / "metrics.csv").open() as file:
            losses = [float(r["train/loss"]) for r in csv.DictReader(file)]
        work = {
            "steps": last["global_step"],
            "averaged steps": last["callbacks"]["EMA"]["updates"],
            "rows": len(losses),
            "checkpoints": len(list((run / "checkpoints").iterdir())),
            "lines of progress": shown.getvalue().count(f"/{steps} "),
        }
    return Training(timed.seconds, losses, work)


def compare(name: str, flags: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of one case, and its final losses."""
    case, clock = CASES[name], CLOCKS[flags.clock]
    steps = flags.steps or case.steps
    pairs, ends = [], []
    for seed in range(min(flags.repeats, case.pairs) + 1):  # the first is the warm-up
        a, b = together(case, steps, seed, clock)
        require_equal_work(a.work, b.work)
        if seed:
            pairs.append((a.seconds, b.seconds))
            ends.append((statistics.mean(a.losses[-5:]), statistics.mean(b.losses[-5:])))
    mine, other = zip(*ends, strict=True)
    apart = abs(statistics.mean(mine) - statistics.mean(other))
    if apart > 4 * max(statistics.pstdev(mine), statistics.pstdev(other), 0.02 * other[0]):
        raise ValueError(
            f"{name}: the final losses {mine} and {other} differ by more than seeds do"
        )
    per_s: dict[str, Any] = {
        "ours_steps_per_s": steps / statistics.median(a for a, _ in pairs),
        "bare_steps_per_s": steps / statistics.median(b for _, b in pairs),
    }
    line = row(
        f"training, {name}", "bare loop", pairs, at_least=case.at_least, steps=steps, clock=flags.clock, **per_s
    )  # fmt: skip
    return line, {"ours": mine, "bare": other}


def main() -> None:
    flags = parser(__doc__ or "", repeats=15)
    flags.add_argument("--clock", choices=CLOCKS, default="wall")
    flags.add_argument("--steps", type=int, help="steps of a run; by default the case's own")
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = flags.parse_args()
    begin(chosen)
    found = {name: compare(name, chosen) for name in chosen.cases}
    report(
        {
            "rows": [r for r, _ in found.values()],
            "final_loss": {n: e for n, (_, e) in found.items()},
        },
        chosen,
    )


if __name__ == "__main__":
    main()

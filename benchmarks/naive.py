"""`fmlightning fit` against the LightningModule that everybody writes first.

    benchmarks/.venv/bin/python benchmarks/naive.py --out naive.json

The other side is plain Lightning on the same network and laws: a DataLoader that collates items, `self.log` in every
step, Adam with its defaults, Lightning's own average of the weights, CSV rows, checkpoints and progress bar. Both are
timed inside Lightning's fit loop. Equal work is asserted: steps, averaged steps, rows, checkpoints, and final losses
within the spread of seeds.
"""

import argparse
import contextlib
import csv
import io
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from loop import CASES, SAVE_EVERY, Case, Timed, Training, ours
from ratios import require_equal_losses, require_equal_work, row
from timing import begin, parser, report, turn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.toys import EightGaussians, Moons
from fmlightning.nets.mlp import TimeMLP

ITEMS, BATCH = 51_200, 256


class Naive(LightningModule):
    """Flow matching in a dozen lines."""

    def __init__(self, lr: float, generator: torch.Generator) -> None:
        super().__init__()
        self.net, self.lr, self.source = TimeMLP(dim=2, width=64, depth=4), lr, generator

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x1,) = batch
        x0 = EightGaussians().sample(tuple(x1.shape), self.source)
        t = torch.rand(len(x1), generator=self.source)
        xt = t[:, None] * x1 + (1 - t[:, None]) * x0
        loss = F.mse_loss(self.net(xt, t), x1 - x0)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class NFECounter(EMAWeightAveraging):
    """Lightning's average, which counts."""

    updates = 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)
        self.updates += 1


def naive(case: Case, steps: int, seed: int) -> Training:
    generator = Key(seed).fold("naive").generator()
    items = TensorDataset(Moons().sample((ITEMS, 2), generator))
    with (
        tempfile.TemporaryDirectory() as folder,
        Timed(time.perf_counter) as timed,
        quiet(),
        seeded(Key(seed)),
    ):
        average = NFECounter(decay=case.decay)
        checkpoints = ModelCheckpoint(
            Path(folder) / "checkpoints",
            save_top_k=-1,
            save_last=True,
            every_n_train_steps=min(steps, SAVE_EVERY),
        )
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, log_every_n_steps=case.log_every,
            logger=CSVLogger(folder, "", ""), callbacks=[average, checkpoints], enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(
            Naive(case.lr, generator), DataLoader(items, BATCH, shuffle=True, drop_last=True)
        )
        with (Path(folder) / "metrics.csv").open() as file:
            losses = [float(r["train/loss"]) for r in csv.DictReader(file)]
        work = {
            "steps": trainer.global_step,
            "averaged steps": average.updates,
            "rows": len(losses),
            "checkpoints": len(list((Path(folder) / "checkpoints").iterdir())),
        }
    return Training(timed.seconds, losses, work)


@contextlib.contextmanager
def quiet() -> Any:
    """Without what it prints, which it prints all the same."""
    shown = io.StringIO()
    with (
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def compare(flags: argparse.Namespace) -> dict[str, Any]:
    case = CASES["points"]
    mine, its = [], []
    for seed in range(flags.repeats + 1):  # the first pair is the warm-up
        a, b = turn(
            seed,
            partial(ours, case, flags.steps, seed, time.perf_counter),
            partial(naive, case, flags.steps, seed),
        )
        require_equal_work({k: v for k, v in a.work.items() if k in b.work}, b.work)
        mine.append(a)
        its.append(b)
    ends = [[statistics.mean(t.losses[-5:]) for t in side[1:]] for side in (mine, its)]
    require_equal_losses(*ends)
    pairs = [(a.seconds, b.seconds) for a, b in zip(mine[1:], its[1:], strict=True)]
    return row(
        "fit, points",
        "naive LightningModule",
        pairs,
        at_least=1.0,
        steps=flags.steps,
        final_loss=ends,
    )


def main() -> None:
    flags = parser(__doc__ or "", repeats=15)
    flags.add_argument("--steps", type=int, default=500, help="steps of a run")
    chosen = flags.parse_args()
    begin(chosen)
    report({"rows": [compare(chosen)]}, chosen)


if __name__ == "__main__":
    main()

"""The parts of a run that need every batch of training, so that Lightning has to take each step."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, Timer
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from fmlightning.training.lightning.scheduled import Scheduled
from fmlightning.training.nonfinite import scaler

BATCH_HOOKS = (
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
"""Hooks that Lightning calls at every batch."""

STEP_METHODS = (
    "optimizer_step", "optimizer_zero_grad", "backward", "lr_scheduler_step", "on_before_batch_transfer",
    "transfer_batch_to_device", "on_after_batch_transfer",
)  # fmt: skip
"""The methods that a module of one's own may replace."""

RARE = LearningRateMonitor, Timer
"""Callbacks of Lightning that are asked at every batch, and need not be."""


def needs_every_step(trainer: Trainer, plain_module: type[LightningModule]) -> str | None:
    """The part of a run that needs every batch, in words; None where there is none.

    Args:
        plain_module: the class whose training step the fast loop knows.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        known = isinstance(callback, Scheduled) or type(callback) in RARE
        if not known and overridden(callback, Callback, BATCH_HOOKS):
            return f"the callback {type(callback).__name__}"
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    for part, plain, names in (
        (module, LightningModule, (*BATCH_HOOKS, *STEP_METHODS)),
        (module, plain_module, ("training_step", "configure_gradient_clipping")),
        (data, LightningDataModule, STEP_METHODS[-3:]),
    ):
        if found := overridden(part, plain, names):
            return f"{type(part).__name__}.{found[0]}"
    return unsupported_setting(trainer)


def unsupported_setting(trainer: Trainer) -> str | None:
    """An option of the trainer under which a step is another one."""
    options: Any = trainer  # of which many are declared nowhere
    strategy, precision = trainer.strategy, trainer.precision_plugin
    known = type(precision) in (Precision, DoublePrecision, HalfPrecision, MixedPrecision)
    plateaus = [
        c for c in trainer.lr_scheduler_configs if c.reduce_on_plateau and c.interval == "step"
    ]
    odd = {
        "strategy": type(strategy) not in (SingleDeviceStrategy, DDPStrategy),
        "model averaging": getattr(strategy, "_model_averager", None) is not None,
        "precision": not known or scaler(trainer) is not None,
        "profiler": not isinstance(options.profiler, PassThroughProfiler),
        "fast_dev_run": bool(options.fast_dev_run),
        "val_check_interval by the clock": options._val_check_time_interval is not None,
        "data without a length": trainer.num_training_batches == math.inf,
        "manual optimisation": not trainer.lightning_module.automatic_optimization,
        "several optimisers": len(trainer.optimizers) != 1,
        "scheduler of every step's metric": bool(plateaus),
    }
    return next((f"the trainer ({name})" for name, holds in odd.items() if holds), None)


def overridden(part: Any, plain: type, names: tuple[str, ...]) -> tuple[str, ...]:
    """The methods of some names that are not those of a plain class."""
    return tuple(
        n for n in names
        if getattr(getattr(part, n, None), "__func__", None) is not getattr(plain, n, None)
    )  # fmt: skip

"""Checks of option values that Lightning or torch would accept in silence, or refuse in other words."""

import math
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint

from fmlightning.cli.device import slow_bf16
from fmlightning.cli.messages import leaves
from fmlightning.cli.quiet import say

POSITIVE = ("val_check_interval", "accumulate_grad_batches", "max_steps", "max_epochs", "num_nodes")


def check_trainer(trainer: Namespace) -> None:
    """Refuse values that Lightning would divide by, or accept in silence.

    Raises:
        ValueError: a count is not positive, a norm is negative, or training would never end.
    """
    for name in POSITIVE:
        value = trainer.get(name)
        unlimited = name.startswith("max_") and value == -1
        if isinstance(value, int | float) and value <= 0 and not unlimited:
            raise ValueError(f"trainer.{name}={value} must be positive")
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
        raise ValueError(
            f"trainer.log_every_n_steps={trainer.log_every_n_steps} must not be negative; 0 logs nothing"
        )
    if not trainer.max_time and {trainer.max_steps, trainer.max_epochs} <= {-1, None}:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps} sets no end, nor do trainer.max_epochs and trainer.max_time: "
            "training would never stop; set one of them"
        )
    devices = str(trainer.devices)
    if re.fullmatch(r"-?\d+", devices) and int(devices) < 1 and devices != "-1":
        raise ValueError(f"trainer.devices={trainer.devices} must be positive, or -1 for all")
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} must not be negative"
        )


def check_scheduler(scheduler: dict[str, Any] | None, trainer: Namespace) -> None:
    """Refuse a schedule that decays until the last step where that step is unknown.

    Raises:
        ValueError: only the clock ends training.
    """
    name = str((scheduler or {}).get("class_path")).rsplit(".", 1)[-1]
    if name in ("Cosine", "LinearDecay", "PolynomialDecay") and {
        trainer.max_steps,
        trainer.max_epochs,
    } <= {-1, None}:
        raise ValueError(
            f"model.scheduler={name} falls until the last step, and trainer.max_time={trainer.max_time} does not tell "
            "which that is: set trainer.max_steps too, or model.scheduler=Constant"
        )


def ones_own(callbacks: Any, folder: Path) -> list[Callback]:
    """The callbacks that a config names, with what they write under the run's own folder.

    Raises:
        ValueError: one of them is answered by a command here.
    """
    given: list[Callback] = (
        callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    )
    for callback in given:
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                "trainer.callbacks: BatchSizeFinder changes the batch, which keyed draws belong to, while it trains: "
                "fmlightning find_batch_size with the same options finds the largest, for data.batch_size"
            )
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                "trainer.callbacks: LearningRateFinder sets model.lr, and the rate here is an option of the optimiser: "
                "compare values of model.optimizer.lr with fmlightning sweep"
            )
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / "checkpoints")
    return given


def check_precision(requested: Any, trainer: Trainer) -> None:
    """Refuse a precision that Lightning has replaced by another, and warn of one that is slow here.

    Raises:
        ValueError: half precision on the CPU.
    """
    if str(requested).startswith("16") and not str(trainer.precision).startswith("16"):
        raise ValueError(
            f"trainer.precision={requested} needs a GPU, and this trains on the CPU: set bf16-mixed or 32-true"
        )
    device = trainer.strategy.root_device.type
    if slow := slow_bf16(f"trainer.precision={requested}", device, "set 32-true"):
        say(slow)


def check_values(config: dict[str, Any]) -> None:
    """Refuse numbers that are not finite.

    Raises:
        ValueError: a value is not a number, or the optimiser has an infinite one.
    """
    for name, value in leaves(config):
        infinite = (
            isinstance(value, float) and math.isinf(value) and name.startswith("model.optimizer")
        )
        if infinite or value != value:
            raise ValueError(f"{name}={value} must be a finite number")


def of_trainer(message: str, trainer: dict[str, Any]) -> str:
    """An error of Lightning about an option of the trainer, under its name on the command line."""
    first: dict[str, int] = {}
    for name, value in trainer.items():
        words = [rf"`{name}\b", rf"\b{name}=", rf"\b{name}\b" if "_" in name else "$^"]
        words += [rf"\b{re.escape(value)}\b"] if isinstance(value, str) else []
        if found := re.search("|".join(words), message):
            first[name] = found.start()
    option = min(first, key=lambda name: first[name]) if first else "accelerator"
    said = f"trainer.{option}={trainer[option]}: {' '.join(message.split())}"
    if "backend found" in message:  # none, that is
        said += " Set it to cpu or auto; `fmlightning doctor` says what is there"
    return said

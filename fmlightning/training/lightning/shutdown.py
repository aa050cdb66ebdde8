r"""Stopping all processes after the same step.

A signal may reach one process only, and the others would wait for it for ever. So after each stretch of optimiser
steps, of a second at most or two steps, the processes take the largest of their notes, over a group of their own that
makes no accelerator wait; a process that is alone looks at its note after each step. When it is not
0 the run ends as soon as what belongs to the step is done, its validation included; the checkpoint of the end of
any stopped run is then that of this step.
"""

import math
import os
import signal
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from fmlightning.runs.signals import EXIT_CODES, SIGNAL_STATE, STOP_AFTER, listen


class GracefulShutdown(Callback):
    """Stop a run on USR1, USR2, TERM or Ctrl-C, or after the step that the environment names."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        several = trainer.world_size > 1
        self.group: Any = distributed.new_group(backend="gloo") if several else None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step, self.last = trainer.global_step, int(os.environ.get(STOP_AFTER) or 0)
        listen(signal.SIGINT)  # before, there is nothing to keep

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        begin_next_epoch(checkpoint["loops"]["fit_loop"])

    def next_due_step(self, trainer: Trainer) -> float:
        """None of its own: the processes agree where a stretch of steps ends, and one alone looks at each step."""
        return self.last if trainer.global_step < self.last else math.inf

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:  # gradients are still accumulating
            return
        self.step = trainer.global_step
        if self.step == self.last:
            SIGNAL_STATE.received = max(SIGNAL_STATE.received, signal.SIGUSR1)
        if self.step != trainer.max_steps:  # else the run is about to end by itself
            self.agree(trainer)

    def agree(self, trainer: Trainer) -> None:
        """Take note of what any process was sent; call on every process."""
        told = torch.tensor(SIGNAL_STATE.received)
        if self.group is not None:
            distributed.all_reduce(told, distributed.ReduceOp.MAX, self.group)
        if told and not SIGNAL_STATE.agreed:
            SIGNAL_STATE.agreed = int(told)
            if trainer.is_global_zero:
                name = signal.Signals(SIGNAL_STATE.agreed).name
                print(f"{name}: stopping after step {trainer.global_step}", flush=True)


def stop_if_signalled(trainer: Trainer) -> None:
    """Stop here, if any process was sent a signal; call on every process, after training."""
    found = next((c for c in trainer.callbacks if isinstance(c, GracefulShutdown)), None)  # type: ignore[attr-defined]
    if found is not None:
        found.agree(trainer)
        if SIGNAL_STATE.agreed:
            raise SIGTERMException


def begin_next_epoch(loop: dict[str, Any]) -> None:
    """Let a run that was saved at the end of an epoch go on with the next.

    Lightning would enter the finished epoch again, and after it take the first batch of the next for its last, which
    an optimiser that accumulates gradients does not wait for.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    if batches["is_last_batch"] and batches["current"]["completed"] == batches["current"]["ready"]:
        batches["is_last_batch"] = False
        batches["current"] = dict.fromkeys(batches["current"], 0)
        for counts in (epochs["total"], epochs["current"]):
            counts |= dict.fromkeys(counts, counts["ready"])


class SignalFlags:
    """Stands where Lightning keeps its handlers, and installs none.

    Lightning's handlers broadcast and save in the middle of a step, and in a SLURM job they call `scontrol`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def received_sigterm(self) -> bool:
        """True once the run has to end; Lightning asks after a step and its validation."""
        return bool(SIGNAL_STATE.agreed) and self.trainer.training

    def register_signal_handlers(self) -> None:
        """None."""

    def teardown(self) -> None:
        """Nothing to restore."""


def replace_signal_handlers(trainer: Trainer) -> Trainer:
    """A trainer that leaves signals, and SLURM's queue, to us."""
    trainer._signal_connector = SignalFlags(trainer)  # type: ignore[assignment]
    # which would broadcast over the accelerator, and wait for it, before every step
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False
    return trainer


def exit_together() -> int:
    """Wait until every process has come to its end, and say with which status to exit.

    torchrun and srun may kill the others as soon as one has gone. A process that Lightning started itself says 0: at
    anything else the first would be killed, and it is the first whose status counts.
    """
    if distributed.is_available() and distributed.is_initialized():
        with suppress(RuntimeError):  # a process that has died is not waited for
            distributed.barrier()
    started_by_lightning = (
        int(os.environ.get("LOCAL_RANK", 0)) > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
    )
    return 0 if started_by_lightning else EXIT_CODES[signal.Signals(SIGNAL_STATE.agreed)]

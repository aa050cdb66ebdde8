r"""Steps after which there is nothing to do but the next step.

Lightning asks every callback, logger and profiler before and after each batch, which for a small network takes as
long as the step itself. But after most steps there is nothing to do: no checkpoint, no validation, no images or
scores, and no end of an epoch. Such steps are taken here one after another, each of them

    batch -> loss -> gradient -> verdict -> clipping -> optimiser -> schedule -> average (-> row)         (1)

by the same calls, in the same order and on the same numbers as Lightning's, and with the same counters behind it;
the step after them, and all that follows it, is Lightning's own. So the length of a stretch changes no result. It is
at most MAX_BATCHES batches, and no more than take MAX_SECONDS seconds, because several processes agree on a signal at
its end. The README's ratio to a bare loop of points rests on this file; large networks need none of it.

A callback says with `next_due_step` after which step it has something to do, and with `per_step_hooks` in which of
its hooks it takes part in (1). One that says neither is asked at every batch, and then every step is Lightning's.
"""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, distributed
from torch.optim import Optimizer

from fmlightning.data.order import Batch
from fmlightning.runs.signals import SIGNAL_STATE
from fmlightning.training.lightning.compatibility import needs_every_step
from fmlightning.training.lightning.scheduled import Scheduled, step_after
from fmlightning.training.lightning.shutdown import GracefulShutdown

MAX_BATCHES = 1000
"""Batches of a stretch."""

MAX_SECONDS = 1.0
"""Seconds of a stretch, after which a signal is heard."""


class FastLoop:
    """Stands before the step of Lightning's training loop, and takes the steps up to the next that matters.

    Args:
        trainer: whose loop it is.
        plain_module: the class whose training step this loop knows.
    """

    def __init__(self, trainer: Trainer, plain_module: type[LightningModule]) -> None:
        self.trainer, self.plain_module = trainer, plain_module
        self.loop: _TrainingEpochLoop = trainer.fit_loop.epoch_loop
        self.lightning_step = self.loop.advance
        self.seconds = MAX_SECONDS  # of a batch, until it is known
        self.optimizers: list[Optimizer] | None = None
        self.loop.advance = self.advance  # type: ignore[method-assign, assignment]

    # -- stretches --------------------------------------------------------------------------------

    def advance(self, fetcher: Any) -> None:
        """Take some batches, and then let Lightning take the one for which it called."""
        if self.optimizers is not self.trainer.optimizers:  # it trains for the first time, or again
            self.prepare()
        # a run that goes on from a checkpoint first lets Lightning find out where it is
        stops = not self.loop.restarting and self.stretch(fetcher, self.length())
        if not stops:
            self.lightning_step(fetcher)

    def prepare(self) -> None:
        """Collect what a step needs, once all of it is there."""
        trainer = self.trainer
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        reason = needs_every_step(trainer, self.plain_module)
        self.longest = 0 if reason else MAX_BATCHES
        if reason and trainer.is_global_zero:
            print(f"note: every step is shown to {reason}, which slows small networks down")
        self.module: LightningModule = trainer.lightning_module
        self.patient = [c for c in callbacks if isinstance(c, Scheduled)]
        self.rows: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # which looks at the steps that are logged, and through Lightning only
        self.watched = (
            self.rows if any(isinstance(c, LearningRateMonitor) for c in callbacks) else 0
        )
        self.stopping = [c for c in callbacks if isinstance(c, GracefulShutdown)]
        self.before_backward, self.before_step, self.after = (
            [getattr(c, hook) for c in callbacks if hook in getattr(c, "per_step_hooks", ())]
            for hook in ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
        )
        self.optimizers = trainer.optimizers
        optimizer: Any = next(iter(self.optimizers), None)
        self.optimizer = optimizer
        self.own = type(self.module) is not self.plain_module
        """True for a class of one's own, which may log at any step."""
        bare = (
            type(trainer.strategy) is SingleDeviceStrategy
            and type(trainer.precision_plugin) is Precision
        )
        self.training_step = (self.module if bare else trainer.strategy).training_step
        if trainer.strategy.root_device.type == "cpu":
            # Lightning sets it, and Adam would look for a card's library at every step
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)

    def length(self) -> int:
        """The number of batches before the next that somebody needs; the same on every process."""
        if not self.longest:
            return 0
        length = max(0, min(self.idle(), self.longest, max(1, int(MAX_SECONDS / self.seconds))))
        group = self.stopping[0].group if self.stopping else None
        if group is not None:
            found = torch.tensor(length)
            distributed.all_reduce(found, distributed.ReduceOp.MIN, group)
            length = int(found)
        return length

    def idle(self) -> int:
        """The batches from here to the next after which there is something to do, without that one."""
        trainer, loop = self.trainer, self.loop
        if trainer.should_stop:
            return 0
        ready, every = loop.batch_progress.current.ready, trainer.accumulate_grad_batches
        end = trainer.max_steps if trainer.max_steps > 0 else math.inf
        steps = min([end, *(c.next_due_step(trainer) for c in self.patient)])
        # which is watched from its first batch on
        watched = step_after(loop.global_step, self.watched) - 1
        done = ready // every - loop.global_step
        last = min(
            (done + steps) * every, (done + watched) * every + 1, trainer.num_training_batches
        )
        return int(min(last, ready + self.until_validation()) - ready - 1)

    def until_validation(self) -> float:
        """The batches from here to the next validation, with the one before it."""
        trainer, loop = self.trainer, self.loop
        if not loop._should_check_val_epoch():
            return math.inf
        whole_run = trainer.check_val_every_n_epoch is None
        progress = loop.batch_progress.total if whole_run else loop.batch_progress.current
        between: Any = trainer.val_check_batch
        return between - progress.ready % between

    def stretch(self, fetcher: Any, length: int) -> bool:
        """Take some batches; returns whether the run has to stop after the last of them."""
        if not length:
            return False
        loop, begin = self.loop, time.monotonic()
        self.weights = self.plain_weights()
        self.module._current_fx_name = "training_step"
        # Lightning counts the logged steps one short after it went on from the end of an epoch
        loop._batches_that_stepped = loop.global_step
        for _ in range(length):
            self.batch(fetcher)
            if self.trainer.should_stop:  # so says a hook that takes part in every step
                return True
            if loop._should_accumulate():
                continue
            if SIGNAL_STATE.received and self.trainer.world_size == 1 and self.stops():
                return True
            loop._batches_that_stepped = loop.global_step
        self.module._current_fx_name = None
        self.seconds = max((time.monotonic() - begin) / length, 1e-9)
        return False

    def stops(self) -> bool:
        """Let the one process of a run take note of a signal."""
        for callback in self.stopping:
            callback.on_train_batch_end(self.trainer)
        return bool(SIGNAL_STATE.agreed)

    def plain_weights(self) -> list[Tensor]:
        """Whose gradients are forgotten one by one: `zero_grad` does no more, and takes as long as an average."""
        plain = type(self.optimizer).zero_grad is Optimizer.zero_grad
        groups = self.optimizer.param_groups if plain else []  # a callback may add one
        return [p for group in groups for p in group["params"]]

    # -- a step -----------------------------------------------------------------------------------

    def batch(self, fetcher: Any) -> None:
        """One batch, equation (1)."""
        loop, trainer, progress = self.loop, self.trainer, self.loop.batch_progress
        step, connector = loop.global_step + 1, trainer._logger_connector
        logs = self.rows > 0 and step % self.rows == 0
        number = loop.batch_idx + 1
        batch = self.placed(next(fetcher)[0])
        progress.is_last_batch = False
        progress.increment_ready()
        progress.increment_started()
        if logs or self.own:
            connector.on_batch_start(batch)
        self.result: Tensor | None = None
        closure = partial(self.gradient, batch, number)
        if loop._should_accumulate():
            with _block_parallel_sync_behavior(trainer.strategy, block=True), torch.enable_grad():
                closure()
            progress.increment_processed()
        else:
            counts = loop.automatic_optimization.optim_progress.optimizer.step
            counts.increment_ready()
            self.optimizer.step(closure=partial(self.update, closure))
            counts.increment_completed()
            progress.increment_processed()
            self.schedule(number)
        outputs = {"loss": self.result}
        for hook in self.after:
            hook(trainer, self.module, outputs, batch, number)
        if logs or self.own:
            connector.on_batch_end()
        progress.increment_completed()
        if logs:
            connector.update_train_step_metrics()

    def schedule(self, number: int) -> None:
        """Let the schedules of steps take theirs."""
        progress = self.loop.scheduler_progress
        for each in self.trainer.lr_scheduler_configs:
            if each.interval == "step" and (number + 1) % each.frequency == 0:
                progress.increment_ready()
                each.scheduler.step()  # type: ignore[call-arg]
                progress.increment_completed()

    def placed(self, batch: Batch) -> Batch:
        """The batch in the run's precision and on its device."""
        device = self.trainer.strategy.root_device
        batch = self.trainer.precision_plugin.convert_input(batch)
        return {k: v.to(device, non_blocking=True) for k, v in batch.items()}

    def gradient(self, batch: Batch, number: int) -> Tensor:
        """The loss of a batch and its gradient, added to those before it in the same step."""
        trainer, every = self.trainer, self.trainer.accumulate_grad_batches
        output: Any = self.training_step(batch, number)
        loss: Tensor = output if every == 1 else output / every
        self.result = loss.detach()
        if number % every == 0:
            self.forget_gradients()
        trainer.strategy.pre_backward(loss)
        for hook in self.before_backward:
            hook(trainer, self.module, loss)
        loss.backward()
        trainer.strategy.post_backward(loss)
        return loss

    def forget_gradients(self) -> None:
        counts = self.loop.automatic_optimization.optim_progress.optimizer.zero_grad
        counts.increment_ready()
        counts.increment_started()
        if self.weights:
            for weight in self.weights:
                weight.grad = None
        else:
            self.optimizer.zero_grad()
        counts.increment_completed()

    def update(self, closure: Callable[[], Tensor]) -> Tensor:
        """The closure of the optimiser, called before it changes the weights."""
        with torch.enable_grad():
            loss = closure()
        trainer = self.trainer
        for hook in self.before_step:
            hook(trainer, self.module, self.optimizer)
        if trainer.gradient_clip_val:
            self.module.configure_gradient_clipping(
                self.optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
        return loss

r"""Steps whose loss or gradient is not finite: no weight changes, and each is reported.

    applied = |g| < infinity,   g the gradient summed over processes and micro-batches              (1)

A loss that is not finite makes its gradient NaN, so the gradient, which all processes share, carries the verdict
of each of them. Where a look at (1) would make the computer wait for its accelerator, it stays there: a fused
optimiser reads it as `found_inf`, which leaves weights, moments and step counts alone, and the run reads it every
so many steps, and always before it saves, validates or samples.

Source: the protocol of `found_inf` is that of torch.amp.GradScaler.
"""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.optim import Optimizer

Action = Literal["stop", "skip"]

READ_EVERY = 50
"""Steps after which the verdicts are read at the latest."""

FEW = 1_000_000
"""Numbers that a CPU copies into one row faster than it looks at each of a network's tensors."""

SCALER_PATIENCE = 40
"""Overflows in a row that are a scaler's own business: 2^-40 of its first scale leaves nothing to halve."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight is not finite, and the run may not go on."""


class NonFinite(Callback):
    """The response to a loss or a gradient that is not finite. The step is not taken in either case.

    The step, its loss and the norm of its gradient are logged as `nonfinite/loss` and `nonfinite/grad_norm`. A step
    that was skipped counts as a step: the data and the learning rate move on.

    Args:
        action: stop ends the run and saves nothing more; skip goes on with the next batch. On an accelerator, an
            optimiser that is not fused waits for it at every step if action is skip.
        max_skips: how many steps in a row may be skipped before the run stops.
    """

    per_step_hooks = ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end")

    def __init__(self, action: Action = "stop", max_skips: int = 10) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"nonfinite.action={action} is unknown: choose stop or skip")
        if max_skips < 1:
            raise ValueError(f"nonfinite.max_skips={max_skips} must be at least 1")
        self.action, self.max_skips = action, max_skips
        self.consecutive_skips = 0
        self.step_applied: bool | Tensor = True
        self.losses: list[Tensor] = []
        self.step = 0
        self.norm: Tensor | None = None
        self.gradients: list[Tensor] = []
        self.pending: list[tuple[int, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer  # `state_dict` is not given it

    def next_due_step(self, trainer: Trainer) -> float:
        return math.inf

    # -- the verdict ----------------------------------------------------------------------------

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if reads_at_once(loss) and math.isfinite(loss.item()):
            return
        # 0 * infinity is NaN, so the factor is 1 or NaN; a loss may else be infinite and its gradient not
        loss.register_hook((loss.detach() * 0 + 1).mul)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # kept until the step is taken: a handle of each is made anew for the optimiser otherwise
        self.gradients = gradients_of(optimizer)
        self.step, self.norm = trainer.global_step, norm_of(self.gradients)
        at_once = reads_at_once(self.norm)
        self.step_applied = math.isfinite(self.norm.item()) if at_once else self.norm.isfinite()
        if scaler(trainer) is not None:
            return  # it sees the same gradients, and does not take the step
        if self.action == "skip" and not fused(optimizer):
            self.step_applied = bool(self.step_applied)
        if isinstance(self.step_applied, Tensor):
            optimizer.found_inf = (~self.step_applied).float()  # type: ignore[attr-defined]
        elif not self.step_applied:
            self.gradients = []
            optimizer.zero_grad(set_to_none=True)  # what has no gradient is left alone

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.losses.append(outputs["loss"])
        self.gradients = []
        if self.norm is None:  # gradients are still accumulating
            return
        norm, self.norm = self.norm, None
        losses, self.losses = self.losses, []
        if self.step_applied is True:  # a verdict that is known at once leaves nothing to read
            self.consecutive_skips = 0
            return
        loss = torch.stack(losses).sum()
        self.pending.append((self.step, torch.stack((loss.float(), norm.to(loss.device).float()))))
        if self.step_applied is False or len(self.pending) >= READ_EVERY or logs(trainer):
            self.read()

    # -- reading it -----------------------------------------------------------------------------

    def read(self, together: bool = True) -> None:
        """Look at the steps since the last look, log the bad ones, and stop if the run has to.

        Args:
            together: whether all processes read now, and may tell each other their losses.

        Raises:
            NonFiniteError: the run has to stop.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        numbers = torch.stack([n for _, n in pending])
        if together and self.trainer.world_size > 1 and not bool(numbers[:, 1].isfinite().all()):
            numbers = self.trainer.strategy.reduce(numbers, reduce_op="mean")
        for (step, _), (loss, norm) in zip(pending, numbers.tolist(), strict=True):
            if math.isfinite(norm):
                self.consecutive_skips = 0
            else:
                self.consecutive_skips += 1
                self.judge(step, loss, norm)

    def judge(self, step: int, loss: float, norm: float) -> None:
        """Log a step that was not taken."""
        what = f"step {step}: the loss is {loss:.4g} and the norm of its gradient {norm:.4g}"
        if scaler(self.trainer) is not None and math.isfinite(loss):
            if self.consecutive_skips > SCALER_PATIENCE:
                raise NonFiniteError(f"{what}, at any scale of float16. {REMEDY}")
            return
        for logger in self.trainer.loggers:
            logger.log_metrics({"nonfinite/loss": loss, "nonfinite/grad_norm": norm}, step)
        if self.action == "stop":
            raise NonFiniteError(
                f"{what}. The step was not taken, and the run stops; its last checkpoint is as it was. {REMEDY}, "
                "or go on without such steps: --nonfinite.action skip --ckpt_path auto"
            )
        if self.consecutive_skips > self.max_skips:
            raise NonFiniteError(
                f"{what}, as in the {self.consecutive_skips - 1} steps before: more than "
                f"nonfinite.max_skips={self.max_skips}. {REMEDY}"
            )
        if self.trainer.is_global_zero:
            print(f"warning: {what}; the step was skipped", flush=True)

    def require_finite(self, module: LightningModule, together: bool = True) -> None:
        """Read, and look at the weights too: a finite gradient times a large rate can be infinite.

        Raises:
            NonFiniteError: the run has to stop, or a weight is not finite.
        """
        self.read(together)
        if not finite_weights(module):
            step = self.trainer.global_step
            raise NonFiniteError(
                f"step {step}: a weight is not finite, so no checkpoint is written. {REMEDY}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # another process may be elsewhere, so nothing is shared here
        try:
            self.require_finite(pl_module, together=False)
            condemned = isinstance(exception, NonFiniteError)
        except NonFiniteError as error:
            condemned = True
            if trainer.is_global_zero:
                print(f"warning: {error}", flush=True)
        if condemned:
            for callback in trainer.checkpoint_callbacks:
                callback.save_on_exception = False  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consecutive_skips = state_dict.get("consecutive_skips", state_dict.get("in_a_row", 0))


REMEDY = "Train with a smaller learning rate, or with trainer.gradient_clip_val"


def guard(trainer: Trainer) -> NonFinite | None:
    """The guard of a run, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, NonFinite)), None)  # type: ignore[attr-defined]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    found = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [gradient for gradient in found if gradient is not None]


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients, in float32 at least.

    Of numbers whose squares leave that range it is infinite, as the moments of Adam would be.
    """
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    if reads_at_once(gradients[0]) and sum(map(Tensor.numel, gradients)) <= FEW:
        return torch.linalg.vector_norm(_flatten_dense_tensors(gradients), dtype=dtype)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype)))


def finite_weights(module: LightningModule) -> bool:
    """True where all parameters are finite; by their largest elements, because a sum of squares overflows."""
    network: nn.Module = module.network  # type: ignore[assignment]
    weights = [p.detach() for p in network.parameters() if p.numel()]
    if not weights:
        return True
    return bool(torch.stack(torch._foreach_norm(weights, math.inf)).isfinite().all())


def reads_at_once(x: Tensor) -> bool:
    """True where reading a tensor waits for no accelerator."""
    return x.device.type == "cpu"


def fused(optimizer: Optimizer) -> bool:
    """True for an optimiser that leaves a step out by itself where `found_inf` tells it to."""
    return all(group.get("fused") for group in optimizer.param_groups)


def scaler(trainer: Trainer) -> Any:
    """The loss scaler of float16 training, which leaves steps out by itself."""
    return getattr(trainer.precision_plugin, "scaler", None)


def logs(trainer: Trainer) -> bool:
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0

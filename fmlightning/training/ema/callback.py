r"""Moving averages of the network's weights, used wherever the model is evaluated.

    average <- average + (1 - d_n) (weights - average)                                       (1)

after optimiser step n = 1, 2, ..., and not after one that was skipped, with

    d_n = min(decay, (1 + n) / (10 + n))      exponential, warmed up                         (2)
    d_n = (1 - 1/n)^(gamma + 1)               a power function, `power.py`                   (3)

There may be several at once; the first is the one that is used. The raw weights train on and are never overwritten:
the average is swapped in for validation, sampling and prediction by a context that always swaps back.

Source: the warm-up of (2) is that of Abadi et al. 2016, tf.train.ExponentialMovingAverage.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fmlightning.runs.files import clear_unfinished
from fmlightning.training.ema.power import exponent, power_decay, require_width
from fmlightning.training.ema.snapshots import FOLDER, write_snapshot
from fmlightning.training.lightning.scheduled import step_after
from fmlightning.training.nonfinite import NonFinite, guard

FALLBACK = 1000
"""Steps between two snapshots of a run whose length is not known."""


class Average:
    """One average.

    Args:
        name: `decay=0.999` or `sigma_rel=0.05`.
        decay: d_n, by n.
    """

    def __init__(self, name: str, decay: Callable[[int], float]) -> None:
        self.name, self.decay = name, decay
        self.shadow: dict[str, Tensor] = {}
        self.updates = 0

    def begin(self, parameters: dict[str, nn.Parameter]) -> None:
        """Start at these weights, or go on, on their device."""
        if not self.shadow:
            self.shadow = {n: p.detach().float().clone() for n, p in parameters.items()}
        self.shadow = {n: s.to(parameters[n].device) for n, s in self.shadow.items()}
        self.tensors = list(self.shadow.values())

    def update(self, weights: list[Tensor], applied: bool | Tensor) -> None:
        """Equation (1), if the step was applied."""
        self.updates += 1
        rate = 1 - self.decay(self.updates)
        if applied is True:
            torch._foreach_lerp_(self.tensors, weights, rate)
        elif isinstance(applied, Tensor):  # a verdict that stays on its device
            changes = torch._foreach_sub(weights, self.tensors)
            torch._foreach_mul_(changes, rate * applied)
            torch._foreach_add_(self.tensors, changes)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]


class EMA(Callback):
    """Average the network's weights after every optimiser step.

    Args:
        decay: how much of the average is kept in a step, in [0, 1); of several the first is the one that is used. 0
            switches averaging off.
        warmup: whether the decay starts small, as in (1 + n) / (10 + n).
        sigma_rel: widths of power-function averages to keep, such as [0.05, 0.10], of which `fmlightning ema` makes
            any other width after training; null keeps none.
        snapshots: about how many of these are written over a run, evenly, to its folder `ema`.
    """

    per_step_hooks = ("on_train_batch_end",)

    def __init__(
        self,
        decay: float | list[float] = 0.999,
        warmup: bool = True,
        sigma_rel: list[float] | None = None,
        snapshots: int = 32,
    ) -> None:
        decays = decay if isinstance(decay, list) else [decay]
        for each in decays:
            if not 0 <= each < 1:
                raise ValueError(f"ema.decay={each} must lie in [0, 1); 0 switches averaging off")
        for each in sigma_rel or []:
            require_width(each, "ema.sigma_rel")
        if not decays:
            raise ValueError("ema.decay=[] names no decay: 0 switches averaging off")
        for name, values in {"decay": decays, "sigma_rel": sigma_rel or []}.items():
            if len(set(values)) < len(values):
                raise ValueError(f"ema.{name}={values} has a value twice: name each once")
        if snapshots < 1:
            raise ValueError(f"ema.snapshots={snapshots} must be at least 1")
        self.powers = {f"sigma_rel={s:g}": exponent(s) for s in sigma_rel or []}
        self.snapshots = snapshots
        decay_of = {f"decay={d:g}": partial(ema_decay, d, warmup) for d in decays if d}
        decay_of |= {name: partial(power_decay, gamma=g) for name, g in self.powers.items()}
        self.averages = [Average(name, decay) for name, decay in decay_of.items()]
        self.every: int | None = None

    @property
    def state_key(self) -> str:
        return "EMA"

    @property
    def updates(self) -> int:
        return self.averages[0].updates if self.averages else 0

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The average that is used."""
        return self.averages[0].shadow if self.averages else {}

    @property
    def ready(self) -> bool:
        """True where there is an average to use."""
        return self.updates > 0

    # -- averaging --------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here the module is on its device, which in `setup` it is not
        parameters = named_parameters(pl_module)
        for average in self.averages:
            average.begin(parameters)
        self.weights = [parameters[n].detach() for n in self.shadow]
        self.exact = all(w.dtype == torch.float32 for w in self.weights)
        self.guard: NonFinite | None = guard(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step  # of a resumed run it is not known before
        late = [t.name for t in self.averages if t.name in self.powers and t.updates != self.step]
        if late:
            raise ValueError(
                f"ema.{late[0]}: a power-function average begins with the run, and this one goes on from step "
                f"{self.step} without it; leave it out, or start a new run"
            )
        if self.powers:
            self.every = interval(trainer.estimated_stepping_batches, self.snapshots)
            if trainer.is_global_zero:
                clear_unfinished(Path(trainer.default_root_dir) / FOLDER)

    def next_due_step(self, trainer: Trainer) -> float:
        return step_after(trainer.global_step, self.every)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step == self.step or not self.averages:  # gradients are still accumulating
            return
        self.step = step
        applied = True if self.guard is None else self.guard.step_applied
        # which takes a third as long as (1) where there is nothing to convert
        weights = self.weights if self.exact else [w.float() for w in self.weights]
        for average in self.averages:
            average.update(weights, applied)
        if self.every and step % self.every == 0:
            self.keep_snapshot(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every and self.step % self.every:
            self.keep_snapshot(trainer)

    def keep_snapshot(self, trainer: Trainer) -> None:
        """Write the power-function averages of this step, once all steps before it are known to be good."""
        if self.guard is not None:
            self.guard.read()  # here, where every process is
        if trainer.is_global_zero:
            kept = {t.name: t.shadow for t in self.averages if t.name in self.powers}
            write_snapshot(Path(trainer.default_root_dir), self.step, kept)

    # -- using it ---------------------------------------------------------------------------------

    @contextmanager
    def swapped(self, network: nn.Module) -> Iterator[None]:
        """Give a network the averaged weights; whatever happens inside, it gets its own back."""
        if not self.ready:
            yield
            return
        parameters = dict(network.named_parameters())
        weights = [parameters[n].detach() for n in self.shadow]
        raw = [w.clone() for w in weights]
        try:
            torch._foreach_copy_(
                weights,
                [s.to(w.device) for s, w in zip(self.shadow.values(), weights, strict=True)],
            )
            yield
        finally:
            torch._foreach_copy_(weights, raw)

    def state_dict(self) -> dict[str, Any]:
        """The first average as it stands, and the others beside it."""
        others = {t.name: t.state_dict() for t in self.averages[1:]}
        first = {"name": self.averages[0].name} if self.averages else {}
        return {"shadow": self.shadow, "updates": self.updates, **first, "others": others}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = {state_dict.get("name"): state_dict, **state_dict.get("others", {})}
        for k, average in enumerate(self.averages):
            own = states.get(average.name)
            if k == 0 and own is None and average.name not in self.powers:
                own = state_dict  # of another decay: it goes on with this one
            if own:
                average.load_state_dict(own)


def ema_decay(decay: float, warmup: bool, n: int) -> float:
    """d_n of equation (2)."""
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


def interval(steps: float, snapshots: int) -> int:
    """Steps between two snapshots."""
    return max(1, int(steps) // snapshots) if math.isfinite(steps) else FALLBACK


def named_parameters(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    network: nn.Module = pl_module.network  # type: ignore[assignment]
    return dict(network.named_parameters())


def averages_of(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The averages in a checkpoint, by name."""
    first = {state.get("name", "first"): state["shadow"]} if state.get("updates") else {}
    return first | {name: other["shadow"] for name, other in state.get("others", {}).items()}


@contextmanager
def evaluation_weights(trainer: Trainer, network: nn.Module) -> Iterator[None]:
    """The weights a model is evaluated with: the average where there is one, in evaluation mode."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    training = network.training
    network.eval()
    try:
        if ema is None:
            yield
        else:
            with ema.swapped(network):
                yield
    finally:
        network.train(training)

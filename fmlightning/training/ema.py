r"""An exponential moving average of the network's weights, used wherever the model is judged.

    ema <- ema + (1 - d_n) (weights - ema),   d_n = min(decay, (1 + n) / (10 + n))           (1)

after optimiser step n = 1, 2, ..., and not after one that was skipped. The raw weights train on and are never
overwritten: the average is swapped in for validation, sampling and prediction by a context that always swaps back.

Source: the warm-up of (1) is that of Abadi et al. 2016, tf.train.ExponentialMovingAverage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fmlightning.training.nonfinite import taken


class EMA(Callback):
    """Average the network's weights after every optimiser step.

    Args:
        decay: how much of the average is kept in a step, in [0, 1); 0 switches averaging off.
        warmup: whether the decay starts small, as in (1 + n) / (10 + n).
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} must lie in [0, 1); 0 switches averaging off")
        self.decay, self.warmup = decay, warmup
        self.shadow: dict[str, Tensor] = {}
        self.updates = 0

    @property
    def state_key(self) -> str:
        return "EMA"

    @property
    def ready(self) -> bool:
        """Whether there is an average to use."""
        return self.updates > 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here the module is on its device, which in `setup` it is not
        parameters = named_parameters(pl_module)
        if self.decay and not self.shadow:
            self.shadow = {n: p.detach().float().clone() for n, p in parameters.items()}
        self.shadow = {n: s.to(parameters[n].device) for n, s in self.shadow.items()}
        self.averages = list(self.shadow.values())
        self.weights = [parameters[n].detach() for n in self.shadow]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step  # of a resumed run it is not known before

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step or not self.decay:  # gradients are still accumulating
            return
        self.step = trainer.global_step
        self.updates += 1
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        weights, good = [w.float() for w in self.weights], taken(trainer)
        if isinstance(good, Tensor):  # a verdict that stays on its device
            changes = torch._foreach_sub(weights, self.averages)
            torch._foreach_mul_(changes, (1 - decay) * good)
            torch._foreach_add_(self.averages, changes)
        elif good:
            torch._foreach_lerp_(self.averages, weights, 1 - decay)

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
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shadow, self.updates = dict(state_dict["shadow"]), state_dict["updates"]


def named_parameters(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    network: nn.Module = pl_module.network  # type: ignore[assignment]
    return dict(network.named_parameters())


@contextmanager
def evaluation_weights(trainer: Trainer, network: nn.Module) -> Iterator[None]:
    """The weights a model is judged by: the average where there is one, in evaluation mode."""
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

r"""The true error of a flow, where the data has a closed form.

    E |v - u_t(x_t)|^2   and   E |v - u_t(x_t | x_1)|^2 - C,   C = E tr Cov[u_t | x_t]            (1)

The first compares the network with the oracle's marginal velocity, the second is what training sees, less the
part no network can remove. Both estimate the same number at the same held-out points, and agree within their
errors. The second is far noisier: C is much larger than the error of a trained network.

Source: Lipman et al. 2023, arXiv:2210.02747, Theorem 2; C is `MixturePath.spread`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.shapes import flat
from fmlightning.flow.theory.mixture import MixturePath, mixture_of
from fmlightning.metrics.means import MeanWithError
from fmlightning.training.ema.callback import evaluation_weights
from fmlightning.training.module import FlowMatching


class OracleError(Callback):
    """Log both sides of (1) with their standard errors where the data is a mixture, and nothing elsewhere.

    The oracle knows Gaussian mixtures as data (GaussianMixture, EightGaussians), the Gaussian source and the
    independent coupling. The numbers are of the velocity whatever the network predicts, at the points and times of
    `val/loss`, and sums over the D dimensions: for a network that predicts the velocity, with no weight,

        val/cfm_minus_C = D val/loss - C.

    Logged as `val/fm_error`, `val/fm_error_se`, `val/cfm_minus_C`, `val/cfm_minus_C_se`; in testing as `test/...`.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.path = exact_path(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        self.means = {name: MeanWithError() for name in ("fm_error", "cfm_minus_C")}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
    ) -> None:
        self.look(trainer, pl_module, outputs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.look(trainer, pl_module, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.log_means("val", pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.log_means("test", pl_module)

    def look(self, trainer: Trainer, module: FlowMatching, outputs: Mapping[str, Tensor]) -> None:
        """Take a block of held-out points `xt` at `t`, with their conditional velocity `ut`."""
        if self.path is None:
            return
        xt, t, ut = (outputs[name] for name in ("xt", "t", "ut"))
        with evaluation_weights(trainer, module.network), torch.no_grad():
            v = module.field(xt, t).double()
        fm, cfm = errors(self.path, v, xt.double(), t.double(), ut)
        for mean, values in zip(self.means.values(), (fm, cfm), strict=True):
            mean.to(xt.device).update(values)

    def log_means(self, split: str, module: FlowMatching) -> None:
        if self.path is None:
            return
        for name, metric in self.means.items():
            mean, error = metric.compute()
            metric.reset()
            module.log(f"{split}/{name}", mean.float())
            module.log(f"{split}/{name}_se", error.float())


def errors(
    path: MixturePath, v: Tensor, xt: Tensor, t: Tensor, ut: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides of (1) at each point, (B,): their means estimate one number."""
    dims = xt[0].numel()
    fm = flat((v - path.velocity(xt, t)).square()).sum(1)
    cfm = flat((v - ut).square()).sum(1)
    return fm, cfm - dims * path.spread(xt, t)


def exact_path(module: FlowMatching, data: Any) -> MixturePath | None:
    """The path whose velocity the network should learn, if it has a closed form."""
    mixture = mixture_of(getattr(data, "target", None))
    path, source, coupling = (getattr(module.recipe, n) for n in ("path", "source", "coupling"))
    known = isinstance(path, AffinePath) and source.gaussian and coupling.identity
    return mixture.along(path) if mixture is not None and known else None

r"""The LightningModule: the thin place where data, path, network and objective meet.

    batch (x1, y) -> source x0 -> coupling -> time t -> path -> (x_t, u_t) -> network -> objective

Each arrow is one call with one owner. Every random number is keyed by (seed, step, row of the global batch).
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Shard
from fmlightning.flow.couplings import Coupling, Independent
from fmlightning.flow.fields import NetworkField, evaluate
from fmlightning.flow.keys import Key, Rows
from fmlightning.flow.maximum_likelihood import MaximumLikelihood
from fmlightning.flow.objectives import cfm_loss
from fmlightning.flow.ode import ODESolver, Solution
from fmlightning.flow.paths import AffinePath, PathSample
from fmlightning.flow.predictions import Prediction, domain
from fmlightning.flow.sampling import sample
from fmlightning.flow.schedules import Linear, Schedule
from fmlightning.flow.sources import Gaussian, Source
from fmlightning.flow.times import TimeSampler, Uniform
from fmlightning.flow.weightings import Unweighted, Weighting
from fmlightning.metrics.binned import BinnedMean
from fmlightning.training.decay import Decay
from fmlightning.training.ema import evaluation_weights

BINS = 8


class FlowMatching(LightningModule):
    """Conditional flow matching of a velocity network.

    Args:
        network: `net(x, t, y=None) -> like x`; TimeMLP, UNet or a class of your own.
        path: the schedule of the probability path: Linear, VariancePreserving, VarianceExploding, Trigonometric, ...
        source: the law at t = 0: Gaussian or a toy.
        coupling: how source and data points are paired.
        predicts: what the network outputs: velocity, data, noise or score.
        times: the law of training times.
        weight: how much the loss counts at each time: Unweighted, AsVelocity, EDM, MinSNR.
        objective: null is flow matching; MaximumLikelihood trains through the solver, and then the coupling, the
            times and the weight have no effect, and `train/loss` and `val/loss` are in nats.
        optimizer: an optimiser of torch.
        scheduler: a schedule of the learning rate, stepped once a step; null keeps it constant.
        label_drop: probability of hiding a label in training, for classifier-free guidance.
        solver: how validation, prediction and callbacks sample.
        compile: whether to compile the network with torch.compile.
        seed: of every random number of training; the command line sets it to `seed_everything`.
    """

    event_shape: tuple[int, ...]

    def __init__(
        self,
        network: nn.Module,
        path: Schedule = Linear(),  # noqa: B008 - frozen, as are the next
        source: Source = Gaussian(),  # noqa: B008
        coupling: Coupling = Independent(),  # noqa: B008
        predicts: Prediction = "velocity",
        times: TimeSampler = Uniform(),  # noqa: B008
        weight: Weighting = Unweighted(),  # noqa: B008
        objective: MaximumLikelihood | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        label_drop: float = 0.0,
        solver: ODESolver = ODESolver(),  # noqa: B008
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if predicts == "score" and not (source.gaussian and coupling.independent):
            raise ValueError(
                f"model.predicts=score needs a Gaussian source that is independent of the data, and not "
                f"source={source} with coupling={coupling}: predict velocity, data or noise"
            )
        if not 0 <= label_drop < 1:
            raise ValueError(f"model.label_drop={label_drop} is a probability in [0, 1)")
        self.network = network
        self.path = AffinePath(path)
        self.source, self.coupling, self.times = source, coupling, times
        self.predicts: Prediction = predicts
        self.optimizer, self.scheduler = optimizer, scheduler
        self.weight, self.objective = weight, objective
        self.interval = domain(predicts, path)
        self.label_drop = label_drop
        self.solver = solver
        self.seed = seed
        self.key = Key(seed).fold("train")
        self.keyed_network = "rows" in inspect.signature(network.forward).parameters
        if compile and objective is not None:
            raise ValueError(
                "model.compile=true compiles no second derivatives, which model.objective=MaximumLikelihood needs: "
                "set it to false"
            )
        if compile:
            self.network.compile()
        # in a tuple: as a submodule it would be cast to the network's precision
        self.metrics = (BinnedMean(BINS),)

    @property
    def schedule(self) -> Schedule:
        return self.path.schedule

    @property
    def field(self) -> NetworkField:
        """The velocity field of the network as it stands."""
        return NetworkField(self.network, self.schedule, self.predicts)

    # -- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.check(self.trainer.datamodule)  # type: ignore[attr-defined]
        foreign = [
            name
            for name, m in self.network.named_modules()
            if isinstance(m, _DropoutNd) and m.p > 0
        ]
        if foreign and stage == "fit":
            warnings.warn(
                f"{foreign[0]} is a torch.nn.Dropout, which draws from the global random state: this run will not "
                "resume bit for bit. fmlightning.nets.embeddings.Dropout is keyed by sample.",
                stacklevel=1,
            )

    def check(self, data: FlowData) -> None:
        """Take the data's shapes, and refuse what does not fit them, before any training."""
        self.event_shape = data.event_shape
        self.num_classes = data.num_classes
        self.levels = data.levels
        self.batch_size = data.batch_size
        if self.label_drop and not self.num_classes:
            raise ValueError(
                f"model.label_drop={self.label_drop} hides labels, and {type(data).__name__} has none: set it to 0"
            )
        weights = list(self.network.parameters())
        if weights:  # an oracle has none, and can be validated all the same
            optimizer = self.optimizer(weights)
            if self.scheduler is not None:
                self.scheduler(optimizer)
        self.source.check((1, *self.event_shape))
        self.check_network(type(data).__name__)

    def check_network(self, data: str) -> None:
        """Call coupling and network once, on two samples."""
        x = torch.zeros(2, *self.event_shape, device=self.device)
        last = self.num_classes - 1
        y = torch.full((2,), last, device=self.device) if self.num_classes else None
        self.coupling.pairs(x, x, y, Key(0).generator())
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                t = torch.full((2,), 0.5, device=self.device)
                out = evaluate(self.network, self.schedule, x, t, y)
        except TypeError as error:
            raise ValueError(
                f"model.network {type(self.network).__name__} must take net(x, t, y=None): {error}"
            ) from error
        except IndexError as error:
            raise ValueError(
                f"model.network {type(self.network).__name__} knows fewer labels than the {self.num_classes} of "
                f"{data}: set model.network.num_classes={self.num_classes}"
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"model.network {type(self.network).__name__} cannot take samples of shape {self.event_shape} "
                f"from {data}: {error}"
            ) from error
        finally:
            self.network.train(training)
        if out.shape != x.shape:
            raise ValueError(
                f"model.network {type(self.network).__name__} maps samples of shape {self.event_shape} to "
                f"{tuple(out.shape[1:])}; a velocity has the shape of its point"
            )

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.network.parameters())
        if "bf16" in str(self.trainer.precision):
            # Lightning refuses to clip for a fused optimiser, for the sake of a scaler that bf16 does not have
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, Decay):
            scheduler.end_at(int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # -- training -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        key = self.key.fold(step)
        point, y = self.draw(batch["x1"], batch.get("y"), key)
        loss = self.loss(point, y, key.fold("network").rows(self.row_numbers())).mean()
        if self.logs_now:  # self.log at every step would take a quarter of a small network's time
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def loss(self, point: PathSample, y: Tensor | None, rows: Rows) -> Tensor:
        """The loss of each sample."""
        if self.objective is not None:
            return self.objective(self.field, point.x1, self.source, y=y, rows=rows)
        return cfm_loss(
            self.network,
            self.schedule,
            point,
            predicts=self.predicts,
            y=y,
            rows=rows if self.keyed_network else None,
            weight=self.weight,
        )

    def draw(self, x1: Tensor, y: Tensor | None, key: Key) -> tuple[PathSample, Tensor | None]:
        """Points, times and velocities of this process's rows of a global batch."""
        shard, size = self.shard, self.batch_size
        rows, device = shard.rows(size), x1.device
        x0 = self.source.sample((size, *x1.shape[1:]), key.fold("x0").generator(device))
        if isinstance(self.coupling, Independent):
            x0 = x0[rows]
        else:
            x0, x1, y = self.couple(x0, x1, y, key, rows)
        u = torch.rand(size, generator=key.fold("time").generator(device), device=device)
        t = self.times.draw(u, self.interval)[rows]
        eps = None
        if self.schedule.has_gamma:
            eps = torch.randn(
                size, *x1.shape[1:], generator=key.fold("eps").generator(device), device=device
            )[rows]
        if y is not None and self.label_drop:
            u = torch.rand(size, generator=key.fold("label").generator(device), device=device)[rows]
            y = torch.where(u < self.label_drop, self.num_classes, y)
        return self.path.sample(x0, x1, t, eps), y

    def couple(
        self, x0: Tensor, x1: Tensor, y: Tensor | None, key: Key, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pair the global batch: every process solves the same problem and keeps its own rows."""
        if self.trainer.world_size > 1:
            x1 = gathered(self, x1)
            y = None if y is None else gathered(self, y)
        i, j = self.coupling.pairs(x0, x1, y, key.fold("coupling").generator())
        return x0[i][rows], x1[j][rows], None if y is None else y[j][rows]

    @property
    def shard(self) -> Shard:
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    def row_numbers(self) -> Tensor:
        rows = self.shard.rows(self.batch_size)
        return torch.arange(rows.start, rows.stop, device=self.device)

    @property
    def logs_now(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    # -- validation, testing, prediction ----------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.held_out_loss(batch, "validation")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.held_out_loss(batch, "test")

    def held_out_loss(self, batch: Batch, purpose: str) -> dict[str, Tensor]:
        """The loss at a time and a source point keyed by each sample's index, the same in every run."""
        x1, y = batch["x1"], batch.get("y")
        rows = Key(0).fold(purpose).rows(batch["index"])
        point, y = self.held_out_sample(x1, y, rows)
        with evaluation_weights(self.trainer, self.network):
            loss = self.loss(point, y, rows)
        low, high = self.interval
        self.metrics[0].to(self.device).update(loss, (point.t - low) / (high - low))
        return {"loss": loss, "xt": point.xt, "t": point.t, "ut": point.ut}

    def held_out_sample(
        self, x1: Tensor, y: Tensor | None, rows: Rows
    ) -> tuple[PathSample, Tensor | None]:
        """Points keyed by each sample's index, paired in blocks as large as a training batch."""
        x0 = self.source.rows(rows, x1.shape[1:])
        if not isinstance(self.coupling, Independent):
            i, j = self.couple_blocks(x0, x1, y, int(rows.index[0]))
            x0, x1, y = x0[i], x1[j], None if y is None else y[j]
        low, high = self.interval
        t = low + (high - low) * rows.uniform((), stream=2)
        eps = rows.normal(x1.shape[1:], stream=3) if self.schedule.has_gamma else None
        return self.path.sample(x0, x1, t, eps), y

    def couple_blocks(
        self, x0: Tensor, x1: Tensor, y: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """Pairs within each block of `batch_size`: what the training pairs are, and never one huge problem."""
        parts = []
        for block in torch.arange(len(x1), device=x1.device).split(self.batch_size):
            generator = Key(0).fold("coupling", first + int(block[0])).generator()
            labels = None if y is None else y[block]
            i, j = self.coupling.pairs(x0[block], x1[block], labels, generator)
            parts.append((block[i], block[j]))
        pairs_i, pairs_j = zip(*parts, strict=True)
        return torch.cat(pairs_i), torch.cat(pairs_j)

    def on_validation_epoch_end(self) -> None:
        self.log_held_out("val")

    def on_test_epoch_end(self) -> None:
        self.log_held_out("test")

    def log_held_out(self, split: str) -> None:
        """The mean loss, and of flow matching the mean in each eighth of the time interval."""
        mean, bins = self.metrics[0].compute()
        self.metrics[0].reset()
        self.log(f"{split}/loss", mean.float(), prog_bar=True)
        if self.objective is None:  # a likelihood has no time
            for k, value in enumerate(bins.float()):
                self.log(f"{split}/loss_bin{k}", value)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Generated samples, one for each index, with the labels of the batch."""
        x1 = self.generate(batch["index"], batch.get("y")).x
        return {"x": x1, "index": batch["index"], **({"y": batch["y"]} if "y" in batch else {})}

    def generate(
        self, index: Tensor, y: Tensor | None = None, save_at: int | Sequence[float] = 0
    ) -> Solution:
        """The samples with these numbers, by the averaged weights where there are any."""
        with evaluation_weights(self.trainer, self.network):
            return sample(
                self.field, self.source, self.solver, index, self.event_shape,
                seed=self.seed, y=y, save_at=save_at,
            )  # fmt: skip

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is needed to sample from the weights without the data."""
        checkpoint["flow"] = {
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            "levels": self.levels,
        }


def gathered(module: LightningModule, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes."""
    parts: Any = module.all_gather(rows)
    return parts.flatten(0, 1)

r"""The LightningModule: the thin place where data, path, network and objective meet.

    batch (x1, y) -> source x0 -> coupling -> time t -> path -> (x_t, u_t) -> network -> objective

Each arrow is one call with one owner. Every random number is keyed by (seed, step, row of the global batch).
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torchmetrics.utilities.distributed import gather_all_tensors

from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Shard
from fmlightning.flow.couplings import Coupling, Independent, Potential, SemidiscreteOT
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.keys import Key, Rows
from fmlightning.flow.models import NetworkField, TrainedField, evaluate, require_one_noise
from fmlightning.flow.objectives.cfm import cfm_loss, mean_cfm_loss
from fmlightning.flow.objectives.maximum_likelihood import MaximumLikelihood
from fmlightning.flow.objectives.time_samplers import TimeSampler, Uniform
from fmlightning.flow.objectives.weightings import Unweighted, Weighting
from fmlightning.flow.paths.affine import AffinePath, PathSample
from fmlightning.flow.paths.predictions import Prediction, domain
from fmlightning.flow.paths.schedules import Linear, Schedule
from fmlightning.flow.solvers.ode import ODESolver, Solution
from fmlightning.flow.solvers.sampling import sample
from fmlightning.flow.sources import Gaussian, PairedSource, Source
from fmlightning.metrics.means import BinnedMean
from fmlightning.runs.cache import cached
from fmlightning.runs.checkpoint import require_same_layout
from fmlightning.training.draws import Draws
from fmlightning.training.ema.callback import evaluation_weights
from fmlightning.training.lightning.internals import current_step
from fmlightning.training.lr_schedules import LRSchedule
from fmlightning.training.nonfinite import guard
from fmlightning.training.pairing import (
    BatchPairing,
    PairedBatches,
    PairingContext,
    PotentialFit,
    SetPairing,
)
from fmlightning.training.prefetch import MOST_AHEAD

BINS = 8


class FlowMatching(LightningModule):
    """Conditional flow matching of a velocity network.

    Args:
        network: `net(x, t, y=None) -> like x`; TimeMLP, UNet or a class of your own.
        path: the schedule of the probability path: Linear, VariancePreserving, VarianceExploding, Trigonometric, ...
        source: the law at t = 0: Gaussian or a toy; not used where the data brings x0.
        coupling: how source and data points are paired.
        predicts: what the network outputs: velocity, data, noise or score.
        times: the law of training times.
        weight: how much the loss counts at each time: Unweighted, AsVelocity, EDM, MinSNR.
        objective: null is flow matching; MaximumLikelihood trains through the solver, and then the coupling, the
            times and the weight have no effect, and `train/loss` and `val/loss` are in nats.
        optimizer: an optimiser of torch.
        scheduler: a schedule of the learning rate, stepped once a step; null keeps it constant.
        class_dropout_prob: probability of hiding a label in training, for classifier-free guidance.
        solver: how validation, prediction and callbacks sample.
        guidance: how strongly they push samples towards their labels; training knows nothing of it.
        compile: whether to compile the network with torch.compile.
        channels_last: whether the weights of convolutions lie with their channels last in memory, which convolutions on
            GPUs prefer, in half precision above all.
        ahead: how many batches ahead the coupling is solved, each in a thread beside training; 0 solves it within the
            step. The pairs do not depend on it.
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
        class_dropout_prob: float = 0.0,
        solver: ODESolver = ODESolver(),  # noqa: B008
        guidance: Guidance = Guidance(),  # noqa: B008
        compile: bool = False,
        channels_last: bool = False,
        ahead: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(
                f"model.class_dropout_prob={class_dropout_prob} is a probability in [0, 1)"
            )
        if not 0 <= ahead <= MOST_AHEAD:
            raise ValueError(
                f"model.ahead={ahead} must be from 0, which solves within the step, to {MOST_AHEAD}: each is a thread"
            )
        self.network = network
        self.path = AffinePath(path)
        self.source, self.coupling, self.times = source, coupling, times
        self.predicts: Prediction = predicts
        self.check_prediction()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.weight, self.objective = weight, objective
        self.interval = domain(predicts, path)
        self.class_dropout_prob = class_dropout_prob
        self.solver, self.guidance = solver, guidance
        self.ahead, self.seed = ahead, seed
        self.potential: Tensor | None = None
        self.potential_of: str | None = None
        self.numbers: Draws | None = None
        self.key = Key(seed).fold("train")
        self.keyed_network = draws(network)
        if compile and objective is not None:
            raise ValueError(
                "model.compile=true compiles no second derivatives, which model.objective=MaximumLikelihood needs: "
                "set it to false"
            )
        if channels_last:
            put_channels_last(network)
        if compile:
            self.network.compile()
        # in a tuple: as a submodule it would be cast to the network's precision
        self.metrics = (BinnedMean(BINS),)

    def check_prediction(self) -> None:
        """Refuse a prediction that does not tell the velocity.

        Raises:
            ValueError: the source or the coupling does not suit it.
        """
        if self.predicts == "score" and not (self.source.gaussian and self.coupling.independent):
            raise ValueError(
                f"model.predicts=score needs a Gaussian source that is independent of the data, and not "
                f"source={self.source} with coupling={self.coupling}: predict velocity, data or noise"
            )
        if self.predicts != "velocity":
            use = f"model.predicts={self.predicts}"
            require_one_noise(use, self.schedule, self.source, self.coupling.independent)

    @property
    def schedule(self) -> Schedule:
        return self.path.schedule

    @property
    def field(self) -> NetworkField:
        """The velocity field of the network as it stands."""
        return NetworkField(
            self.network,
            self.schedule,
            self.predicts,
            source=self.source,
            independent=self.coupling.independent,
        )

    @property
    def guided(self) -> TrainedField:
        """The field that samples follow."""
        return self.guidance.free(self.field, self.num_classes if self.class_dropout_prob else 0)

    # -- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.numbers = None
        self.check(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after it has rounded a checkpoint's weights to float32
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
        self.check_coupling(data)
        self.latent = data.seen.event_shape != data.event_shape
        if data.gives_x0:
            self.take_pairs(data)
        if self.class_dropout_prob and not self.num_classes:
            raise ValueError(
                f"model.class_dropout_prob={self.class_dropout_prob} hides labels, and {type(data).__name__} has none: "
                "set it to 0"
            )
        _ = self.guided  # refuses a model without labels
        weights = list(self.network.parameters())
        if weights:  # an oracle has none, and can be validated all the same
            optimizer = self.optimizer(weights)
            if isinstance(optimizer, torch.optim.SparseAdam):
                raise ValueError(
                    "model.optimizer=SparseAdam takes sparse gradients, and these are dense: take Adam or AdamW"
                )
            if self.scheduler is not None:
                self.scheduler(optimizer)
        self.source.check((1, *self.event_shape))
        self.check_network(type(data).__name__)

    def check_coupling(self, data: FlowData) -> None:
        """Let the data bring x0 with x1, where they are paired.

        Raises:
            ValueError: they cannot be paired as the coupling says.
        """
        if isinstance(self.coupling, Independent):
            data.paired, data.pair = 0, None
            return
        size = self.coupling.ot_batch_size or self.batch_size
        if size > self.batch_size and size % self.batch_size:
            raise ValueError(
                f"model.coupling.ot_batch_size={size} must be a multiple of data.batch_size={self.batch_size}, or "
                "smaller than it"
            )
        data.paired, data.pair = max(size, self.batch_size), self.pair
        if isinstance(self.coupling, SemidiscreteOT) and not data.gives_x0:
            data.require_fixed_set()

    def take_pairs(self, data: FlowData) -> None:
        """Let x0 come with the data.

        Raises:
            ValueError: an option of the model speaks of another x0.
        """
        name = type(data).__name__
        if not isinstance(self.coupling, Independent):
            raise ValueError(
                f"model.coupling={self.coupling}: each x0 of {name} belongs to the x1 beside it and is not paired "
                "anew; set model.coupling=Independent"
            )
        if not isinstance(self.source, Gaussian | PairedSource):
            raise ValueError(
                f"model.source={self.source}: x0 comes with {name}, so no source is drawn from; leave it out"
            )
        if self.objective is not None:
            raise ValueError(
                f"model.objective={type(self.objective).__name__} needs the density of x0, and {name} gives samples "
                "of it only; set model.objective=null"
            )
        self.source = data.starts
        self.check_prediction()

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
                evaluate(self.network, self.schedule, x, t, y)
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

    def teardown(self, stage: str) -> None:
        self.trainer.datamodule.end_pairs()  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """The optimiser of the network's weights, and the schedule of its learning rate, a step at a time."""
        optimizer = self.optimizer(self.network.parameters())
        if "bf16" in str(self.trainer.precision):
            # Lightning refuses to clip for a fused optimiser, for the sake of a scaler that bf16 does not have
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, LRSchedule):
            scheduler.end_at(int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # -- training -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = current_step(self.trainer)
        point, y = self.draw(batch["x1"], batch.get("y"), step, batch.get("x0"))
        loss = self.batch_loss(point, y, step)
        if self.logs_now:  # self.log at every step would take a quarter of a small network's time
            self.log("train/loss", loss, prog_bar=True, sync_dist=True)
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def batch_loss(self, point: PathSample, y: Tensor | None, step: int) -> Tensor:
        """The mean loss of this process's rows of a training batch; their streams are made for who draws from them."""
        rows = None
        if self.objective is not None or self.keyed_network:
            rows = self.key.fold(step).fold("network").rows(self.row_numbers())
        if self.objective is not None:
            return self.objective(self.field, point.x1, self.source, y=y, rows=rows).mean()
        return mean_cfm_loss(
            self.network,
            self.schedule,
            point,
            predicts=self.predicts,
            y=y,
            rows=rows,
            weight=self.weighting,
        )

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        """Clip, unless the step is skipped: there are no gradients then, and torch would find no values to clip."""
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            super().configure_gradient_clipping(optimizer, *args, **options)

    @property
    def weighting(self) -> Weighting | None:
        """The weight, where it is not 1."""
        return None if isinstance(self.weight, Unweighted) else self.weight

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
            weight=self.weighting,
        )

    def draw(
        self, x1: Tensor, y: Tensor | None, step: int, x0: Tensor | None = None
    ) -> tuple[PathSample, Tensor | None]:
        """Points, times and velocities of this process's rows of a global batch; x0 too, unless it is given."""
        if self.numbers is None:
            self.numbers = self.draws_of(x1, y, x0)
        drawn = self.numbers(step)
        x0 = drawn.x0 if x0 is None else x0
        assert x0 is not None, "x0 comes with the batch"
        t = self.times.draw(drawn.u, self.interval)[self.numbers.rows]
        if y is not None and drawn.label is not None:
            y = torch.where(drawn.label < self.class_dropout_prob, self.num_classes, y)
        return self.path.sample(x0, x1, t, drawn.eps), y

    def draws_of(self, x1: Tensor, y: Tensor | None, x0: Tensor | None) -> Draws:
        """The random numbers of this run, whose batches look like this one."""
        shape, drawn = (self.batch_size, *x1.shape[1:]), x0 is None
        assert not drawn or isinstance(self.coupling, Independent), "a coupling brings x0 with x1"
        return Draws(
            self.key,
            shape,
            self.shard.rows(self.batch_size),
            x1.device,
            self.source if drawn else None,
            self.schedule.stochastic,
            y is not None and self.class_dropout_prob > 0,
        )

    def pair(self, batch: Callable[[int], Batch]) -> PairedBatches:
        """This process's batches of training, by step, each x1 with the x0 that the coupling gives it.

        Args:
            batch: this process's x1, and y, of a step.
        """
        device = self.trainer.strategy.root_device
        rows = self.shard.rows(self.batch_size)
        share = PairingContext(self.key, self.source, self.batch_size, rows, device)
        if isinstance(self.coupling, SemidiscreteOT):
            return PairedBatches(SetPairing(self.fitted(device), share), self.ahead)
        alone = self.trainer.world_size == 1
        pairing = BatchPairing(
            self.coupling, share, batch, (lambda v: v) if alone else partial(gathered, self)
        )
        return PairedBatches(pairing, self.ahead)

    def fitted(self, device: torch.device) -> Potential:
        """The training set with its potential: that of the checkpoint, of the cache, or fitted now."""
        assert isinstance(self.coupling, SemidiscreteOT)
        x1 = self.trainer.datamodule.fixed_set()["x1"].to(device)  # type: ignore[attr-defined]
        # as the judges' noise, it does not depend on the seed of the run
        fit = PotentialFit(self.coupling, x1, self.source, Key(0).fold("potential"))
        if self.potential is None or self.potential_of != fit.digest:
            self.potential = cached(fit.name, partial(self.fit, fit), device)["potential"]
            self.potential_of = fit.digest
        return self.coupling.potential(x1, self.potential.to(device))

    def fit(self, fit: PotentialFit) -> dict[str, Tensor]:
        """The potential that the first process finds; all look for it, so that all see what is wrong."""
        self.print(f"fitting the potential of {len(fit.x1)} points, once")
        found = fit.potential()
        return {"potential": self.trainer.strategy.broadcast(found)}

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
        point, y, rows = self.held_out_points(batch, Key(0).fold(purpose))
        with evaluation_weights(self.trainer, self.network):
            loss = self.loss(point, y, rows)
        low, high = self.interval
        self.metrics[0].to(self.device).update(loss, (point.t - low) / (high - low))
        return {"loss": loss, "xt": point.xt, "t": point.t, "ut": point.ut}

    def held_out_points(self, batch: Batch, key: Key) -> tuple[PathSample, Tensor | None, Rows]:
        """This process's points of a block; a block that is paired is gathered, and each process pairs all of it."""
        x1, y, index = batch["x1"], batch.get("y"), batch["index"]
        if isinstance(self.coupling, Independent) or self.trainer.world_size == 1:
            rows = key.rows(index)
            return *self.held_out_sample(x1, y, rows, batch.get("x0")), rows
        x1, index = gathered_shares(x1), gathered_shares(index)
        y = None if y is None else gathered_shares(y)
        mine = self.shard.rows(len(index))
        point, y = self.held_out_sample(x1, y, key.rows(index))
        xt, ut, t, x0, x1 = (v[mine] for v in point[:5])
        eps = None if point.eps is None else point.eps[mine]
        y = None if y is None else y[mine]
        return PathSample(xt, ut, t, x0, x1, eps), y, key.rows(index[mine])

    def held_out_sample(
        self, x1: Tensor, y: Tensor | None, rows: Rows, x0: Tensor | None = None
    ) -> tuple[PathSample, Tensor | None]:
        """Points keyed by each sample's index, paired in blocks as large as a training batch unless x0 is given."""
        x0 = self.source.rows(rows, x1.shape[1:]) if x0 is None else x0
        if not isinstance(self.coupling, Independent):
            i, j = self.couple_blocks(x0, x1, y, int(rows.index[0]))
            x0, x1, y = x0[i], x1[j], None if y is None else y[j]
        low, high = self.interval
        t = low + (high - low) * rows.uniform((), stream=2)
        eps = rows.normal(x1.shape[1:], stream=3) if self.schedule.stochastic else None
        return self.path.sample(x0, x1, t, eps), y

    def couple_blocks(
        self, x0: Tensor, x1: Tensor, y: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """Pairs within each block: what the training pairs are, and never one huge problem."""
        parts = []
        for block in torch.arange(len(x1), device=x1.device).split(
            max(self.batch_size, self.coupling.ot_batch_size or 1)
        ):
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
        x1 = self.trainer.datamodule.decode(x1)  # type: ignore[attr-defined]
        return {"x": x1, "index": batch["index"], **({"y": batch["y"]} if "y" in batch else {})}

    def generate(
        self, index: Tensor, y: Tensor | None = None, save_at: int | Sequence[float] = 0
    ) -> Solution:
        """The samples with these numbers, by the averaged weights where there are any."""
        with evaluation_weights(self.trainer, self.network):
            return sample(
                self.guided, self.source, self.solver, index, self.event_shape,
                seed=self.seed, y=y, save_at=save_at,
            )  # fmt: skip

    # -- checkpoints ------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_same_layout(self, checkpoint)
        self.potential = checkpoint.get("potential")
        self.potential_of = checkpoint.get("potential_of")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is needed to sample from the weights without the data; weights that are not finite are not saved."""
        if (found := guard(self.trainer)) is not None:
            found.require_finite(self)
        if self.potential is not None:
            checkpoint["potential"] = self.potential
            checkpoint["potential_of"] = self.potential_of
        checkpoint["flow"] = {
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            "levels": self.levels,
            "paired": isinstance(self.source, PairedSource),
            "latent": self.latent,
        }


def put_channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out with their channels last; the layers then give such images.

    Raises:
        ValueError: there is no convolution.
    """
    if not any(p.ndim == 4 for p in network.parameters()):
        raise ValueError(
            f"model.channels_last=true: {type(network).__name__} has no convolution of images; set it to false"
        )
    network.to(memory_format=torch.channels_last)


def draws(network: nn.Module) -> bool:
    """Whether a network takes keyed streams, and draws from them in training."""
    takes = "rows" in inspect.signature(network.forward).parameters
    return takes and getattr(network, "draws", True)


def gathered(module: LightningModule, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes."""
    parts: Any = module.all_gather(rows)
    return parts.flatten(0, 1)


def gathered_shares(rows: Tensor) -> Tensor:
    """The same, where the processes need not have equally many."""
    return torch.cat(gather_all_tensors(rows))

r"""The LightningModule: draw, loss, log.

    batch (x1, y) -> source x0 -> coupling -> times -> path -> objective -> optimiser -> average

Each arrow is one call with one owner. Every random number is keyed by (seed, step, row of the global batch).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Shard
from fmlightning.flow.couplings.coupling import Coupling, Independent
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField, takes_streams
from fmlightning.flow.objectives.cfm import CFM
from fmlightning.flow.objectives.objective import Nets, Objective, Recipe
from fmlightning.flow.objectives.time_samplers import TimeSampler, Uniform
from fmlightning.flow.paths.path import Path
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import sample
from fmlightning.flow.solvers.solution import Solution
from fmlightning.flow.solvers.solver import Solver, TrainedField
from fmlightning.flow.sources import Gaussian, Source
from fmlightning.metrics.means import BinnedMean
from fmlightning.nets.layout import put_channels_last
from fmlightning.runs.checkpoint import require_same_layout
from fmlightning.training.checks import check_data, warn_foreign_dropout
from fmlightning.training.draws import Draws
from fmlightning.training.ema.callback import evaluation_weights
from fmlightning.training.held_out import HeldOut
from fmlightning.training.lightning.internals import current_step
from fmlightning.training.lr_schedules import LRSchedule
from fmlightning.training.nonfinite import guard
from fmlightning.training.pairing import PairedBatches, PairingContext, Pairs
from fmlightning.training.prefetch import MOST_AHEAD

BINS = 8


class FlowMatching(LightningModule):
    """Training of a flow.

    Args:
        network: `net(x, t, y=None) -> like x`; TimeMLP, UNet or a class of your own.
        path: the probability path: Linear, VariancePreserving, VarianceExploding, Trigonometric, ...
        source: the distribution at t = 0: Gaussian or a toy; not used where the data brings x0.
        coupling: how source and data points are paired.
        times: the distribution of training times.
        objective: what the network is trained to do: CFM, which holds the prediction and its weighting, or
            MaximumLikelihood, which trains through the solver.
        optimizer: an optimiser of torch.
        scheduler: a schedule of the learning rate, stepped once a step; null keeps it constant.
        class_dropout_prob: probability of dropping a label in training, for classifier-free guidance.
        solver: how validation, prediction and callbacks sample.
        guidance: how strongly they push samples towards their labels; training knows nothing of it.
        compile: whether to compile the network with torch.compile.
        channels_last: whether the weights of convolutions lie with their channels last in memory, which convolutions on
            GPUs prefer, in half precision above all.
        prefetch: how many batches ahead the coupling is solved, each in a thread beside training; 0 solves it within
            the step. The pairs do not depend on it.
        seed: of every random number of training; the command line sets it to `seed_everything`.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path = Linear(),  # noqa: B008 - frozen, as are the next
        source: Source = Gaussian(),  # noqa: B008
        coupling: Coupling = Independent(),  # noqa: B008
        times: TimeSampler = Uniform(),  # noqa: B008
        objective: Objective = CFM(),  # noqa: B008
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        class_dropout_prob: float = 0.0,
        solver: Solver = ODESolver(),  # noqa: B008
        guidance: Guidance = Guidance(),  # noqa: B008
        compile: bool = False,
        channels_last: bool = False,
        prefetch: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(
                f"model.class_dropout_prob={class_dropout_prob} is a probability in [0, 1)"
            )
        if not 0 <= prefetch <= MOST_AHEAD:
            raise ValueError(
                f"model.prefetch={prefetch} must be from 0, which solves within the step, to {MOST_AHEAD}: each is a "
                "thread"
            )
        if compile and objective.second_order:
            raise ValueError(
                f"model.compile=true compiles no second derivatives, which model.objective={type(objective).__name__} "
                "needs: set it to false"
            )
        self.network = network
        self.recipe = Recipe(path, source, coupling, times, objective)
        objective.check(self.recipe, network, None)
        self.objective_modules = objective.modules(network)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.class_dropout_prob = class_dropout_prob
        self.solver, self.guidance = solver, guidance
        self.seed = seed
        self.key = Key(seed).fold("train")
        self.pairs = Pairs(prefetch)
        self.keyed_network = takes_streams(network)
        if channels_last:
            put_channels_last(network)
        if compile:
            self.network.compile()
        # in a tuple: as a submodule it would be cast to the network's precision
        self.metrics = (BinnedMean(BINS),)

    @property
    def t_range(self) -> tuple[float, float]:
        """Where training times are drawn."""
        return self.recipe.objective.t_range(self.recipe.path)

    @property
    def nets(self) -> Nets:
        return Nets(self.network, self.keyed_network, self.objective_modules)

    @property
    def field(self) -> NetworkField:
        """The model of the network as it stands."""
        return self.recipe.objective.model(self.nets, self.recipe)  # type: ignore[return-value]

    @property
    def guided(self) -> TrainedField:
        """The field that samples follow."""
        return self.guidance.cfg(self.field, self.num_classes if self.class_dropout_prob else 0)

    @property
    def shard(self) -> Shard:
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    # -- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.check(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after it has rounded a checkpoint's weights to float32
        self.draws = Draws(
            self.recipe,
            self.key,
            self.batch_size,
            self.shard.rows(self.batch_size),
            self.num_classes,
            self.class_dropout_prob,
            self.keyed_network,
        )
        if stage == "fit":
            warn_foreign_dropout(self.network)

    def check(self, data: FlowData) -> None:
        """Take the data's shapes, and refuse what does not fit them, before any training."""
        self.event_shape, self.num_classes = data.event_shape, data.num_classes
        self.num_bins, self.batch_size = data.num_bins, data.batch_size
        self.class_counts = data.class_counts
        self.latent, self.units = data.pixel_data.event_shape != data.event_shape, data.units
        given = self.recipe.source
        if data.paired:
            self.recipe = replace(self.recipe, source=data.source_points)
        check_data(self, data, given)

    def pair(self, batch: Callable[[int], Batch]) -> PairedBatches:
        """This process's batches of training, by step, each x1 with the x0 that the coupling gives it.

        Args:
            batch: this process's x1, and y, of a step.
        """
        rows, device = self.shard.rows(self.batch_size), self.trainer.strategy.root_device
        context = PairingContext(self.key, self.recipe.source, self.batch_size, rows, device)
        return self.pairs.batches(self, self.recipe.coupling, context, batch)

    def teardown(self, stage: str) -> None:
        self.trainer.datamodule.end_pairs()  # type: ignore[attr-defined]

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        own = self.objective_modules.parameters() if self.objective_modules is not None else ()
        return [*self.network.parameters(), *(p for p in own if p.requires_grad)]

    def configure_optimizers(self) -> Any:
        """The optimiser of the network's weights, and the schedule of its learning rate, a step at a time."""
        optimizer = self.optimizer(self.trained_parameters)
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

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        """Clip, unless the step is skipped: there are no gradients then, and torch would find no values to clip."""
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            super().configure_gradient_clipping(optimizer, *args, **options)

    # -- training -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draw = self.draws(batch, current_step(self.trainer))
        loss = self.recipe.objective.mean(self.nets, self.recipe, draw)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        # self.log at every step would take a quarter of a small network's time
        if every > 0 and (self.trainer.global_step + 1) % every == 0:
            self.log("train/loss", loss, prog_bar=True, sync_dist=True)
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    # -- validation, testing, prediction ----------------------------------------------------------

    @property
    def held_out(self) -> HeldOut:
        return HeldOut(self.recipe, self.batch_size, self.shard)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.held_out_loss(batch, "validation")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.held_out_loss(batch, "test")

    def held_out_loss(self, batch: Batch, purpose: str) -> dict[str, Tensor]:
        """The loss at a time and a source point keyed by each sample's index, the same in every run."""
        draw = self.held_out.draw(batch, Key(0).fold(purpose))
        with evaluation_weights(self.trainer, self.network):
            loss = self.recipe.objective.loss(self.nets, self.recipe, draw).weighted
        low, high = self.t_range
        self.metrics[0].to(self.device).update(loss, (draw.t - low) / (high - low))
        point = draw.on(self.recipe.path)
        return {"loss": loss, "xt": point.xt, "t": point.t, "ut": point.ut}

    def on_validation_epoch_end(self) -> None:
        self.log_held_out("val")

    def on_test_epoch_end(self) -> None:
        self.log_held_out("test")

    def log_held_out(self, split: str) -> None:
        """The mean loss, and of an objective with times the mean in each eighth of their range."""
        mean, bins = self.metrics[0].compute()
        self.metrics[0].reset()
        self.log(f"{split}/loss", mean.float(), prog_bar=True)
        if self.recipe.objective.num_times:
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
                self.guided, self.recipe.source, self.solver, index, self.event_shape,
                seed=self.seed, y=y, save_at=save_at,
            )  # fmt: skip

    # -- checkpoints ------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_same_layout(self, checkpoint)
        self.pairs.load(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to sample from the weights without the data; weights must be finite to be saved."""
        if (found := guard(self.trainer)) is not None:
            found.require_finite(self)
        self.pairs.save(checkpoint)
        checkpoint["flow"] = {
            "event_shape": list(self.event_shape),
            "num_classes": self.num_classes,
            "class_counts": list(self.class_counts),
            "num_bins": self.num_bins,
            "paired": self.recipe.source.paired,
            "latent": self.latent,
            **({"units": asdict(self.units)} if self.units else {}),
        }

"""From a run to its trained model, in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fmlightning.cli.allowed import allowing
from fmlightning.cli.build import instantiate_model
from fmlightning.data.points import Units
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.models import NetworkField
from fmlightning.flow.solvers.solver import Solver, TrainedField
from fmlightning.flow.sources import PairedSource, Source
from fmlightning.runs.checkpoint import require_same_layout
from fmlightning.runs.directory import Run
from fmlightning.runs.weights import read_weights


@dataclass(frozen=True)
class TrainedFlow:
    """What a run gives back, in plain torch.

    Attributes:
        field: the velocity field of the trained network.
        source: the distribution at t = 0.
        solver: the solver of the run's config.
        guidance: the guidance of the run's config, for classes.
        class_dropout_prob: how often labels were hidden in training.
        event_shape: the shape of one sample.
        num_classes: number of labels, 0 for none.
        class_counts: samples of the reference in each class; None where an older checkpoint does not hold them.
        num_bins: how many values a pixel of an image has, or None.
        seed: of the run.
        paired: whether samples start from x0 of the data; `source` then has none until it is given.
        latent: whether a sample is a latent, which the run's data decodes.
        units: those of the data, where the flow sees them standardised.
        weaker: the field that guidance pushes away from; None for the same network without its label.
    """

    field: NetworkField
    source: Source
    solver: Solver
    guidance: Guidance
    class_dropout_prob: float
    event_shape: tuple[int, ...]
    num_classes: int
    num_bins: int | None
    seed: int
    paired: bool = False
    latent: bool = False
    weaker: NetworkField | None = None
    class_counts: tuple[int, ...] | None = None
    units: Units | None = None

    def guided(self, guidance: Guidance) -> TrainedField:
        """The field under guidance, classifier-free or by the weaker one.

        Raises:
            ValueError: the model was not trained for it, or the weaker one on another path.
        """
        if self.weaker is not None:
            return guidance.autoguide(self.field, self.weaker)
        return guidance.cfg(self.field, self.num_classes if self.class_dropout_prob else 0)


def load(run: str | Path, ema: bool = True, allow: Sequence[str] = ()) -> NetworkField:
    """The trained velocity field of a run, in plain torch and evaluation mode.

        field = fmlightning.load("runs/moons/1a2b3c4d-s0")
        v = field(x, t)

    Args:
        run: a run directory, a checkpoint in one, or what `fmlightning export` made of one.
        ema: whether to take the averaged weights rather than the raw ones; an export has one kind, which is taken,
            but averaged ones are not taken for raw.
        allow: modules of your own that the run's config may name: they are imported, and so run.

    Raises:
        FileNotFoundError: no such run, or no checkpoint in it.
        ValueError: weights were asked for that it does not have, or its config names a class of a module that is not
            allowed.
    """
    with allowing(allow):
        return load_flow(run, ema).field


def load_flow(run: str | Path, ema: bool = True) -> TrainedFlow:
    """The trained field of a run with all that sampling needs; as `load`."""
    config = Run.open(run).config
    weights, record = read_weights(run, ema)
    flow = record["flow"]
    # whoever samples says whether to compile: it may take minutes
    model = instantiate_model({**config, "model": {**config["model"], "compile": False}})
    require_same_layout(model, {"state_dict": {f"network.{k}": v for k, v in weights.items()}})
    model.network.load_state_dict(weights)
    if flow.get("paired"):
        paired = PairedSource(torch.empty(0, *flow["event_shape"]))
        model.recipe = replace(model.recipe, source=paired)
    field = model.field.eval().requires_grad_(False)
    return TrainedFlow(
        field,
        model.recipe.source,
        model.solver,
        model.guidance,
        model.class_dropout_prob,
        tuple(flow["event_shape"]),
        flow["num_classes"],
        flow["num_bins"] if "num_bins" in flow else flow["levels"],  # of older checkpoints
        model.seed,
        flow.get("paired", False),
        flow.get("latent", False),
        class_counts=tuple(flow["class_counts"]) if "class_counts" in flow else None,
        units=Units(**flow["units"]) if "units" in flow else None,
    )


def away_from(flow: TrainedFlow, weaker: str, ema: bool, option: str) -> TrainedFlow:
    """The flow, to be guided away from a weaker run: autoguidance.

    Args:
        weaker: as in `load`.
        ema: whether to take its averaged weights.
        option: what named it on the command line.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: its samples have another shape or other classes.
    """
    other = load_flow(weaker, ema)
    if other.event_shape != flow.event_shape:
        raise ValueError(
            f"{option} {weaker} makes samples of shape {other.event_shape}, and this run {flow.event_shape}"
        )
    if other.num_classes != flow.num_classes:
        raise ValueError(
            f"{option} {weaker} has {other.num_classes} classes, and this run {flow.num_classes}; name one with as many"
        )
    return replace(flow, weaker=other.field)

"""The options of `fit`, `validate`, `test` and `predict` besides those of the trainer, the model and the data."""

from jsonargparse.typing import restricted_number_type
from lightning.pytorch.cli import LightningArgumentParser

from fmlightning.training.callbacks.evaluation import Evaluation
from fmlightning.training.callbacks.sampling import Samples
from fmlightning.training.callbacks.trajectories import Trajectories
from fmlightning.training.ema.callback import EMA
from fmlightning.training.lightning.checkpoints import Checkpoints
from fmlightning.training.nonfinite import NonFinite
from fmlightning.training.tracking import Tracking

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


def add_seed(parser: LightningArgumentParser) -> None:
    """Add the seed of everything, which Lightning would let be anything."""
    parser.add_argument(
        "--seed_everything",
        type=Seed,
        default=0,
        help="Seed of the weights, the data and the noise.",
    )


def add_options(parser: LightningArgumentParser) -> None:
    """Add the options of the run and of the callbacks that every run has."""
    parser.add_argument(
        "--experiment", type=str, default="default", help="Name of the folder of the run."
    )
    parser.add_argument(
        "--run_dir", type=str | None, default=None,
        help="Run directory; by default $FMLIGHTNING_RUNS or runs/, then <experiment>/<hash of config>-s<seed>.",
    )  # fmt: skip
    parser.add_argument(
        "--rerun",
        type=bool,
        default=False,
        help="Train again; what is in the directory is kept as <dir>.1.",
    )
    parser.add_argument(
        "--init_from", type=str | None, default=None,
        help="A run, or an export of one, whose weights training starts from, at step 0 with a new optimiser.",
    )  # fmt: skip
    parser.add_argument(
        "--init_ema",
        type=bool,
        default=True,
        help="Its averaged weights rather than its raw ones.",
    )
    parser.add_argument(
        "--init_digest", type=str | None, default=None,
        help="Digest that these weights must have; filled in, for when the config is run again.",
    )  # fmt: skip
    parser.add_class_arguments(Tracking, "wandb", instantiate=True)
    parser.add_lightning_class_args(NonFinite, "nonfinite")  # before all that uses a step
    parser.add_lightning_class_args(EMA, "ema")
    parser.add_lightning_class_args(Samples, "samples")
    parser.add_lightning_class_args(Trajectories, "trajectories")
    parser.add_lightning_class_args(Evaluation, "evaluation")
    parser.add_lightning_class_args(Checkpoints, "checkpoints")
    parser.link_arguments("seed_everything", "model.seed")
    parser.link_arguments("seed_everything", "data.init_args.seed")

r"""`fmlightning fit | validate | test | predict`: a LightningCLI with its traps closed.

- The command line beats the config files, and both beat what a checkpoint remembers.
- The run directory is computed from the resolved config, so every process finds the same one.
- An error is one message; an unknown option says which known one is close.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

# imported so that their classes go by their short names
import fmlightning.data.digits
import fmlightning.data.toy
import fmlightning.flow.couplings
import fmlightning.metrics.frechet
import fmlightning.metrics.likelihood
import fmlightning.metrics.transport
import fmlightning.nets.mlp
import fmlightning.nets.unet  # noqa: F401
from fmlightning.callbacks.evaluation import Evaluation
from fmlightning.callbacks.oracle import OracleError
from fmlightning.callbacks.progress import StepProgress
from fmlightning.callbacks.provenance import Provenance
from fmlightning.callbacks.sampling import Samples
from fmlightning.callbacks.trajectories import Trajectories
from fmlightning.data.module import FlowData
from fmlightning.flow.keys import Key
from fmlightning.flow.seeding import seeded
from fmlightning.parser import FlowParser, check_files, shorten, with_config
from fmlightning.runs import Run, config_hash, require_whole, run_directory
from fmlightning.training.ema import EMA
from fmlightning.training.metrics_file import MetricsFile
from fmlightning.training.module import FlowMatching
from fmlightning.training.tracking import Tracking, close_mirror, reachable, wandb_logger

QUIET = (
    "The anonymous setting has no effect",
    ".*args parameter is intended to run from within Python.*",
    ".*deprecated in v4.*will be removed in v5.*",
    ".*only one JsonargparseDeprecationWarning.*",
    ".*does not have many workers.*",
    ".*is not resumable.*",
    ".*exists and is not empty.*",
    ".*LeafSpec.*",
    ".*isinstance.treespec.*",
    ".*The number of training batches.*",
    ".*`training_step` returned `None`.*",
)
"""Warnings of others that are expected here."""


class AlreadyFinished(Exception):
    """The run that was to be resumed is at its end."""


POSITIVE = ("val_check_interval", "accumulate_grad_batches", "max_steps", "max_epochs", "num_nodes")


def check_trainer(trainer: Namespace) -> None:
    """Values that Lightning would divide by, or take without a word.

    Raises:
        ValueError: a count is not positive, or a norm is negative.
    """
    for name in POSITIVE:
        value = trainer.get(name)
        unlimited = name.startswith("max_") and value == -1
        if isinstance(value, int | float) and value <= 0 and not unlimited:
            raise ValueError(f"trainer.{name}={value} must be positive")
    devices = str(trainer.devices)
    if re.fullmatch(r"-?\d+", devices) and int(devices) < 1 and devices != "-1":
        raise ValueError(f"trainer.devices={trainer.devices} must be positive, or -1 for all")
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} must not be negative"
        )


class FlowCLI(LightningCLI):
    """The LightningCLI of flow matching."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        super().__init__(
            FlowMatching,
            FlowData,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_class=Trainer,
            trainer_defaults={"use_distributed_sampler": False, "max_epochs": -1},
            seed_everything_default=0,
            parser_class=FlowParser,
            parser_kwargs={
                "allow_abbrev": False,
                **{name: own(name) for name in self.subcommands()},
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=run,
        )

    # -- options --------------------------------------------------------------------------------

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=NonNegativeInt,
            default=0,
            help="Seed of the weights, the data and the noise.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
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
        parser.add_class_arguments(Tracking, "wandb", instantiate=True)
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(Trajectories, "trajectories")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoints")
        parser.set_defaults(
            {
                "checkpoints.save_last": True,
                "checkpoints.every_n_train_steps": 1000,
                "checkpoints.save_on_exception": True,
                "checkpoints.filename": "{step:08d}",
                "checkpoints.auto_insert_metric_name": False,
            }
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the checkpoint's hyperparameters over the command line."""

    # -- run directory ----------------------------------------------------------------------------

    @property
    def options(self) -> Namespace:
        """The options of the subcommand."""
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        options, parser = self.options, self._parser(self.subcommand)
        self.text = parser.dump(options, skip_unset=False, skip_link_targets=True, format="yaml")
        self.resolved = without(
            yaml.safe_load(self.text), "config", "ckpt_path", "weights_only", "rerun"
        )
        self.text = yaml.safe_dump(self.resolved, sort_keys=False)
        self.folder = self.look_at() or run_directory(self.resolved)
        check_trainer(options.trainer)
        options.trainer.default_root_dir = str(self.folder)
        options.checkpoints.dirpath = str(self.folder / "checkpoints")
        options.ckpt_path = self.checkpoint(options.ckpt_path)
        if self.subcommand == "fit" and _get_rank() in (None, 0):
            self.claim(options)

    def look_at(self) -> Path | None:
        """The run that `validate`, `test` and `predict` look at, where `--ckpt_path` names one."""
        named = self.options.ckpt_path
        if self.subcommand == "fit" or named in (None, "auto", "last"):
            return None
        try:
            run = Run.open(named)
        except FileNotFoundError:
            return None  # a checkpoint outside a run
        trained, asked = run.config["model"], self.resolved["model"]
        changed = [
            k for k in ("network", "path", "source", "predicts") if trained.get(k) != asked.get(k)
        ]
        if changed:
            options = ", ".join(f"model.{name}" for name in changed)
            print(f"warning: {options} differ from what {run.path} was trained with")
        return run.path

    def checkpoint(self, named: str | None) -> str | None:
        """The file that `--ckpt_path` means: `auto` or `last` of this run, a run directory, or a file."""
        run = Run(self.folder)
        if self.subcommand == "fit" and named is None:
            return None
        if named in ("auto", "last") and self.subcommand == "fit" and not run.last_checkpoint:
            print(f"{self.folder} has no checkpoint to resume from: starting at step 0")
            return None
        path = Path(named) if named and named not in ("auto", "last") else run.checkpoint()
        if path.is_dir():
            path = Run.open(path).checkpoint()
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path={named}: no such checkpoint or run directory")
        require_whole(path)
        return str(path)

    def claim(self, options: Namespace) -> None:
        """Refuse a directory that is in use, unless it is to be resumed or kept aside."""
        run = Run(self.folder)
        if options.rerun:
            return
        if run.status == "finished" and self.resumes() and self.unchanged(run):
            raise AlreadyFinished(self.folder)
        if run.status == "finished" and not options.ckpt_path:
            raise ValueError(
                f"{self.folder} holds this run already, finished. To see it: fmlightning show {self.folder}. "
                "To train it again and keep the old one beside it: add --rerun true"
            )
        elif run.status != "new" and not self.resumes():
            raise ValueError(
                f"{self.folder} holds this run, {run.status}. To resume it: add --ckpt_path auto. "
                "To start again and keep the old one beside it: add --rerun true"
            )

    def unchanged(self, run: Run) -> bool:
        """Whether a run is of this very config, its length included."""
        return run.manifest.get("config_hash") == config_hash(self.resolved)

    def resumes(self) -> bool:
        """Whether the command line asked to go on, whatever it found."""
        return any(a.startswith("--ckpt_path") for a in self.arguments)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.arguments: list[str] = list(args or [])
        super().parse_arguments(parser, args)

    # -- building and running ---------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        seed = self.options.seed_everything
        with seeded(Key(seed).fold("weights")):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        callbacks: list[Callback] = [Provenance(self.resolved, self.text), OracleError()]
        if trainer.enable_progress_bar is not False:
            callbacks.append(StepProgress())
        trainer.callbacks = [*(trainer.callbacks or []), *callbacks]
        if trainer.logger in (None, True):
            trainer.logger = self.loggers()
        elif trainer.logger is False:
            trainer.logger = [MetricsFile(self.folder)]
        return super().instantiate_trainer(**kwargs)

    def loggers(self) -> list[Any]:
        if self.subcommand != "fit":
            return []
        if self.options.trainer.fast_dev_run:
            return [MetricsFile(self.folder)]
        tracking = self._get(self.config_init, "wandb")
        mirror = wandb_logger(
            tracking, self.folder, self.resolved["experiment"], self.options.rerun
        )
        return [MetricsFile(self.folder), *([mirror] if mirror else [])]

    def before_fit(self) -> None:
        # all that can be refused is refused before the first file is written
        self.model.check(self.datamodule)
        self._get(self.config_init, "evaluation").check(self.datamodule)
        if _get_rank() in (None, 0):
            if self.options.rerun and self.folder.exists():
                keep(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trainer.loggers = [x for x in self.trainer.loggers if reachable(x)]
            print(f"run directory: {self.folder}")
            for name, words in self.datamodule.splits.items():
                print(f"  {name:5} {words}")

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(f"finished: {self.folder}")
            for command in ("show {}", "sample {} --n 100"):
                print(f"  fmlightning {command.format(self.folder)}")

    def predict(self, **kwargs: Any) -> None:
        """Generate the predictions and save them, rather than throw them away as Lightning does."""
        import numpy as np
        import torch

        batches = self.trainer.predict(**kwargs) or []
        if not batches or not self.trainer.is_global_zero:
            return
        rows: list[dict[str, Any]] = batches  # type: ignore[assignment]
        arrays: dict[str, Any] = {n: torch.cat([b[n] for b in rows]).cpu().numpy() for n in rows[0]}
        path = self.folder / "samples" / "predictions.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        print(f"{len(arrays['x'])} samples: {path}")


def own(command: str) -> dict[str, Any]:
    """The settings of a subcommand's parser."""
    usage = f"fmlightning {command} [--config FILE ...] [--OPTION VALUE ...]"
    return {"allow_abbrev": False, "usage": usage}


def keep(folder: Path) -> None:
    """Move a run aside, to the first free name <folder>.1, .2, ..."""
    n = 1
    while folder.with_name(f"{folder.name}.{n}").exists():
        n += 1
    folder.rename(folder.with_name(f"{folder.name}.{n}"))


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and tips of others that say nothing to a user of this command."""
    import logging

    os.environ.setdefault("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        for text in QUIET:
            warnings.filterwarnings("ignore", text)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
            logging.getLogger(name).setLevel(logging.WARNING)
        yield


def train(args: list[str]) -> int:
    """Run one of Lightning's commands."""
    with quiet():
        try:
            check_files(args)
            FlowCLI(with_config(args))
        except AlreadyFinished as done:
            print(f"{done} is finished already; to see it: fmlightning show {done}")
        except SIGTERMException:
            print("terminated; to go on: the same command with --ckpt_path auto")
            return 143
        except SystemExit as error:  # Lightning's way of ending at Ctrl-C
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            print("stopped; to go on: the same command with --ckpt_path auto")
            return 130
        except ValueError as error:
            raise ValueError(shorten(str(error))) from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ValueError(
                f"the checkpoint is of another network than model.network: {' '.join(str(error).split())[:300]}"
            ) from error
        finally:
            close_mirror()
    return 0


def instantiate_model(config: dict[str, Any]) -> FlowMatching:
    """The untrained module of a resolved config."""
    parser = FlowParser()
    parser.add_lightning_class_args(FlowMatching, "model")
    options = parser.parse_object({"model": {**config["model"], "seed": config["seed_everything"]}})
    return parser.instantiate(options).model

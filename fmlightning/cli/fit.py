r"""`fmlightning fit | validate | test | predict`: a LightningCLI with its traps closed.

- The command line beats the config files, and both beat what a checkpoint remembers.
- The run directory is computed from the resolved config, so every process finds the same one.
- An error is one message; an unknown option says which known one is close.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from fmlightning.cli.device import slow_bf16
from fmlightning.cli.init_from import Weights, start_from, starting_weights
from fmlightning.cli.messages import at_work, leaves, located
from fmlightning.cli.parser import FlowParser, nulls
from fmlightning.cli.quiet import quiet, say
from fmlightning.data.module import FlowData
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.size import describe
from fmlightning.runs.checksum import require_whole, sealed_step
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.directory import Run, require_vacant, run_directory
from fmlightning.runs.lock import leave, occupy
from fmlightning.runs.secrets import as_options, require_no_secret
from fmlightning.training.callbacks.evaluation import Evaluation
from fmlightning.training.callbacks.oracle import OracleError
from fmlightning.training.callbacks.progress import StepProgress
from fmlightning.training.callbacks.provenance import Provenance
from fmlightning.training.callbacks.sampling import Samples
from fmlightning.training.callbacks.trajectories import Trajectories
from fmlightning.training.ema.callback import EMA
from fmlightning.training.lightning.checkpoints import Checkpoints, ChecksummedFiles
from fmlightning.training.lightning.fast_loop import FastLoop
from fmlightning.training.lightning.peers import PeerWatchdog, left_alone
from fmlightning.training.lightning.shutdown import (
    GracefulShutdown,
    leave_together,
    without_handlers,
)
from fmlightning.training.metrics_file import MetricsFile
from fmlightning.training.module import FlowMatching
from fmlightning.training.nonfinite import NonFinite, NonFiniteError
from fmlightning.training.tracking import Tracking, close_mirror, reachable, wandb_logger


class AlreadyFinished(Exception):
    """The run that was to be resumed is at its end."""


Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
POSITIVE = ("val_check_interval", "accumulate_grad_batches", "max_steps", "max_epochs", "num_nodes")


def check_trainer(trainer: Namespace) -> None:
    """Values that Lightning would divide by, or take without a word.

    Raises:
        ValueError: a count is not positive, a norm is negative, or training would never end.
    """
    for name in POSITIVE:
        value = trainer.get(name)
        unlimited = name.startswith("max_") and value == -1
        if isinstance(value, int | float) and value <= 0 and not unlimited:
            raise ValueError(f"trainer.{name}={value} must be positive")
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
        raise ValueError(
            f"trainer.log_every_n_steps={trainer.log_every_n_steps} must not be negative; 0 logs nothing"
        )
    if not trainer.max_time and {trainer.max_steps, trainer.max_epochs} <= {-1, None}:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps} sets no end, nor do trainer.max_epochs and trainer.max_time: "
            "training would never stop; set one of them"
        )
    devices = str(trainer.devices)
    if re.fullmatch(r"-?\d+", devices) and int(devices) < 1 and devices != "-1":
        raise ValueError(f"trainer.devices={trainer.devices} must be positive, or -1 for all")
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} must not be negative"
        )


def check_scheduler(scheduler: dict[str, Any] | None, trainer: Namespace) -> None:
    """A schedule down to the end of training needs an end that is known.

    Raises:
        ValueError: only the clock ends training.
    """
    name = str((scheduler or {}).get("class_path")).rsplit(".", 1)[-1]
    if name in ("Cosine", "LinearDecay", "PolynomialDecay") and {
        trainer.max_steps,
        trainer.max_epochs,
    } <= {-1, None}:
        raise ValueError(
            f"model.scheduler={name} falls until the last step, and trainer.max_time={trainer.max_time} does not tell "
            "which that is: set trainer.max_steps too, or model.scheduler=Constant"
        )


class FlowCLI(LightningCLI):
    """The LightningCLI of flow matching."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self.asked = args[0] if args else None
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
            type=Seed,
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's, without the option to unpickle a checkpoint; the one that is asked for, as each takes time."""
        known = {k: {*v, "weights_only"} for k, v in LightningCLI.subcommands().items()}
        return {self.asked: known[self.asked]} if self.asked in known else known

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the checkpoint's hyperparameters over the command line."""

    # -- run directory ----------------------------------------------------------------------------

    @property
    def options(self) -> Namespace:
        """The options of the subcommand."""
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        self.resolve()
        options = self.options
        self.folder = self.look_at() or run_directory(self.resolved)
        options.trainer.default_root_dir = str(self.folder)
        options.checkpoints.dirpath = str(self.folder / "checkpoints")
        options.ckpt_path = self.checkpoint(options.ckpt_path)
        if self.subcommand == "fit" and _get_rank() in (None, 0):
            self.claim(options)

    def resolve(self) -> None:
        """The config with all its defaults, or what is wrong with it."""
        options, parser = self.options, self._parser(self.subcommand)
        self.text = parser.dump(options, skip_unset=False, skip_link_targets=True, format="yaml")
        self.resolved = without(yaml.safe_load(self.text), "config", "ckpt_path", "rerun")
        self.take_start(options)
        self.text = yaml.safe_dump(self.resolved, sort_keys=False)
        require_no_secret(leaves(self.resolved))
        check_values(self.resolved)
        for name in nulls(parser, options, parser):
            raise ValueError(f"{name}=null must have a value; leave it out for its default")
        check_trainer(options.trainer)
        check_scheduler(self.resolved["model"]["scheduler"], options.trainer)

    def take_start(self, options: Namespace) -> None:
        """Read the weights that `--init_from` names, and put their digest into the config."""
        self.start: Weights | None = None
        if options.init_from and (self.subcommand == "fit" or not options.init_digest):
            self.start, self.resolved["init_digest"] = starting_weights(
                options.init_from, options.init_ema, options.init_digest
            )

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
        run, resumes = Run(self.folder), named in ("auto", "last")
        if self.subcommand == "fit" and named is None:
            return None
        if resumes and self.subcommand == "fit" and not run.last_checkpoint:
            say(f"{self.folder} has no checkpoint to resume from: starting at step 0")
            return None
        if resumes:
            path, wrong = run.whole_checkpoint()
            say("\n".join((*wrong, f"going on from {path}, step {sealed_step(path)}")))
            return str(path)
        path = Path(named) if named else run.checkpoint()
        if path.is_dir():
            path = Run.open(path).checkpoint()
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path={named}: no such checkpoint or run directory")
        require_whole(path)
        return str(path)

    def claim(self, options: Namespace) -> None:
        """Refuse a directory that is in use, unless it is to be resumed or kept aside."""
        require_vacant(self.folder)
        run = Run(self.folder)
        if options.rerun:
            return
        if run.status == "finished" and self.resumes() and self.unchanged(run):
            raise AlreadyFinished(self.folder)
        if run.status == "finished" and not options.ckpt_path:
            what = "this run already" if self.unchanged(run) else "another run, with other options"
            raise ValueError(
                f"{self.folder} holds {what}, finished. To see it: fmlightning show {self.folder}. "
                "To train into another directory: --run_dir DIR. To keep the old one beside a new one: add --rerun true"
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
        with self.naming_options(), seeded(Key(seed).fold("weights")):
            super().instantiate_classes()
            if self.start is not None and self.subcommand == "fit":
                start_from(self.model.network, self.start, self.options.init_from)

    def _run_subcommand(self, subcommand: str) -> None:
        with self.naming_options():
            super()._run_subcommand(subcommand)

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Say of an error in which option it is."""
        try:
            yield
        except (ValueError, MisconfigurationException) as error:
            words = located(str(error), self.resolved, at_work(error))
            if words == str(error):
                raise
            raise ValueError(words) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        callbacks: list[Callback] = [
            PeerWatchdog(),
            Provenance(self.resolved, self.text),
            OracleError(),
        ]
        if trainer.enable_progress_bar is not False:
            callbacks.append(StepProgress())
        if self.subcommand == "fit":
            callbacks.append(GracefulShutdown())
        trainer.callbacks = [*(trainer.callbacks or []), *callbacks]
        trainer.logger = self.loggers(trainer.logger)
        trainer.plugins = [*as_list(trainer.plugins), ChecksummedFiles()]
        try:
            built = without_handlers(super().instantiate_trainer(**kwargs))
        except (TypeError, ImportError, ValueError, MisconfigurationException) as error:
            raise ValueError(of_trainer(str(error), self.resolved["trainer"])) from error
        self.check_built(built)
        if self.subcommand == "fit":
            FastLoop(built)
        return built

    def check_built(self, trainer: Trainer) -> None:
        """Refuse what Lightning would replace by something else."""
        asked, got = self.options.trainer.precision, trainer.precision
        if str(asked).startswith("16") and not str(got).startswith("16"):
            raise ValueError(
                f"trainer.precision={asked} needs a GPU, and this trains on the CPU: set bf16-mixed or 32-true"
            )
        device = trainer.strategy.root_device.type
        if slow := slow_bf16(f"trainer.precision={asked}", device, "set 32-true"):
            say(slow)

    def loggers(self, asked: Any) -> list[Any]:
        """metrics.csv, and beside it the loggers that `trainer.logger` names, or else W&B."""
        if self.subcommand != "fit":
            return []
        if self.options.trainer.fast_dev_run or asked is False:
            return [MetricsFile(self.folder)]
        if asked not in (None, True):
            return [MetricsFile(self.folder), *as_list(asked)]
        tracking = self._get(self.config_init, "wandb")
        mirror = wandb_logger(
            tracking, self.folder, self.resolved["experiment"], self.options.rerun
        )
        return [MetricsFile(self.folder), *([mirror] if mirror else [])]

    def before_fit(self) -> None:
        # all that can be refused is refused before the first file is written
        self.datamodule.check(self.trainer.world_size)
        self.model.check(self.datamodule)
        evaluation = self._get(self.config_init, "evaluation")
        evaluation.check(self.datamodule)
        self._get(self.config_init, "checkpoints").check(
            scores=bool(evaluation.judges and evaluation.every_n_steps),
            callbacks=bool(self.options.trainer.callbacks),
        )
        if self.trainer.is_global_zero:
            occupy(self.folder)
            self.claim(self.options)  # again: until now another process may have trained it
            if self.options.rerun and self.folder.exists():
                keep(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trainer.loggers = [x for x in self.trainer.loggers if reachable(x)]
            print(f"run directory: {self.folder}")
            for name, words in self.datamodule.splits.items():
                print(f"  {name:5} {words}")
            data = self.datamodule
            print(f"  {describe(self.model.network, data.event_shape, bool(data.num_classes))}")

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
        rows: list[dict[str, Any]] = batches  # type: ignore[assignment]
        rows = [{n: x.cpu() for n, x in b.items()} for b in rows]
        rows = [b for part in of_all_processes(rows) for b in part]
        if not rows or not self.trainer.is_global_zero:
            return
        order = torch.cat([b["index"] for b in rows]).argsort()
        arrays: dict[str, Any] = {
            n: torch.cat([b[n] for b in rows])[order].numpy() for n in rows[0]
        }
        path = self.folder / "samples" / "predictions.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        print(f"{len(arrays['x'])} samples: {path}")


def of_all_processes(mine: Any) -> list[Any]:
    """An object of each process, by rank."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    parts = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    return parts


def check_values(config: dict[str, Any]) -> None:
    """Numbers that are none.

    Raises:
        ValueError: a value is not a number, or the optimiser has an infinite one.
    """
    for name, value in leaves(config):
        infinite = (
            isinstance(value, float) and math.isinf(value) and name.startswith("model.optimizer")
        )
        if infinite or value != value:
            raise ValueError(f"{name}={value} must be a finite number")


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


def of_trainer(message: str, trainer: dict[str, Any]) -> str:
    """What Lightning says of an option of the trainer, by its name on the command line."""
    first: dict[str, int] = {}
    for name, value in trainer.items():
        words = [rf"`{name}\b", rf"\b{name}=", rf"\b{name}\b" if "_" in name else "$^"]
        words += [rf"\b{re.escape(value)}\b"] if isinstance(value, str) else []
        if found := re.search("|".join(words), message):
            first[name] = found.start()
    option = min(first, key=lambda name: first[name]) if first else "accelerator"
    said = f"trainer.{option}={trainer[option]}: {' '.join(message.split())}"
    if "backend found" in message:  # none, that is
        said += " Set it to cpu or auto; `fmlightning doctor` says what is there"
    return said


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def train(args: list[str]) -> int:
    """Run one of Lightning's commands."""
    with quiet():
        try:
            require_no_secret(as_options(args[1:]))
            FlowCLI(args)
        except AlreadyFinished as done:
            print(f"{done} is finished already; to see it: fmlightning show {done}")
        except NonFiniteError:
            if _get_rank():
                return 2  # process 0 says it
            raise
        except SIGTERMException:
            if not _get_rank():
                print("stopped; to go on: the same command with --ckpt_path auto", flush=True)
            close_mirror()
            return leave_together()
        except SystemExit as error:  # Lightning's way of ending at Ctrl-C
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            print("stopped; to go on: the same command with --ckpt_path auto")
            return 130
        except RuntimeError as error:
            if left_alone(error):
                return 1
            raise
        finally:
            close_mirror()
            leave()
    return 0

r"""The LightningCLI behind `fmlightning fit | validate | test | predict`, with its traps closed.

- The command line beats the config files, and both beat what a checkpoint remembers.
- The run directory is computed from the resolved config, so every process finds the same one.
- An error is one message; an unknown option says which known one is close.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from fmlightning.cli.config_files import translated
from fmlightning.cli.init_from import Weights, start_from, starting_weights
from fmlightning.cli.messages import at_work, leaves, located
from fmlightning.cli.options import add_options, add_seed
from fmlightning.cli.parser import FlowParser, nulls
from fmlightning.cli.predictions import save_predictions
from fmlightning.cli.quiet import quiet
from fmlightning.cli.run_directory import (
    AlreadyFinished,
    checkpoint,
    claim,
    directory_of,
    mark,
    move_aside,
    require_same_data,
    resumed_segments,
    trained_run,
    unmark,
)
from fmlightning.cli.trainer_options import (
    check_precision,
    check_scheduler,
    check_trainer,
    check_values,
    of_trainer,
    ones_own,
)
from fmlightning.data.module import FlowData
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.size import describe
from fmlightning.runs.directory import require_vacant
from fmlightning.runs.lock import lock, unlock
from fmlightning.runs.secrets import as_options, require_no_secret
from fmlightning.runs.segments import Changes
from fmlightning.training.callbacks.oracle import OracleError
from fmlightning.training.callbacks.progress import StepProgress
from fmlightning.training.callbacks.provenance import Provenance
from fmlightning.training.lightning.checkpoints import ChecksummedFiles
from fmlightning.training.lightning.fast_loop import FastLoop
from fmlightning.training.lightning.internals import OpenCLI, process_rank
from fmlightning.training.lightning.peers import PeerWatchdog, ends_for_lost_peer
from fmlightning.training.lightning.shutdown import (
    GracefulShutdown,
    exit_together,
    replace_signal_handlers,
)
from fmlightning.training.metrics_file import MetricsFile
from fmlightning.training.module import FlowMatching
from fmlightning.training.nonfinite import NonFiniteError
from fmlightning.training.resumed import CommandLineRate
from fmlightning.training.tracking import close_mirror, reachable, wandb_logger


class FlowCLI(OpenCLI):
    """The LightningCLI of flow matching."""

    resolved: dict[str, Any]
    segments: list[dict[str, Any]]
    changes: Changes
    marked = False
    """Whether this process made the directory a run's."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self.requested = args[0] if args else None
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

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_seed(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_options(parser)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's, without the option to unpickle a checkpoint; only the requested one, as each takes time."""
        known = {k: {*v, "weights_only"} for k, v in LightningCLI.subcommands().items()}
        return {self.requested: known[self.requested]} if self.requested in known else known

    @property
    def options(self) -> Namespace:
        """The options of the subcommand."""
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        self.resolve()
        options = self.options
        training = self.subcommand == "fit"
        trained = None if training else trained_run(options.ckpt_path, self.resolved)
        self.folder = trained or directory_of(self.arguments, self.resolved)
        self.text = yaml.safe_dump(self.resolved, sort_keys=False)
        options.trainer.default_root_dir = str(self.folder)
        options.checkpoints.dirpath = str(self.folder / "checkpoints")
        if training and process_rank() == 0:
            require_vacant(self.folder)
        options.ckpt_path = self.checkpoint(options.ckpt_path)
        self.segments, self.changes = [], {}
        if training:
            if process_rank() == 0:
                self.claim(options)
            self.segments, self.changes = resumed_segments(options.ckpt_path, self.resolved)

    def checkpoint(self, named: str | None) -> str | None:
        """The file that `--ckpt_path` means."""
        return checkpoint(self.folder, named, training=self.subcommand == "fit")

    def claim(self, options: Namespace) -> None:
        """Refuse a directory that is in use, unless its run is resumed or moved aside."""
        resumes = any(a.startswith("--ckpt_path") for a in self.arguments)
        claim(self.folder, self.resolved, options.rerun, resumes, bool(options.ckpt_path))

    def resolve(self) -> None:
        """Complete the config with its defaults, and check it.

        Raises:
            ValueError: an option has a value that it cannot have.
        """
        options, parser = self.options, self.parser_of(self.subcommand)
        for name in ("run_dir", "init_from", "ckpt_path"):
            if str(options.get(name)).startswith("~"):
                options[name] = os.path.expanduser(options[name])
        self.text = parser.dump(options, skip_unset=False, skip_link_targets=True, format="yaml")
        self.resolved = without(yaml.safe_load(self.text), "config", "ckpt_path", "rerun")
        self.take_start(options)
        require_no_secret(leaves(self.resolved))
        check_values(self.resolved)
        for name in nulls(parser, options):
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.arguments: list[str] = list(args or [])
        super().parse_arguments(parser, translated(self.arguments))

    def instantiate_classes(self) -> None:
        seed = self.options.seed_everything
        with self.naming_options(), seeded(Key(seed).fold("weights")):
            super().instantiate_classes()
            if self.start is not None and self.subcommand == "fit":
                start_from(self.model.network, self.start, self.options.init_from)

    def run_subcommand(self, subcommand: str) -> None:
        try:
            with self.naming_options():
                super().run_subcommand(subcommand)
        except BaseException:
            if self.marked:
                unmark(self.folder)
            raise

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Name the option that an error is about."""
        try:
            yield
        except (ValueError, MisconfigurationException) as error:
            words = located(str(error), self.resolved, at_work(error))
            if words == str(error):
                raise
            raise ValueError(words) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.built("trainer")
        callbacks: list[Callback] = [
            PeerWatchdog(),
            Provenance(self.resolved, self.text, self.segments),
            OracleError(),
        ]
        if trainer.enable_progress_bar is not False:
            callbacks.append(StepProgress())
        if self.subcommand == "fit":
            callbacks += [CommandLineRate(self.changes), GracefulShutdown()]
        trainer.callbacks = [*ones_own(trainer.callbacks, self.folder), *callbacks]
        trainer.logger = self.loggers(trainer.logger)
        trainer.plugins = [*as_list(trainer.plugins), ChecksummedFiles()]
        try:
            built = replace_signal_handlers(super().instantiate_trainer(**kwargs))
        except (TypeError, ImportError, ValueError, MisconfigurationException) as error:
            raise ValueError(of_trainer(str(error), self.resolved["trainer"])) from error
        check_precision(self.options.trainer.precision, built)
        if self.subcommand == "fit":
            FastLoop(built, FlowMatching)
        return built

    def loggers(self, asked: Any) -> list[Any]:
        """metrics.csv, and beside it the loggers that `trainer.logger` names, or else W&B."""
        if self.subcommand != "fit":
            return []
        if self.options.trainer.fast_dev_run or asked is False:
            return [MetricsFile(self.folder)]
        if asked not in (None, True):
            return [MetricsFile(self.folder), *as_list(asked)]
        tracking = self.built("wandb")
        mirror = wandb_logger(
            tracking, self.folder, self.resolved["experiment"], self.options.rerun
        )
        return [MetricsFile(self.folder), *([mirror] if mirror else [])]

    def before_fit(self) -> None:
        # all that can be refused is refused before the first file is written
        self.datamodule.check(self.trainer.world_size)
        self.model.check(self.datamodule)
        require_same_data(self.options.ckpt_path, self.datamodule.fingerprint)
        evaluation = self.built("evaluation")
        evaluation.check(self.datamodule)
        self.built("checkpoints").check(
            scores=bool(evaluation.metrics and evaluation.every_n_steps),
            callbacks=bool(self.options.trainer.callbacks),
        )
        if self.trainer.is_global_zero:
            lock(self.folder)
            self.claim(self.options)  # again: until now another process may have trained it
            if self.options.rerun and self.folder.exists():
                move_aside(self.folder)
            self.marked = mark(self.folder, self.resolved)
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
        batches: list[Any] = self.trainer.predict(**kwargs) or []
        save_predictions(batches, self.folder)


def own(command: str) -> dict[str, Any]:
    """The settings of a subcommand's parser."""
    usage = f"fmlightning {command} [--config FILE ...] [--OPTION VALUE ...]"
    return {"allow_abbrev": False, "usage": usage}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def run(args: list[str]) -> int:
    """Run one of Lightning's commands, and return the exit status."""
    with quiet():
        try:
            require_no_secret(as_options(args[1:]))
            FlowCLI(args)
        except AlreadyFinished as done:
            print(f"{done} is finished already; to see it: fmlightning show {done}")
        except NonFiniteError:
            if process_rank():
                return 2  # process 0 says it
            raise
        except SIGTERMException:
            if process_rank() == 0:
                print("stopped; to go on: the same command with --ckpt_path auto", flush=True)
            close_mirror()
            return exit_together()
        except SystemExit as error:  # Lightning's way of ending at Ctrl-C
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            print("stopped; to go on: the same command with --ckpt_path auto")
            return 130
        except RuntimeError as error:
            if ends_for_lost_peer(error):
                return 1
            raise
        finally:
            close_mirror()
            unlock()
    return 0

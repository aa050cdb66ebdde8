r"""`fmlightning fit | validate | test | predict`: a LightningCLI with its traps closed.

- The command line beats the config files, and both beat what a checkpoint remembers.
- The run directory is computed from the resolved config, so every process finds the same one.
- An error is one message; an unknown option says which known one is close.
"""

import difflib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace, _typehints
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

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
from fmlightning.metrics.judge import Judge
from fmlightning.runs import Run, run_directory
from fmlightning.training.ema import EMA
from fmlightning.training.metrics_file import MetricsFile
from fmlightning.training.module import FlowMatching
from fmlightning.training.tracking import Tracking, close_mirror, wandb_logger

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


def forget_on_change(kept: Callable[..., None]) -> Callable[..., None]:
    """Let a path, coupling or source that takes another's place start from its own defaults.

    jsonargparse carries over what has the same name: `sigma_min` of Linear is not that of VarianceExploding, nor
    `s` of IndependentCFM that of the bridge. An optimiser's `lr`, and all else outside the mathematics, still is.
    """

    def change(parser: Any, prev_val: Any, value: Any) -> None:
        changes = prev_val and prev_val["class_path"] != value["class_path"]
        if changes and str(prev_val["class_path"]).startswith("fmlightning.flow."):
            prev_val["init_args"] = Namespace()
        kept(parser, prev_val, value)

    return change


_typehints.discard_init_args_on_class_path_change = forget_on_change(
    _typehints.discard_init_args_on_class_path_change
)


class FlowParser(LightningArgumentParser):
    """A parser whose errors are one message, and whose help is about flow matching."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, without the names of every module of torch."""
        modules = r"known\s+subclasses:\s+torch\.nn\.Module,.*?\)\n"
        return re.sub(
            modules,
            "or any torch.nn.Module)\n",
            super().format_help(*args, **kwargs),
            flags=re.DOTALL,
        )

    def print_usage(self, file: Any = None) -> None:
        """Nothing: sixty lines of usage hide the message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(self.hint(str(message))) from ex

    def hint(self, message: str) -> str:
        """The message, with the known option that is closest to an unknown one."""
        marker = "nrecognized arguments:"
        if marker not in message:
            return shorten(self.name_classes(message))
        unknown = message.split(marker)[1].split()[0].split("=")[0]
        known = [o for parser in self.parsers() for a in parser._actions for o in a.option_strings]
        close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
        return f"unknown option {unknown}" + (
            f"; did you mean {close[0]}?" if close else "; --help lists them"
        )

    def name_classes(self, message: str) -> str:
        """The message, with the known classes where a class was misnamed."""
        wrong = re.search(r"Expected a dot import path string: (\S+)", message)
        option = re.search(r'Parser key "([^"]+)"', message)
        if not (wrong and option):
            return message
        kinds = [
            t for p in self.parsers() for a in p._actions if a.dest == option[1] for t in classes(a)
        ]
        known = sorted({c.__name__ for kind in kinds for c in subclasses(kind) if ours(c)})
        close = difflib.get_close_matches(wrong[1], known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"--{option[1]} {wrong[1]}: no such class; {hint}Known: {', '.join(known)}, or a full import path"

    def parsers(self) -> Iterator[Any]:
        yield self
        for action in self._actions:
            yield from (getattr(action, "_name_parser_map", None) or {}).values()


def shorten(message: str) -> str:
    """Of what jsonargparse says about an option that may be several things, what it says about the likely one."""
    # what is wrong inside an option stands on a line of its own
    message = re.sub(r'(- Parser key "[^"]+":)\n\s+', r"\1 ", message)
    errors = [line.strip()[2:] for line in message.splitlines() if line.strip().startswith("- ")]
    telling = [
        e
        for e in errors
        if not e.startswith(("Expected a <class", "Expected a path", "Does not validate"))
    ]
    telling = telling or [
        e for e in errors if "NoneType" not in e and e.startswith("Expected a <class")
    ]
    if not telling:
        return message
    option = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"Given value: ([^\n(]{1,80})$", message, re.MULTILINE)
    start = f"--{option[1]}" + (f" {value[1]}" if value else "") + ": " if option else ""
    return start + "; ".join(dict.fromkeys(telling))


def classes(action: Any) -> list[type]:
    """The classes that an option's type hint names."""
    hint = getattr(action, "_typehint", None)
    parts = [hint, *get_args(hint), *(b for a in get_args(hint) for b in get_args(a))]
    return [part for part in parts if isinstance(part, type) and part.__module__ != "builtins"]


def subclasses(kind: type) -> Iterator[type]:
    """A class and all below it."""
    yield kind
    below: list[type] = kind.__subclasses__()
    for each in below:
        yield from subclasses(each)


def ours(kind: type) -> bool:
    """Whether a class can be built and is worth naming."""
    if issubclass(kind, nn.Module) and not issubclass(kind, Judge):  # of all modules, the networks
        inside = kind.__module__.startswith("fmlightning.nets.")
        return inside and {"x", "t", "y"} <= inspect.signature(kind.forward).parameters.keys()
    named = kind.__module__.startswith(("fmlightning.", "torch.optim."))
    return named and not inspect.isabstract(kind) and not kind.__name__.startswith("_")


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
        self.folder = run_directory(self.resolved)
        options.trainer.default_root_dir = str(self.folder)
        options.checkpoints.dirpath = str(self.folder / "checkpoints")
        options.ckpt_path = self.checkpoint(options.ckpt_path)
        if self.subcommand == "fit" and _get_rank() in (None, 0):
            self.claim(options)

    def checkpoint(self, named: str | None) -> str | None:
        """The file that `--ckpt_path` means: `auto` or `last` of this run, a run directory, or a file."""
        run = Run(self.folder)
        if named in ("auto", "last"):
            return str(run.last_checkpoint) if run.last_checkpoint else None
        if named is None:
            return None if self.subcommand == "fit" else str(run.checkpoint())
        path = Path(named)
        if path.is_dir():
            return str(Run.open(path).checkpoint())
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path={named}: no such checkpoint or run directory")
        return str(path)

    def claim(self, options: Namespace) -> None:
        """Refuse a directory that is in use, or keep it under another name."""
        run = Run(self.folder)
        if options.rerun and self.folder.exists():
            keep(self.folder)
        elif run.status == "finished" and not options.ckpt_path:
            raise ValueError(
                f"{self.folder} holds this run already, finished. To see it: fmlightning show {self.folder}. "
                "To train it again and keep the old one beside it: add --rerun true"
            )
        elif run.status != "new" and not self.resumes():
            raise ValueError(
                f"{self.folder} holds this run, {run.status}. To resume it: add --ckpt_path auto. "
                "To start again and keep the old one beside it: add --rerun true"
            )

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
        mirror = wandb_logger(tracking, self.folder, self.resolved["experiment"])
        return [MetricsFile(self.folder), *([mirror] if mirror else [])]

    def before_fit(self) -> None:
        if _get_rank() in (None, 0):
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
            FlowCLI(with_config(args))
        except ValueError as error:
            raise ValueError(shorten(str(error))) from error
        finally:
            close_mirror()
    return 0


def with_config(args: list[str]) -> list[str]:
    """The arguments, and before them the config of the run that `--ckpt_path` names where no config is given."""
    if any(re.match(r"(-c|--config)(=|$)", a) for a in args):
        return args
    joined = [a.split("=", 1)[1] for a in args if a.startswith("--ckpt_path=")]
    apart = [b for a, b in pairwise(args) if a == "--ckpt_path"]
    for named in (*joined, *apart):
        if named not in ("auto", "last", "null"):
            return [args[0], "--config", str(Run.open(named).path / "config.yaml"), *args[1:]]
    return args


def instantiate_model(config: dict[str, Any]) -> FlowMatching:
    """The untrained module of a resolved config."""
    parser = FlowParser()
    parser.add_lightning_class_args(FlowMatching, "model")
    options = parser.parse_object({"model": {**config["model"], "seed": config["seed_everything"]}})
    return parser.instantiate(options).model


def instantiate_data(config: dict[str, Any]) -> LightningDataModule:
    """The DataModule of a resolved config."""
    parser = FlowParser()
    parser.add_lightning_class_args(FlowData, "data", subclass_mode=True)
    data = config["data"]
    data["init_args"] = {**data.get("init_args", {}), "seed": config["seed_everything"]}
    return parser.instantiate(parser.parse_object({"data": data})).data

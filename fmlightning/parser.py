"""The parser of the command line: one message for an error, and help about flow matching.

- An unknown option or class is answered with the known one that is closest.
- A class that takes another's place starts from its own defaults.
- A config file that cannot be read is named.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from fmlightning.metrics.judge import Judge
from fmlightning.runs import Run


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
        if "are required" in message or "is required" in message:
            return f"{message}. A config gives them: --config configs/toy/moons.yaml"
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
    parts = [getattr(action, "_typehint", None)]
    for part in parts:  # grows while it is walked
        parts += part if isinstance(part, list) else get_args(part)
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


def config_files(args: list[str]) -> list[str]:
    """The files that `--config` names."""
    joined = [a.split("=", 1)[1] for a in args if a.startswith("--config=")]
    return joined + [b for a, b in pairwise(args) if a in ("-c", "--config")]


def check_files(args: list[str]) -> None:
    """Name the config file that cannot be read, which jsonargparse does not."""
    for name in config_files(args):
        try:
            content = yaml.safe_load(Path(name).read_text())
        except FileNotFoundError as error:
            raise ValueError(f"--config {name}: no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--config {name} is not YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(
                f"--config {name} holds no options: it should be a mapping such as `trainer: {{...}}`"
            )


def with_config(args: list[str]) -> list[str]:
    """The arguments, and before them the config of the run that `--ckpt_path` names where no config is given."""
    if config_files(args):
        return args
    joined = [a.split("=", 1)[1] for a in args if a.startswith("--ckpt_path=")]
    apart = [b for a, b in pairwise(args) if a == "--ckpt_path"]
    for named in (*joined, *apart):
        if named not in ("auto", "last", "null"):
            return [args[0], "--config", str(Run.open(named).path / "config.yaml"), *args[1:]]
    return args

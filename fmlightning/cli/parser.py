"""The parser of the command line: one message for an error, and help about flow matching.

- An unknown option or class is answered with the known one that is closest.
- A class that takes another's place starts from its own defaults.
- A class is imported only where `allowed` lets it, wherever its path came from.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

import torch
from jsonargparse import Namespace, _actions, _typehints, set_parsing_settings
from jsonargparse._common import parser_context
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from fmlightning.cli.allowed import guarded
from fmlightning.cli.flags import with_values
from fmlightning.cli.messages import plain
from fmlightning.metrics.metric import Judge

UNKNOWN = "unknown option"


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

# every import path that a value names goes through these two
for module in (_typehints, _actions):
    module.import_object = guarded(module.import_object)  # type: ignore[attr-defined]
# and an option of any type would build any class
set_parsing_settings(instantiate_subclass_spec_in_any=False)


FACADES = ("flow", "nets", "data", "metrics", "training")


def import_public_classes() -> None:
    """Import what the facades export: a class that is not imported has no short name."""
    for name in FACADES:
        facade = import_module(f"fmlightning.{name}")
        for public in facade.__all__:
            getattr(facade, public)


class FlowParser(LightningArgumentParser):
    """A parser whose errors are one message, and whose help is about flow matching."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import_public_classes()
        super().__init__(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, without the names of every module of torch."""
        modules = r"known\s+subclasses:\s+torch\.nn\.Module,.*?\)\n"
        return re.sub(
            modules,
            "or any torch.nn.Module)\n",
            super().format_help(*args, **kwargs),
            flags=re.DOTALL,
        )

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """The options of a command line, whose flags may stand without a value."""
        words = sys.argv[1:] if args is None else args
        actions = [a for parser in self.parsers() for a in parser._actions]
        flags = {
            o for a in actions if getattr(a, "_typehint", None) is bool for o in a.option_strings
        }
        return super().parse_args(list(with_values(words, flags)), *others, **settings)

    def print_usage(self, file: Any = None) -> None:
        """Nothing: sixty lines of usage hide the message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(self.hint(str(message))) from ex

    def hint(self, message: str) -> str:
        """The message, with the known option that is closest to an unknown one."""
        marker = "nrecognized arguments:"
        message = re.sub(r"(?<=[ ,])(fit|validate|test|predict)\.(?=\w)", "--", message)
        missing = re.match(r"the following arguments are required: ([^,\s]+)", message)
        if missing and not self.exit_on_error:  # the parser of a class
            return f"--{missing[1]}: must be given"
        if missing:
            return f"{message}; {self.remedy()}"
        no_such = re.search(r"Subcommand '\w+' does not accept option '([^']+)'", message)
        if marker not in message and not no_such:
            option = re.sub(r"Option '([^']+)' is not accepted", rf"--\1: {UNKNOWN}", message)
            words = plain(option, self.known)
            group = words.split(f": {UNKNOWN}")[0].rpartition(".")[0] if UNKNOWN in words else ""
            return words + (f"; {group}.help CLASS lists those that a class has" if group else "")
        unknown = no_such[1] if no_such else message.split(marker)[1].split()[0].split("=")[0]
        known = [o for parser in self.parsers() for a in parser._actions for o in a.option_strings]
        close = difflib.get_close_matches(
            f"--{unknown}" if no_such else unknown, known, n=1, cutoff=0.5
        )
        return f"unknown option {unknown}" + (
            f"; did you mean {close[0]}?" if close else "; --help lists them"
        )

    def remedy(self) -> str:
        """What to do where an option is missing."""
        if any(a.dest == "config" for p in self.parsers() for a in p._actions):
            return "a config gives them: --config configs/toy/moons.yaml"
        return "--help explains"

    def known(self, option: str) -> list[str]:
        """The classes that an option may be, of those worth naming."""
        kinds = [
            t for p in self.parsers() for a in p._actions if a.dest == option for t in classes(a)
        ]
        found = {c for kind in kinds for c in subclasses(kind) if ours(c)}
        found -= {torch.optim.Optimizer, torch.optim.SparseAdam}
        if Judge not in kinds:  # judges are modules, and no networks
            found = {c for c in found if not issubclass(c, Judge)}
        return sorted(c.__name__ for c in found)

    def parsers(self) -> Iterator[Any]:
        yield self
        for action in self._actions:
            yield from (getattr(action, "_name_parser_map", None) or {}).values()


def nulls(parser: Any, values: Namespace, top: Any, start: str = "") -> Iterator[str]:
    """The options that are null though their type has no null; jsonargparse lets them pass."""
    for action in parser._actions:
        kind, value = getattr(action, "_typehint", None), values.get(action.dest)
        optional = kind in (None, Any) or action.default is None or NoneType in get_args(kind)
        if value is None and not optional and action.dest in values:
            yield start + action.dest
        for spec in value if isinstance(value, list) else [value]:
            if isinstance(spec, Namespace) and spec.get("class_path") and spec.get("init_args"):
                with parser_context(parent_parser=top):
                    inner = _typehints.ActionTypeHint.get_class_parser(spec.class_path)
                yield from nulls(inner, spec.init_args, top, f"{start}{action.dest}.")


def classes(action: Any) -> list[type]:
    """The classes that an option's type hint names."""
    parts = [getattr(action, "_typehint", None)]
    for part in parts:  # grows while it is walked
        made = get_origin(part) is Callable  # what a function takes is no choice
        parts += get_args(part)[-1:] if made else get_args(part)
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

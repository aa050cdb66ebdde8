"""The parser of the command line: one message for an error, and help about flow matching.

- An unknown option or class is answered with the known one that is closest.
- A class that takes another's place starts from its own defaults.
- A class is imported only where `allowed` lets it, wherever its path came from.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import NoneType
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from lightning_utilities.core.enums import StrEnum

from fmlightning.cli.allowed import guarded
from fmlightning.cli.explain import explain
from fmlightning.cli.flags import with_values
from fmlightning.cli.jsonargparse_internals import (
    all_actions,
    forget_on_change,
    guard_imports,
    type_of,
    values,
)
from fmlightning.runs.legacy import FACADES

guard_imports(guarded)
# else an option of any type would build any class
set_parsing_settings(instantiate_subclass_spec_in_any=False)
# `sigma_min` of Linear is not that of VarianceExploding; an optimiser's `lr`, and all else outside the mathematics, is
forget_on_change("fmlightning.flow")

# a default of Lightning that is text and an enumeration at once, as the interval of its Timer
yaml.SafeDumper.add_multi_representer(
    StrEnum, lambda dumper, value: dumper.represent_str(str(value.value))
)


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

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *others: Any, **settings: Any
    ) -> Namespace:
        """The options of a command line, whose flags may stand without a value."""
        words = sys.argv[1:] if args is None else args
        flags = {o for a in all_actions(self) if type_of(a) is bool for o in a.option_strings}
        return super().parse_args(list(with_values(words, flags)), *others, **settings)

    def print_usage(self, file: Any = None) -> None:
        """Nothing: sixty lines of usage hide the message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(explain(str(message), self)) from ex


def nulls(parser: Any, options: Namespace) -> Iterator[str]:
    """The options that are null though their type has no null; jsonargparse lets them pass."""
    for name, action, value in values(parser, options):
        kind = type_of(action)
        optional = kind in (None, Any) or action.default is None or NoneType in get_args(kind)
        if value is None and not optional:
            yield name

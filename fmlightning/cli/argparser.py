"""The parser and the console of the commands that start without torch."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from rich.console import Console

from fmlightning.cli.flags import FALSE, TRUE, with_values


class Parser(argparse.ArgumentParser):
    """argparse, with flags as `cli.flags` writes them, and errors for the command's one place of messages."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"fmlightning {command}", description=description, allow_abbrev=False)
        self.flags: set[str] = set()

    def add_flag(self, name: str, help: str, default: bool = False) -> None:
        """Add an option of true or false."""
        self.flags.add(name)
        self.add_argument(
            name, nargs="?", type=true_or_false, default=default, metavar="true|false", help=help
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The options, and the words that are none; argparse's other ways of parsing come through here."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(with_values(words, self.flags)), namespace)

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split("=")[0].split(" ")[0]
        close = get_close_matches(unknown, self._option_string_actions, n=1) if unknown else []
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{message}{hint} ({self.prog} --help explains)")


def true_or_false(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text} must be true or false")
    return text.lower() in TRUE


def console() -> Console:
    """A console that does not wrap where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 200)


def choices(name: str, known: Iterable[str], shown: int = 30) -> str:
    """The known name nearest to a misspelt one, and all that there are."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{hint}there are: {', '.join(names[:shown])}{more}"

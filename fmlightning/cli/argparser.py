"""What the commands that start without torch share: their parser and their console."""

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from rich.console import Console


class Parser(argparse.ArgumentParser):
    """argparse, with errors for the command's one place of messages."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"fmlightning {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (fmlightning {self.prog.split()[-1]} --help explains)")


def console() -> Console:
    """A console that does not wrap where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 200)


def choices(name: str, known: Iterable[str], shown: int = 30) -> str:
    """What a misspelt name may have meant, and what there is."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{hint}there are: {', '.join(names[:shown])}{more}"

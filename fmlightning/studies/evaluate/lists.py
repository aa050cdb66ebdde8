"""Options that take several values with commas between: `--nfe 4,8,16`."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True, repr=False)
class Several:
    """The type of such an option.

    Args:
        kind: what makes a value from a word.
        what: the values, in words.
        such: an example.
    """

    kind: Callable[[str], Any]
    what: str
    such: str

    def __call__(self, text: Any) -> list[Any]:
        """The values of a text; a list, or one value of a config, is taken as it is."""
        given = text.strip("[]").split(",") if isinstance(text, str) else text
        given = given if isinstance(given, list) else [given]
        try:
            return [self.kind(str(word).strip()) for word in given]
        except (ValueError, KeyError) as error:
            raise ArgumentTypeError(
                f"{text} must be {self.what} with commas between, such as {self.such}"
            ) from error

    def __repr__(self) -> str:
        """What --help says."""
        return f"{self.what}, with commas between"


INTEGERS = Several(int, "whole numbers", "4,8")
FLOATS = Several(float, "numbers", "1,1.5")
BOOLEANS = Several(
    lambda text: {"true": True, "false": False}[text.lower()], "true or false", "true,false"
)


@dataclass(frozen=True, repr=False)
class Classes:
    """The type of an option that takes names with commas between, classes among them, or the list of a config."""

    def __call__(self, text: Any) -> list[Any] | None:
        if not isinstance(text, str):
            return text
        try:
            found: list[Any] = yaml.safe_load(text if text.startswith("[") else f"[{text}]")
        except yaml.YAMLError as error:
            raise ArgumentTypeError(f"{text} must be {self!r}") from error
        return found

    def __repr__(self) -> str:
        return "names, with commas between, or a list of names and {class_path, init_args}"

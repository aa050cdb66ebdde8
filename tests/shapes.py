"""The shapes in the signatures, checked while the tests run.

A check costs about as much as the small functions it checks. A solver that calls the same ones ten thousand times
learns nothing new from them, so each test has its first thousands of calls checked, and the others go free.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from beartype import beartype
from jaxtyping import config

P, R = ParamSpec("P"), TypeVar("R")
CHECKS = 500
"""How many arguments and results a test has checked: all of most tests, the first steps of a long integration."""

made = 0


def start() -> None:
    """Check again: a new test begins."""
    global made
    made = 0
    config.update("jaxtyping_disable", False)


def first_calls(function: Callable[P, R]) -> Callable[P, R]:
    """What the import hook wraps each function with: beartype, and a count."""
    checked = beartype(function)

    @wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        global made
        made += 1
        if made == CHECKS:
            config.update("jaxtyping_disable", True)
        return checked(*args, **kwargs)

    return counted

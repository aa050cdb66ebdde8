"""Callbacks that know when they are needed next, in optimiser steps counted from 1."""

import math
from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer


@runtime_checkable
class Scheduled(Protocol):
    """A callback that knows when it is needed next, and need not be asked before.

    One with `per_step_hooks`, names of its hooks, takes part in every step by these, and need not be asked otherwise.
    """

    def next_due_step(self, trainer: Trainer) -> float:
        """The next step after which it has something to do; inf for none."""


def step_after(step: int, every: int | None) -> float:
    """The first multiple of `every` after a step; inf where there is none."""
    return (step // every + 1) * every if every else math.inf

"""Output of the commands that load Lightning: printed once, and without the warnings of others."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fmlightning.training.lightning.internals import process_rank

EXPECTED_WARNINGS = (
    "The anonymous setting has no effect",
    ".*args parameter is intended to run from within Python.*",
    ".*deprecated in v4.*will be removed in v5.*",
    ".*only one JsonargparseDeprecationWarning.*",
    ".*does not have many workers.*",
    ".*is not resumable.*",
    ".*exists and is not empty.*",
    ".*LeafSpec.*",
    ".*isinstance.treespec.*",
    ".*AMP with fp16 is not supported on CPU.*",
    ".*The number of training batches.*",
    ".*`training_step` returned `None`.*",
    ".*sync_dist=True.*",
    ".*`srun` command is available on your system but is not used.*",
)
"""Warnings of other packages that are expected here."""


def say(text: str) -> None:
    """Print on the first process."""
    if process_rank() == 0:
        print(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and tips of other packages that do not help a user of this command."""
    import logging

    os.environ.setdefault("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        for text in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", text)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
            logging.getLogger(name).setLevel(logging.WARNING)
        yield

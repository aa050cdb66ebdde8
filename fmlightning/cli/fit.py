"""`fmlightning fit | validate | test | predict`: config files are read as text before Lightning is loaded.

An error in a file is thus reported at once, and a signal during the seconds of the import is not lost.
"""

import os

from fmlightning.cli.config_files import check_files, with_config
from fmlightning.runs.signals import listening


def fit(argv: list[str]) -> int:
    """`fmlightning fit`: train, and return the exit status."""
    words = checked("fit", argv)
    with listening():
        return run(words)


def validate(argv: list[str]) -> int:
    """`fmlightning validate`: score a checkpoint on the validation data."""
    return run(checked("validate", argv))


def test(argv: list[str]) -> int:
    """`fmlightning test`: score a checkpoint on the test data."""
    return run(checked("test", argv))


def predict(argv: list[str]) -> int:
    """`fmlightning predict`: generate a sample for each test sample and save them."""
    return run(checked("predict", argv))


def checked(command: str, argv: list[str]) -> list[str]:
    """The command line with a config, whose text has nothing wrong."""
    words = with_config([command, *argv])
    check_files(words)
    return words


def run(words: list[str]) -> int:
    if "SLURM_PROCID" not in os.environ:
        # a shell of an allocation, and no task of it: Lightning would wait for the others
        os.environ.pop("SLURM_NTASKS", None)
    from fmlightning.cli.flow_cli import run

    return run(words)

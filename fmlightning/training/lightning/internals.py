"""Private and undocumented names of Lightning that other rooms need, each behind a function with a name.

The rest of this folder uses such names for itself. `tests/training/lightning/test_private_names.py` lists all of them.
"""

from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI


def process_rank() -> int:
    """The number of this process among those of the run, before and after they are connected; 0 of one alone."""
    return _get_rank() or 0


def current_step(trainer: Trainer) -> int:
    """The number of the training batch at hand, counted from 0 over the whole run."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1


class OpenCLI(LightningCLI):
    """A LightningCLI whose private methods have public names."""

    def built(self, name: str) -> Any:
        """The object that an option, or a group of options, was made into."""
        return self._get(self.config_init, name)

    def parser_of(self, subcommand: str | None) -> Any:
        """The parser of a subcommand."""
        return self._parser(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the checkpoint's hyperparameters over the command line."""

    def run_subcommand(self, subcommand: str) -> None:
        """Run the method of the trainer; what surrounds it may be put around this."""
        super()._run_subcommand(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

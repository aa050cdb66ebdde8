"""Groups of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DRIVER = Path(__file__).parent / "commands.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


class Group:
    """Some commands, run by `size` processes that are started once.

    Args:
        folder: of the runs and the draws of this group.
        size: how many processes.
    """

    def __init__(self, folder, size):
        self.folder, self.size = folder, size
        self.lines = []

    def add(self, name, *argv, signal=None, run=None):
        run = run or self.folder / name
        argv = [*argv, "--wandb.mode=disabled", f"--run_dir={run}"]
        self.lines.append(json.dumps({"name": name, "argv": argv, "signal": signal}))

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "commands").write_text("\n".join(self.lines))
        several = (*TORCHRUN, f"--nproc-per-node={self.size}")
        launch = [sys.executable] if self.size == 1 else several
        result = subprocess.run(
            [*launch, str(DRIVER), str(self.folder)],
            capture_output=True, text=True, timeout=1200, cwd=DRIVER.parents[2],
            env={**os.environ, "FMLIGHTNING_CACHE": str(self.folder / "cache")},
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        self.shown = result.stdout
        return self

    def of_ranks(self, name):
        files = [self.folder / f"{name}-{rank}.pt" for rank in range(self.size)]
        return [torch.load(file, weights_only=True) for file in files]

    def statuses(self, name):
        return [of_rank["status"] for of_rank in self.of_ranks(name)]

    def draws(self, name):
        """What the whole group drew in each step, its rows in the order of the processes."""
        steps = zip(*(of_rank["draws"] for of_rank in self.of_ranks(name)), strict=True)
        return [{k: torch.cat([part[k] for part in parts]) for k in parts[0]} for parts in steps]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    def make(size):
        return Group(tmp_path_factory.mktemp(f"on{size}"), size)

    return make

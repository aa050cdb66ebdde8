"""Groups of processes."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import warm

DRIVER = Path(__file__).parent / "commands.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def shares_of(size):
    """What torchrun tells each of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
             "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}  # fmt: skip
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


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

    def start(self, torchrun=False):
        """Run the commands, in forks that have torchrun's environment, or under torchrun itself."""
        (self.folder / "commands").write_text("\n".join(self.lines))
        env = {**os.environ, "FMLIGHTNING_CACHE": str(self.folder / "cache")}
        launch = (*TORCHRUN, f"--nproc-per-node={self.size}") if torchrun else (sys.executable,)
        shares = [{}] if torchrun or self.size == 1 else shares_of(self.size)
        with (self.folder / "shown").open("w") as shown:
            argv = [*launch, DRIVER, self.folder]
            processes = [warm.Warm(argv, shown, env={**env, **share}) for share in shares]
        deadline = time.monotonic() + 1200
        while not all(process.poll() == 0 for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:  # the others would wait for it
                for process in processes:
                    process.kill()
                pytest.fail((self.folder / "shown").read_text())
            time.sleep(0.1)
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

"""Run commands one after the other in one group of processes, and record what their training draws.

    python commands.py FOLDER

Each line of FOLDER/commands is a JSON object {"name": ..., "argv": [...], "signal": [step, number]?}. The exit status
and the draws of a process go to FOLDER/<name>-<rank>.pt. With `signal`, the last process sends itself that signal in
the middle of that step.
"""

import json
import os
import sys
from pathlib import Path

import torch

from fmlightning.__main__ import main
from fmlightning.training.draws import Draws
from fmlightning.training.module import FlowMatching

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
original, setup = Draws.__call__, FlowMatching.setup


def run(name, argv, folder, signal=None):
    draws, trainers = [], []

    def draw(self, batch, step):
        drawn = original(self, batch, step)
        taken = {**drawn.on(self.recipe.path)._asdict(), "y": drawn.y}
        draws.append({k: v.clone() for k, v in taken.items() if v is not None})
        if signal and trainers[-1].global_step == signal[0] and SIZE - 1 == RANK:
            os.kill(os.getpid(), signal[1])
        return drawn

    def remember(self, stage):
        trainers.append(self.trainer)
        setup(self, stage)

    Draws.__call__, FlowMatching.setup = draw, remember
    devices = [f"--trainer.devices={SIZE}", *(["--trainer.strategy=ddp"] if SIZE > 1 else [])]
    status = main([*argv, "--trainer.accelerator=cpu", *devices])
    torch.save({"status": status, "draws": draws}, folder / f"{name}-{RANK}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for line in (folder / "commands").read_text().splitlines():
        run(folder=folder, **json.loads(line))

"""A few steps of `fmlightning fit` on one device, with nothing written: what they take, as one line of JSON.

    python -m fmlightning.cli.find_batch_size.trial BATCH MEMORY MODULES --config FILE ...

BATCH 0 takes no step, and tells what the config asks for. MEMORY is in bytes, and 0 all there is; MODULES are those
that a config may name.

The steps are the run's own: its precision, clipping, accumulation, optimiser, average and compiled network. Images,
scores and checkpoints are left out, and so is validation, whose batch is another option.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from fmlightning.cli.allowed import allowing
from fmlightning.cli.errors import is_users, message
from fmlightning.cli.find_batch_size import MARK
from fmlightning.cli.flow_cli import FlowCLI
from fmlightning.cli.quiet import quiet
from fmlightning.training.lightning.fast_loop import FastLoop
from fmlightning.training.module import FlowMatching

WARM = 3
"""Steps before the clock starts: an optimiser makes its state in the first, and convolutions are chosen."""

SECONDS, STEPS = 1.0, 3
"""The time and the number of steps that are measured at least."""

KEPT = (
    "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "accelerator",
    "plugins", "benchmark", "deterministic", "overfit_batches", "limit_train_batches",
)  # fmt: skip
"""Options of the trainer that a step depends on."""


class Meter(Callback):
    """Times some steps, and ends the run after them."""

    def __init__(self) -> None:
        self.next, self.begin, self.step, self.rate = WARM, 0.0, 0, 0.0

    def next_due_step(self, trainer: Trainer) -> float:
        """The next step after which it has something to do."""
        return self.next

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Start the clock, or look at it."""
        if trainer.global_step < self.next or trainer.global_step == self.step:
            return
        synchronise(trainer)
        now = time.perf_counter()
        if not self.begin:
            self.begin, self.step = now, trainer.global_step
            self.next = self.step + STEPS
            return
        steps, seconds = trainer.global_step - self.step, now - self.begin
        self.rate = steps * trainer.accumulate_grad_batches * pl_module.batch_size / seconds
        self.next = trainer.global_step + steps
        trainer.should_stop = seconds >= SECONDS


def synchronise(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type != "cpu":
        torch.accelerator.synchronize()


class TrialCLI(FlowCLI):
    """`fit` without a directory."""

    def claim(self, options: Any) -> None:
        """Nothing: nothing is written."""

    def checkpoint(self, named: str | None) -> str | None:
        """None: a trial starts at step 0."""
        return None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        asked, ema = (self.built(name) for name in ("trainer", "ema"))
        several = Trainer(
            accelerator=asked.accelerator, devices=asked.devices, num_nodes=asked.num_nodes, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        self.processes = several.num_devices * several.num_nodes
        self.meter = Meter()
        trainer = Trainer(
            **{name: asked[name] for name in KEPT}, devices=1, max_steps=10**9, callbacks=[ema, self.meter],
            limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        FastLoop(trainer, FlowMatching)
        return trainer

    def before_fit(self) -> None:
        self.datamodule.check(1)
        self.model.check(self.datamodule)

    def after_fit(self) -> None:
        """Nothing: what a trial took is read when it is over."""


class AskingCLI(TrialCLI):
    """A trial without a step."""

    def fit(self, **kwargs: Any) -> None:
        """Nothing."""


def asked(args: list[str]) -> dict[str, Any]:
    """The batch of a config, and the device where it would train."""
    cli = AskingCLI(["fit", *args])
    device = cli.trainer.strategy.root_device
    return {
        "batch": cli.datamodule.batch_size,
        "processes": cli.processes,
        "device": device_name(device),
        "card": device.type == "cuda",
        "samples": getattr(getattr(cli.datamodule, "order", None), "size", None),
        "free": free_memory(),
        "held": 0 if device.type == "cuda" else peak_memory(device),
    }


def trial(batch: int, memory: int, args: list[str]) -> dict[str, Any]:
    """Train a few steps, and say what they took."""
    if memory and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))
    try:
        cli = TrialCLI(["fit", *args, f"--data.batch_size={batch}"])
    except (torch.OutOfMemoryError, MemoryError):
        return {"why": "out of memory"}
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return {"why": "out of memory"}
    return {"peak": peak_memory(cli.trainer.strategy.root_device), "rate": cli.meter.rate}


def free_memory() -> int:
    """Bytes that a process can take: of the GPU, where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in info.read_text().splitlines()) if info.exists() else {}
    if "MemAvailable" in lines:
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch took of a GPU, and of a CPU the whole process with its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"the {device.type.upper()}"
    )


def main() -> None:
    """Run one trial; what is wrong with an option goes to stderr, and status 2."""
    batch, memory, modules, *args = sys.argv[1:]
    try:
        with quiet(), allowing([m for m in modules.split(",") if m]):
            found = trial(int(batch), int(memory), args) if int(batch) else asked(args)
    except Exception as error:
        if not is_users(error):
            raise
        print(message(error), file=sys.stderr)
        sys.exit(2)
    print(MARK + json.dumps(found) + "}", flush=True)


if __name__ == "__main__":
    main()

"""Training our U-Net at 32 x 32, against TorchCFM's U-Net in a bare loop.

    benchmarks/.venv/bin/python benchmarks/images.py --out images.json

Both have the width, depth, attention and dropout of TorchCFM's CIFAR-10 example, at a quarter of its channels, and take
fused Adam. A step is forward, backward and optimiser on a batch in memory, ours through the objective of the package.
Ours is also timed as the real command, with its average, guard, progress, rows and checkpoints, against the bare loop
with the same clipping and the same average. Memory is the peak of a process above what it held before the first step.

Equal work is asserted: parameters, multiply-adds, attentions, layers of dropout and their probability, the batch, the
steps; and that with the same weights the two networks are the same function, at the example's full width.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torchcfm_unet
from loop import COMMON, Timed
from ratios import require_equal_work, row
from timing import alternated, begin, by_turns, parser, report
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

from fmlightning.__main__ import main as fmlightning
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.objectives.cfm import mean_cfm_loss
from fmlightning.flow.paths.schedules import Linear

CHANNELS, BATCH, DROPOUT, LR = 32, 8, 0.1, 2e-4
CLIP, DECAY = 1.0, 0.9999
MEMORY_STEPS = 3
STATUS = Path("/proc/self/status")  # of Linux alone

Side = Literal["ours", "theirs"]


def our_step(dropout: float) -> Callable[[], None]:
    """A step by our network, path and objective, with keyed noise and dropout."""
    net, path, x1 = torchcfm_unet.ours(CHANNELS, dropout).train(), Linear(), pixels()
    optimizer = torch.optim.Adam(net.parameters(), LR, fused=True)
    key, index, count = Key(0), torch.arange(BATCH), 0

    def step() -> None:
        nonlocal count
        now, count = key.fold(count), count + 1
        x0 = torch.randn(x1.shape, generator=now.fold("x0").generator())
        t = torch.rand(BATCH, generator=now.fold("time").generator())
        optimizer.zero_grad()
        streams = now.fold("network").streams(index)
        mean_cfm_loss(net, path, path.sample(x0, x1, t), streams=streams).backward()
        optimizer.step()

    return step


def their_step(dropout: float, clip: bool = False) -> Callable[[], None]:
    """The step of TorchCFM's example."""
    net, matcher, x1 = (
        torchcfm_unet.theirs(CHANNELS, dropout).train(),
        ConditionalFlowMatcher(0.0),
        pixels(),
    )
    optimizer = torch.optim.Adam(net.parameters(), LR, fused=True)
    weights = [p.detach() for p in net.parameters()]
    average = [w.clone() for w in weights]

    def step() -> None:
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        optimizer.zero_grad()
        F.mse_loss(net(t, xt), ut).backward()
        if clip:
            clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        if clip:
            torch._foreach_lerp_(average, weights, 1 - DECAY)

    return step


def pixels() -> Tensor:
    return 2 * torch.rand(BATCH, *torchcfm_unet.SHAPE, generator=Key(0).generator()) - 1


def the_command(steps: int) -> float:
    """Seconds of training by `fmlightning fit`, start-up left out."""
    with tempfile.TemporaryDirectory() as folder, Timed(time.perf_counter) as timed:
        run, shown = Path(folder) / "run", io.StringIO()
        with contextlib.redirect_stdout(shown):
            status = fmlightning(
                [
                    "fit", "--config=configs/papers/cifar10_unet_torchcfm.yaml", *COMMON,
                    f"--trainer.gradient_clip_val={CLIP}", "--data=PhotosData", f"--data.batch_size={BATCH}",
                    "--data.labelled=false", f"--model.network.channels={CHANNELS}",
                    f"--model.network.head_channels={2 * CHANNELS // torchcfm_unet.HEADS}",
                    f"--model.network.dropout={DROPOUT}", f"--run_dir={run}", f"--trainer.max_steps={steps}",
                    "--trainer.log_every_n_steps=5",
                ]
            )  # fmt: skip
        if status:
            raise RuntimeError(shown.getvalue())
        done = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    width = len(done["state_dict"]["network.input.bias"])
    require_equal_work(
        {"steps": done["global_step"], "width": width}, {"steps": steps, "width": CHANNELS}
    )
    return timed.seconds


def of_steps(dropout: float, repeats: int) -> dict[str, Any]:
    with seeded(Key(0)):
        ours, theirs = our_step(dropout), their_step(dropout)
        for _ in range(2):  # the warm-up
            ours(), theirs()
        pairs = by_turns(ours, theirs, repeats)
    per_s = sorted(1 / a for a, _ in pairs)[len(pairs) // 2]
    return row(
        f"U-Net step, dropout {dropout:g}", "TorchCFM's U-Net", pairs, at_least=1.0, ours_steps_per_s=per_s
    )  # fmt: skip


def of_the_command(steps: int, repeats: int) -> dict[str, Any]:
    """The command against the bare loop with the same average and clipping."""
    with seeded(Key(0)):
        step = their_step(DROPOUT, clip=True)

    def loop() -> float:
        begin = time.perf_counter()
        with seeded(Key(1)):
            for _ in range(steps):
                step()
        return time.perf_counter() - begin

    the_command(steps), loop()
    pairs = alternated(lambda: the_command(steps), loop, repeats)
    return row("fit, U-Net", "TorchCFM's U-Net, bare loop", pairs, at_least=1.0, steps=steps)


def of_memory(repeats: int, threads: int) -> dict[str, Any]:
    """Each in a process of its own, which takes and gives back memory as it does by itself."""
    pairs = alternated(lambda: peak("ours", threads), lambda: peak("theirs", threads), repeats)
    return row("U-Net step", "TorchCFM's U-Net", pairs, quantity="memory", at_most=1.0)


def peak(side: Side, threads: int) -> float:
    """Megabytes that training adds to a process of its own."""
    command = [sys.executable, __file__, f"--memory={side}", f"--threads={threads}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(side: Side) -> None:
    with seeded(Key(0)):
        before = memory("VmRSS")
        step = (our_step if side == "ours" else their_step)(DROPOUT)
        for _ in range(MEMORY_STEPS):
            step()
    print(memory("VmHWM") - before)


def memory(kind: Literal["VmRSS", "VmHWM"]) -> float:
    """Megabytes this process holds, or has held at most; the peak of getrusage would be the parent's."""
    words = STATUS.read_text().split()
    return int(words[words.index(f"{kind}:") + 1]) / 1e3


def require_same_network() -> dict[str, float]:
    """What both do in a call; that they are the same function is tried at full width."""
    for dropout in (0.0, DROPOUT):
        with torch.device("meta"):
            sides = [make(CHANNELS, dropout) for make in (torchcfm_unet.ours, torchcfm_unet.theirs)]
        mine, its = (torchcfm_unet.work(net) for net in sides)
        require_equal_work(mine, its)
    with seeded(Key(0)):
        x, t = (
            torch.randn(1, *torchcfm_unet.SHAPE, generator=Key(1).generator()),
            torch.tensor([0.4]),
        )
        apart = torchcfm_unet.difference(x, t)
    if not apart < 1e-5:  # float32 through forty layers
        raise ValueError(f"with the same weights the two networks differ by {apart:g}")
    return {**mine, "difference": apart}


def flags() -> argparse.Namespace:
    found = parser(__doc__ or "", repeats=15)
    found.add_argument("--fit_steps", type=int, default=16, help="steps of a run of the command")
    found.add_argument("--long_repeats", type=int, default=7, help="pairs of runs and of processes")
    found.add_argument("--memory", choices=("ours", "theirs"), help="of one side, in this process")
    return found.parse_args()


def main() -> None:
    chosen = flags()
    if chosen.memory:
        torch.set_num_threads(chosen.threads)
        return measure_memory(chosen.memory)
    begin(chosen)
    done = require_same_network()
    rows = [
        *(of_steps(dropout, chosen.repeats) for dropout in (0.0, DROPOUT)),
        of_the_command(chosen.fit_steps, chosen.long_repeats),
        *([of_memory(chosen.long_repeats, chosen.threads)] if STATUS.exists() else []),
    ]
    report({"rows": rows, "work": done, "channels": CHANNELS, "batch": BATCH}, chosen)


if __name__ == "__main__":
    main()

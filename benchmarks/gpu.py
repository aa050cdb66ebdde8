"""The U-Net of CIFAR-10, 36M parameters, on a GPU: training, sampling, what surrounds a step, and optimal transport.

    make bench-gpu
    .venv/bin/python benchmarks/gpu.py --tiny --out tiny.json     the same code, small, on any machine

- Training: images a second and peak memory of forward, backward, fused Adam and the average of the weights, at batch
  128 in float32, TF32, bfloat16 and bfloat16 compiled.
- Sampling: images a second by midpoint with 10 steps, which is 20 evaluations.
- What surrounds a step: the share of the command's time that is not forward, backward and optimiser, by timing
  `fmlightning fit` and those three alone, on batches already made, by turns.
- Optimal transport: the command with MinibatchOT against the command without.

Pictures are the photographs that come with scikit-learn; nothing is downloaded.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from machine import facts
from ratios import row
from timing import alternated, report
from torch import nn

from fmlightning.__main__ import main as fmlightning
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.models import NetworkField
from fmlightning.flow.objectives.cfm import mean_cfm_loss
from fmlightning.flow.paths.schedules import Linear
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.nets.unet import UNet

RESULTS = Path(__file__).parent / "results"
CONFIG = "configs/papers/cifar10_unet_torchcfm.yaml"
COMMAND = (
    "fit", f"--config={CONFIG}", "--data=PhotosData", "--data.labelled=false", "--model.scheduler=null",
    "--trainer.gradient_clip_val=null", "--wandb.mode=disabled", "--samples.at_end=false",
    "--trajectories.at_end=false", "--evaluation.metrics=[]", "--trainer.devices=1", "--trainer.limit_val_batches=0",
)  # fmt: skip
DECAY, MIDPOINT_STEPS = 0.9999, 10


@dataclass(frozen=True)
class Size:
    """How large, and how long."""

    channels: int = 128
    batch: int = 128
    images: int = 512
    steps: int = 40
    repeats: int = 7


TINY = Size(channels=8, batch=8, images=4, steps=2, repeats=2)


@dataclass(frozen=True)
class Case:
    """A precision, and whether the network is compiled."""

    bf16: bool = False
    tf32: bool = False
    compiled: bool = False

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        # for the rest of the process: the command that is compared takes them too, and the next case sets its own
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            yield


CASES = {
    "float32": Case(),
    "TF32": Case(tf32=True),
    "bfloat16": Case(bf16=True),
    "bfloat16, compiled": Case(bf16=True, tf32=True, compiled=True),
}


@dataclass
class Scorer:
    """What all measurements share."""

    device: torch.device
    size: Size

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of a call that is over when the device is done."""
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def network(self, compiled: bool = False) -> nn.Module:
        c = self.size.channels
        with seeded(Key(0)):
            net = UNet(
                3, c, (1, 2, 2, 2), 2, (1,), c // 2, dropout=0.1, scale_shift=False, frequencies=(1.1548e-4, 1.0)
            ).to(self.device)  # fmt: skip
        if compiled:
            net.compile()
        return net

    # -- the parts of a step ----------------------------------------------------------------------

    def step(self, net: nn.Module, averaged: bool = True) -> Callable[[], None]:
        """Forward, backward and optimiser on a batch that is there, and the average of the weights."""
        n, generator = self.size.batch, Key(0).generator()
        x0, x1 = torch.randn(2, n, 3, 32, 32, generator=generator).to(self.device)
        point = Linear().sample(x0, x1, torch.rand(n, generator=generator).to(self.device))
        streams = Key(1).streams(torch.arange(n, device=self.device))
        optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=True)
        weights = [p.detach() for p in net.parameters()]
        average = [w.clone() for w in weights]

        def step() -> None:
            optimizer.zero_grad()
            mean_cfm_loss(net, Linear(), point, streams=streams).backward()
            optimizer.step()
            if averaged:
                torch._foreach_lerp_(average, weights, 1 - DECAY)

        return step

    def training(self, case: Case) -> dict[str, float]:
        """Images a second and gigabytes."""
        with case(self.device):
            step = self.step(self.network(case.compiled).train())
            for _ in range(3):
                step()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [
                self.seconds(lambda: [step() for _ in range(self.size.steps // 2)])
                for _ in range(self.size.repeats)
            ]
        per_step = statistics.median(times) / (self.size.steps // 2)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        return {
            "images_per_s": self.size.batch / per_step,
            "ms_per_step": 1e3 * per_step,
            "peak_GB": peak,
        }

    def sampling(self, case: Case) -> dict[str, float]:
        """Images a second."""
        generator, n = Key(2).generator(), self.size.images
        with case(self.device), torch.no_grad():
            field = NetworkField(self.network(case.compiled).eval(), Linear())
            x = torch.randn(n, 3, 32, 32, generator=generator).to(self.device)
            run = lambda: ODESolver("midpoint", MIDPOINT_STEPS).solve(field, x)  # noqa: E731
            run()
            times = [self.seconds(run) for _ in range(self.size.repeats)]
        return {"images_per_s": n / statistics.median(times)}

    # -- the command ------------------------------------------------------------------------------

    def fit(self, *options: str) -> float:
        """Seconds of a step of the command, from differences of two lengths: what happens once cancels."""
        short, long = self.size.steps, 3 * self.size.steps
        return (self.trained(long, *options) - self.trained(short, *options)) / (long - short)

    def trained(self, steps: int, *options: str) -> float:
        """Seconds inside Lightning's fit loop."""
        bench, loop, took = self, _FitLoop.run, 0.0

        def run(self: _FitLoop) -> None:
            nonlocal took
            took = bench.seconds(lambda: loop(self))

        _FitLoop.run = run  # type: ignore[method-assign]
        shown = io.StringIO()
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(shown):
                accelerator = "gpu" if self.device.type == "cuda" else "cpu"
                status = fmlightning(
                    [
                        *COMMAND, f"--trainer.accelerator={accelerator}", f"--trainer.max_steps={steps}",
                        f"--model.network.channels={self.size.channels}", f"--data.batch_size={self.size.batch}",
                        f"--model.network.head_channels={self.size.channels // 2}", f"--run_dir={folder}/run", *options,
                    ]
                )  # fmt: skip
        finally:
            _FitLoop.run = loop  # type: ignore[method-assign]
        if status:
            raise RuntimeError(shown.getvalue())
        return took

    def surrounding(self, case: Case, option: str) -> dict[str, Any]:
        """The command against its three parts alone."""
        with case(self.device):
            step = self.step(self.network().train(), averaged=False)
            for _ in range(3):
                step()

        def alone() -> float:
            with case(self.device):
                steps = self.size.steps
                return self.seconds(lambda: [step() for _ in range(steps)]) / steps

        pairs = alternated(lambda: self.fit(option), alone, self.size.repeats)
        shares = [1 - b / a for a, b in pairs]
        return row(
            f"fit, {option.rpartition('=')[2]}", "forward, backward, optimiser", pairs, at_least=0.95,
            share_outside=statistics.median(shares),
        )  # fmt: skip

    def transport(self, option: str) -> dict[str, Any]:
        pairs = alternated(
            lambda: self.fit(option, "--model.coupling=MinibatchOT"),
            lambda: self.fit(option),
            self.size.repeats,
        )
        return row(
            f"fit, OT-CFM, {option.rpartition('=')[2]}",
            "independent coupling",
            pairs,
            at_least=0.95,
        )


def measured(bench: Scorer, cases: dict[str, Case]) -> dict[str, Any]:
    """All of it."""
    training = {name: bench.training(case) for name, case in cases.items()}
    sampling = {name: bench.sampling(case) for name, case in cases.items()}
    bf16 = "--trainer.precision=bf16-mixed"
    rows = [
        bench.surrounding(Case(), "--trainer.precision=32-true"),
        bench.surrounding(Case(bf16=True), bf16),
        bench.transport(bf16),
    ]
    return {"rows": rows, "training": training, "sampling": sampling}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':20}{'training':>12}{'':>12}{'peak':>10}{'sampling':>12}"]
    for name, training in result["training"].items():
        lines.append(
            f"{name:20}{training['images_per_s']:8.0f} im/s{training['ms_per_step']:9.1f} ms"
            f"{training['peak_GB']:7.2f} GB{result['sampling'][name]['images_per_s']:7.0f} im/s"
        )
    return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--tiny", action="store_true", help="a small network, on the CPU if there is no GPU"
    )
    flags.add_argument(
        "--out", type=Path, help="a JSON file; by default results/ and the card's name"
    )
    chosen = flags.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not chosen.tiny:
        print(
            "bench-gpu: torch finds no GPU here; run it on a machine with one, or try --tiny",
            file=sys.stderr,
        )
        return 1
    size = TINY if chosen.tiny else Size()
    bench = Scorer(torch.device("cuda" if cuda else "cpu"), size)
    # compiling takes minutes on a CPU, and half precision is emulated there
    result = measured(bench, CASES if cuda else {"float32": Case()})
    print(table(result))
    if chosen.out is None and not chosen.tiny:
        card = str(facts()["card"]).lower().replace(" ", "_")
        chosen.out = RESULTS / f"gpu_{card}.json"
    chosen.threads, chosen.repeats = torch.get_num_threads(), size.repeats
    report({**result, "batch": size.batch, "channels": size.channels}, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training with optimal transport: against TorchCFM's tutorial, and against training without it.

    benchmarks/.venv/bin/python benchmarks/ot_cfm.py --out ot_cfm.json

In the plane, 8 Gaussians to two moons at batch 256, ours is the real command with all that it does beside training.
The other side is the loop of TorchCFM's tutorial: its samplers, its exact coupling, its path with noise of 0.1 and
Adam, on our network, so that the arithmetic of a step is the same. A second line gives it our samplers, since its own
take as long as everything else. Images are patches of 3 x 32 x 32 at batch 128; there both sides are ours, with
optimal transport and with the independent coupling, and what is measured is whether pairing ahead costs anything.

Equal work is asserted: steps, and in the plane final losses within the spread of seeds. Where images are trained
under two couplings the losses differ by design.
"""

import contextlib
import csv
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loop import COMMON, Timed
from ratios import require_equal_losses, require_equal_work, row
from timing import begin, parser, report, turn
from torch import Tensor

from fmlightning.__main__ import main as fmlightning
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.flow.toys import EightGaussians, Moons
from fmlightning.nets.mlp import TimeMLP

BATCH, LOG_EVERY = 256, 20
POINTS = (
    "--config=configs/toy/moons.yaml", f"--data.batch_size={BATCH}", "--model.path=IndependentCFM",
    "--model.path.noise_std=0.1", "--model.optimizer={class_path: Adam, init_args: {lr: 0.001, fused: true}}",
    "--model.scheduler=null", "--model.coupling=MinibatchOT", f"--trainer.log_every_n_steps={LOG_EVERY}",
)  # fmt: skip
IMAGES = (
    "--config=configs/images/photos.yaml", "--data.batch_size=128", "--data.labelled=false",
    "--model.network.num_classes=0", "--trainer.log_every_n_steps=4",
)  # fmt: skip


@dataclass
class Training:
    """Seconds of a training, how many steps it took, and the mean of its last losses."""

    seconds: float
    steps: int
    loss: float


def ours(steps: int, seed: int, *options: str) -> Training:
    """The command, in this process; starting up is left out."""
    common = [o for o in COMMON if not o.startswith("--model.scheduler")]
    with tempfile.TemporaryDirectory() as folder, Timed(time.perf_counter) as timed:
        run, shown = Path(folder) / "run", io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            status = fmlightning(
                [
                    "fit", *options, *common, f"--run_dir={run}", f"--seed_everything={seed}",
                    f"--trainer.max_steps={steps}",
                ]
            )  # fmt: skip
        if status:
            raise RuntimeError(shown.getvalue())
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        with (run / "metrics.csv").open() as file:
            losses = [float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]]
    return Training(timed.seconds, last["global_step"], statistics.mean(losses[-5:]))


def tutorial(steps: int, seed: int, own_samplers: bool) -> Training:
    """The loop of TorchCFM's tutorial."""
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.utils import sample_8gaussians, sample_moons

    generator = Key(seed).fold("tutorial").generator()

    def drawn() -> tuple[Tensor, Tensor]:
        if own_samplers:
            return sample_8gaussians(BATCH), sample_moons(BATCH)
        shape = (BATCH, 2)
        return EightGaussians().sample(shape, generator), Moons().sample(shape, generator)

    with seeded(Key(seed).fold("weights")):
        model = TimeMLP(dim=2, width=64, depth=4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
        losses = []
        gc.collect()
        begin = time.perf_counter()
        for n in range(steps):
            optimizer.zero_grad()
            t, xt, ut = matcher.sample_location_and_conditional_flow(*drawn())
            loss = torch.mean((model(xt, t) - ut) ** 2)
            loss.backward()
            optimizer.step()
            if (n + 1) % LOG_EVERY == 0:
                losses.append(loss.item())
        return Training(time.perf_counter() - begin, steps, statistics.mean(losses[-5:]))


def by_turns(
    mine: Callable[[int], Training], its: Callable[[int], Training], repeats: int
) -> list[tuple[Training, Training]]:
    """Pairs with the same seed, next to each other in time; the first pair is the warm-up."""
    pairs = []
    for seed in range(repeats + 1):
        first, second = turn(seed, partial(mine, seed), partial(its, seed))
        require_equal_work({"steps": first.steps}, {"steps": second.steps})
        pairs.append((first, second))
    return pairs[1:]


def line(
    name: str, peer: str, pairs: list[tuple[Training, Training]], at_least: float | None = None
) -> dict[str, Any]:
    a, b = zip(*pairs, strict=True)
    return row(
        name, peer, [(x.seconds, y.seconds) for x, y in pairs], at_least=at_least,
        ours_steps_per_s=statistics.median(x.steps / x.seconds for x in a),
        theirs_steps_per_s=statistics.median(y.steps / y.seconds for y in b),
        ours_loss=[x.loss for x in a], theirs_loss=[y.loss for y in b],
    )  # fmt: skip


def of_points(steps: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for own, peer, bar in (
        (True, "TorchCFM's tutorial", 2.5),
        (False, "TorchCFM, our samplers", None),
    ):
        pairs = by_turns(
            lambda seed: ours(steps, seed, *POINTS),
            lambda seed, own=own: tutorial(steps, seed, own),  # type: ignore[misc]
            repeats,
        )
        require_equal_losses([a.loss for a, _ in pairs], [b.loss for _, b in pairs])
        rows.append(line("OT-CFM, points", peer, pairs, bar))
    return rows


def of_images(steps: int, repeats: int) -> list[dict[str, Any]]:
    def with_coupling(name: str) -> Callable[[int], Training]:
        return lambda seed: ours(steps, seed, *IMAGES, f"--model.coupling={name}")

    pairs = by_turns(with_coupling("MinibatchOT"), with_coupling("Independent"), repeats)
    return [line("OT-CFM, images", "independent coupling", pairs, 0.95)]


def main() -> None:
    flags = parser(__doc__ or "", repeats=15)
    flags.add_argument("--steps", type=int, default=400, help="steps of a run in the plane")
    flags.add_argument("--image_steps", type=int, default=8, help="steps of a run on images")
    flags.add_argument(
        "--image_repeats", type=int, default=7, help="pairs of images, which take longer"
    )
    flags.add_argument("--cases", nargs="+", choices=("points", "images"), default=["points", "images"])  # fmt: skip
    chosen = flags.parse_args()
    begin(chosen)
    rows = []
    if "points" in chosen.cases:
        rows += of_points(chosen.steps, chosen.repeats)
    if "images" in chosen.cases:
        rows += of_images(chosen.image_steps, chosen.image_repeats)
    report({"rows": rows}, chosen)


if __name__ == "__main__":
    main()

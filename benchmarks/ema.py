"""Microseconds of averaging the weights after a step: as a share of the step, and against other averages.

    python benchmarks/ema.py --out ema.json

Ours is the callback as a run calls it, with one decay, and with two decays and two power-function averages at once. The
others are the formulas of TorchCFM's examples and of Lightning's EMAWeightAveraging, without the callbacks around them.
All start from the same weights, take the same updates, and have to agree to 1e-6. A step is forward, backward and fused
AdamW of one batch; of the U-Net a batch of 8, where its papers train with 128, and the larger the smaller the share.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from ratios import row
from timing import begin, by_turns, parser, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.mlp import TimeMLP
from fmlightning.nets.unet import UNet
from fmlightning.training.ema.callback import EMA

DECAY, ATOL = 0.999, 1e-6

Update = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A network, its batch, and how many updates are timed together."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    calls: int
    steps: int


def unet() -> UNet:
    """The network of TorchCFM's CIFAR-10 example, 36 million weights."""
    return UNet(
        in_channels=3, channels=128, channel_mult=(1, 2, 2, 2), num_blocks=2, attention_levels=(1,), head_channels=64
    )  # fmt: skip


CASES = {
    "MLP 4x64": Case(lambda: TimeMLP(dim=2, width=64, depth=4), (256, 2), 200, 20),
    "U-Net 36M": Case(unet, (8, 3, 32, 32), 2, 1),
}


def ours(net: nn.Module, **options: Any) -> tuple[EMA, Update]:
    """The callback, and a call of its hook after a step."""
    ema, trainer = EMA(warmup=False, **options), SimpleNamespace(callbacks=[], global_step=0)
    module: Any = SimpleNamespace(network=net)
    ema.on_fit_start(trainer, module)  # type: ignore[arg-type]
    ema.step = 0

    def update() -> None:
        trainer.global_step += 1
        ema.on_train_batch_end(trainer)  # type: ignore[arg-type]

    return ema, update


def torchcfm(net: nn.Module) -> tuple[nn.Module, Update]:
    """The formula of TorchCFM's examples."""
    target = copy.deepcopy(net)

    def update() -> None:
        source, average = net.state_dict(), target.state_dict()
        for key in source:
            average[key].data.copy_(average[key].data * DECAY + source[key].data * (1 - DECAY))

    return target, update


def lightnings(net: nn.Module) -> tuple[nn.Module, Update]:
    """The formula of Lightning's EMAWeightAveraging."""
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True)
    average.update_parameters(net)  # the first one copies
    return average.module, lambda: average.update_parameters(net)


def stepper(net: nn.Module, shape: tuple[int, ...]) -> Update:
    generator = Key(0).generator()
    x, target = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.rand(shape[0], generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(net(x, t), target).backward()
        optimizer.step()

    return step


def times(call: Update, count: int) -> Update:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def require_equal(net: nn.Module, mine: EMA, mine_update: Update, peers: dict[str, Any]) -> None:
    """Three updates of everyone towards other weights.

    Raises:
        ValueError: the averages differ.
    """
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=Key(1).generator()))
    for update in (mine_update, *(u for _, u in peers.values())):
        times(update, 3)()
    for name, (average, _) in peers.items():
        found: dict[str, Tensor] = dict(average.named_parameters())
        apart = max(float((v - found[k].detach()).abs().max()) for k, v in mine.shadow.items())
        if apart > ATOL:
            raise ValueError(f"our average and that of {name} differ by {apart:g}")


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of one network."""
    case = CASES[name]
    with seeded(Key(0)):
        net = case.make()
    ema, update = ours(net, decay=DECAY)
    _, four = ours(net, decay=[DECAY, 0.9999], sigma_rel=[0.05, 0.10])
    peers = {"TorchCFM's formula": torchcfm(net), "Lightning's formula": lightnings(net)}
    require_equal(net, ema, update, peers)
    rows = []
    repeats = repeats if case.steps > 1 else min(repeats, 7)  # a step of the U-Net takes seconds
    step = times(stepper(net, case.shape), case.steps)
    step()
    for what, call in (("one average", update), ("four averages", four)):
        pairs = by_turns(times(call, case.calls), step, repeats)
        each = [(a / case.calls, b / case.steps) for a, b in pairs]
        limit = 0.02 if what == "one average" else None
        rows.append(row(f"{what}, {name}", "a step", each, quantity="time", at_most=limit))
    for peer, (_, theirs) in peers.items():
        pairs = by_turns(times(update, case.calls), times(theirs, case.calls), repeats)
        rows.append(
            row(f"average, {name}", peer, [(a / case.calls, b / case.calls) for a, b in pairs])
        )
    return rows


def main() -> None:
    flags = parser(__doc__ or "", repeats=15)
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = flags.parse_args()
    begin(chosen)
    report({"rows": [r for name in chosen.cases for r in measure(name, chosen.repeats)]}, chosen)


if __name__ == "__main__":
    main()

r"""Size of a network: its parameters, and the multiply-adds of one call for one sample.

Of the operations, the products of matrices are counted: linear layers, convolutions and attention. A multiply-add
is one operation, as in the papers on these networks, which write "FLOPs" for it; counts of hardware have two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fmlightning.nets.adapter import Adapter


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def multiply_adds(
    network: nn.Module, event_shape: Sequence[int], labels: bool = False
) -> int | None:
    """The multiply-adds of `network(x, t)` for one sample x; None where it cannot be called without computing.

    Nothing is computed: the call is on tensors that have a shape and no numbers.

    Args:
        event_shape: the shape of x.
        labels: whether to give it a label.
    """
    state = {
        n: v.detach().to("meta") for n, v in (*network.named_parameters(), *network.named_buffers())
    }
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    with torch.device("meta"):
        x, t = torch.empty(1, *event_shape, dtype=dtype), torch.empty(1)
        y = (torch.zeros(1, dtype=torch.long),) if labels else ()
    training = network.training
    network.eval()  # dropout would ask for keys
    try:
        return counted(network, state, (x, t, *y))
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        network.train(training)


def counted(network: nn.Module, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        functional_call(network, state, inputs)
    return int(counter.get_total_flops()) // 2


def describe(network: nn.Module, event_shape: Sequence[int], labels: bool = False) -> str:
    """The size of a network in words."""
    inner = network.network if isinstance(network, Adapter) else network
    words = f"{type(inner).__name__}: {short(parameter_count(network))} parameters"
    work = multiply_adds(network, event_shape, labels)
    return words if work is None else f"{words}, {short(work)} FLOPs a sample (multiply-adds)"


def short(n: int | float) -> str:
    """Three digits and a letter: 35700000 is 35.7M."""
    thousands = 0
    while n >= 999.5:
        n, thousands = n / 1000, thousands + 1
    return f"{n:.3g}{('', 'k', 'M', 'G', 'T', 'P')[thousands]}"

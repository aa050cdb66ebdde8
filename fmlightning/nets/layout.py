"""How the weights of a network lie in memory."""

import torch
from torch import nn


def put_channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out with their channels last; the layers then give such images.

    Raises:
        ValueError: there is no convolution.
    """
    if not any(p.ndim == 4 for p in network.parameters()):
        raise ValueError(
            f"model.channels_last=true: {type(network).__name__} has no convolution of images; set it to false"
        )
    network.to(memory_format=torch.channels_last)

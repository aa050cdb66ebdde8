"""`--init_from RUN`: training that starts from the weights of another run, and from nothing else of it.

The optimiser, the average and the step are new. The result, and so the config hash, depends on the weights and not on
their place: their digest is written into the config and compared with them when it is run again.
"""

import hashlib

import torch
from torch import Tensor, nn

from fmlightning.runs.checkpoint import layout_differences
from fmlightning.runs.weights import read_weights

Weights = dict[str, Tensor]
SECOND_TIME = "duration."


def starting_weights(run: str, ema: bool, digest: str | None) -> tuple[Weights, str]:
    """The weights of a run, and their digest.

    Args:
        run: a run directory, a checkpoint in one, or an export.
        ema: whether to take the averaged weights rather than the raw ones.
        digest: the digest that they must have; None accepts any.

    Raises:
        FileNotFoundError: there is no such run, or no checkpoint in it.
        ValueError: the run has no averaged weights, or its weights are not those of the digest.
    """
    weights, _ = read_weights(run, ema)
    found = weights_digest(weights)
    if digest not in (None, found):
        raise ValueError(
            f"init_from={run}: its weights are not those of init_digest={digest}, but {found}; name the run as it was, "
            "or leave init_digest out for a new run"
        )
    return weights, found


def weights_digest(weights: Weights) -> str:
    """A digest of names, shapes and values."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        total.update(repr((name, value.dtype, tuple(value.shape))).encode())
        total.update(
            value.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().data
        )
    return total.hexdigest()


def start_from(network: nn.Module, weights: Weights, run: str) -> None:
    """Give a network the weights of another run.

    Raises:
        ValueError: that run's network is another one.
    """
    own = network.state_dict()
    # a velocity knows no duration: the layers of a second time are new, and start at zero
    weights = {**{k: v for k, v in own.items() if k.startswith(SECOND_TIME)}, **weights}
    differences = layout_differences(own, weights)
    if differences:
        raise ValueError(
            f"init_from={run}: its network is not model.network: {'; '.join(differences)}. "
            "Give the model.network of that run, or leave init_from out"
        )
    network.load_state_dict(weights)

"""Initial weights as a function of a key.

Networks, our own and foreign ones, draw their weights from torch's global generator while they are built.
Building them inside `seeded` makes that draw a function of the key, and leaves the global state as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fmlightning.flow.keys import Key


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Torch's CPU generator at the start of a key's stream inside, as it was found outside.

        with seeded(Key(seed).fold("weights")):
            network = UNet(channels=32)

    Weights drawn on another device, by numpy or by Python's `random` are not covered.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that reseeds the accelerators too, which are not restored
        torch.default_generator.manual_seed(key.seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: a sum over several depends on how many, and training makes the difference large."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

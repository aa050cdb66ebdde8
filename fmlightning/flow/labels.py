"""The labels that samples are generated for.

    reference    as frequent as in the reference data: the first N samples, N the size of the reference, take its
                 labels in a keyed order, the next N in another
    balanced     each class in turn, all equally frequent

A distance to the reference counts a class that is too frequent as an error of the model, so scores take the first.
Label k is a function of k and of the class counts alone, whatever the batch or the number of processes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch

from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels

LabelOrder = Literal["reference", "balanced"]


def balanced_labels(index: Labels, num_classes: int) -> Labels:
    """The labels of sample numbers, each class in turn, (B,)."""
    return index % num_classes


def reference_labels(index: Labels, counts: Sequence[int]) -> Labels:
    """The labels of sample numbers, as frequent as in the reference, (B,).

    Args:
        index: sample numbers, (B,).
        counts: samples of the reference in each class.
    """
    size, numbers = sum(counts), index.cpu()
    y = torch.empty_like(numbers)
    for block in (numbers // size).unique().tolist():
        mine = numbers // size == block
        y[mine] = permuted_labels(tuple(counts), block)[numbers[mine] % size]
    return y.to(index.device)


@lru_cache(maxsize=2)  # of a million samples it takes as long as a batch
def permuted_labels(counts: tuple[int, ...], block: int) -> Labels:
    """All labels of the reference in a keyed order, one for each block of as many samples.

    A class of n stands once in each n-th of the block, at a random place in it: whatever part of a block is taken,
    its classes are as frequent as in the whole, up to about one sample. A plain permutation would add the noise of
    random class counts to every score.
    """
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rank = torch.cat([torch.arange(n) for n in counts])
    generator = Key(0).fold("labels", block).generator()
    place = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    return labels[((rank + place) / torch.tensor(counts)[labels]).argsort(stable=True)]

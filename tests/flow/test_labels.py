"""Labels of samples: as frequent as in the reference, whatever the batch."""

import pytest
import torch

from fmlightning.flow.labels import reference_labels

COUNTS = (113, 17, 0, 5)


@pytest.mark.parametrize("block", [0, 1, 7])
def test_each_block_of_the_reference_size_has_its_counts(block):
    size = sum(COUNTS)
    y = reference_labels(torch.arange(size) + block * size, COUNTS)
    assert torch.bincount(y, minlength=4).tolist() == list(COUNTS)
    other = reference_labels(torch.arange(size) + (block + 1) * size, COUNTS)
    assert not torch.equal(y, other)


def test_a_label_is_a_function_of_its_number():
    index = torch.arange(500)
    whole = reference_labels(index, COUNTS)
    assert torch.equal(whole, torch.cat([reference_labels(i, COUNTS) for i in index.split(7)]))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole[order], reference_labels(order, COUNTS))
    assert reference_labels(index[:0], COUNTS).tolist() == []


def test_each_part_of_a_block_has_the_shares_of_the_whole():
    """A class stands once in each n-th of the block; the places of the others move a cut by about one more."""
    size, share = sum(COUNTS), torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    y = reference_labels(torch.arange(size), COUNTS)
    for n in range(1, size):
        found = torch.bincount(y[:n], minlength=4)
        assert (found - n * share).abs().max() < 2.5

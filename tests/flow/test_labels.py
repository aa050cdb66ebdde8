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


def test_few_labels_are_a_fair_draw():
    """Of the first n without replacement: a share within 4 standard deviations, and no class runs ahead."""
    share = 113 / sum(COUNTS)
    for n in (20, 50, 100):
        found = float((reference_labels(torch.arange(n), COUNTS) == 0).double().mean())
        assert abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5

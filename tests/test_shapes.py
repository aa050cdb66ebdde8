"""The check of shapes that all tests of the flow rest on."""

import pytest
import shapes
import torch
from jaxtyping import TypeCheckError

from fmlightning.flow import Linear


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match="t"):
        Linear().sample(torch.zeros(3, 2), torch.ones(3, 2), torch.full((4,), 0.5))


def test_the_calls_of_a_long_test_go_free_and_the_next_test_is_checked():
    path, x = Linear(), torch.zeros(3, 2)
    for _ in range(shapes.CHECKS):
        path.sample(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"t \(4,\)"):  # the path's own words
        path.sample(x, x, torch.zeros(4))
    shapes.start()
    with pytest.raises(TypeCheckError):
        path.sample(x, x, torch.zeros(4))

"""What is kept in the cache is read back whole or made again, and a full disk ends nothing."""

import errno
import random
import warnings

import pytest
import torch

from fmlightning.runs import cache

CPU = torch.device("cpu")


def test_no_flipped_bit_is_read_as_another_number(tmp_path):
    path, kept = (
        tmp_path / "statistics.pt",
        {"mean": torch.arange(64.0), "covariance": torch.eye(64)},
    )
    cache.write(path, kept)
    found = cache.read(path)
    assert all(torch.equal(found[k], v) for k, v in kept.items())
    whole, places = path.read_bytes(), random.Random(0)
    for _ in range(200):
        place, bit = places.randrange(len(whole)), 1 << places.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.warns(UserWarning, match="made again"):
            assert cache.read(path) is None


@pytest.mark.parametrize("how", ["as the system says it", "as torch.save does"])
def test_a_full_disk_is_a_warning_and_the_tensors_are_there(monkeypatch, how):
    full = OSError(errno.ENOSPC, "No space left on device")

    def save(*args):
        if how == "as the system says it":
            raise full
        try:
            raise full
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch does

    monkeypatch.setattr(torch, "save", save)
    with pytest.warns(UserWarning, match="cannot be written"):
        found = cache.cached("x", lambda: {"a": torch.ones(3)}, CPU)
    assert torch.equal(found["a"], torch.ones(3))
    assert not list(cache.cache_folder().glob("*.pt"))


def test_another_error_of_torch_is_no_full_disk(monkeypatch):
    def save(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", save)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="something else"):
        cache.cached("x", lambda: {"a": torch.ones(3)}, CPU)

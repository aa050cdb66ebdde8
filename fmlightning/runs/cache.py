"""Tensors that are made once of a data set and a network, and kept in files.

A file is named by the fingerprint of the data and the digest of the network, written whole or not at all, and read
as tensors alone: no file can run code.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fmlightning.runs.checksum import append_checksum, require_intact
from fmlightning.runs.files import atomic_write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VARIABLE = "FMLIGHTNING_CACHE"

Tensors: TypeAlias = "dict[str, Tensor]"


def cache_folder() -> Path:
    """$FMLIGHTNING_CACHE, or ~/.cache/fmlightning."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/fmlightning").expanduser()


def cached(name: str | None, make: Callable[[], Tensors], device: "torch.device") -> Tensors:
    """Tensors from the file of this name, or made and kept there.

    Processes make together, as `make` may sum over them: all of them, unless each has found the file.

    Args:
        name: of the file; None keeps nothing.
        make: what makes the tensors.
        device: where the tensors come to lie, and by which processes agree.
    """
    path = None if name is None else cache_folder() / f"{name}.pt"
    found = None if path is None else read(path)
    if not everywhere(found is not None, device):
        made = make()
        if path is not None and found is None:
            write(path, made)
        found = made
    assert found is not None
    return {key: value.to(device) for key, value in found.items()}


def everywhere(here: bool, device: "torch.device") -> bool:
    """True where something holds on every process."""
    import torch

    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return here
    agreed = torch.tensor(int(here), device=device)
    distributed.all_reduce(agreed, distributed.ReduceOp.MIN)
    return bool(agreed)


def read(path: Path) -> "Tensors | None":
    """The tensors of a file, or None where there is none that can be read."""
    import torch

    if not path.exists():
        return None
    try:
        require_intact(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises one of many for a corrupt file
        warnings.warn(f"{path} cannot be read and is made again: {error}", stacklevel=1)
        return None


def write(path: Path, tensors: Tensors) -> None:
    """Keep tensors, whole or not at all; where that cannot be, say so and go on."""
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save({key: value.cpu() for key, value in tensors.items()}, file)
            append_checksum(file, 0)
    except (OSError, RuntimeError) as error:
        # torch.save turns an error of the disk into a RuntimeError of its own
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
            raise
        warnings.warn(
            f"{path} cannot be written, so it will be made again: {error}; ${VARIABLE} names another folder",
            stacklevel=1,
        )

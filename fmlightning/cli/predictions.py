"""The samples of `fmlightning predict`, as a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from fmlightning.runs.files import atomic_write

Batch = dict[str, torch.Tensor]


def save_predictions(batches: list[Batch], folder: Path) -> None:
    """Write the samples of all processes, in the order of their numbers, into one file of a run."""
    mine = [{name: x.cpu() for name, x in batch.items()} for batch in batches]
    every = [batch for part in of_all_processes(mine) for batch in part]
    if not every or (distributed.is_initialized() and distributed.get_rank()):
        return
    order = torch.cat([batch["index"] for batch in every]).argsort()
    arrays: dict[str, Any] = {
        name: torch.cat([batch[name] for batch in every])[order].numpy() for name in every[0]
    }
    path = folder / "samples" / "predictions.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **arrays)
    print(f"{len(arrays['x'])} samples: {path}")


def of_all_processes(mine: Any) -> list[Any]:
    """An object of each process, by rank."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    parts = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    return parts

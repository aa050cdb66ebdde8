"""Reading a checkpoint, and holding its weights against a network."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from fmlightning.runs.checksum import verify_checksum

if TYPE_CHECKING:
    from torch import Tensor, nn


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint on the CPU: first its checksum, then its tensors and numbers; never code.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    import torch

    path = Path(path)
    with path.open("rb") as file:
        verify_checksum(file, path)
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:  # whose advice would run what is in the file
            raise ValueError(
                f"{path} holds more than tensors and numbers, and is not read: code in it would run"
            ) from error
    for part in ("state_dict", "flow"):
        if part not in checkpoint:
            raise ValueError(f"{path} is no checkpoint of this version: it has no {part!r}")
    return checkpoint


def require_same_layout(module: "nn.Module", checkpoint: Mapping[str, Any]) -> None:
    """Refuse the weights of another network, and name the keys.

    Raises:
        ValueError: keys are missing, unexpected, or of another shape.
    """
    differences = layout_differences(module.state_dict(), checkpoint["state_dict"])
    if differences:
        raise ValueError(
            f"the checkpoint is of another network than model.network: {'; '.join(differences)}. "
            "Give the config it was trained with, or start a new run"
        )


def layout_differences(here: Mapping[str, "Tensor"], there: Mapping[str, "Tensor"]) -> list[str]:
    """The keys that a checkpoint has too few, too many, or in another shape."""
    shapes = [
        f"{k} {tuple(there[k].shape)} instead of {tuple(v.shape)}"
        for k, v in here.items()
        if k in there and there[k].shape != v.shape
    ]
    groups = {
        "missing in the file": [k for k in here if k not in there],
        "unexpected in the file": [k for k in there if k not in here],
        "of another shape": shapes,
    }
    return [f"{what}: {some(keys)}" for what, keys in groups.items() if keys]


def some(names: list[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")

"""The weights of a trained network, from a checkpoint or an export."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmlightning.runs.checkpoint import read_checkpoint
from fmlightning.runs.directory import Run

if TYPE_CHECKING:
    from torch import Tensor

EXPORTED = "model.safetensors"
"""The file of an exported network."""


def checkpoint_file(named: str | Path) -> Path:
    """The checkpoint that was named, or the newest of the run that was.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
    """
    run = Run.open(named)
    return Path(named) if Path(named).suffix == ".ckpt" else run.checkpoint()


def weights_file(named: str | Path) -> Path:
    """The file of the weights that were named: those of an export, or a checkpoint as in `checkpoint_file`."""
    exported = Path(named) / EXPORTED
    return exported if exported.is_file() else checkpoint_file(named)


def read_weights(run: str | Path, ema: bool = True) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The weights of a trained network, and of what they are; arguments and errors as in `load`.

    Returns:
        the weights by name, and a record: `ema`, whether they are averaged; `step`, after how many; `flow`, what its
        samples are.
    """
    file = weights_file(run)
    if file.name == EXPORTED:
        return read_export(file.parent, ema)
    checkpoint = read_checkpoint(file)
    weights = {k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()}
    record = {"ema": ema, "step": checkpoint["global_step"], "flow": checkpoint["flow"]}
    return weights | (average(checkpoint, file) if ema else {}), record


def average(checkpoint: dict[str, Any], file: Path) -> dict[str, "Tensor"]:
    """The averaged parameters in a checkpoint.

    Raises:
        ValueError: there are none.
    """
    state = checkpoint.get("callbacks", {}).get("EMA", {})
    if not state.get("updates"):
        raise ValueError(
            f"{file} holds no averaged weights (ema.decay was 0, or no step was taken); ask for the raw ones: "
            "ema=False, or --ema false on the command line"
        )
    return state["shadow"]


def read_header(text: str) -> dict[str, Any]:
    """The record in the header of an export; empty where another program wrote something else there."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def of_a_flow(record: dict[str, Any]) -> bool:
    """Whether a record says what the samples of its network are."""
    flow = record.get("flow")
    return (
        isinstance(flow, dict)
        and isinstance(flow.get("event_shape"), list)
        and "num_classes" in flow
        and ("num_bins" in flow or "levels" in flow)
    )


def read_export(folder: Path, ema: bool = True) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The weights of an exported network, and their record as in `read_weights`.

    Raises:
        ValueError: the file is damaged, or fmlightning did not write it; or raw weights are asked for and it has the
            average.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / EXPORTED
    try:
        with safe_open(path, framework="pt") as file:
            record = read_header((file.metadata() or {}).get("fmlightning", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not of_a_flow(record):
        raise ValueError(
            f"{path} was not written by `fmlightning export`: its header does not say what samples are; read it "
            "with safetensors.torch.load_file"
        )
    if record.get("ema") and not ema:
        raise ValueError(
            f"{path} holds averaged weights and no raw ones: leave out ema=False, which is --ema false or "
            "--init_ema false on the command line, or name the run that it was exported from"
        )
    return weights, record

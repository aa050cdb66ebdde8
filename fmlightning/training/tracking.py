"""Weights & Biases: a mirror of the run directory, offline unless there is an account."""

import netrc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

Mode = Literal["auto", "online", "offline", "disabled"]


@dataclass
class Tracking:
    """Where metrics and pictures are mirrored.

    Args:
        mode: online, offline or disabled; auto follows $WANDB_MODE, then is online where a key is found in the
            environment or in netrc, and offline otherwise.
        project: the W&B project.
        entity: the W&B user or team; null is the account's default.
        group: a name that runs of one comparison share; null is the experiment's name.
        tags: labels of the run.
    """

    mode: Mode = "auto"
    project: str = "fmlightning"
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None


def wandb_logger(
    tracking: Tracking, folder: Path, experiment: str, again: bool = False
) -> WandbLogger | None:
    """The logger of a run, whose id is that of its directory; None if disabled.

    Args:
        again: whether the run that is in the directory will be kept aside.
    """
    mode = resolve_mode(tracking.mode)
    if mode == "disabled":
        return None
    if mode == "offline":
        rank_zero_only(print)(
            f"W&B: no account, so offline in {folder}/wandb; to upload: wandb sync {folder}/wandb/offline-run-*"
        )
    import wandb

    # runs that were kept aside as <folder>.1, .2, ... have had the ids before this one
    kept = len(list(folder.parent.glob(f"{folder.name}.*"))) + (again and folder.exists())
    run_id = "-".join((*folder.parts[-2:], *([str(kept + 1)] if kept else [])))
    # `mode` goes to wandb.init: WandbLogger's own `offline` only sets a variable that wandb may ignore
    options: dict[str, Any] = {
        "mode": mode,
        "entity": tracking.entity,
        "group": tracking.group or experiment,
        "tags": tracking.tags,
        "resume": "allow",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    logger = WandbLogger(
        name=run_id,
        id=run_id,
        project=tracking.project,
        save_dir=folder,
        log_model=False,
        **options,
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it in every run
    return logger


def resolve_mode(mode: Mode) -> str:
    """What `auto` means here.

    Raises:
        ValueError: online was asked for and there is no key, or $WANDB_MODE is none of the modes.
    """
    named = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    found = {"dryrun": "offline", "run": "online"}.get(named, named) if named else None
    if found is None:
        return "online" if has_key() else "offline"
    if found not in ("online", "offline", "disabled"):
        raise ValueError(f"WANDB_MODE={named} is unknown: choose online, offline or disabled")
    if found == "online" and not has_key():
        raise ValueError(
            "wandb.mode=online needs an API key: run `wandb login`, or set --wandb.mode offline"
        )
    return found


def has_key() -> bool:
    """Whether W&B would find an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(logger: Logger) -> bool:
    """Whether a logger starts; one that does not is said once, and the run goes on with its files."""
    if not isinstance(logger, WandbLogger):
        return True
    try:
        _ = logger.experiment
    except Exception as error:  # wandb raises many kinds, and none may stop a run
        print(f"W&B is not reachable ({error}): this run is logged to its directory only")
        return False
    return True


def close_mirror() -> None:
    """Finish the W&B run of this process, so that its file is whole and the next run does not join it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()

"""`config.yaml` and `manifest.json`: what a run was, on what, and how it ended. Never a secret."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fmlightning.nets.size import multiply_adds, parameter_count
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.files import clear_unfinished, explain_write_errors, write_text
from fmlightning.runs.secrets import without_secrets
from fmlightning.training.metrics_file import MetricsFile

PACKAGES = (
    "fmlightning", "torch", "torchvision", "lightning", "torchdiffeq", "torchmetrics", "torch-fidelity",
    "wandb", "jsonargparse", "numpy", "scipy", "POT", "scikit-learn",
)  # fmt: skip


class Provenance(Callback):
    """Write the resolved config and the manifest at the start, and how the run ended at the end.

    Args:
        config: the resolved config.
        text: the same as YAML, to be read back by the command line.
        segments: where the run was resumed with other options, as in `runs.segments`.
    """

    def __init__(
        self, config: dict[str, Any], text: str, segments: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.config, self.text, self.segments = config, text, list(segments)
        self.failed = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        clear_unfinished(Path(trainer.default_root_dir))
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.manifest = {
            "status": "running",
            "cwd": os.getcwd(),
            "command": ["fmlightning", *sys.argv[1:]],
            "config_hash": config_hash(self.config),
            "seed": self.config["seed_everything"],
            "config": json.loads(json.dumps(self.config, default=str)),  # read faster than YAML
            "init_from": initial(self.config),
            "segments": self.segments,
            "git": git_state(),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
            "hardware": hardware(trainer),
            "data": {
                "class": type(data).__name__,
                "splits": data.splits,
                "fingerprint": data.fingerprint,
                "event_shape": list(data.event_shape),
                "num_classes": data.num_classes,
                **({"units": asdict(data.units)} if data.units else {}),
            },
            "interval": list(pl_module.field.t_range),
            "parameters": parameter_count(pl_module.network),
            "multiply_adds": multiply_adds(
                pl_module.network, data.event_shape, bool(data.num_classes)
            ),
            "start": now(),
        }
        if trainer.ckpt_path is None:
            self.begin(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Write both files: of a resumed run only when its state is restored, for until then it is the run before."""
        self.save(trainer)  # first: by its manifest a directory is a run's
        write(Path(trainer.default_root_dir) / "config.yaml", self.text)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:  # the step of a resumed run is known only here
            self.manifest["start_step"] = trainer.global_step
            self.begin(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(trainer.global_step)
            elif trainer.is_global_zero:
                logger.log_hyperparams(self.config)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.failed = True
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit)
        with suppress(OSError):  # a full disk is said by the exception itself
            self.end(trainer, "stopped" if stopped else "failed", repr(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if hasattr(self, "manifest") and "start_step" not in self.manifest and not self.failed:
            self.manifest["start_step"] = trainer.global_step  # killed behind its last step
            self.begin(trainer)
        self.end(trainer, "finished")  # after an exception the status is another already

    def end(self, trainer: Trainer, status: str, error: str | None = None) -> None:
        begun = hasattr(self, "manifest") and (
            trainer.ckpt_path is None or "start_step" in self.manifest
        )
        if begun and self.manifest["status"] == "running":
            self.manifest |= {"status": status, "end": now(), "end_step": trainer.global_step}
            self.manifest |= {"error": error} if error else {}
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            text = without_secrets(json.dumps(self.manifest, indent=2)) + "\n"
            write(Path(trainer.default_root_dir) / "manifest.json", text)


def initial(config: dict[str, Any]) -> dict[str, Any] | None:
    """The weights that training started from, where they are another run's."""
    if not config.get("init_from"):
        return None
    return {
        "run": config["init_from"],
        "ema": config["init_ema"],
        "digest": config["init_digest"],
    }


def write(path: Path, text: str) -> None:
    with explain_write_errors(path):
        write_text(path, text)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state() -> dict[str, Any]:
    """Commit of the current directory's repository and whether it had uncommitted changes."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"commit": None, "dirty": None}
    if commit.returncode or status.returncode:
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def hardware(trainer: Trainer) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processes": trainer.world_size,
        "accelerator": type(trainer.accelerator).__name__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor(),
        "threads": torch.get_num_threads(),
        "precision": str(trainer.precision),
    }

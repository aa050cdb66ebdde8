r"""A run directory: where it is, what is in it, and the model back from it.

    runs/<experiment>/<config-hash8>-s<seed>/
        config.yaml  manifest.json  metrics.csv  checkpoints/  samples/  evaluation.json  wandb/

The hash covers what changes the result, not the machine it was computed on, so that every process and every
later command finds the same directory. Reading one needs neither torch nor Lightning, until a model is loaded.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from fmlightning.flow.fields import NetworkField
    from fmlightning.flow.ode import ODESolver
    from fmlightning.flow.sources import Source

RESULT_KEYS = ("seed_everything", "model", "data", "ema")
RESULT_TRAINER_KEYS = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
    "fast_dev_run",
)
NOT_A_RESULT = ("solver", "compile", "eval_batch_size", "num_workers", "root", "download")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def runs_root() -> Path:
    """$FMLIGHTNING_RUNS, or `runs` in the current directory."""
    return Path(os.environ.get("FMLIGHTNING_RUNS", "runs"))


def config_hash(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits for everything in a resolved config that changes the result of training."""
    kept = {key: prune(config.get(key)) for key in RESULT_KEYS}
    trainer = config.get("trainer") or {}
    kept["trainer"] = {key: trainer.get(key) for key in RESULT_TRAINER_KEYS}
    kept["trainer"] |= {key: trainer[key] for key in ("max_time", "callbacks") if trainer.get(key)}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def prune(value: Any) -> Any:
    """A config without what only says where or how fast."""
    if isinstance(value, dict):
        return {k: prune(v) for k, v in value.items() if k not in NOT_A_RESULT}
    return value


def run_directory(config: dict[str, Any]) -> Path:
    """The directory of a resolved config.

    Raises:
        ValueError: the experiment's name would leave the root.
    """
    if config.get("run_dir"):
        return Path(config["run_dir"])
    name = config["experiment"]
    if not NAME.fullmatch(name):
        raise ValueError(
            f"experiment={name!r} must be letters, digits, '.', '_' and '-', and start with a letter or digit"
        )
    return runs_root() / name / f"{config_hash(config)}-s{config['seed_everything']}"


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run, by its directory or a checkpoint in it.

        Raises:
            FileNotFoundError: there is no run at the path.
        """
        path = Path(path)
        if path.suffix == ".ckpt":
            path = path.parent.parent
        if not (path / "config.yaml").is_file():
            known = sorted(str(run.path) for run in find(runs_root()))
            shown = f" Known runs: {', '.join(known[:6])}." if known else ""
            raise FileNotFoundError(f"{path} is not a run directory: it has no config.yaml.{shown}")
        return cls(path)

    @property
    def config(self) -> dict[str, Any]:
        config = yaml.safe_load((self.path / "config.yaml").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{self.path / 'config.yaml'} holds no config: the file is damaged")
        return config

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    @property
    def evaluation(self) -> dict[str, Any]:
        return read_json(self.path / "evaluation.json")

    @property
    def status(self) -> str:
        """`new`, or what the manifest says: `running`, `finished`, `stopped`, `failed`."""
        return self.manifest.get("status", "new")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        path = self.path / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    def checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.last_checkpoint is None:
            raise FileNotFoundError(
                f"{self.path} has no checkpoint: there is no checkpoints/last.ckpt in it. "
                "Train it first with the same config, or name another run"
            )
        return self.last_checkpoint


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error


def find(root: Path) -> Iterator[Run]:
    """All runs below a directory, by name."""
    for manifest in sorted(root.rglob("manifest.json")):
        yield Run(manifest.parent)


@dataclass(frozen=True)
class TrainedFlow:
    """What a run gives back, in plain torch.

    Attributes:
        field: the velocity field of the trained network.
        source: the law at t = 0.
        solver: the solver of the run's config.
        event_shape: the shape of one sample.
        num_classes: number of labels, 0 for none.
        levels: grey levels of images, or None.
        seed: of the run.
    """

    field: "NetworkField"
    source: "Source"
    solver: "ODESolver"
    event_shape: tuple[int, ...]
    num_classes: int
    levels: int | None
    seed: int


def load(run: str | Path, ema: bool = True) -> "NetworkField":
    """The trained velocity field of a run, in plain torch and evaluation mode.

        field = fmlightning.load("runs/moons/1a2b3c4d-s0")
        v = field(x, t)

    Args:
        run: a run directory, or a checkpoint in one.
        ema: whether to take the averaged weights rather than the raw ones.

    Raises:
        FileNotFoundError: no such run, or no checkpoint in it.
        ValueError: the averaged weights were asked for and the run has none.
    """
    return load_flow(run, ema).field


def load_flow(run: str | Path, ema: bool = True) -> TrainedFlow:
    """The trained field of a run with all that sampling needs; as `load`."""
    import torch

    from fmlightning.cli import instantiate_model

    path = Path(run)
    opened = Run.open(path)
    file = path if path.suffix == ".ckpt" and path.is_file() else opened.checkpoint()
    require_whole(file)
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    model = instantiate_model(opened.config)
    model.load_state_dict(checkpoint["state_dict"])
    if ema:
        use_average(model.network, checkpoint, file)
    flow = checkpoint["flow"]
    field = model.field.eval().requires_grad_(False)
    return TrainedFlow(
        field,
        model.source,
        model.solver,
        tuple(flow["event_shape"]),
        flow["num_classes"],
        flow["levels"],
        model.seed,
    )


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is torn or altered: it is a zip archive, with a checksum for each part.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{checkpoint} is damaged, or no checkpoint: {error}") from error
    if broken:
        raise ValueError(f"{checkpoint} is damaged: {broken} in it does not match its checksum")


def use_average(network: Any, checkpoint: dict[str, Any], file: Path) -> None:
    state = checkpoint.get("callbacks", {}).get("EMA", {})
    if not state.get("updates"):
        raise ValueError(
            f"{file} holds no averaged weights (ema.decay was 0, or no step was taken); ask for the raw ones: "
            "ema=False, or --ema false on the command line"
        )
    network.load_state_dict(state["shadow"], strict=False)

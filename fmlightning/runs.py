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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fmlightning.allowed import allowing
from fmlightning.training.sealed import require_whole, sealed_step

if TYPE_CHECKING:
    from torch import Tensor

    from fmlightning.flow.fields import NetworkField, TrainedField
    from fmlightning.flow.guidance import Guidance
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
NOT_A_RESULT = (
    "solver",
    "guidance",
    "compile",
    "channels_last",
    "ahead",
    "snapshots",
    "eval_batch_size",
    "num_workers",
    "in_memory",
    "root",
    "download",
)
EXPORTED = "model.safetensors"
"""The file of an exported network."""

RUN_FILES = {
    "config.yaml",
    "manifest.json",
    "metrics.csv",
    "checkpoints",
    "samples",
    "ema",
    "wandb",
}
UNFINISHED = "config.tmp"
"""All that is left of a run which was killed before its config was whole."""

RUN_MARKS = ("config.yaml", "manifest.json", "metrics.csv", "checkpoints")
"""Any of these makes a directory a run's."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def runs_root() -> Path:
    """$FMLIGHTNING_RUNS, or `runs` in the current directory."""
    return Path(os.environ.get("FMLIGHTNING_RUNS", "runs"))


def config_hash(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits for everything in a resolved config that changes the result of training."""
    text = json.dumps(result_parts(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def result_parts(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that changes the result of training."""
    kept = {key: prune(config.get(key)) for key in RESULT_KEYS}
    trainer = config.get("trainer") or {}
    kept["trainer"] = {key: trainer.get(key) for key in RESULT_TRAINER_KEYS}
    if config.get("init_digest"):  # not the path: where the weights lay does not matter
        kept["init_digest"] = config["init_digest"]
    kept["trainer"] |= {key: trainer[key] for key in ("max_time", "callbacks") if trainer.get(key)}
    return kept


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
    name, root = config["experiment"], runs_root()
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ValueError(
            f"experiment={name!r} must be letters, digits, '.', '_' and '-', and start with a letter or digit"
        )
    folder = root / name / f"{config_hash(config)}-s{config['seed_everything']}"
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"experiment={name} leads out of {root} to {folder.resolve()}, by a link: name another experiment, "
            "or the directory itself with --run_dir"
        )
    return folder


def require_vacant(folder: Path) -> None:
    """Refuse a directory that cannot be a run's, or holds something else than a run.

    Raises:
        ValueError: what is there is no run, and stays as it is.
    """
    cure = "name a new directory with --run_dir, or another root with $FMLIGHTNING_RUNS"
    if "\0" in str(folder):
        raise ValueError(f"run_dir={str(folder)!r} is no path; {cure}")
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file:
        raise ValueError(f"run_dir={folder} cannot be: {file} is a file; {cure}")
    inside = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    left = folder / UNFINISHED
    if left.is_file() and not left.is_symlink():
        inside -= {UNFINISHED}
    if inside and not inside & RUN_FILES:
        raise ValueError(f"run_dir={folder} holds other files and no run; {cure}")


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run, by its directory or a checkpoint in it.

        Raises:
            FileNotFoundError: there is no run, or no such checkpoint, at the path.
        """
        path = Path(path)
        if path.suffix == ".ckpt":
            if not path.is_file():
                raise absent(path)
            path = path.parent.parent
        if not (path / "config.yaml").is_file():
            known = sorted(str(run.path) for run in find(runs_root()))
            shown = f" Known runs: {', '.join(known[:6])}." if known else ""
            raise FileNotFoundError(f"{path} is not a run directory: it has no config.yaml.{shown}")
        return cls(path)

    @property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.yaml"
        try:
            config = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from error
        if not (isinstance(config, dict) and all(config.get(k) for k in ("model", "trainer"))):
            raise ValueError(f"{file} holds no config of a run: the file is damaged")
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
    def checkpoints(self) -> list[Path]:
        """Its checkpoints: `last.ckpt`, then the others from the highest step down."""
        files = [p for p in (self.path / "checkpoints").glob("*.ckpt") if p.is_file()]
        return sorted(files, key=lambda p: (p.stem == "last", sealed_step(p) or -1), reverse=True)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return next(iter(self.checkpoints), None)

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

    def whole_checkpoint(self) -> tuple[Path, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with those before it.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: none is whole.
        """
        self.checkpoint()
        wrong: list[str] = []
        for path in self.checkpoints:
            try:
                require_whole(path)
            except ValueError as error:
                wrong.append(str(error))
            else:
                return path, wrong
        raise ValueError(
            f"{self.path} has no checkpoint that is whole: {'; '.join(wrong)}. "
            "To start again and keep what is there: add --rerun true"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping")
    return content


def find(root: Path) -> Iterator[Run]:
    """All runs below a directory, whole or torn, by name."""
    if is_run(root):
        yield Run(root)
        return
    for folder in folders(root):
        yield from find(folder)


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, whole or not."""
    return path.is_dir() and any((path / name).exists() for name in RUN_MARKS)


def folders(root: Path) -> list[Path]:
    """Directories in one that may be runs or hold some, by name: not a run's own, and no way round in a circle."""
    inside = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    seen = (p for p in inside if not p.name.startswith("."))
    return sorted(p for p in seen if is_run(p) or not p.is_symlink())


@dataclass(frozen=True)
class TrainedFlow:
    """What a run gives back, in plain torch.

    Attributes:
        field: the velocity field of the trained network.
        source: the law at t = 0.
        solver: the solver of the run's config.
        guidance: the guidance of the run's config, for classes.
        label_drop: how often labels were hidden in training.
        event_shape: the shape of one sample.
        num_classes: number of labels, 0 for none.
        levels: grey levels of images, or None.
        seed: of the run.
        paired: whether samples start from x0 of the data; `source` then has none until it is given.
        latent: whether a sample is a latent, which the run's data decodes.
        weaker: the field that guidance pushes away from; None for the same network without its label.
    """

    field: "NetworkField"
    source: "Source"
    solver: "ODESolver"
    guidance: "Guidance"
    label_drop: float
    event_shape: tuple[int, ...]
    num_classes: int
    levels: int | None
    seed: int
    paired: bool = False
    latent: bool = False
    weaker: "NetworkField | None" = None

    def guided(self, guidance: "Guidance") -> "TrainedField":
        """The field under guidance, classifier-free or by the weaker one.

        Raises:
            ValueError: the model was not trained for it, or the weaker one on another path.
        """
        if self.weaker is not None:
            return guidance.auto(self.field, self.weaker)
        return guidance.free(self.field, self.num_classes if self.label_drop else 0)


def load(run: str | Path, ema: bool = True, allow: Sequence[str] = ()) -> "NetworkField":
    """The trained velocity field of a run, in plain torch and evaluation mode.

        field = fmlightning.load("runs/moons/1a2b3c4d-s0")
        v = field(x, t)

    Args:
        run: a run directory, a checkpoint in one, or what `fmlightning export` made of one.
        ema: whether to take the averaged weights rather than the raw ones; an export has one kind, which is taken,
            but averaged ones are not taken for raw.
        allow: modules of your own that the run's config may name: they are imported, and so run.

    Raises:
        FileNotFoundError: no such run, or no checkpoint in it.
        ValueError: weights were asked for that it does not have, or its config names a class of a module that is not
            allowed.
    """
    with allowing(allow):
        return load_flow(run, ema).field


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


def absent(checkpoint: Path) -> FileNotFoundError:
    """What to say of a checkpoint that is not there: which ones are."""
    run = next((p for p in checkpoint.parents if is_run(p)), checkpoint.parent)
    there = ", ".join(p.name for p in Run(run).checkpoints) or "none"
    return FileNotFoundError(
        f"{checkpoint}: there is no such checkpoint. The checkpoints of {run}: {there}; "
        "name one of them, or the run for its newest"
    )


def load_flow(run: str | Path, ema: bool = True) -> TrainedFlow:
    """The trained field of a run with all that sampling needs; as `load`."""
    import torch

    from fmlightning.cli import instantiate_model
    from fmlightning.flow.sources import Given
    from fmlightning.training.checkpoints import require_same_layout

    config = Run.open(run).config
    weights, record = read_weights(run, ema)
    flow = record["flow"]
    # whoever samples says whether to compile: it may take minutes
    model = instantiate_model({**config, "model": {**config["model"], "compile": False}})
    require_same_layout(model, {"state_dict": {f"network.{k}": v for k, v in weights.items()}})
    model.network.load_state_dict(weights)
    if flow.get("paired"):
        model.source = Given(torch.empty(0, *flow["event_shape"]))
    field = model.field.eval().requires_grad_(False)
    return TrainedFlow(
        field,
        model.source,
        model.solver,
        model.guidance,
        model.label_drop,
        tuple(flow["event_shape"]),
        flow["num_classes"],
        flow["levels"],
        model.seed,
        flow.get("paired", False),
        flow.get("latent", False),
    )


def away_from(flow: TrainedFlow, weaker: str, ema: bool, option: str) -> TrainedFlow:
    """The flow, to be guided away from a weaker run: autoguidance.

    Args:
        weaker: as in `load`.
        ema: whether to take its averaged weights.
        option: what named it on the command line.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: its samples have another shape or other classes.
    """
    other = load_flow(weaker, ema)
    if other.event_shape != flow.event_shape:
        raise ValueError(
            f"{option} {weaker} makes samples of shape {other.event_shape}, and this run {flow.event_shape}"
        )
    if other.num_classes != flow.num_classes:
        raise ValueError(
            f"{option} {weaker} has {other.num_classes} classes, and this run {flow.num_classes}; name one with as many"
        )
    return replace(flow, weaker=other.field)


def read_weights(run: str | Path, ema: bool = True) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The weights of a trained network, and of what they are; arguments and errors as in `load`.

    Returns:
        the weights by name, and a record: `ema`, whether they are averaged; `step`, after how many; `flow`, what its
        samples are.
    """
    from fmlightning.training.checkpoints import read_checkpoint

    file = weights_file(run)
    if file.name == EXPORTED:
        from fmlightning.export import read_export

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

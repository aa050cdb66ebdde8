r"""A run directory: where it is and what is in it.

    runs/<experiment>/<config-hash8>-s<seed>/
        config.yaml  manifest.json  metrics.csv  checkpoints/  samples/  evaluation.json  wandb/

The hash covers what changes the result, not the machine it was computed on, so that every process and every
later command finds the same directory. Reading one needs neither torch nor Lightning.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fmlightning.runs.checksum import recorded_step, require_intact
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.files import is_unfinished
from fmlightning.runs.legacy import translate

RUN_MARKS = ("config.yaml", "manifest.json", "metrics.csv", "checkpoints")
"""Any of these makes a directory a run's."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def runs_root() -> Path:
    """$FMLIGHTNING_RUNS, or `runs` in the current directory."""
    return Path(os.environ.get("FMLIGHTNING_RUNS") or "runs").expanduser()


def run_directory(config: dict[str, Any]) -> Path:
    """The directory of a resolved config.

    Raises:
        ValueError: the experiment's name would leave the root.
    """
    if config.get("run_dir"):
        return Path(config["run_dir"]).expanduser()
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
    """Refuse a directory that cannot be a run's, or holds something else than a run: its manifest says what it is.

    Raises:
        ValueError: what is there is no run, and stays as it is.
    """
    cure = "name a new directory with --run_dir, or another root with $FMLIGHTNING_RUNS"
    if "\0" in str(folder):
        raise ValueError(f"run_dir={str(folder)!r} is no path; {cure}")
    if "${" in str(folder):
        raise ValueError(
            f"run_dir={folder} holds a variable, and none is replaced here; write its value, or {cure}"
        )
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file:
        raise ValueError(f"run_dir={folder} cannot be: {file} is a file; {cure}")
    # a run that was killed before its manifest was whole leaves an unfinished file
    inside = (
        sorted(p.name for p in folder.iterdir() if not is_unfinished(p)) if folder.is_dir() else []
    )
    if inside and "config_hash" not in Run(folder).manifest:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        raise ValueError(
            f"run_dir={folder} holds {', '.join(inside[:3])}{more}, and no run: a manifest.json would say so; "
            f"{cure}"
        )


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
        """Its resolved config, under the names of today."""
        config = translate(self.saved_config, self.path / "config.yaml")
        there = self.manifest.get("cwd")
        return relocated(config, Path(there)) if isinstance(there, str) else config

    @property
    def saved_config(self) -> dict[str, Any]:
        """Its resolved config as it was written.

        Raises:
            ValueError: the file is damaged.
        """
        file = self.path / "config.yaml"
        try:
            config = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from error
        if not (isinstance(config, dict) and all(config.get(k) for k in ("model", "trainer"))):
            raise ValueError(f"{file} holds no config of a run: the file is damaged")
        return config

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    @property
    def trained_config(self) -> dict[str, Any]:
        """Its resolved config by the manifest, or else as in `config`: JSON is read 100 times as fast as YAML.

        Raises:
            FileNotFoundError: it has no config.yaml.
        """
        config, file = self.manifest.get("config"), self.path / "config.yaml"
        if not (isinstance(config, dict) and file.is_file()):
            return self.config
        return translate(config, file)

    @property
    def hashes(self) -> set[str]:
        """The hash in its manifest, and that of its config under the names of today."""
        found = {self.manifest["config_hash"]} if "config_hash" in self.manifest else set()
        with suppress(OSError, ValueError):  # a config that is not there, or damaged
            found.add(config_hash(self.config))
        return found

    @property
    def evaluation(self) -> dict[str, Any]:
        return read_json(self.path / "evaluation.json")

    @property
    def status(self) -> str:
        """`new`, or what the manifest says: `running`, `finished`, `stopped`, `failed`.

        Raises:
            ValueError: the manifest is damaged.
        """
        status = self.manifest.get("status", "new")
        if not isinstance(status, str):
            raise ValueError(f"{self.path}/manifest.json is damaged: status is {status!r:.80}")
        return status

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints: `last.ckpt`, then the others from the highest step down."""
        files = [p for p in (self.path / "checkpoints").glob("*.ckpt") if p.is_file()]
        return sorted(files, key=lambda p: (p.stem == "last", recorded_step(p) or -1), reverse=True)

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
                require_intact(path)
            except ValueError as error:
                wrong.append(str(error))
            else:
                return path, wrong
        raise ValueError(
            f"{self.path} has no checkpoint that is whole: {'; '.join(wrong)}. "
            "To start again and keep what is there: add --rerun"
        )


def relocated(value: Any, there: Path) -> Any:
    """A config whose relative files are found where the run was trained, if they are not where we are."""
    if isinstance(value, list):
        return [relocated(each, there) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: relocated(each, there) for key, each in value.items()}
    file = found.get("file")
    if isinstance(file, str) and not Path(file).exists() and (there / file).is_file():
        found["file"] = str(there / file)
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deep
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping")
    return content


def find(root: Path) -> Iterator[Run]:
    """All runs below a directory, complete or corrupt, by name."""
    if is_run(root):
        yield Run(root)
        return
    for folder in folders(root):
        yield from find(folder)


def is_run(path: Path) -> bool:
    """True for the directory of a run, complete or not."""
    return path.is_dir() and any((path / name).exists() for name in RUN_MARKS)


def folders(root: Path) -> list[Path]:
    """Directories in one that may be runs or hold some, by name: not a run's own, and no way round in a circle."""
    inside = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    seen = (p for p in inside if not p.name.startswith("."))
    return sorted(p for p in seen if is_run(p) or not p.is_symlink())


def absent(checkpoint: Path) -> FileNotFoundError:
    """The error for a checkpoint that is not there: it names those that are."""
    run = next((p for p in checkpoint.parents if is_run(p)), checkpoint.parent)
    there = ", ".join(p.name for p in Run(run).checkpoints) or "none"
    return FileNotFoundError(
        f"{checkpoint}: there is no such checkpoint. The checkpoints of {run}: {there}; "
        "name one of them, or the run for its newest"
    )

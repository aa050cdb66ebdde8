"""The run directory of a command: whether it may be written, what is resumed in it, and where a checkpoint is."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmlightning.cli.config_files import CONFIG, RESUME, given
from fmlightning.cli.quiet import say
from fmlightning.runs.checkpoint import read_checkpoint
from fmlightning.runs.checksum import recorded_step, require_intact
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.directory import Run, require_vacant, run_directory
from fmlightning.runs.files import write_text
from fmlightning.runs.legacy import is_saved
from fmlightning.runs.segments import (
    Changes,
    changed_options,
    config_before,
    require_resumable,
    segments,
)

TRAINED_WITH = ("network", "path", "source", "objective")
"""Options of the model without which its weights mean something else."""


class AlreadyFinished(Exception):
    """The run that was to be resumed is at its end."""


def directory_of(arguments: Sequence[str], config: dict[str, Any]) -> Path:
    """The run directory of a command line; a saved config belongs to the run that it lies in, wherever that is now.

    With `--ckpt_path` that run is meant. Without, its options are, and their run is another one.

    Args:
        arguments: the command line.
        config: the resolved config; a directory that only a saved config names is taken out of it.
    """
    saved = [Path(name) for _, name in given(arguments, *CONFIG) if is_saved(Path(name))]
    if saved and not any(given(arguments, "--run_dir")):
        config["run_dir"] = None
        if any(value != "null" for _, value in given(arguments, "--ckpt_path")):
            return saved[-1].parent
    return run_directory(config)


def resumed_segments(
    path: str | None, config: dict[str, Any]
) -> tuple[list[dict[str, Any]], Changes]:
    """The segments of the run with the one that now begins, and what is changed in it.

    Args:
        path: the checkpoint; None starts at step 0.
        config: the resolved config.

    Raises:
        ValueError: the config has other options than the run, or no step is left.
    """
    if path is None:
        return [], {}
    step, folder = recorded_step(Path(path)) or 0, Path(path).parent.parent
    if not (folder / "config.yaml").is_file():
        return [], {}  # a checkpoint outside a run
    run = Run(folder)
    known = segments(run.manifest)[1:]
    kept = [part for part in known if part["step"] < step]
    changes = changed_options(config_before(run.config, known[len(kept) :]), config)
    require_resumable(folder, step, changes)
    require_steps_left(path, step, config["trainer"], changes)
    return [*kept, {"step": step, "changes": changes}] if changes else kept, changes


def require_same_data(path: str | None, fingerprint: str) -> None:
    """Refuse to go on with other data than a run was trained on.

    Args:
        path: the checkpoint that training goes on from, if any.
        fingerprint: of the data that are there.

    Raises:
        ValueError: the run's were others.
    """
    run = None if path is None else Run(Path(path).parent.parent)
    inside = run is not None and (run.path / "config.yaml").is_file()
    data = (run.manifest.get("data") or {}) if run is not None and inside else {}
    before = data.get("fingerprint", fingerprint)
    if before != fingerprint:
        raise ValueError(
            f"{path} was trained on {data.get('class')} with the fingerprint {before[:12]}, and the data here have "
            f"{fingerprint[:12]}: their files have changed. Bring back the old ones, or train another run: --run_dir "
            "DIR without --ckpt_path"
        )


def require_steps_left(path: str, step: int, trainer: dict[str, Any], changes: Changes) -> None:
    """Refuse a new length that ends before the checkpoint does.

    Raises:
        ValueError: nothing would be trained.
    """
    steps, epochs = trainer["max_steps"], trainer["max_epochs"]
    if "trainer.max_steps" in changes and 0 <= steps <= step:
        raise ValueError(
            f"{path} is of step {step}, and trainer.max_steps={steps} leaves nothing to train: name more steps"
        )
    if "trainer.max_epochs" in changes and epochs is not None and epochs >= 0:
        done = read_checkpoint(Path(path))["loops"]["fit_loop"]["epoch_progress"]["total"]
        if epochs <= done["completed"]:
            raise ValueError(
                f"{path} has {done['completed']} epochs behind it, and trainer.max_epochs={epochs} leaves nothing to "
                "train: name more epochs"
            )


def trained_run(named: str | None, config: dict[str, Any]) -> Path | None:
    """The run that `validate`, `test` and `predict` use, where `--ckpt_path` names one."""
    if named is None or named in RESUME:
        return None
    try:
        run = Run.open(named)
    except FileNotFoundError:
        return None  # a checkpoint outside a run
    trained, requested = run.config["model"], config["model"]
    changed = [k for k in TRAINED_WITH if trained.get(k) != requested.get(k)]
    if changed:
        options = ", ".join(f"model.{name}" for name in changed)
        print(f"warning: {options} differ from what {run.path} was trained with")
    return run.path


def checkpoint(folder: Path, named: str | None, training: bool) -> str | None:
    """The file that `--ckpt_path` means: `auto` or `last` of this run, a run directory, or a file.

    Args:
        training: whether training starts at step 0 where there is none.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged.
    """
    run, resumes = Run(folder), named in RESUME
    if training and named is None:
        return None
    if training and resumes and not run.last_checkpoint:
        say(f"{folder} has no checkpoint to resume from: starting at step 0")
        return None
    if resumes:
        path, wrong = run.whole_checkpoint()
        say("\n".join((*wrong, f"going on from {path}, step {recorded_step(path)}")))
        return str(path)
    path = Path(named) if named else run.checkpoint()
    if path.is_dir():
        path = Run.open(path).checkpoint()
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={named}: no such checkpoint or run directory")
    require_intact(path)
    return str(path)


def claim(folder: Path, config: dict[str, Any], rerun: bool, resumes: bool, resumed: bool) -> None:
    """Refuse a directory that is in use, unless its run is resumed or moved aside.

    Args:
        config: the resolved config.
        rerun: whether the run there is moved aside.
        resumes: whether the command line names a checkpoint, found or not.
        resumed: whether there is one to resume from.

    Raises:
        AlreadyFinished: there is nothing left to do.
        ValueError: another run is there.
    """
    require_vacant(folder)
    run = Run(folder)
    if rerun:
        return
    unchanged = config_hash(config) in run.hashes
    if run.status == "finished" and resumes and unchanged:
        raise AlreadyFinished(folder)
    if run.status == "finished" and not resumed:
        what = "this run already" if unchanged else "another run, with other options"
        raise ValueError(
            f"{folder} holds {what}, finished. To see it: fmlightning show {folder}. "
            "To train into another directory: --run_dir DIR. To keep the old one beside a new one: add --rerun"
        )
    if run.status != "new" and not resumes:
        raise ValueError(
            f"{folder} holds this run, {run.status}. To resume it: add --ckpt_path auto. "
            "To start again and keep the old one beside it: add --rerun"
        )


def move_aside(folder: Path) -> None:
    """Rename a run to the first free name <folder>.1, .2, ..."""
    n = 1
    while folder.with_name(f"{folder.name}.{n}").exists():
        n += 1
    folder.rename(folder.with_name(f"{folder.name}.{n}"))


def mark(folder: Path, config: dict[str, Any]) -> bool:
    """Make a directory a run's, by a manifest, before anything else is in it; says whether it was none."""
    file = folder / "manifest.json"
    if file.exists():
        return False
    write_text(file, json.dumps({"status": "new", "config_hash": config_hash(config)}) + "\n")
    return True


def unmark(folder: Path) -> None:
    """Leave nothing of a run that was refused before its first step."""
    if Run(folder).manifest.keys() == {"status", "config_hash"}:
        shutil.rmtree(folder)

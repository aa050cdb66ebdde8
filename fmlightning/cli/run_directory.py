"""The run directory of a command: whether it may be written, what is resumed in it, and where a checkpoint is."""

from pathlib import Path
from typing import Any

from fmlightning.cli.quiet import say
from fmlightning.runs.checksum import require_whole, sealed_step
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.directory import Run, require_vacant

RESUME = ("auto", "last")
"""Values of `--ckpt_path` that mean the run's own newest checkpoint."""

TRAINED_WITH = ("network", "path", "source", "predicts")
"""Options of the model without which its weights mean something else."""


class AlreadyFinished(Exception):
    """The run that was to be resumed is at its end."""


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
        say("\n".join((*wrong, f"going on from {path}, step {sealed_step(path)}")))
        return str(path)
    path = Path(named) if named else run.checkpoint()
    if path.is_dir():
        path = Run.open(path).checkpoint()
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={named}: no such checkpoint or run directory")
    require_whole(path)
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
    unchanged = run.manifest.get("config_hash") == config_hash(config)
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

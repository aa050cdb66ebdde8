"""The state of a cell, read from its run directory, whoever trained it.

waiting      nothing is there
running      a process that is alive trains it
interrupted  it was stopped or killed, and goes on from its checkpoint
corrupt      what is there cannot be gone on from, and is kept aside
trained      scores that were requested of evaluate are missing, in part at least
finished     all is there
failed       its training, or a part of its evaluation, ended with an error
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fmlightning.runs.checksum import recorded_digest
from fmlightning.runs.directory import Run, read_json
from fmlightning.runs.files import write_text
from fmlightning.runs.lock import owner
from fmlightning.studies.sweep.cells import SweepCell


@dataclass(frozen=True)
class Status:
    """One of the words above, with its explanation."""

    word: str
    why: str = ""

    @property
    def resume(self) -> list[str]:
        """The options with which `fit` goes on."""
        return ["--rerun=true"] if self.word == "corrupt" else ["--ckpt_path=auto"]


def status(cell: SweepCell, evaluate: Sequence[str] | None) -> Status:
    """The state of a cell."""
    run = Run(cell.run)
    if who := owner(run.path):
        return Status("running", who)
    try:
        found, error = run.status, str(run.manifest.get("error", ""))
    except (ValueError, OSError) as damage:
        return Status("corrupt", str(damage))
    if found == "new":
        return Status("waiting")
    if found == "finished" and evaluate is None:
        return Status("finished")
    scores = scored(run, evaluate or ()) if found == "finished" and run.last_checkpoint else None
    if scores and scores.word == "finished":  # and its weights are not needed again
        return scores
    if corrupt := broken(run, found == "finished"):
        return Status("corrupt", corrupt)
    return scores or Status(*(("failed", error) if found == "failed" else ("interrupted",)))


def broken(run: Run, finished: bool) -> str | None:
    """Name why a run cannot be used: it has checkpoints and none is whole, or has finished and its newest is not."""
    if not run.checkpoints:
        return f"{run.path} has finished and has no checkpoint" if finished else None
    try:
        _, wrong = run.whole_checkpoint()
    except (ValueError, OSError) as error:
        return str(error)
    return wrong[0] if finished and wrong else None


# -- evaluation -------------------------------------------------------------------------------------


def stamp(run: Run, evaluate: Sequence[str]) -> Path:
    """The file with the outcome of a command of evaluate; of an older sweep its asked-*.json."""
    digest = sha256(json.dumps(list(evaluate)).encode()).hexdigest()[:8]
    old, new = (run.path / "evaluations" / f"{word}-{digest}.json" for word in ("asked", "request"))
    return old if old.is_file() and not new.is_file() else new


def scored(run: Run, evaluate: Sequence[str]) -> Status:
    """Check that every evaluation cell is there, of the checkpoint that is there."""
    try:
        record = read_json(stamp(run, evaluate))
    except (ValueError, OSError):
        record = {}
    if record.get("checkpoint") != recorded_digest(run.checkpoint()):
        return Status("trained")
    if not all(whole(run.path / "evaluations" / name) for name in record["files"]):
        return Status("trained")
    if record["failed"]:
        return Status("failed", "; ".join(record["failed"]))
    return Status("finished")


def note_scores(run: Run, evaluate: Sequence[str], seconds: float) -> None:
    """Write the stamp, from what evaluate has just written."""
    records: list[dict[str, Any]] = json.loads(
        (run.path / "evaluations" / "evaluations.json").read_text()
    )
    lost = [r for r in records if "error" in r]
    content = {
        "arguments": list(evaluate),
        "checkpoint": recorded_digest(run.checkpoint()),
        "files": [r["file"] for r in records if "error" not in r],
        "failed": [f"{r['label']}, {r['budget']}: {r['error']}" for r in lost],
        "seconds": round(seconds, 3),
    }
    write_whole(stamp(run, evaluate), content)


def whole(path: Path) -> bool:
    try:
        return bool(read_json(path))
    except (ValueError, OSError):
        return False


def write_whole(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")

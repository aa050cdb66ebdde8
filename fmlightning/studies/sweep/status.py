"""How far a cell is: read from its run directory, whoever trained it.

waiting      nothing is there
running      a process that is alive trains it
interrupted  it was stopped or killed, and goes on from its checkpoint
torn         what is there cannot be gone on from, and is kept aside
trained      what it was asked of evaluate is missing, in part at least
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
from fmlightning.studies.sweep.cells import Cell


@dataclass(frozen=True)
class Status:
    """One of the words above, and what is to be said of it."""

    word: str
    why: str = ""

    @property
    def resume(self) -> list[str]:
        """How `fit` goes on."""
        return ["--rerun=true"] if self.word == "torn" else ["--ckpt_path=auto"]


def status(cell: Cell, evaluate: Sequence[str] | None) -> Status:
    """How far a cell is."""
    run = Run(cell.run)
    if who := owner(run.path):
        return Status("running", who)
    try:
        found, error = run.status, str(run.manifest.get("error", ""))
    except (ValueError, OSError) as damage:
        return Status("torn", str(damage))
    if found == "new":
        return Status("waiting")
    if found == "finished" and evaluate is None:
        return Status("finished")
    scores = scored(run, evaluate or ()) if found == "finished" and run.last_checkpoint else None
    if scores and scores.word == "finished":  # and its weights are not needed again
        return scores
    if torn := broken(run, found == "finished"):
        return Status("torn", torn)
    return scores or Status(*(("failed", error) if found == "failed" else ("interrupted",)))


def broken(run: Run, finished: bool) -> str | None:
    """Why a run cannot be used: it has checkpoints and none is whole, or has finished and its newest is not."""
    if not run.checkpoints:
        return f"{run.path} has finished and has no checkpoint" if finished else None
    try:
        _, wrong = run.whole_checkpoint()
    except (ValueError, OSError) as error:
        return str(error)
    return wrong[0] if finished and wrong else None


# -- evaluation -------------------------------------------------------------------------------------


def stamp(run: Run, evaluate: Sequence[str]) -> Path:
    """The file that says what came of a command of evaluate."""
    digest = sha256(json.dumps(list(evaluate)).encode()).hexdigest()[:8]
    return run.path / "evaluations" / f"asked-{digest}.json"


def scored(run: Run, evaluate: Sequence[str]) -> Status:
    """Whether every evaluation cell is there, of the checkpoint that is there."""
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

"""A cell with the commands that bring it to its end, for a process on this machine or another."""

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from fmlightning.runs.directory import Run
from fmlightning.runs.files import write_text
from fmlightning.runs.lock import owner
from fmlightning.runs.signals import EXIT_CODES
from fmlightning.studies.sweep.cells import SweepCell
from fmlightning.studies.sweep.status import Status, note_scores, status

PROMPT = "\n$ "


@dataclass(frozen=True)
class Step:
    """The next thing to do: `training` or `evaluating`, by a command."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """The commands of a cell.

    Attributes:
        fit: the command that trains it, without how it resumes.
        score: the command that evaluates it.
        evaluate: the arguments of evaluate, by which its scores are found again; None for no evaluation.
        log: where the commands write.
    """

    cell: SweepCell
    fit: tuple[str, ...]
    score: tuple[str, ...]
    evaluate: tuple[str, ...] | None
    log: Path

    def status(self) -> Status:
        """Its state, and the error where its last step failed."""
        found = status(self.cell, self.evaluate)
        if found.word in ("waiting", "interrupted", "trained", "failed") and self.error.is_file():
            return Status("failed", self.error.read_text())
        return found

    @property
    def error(self) -> Path:
        """The file that says why the last step failed."""
        return self.log.with_suffix(".error")

    def next(self, found: Status) -> Step | None:
        """The step that a status asks for; None where nothing is left, or another process is at it."""
        if found.word in ("finished", "running"):
            return None
        if found.word == "trained" or (found.word == "failed" and self.trained):
            return Step("evaluating", self.score)
        return Step("training", (*self.fit, *found.resume))

    @property
    def trained(self) -> bool:
        return Run(self.cell.run).status == "finished"

    def head_log(self, step: Step) -> None:
        """A line with the command of a step, behind which it writes."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(f"{PROMPT}{shlex.join(step.command)}\n")

    def after(self, step: Step, code: int, seconds: float) -> Status:
        """The state after a step that ended with an exit status; an error is written down."""
        self.error.unlink(missing_ok=True)
        found = self.outcome(step, code, seconds)
        if found.word == "failed":
            write_text(self.error, found.why)
        return found

    def outcome(self, step: Step, code: int, seconds: float) -> Status:
        if code in EXIT_CODES.values():
            return Status("interrupted")
        if code and (who := owner(self.cell.run)):  # another process was faster
            return Status("running", who)
        if code:
            return Status("failed", last_words(self.log, code))
        if step.name == "evaluating":
            note_scores(Run(self.cell.run), self.evaluate or (), seconds)
        found = self.status()
        if step.name == "training" and found.word not in ("trained", "finished"):
            return Status("failed", f"fit left {self.cell.run} {found.word}: {found.why}")
        return found


def last_words(log: Path, code: int) -> str:
    """The reason why a command failed: its line of error, or else the last one."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; the output is in {log}"
    output = log.read_text(errors="replace").rpartition(PROMPT)[2].splitlines()[1:]
    lines = [line for line in output if line.strip()]
    error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    return (
        error.removeprefix("error: ") if error else f"{lines[-1] if lines else 'no words'} ({log})"
    )

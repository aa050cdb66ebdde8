"""Stands in for `fmlightning fit` and `evaluate` where only their files and exit statuses matter, and torch does not.

    stand_in.py fit RUN KIND --ckpt_path=auto | --rerun=true
    stand_in.py evaluate RUN
    stand_in.py sweep PLAN.json           the pool itself, in a process that can be killed

Kinds of a fit: good; bad, which fails until RUN.repaired is there; patient, which goes on until RUN.go is there.
"""

import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

from fmlightning.runs.checksum import append_checksum
from fmlightning.runs.files import atomic_write
from fmlightning.runs.lock import lock
from fmlightning.studies.sweep import children
from fmlightning.studies.sweep.cells import SweepCell
from fmlightning.studies.sweep.file import Sweep
from fmlightning.studies.sweep.job import Job
from fmlightning.studies.sweep.journal import SweepState
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.pool import Pool

EVALUATE = ("--solvers=euler",)
children.PRELOAD = []  # a stand-in needs no torch


def command(*words):
    return (sys.executable, __file__, *map(str, words))


def todo(self, cell):
    log = self.folder / "logs" / f"{cell.run.name}.log"
    kind = cell.axes["kind"]
    return Job(
        cell, command("fit", cell.run, kind), command("evaluate", cell.run), self.evaluate, log
    )


def plan_of(content):
    """A plan of stand-ins: {name, cells: {run: kind}}."""
    Plan.job = todo
    sweep = Sweep(Path("s.yaml"), {}, content["name"], (), {}, (), (0,), (), {"solvers": ["euler"]})
    cells = [
        SweepCell({"kind": kind}, {}, 0, Path(run), 100) for run, kind in content["cells"].items()
    ]
    return Plan(sweep, tuple(cells), EVALUATE, 1, 0)


def pool_of(plan, jobs, tell=print):
    journal = SweepState(plan, {cell.run: plan.job(cell).status() for cell in plan.cells})
    journal.write()
    return Pool(plan, journal, jobs, tell)


def count(run, what):
    """One more line in a file beside the run."""
    with run.with_name(f"{run.name}.{what}").open("a") as file:
        file.write(f"{' '.join(sys.argv[3:])}\n")


def manifest(run, status, **more):
    (run / "manifest.json").write_text(json.dumps({"status": status, **more}))


def save(run, step):
    path = run / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("weights", f"{step} {time.time_ns()}")
        append_checksum(file, step)


def fit(run, kind, *_):
    lock(run)
    if "--rerun=true" in sys.argv:
        run.rename(run.with_name(f"{run.name}.1"))
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("model: {a: 1}\ntrainer: {a: 1}\n")
    count(run, "fits")
    manifest(run, "running")
    if kind == "bad" and not run.with_name(f"{run.name}.repaired").exists():
        manifest(run, "failed", error="ValueError('no')")
        print("error: the loss is not finite")
        return 2
    if kind == "patient":
        reported = []
        for each in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, lambda number, _: reported.append(number))
        save(run, 10)
        run.with_name(f"{run.name}.begun").write_text(str(os.getpid()))
        while not run.with_name(f"{run.name}.go").exists():
            time.sleep(0.02)
            if reported:
                manifest(run, "stopped")
                run.with_name(f"{run.name}.reported").write_text(signal.Signals(reported[0]).name)
                return 143 if reported[0] == signal.SIGTERM else 75
    save(run, 100)
    manifest(
        run,
        "finished",
        start_step=0,
        end_step=100,
        start="2026-01-01T00:00:00",
        end="2026-01-01T00:00:50",
    )
    return 0


def evaluate(run):
    count(run, "evaluations_asked")
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    record = {"label": "euler", "budget": "4 steps", "file": "euler.json"}
    (folder / "euler.json").write_text(json.dumps(record))
    lost = run.with_name(f"{run.name}.unsolvable").exists()
    records = [record | ({"error": "dt underflow"} if lost else {})]
    (folder / "evaluations.json").write_text(json.dumps(records))
    return 0


if __name__ == "__main__":
    kind, first, *rest = sys.argv[1:]
    if kind == "sweep":
        sys.exit(pool_of(plan_of(json.loads(Path(first).read_text())), 2).run())
    sys.exit({"fit": fit, "evaluate": evaluate}[kind](Path(first), *rest))

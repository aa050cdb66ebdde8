"""What is shown while a sweep runs."""

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import stand_in

from fmlightning.studies.sweep.board import LiveTable
from fmlightning.studies.sweep.cost import duration
from fmlightning.studies.sweep.job import Step
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.pool import ActiveJob


def test_the_table_has_what_runs_and_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(tmp_path))
    monkeypatch.setattr(Plan, "job", stand_in.todo)
    (tmp_path / "demo").mkdir()
    runs = {str(tmp_path / "demo" / f"{i}-good"): "good" for i in range(2)}
    pool = stand_in.pool_of(stand_in.plan_of({"name": "demo", "cells": runs}), 1)
    job = pool.plan.job(pool.plan.cells[0])
    job.cell.run.mkdir()
    (job.cell.run / "metrics.csv").write_text("step,loss\n70,0.5\n")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pool.running.append(ActiveJob(job, 0, Step("training", ()), process))
    shown = Console(file=io.StringIO(), width=100)
    shown.print(LiveTable(left=600.0).drawing(pool))
    text = shown.file.getvalue()
    assert "kind=good, seed=0" in text
    assert "70 of 100" in text
    assert "2 waiting" in text
    assert "about 10.0 min left" in text


def test_durations_are_in_the_unit_that_reads_best():
    assert [duration(s) for s in (3, 89, 90, 7000, 200_000)] == [
        "3 s",
        "89 s",
        "1.5 min",
        "1.9 h",
        "2.3 days",
    ]

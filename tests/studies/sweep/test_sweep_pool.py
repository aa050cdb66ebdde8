"""Cells are trained once each, a failure stays where it is, and what was broken off is gone on with.

The commands are stand-ins of a few lines, so that every fault can be placed exactly.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stand_in

from fmlightning.studies.sweep.cost import cost
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.pool import environment

LIMIT = 120
"""Seconds that a step of a test may take on a machine that is busy."""


def until(condition, what):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT} s for {what}"
        time.sleep(0.02)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A pool of stand-ins by their kinds."""
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(tmp_path))
    monkeypatch.setattr(Plan, "job", stand_in.todo)
    monkeypatch.setattr("fmlightning.studies.sweep.pool.POLL", 0.02)
    (tmp_path / "demo").mkdir()

    class Scorer:
        folder, lines = tmp_path / "demo", []

        def content(self, *kinds):
            cells = {str(self.folder / f"{i}-{kind}"): kind for i, kind in enumerate(kinds)}
            return {"name": "demo", "cells": cells}

        def run(self, *kinds, jobs=2):
            self.lines = []
            self.pool = stand_in.pool_of(
                stand_in.plan_of(self.content(*kinds)), jobs, self.lines.append
            )
            assert self.pool.run() == 0
            return [self.pool.journal.state[cell.run] for cell in self.pool.plan.cells]

        def start(self, *kinds):
            (tmp_path / "plan.json").write_text(json.dumps(self.content(*kinds)))
            words = [sys.executable, stand_in.__file__, "sweep", str(tmp_path / "plan.json")]
            return subprocess.Popen(words)

        def lines_of(self, run, what):
            path = self.folder / f"{run}.{what}"
            return path.read_text().splitlines() if path.exists() else []

        def file(self):
            return json.loads((self.folder / "sweep.json").read_text())

    return Scorer()


def test_each_cell_is_trained_and_evaluated_once(sweep):
    assert [s.word for s in sweep.run("good", "good", "good")] == ["finished"] * 3
    assert [s.word for s in sweep.run("good", "good", "good")] == ["finished"] * 3
    for i in range(3):
        assert sweep.lines_of(f"{i}-good", "fits") == ["good --ckpt_path=auto"]
        assert len(sweep.lines_of(f"{i}-good", "evaluations_asked")) == 1
    rows = sweep.file()["cells"]
    assert [(Path(r["run"]).name, r["axes"], r["seed"], r["status"]) for r in rows] == [
        (f"{i}-good", {"kind": "good"}, 0, "finished") for i in range(3)
    ]


def test_a_failed_cell_stops_no_other_and_is_tried_again(sweep):
    bad, *others = sweep.run("bad", "good", "good", jobs=1)
    assert (bad.word, bad.why) == ("failed", "the loss is not finite")
    assert [s.word for s in others] == ["finished"] * 2
    assert sweep.file()["cells"][0]["error"] == "the loss is not finite"
    again = sweep.pool.plan.job(sweep.pool.plan.cells[0]).status()
    assert (again.word, again.why) == ("failed", "the loss is not finite")  # on disk

    (sweep.folder / "0-bad.repaired").touch()
    assert [s.word for s in sweep.run("bad", "good", "good")] == ["finished"] * 3
    assert len(sweep.lines_of("0-bad", "fits")) == 2
    assert len(sweep.lines_of("1-good", "fits")) == 1


def test_scores_that_cannot_be_computed_fail_their_cell_alone_and_train_nothing_again(sweep):
    (sweep.folder / "0-good.unsolvable").touch()
    lost, whole = sweep.run("good", "good")
    assert (lost.word, lost.why) == ("failed", "euler, 4 steps: dt underflow")
    assert whole.word == "finished"
    (sweep.folder / "0-good.unsolvable").unlink()
    assert [s.word for s in sweep.run("good", "good")] == ["finished"] * 2
    assert len(sweep.lines_of("0-good", "fits")) == 1
    assert len(sweep.lines_of("0-good", "evaluations_asked")) == 2


@pytest.mark.parametrize(
    "damage", ["score gone", "score corrupt", "other checkpoint", "stamp corrupt"]
)
def test_scores_that_are_not_there_whole_are_computed_again(sweep, damage):
    sweep.run("good")
    run = sweep.folder / "0-good"
    score, stamp = run / "evaluations" / "euler.json", next(run.glob("evaluations/request-*.json"))
    if damage == "score gone":
        score.unlink()
    elif damage == "score corrupt":
        score.write_text(score.read_text()[:7])
    elif damage == "stamp corrupt":
        stamp.write_text(stamp.read_text()[:30])
    else:
        stand_in.save(run, 100)
    assert sweep.run("good")[0].word == "finished"
    assert len(sweep.lines_of("0-good", "fits")) == 1
    assert len(sweep.lines_of("0-good", "evaluations_asked")) == 2


@pytest.mark.parametrize("damage", ["manifest", "checkpoint", "checkpoint gone"])
def test_a_corrupt_run_is_kept_aside_and_trained_again(sweep, damage):
    sweep.run("good")
    run = sweep.folder / "0-good"
    checkpoint = run / "checkpoints" / "last.ckpt"
    next(run.glob("evaluations/request-*.json")).unlink()
    if damage == "manifest":
        (run / "manifest.json").write_text('{"status": "fini')
    elif damage == "checkpoint":
        checkpoint.write_bytes(checkpoint.read_bytes()[:50])
    else:
        checkpoint.unlink()
    assert sweep.run("good")[0].word == "finished"
    assert sweep.lines_of("0-good", "fits")[1:] == ["good --rerun=true"]
    assert (sweep.folder / "0-good.1").is_dir()


def test_a_run_that_another_process_trains_is_waited_for_and_not_started(sweep):
    run = sweep.folder / "0-patient"
    other = subprocess.Popen(stand_in.command("fit", run, "patient"))
    until(run.with_name("0-patient.begun").exists, "the other process")
    reported = []

    def log(line):
        reported.append(line)
        if "[1/2] finished" in line:  # the other cell is done, and this one was still not started
            run.with_name("0-patient.go").touch()

    pool = stand_in.pool_of(stand_in.plan_of(sweep.content("patient", "good")), 2, log)
    assert pool.run() == 0
    assert other.wait(LIMIT) == 0
    assert f"trained by process {other.pid}" in reported[0]
    assert [s.word for s in pool.journal.state.values()] == ["finished"] * 2
    assert len(sweep.lines_of("0-patient", "fits")) == 1
    assert len(sweep.lines_of("0-patient", "evaluations_asked")) == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_sweep_stops_its_children_and_is_gone_on_with(sweep, sent):
    kinds = ("patient", "patient", "good")
    process = sweep.start(*kinds)
    until(lambda: len(list(sweep.folder.glob("*.begun"))) == 2, "two children")
    process.send_signal(sent)
    assert process.wait(LIMIT) == sent
    assert [r["status"] for r in sweep.file()["cells"]] == ["interrupted", "interrupted", "waiting"]
    assert [(sweep.folder / f"{i}-patient.reported").read_text() for i in range(2)] == [
        "SIGTERM"
    ] * 2
    assert (
        json.loads((sweep.folder / "0-patient" / "manifest.json").read_text())["status"]
        == "stopped"
    )
    for i in range(2):
        (sweep.folder / f"{i}-patient.go").touch()
    assert [s.word for s in sweep.run(*kinds)] == ["finished"] * 3


def test_a_signal_that_was_to_be_ignored_stays_ignored(sweep):
    """As under nohup."""
    pool = stand_in.pool_of(stand_in.plan_of(sweep.content("good")), 1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pool.listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == pool.take
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_sweep_leaves_children_that_the_next_one_does_not_start_twice(sweep):
    process = sweep.start("patient", "good")
    begun = sweep.folder / "0-patient.begun"
    until(begun.exists, "the child")
    until(lambda: sweep.lines_of("1-good", "evaluations_asked"), "the other cell")
    process.kill()
    process.wait(LIMIT)
    child = int(begun.read_text())
    os.kill(child, 0)  # it goes on alone

    again = sweep.start("patient", "good")
    until(lambda: sweep.file()["cells"][0]["status"] == "running", "the second sweep to see it")
    (sweep.folder / "0-patient.go").touch()
    assert again.wait(LIMIT) == 0
    assert [r["status"] for r in sweep.file()["cells"]] == ["finished"] * 2
    assert len(sweep.lines_of("0-patient", "fits")) == 1


def test_a_killed_child_fails_its_cell_and_the_next_sweep_resumes_it(sweep):
    process = sweep.start("patient", "good")
    begun = sweep.folder / "0-patient.begun"
    until(begun.exists, "the child")
    os.kill(int(begun.read_text()), signal.SIGKILL)
    assert process.wait(LIMIT) == 0
    rows = sweep.file()["cells"]
    assert [r["status"] for r in rows] == ["failed", "finished"]
    assert rows[0]["error"].startswith("killed by SIGKILL")
    (sweep.folder / "0-patient.go").touch()
    assert [s.word for s in sweep.run("patient", "good")] == ["finished"] * 2
    assert sweep.lines_of("0-patient", "fits")[1:] == ["patient --ckpt_path=auto"]


def test_the_cost_is_what_finished_cells_took_and_unknown_without_them(sweep):
    content = sweep.content("bad", "good")
    plan = stand_in.plan_of(content)
    state = {c.run: plan.job(c).status() for c in plan.cells}
    assert cost(plan, state).total is None
    assert cost(plan, state, seconds_per_step=0.25).training == 2 * 100 * 0.25

    sweep.run("bad", "good")
    state = {c.run: plan.job(c).status() for c in plan.cells}
    left = cost(plan, state)
    assert left.training == pytest.approx(50.0)  # the stand-in writes 50 s for its 100 steps
    assert left.evaluating > 0

    (sweep.folder / "1-good" / "checkpoints" / "last.ckpt").write_bytes(b"corrupt")
    state = {c.run: plan.job(c).status() for c in plan.cells}
    assert cost(plan, state).training == pytest.approx(100.0)  # both, from their first step


def test_jobs_share_the_machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fmlightning.studies.sweep.pool.cores", lambda: 6)
    assert [environment(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    assert environment(0, 3, 0)["OMP_NUM_THREADS"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in environment(0, 1, 8)  # one job may use them all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [environment(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]

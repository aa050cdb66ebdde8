"""Cells as jobs of a cluster: the request to SLURM, and the whole path on submitit's executor for this machine."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import stand_in
from test_sweep_pool import until

from fmlightning.runs.compare import Record, compare
from fmlightning.runs.directory import Run
from fmlightning.studies.sweep.plan import Plan
from fmlightning.studies.sweep.slurm import Cluster, queued, read_cluster, submit, submitted

REPOSITORY = Path(__file__).parents[3]
submitit = pytest.importorskip("submitit")


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A plan of stand-ins by their kinds."""
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{REPOSITORY}")
    monkeypatch.setattr(Plan, "job", stand_in.todo)
    (tmp_path / "demo").mkdir()
    return lambda *kinds: stand_in.plan_of(
        {
            "name": "demo",
            "cells": {str(tmp_path / "demo" / f"{i}-{kind}"): kind for i, kind in enumerate(kinds)},
        }
    )


def todo(plan):
    return [plan.job(cell) for cell in plan.cells]


def test_jobs_bring_cells_to_their_end_and_a_failed_one_says_why(demo):
    plan, cluster = demo("good", "bad"), Cluster("local", gpus_per_node=0)
    good, bad = todo(plan)
    submit(plan, [good, bad], cluster)
    until(lambda: not any(queued(plan, cluster, w) for w in (good, bad)), "the jobs")
    assert good.status().word == "finished"
    assert (bad.status().word, bad.status().why) == ("failed", "the loss is not finite")
    assert len(submitted(plan)) == 2


def test_a_preempted_job_goes_back_into_the_queue_and_on_where_it_was(demo, request):
    plan, cluster = demo("patient"), Cluster("local", gpus_per_node=0)
    (job,) = todo(plan)
    run = job.cell.run
    request.addfinalizer(run.with_name(f"{run.name}.go").touch)  # nothing waits after the test
    submit(plan, [job], cluster)
    begun = run.with_name(f"{run.name}.begun")
    until(begun.exists, "the first start")
    assert queued(plan, cluster, job)
    trainer = int(begun.read_text())
    begun.unlink()
    os.kill(parent(trainer), signal.SIGUSR2)  # as SLURM does to the process of submitit
    until(begun.exists, "the second start")
    assert run.with_name(f"{run.name}.reported").read_text() == "SIGUSR1"  # it could save
    run.with_name(f"{run.name}.go").touch()
    until(lambda: not queued(plan, cluster, job), "the end of the job")
    assert job.status().word == "finished"
    fits = run.with_name(f"{run.name}.fits").read_text().splitlines()
    assert fits == ["patient --ckpt_path=auto"] * 2


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_what_slurm_is_asked_for(tmp_path, monkeypatch, demo):
    """By the file that submitit hands to sbatch, with a stand-in for sbatch that keeps it."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("srun", "sbatch"):
        (bin / name).write_text(
            f'#!/bin/sh\ncp "$1" {tmp_path}/sent.sh\necho "Submitted batch job 4711"\n'
        )
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    cluster = read_cluster(REPOSITORY / "configs" / "cluster" / "slurm.yaml")
    plan = demo("good", "good", "good")
    numbers = submit(plan, todo(plan), cluster)
    assert sorted(numbers.values()) == ["4711_0", "4711_1", "4711_2"]
    requested = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", (tmp_path / "sent.sh").read_text()))
    wanted = {
        "array": "0-2%3", "partition": "gpu", "time": "240", "nodes": "1", "gpus-per-node": "1", "mem": "64GB",
        "ntasks-per-node": "1", "cpus-per-task": "8", "signal": "USR2@300", "job-name": "demo",
    }  # fmt: skip
    assert {k: requested.get(k) for k in wanted} == wanted
    assert cluster.devices == ("--trainer.devices=1", "--trainer.num_nodes=1")


BAD = {
    "partitoin: gpu": "partitoin: unknown key; did you mean partition?",
    "time: long": "time: long must be a whole number from 1 on",
    "nodes: 0": "nodes: 0 must be a whole number from 1 on",
    "cluster: pbs": "cluster: pbs must be slurm or local",
    "memory_gb: -1": "memory_gb: -1 must be a number above 0",
    "setup: module": "setup: module must be a list of lines",
    "[1]": "holds no settings",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=BAD)
def test_a_wrong_file_of_a_cluster_is_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"--cluster .*c\.yaml: ") as caught:
        read_cluster(tmp_path / "c.yaml")
    assert message in str(caught.value)


def test_without_slurm_the_error_says_what_to_do(demo, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    plan = demo("good")
    with pytest.raises(ValueError, match="cluster: local"):
        submit(plan, todo(plan), Cluster())


@pytest.mark.slow
def test_a_preempted_training_ends_as_one_that_ran_through(
    tmp_path, runs_below_tmp, command, monkeypatch, request
):
    """The real commands: preempted in the middle, and equal to the bit afterwards."""
    request.addfinalizer((tmp_path / "go").touch)  # nothing waits after the test
    hold = {"class_path": "holding.Hold", "init_args": {"step": 70, "folder": str(tmp_path)}}
    sweep = {
        "name": "tiny", "configs": [str(REPOSITORY / "configs" / "toy" / "moons.yaml")],
        "set": {
            "trainer.max_steps": 200, "trainer.val_check_interval": 100, "checkpoints.every_n_train_steps": 50,
            "data.val_size": 64, "data.test_size": 100, "trainer.log_every_n_steps": 10,
            "evaluation.metrics": [{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 100}}],
            "trainer.callbacks": [hold],
            "evaluation.at_end": False, "samples.at_end": False, "trajectories.at_end": False, "wandb.mode": "disabled",
        },
        "evaluate": {"solvers": ["euler"], "nfe": [4]},
    }  # fmt: skip
    path, cluster = tmp_path / "sweep.yaml", tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(sweep))
    cluster.write_text("cluster: local\ngpus_per_node: 0\n")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{REPOSITORY}")
    send = ("sweep", path, "--allow=holding", "--launcher=slurm", f"--cluster={cluster}")
    sent = command(*send)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert "submitted 1 jobs" in sent.stdout
    folder = runs_below_tmp / "tiny"
    until((tmp_path / "held").exists, "the job to train")
    assert "submitted" not in command(*send).stdout  # it is there already
    lock = next(folder.glob(".*.lock"))
    trainer = int(lock.read_text().split()[1])
    os.kill(parent(trainer), signal.SIGUSR2)
    waited = command(*send, "--wait", timeout=600)
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert "1 finished of 1 cells" in waited.stdout
    (broken,) = json.loads((folder / "sweep.json").read_text())["cells"]
    assert Run(Path(broken["run"])).manifest["start_step"] == 70

    (tmp_path / "go").touch()
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(tmp_path / "whole"))
    assert command("sweep", path, "--allow=holding", timeout=600).returncode == 0
    (whole,) = json.loads((tmp_path / "whole" / "tiny" / "sweep.json").read_text())["cells"]
    rows = compare(Record.read(Run(Path(whole["run"]))), Record.read(Run(Path(broken["run"]))))
    assert {row.name: row.difference for row in rows if row.difference} == {}

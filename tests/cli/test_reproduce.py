"""A run trained again is the same, and whatever is not the same is said."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fmlightning.__main__ import main
from fmlightning.cli.reproduce import WHERE_AND_HOW_FAST, beside, vacant, watch
from fmlightning.runs.checkpoint import read_checkpoint
from fmlightning.runs.compare import Record, compare, compare_metric, compare_tensors
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.directory import Run
from fmlightning.training.lightning.checkpoints import ChecksummedFiles

JUDGE = "[{class_path: Wasserstein, init_args: {subsets: 2, size: 50}}]"
SMALL = (
    "--trainer.max_steps=6", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=3", "--data.val_size=64",
    "--data.test_size=100", f"--evaluation.metrics={JUDGE}", "--model.network.width=16", "--model.coupling=MinibatchOT",
    "--data.batch_size=32", "--samples.at_end=false", "--trajectories.at_end=false", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--wandb.mode=disabled", "--trainer.devices=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = request.config.rootpath / "configs" / "toy" / "moons.yaml"
    assert main(["fit", "--config", str(config), *SMALL, f"--run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def other(trained, tmp_path):
    """What a second training would have left, to be tampered with."""
    return shutil.copytree(trained, tmp_path / "other")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def verdicts(shown):
    """The last word of each line of the table, by its first."""
    lines = [line.rstrip() for line in shown.splitlines()]
    ends = ("identical", "within tolerance", "different")
    return {
        line.split("  ")[0].strip(): end
        for line in lines
        for end in ends
        if line.endswith(f" {end}")
    }


# -- the whole command ------------------------------------------------------------------------------


def test_a_run_is_reproduced_to_the_bit(run, fmlightning):
    before = files(run)
    status, shown = fmlightning("reproduce", run)
    assert status == 0, shown
    again = run.with_name("run-reproduced")
    assert Run(again).status == "finished"
    assert not (again / "wandb").exists()
    assert set(verdicts(shown).values()) == {"identical"}
    wanted = {
        "train/loss",
        "val/loss",
        "eval/w2",
        "evaluation.json w2",
        "weights",
        "EMA",
        "optimiser",
    }
    assert wanted <= verdicts(shown).keys()
    assert shown.splitlines()[-1].startswith(f"identical: {run} and {again}")
    assert files(run) == before
    # by bytes too, and not by our own reader alone
    assert (again / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    # the next one goes to a name of its own, and none over another
    assert beside(run).name == "run-reproduced-2"
    status, shown = fmlightning("reproduce", run, "--run_dir", again)
    assert status == 2
    assert "--against" in shown


@pytest.mark.slow
def test_two_processes_reproduce_one_within_tolerance(run, fmlightning):
    status, shown = fmlightning(
        "reproduce", run, "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )
    assert "hardware processes" in shown
    found = verdicts(shown)
    assert "different" not in {
        found[name] for name in ("val/loss", "evaluation.json w2", "weights", "EMA")
    }, shown
    assert status == 0, shown


@pytest.mark.slow
def test_a_network_of_ones_own_is_reproduced_where_it_is_allowed(
    fit, fmlightning, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, 2)\n"
        "    def forward(self, x, t, y=None):\n"
        "        return self.layer(torch.cat((x, t[:, None]), 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = fit(
        "toy/moons", "--model.network=mine.Mine", "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1", "--allow=mine",
    )  # fmt: skip
    status, shown = fmlightning("reproduce", run)
    assert status == 2  # the config does not allow itself
    assert not run.with_name("run-reproduced").exists()
    status, shown = fmlightning("reproduce", run, "--allow", "mine")
    assert status == 0, shown


# -- tampering --------------------------------------------------------------------------------------


def change_metric(folder, name, step, factor):
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index(name)
    row = next(k for k, line in enumerate(lines) if line.split(",")[0] == str(step))
    cells = lines[row].split(",")
    cells[column] = repr(float(cells[column]) * factor)
    lines[row] = ",".join(cells)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def change_weight(folder, part, factor):
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    tensors = {
        "weights": checkpoint["state_dict"],
        "EMA": checkpoint["callbacks"]["EMA"]["shadow"],
    }[part]
    next(t for n, t in tensors.items() if n.endswith("hidden.1.weight")).mul_(factor)
    ChecksummedFiles().save_checkpoint(checkpoint, path)


def drop_last_row(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join(lines[:-1]) + "\n")


def change_score(folder):
    path = folder / "evaluation.json"
    found = json.loads(path.read_text())
    found["metrics"]["w2"] *= 1.5
    path.write_text(json.dumps(found))


TAMPERED = {
    "row": (lambda d: change_metric(d, "train/loss", 3, 1.01), "train/loss", "step 3"),
    "weights": (lambda d: change_weight(d, "weights", 1.5), "weights", "network.hidden.1.weight"),
    "average": (lambda d: change_weight(d, "EMA", 1.5), "EMA", "hidden.1.weight"),
    "lost row": (drop_last_row, "eval/w2", "no step 6 now"),
    "score": (change_score, "evaluation.json w2", "the end"),
    "no scores": (lambda d: (d / "evaluation.json").unlink(), "evaluation.json w2", "no the end now"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_what_differs_is_named(run, other, fmlightning, name):
    tamper, row, where = TAMPERED[name]
    tamper(other)
    status, shown = fmlightning("reproduce", run, "--against", other)
    assert status == 1, shown
    found = verdicts(shown)
    assert found[row] == "different"
    assert any(line.strip().startswith(row) and where in line for line in shown.splitlines()), shown
    assert shown.splitlines()[-1].startswith("different: ")
    untouched = {"weights", "train/lr"} - {row}
    assert all(found[n] == "identical" for n in untouched)


def test_the_tolerance_decides(run, other, fmlightning):
    change_metric(other, "train/loss", 3, 1 + 1e-5)
    change_weight(other, "weights", 1 + 1e-5)
    status, shown = fmlightning("reproduce", run, "--against", other)
    assert status == 0, shown
    assert verdicts(shown)["train/loss"] == verdicts(shown)["weights"] == "within tolerance"
    assert fmlightning("reproduce", run, "--against", other, "--rtol", "1e-6")[0] == 1
    assert fmlightning("reproduce", run, "--against", other, "--rtol=0")[0] == 1


def test_the_clock_is_left_out_and_said(run, other, fmlightning):
    for folder, value in ((run, 1.0), (other, 2.0)):
        lines = (folder / "metrics.csv").read_text().splitlines()
        lines = [f"{lines[0]},train/seconds", *(f"{line},{value}" for line in lines[1:])]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    status, shown = fmlightning("reproduce", run, "--against", other)
    assert status == 0, shown
    assert "train/seconds" not in verdicts(shown)
    assert "not compared, because they measure the clock: train/seconds" in shown


def test_the_environment_is_compared(run, other, fmlightning):
    path = other / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "1.0"
    manifest["git"] = {"commit": "f" * 40, "dirty": True}
    manifest["data"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))
    status, shown = fmlightning("reproduce", run, "--against", other)
    assert status == 0, shown
    assert any(
        line.split()[:2] == ["versions", "torch"] and "1.0" in line for line in shown.splitlines()
    )
    assert "f" * 40 in shown
    assert "uncommitted changes" in shown
    assert "WARNING: the data changed" in shown


# -- refusals ---------------------------------------------------------------------------------------


def edit(name, old, new):
    def change(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def tear(folder):
    path = folder / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])


REFUSED = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), [], ["no manifest.json"]),
    "torn manifest": (lambda d: (d / "manifest.json").write_text('{"status'), [], ["manifest.json", "damaged"]),
    "half a manifest": (edit("manifest.json", '"versions"', '"version"'), [], ["manifest.json", "'versions'"]),
    "not finished": (edit("manifest.json", '"finished"', '"stopped"'), [], ["stopped", "--ckpt_path auto"]),
    "other config": (edit("config.yaml", "width: 16", "width: 17"), [], ["config.yaml", "changed after the run"]),
    "torn config": (edit("config.yaml", "model:", "model: ["), [], ["config.yaml", "damaged"]),
    "no metrics": (lambda d: (d / "metrics.csv").unlink(), [], ["no metrics.csv"]),
    "torn metrics": (lambda d: (d / "metrics.csv").write_text("step,a\n1,x\n"), [], ["metrics.csv", "damaged"]),
    "torn scores": (edit("evaluation.json", "{", ""), [], ["evaluation.json", "damaged"]),
    "torn checkpoint": (tear, [], ["last.ckpt", "damaged"]),
    "no checkpoint": (lambda d: shutil.rmtree(d / "checkpoints"), [], ["no checkpoint"]),
    "another result": (None, ["--model.path=Trigonometric"], ["--model.path=Trigonometric", "fmlightning fit"]),
    "another seed": (None, ["--seed_everything", "3"], ["--seed_everything", "as it was"]),
    "tolerance": (None, ["--rtol=-1"], ["--rtol", "-1"]),
    "no second run": (None, ["--against", "nowhere"], ["nowhere", "config.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reproduced_is_one_message(run, fmlightning, name):
    damage, argv, expected = REFUSED[name]
    if damage:
        damage(run)
    before = files(run.parent)
    status, shown = fmlightning("reproduce", run, *argv)
    assert status == 2
    assert all(part in shown for part in expected), shown
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1, shown
    assert files(run.parent) == before


def test_a_run_is_not_compared_with_itself_or_with_another_config(run, other, fmlightning):
    assert "the run itself" in fmlightning("reproduce", run, "--against", run)[1]
    edit("config.yaml", "width: 16", "width: 17")(other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["config_hash"] = config_hash(Run(other).config)
    (other / "manifest.json").write_text(json.dumps(manifest))
    status, shown = fmlightning("reproduce", run, "--against", other)
    assert status == 2
    assert "another config" in shown


@pytest.mark.parametrize("name", [n for n in WHERE_AND_HOW_FAST if n != "allow"])
def test_no_option_that_is_taken_changes_the_result(trained, name):
    config = Run(trained).config
    section, key = name.split(".")
    changed = json.loads(json.dumps(config))
    place = changed["data"]["init_args"] if section == "data" else changed[section]
    place[key] = "something else"
    assert config_hash(changed) == config_hash(config)


# -- the second process -----------------------------------------------------------------------------

CHILD = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder.mkdir()
(folder / "manifest.new").write_text(sys.argv[2])
(folder / "manifest.new").rename(folder / "manifest.json")
deadline = time.monotonic() + 120
while time.monotonic() < deadline:
    time.sleep(0.05)
"""


def child(folder, fingerprint):
    manifest = {
        "start": "now",
        "status": "running",
        "data": {"class": "ToyData", "fingerprint": fingerprint},
    }
    return [sys.executable, "-c", CHILD, str(folder), json.dumps(manifest)]


def test_other_data_stop_the_second_run_at_once(run, tmp_path):
    with pytest.raises(ValueError, match="the data changed"):
        watch(child(tmp_path / "again", "f" * 64), Run(run), Run(tmp_path / "again"))


def test_a_signal_is_passed_on_and_its_exit_status_comes_back(run, tmp_path):
    fingerprint = Run(run).manifest["data"]["fingerprint"]
    again = tmp_path / "again"

    def send():
        while not (again / "manifest.json").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    assert watch(child(again, fingerprint), Run(run), Run(again)) == 75
    sender.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_second_run_is_gone_on_with(run, other, trained, fmlightning, monkeypatch):
    """Its directory is taken again, with `--ckpt_path auto`; another's is not."""
    edit("manifest.json", '"finished"', '"stopped"')(other)
    started = []

    def popen(command, *args, **kwargs):
        started.append(command)
        shutil.copy(trained / "manifest.json", other)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(
        "fmlightning.cli.reproduce.watch", lambda command, *_: popen(command).wait()
    )
    status, shown = fmlightning("reproduce", run, "--run_dir", other)
    assert status == 0, shown
    assert started[0][-2:] == ["--ckpt_path", "auto"]
    with pytest.raises(ValueError, match="exists"):
        vacant(Run(run), run.parent)


def test_a_second_run_that_fails_is_not_compared(run, fmlightning, monkeypatch):
    monkeypatch.setattr("fmlightning.cli.reproduce.watch", lambda *_: 2)
    status, shown = fmlightning("reproduce", run)
    assert status == 2
    assert "did not come to its end (exit status 2)" in shown


# -- the differences --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 0.0),
        ([1.0, 2.0, 4.0], [1.0, 2.2, 4.0], 0.2 / 2.2),
        ([2.0, 0.0, 2.0], [2.0, 1e-6, 2.0], 1e-6 / 2),  # held against the median, not against zero
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([1.0, math.nan], [1.0, 1.0], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0], [5e-324], 1.0),
    ],
)  # fmt: skip
def test_the_difference_of_a_metric(a, b, expected):
    then, now = ({f"step {k}": v for k, v in enumerate(values)} for values in (a, b))
    assert compare_metric("m", then, now).difference == pytest.approx(expected, rel=1e-12)


def test_the_difference_of_weights_is_of_the_whole_group():
    then = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0]), "step": torch.tensor(9.0)}
    assert compare_tensors("w", then, {k: v.clone() for k, v in then.items()}).difference == 0
    now = {**then, "b": torch.tensor([0.0, 4.5])}
    row = compare_tensors("w", then, now)
    assert row.difference == pytest.approx(0.5 / 5)  # |(3, 0, 4)| = 5
    assert row.where == "b"
    for wrong in (
        {**then, "b": torch.zeros(3)},
        {**then, "b": then["b"].double()},
        {"a": then["a"]},
    ):
        assert compare_tensors("w", then, wrong).difference == math.inf
    nan = {**then, "b": torch.tensor([0.0, math.nan])}
    assert compare_tensors("w", then, nan).verdict(1e9) == "different"


def test_records_of_one_run_are_identical(trained):
    a, b = Record.read(Run(trained)), Record.read(Run(trained))
    assert {row.difference for row in compare(a, b)} == {0.0}

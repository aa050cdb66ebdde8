"""The cells as training will have them: their directories, and what is refused before anything is trained."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fmlightning.runs.directory import Run
from fmlightning.studies.sweep.file import read_sweep
from fmlightning.studies.sweep.plan import plan

CONFIG = Path(__file__).parents[3] / "configs" / "toy" / "moons.yaml"
QUICK = {
    "trainer.max_steps": 20, "trainer.val_check_interval": 20, "data.val_size": 64, "data.test_size": 100,
    "evaluation.metrics": [{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 100}}],
    "evaluation.at_end": False, "samples.at_end": False, "trajectories.at_end": False, "wandb.mode": "disabled",
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """The file of a tiny sweep over the moons, with these keys; a key of `set` that is None is left out."""

    def call(**keys):
        keys["set"] = {k: v for k, v in (QUICK | keys.get("set", {})).items() if v is not None}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"name": "tiny", "configs": [str(CONFIG)]} | keys))
        return path

    return call


@pytest.fixture
def planned(write, monkeypatch):
    """The plan of such a file, resolved in this process, which has torch already."""
    from fmlightning.studies.sweep import resolve

    monkeypatch.setattr("fmlightning.studies.sweep.plan.resolve_in_child", resolve.answer)
    return lambda **keys: plan(read_sweep(write(**keys)))


def test_cells_lie_where_fit_will_put_them(planned, fmlightning):
    found = planned(
        axes={"model.path": ["Linear", "Trigonometric"], "model.optimizer.lr": [1e-3]}, seeds=[3, 4]
    )
    assert len({cell.run for cell in found.cells}) == 4
    assert {cell.run.parent for cell in found.cells} == {found.folder}
    assert {cell.max_steps for cell in found.cells} == {20}
    cell = found.cells[3]
    words = found.job(cell).fit[3:]  # behind `python -m fmlightning`
    status, shown = fmlightning(
        *words, "--trainer.max_steps=20", "--trainer.enable_progress_bar=false"
    )
    assert status == 0, shown
    run = Run.open(cell.run)
    assert run.status == "finished"
    assert run.config["model"]["path"]["class_path"].endswith("Trigonometric")
    assert run.manifest["seed"] == 4


def test_new_metrics_of_a_trained_run_are_asked(planned, fmlightning):
    """They change no weights, so the run is the same one, and its old scores are not what is asked for."""
    options = {"seeds": [3], "evaluate": {"solvers": ["euler"], "nfe": [2]}}
    found = planned(**options)
    (cell,) = found.cells
    quiet = ("--trainer.max_steps=20", "--trainer.enable_progress_bar=false")
    assert fmlightning(*found.job(cell).fit[3:], *quiet)[0] == 0
    assert planned(**options).job(cell).evaluate == found.evaluate
    judges = [{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 60}}]
    other = planned(**options, set={"evaluation.metrics": judges})
    assert other.cells[0].run == cell.run
    job = other.job(other.cells[0])
    assert job.evaluate[:-1] == found.evaluate
    assert job.score[-1] == job.evaluate[-1]
    assert json.loads(job.score[-1].removeprefix("--metrics="))[0]["init_args"]["size"] == 60


GREEDY = {"class_path": "Wasserstein", "init_args": {"size": 5000}}
BAD = {
    "no option": ({"axes": {"model.pth": ["Linear"]}}, "axes.model.pth: unknown option --model.pth; did you"),
    "no class": ({"axes": {"model.path": ["Linaer"]}}, "--model.path Linaer: no such class; did you mean Linear?"),
    "wrong type": ({"axes": {"data.train_size": ["far"]}}, "--data.train_size far: must be a whole number"),
    "wrong value": ({"axes": {"data.batch_size": [16, -3]}}, "axes.data.batch_size: "),
    "in a label": ({"axes": {"m": {"a": {}, "b": {"model.prdicts": "noise"}}}}, "axes.m: unknown option --model.pr"),
    "in set": ({"set": {"model.solvr": 3}}, "set: unknown option --model.solvr"),
    "sampled": ({"samples": {"n": 2, "model.lr": {"uniform": [0, 1]}}}, "axes.model.lr: unknown option --model.lr"),
    "one training twice": ({"axes": {"model.solver.num_steps": [5, 6]}}, "are the same training"),
    "solver": ({"evaluate": {"solvers": ["heun"]}}, "evaluate: --solvers heun: choose from euler"),
    "nfe of no number": ({"evaluate": {"nfe": ["few"]}}, "evaluate: argument --nfe: few must be whole numbers"),
    "nfe too small": ({"evaluate": {"solvers": ["rk4"], "nfe": [3]}}, "evaluate: --nfe [3] pays for no step of rk4"),
    "grid": ({"evaluate": {"solvers": ["euler"], "grids": ["Grid"]}}, "evaluate: --grids Grid"),
    "ema": ({"evaluate": {"ema": ["both"]}}, "evaluate: argument --ema: both must be true or false"),
    "guidance without labels": ({"evaluate": {"guidance.scale": [1, 2]}}, "evaluate.guidance.scale: [1.0, 2.0] needs"),
    "no metric": ({"set": {"evaluation.metrics": []}, "evaluate": {"nfe": [4]}}, "evaluate: there is no metric"),
    "too few samples": ({"evaluate": {"metrics": [GREEDY]}}, "evaluate: evaluation.metrics: Wasserstein needs subsets"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_trained_or_scored_is_refused_in_one_line(
    planned, runs_below_tmp, keys, message
):
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as caught:
        planned(**keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not runs_below_tmp.exists()


def test_the_command_says_it_and_writes_nothing(planned, write, fmlightning, runs_below_tmp):
    status, shown = fmlightning("sweep", write(axes={"model.pth": [1]}))
    assert status == 2
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert not runs_below_tmp.exists()


def test_the_sweep_itself_imports_no_torch(write):
    """Only its children do: it starts at once, and takes no memory from them."""
    code = (
        "import sys; from fmlightning.__main__ import main; "
        f"status = main(['sweep', {str(write(seeds=[0]))!r}, '--dry_run', '--seconds_per_step', '0.5']); "
        "assert status == 0 and not {'torch', 'lightning', 'wandb', 'jsonargparse'} & set(sys.modules), 'heavy'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "1 seeds: 1 trainings" in result.stdout
    assert "training 10 s" in result.stdout
    assert not Path(os.environ["FMLIGHTNING_RUNS"]).exists()


def test_two_cells_from_file_to_scores(planned, write, command, fmlightning, runs_below_tmp):
    """The commands themselves, in their processes; a second time nothing is started."""
    path = write(
        axes={"model.path": ["Linear", "Trigonometric"]},
        evaluate={"solvers": ["euler"], "nfe": [2, 4]},
    )
    result = command("sweep", path, "--jobs=2", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((runs_below_tmp / "tiny" / "sweep.json").read_text())
    assert content["axes"] == {"model.path": ["Linear", "Trigonometric"]}
    assert [c["status"] for c in content["cells"]] == ["finished"] * 2
    scores = []
    for cell in content["cells"]:
        records = json.loads((Path(cell["run"]) / "evaluations" / "evaluations.json").read_text())
        assert [r["nfe"] for r in records] == [2, 4]
        scores.append([r["metrics"]["w2"] for r in records])
    assert scores[0] != scores[1]

    before = {
        p: p.stat().st_mtime_ns
        for p in runs_below_tmp.rglob("*")
        if p.name != "sweep.json" and p.is_file()
    }
    assert fmlightning("sweep", path)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


# -- faults, with the real commands -------------------------------------------------------------------


@pytest.mark.slow
def test_after_a_killed_sweep_and_a_killed_cell_the_results_are_those_of_one_that_ran_through(
    write, tmp_path, runs_below_tmp, monkeypatch, request
):
    from test_sweep_pool import until

    from fmlightning.runs.compare import Record, compare

    request.addfinalizer((tmp_path / "go").touch)  # nothing waits after the test
    hold = {"class_path": "holding.Hold", "init_args": {"step": 70, "folder": str(tmp_path)}}
    path = write(
        set={"trainer.max_steps": 200, "trainer.val_check_interval": 100, "checkpoints.every_n_train_steps": 50,
             "trainer.log_every_n_steps": 10, "trainer.callbacks": [hold]},
        evaluate={"solvers": ["euler"], "nfe": [4]},
    )  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    words = [sys.executable, "-m", "fmlightning", "sweep", str(path), "--allow=holding"]
    first = subprocess.Popen(words)
    until((tmp_path / "held").exists, "the first sweep to train")
    first.kill()
    first.wait()
    lock = next((runs_below_tmp / "tiny").glob(".*.lock"))
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)  # its child, which was still there
    (tmp_path / "go").touch()
    second = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    (broken,) = json.loads((runs_below_tmp / "tiny" / "sweep.json").read_text())["cells"]

    monkeypatch.setenv("FMLIGHTNING_RUNS", str(tmp_path / "whole"))
    assert subprocess.run(words, timeout=600).returncode == 0
    (whole,) = json.loads((tmp_path / "whole" / "tiny" / "sweep.json").read_text())["cells"]
    rows = compare(Record.read(Run(Path(whole["run"]))), Record.read(Run(Path(broken["run"]))))
    assert {row.name: row.difference for row in rows if row.difference} == {}
    assert Run(Path(broken["run"])).manifest["start_step"] == 50
    one, other = (
        json.loads((Path(c["run"]) / "evaluations" / "evaluations.json").read_text())[0]["metrics"]
        for c in (whole, broken)
    )
    assert one == other

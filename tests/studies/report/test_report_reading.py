"""Which directories are runs, which are left out, and what is said of them."""

import json

import pytest
from paper_runs import write_cell, write_run

from fmlightning.studies.report.reading import collect


def names(found):
    return [t.run.path.name for t in found.trained]


@pytest.fixture
def three(tmp_path):
    for seed in range(3):
        write_run(tmp_path / "runs" / "study" / f"run-s{seed}", seed, {"w2": 0.2})
    return tmp_path / "runs" / "study"


def test_runs_below_a_directory_and_named_ones_are_the_same(three):
    assert (
        names(collect([three]))
        == names(collect(sorted(three.iterdir())))
        == ["run-s0", "run-s1", "run-s2"]
    )
    assert names(collect([three.parent])) == ["run-s0", "run-s1", "run-s2"]


def test_copies_beside_a_run_are_left_out_and_named(three):
    for name in ("run-s0-reproduced", "run-s1.1", "run-s1.2"):
        write_run(three / name, 0, {"w2": 9.0})
    found = collect(sorted(three.iterdir()))
    assert names(found) == ["run-s0", "run-s1", "run-s2"]
    assert len([note for note in found.notes if "copy of the run beside it" in note]) == 3
    # on its own a copy is a run
    assert names(collect([three / "run-s0-reproduced"])) == ["run-s0-reproduced"]


def test_an_experiment_stands_for_the_runs_of_its_sweep(three, tmp_path, monkeypatch):
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(three.parent))
    experiment = tmp_path / "experiments" / "study"
    experiment.mkdir(parents=True)
    (experiment / "sweep.yaml").write_text("name: study\n")
    assert names(collect([experiment])) == ["run-s0", "run-s1", "run-s2"]
    (experiment / "sweep.yaml").write_text("name: later\n")
    with pytest.raises(FileNotFoundError, match="fmlightning sweep"):
        collect([experiment])


def test_an_earlier_report_and_files_among_the_runs_are_passed_over(three):
    (three / "report").mkdir()
    (three / "report" / "report.html").write_text("")
    (three / "log.txt").write_text("")
    assert len(collect(sorted(three.iterdir())).trained) == 3


def test_what_wandb_keeps_inside_a_run_is_no_run(three):
    files = three / "run-s0" / "wandb" / "offline-run-1" / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text("a: 1")
    assert len(collect([three]).trained) == 3


DAMAGE = {
    "config corrupt": ("config.yaml", "model: {net"),
    "config empty": ("config.yaml", ""),
    "config of bytes": ("config.yaml", b"\xff\x00\xfe"),
    "config without a seed": ("config.yaml", "model: {a: 1}\ntrainer: {b: 1}"),
    "manifest corrupt": ("manifest.json", '{"status": "fin'),
    "manifest a list": ("manifest.json", "[]"),
    "scores corrupt": ("evaluation.json", '{"metrics": {"w2"'),
    "scores a word": ("evaluation.json", '{"metrics": {"w2": "low"}}'),
    "scores a list": ("evaluation.json", '{"metrics": [1]}'),
    "metrics corrupt": ("metrics.csv", "step,train/loss\nx,1\n"),
    "metrics of bytes": ("metrics.csv", b"step\n\xff\xfe\n"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_corrupt_run_is_listed_and_breaks_nothing(three, kind):
    name, content = DAMAGE[kind]
    (three / "run-s1" / name).write_bytes(content if isinstance(content, bytes) else content.encode())  # fmt: skip
    found = collect([three])
    assert names(found) == ["run-s0", "run-s2"]
    (lost,) = found.left_out
    assert lost.path.name == "run-s1"
    assert "damaged" in lost.why
    assert lost.status == "corrupt"


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_a_run_without_a_file_is_listed(three, name):
    (three / "run-s1" / name).unlink()
    found = collect([three])
    assert [x.path.name for x in found.left_out] == ["run-s1"]


def test_the_last_line_of_metrics_may_be_torn(tmp_path):
    run = write_run(tmp_path / "a", 0, {"w2": 0.2}, steps=((0, 1.0), (10, 0.5)))
    with (run / "metrics.csv").open("a") as file:
        file.write("20,0.")
    (trained,) = collect([run]).trained
    assert trained.records[0].metrics["train/loss"] == 0.5


def test_a_corrupt_cell_leaves_the_others(tmp_path):
    run = write_run(tmp_path / "a", 0, {"w2": 0.2})
    write_cell(run, "euler", 4, {"w2": 0.5})
    write_cell(run, "euler", 8, {"w2": 0.4}).write_text('{"metrics"')
    found = collect([run])
    assert len(found.trained[0].records) == 2
    assert "euler-8" in found.notes[0]


def test_an_unfinished_run_is_left_out_with_its_error(three):
    path = three / "run-s2" / "manifest.json"
    content = json.loads(path.read_text()) | {"status": "failed", "error": "NonFiniteError: step 7"}
    path.write_text(json.dumps(content))
    (lost,) = collect([three]).left_out
    assert lost.status == "failed"
    assert "NonFiniteError: step 7" in lost.why


def test_a_run_named_twice_is_refused(three):
    with pytest.raises(ValueError, match="seed 0 would count twice"):
        collect([three / "run-s0", three / "run-s0"])


def test_versions_that_differ_are_noted(three):
    path = three / "run-s2" / "manifest.json"
    content = json.loads(path.read_text()) | {"versions": {"torch": "2.6.0"}}
    path.write_text(json.dumps(content))
    assert collect([three]).notes == ["the runs had different versions: torch 2.15.0 and 2.6.0"]


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="has none below it"):
        collect([tmp_path])
    write_run(tmp_path / "a", 0, {"w2": 0.2}, status="running")
    with pytest.raises(ValueError, match="running and not finished"):
        collect([tmp_path])

"""`fmlightning ls` and `show`: whatever state the runs are in."""

import json
from pathlib import Path

import pytest
import yaml
from paper_runs import write_cell, write_run

from fmlightning.runs.directory import find
from fmlightning.studies.report import ls


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "paper"
    write_run(folder / "a", 0, {"w2": 0.3, "w2_floor": 0.1})
    write_run(folder / "b", 0, {"w2": 0.1}, path="Trigonometric")
    write_run(folder / "c", 1, {"w2": 0.2})
    write_run(folder / "d", 2, status="failed")
    return folder


def order(shown, names="abcd"):
    """The runs in the order they are listed."""
    words = [line.split()[0] for line in shown.splitlines() if line.split()]
    return "".join(name for word in words if (name := Path(word).name) in names)


def test_a_list_has_what_differs_status_and_scores(fmlightning, runs):
    status, shown = fmlightning("ls", runs)
    assert status == 0
    header = shown.splitlines()[0].split()
    assert header == ["run", "status", "step", "started", "seed", "model.path", "w2"]
    assert order(shown) == "abcd"
    assert "Trigonometric" in shown
    assert "failed" in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sort=w2"], "bcad"),
        (["--sort=-w2"], "acbd"),
        (["--sort=path"], "acdb"),
        (["--where=status=finished"], "abc"),
        (["--where=model.path=trigonometric,Linear", "--where=seed=0"], "ab"),
    ],
)
def test_sorting_and_choosing(fmlightning, runs, options, expected):
    status, shown = fmlightning("ls", runs, *options)
    assert status == 0, shown
    assert order(shown) == expected


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--sort=w22", "did you mean 'w2'?"),
        ("--where=statsu=failed", "did you mean 'status'?"),
        ("--where=status", "NAME=VALUE"),
        ("--where=status=lost", "none of the runs"),
    ],
)
def test_a_list_refuses_what_no_run_has(fmlightning, runs, option, words):
    status, shown = fmlightning("ls", runs, option)
    assert status == 2
    assert words in shown


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "evaluation.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\x00", b"[1]"], ids=["empty", "corrupt", "bytes", "list"]
)
def test_a_corrupt_run_is_listed_with_what_is_wrong(fmlightning, runs, name, content):
    (runs / "b" / name).write_bytes(content)
    status, shown = fmlightning("ls", runs)
    assert status == 0
    assert order(shown) == "abcd"
    corrupt = "corrupt" in shown
    assert corrupt
    assert name in shown


def test_runs_without_their_files_are_listed(fmlightning, runs):
    (runs / "a" / "config.yaml").unlink()
    (runs / "b" / "manifest.json").unlink()
    status, shown = fmlightning("ls", runs)
    assert status == 0
    assert "config.yaml is missing" in shown
    assert order(shown) == "abcd"


def test_several_experiments_are_told_apart_each_by_itself(fmlightning, runs):
    write_run(runs.parent / "other", 5, {"fid": 3.0}, experiment="other", trainer={"max_steps": 7})
    status, shown = fmlightning("ls", runs.parent)
    assert status == 0
    assert "differs in" in shown
    line = next(x for x in shown.splitlines() if "/other" in x)
    assert "fid 3" in line
    assert "max_steps" not in line  # alone in its experiment, it differs from none


def test_a_page_of_a_run(fmlightning, runs):
    run = runs / "a"
    content = json.loads((run / "manifest.json").read_text())
    content["interval"] = [0.0, 1.0]
    (run / "manifest.json").write_text(json.dumps(content))
    write_cell(run, "euler", 4, {"w2": 0.5})
    write_cell(run, "heun2", 8, {"w2": 0.4})
    (run / "evaluations" / "corrupt.json").write_text("{")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (run / "samples").mkdir()
    (run / "samples" / "samples-00000100.png").write_bytes(b"")
    status, shown = fmlightning("show", run)
    assert status == 0, shown
    for word in ("Linear", "euler", "heun2", "0.5", "corrupt.json", "damaged, or without a checksum",
                 "samples-00000100.png", "100 of 100", "aaaaaaaaaaaa"):  # fmt: skip
        assert word in shown, word


@pytest.mark.parametrize(
    "content",
    ['{"status": 3}', '{"status": ["finished"]}', '{"a": ' * 20_000 + "1" + "}" * 20_000],
    ids=["number", "list", "deep"],
)
def test_a_manifest_of_another_shape_ends_its_own_row_alone(fmlightning, runs, content):
    (runs / "b" / "manifest.json").write_text(content)
    status, shown = fmlightning("ls", runs, "--sort=status")
    assert status == 0
    assert "corrupt" in shown
    assert sorted(order(shown)) == list("abcd")


def test_values_that_differ_are_looked_for_once_an_experiment(runs, monkeypatch):
    looked = []
    monkeypatch.setattr(ls, "differing", lambda peers: looked.append(len(peers)) or ["seed"])
    rows = [ls.read(run) for run in find(runs)]
    assert len(list(ls.differing_values(rows))) == 4
    assert looked == [4]


def test_no_yaml_is_read_where_the_manifest_has_the_config(fmlightning, runs, monkeypatch):
    shown = {name: fmlightning(name, runs) for name in ("ls", "report")}
    for path in runs.glob("?/config.yaml"):
        manifest = path.with_name("manifest.json")
        known = {"config": yaml.safe_load(path.read_text())}
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | known))
    monkeypatch.setattr(yaml, "safe_load", lambda text: pytest.fail("YAML was read"))
    assert {name: fmlightning(name, runs) for name in ("ls", "report")} == shown

"""`make bench` runs every script, names what failed, and the README shows what it found."""

import json
import sys
from pathlib import Path

import pytest
import readme
import run

FOLDER = Path(run.__file__).parent
ROW = {
    "name": "step", "peer": "loop", "quantity": "speed", "ratio": 1.5, "low": 1.25, "high": 1.75, "pairs": 15,
    "bar": ">= 1", "verdict": "met",
}  # fmt: skip
GROWTH = {"name": "step", "over": "batch", "exponent": 1.0, "low": 0.9, "high": 1.1}
MACHINE = {"cores": 2, "processor": "a processor", "torch": "2.15.0", "load": 0.3, "threads": 1}


def test_every_script_is_run():
    scripts = {
        path.stem for path in FOLDER.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    }
    assert scripts == run.SCRIPTS.keys() | run.APART | {"run", "readme"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three benchmarks: one that is well, one that fails and one that never ends."""
    result = json.dumps({"rows": [ROW], "machine": MACHINE})
    texts = {
        "well": f"import sys; open(sys.argv[1][6:], 'w').write({result!r})",
        "bad": "raise ValueError('unequal work: steps')",
        "slow": "import threading; threading.Event().wait()",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "SCRIPTS", {"well": (300, ""), "bad": (300, ""), "slow": (1, "")})
    return tmp_path


def test_what_fails_is_named_and_the_rest_is_shown(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 1
    shown = capsys.readouterr()
    assert "failed: bad: ValueError: unequal work: steps" in shown.err
    assert "failed: slow: took more than 1 s" in shown.err
    assert "1.25 to 1.75" in shown.out
    monkeypatch.setattr(sys, "argv", ["run.py", "well"])
    assert run.main() == 0


def test_a_quick_look_leaves_the_results_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "well", "--quick"])
    assert run.main() == 0
    assert "1.25 to 1.75" in capsys.readouterr().out
    assert not (folder / "results").exists()


def test_results_of_two_machines_are_not_put_into_one_table():
    found = {
        name: {"rows": [ROW], "machine": {**MACHINE, "threads": n}}
        for n, name in enumerate("ab", 1)
    }
    with pytest.raises(ValueError, match=r"not of one machine.* 1 thread,.* 2 threads,"):
        readme.rendered(found)


def test_results_with_and_without_kept_memory_are_not_put_into_one_table():
    found = {
        name: {"rows": [ROW], "machine": {**MACHINE, "keeps_freed_memory": name == "a"}}
        for name in "ab"
    }
    with pytest.raises(ValueError, match=r"not of one machine.*freed memory kept"):
        readme.rendered(found)


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "nothing: choose from oracle" in capsys.readouterr().err


def test_the_table_is_placed_between_its_markers_and_nothing_else_changes():
    free = [{**ROW, "name": name, "bar": None} for name in ("no bar", "pairs of 64")]
    found = {
        "a": {"rows": [ROW, *free], "machine": MACHINE},
        "b": {"growth": [GROWTH], "machine": {**MACHINE, "load": 1.5}},
    }
    table = readme.rendered(found)
    assert "| step | loop | speed | 1.5 [1.25, 1.75] | ≥ 1 | met |" in table
    assert "| step | batch^1.00 [0.90, 1.10] |" in table
    assert "| no bar | loop | speed | 1.5 [1.25, 1.75] |  | met |" in table
    assert "pairs of 64" not in table  # our own solvers against each other
    assert "load of 0.3 to 1.5, with 15 to 15 pairs" in table
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    new = readme.placed(text, table)
    assert new == f"before\n{readme.BEGIN}\n{table}\n{readme.END}\nafter\n"
    assert readme.placed(new, table) == new
    with pytest.raises(ValueError, match="has no lines"):
        readme.placed("before", table)


def test_the_readme_shows_the_results_that_are_here():
    found = run.results(run.RESULTS)
    assert found.keys() == run.SCRIPTS.keys()
    text = readme.README.read_text()
    assert readme.placed(text, readme.rendered(found)) == text


def test_the_results_name_no_place():
    for path in (FOLDER / "results").glob("*.json"):
        assert "/home" not in path.read_text()
        assert str(FOLDER) not in path.read_text()

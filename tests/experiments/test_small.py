"""What the READMEs of the experiments say is what is run, and their tables are what came out."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import small  # noqa: E402

NAMES = [*small.EXPERIMENTS, "cifar10"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository with one experiment."""
    monkeypatch.setattr(small, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# Nothing to render\n")

    def call(text):
        folder = tmp_path / "experiments" / "one"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(text)
        return folder / "README.md"

    return call


TABLE = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_commands_run_and_their_table_is_put_in(place, tmp_path, capfd):
    readme = place(
        "```bash\nmkdir -p runs\nprintf '| a | b |\\n| --- | --- |\\n| 1 | 2 |\\n\\nA note.\\n' > runs/t.md\n```\n"
        "before\n<!-- runs/t.md -->\nold\n<!-- end -->\nafter\n<!-- runs/none.md -->\nkept\n<!-- end -->\n"
    )
    assert small.main(["one"]) == 0
    text = readme.read_text()
    assert f"before\n<!-- runs/t.md -->\n{TABLE}<!-- end -->\nafter\n" in text
    assert "<!-- runs/none.md -->\nkept\n<!-- end -->" in text
    assert "README.md: runs/t.md" in capfd.readouterr().out
    assert small.main(["one", "--tables"]) == 0
    assert readme.read_text() == text


def test_a_check_that_fails_hides_nothing_and_is_told(place, tmp_path, capfd):
    place("```bash\nfalse\necho later > later.txt\n```\n")
    assert small.main(["one"]) == 1
    assert (tmp_path / "later.txt").is_file()
    assert "failed: one" in capfd.readouterr().err


def test_a_text_without_commands_is_refused(place):
    with pytest.raises(ValueError, match="no block of bash"):
        small.commands(place("nothing"))


@pytest.mark.parametrize("name", NAMES)
def test_its_readme_has_all_parts(name):
    text = (EXPERIMENTS / name / "README.md").read_text()
    for part in ("**Question.**", "**Prediction", "**Protocol.**", "**Verdict"):
        assert part in text, part
    assert re.search(r"\| deviation", text), (
        "what differs from the published protocol, or from the full one"
    )


@pytest.mark.parametrize("name", small.EXPERIMENTS)
def test_its_commands_speak_of_what_there_is(name):
    """Each report is of a sweep that the block runs, and each table shown is one that it writes."""
    text = (EXPERIMENTS / name / "README.md").read_text()
    lines = small.commands(EXPERIMENTS / name / "README.md").replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in map(str.strip, lines) if line.startswith("fmlightning ")]
    files = {
        word for call in calls if call[1] == "sweep" for word in call if word.endswith(".yaml")
    }
    assert files
    assert all((EXPERIMENTS.parent / file).is_file() for file in files)
    names = {
        re.search(r"^name: (\S+)", (EXPERIMENTS.parent / f).read_text(), re.M)[1] for f in files
    }
    reports = [call for call in calls if call[1] == "report"]
    assert {call[2] for call in reports} <= {f"runs/{n}" for n in names}
    written = {call[call.index("--out") + 1] for call in reports if "--out" in call}
    # a variable of the shell stands for anything
    patterns = [re.sub(r"\\\$(\w+|\\\{.*?\\\})", r"\\w+", re.escape(place)) for place in written]
    for shown in re.findall(r"<!-- (\S+)/\w+\.md -->", text):
        assert any(re.fullmatch(pattern, shown) for pattern in patterns), (shown, patterns)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_expects_was_measured(name):
    """An expected.json lists the runs it is of; without runs there is none, and the README says so."""
    folder = EXPERIMENTS / name
    found = list(folder.glob("expected*.json"))
    for file in found:
        assert json.loads(file.read_text())["runs"]
    assert found or "not run" in (folder / "README.md").read_text().lower()

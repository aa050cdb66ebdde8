"""`fmlightning report` from end to end: files, page, checks and refusals."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from paper_runs import write_cell, write_run
from PIL import Image

LINEAR, TRIGONOMETRIC = (0.20, 0.24, 0.31), (0.30, 0.33, 0.42)


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "study"
    for path, values in (("Linear", LINEAR), ("Trigonometric", TRIGONOMETRIC)):
        for seed, w2 in enumerate(values):
            steps = [(10 * k, w2 + 1 / (k + 1)) for k in range(5)]
            run = write_run(
                folder / f"{path}-s{seed}",
                seed,
                {"w2": w2, "w2_floor": 0.1},
                path=path,
                steps=steps,
            )
            for method in ("euler", "heun2"):
                for nfe in (4, 8, 16):
                    write_cell(run, method, nfe, {"w2": w2 + 1 / nfe}, seed=seed)
            (run / "samples").mkdir()
            for step in (50, 100):
                picture = Image.new("RGB", (1600, 400), (step, 0, 0))
                picture.save(run / "samples" / f"samples-{step:08d}.png")
    return folder


class Page(HTMLParser):
    """What a page needs from elsewhere, and whether its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]  # fmt: skip
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_files_of_a_report(fmlightning, runs):
    status, shown = fmlightning("report", runs, "--baseline", "model.path=Linear")
    assert status == 0, shown
    out = runs / "report"
    tables = ("final", "final_differences", "evaluations", "evaluations_differences")
    expected = {f"{name}.{kind}" for name in tables for kind in ("md", "tex", "csv")}
    expected |= {"report.html", "training.png", "nfe_w2.png"}
    assert {p.name for p in out.iterdir()} == expected
    final = (out / "final.md").read_text()
    assert "| model.path | n | w2 ↓ | 95 % | nfe | 95 % |" in final
    assert re.search(r"\| Linear \| 3 \| \*\*0\.25\*\* \| ± 0\.14 \|", final)
    assert "Holm" in final
    # again, now with the report among the runs, and all by name
    status, shown = fmlightning("report", *sorted(runs.iterdir()))
    assert status == 0, shown


def test_the_page_needs_no_other_file(fmlightning, runs):
    assert fmlightning("report", runs)[0] == 0
    text = (runs / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert "samples-00000100" in text  # the last picture, of the lowest seed
    assert "samples-00000050" not in text
    assert "Linear-s1, samples" not in text
    assert "<b>0.25</b>" in text


def test_figures_as_pdf(fmlightning, runs, tmp_path):
    assert fmlightning("report", runs, "--format=pdf", "--out", tmp_path / "out")[0] == 0
    figure = (tmp_path / "out" / "nfe_w2.pdf").read_bytes()
    assert figure.startswith(b"%PDF")
    assert fmlightning("report", runs, "--format=pdf", "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "nfe_w2.pdf").read_bytes() == figure


def test_an_escaped_page(fmlightning, tmp_path):
    write_run(tmp_path / "<b>x", 0, {"<script>": 1.0})
    assert fmlightning("report", tmp_path / "<b>x", "--out", tmp_path / "out")[0] == 0
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()


def test_columns_of_metrics_csv_by_name(fmlightning, runs):
    status, shown = fmlightning("report", runs, "--metric=train/loss", "--scores=final")
    assert status == 0, shown
    assert "train/loss" in shown


# -- expected.json --------------------------------------------------------------------------------


def test_expected_is_written_from_the_runs_and_checked(fmlightning, runs, tmp_path):
    file = tmp_path / "expected.json"
    assert fmlightning("report", runs, "--write_expected", file)[0] == 0
    content = json.loads(file.read_text())
    assert content["command"] == f"fmlightning report {runs} --write_expected {file}"
    assert "prediction interval" in content["rule"]
    assert len(content["runs"]) == 6
    assert content["runs"][0].keys() == {"run", "config_hash", "seed", "commit", "dirty"}
    assert content["versions"] == {"torch": "2.15.0"}
    (cell,) = (
        c
        for c in content["cells"]
        if c["scores"] == "final" and c["axes"] == {"model.path": "Linear"}
    )
    assert cell["metrics"]["w2"]["values"] == list(LINEAR)
    assert cell["metrics"]["w2"]["seeds"] == [0, 1, 2]
    status, shown = fmlightning("report", runs, "--check", file)
    assert status == 0, shown
    assert "0 are outside or missing" in shown


def test_a_check_names_what_is_outside(fmlightning, runs, tmp_path):
    file = tmp_path / "expected.json"
    fmlightning("report", runs, "--scores=final", "--write_expected", file)
    content = json.loads(file.read_text())
    metrics = next(c for c in content["cells"] if c["axes"] == {"model.path": "Linear"})["metrics"]
    # t(0.995; 2) = 9.92, std 0.0557, n = r = 3: 0.451 is allowed
    for shift, failed in ((0.44, 0), (0.46, 1)):
        metrics["w2"]["mean"] = 0.25 + shift
        file.write_text(json.dumps(content))
        status, shown = fmlightning("report", runs, "--check", file, "--out", tmp_path / "out")
        assert status == failed, shown
        assert ("outside" in shown.split("expected scores")[0]) is bool(failed)
        # beside the scores it is shown, and no failure
        assert fmlightning("report", runs, "--expected", file, "--out", tmp_path / "out")[0] == 0


def test_a_cell_that_is_not_there_fails_the_check(fmlightning, runs, tmp_path):
    file, out = tmp_path / "expected.json", tmp_path / "out"
    fmlightning("report", runs, "--write_expected", file, "--out", out)
    linear = sorted(runs.glob("Linear-*"))
    status, shown = fmlightning("report", *linear, "--check", file, "--out", out)
    assert status == 1
    assert "missing" in shown
    assert "Trigonometric" in shown


def test_one_seed_says_nothing_of_the_spread(fmlightning, tmp_path):
    run, file = write_run(tmp_path / "a", 0, {"w2": 0.2}), tmp_path / "expected.json"
    fmlightning("report", run, "--write_expected", file)
    status, shown = fmlightning("report", run, "--check", file)
    assert status == 1  # nothing was checked
    assert "no spread known" in shown


def test_the_files_of_one_cell_are_still_read(fmlightning, tmp_path):
    run, file = write_run(tmp_path / "a", 0, {"w2": 0.2}), tmp_path / "expected.json"
    file.write_text(json.dumps({"metrics": {"w2": {"mean": 0.21, "std": 0.02, "n": 5}}}))
    assert fmlightning("report", run, "--check", file)[0] == 0


# -- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "metric": (["--metric=w3"], ["--metric w3", "no run has", "w2"]),
    "row": (["--rows=model.pat"], ["--rows model.pat", "did you mean 'model.path'?"]),
    "column": (["--columns=nfee"], ["--columns nfee", "did you mean 'nfe'?"]),
    "where": (["--where=solvr=euler"], ["--where solvr", "did you mean 'solver'?"]),
    "where without a value": (["--where=solver"], ["AXIS=VALUE"]),
    "value": (["--where=model.path=Linaer"], ["did you mean 'Linear'?", "Trigonometric"]),
    "values at once": (["--where=nfe=100", "--where=solver=euler"], ["no run"]),
    "baseline": (["--baseline=model.path=VP"], ["--baseline model.path=VP", "Linear"]),
    "baseline that is no row": (["--baseline=ema.decay=0.99"], ["ema.decay is no row", "model.path"]),
    "confounded": (["--rows=solver"], ["model.path (Linear, Trigonometric)"]),
    "out a file": (["--out=x.json"], ["--write_expected x.json"]),
    "expected nowhere": (["--check=nowhere.json"], ["--check nowhere.json", "no such file"]),
    "option": (["--metrics=w2"], ["--metrics", "report --help"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_one_line(fmlightning, runs, kind):
    options, words = REFUSED[kind]
    status, shown = fmlightning("report", runs, *options)
    assert status == 2
    error = next(line for line in shown.splitlines() if line.startswith("error: "))
    assert all(word in error for word in words), error
    assert not (runs / "report").exists()


def test_a_kind_of_score_that_cannot_be_compared_is_named_beside_the_other(fmlightning, runs):
    status, shown = fmlightning("report", runs, "--rows=model.path")
    assert status == 0
    assert (
        "Scores by solver and budget: left out, because the runs differ in more than model.path"
        in shown
    )
    assert not (runs / "report" / "evaluations.md").exists()


def test_a_damaged_expected_is_refused(fmlightning, runs, tmp_path):
    for text in ("{", "[]", "{}", '{"cells": [{"scores": "final"}]}', '{"metrics": {"w2": 1}}'):
        file = tmp_path / "expected.json"
        file.write_text(text)
        status, shown = fmlightning("report", runs, "--expected", file)
        assert status == 2, text
        assert str(file) in shown


def test_torch_is_not_imported(runs):
    code = (
        "import sys; from fmlightning.__main__ import main; "
        f"main(['report', {str(runs)!r}, '--baseline=model.path=Linear', '--write_expected={runs}/e.json']); "
        f"main(['ls', {str(runs)!r}]); main(['show', {str(runs / 'Linear-s0')!r}]); "
        "assert not {'torch', 'lightning', 'wandb', 'jsonargparse'} & set(sys.modules), 'heavy'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (runs / "report" / "nfe_w2.png").is_file()

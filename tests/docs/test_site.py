"""The documentation: every module, experiment and picture is in it, and every link leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from links import broken  # noqa: E402


def build(out):
    return subprocess.run(
        [sys.executable, str(ROOT / "docs/build.py"), "--out", str(out)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    assert not list(broken(site))


@pytest.mark.slow
def test_every_module_has_a_page(site):
    for file in (ROOT / "fmlightning").rglob("*.py"):
        name = file.relative_to(ROOT).with_suffix("")
        if name.name == "__main__":
            continue
        page = name.parent if name.name == "__init__" else name
        assert (site / "api" / f"{page}.html").is_file(), page


@pytest.mark.slow
def test_every_experiment_is_in_the_gallery_with_its_pictures(site):
    gallery = (site / "gallery.html").read_text()
    for readme in (ROOT / "experiments").glob("*/README.md"):
        name = readme.parent.name
        assert f"experiments/{name}/index.html" in gallery
        for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", readme.read_text()):
            assert (site / "experiments" / name / picture).is_file(), picture


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    for page in [*site.glob("*.html"), *site.glob("experiments/**/*.html")]:
        assert not re.search(r'(src|<link[^>]*href)="https?:', page.read_text()), page


@pytest.mark.slow
def test_the_docstrings_equations_stay_as_they_are_typed(site):
    page = (site / "api/fmlightning/flow/couplings.html").read_text()
    assert "P = argmin &lt;P, C&gt; - reg H(P)" in re.sub(r"<[^>]+>", "", page)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = build(tmp_path)
    assert done.returncode == 1
    assert "holds other files" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there"></a><a href="b.html#gone"></a><img src="c.png">'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    assert [line.split()[1] for line in broken(tmp_path)] == ["b.html#gone", "c.png"]

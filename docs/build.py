"""Build the documentation: the README, the experiments with their pictures, and the API from the docstrings.

    python docs/build.py --out site

Writes plain files that need no server and nothing from the network, and fails if a link in them leads nowhere.
"""

import argparse
import importlib
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import markdown2
import pdoc
from links import broken

import fmlightning
import fmlightning.flow.couplings

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    "index.html": "README.md",
    "changes.html": "CHANGELOG.md",
    "contributing.html": "CONTRIBUTING.md",
}
PAGE = (Path(__file__).parent / "page.html").read_text()
MARK = ".fmlightning-docs"
"""What tells a folder that may be replaced."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="by default site/")
    out: Path = parser.parse_args().out
    require_ours(out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()
    write_texts(out)
    write_experiments(out)
    write_api(out)
    wrong = list(broken(out))
    print("\n".join([*wrong, f"written: {out / 'index.html'}"]))
    return 1 if wrong else 0


def require_ours(out: Path) -> None:
    """Refuse to replace a folder that holds something else."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        sys.exit(
            f"error: --out {out} holds other files than this documentation; name another folder"
        )


def write_texts(out: Path) -> None:
    """The pages that stand as Markdown in the root, with the pictures they show."""
    for name, source in TEXTS.items():
        text = (ROOT / source).read_text()
        write_page(out / name, text, up="")
        copy_shown(text, ROOT, out)


def write_experiments(out: Path) -> None:
    """A page for each experiment, and the gallery that leads to them."""
    cards = []
    for readme in sorted((ROOT / "experiments").glob("*/README.md")):
        text, folder = readme.read_text(), readme.parent
        there = out / "experiments" / folder.name
        write_page(there / "index.html", text, up="../../")
        copy_shown(text, folder, there)
        cards.append(card(folder.name, text))
    write_page(out / "gallery.html", "# Experiments\n\n" + "\n\n".join(cards), up="")


def card(name: str, text: str) -> str:
    """An experiment's question, with its first picture."""
    page = f"experiments/{name}/index.html"
    title = text.splitlines()[0].removeprefix("# ")
    question = text.split("\n\n")[1]
    shown = next(pictures(text), None)
    picture = f"\n\n[![{title}](experiments/{name}/{shown})]({page})" if shown else ""
    return f"## [{title}]({page})\n\n{question}{picture}"


def pictures(text: str) -> Iterator[str]:
    """The pictures that a Markdown text shows from this repository."""
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target


def copy_shown(text: str, source: Path, out: Path) -> None:
    """The pictures that a text shows, and the files beside it that it leads to."""
    for target in re.findall(r"\]\(([^)\s#]+)\)", text):
        file = source / target
        if "://" in target or target.endswith("README.md") or not file.is_file():
            continue
        if file.resolve().is_relative_to(source):
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / target)


def write_page(path: Path, text: str, up: str) -> None:
    """A page of Markdown, whose links to other Markdown lead to their pages."""
    extras = ["fenced-code-blocks", "tables", "header-ids", "cuddled-lists"]
    body = markdown2.markdown(text, extras=extras)
    for page, source in TEXTS.items():
        body = body.replace(f'href="{source}"', f'href="{up}{page}"')
    body = re.sub(r'href="([^":]*)README\.md"', r'href="\1index.html"', body)
    title = text.splitlines()[0].removeprefix("# ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        PAGE.replace("{{title}}", title).replace("{{up}}", up).replace("{{body}}", body)
    )


def write_api(out: Path) -> None:
    """The API pages, from the docstrings."""
    pdoc.render.configure(docformat="google", show_source=True, search=True)
    vars(fmlightning)["load"] = fmlightning.load  # imported on use, where pdoc does not look
    for package in (fmlightning, fmlightning.flow.couplings):  # pdoc shows the modules they export
        package.__all__ += [module.name for module in pkgutil.iter_modules(package.__path__)]
    for name in (
        "flow",
        "nets",
        "data",
        "metrics",
        "training",
    ):  # a class has its page where it lies
        facade = importlib.import_module(f"fmlightning.{name}")
        vars(facade)["__all__"] = [m.name for m in pkgutil.iter_modules(facade.__path__)]
    pdoc.pdoc("fmlightning", "!fmlightning.__main__", output_directory=out / "api")


if __name__ == "__main__":
    sys.exit(main())

"""Every command that the documentation shows is one that the real parsers take, and names files that are there."""

import argparse
import re
import runpy
import shlex
from pathlib import Path

import pytest

from fmlightning.__main__ import run, split_allow
from fmlightning.cli.allowed import allowing
from fmlightning.cli.argparser import Parser
from fmlightning.cli.config_files import check_files

ROOT = Path(__file__).parents[2]
TEXTS = ["README.md", "CONTRIBUTING.md", "configs/**/*.yaml", "experiments/*/*.md", "experiments/*/*.yaml"]  # fmt: skip
LINE = re.compile(r"^[# ]*(?:\w+=\S+ )*(?:torchrun \S.* -m )?(fmlightning \S.*|python \S+\.py.*)$")
PLACEHOLDERS = {"FOLDER/sweep": "solvers/sweep"}


def commands(text):
    """The command lines of a text as words, a shell's variables as 0."""
    for line in re.sub(r"\\\n[# ]*", " ", text).splitlines():
        if found := LINE.match(line):
            plain = re.sub(r"\$\{[^}]*\}|\$\w+", "0", found[1].split("   ")[0])
            for name, file in PLACEHOLDERS.items():
                plain = plain.replace(name, file)
            yield shlex.split(plain, comments=True)


def documented():
    files = [path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))]
    for file in files:
        seen = {tuple(words): words for words in commands(file.read_text())}
        if seen:
            marks = [pytest.mark.slow] if file.suffix == ".yaml" else []
            yield pytest.param(list(seen.values()), id=str(file.relative_to(ROOT)), marks=marks)


class Parsed(Exception):
    """The parser has taken the command line, and nothing was done."""


def parse_only(parser, main, *args):
    """The parsers of a kind take the command line of a program, which is stopped there."""
    parse = parser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "parse_args", stop)
        with pytest.raises(Parsed):
            main(*args)


@pytest.fixture(scope="module")
def resolve():
    """Options of `fit` and its like against the whole parser, which is built once."""
    from fmlightning.studies.sweep.resolve import ConfigOnlyCLI

    reading = None

    def parse(words):
        nonlocal reading
        check_files(words)
        if reading is None:
            reading = ConfigOnlyCLI(words)
        else:
            reading.parse_arguments(reading.parser, words)

    return parse


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The modules that README and CONTRIBUTING show, where their commands find them."""
    (tmp_path / "my_package").mkdir()
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        if name := re.match(r"# my_package/(\w+)\.py", block):
            (tmp_path / "my_package" / f"{name[1]}.py").write_text(block)
    examples = (ROOT / "CONTRIBUTING.md").read_text()
    for name, block in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", examples, re.DOTALL):
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)


def take(words, resolve):
    """Parse one command line."""
    from fmlightning.cli.find_batch_size.command import parse as find_batch_size
    from fmlightning.cli.reproduce import parse as reproduce
    from fmlightning.cli.sample import parse as sample
    from fmlightning.studies.evaluate.command import parse as evaluate
    from fmlightning.studies.sweep.command import parse as sweep
    from fmlightning.studies.sweep.file import read_sweep

    command, *arguments = words
    if "--help" in arguments:
        with pytest.raises(SystemExit):
            run(words)
    elif command in ("fit", "validate", "test", "predict"):
        resolve(words)
    elif command == "find_batch_size":
        resolve(["fit", *find_batch_size(arguments)[1]])
    elif command == "sweep":
        options = sweep(arguments)
        read_sweep(options.file)
        assert options.cluster is None or options.cluster.is_file()
    elif parse := {"evaluate": evaluate, "reproduce": reproduce, "sample": sample}.get(command):
        parse(arguments)
    else:
        parse_only(Parser, run, words)


@pytest.mark.parametrize("lines", list(documented()))
def test_the_real_parsers_take_the_commands(lines, resolve, my_package, monkeypatch):
    monkeypatch.chdir(ROOT)
    for program, *words in lines:
        monkeypatch.setattr("sys.argv", ["fmlightning"] if program == "fmlightning" else words)
        if program == "fmlightning":
            modules, words = split_allow(words)
            with allowing(modules):
                take(words, resolve)
        else:
            monkeypatch.syspath_prepend(ROOT / Path(words[0]).parent)
            parse_only(argparse.ArgumentParser, runpy.run_path, words[0], None, "__main__")


def test_the_commands_are_found():
    text = "```bash\nA=1 fmlightning ls x  # all\nfor s in 0; do\n  fmlightning show \\\n    r/$s-${s/ /_}\ndone\n```\n"
    assert list(commands(text)) == [["fmlightning", "ls", "x"], ["fmlightning", "show", "r/0-0"]]
    shown = [words[1] for param in documented() for words in param.values[0]]
    assert {"fit", "sweep", "report", "evaluate", "sample", "ls", "show"} < set(shown)

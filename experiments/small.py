"""Run experiments as their READMEs say, and put the tables that come out into the texts.

    python experiments/small.py                          # all of EXPERIMENTS; `make experiments-small`
    python experiments/small.py solvers tong2024_two_dim
    python experiments/small.py --tables                 # nothing is run; the tables are taken from runs/ as they are

The commands are the first block of bash in a README. What is trained already is not trained again. A table stands
between `<!-- FILE -->` and `<!-- end -->`, where FILE is what `fmlightning report` has written.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("tong2024_two_dim", "solvers", "predictions_and_times", "lipman2023_paths")
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
TABLE = re.compile(r"(<!-- (\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="*", default=EXPERIMENTS, metavar="NAME")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    failed = [] if options.tables else [name for name in options.names if not ran(name)]
    for readme in (ROOT / "README.md", *(folder(name) / "README.md" for name in options.names)):
        for file in render(readme):
            print(f"{readme.relative_to(ROOT)}: {file}")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return int(bool(failed))


def folder(name: str) -> Path:
    return ROOT / "experiments" / name


def commands(readme: Path) -> str:
    """The first block of bash."""
    found = BLOCK.search(readme.read_text())
    if found is None:
        raise ValueError(f"{readme} has no block of bash that could be run")
    return found[1]


def ran(name: str) -> bool:
    """Run the commands of an experiment; whether all went well and every check held."""
    began = time.monotonic()
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    # every line is run, and one that fails fails the whole: a check that does not hold hides no later table
    script = (
        "status=0; trap 'status=1' ERR\n"
        + commands(folder(name) / "README.md")
        + "\nexit $status\n"
    )
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env={**os.environ, **here})
    print(f"{name}: {(time.monotonic() - began) / 60:.1f} min, exit status {done.returncode}")
    return done.returncode == 0


def render(readme: Path) -> Iterator[str]:
    """Put each table that is there into a text; yields the files."""
    text = readme.read_text()
    files: list[str] = []

    def table(found: re.Match[str]) -> str:
        path = ROOT / found[2]
        if not path.is_file():  # what was not run keeps what stands there
            return found[0]
        files.append(found[2])
        return f"{found[1]}{rows(path.read_text())}{found[3]}"

    new = TABLE.sub(table, text)
    if new != text:
        readme.write_text(new)
    yield from files


def rows(text: str) -> str:
    """The table of a report, without its notes."""
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("|"))


if __name__ == "__main__":
    sys.exit(main())

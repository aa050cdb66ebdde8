"""Every benchmark of the CPU, one after the other, and one table of their ratios: `make bench`.

Each writes results/<name>.json, with what it was measured on. One that fails or takes too long is named in the end, and
its old result stays.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from powers import words
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from timing import table

HERE = Path(__file__).parent
RESULTS = HERE / "results"

SCRIPTS: dict[str, tuple[int, str]] = {
    "oracle": (120, "--repeats=15"),
    "likelihood": (180, ""),
    "objectives": (120, ""),
    "sampling": (400, "--repeats=41"),
    "couplings": (400, "--repeats=11"),
    "ot_cfm": (600, "--steps=250 --image_steps=6 --image_repeats=9"),
    "loop": (900, ""),
    "ema": (400, ""),
    "naive": (300, ""),
    "images": (400, "--repeats=9 --fit_steps=6"),
    "growth": (240, "--repeats=3"),
}
"""Seconds that a benchmark may take at most, about twice what it takes on two quiet cores, and its flags."""

APART = {"gpu"}
"""Scripts that have a target of their own."""


def measured(name: str, quick: bool, folder: Path) -> str:
    """Run a benchmark, its result into a folder; what went wrong, or nothing."""
    limit, flags = SCRIPTS[name]
    command = [
        sys.executable,
        str(HERE / f"{name}.py"),
        f"--out={folder / name}.json",
        *flags.split(),
    ]
    if quick:
        command.append("--repeats=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"{name}: took more than {limit} s"
    lines = done.stderr.strip().splitlines() or [""]
    # libraries print after the traceback when the interpreter ends
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return f"{name}: {(errors or lines)[-1]}" if done.returncode else ""


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured on the CPU, by name."""
    paths = {name: folder / f"{name}.json" for name in SCRIPTS}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}


def show(found: dict[str, dict[str, Any]]) -> None:
    print(table([r for one in found.values() for r in one.get("rows", [])]))
    for one in found.values():
        for grown in one.get("growth", []):
            print(words(grown))


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "names", nargs="*", help=f"of {', '.join(SCRIPTS)}; all of them if not given"
    )
    flags.add_argument("--quick", action="store_true", help="two pairs each, to see that all run")
    chosen = flags.parse_args()
    names = chosen.names or list(SCRIPTS)
    if unknown := set(names) - SCRIPTS.keys():
        flags.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(SCRIPTS)}")
    # two pairs say that all runs, and nothing that should stand in the README
    folder = Path(mkdtemp()) if chosen.quick else RESULTS
    folder.mkdir(exist_ok=True)
    begin, done, wrong = time.monotonic(), [], []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            since = time.monotonic()
            if problem := measured(name, chosen.quick, folder):
                wrong.append(problem)
                progress.console.print(problem)
            else:
                done.append(name)
                progress.console.print(f"{name}: {time.monotonic() - since:.0f} s")
            progress.advance(task)
    found = results(folder)
    show({name: found[name] for name in done})
    print(
        f"{len(done)} of {len(names)} benchmarks in {(time.monotonic() - begin) / 60:.1f} minutes"
    )
    for problem in wrong:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""`fmlightning reproduce RUN`: train a finished run again, and compare the results."""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from fmlightning.cli.argparser import Parser, console
from fmlightning.runs.compare import Record, Row, by_the_clock, compare
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.directory import Run
from fmlightning.runs.segments import config_before, option, segments
from fmlightning.runs.signals import EXIT_CODES, STOP_AFTER

DESCRIPTION = """Run a finished run again, from its own config and seed, into a new directory, and compare: the rows of
metrics.csv, the scores of evaluation.json, the weights, their average and the optimiser's state. The exit status is 0
where all is identical or within tolerance and 1 where something differs. W&B is off in the second run."""

RTOL, RTOL_HALF = 1e-3, 1e-2
# another number of threads or processes was seen to move the scores of short runs by 1e-4, another seed by 1e-1;
# 16-bit numbers have 8 to 11 bits, so their rounding is a hundred times coarser and averages out only in part

WHERE_AND_HOW_FAST = {
    "allow": "a module of your own that the run's config names",
    "trainer.accelerator": "cpu, gpu, ...",
    "trainer.devices": "processes on a machine",
    "trainer.num_nodes": "machines",
    "trainer.strategy": "ddp, ...",
    "trainer.enable_progress_bar": "true or false",
    "model.compile": "true or false",
    "data.num_workers": "processes that load data",
    "data.root": "folder of the data",
}
"""The options that may differ from the run's: none of them is part of its hash."""

PLACE = ("config_hash", "start_step", "git", "versions", "hardware", "data")
"""Entries of a manifest about the software, the machine and the data of a run."""


def main(argv: list[str]) -> int:
    """Run a run again, compare, and return 0 or 1."""
    options, overrides = parse(argv)
    run = finished(options.run)
    then = Record.read(run)
    rtol = tolerance(run) if options.rtol is None else options.rtol
    if options.against:
        again = other(run, options.against)
    else:
        again = Run(vacant(run, options.run_dir))
        status = replay(run, again, overrides)
        if status in EXIT_CODES.values():  # it was stopped, and has said how to go on
            return status
        require_end(again, status)
    now = Record.read(finished(again.path))
    print_environment(then.manifest, now.manifest)
    rows = compare(then, now)
    print_rows(rows, rtol)
    print_omitted([name for name in {**then.metrics, **now.metrics} if by_the_clock(name)])
    return verdict(run.path, again.path, rows, rtol)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those that the second run takes over the config.

    Raises:
        ValueError: an option would change the result.
    """
    parser = Parser("reproduce", DESCRIPTION)
    parser.add_argument("run", help="run directory, or a checkpoint in one")
    parser.add_argument("--run_dir", type=Path, help="new directory; by default <RUN>-reproduced")
    parser.add_argument(
        "--rtol", type=nonnegative,
        help=f"largest relative difference to pass; by default {RTOL:g}, or {RTOL_HALF:g} for 16-bit precision",
    )  # fmt: skip
    parser.add_argument("--against", help="a second run that is there already: train nothing")
    for name, words in WHERE_AND_HOW_FAST.items():
        parser.add_argument(f"--{name}", action="append", help=words, metavar="VALUE")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(
            f"{unknown[0]} is not an option of reproduce, which repeats a run as it was: of the config, only "
            f"{', '.join('--' + name for name in WHERE_AND_HOW_FAST)} may differ. "
            "To train something else: fmlightning fit --config RUN/config.yaml"
        )
    given = {name: vars(options)[name] or [] for name in WHERE_AND_HOW_FAST}
    return options, [word for name in given for value in given[name] for word in (f"--{name}", value)]  # fmt: skip


def nonnegative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number that is not negative")
    return value


def tolerance(run: Run) -> float:
    """The default for a run's precision."""
    return RTOL_HALF if "16" in str((run.config.get("trainer") or {}).get("precision")) else RTOL


def finished(path: str | Path) -> Run:
    """A run that has come to its end and is what its manifest says.

    Raises:
        FileNotFoundError: there is no run at the path, or no manifest.
        ValueError: it has not ended, or its config was changed afterwards.
    """
    run = Run.open(path)
    if not (run.path / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{run.path} has no manifest.json, so nothing says what it was: was it trained by fmlightning fit?"
        )
    manifest, config = run.manifest, run.path / "config.yaml"
    if run.status != "finished":
        raise ValueError(
            f"{run.path} is {run.status} and not finished. To end it: "
            f"fmlightning fit --config {config} --run_dir {run.path} --ckpt_path auto"
        )
    missing = [key for key in PLACE if key not in manifest]
    if missing or "fingerprint" not in manifest["data"]:
        lost = missing[0] if missing else "fingerprint"
        raise ValueError(f"{run.path / 'manifest.json'} is damaged: it has no {lost!r}")
    found, recorded = config_hash(run.saved_config), manifest["config_hash"]
    if found != recorded:
        raise ValueError(
            f"{config} has the hash {found} and its run {recorded}: it was changed after the run, or another version "
            f"of fmlightning wrote it. To train what it says now: fmlightning fit --config {config} --run_dir NEW"
        )
    return run


def other(run: Run, path: str) -> Run:
    """A second run that is there already.

    Raises:
        ValueError: it is of another config, or the same directory.
    """
    again = finished(path)
    if again.path.resolve() == run.path.resolve():
        raise ValueError(f"--against {path} is the run itself: name another of the same config")
    if not again.hashes & run.hashes:
        there, here = again.manifest["config_hash"], run.manifest["config_hash"]
        raise ValueError(
            f"--against {path} is of another config: its hash is {there} and that of {run.path} is {here}"
        )
    return again


def vacant(run: Run, folder: Path | None) -> Path:
    """The directory of the second run: new, or that of a second run that was stopped.

    Raises:
        ValueError: something else is in it.
    """
    folder = folder or beside(run.path)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    there = Run(folder).manifest
    same = Run(folder).hashes & run.hashes
    if not same or there.get("status") == "finished":
        raise ValueError(
            f"--run_dir {folder} exists: name a new directory. To compare with a run that is in it: --against {folder}"
        )
    return folder


def replay(run: Run, again: Run, overrides: list[str]) -> int:
    """Train each segment of a run with the options of then, to the step where the next one began."""
    parts, status = segments(run.manifest), 0
    done = len(segments(again.manifest)) - 1
    for number in range(done, len(parts)):
        later = parts[number + 1 :]
        before = config_before(run.config, later)
        changed = dict.fromkeys(name for part in later for name in part["changes"])
        words = [f"--{name}={json.dumps(option(before, name))}" for name in changed]
        end = later[0]["step"] if later else 0
        status = train(run, again, [*words, *overrides], end)
        ended = status == 0 if not end else status in (0, EXIT_CODES[signal.SIGUSR1])
        if not ended or (end and again.manifest.get("end_step") != end):
            break
    return status


def train(run: Run, again: Run, words: list[str], end: int = 0) -> int:
    """Run the command of training on the run's config; returns its exit status.

    Args:
        words: options over the config.
        end: the step after which to stop; 0 is the end of training.

    Raises:
        ValueError: the data changed.
    """
    config = str(run.path / "config.yaml")
    options = ["fit", "--config", config, "--run_dir", str(again.path), "--wandb.mode", "disabled"]
    options += ["--ckpt_path", "auto"] if again.status != "new" else []
    stop = f"{STOP_AFTER}={end} " if end else ""
    print(f"again: {stop}fmlightning {shlex.join([*options, *words])}", flush=True)
    command = [sys.executable, "-m", "fmlightning", *options, *words]
    return watch(command, run, again, {**os.environ, STOP_AFTER: str(end)})


def require_end(again: Run, status: int) -> None:
    """Refuse to compare with a run that has not come to its end.

    Raises:
        ValueError: it has not.
    """
    if status or again.status != "finished":
        raise ValueError(
            f"the second run, in {again.path}, did not come to its end (exit status {status}); what it said is above"
        )
    print()


def beside(path: Path) -> Path:
    """The first free name: <run>-reproduced, <run>-reproduced-2, ..."""
    path = path.resolve() if path.name in ("", "..") else path
    names = (f"{path.name}-reproduced{end}" for end in ("", *map("-{}".format, range(2, 10_000))))
    return next(p for p in map(path.with_name, names) if not p.exists())


def watch(
    command: list[str], run: Run, again: Run, environment: dict[str, str] | None = None
) -> int:
    """Run a command to its end, or until it is seen to train on other data; return its exit status."""
    before = again.manifest.get("start")
    with subprocess.Popen(command, env=environment) as process, passing_on_signals(process):
        try:
            while process.poll() is None and again.manifest.get("start") == before:
                time.sleep(0.1)
            require_same_data(run, again)
            return process.wait()
        except BaseException:  # Ctrl-C reaches the process by itself: it saves and ends
            if process.poll() is None and not isinstance(sys.exception(), KeyboardInterrupt):
                process.terminate()
            process.wait()
            raise


def require_same_data(run: Run, again: Run) -> None:
    data = again.manifest.get("data")
    then = run.manifest["data"]["fingerprint"]
    if data and data["fingerprint"] != then:
        raise ValueError(
            f"the data changed: {data['class']} has the fingerprint {data['fingerprint'][:12]} here and had "
            f"{then[:12]} in {run.path}, so the second run was stopped. Name the same data with --data.root"
        )


@contextmanager
def passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Send a process what a scheduler sends this one, so that it can save and end."""
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {kind: signal.signal(kind, lambda n, _: process.send_signal(n)) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def environment(manifest: dict[str, Any]) -> dict[str, str]:
    """The software, the machine and the data of a run, as flat names and values."""
    words: dict[str, str] = {}
    for section in PLACE:
        value = manifest[section]
        inner = value if isinstance(value, dict) else {"": value}
        words |= {f"{section} {k}".strip().replace("_", " "): str(v) for k, v in inner.items()}
    return words


def print_environment(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Print the entries of the environment that differ, and how many are the same."""
    a, b = environment(then), environment(now)
    names = list({**a, **b})
    differing = [name for name in names if a.get(name) != b.get(name)]
    if differing:
        table = Table("environment", "then", "now", box=None)
        for name in differing:
            table.add_row(name, a.get(name, "-"), b.get(name, "-"))
        console().print(table)
    print(f"environment: {len(names) - len(differing)} of {len(names)} entries are the same")
    if a["data fingerprint"] != b["data fingerprint"]:
        print("WARNING: the data changed: the two runs were not trained on the same")
    dirty = [when for when, m in (("then", then), ("now", now)) if m["git"].get("dirty")]
    if dirty:
        print(f"uncommitted changes {' and '.join(dirty)}: no commit says what the code was")
    print()


def print_rows(rows: list[Row], rtol: float) -> None:
    table = Table("result", "values", "difference", "largest at", "", box=None)
    for row in rows:
        shown = "0" if row.difference == 0 else f"{row.difference:.1e}"
        table.add_row(row.name, str(row.count), shown, row.where, row.verdict(rtol))
    console().print(table, highlight=False)


def print_omitted(names: list[str]) -> None:
    """Print the metrics that were not compared."""
    if names:
        print(f"not compared, because they measure the clock: {', '.join(names)}")


def verdict(path: Path, again: Path, rows: list[Row], rtol: float) -> int:
    """Print the result of the comparison in one line, and return the exit status."""
    verdicts = [row.verdict(rtol) for row in rows]
    counts = {v: verdicts.count(v) for v in ("identical", "within tolerance", "different")}
    worst = [v for v in counts if counts[v]][-1]
    said = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    print(f"\n{worst}: {path} and {again}: {said} (rtol {rtol:g})")
    return int(worst == "different")

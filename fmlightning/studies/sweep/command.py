"""`fmlightning sweep FILE`: train what differs in training once, and evaluate the rest without training again."""

import argparse
import math
import sys
import time
from collections import Counter
from pathlib import Path

from rich.table import Table

from fmlightning.cli.argparser import Parser, console
from fmlightning.runs.signals import EXIT_CODES
from fmlightning.studies.sweep.board import board
from fmlightning.studies.sweep.cost import cost, duration
from fmlightning.studies.sweep.file import read_sweep
from fmlightning.studies.sweep.journal import SweepState
from fmlightning.studies.sweep.plan import Plan, plan
from fmlightning.studies.sweep.pool import Pool
from fmlightning.studies.sweep.slurm import Cluster, queued, read_cluster, submit
from fmlightning.studies.sweep.status import Status
from fmlightning.studies.sweep.wandb_file import export

WAIT = 5.0
"""Seconds between two polls of the queue."""

DESCRIPTION = """Run the comparison that a file describes: the product of its axes and seeds.

Each cell is trained once, in runs/<name>/<hash of its config>-s<seed>, and then scored by `fmlightning evaluate`
on the same noise as all others. The same command again does only what is missing or failed; sweep.json beside the
runs says how far each cell is."""

EXAMPLE = """the file:
  name: paths                          # the folder of the runs
  configs: [configs/toy/moons.yaml]    # base configs, each over the one before
  set: {trainer.max_steps: 1000}       # any options, for all cells
  axes:                                # any option with its values, or labels of settings that move together
    model.path: [Linear, Trigonometric]
    method: {I-CFM: {model.coupling: Independent}, OT-CFM: {model.coupling: MinibatchOT}}
  samples: {n: 8, method: sobol, model.optimizer.lr: {log_uniform: [1.0e-4, 1.0e-2]}}
  seeds: [0, 1, 2]
  exclude: [{model.path: Trigonometric, seed: [1, 2]}]
  evaluate:                            # options of fmlightning evaluate: every cell from the one checkpoint
    solvers: [euler, heun2, dopri5]
    nfe: [4, 8, 16]

exit status: 0 where all cells are finished, 1 where one failed, 2 for an error in the file, and as fit when stopped"""


def main(argv: list[str]) -> int:
    """Parse the command line, and do what is missing."""
    options = parse(argv)
    sweep = read_sweep(options.file)
    wanted = plan(sweep)
    if options.export:
        out = options.out or options.file.with_name(f"{options.file.stem}_wandb.yaml")
        print_exported(export(sweep, out), sampled=bool(sweep.content.get("samples")))
        return 0
    cluster = read_cluster(options.cluster) if options.launcher == "slurm" else None
    journal = SweepState(wanted, {c.run: wanted.job(c).status() for c in wanted.cells})
    if options.dry_run:
        show_plan(wanted, journal, options.jobs, options.seconds_per_step)
        return 0
    if cluster is not None:
        return send(wanted, journal, cluster, options.wait)
    journal.write()
    return run(wanted, journal, options.jobs)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("sweep", DESCRIPTION)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep, in YAML")
    parser.add_argument(
        "--jobs", type=count, default=1, metavar="N",
        help="cells at a time: a GPU each where there are several, and the cores of a CPU shared out",
    )  # fmt: skip
    parser.add_flag("--dry_run", "print the cells, their status and the cost; do nothing")
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local",
        help="where the cells run: here, or as the jobs of an array on a SLURM cluster",
    )  # fmt: skip
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE",
        help="with --launcher slurm: partition, time, GPUs, as in configs/cluster/slurm.yaml",
    )  # fmt: skip
    parser.add_flag("--wait", "with --launcher slurm: until the jobs have ended")
    parser.add_argument(
        "--export",
        choices=("wandb",),
        help="write the W&B sweep file of the training axes; do nothing else",
    )
    parser.add_argument(
        "--out", type=Path, help="that file; by default FILE with _wandb at its end"
    )
    parser.add_argument(
        "--seconds_per_step", type=seconds, metavar="S",
        help="for the cost, where no cell has finished yet",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name in ("cluster", "wait"):  # a forgotten --launcher would train here
        if getattr(options, name) and options.launcher != "slurm":
            parser.error(f"--{name} goes with --launcher slurm")
    if options.export and (options.dry_run or options.launcher == "slurm"):
        parser.error("--export writes a file and runs nothing: leave out --dry_run and --launcher")
    return options


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def run(wanted: Plan, journal: SweepState, jobs: int) -> int:
    """Run what is missing, here, and return the exit status."""
    with board(sys.stdout.isatty()) as shown:
        received = Pool(wanted, journal, jobs, shown.log, shown.refresh).run()
    unfinished = print_end(wanted, journal)
    if received:
        print("stopped; to go on: the same command")
        return dict(EXIT_CODES).get(received, 128 + received)  # type: ignore[call-overload]
    return int(unfinished > 0)


def print_end(wanted: Plan, journal: SweepState) -> int:
    """Say how far all is, and list the cells that failed with their errors; returns how many are not finished."""
    words = [journal.state[cell.run].word for cell in wanted.cells]
    shown = ", ".join(f"{n} {word}" for word, n in Counter(words).items())
    print(f"{shown} of {len(words)} cells: {wanted.folder}")
    for cell in wanted.cells:
        if journal.state[cell.run].word == "failed":
            print(
                f"failed: {cell.label}: {journal.state[cell.run].why} (log: {wanted.job(cell).log})"
            )
    return len(words) - words.count("finished")


def send(wanted: Plan, journal: SweepState, cluster: Cluster, wait: bool) -> int:
    """Send what is missing to the queue, and return the exit status."""
    todo = [wanted.job(cell, *cluster.devices) for cell in wanted.cells]
    words = {w.cell.run: journal.state[w.cell.run].word for w in todo}
    left = [w for w in todo if words[w.cell.run] != "finished"]
    idle = [w for w in left if words[w.cell.run] != "running"]
    new = [w for w in idle if not queued(wanted, cluster, w)]
    if new:
        numbers = submit(wanted, new, cluster)
        print(
            f"submitted {len(new)} jobs, from {numbers[str(new[0].cell.run)]} on; logs: {wanted.folder}/jobs"
        )
    for job in idle:
        journal.state[job.cell.run] = Status("queued")
    journal.write()
    while wait and (left := [w for w in left if queued(wanted, cluster, w)]):
        time.sleep(WAIT)
    for job in todo:
        if job not in left:
            journal.state[job.cell.run] = job.status()
    journal.write()
    print_end(wanted, journal)
    return int(any(status.word in ("failed", "interrupted") for status in journal.state.values()))


def print_exported(files: list[Path], sampled: bool) -> None:
    print(f"written: {', '.join(map(str, files))}")
    print(f"  wandb sweep {files[0]}       then, on each machine: wandb agent SWEEP_ID")
    rest = (
        "the values are drawn by W&B: fmlightning evaluate scores the runs that the agents leave"
        if sampled
        else "then the evaluation axes, from the runs that the agents leave: the same command without --export"
    )
    print(f"  {rest}")


# -- the plan -----------------------------------------------------------------------------------------


def show_plan(wanted: Plan, journal: SweepState, jobs: int, seconds_per_step: float | None) -> None:
    """Print what would be done."""
    sweep, cells = wanted.sweep, wanted.cells
    names = list(dict.fromkeys(name for cell in cells for name in cell.axes))
    table = Table(*names, "seed", "status", "run", box=None)
    for cell in cells:
        labels = [str(cell.axes.get(name, "")) for name in names]
        table.add_row(*labels, str(cell.seed), journal.state[cell.run].word, str(cell.run))
    console().print(table, highlight=False)
    sizes = [f"{len(axis.levels)} {axis.name}" for axis in sweep.axes] + [
        f"{len(sweep.seeds)} seeds"
    ]
    product = math.prod([len(axis.levels) for axis in sweep.axes] + [len(sweep.seeds)])
    less = f", less {product - len(cells)} excluded" if product > len(cells) else ""
    print(f"\n{' x '.join(sizes)}{less}: {len(cells)} trainings", end="")
    print(f", {wanted.scores} scores each: {wanted.scores * len(cells)}" if wanted.scores else "")
    counts = Counter(journal.state[cell.run].word for cell in cells)
    print(", ".join(f"{n} {word}" for word, n in counts.items()))
    print(f"cost: {estimate(wanted, journal, jobs, seconds_per_step)}")


def estimate(wanted: Plan, journal: SweepState, jobs: int, seconds_per_step: float | None) -> str:
    """The remaining cost, in words."""
    left = cost(wanted, journal.state, seconds_per_step)
    parts = {"training": left.training, "evaluating": left.evaluating}
    words = [f"{name} {'unknown' if s is None else duration(s)}" for name, s in parts.items()]
    shared = (
        ""
        if left.total is None or jobs == 1
        else f"; with {jobs} jobs {duration(left.total / jobs)} at best"
    )
    cure = (
        "" if left.training is not None else "; --seconds_per_step S or a finished cell would tell"
    )
    return f"{', '.join(words)} (from {left.source}{shared}{cure})"

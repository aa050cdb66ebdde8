"""Looking at runs: `fmlightning ls`, `show` and `report`. Reads files only; never torch or Lightning."""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from fmlightning.runs import Run, config_hash, find, read_json, runs_root


class Parser(argparse.ArgumentParser):
    """argparse, with errors for the command's one place of messages."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"fmlightning {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (fmlightning {self.prog.split()[-1]} --help explains)")


def main_ls(argv: list[str]) -> int:
    """List runs."""
    parser = Parser("ls", "List the runs below a directory, with their status and scores.")
    parser.add_argument(
        "root",
        nargs="?",
        type=Path,
        default=runs_root(),
        help="by default $FMLIGHTNING_RUNS or runs/",
    )
    root = parser.parse_args(argv).root
    runs = list(find(root))
    if not runs:
        raise FileNotFoundError(
            f"{root} holds no runs; train one with fmlightning fit --config ..."
        )
    table = Table("run", "status", "step", "started", "scores", box=None)
    for run in runs:
        try:
            manifest, scores = run.manifest, headline(run)
        except ValueError as error:
            table.add_row(str(run.path), str(error).removeprefix(f"{run.path}/"))
            continue
        table.add_row(
            str(run.path), run.status, str(manifest.get("end_step", "")), manifest.get("start", "")[:16],
            "  ".join(f"{k} {v:.4g}" for k, v in scores.items()),
        )  # fmt: skip
    console().print(table)
    return 0


def main_show(argv: list[str]) -> int:
    """Show one run."""
    parser = Parser("show", "What a run was, how it ended, its scores and its pictures.")
    parser.add_argument("run", help="run directory, or a checkpoint in one")
    run = Run.open(parser.parse_args(argv).run)
    try:
        rows = facts(run)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run.path} is damaged: config.yaml or manifest.json lacks {error}"
        ) from error
    out = console()
    out.print(f"[bold]{run.path}[/]  {run.status}")
    for name, value in rows.items():
        if value:
            out.print(f"  {name:11}{value}", highlight=False)
    print_scores([run], expected=None)
    for picture in sorted((run.path / "samples").glob("*.png")):
        out.print(f"  picture    {picture}", highlight=False)
    offline = sorted((run.path / "wandb").glob("offline-run-*"))
    if offline:
        out.print(f"  to W&B     wandb sync {run.path}/wandb/offline-run-*", highlight=False)
    return 0


def facts(run: Run) -> dict[str, str]:
    """What a run was and how it ended, in words."""
    manifest, config = run.manifest, run.config
    return {
        "experiment": f"{config.get('experiment')}, seed {config.get('seed_everything')}",
        "network": f"{short(config['model']['network'])}, {manifest.get('parameters', 0):,} parameters",
        "path": f"{short(config['model']['path'])} on t in {manifest.get('interval')}",
        "predicts": config["model"]["predicts"],
        "coupling": short(config["model"]["coupling"]),
        "data": short(config["data"]),
        "steps": f"{manifest.get('end_step', '?')} of {config['trainer']['max_steps']}, {duration(manifest)}",
        "machine": f"{manifest['hardware']['processes']} process(es), {manifest['hardware']['accelerator']}",
        "checkpoint": str(run.last_checkpoint or "none"),
        "error": manifest.get("error", ""),
    }


def main_report(argv: list[str]) -> int:
    """Summarise runs."""
    parser = Parser(
        "report",
        "A table of scores over runs that differ in their seed: mean, standard deviation, number of runs.",
    )
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, help="also write the summary as JSON: an expected.json")
    parser.add_argument("--expected", type=Path, help="a summary to stand beside the scores")
    options = parser.parse_args(argv)
    runs = [Run.open(path) for path in options.runs]
    if options.expected and not options.expected.is_file():
        raise FileNotFoundError(f"--expected {options.expected}: no such file")
    try:
        expected = read_json(options.expected) if options.expected else None
    except ValueError as error:
        raise ValueError(f"--expected {error}") from error
    summary(runs)  # refuses runs without scores
    print_scores(runs, expected)
    if options.out:
        command = ["fmlightning", "report", *argv]
        options.out.write_text(
            json.dumps({"command": " ".join(command), **summary(runs)}, indent=2) + "\n"
        )
        print(f"written: {options.out}")
    return 0


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean, standard deviation and values of every score over runs.

    Raises:
        ValueError: a run has no scores.
    """
    require_comparable(runs)
    scores = [run.evaluation.get("metrics") for run in runs]
    for run, found in zip(runs, scores, strict=True):
        if not found:
            raise ValueError(
                f"{run.path} has no evaluation.json: it was not trained to its end, or has no judges"
            )
    names = [n for n in (scores[0] or {}) if all(n in (s or {}) for s in scores)]
    columns = {name: [s[name] for s in scores if s] for name in names}
    return {
        "runs": [str(run.path) for run in runs],
        "config_hashes": sorted({run.manifest["config_hash"] for run in runs}),
        "versions": runs[0].manifest["versions"],
        "metrics": {
            name: {"mean": statistics.fmean(v), "std": spread(v), "n": len(v), "values": v}
            for name, v in columns.items()
        },
    }


def require_comparable(runs: Sequence[Run]) -> None:
    """Refuse to average runs that differ in more than their seed, or to count a seed twice."""
    kinds = {config_hash({**run.config, "seed_everything": None}) for run in runs}
    if len(kinds) > 1:
        raise ValueError(
            f"these {len(runs)} runs are of {len(kinds)} configs that differ in more than the seed: "
            "report one at a time (fmlightning ls shows them)"
        )
    seeds = [run.config["seed_everything"] for run in runs]
    twice = {seed for seed in seeds if seeds.count(seed) > 1}
    if twice:
        raise ValueError(
            f"seed {min(twice)} is there more than once: name each run once, and no <run>.1 kept aside"
        )


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation, or None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def print_scores(runs: Sequence[Run], expected: dict[str, Any] | None) -> None:
    """The scores of runs as a table, beside expected ones."""
    if len(runs) == 1 and not runs[0].evaluation:
        return
    table = Table("metric", "value", box=None)
    if expected:
        table.add_column("expected")
    for name, row in summary(runs)["metrics"].items():
        known = (expected or {}).get("metrics", {}).get(name)
        table.add_row(name, cell(row), *([cell(known) if known else ""] if expected else []))
    console().print(table)


def cell(row: dict[str, Any]) -> str:
    """A mean with its spread and number of runs, in as many digits as the spread bears."""
    if row["std"] is None:
        return f"{row['mean']:.4g}"
    digits = max(0, 1 - math.floor(math.log10(row["std"]))) if row["std"] > 0 else 3
    return f"{row['mean']:.{digits}f} ± {row['std']:.{digits}f} (n = {row['n']})"


def headline(run: Run) -> dict[str, float]:
    """The scores a list has room for: the model's, not those of real samples."""
    metrics = run.evaluation.get("metrics", {})
    return {
        k: v
        for k, v in metrics.items()
        if not k.endswith(("_real", "_std", "_low", "_high", "_floor", "nfe"))
    }


def short(component: Any) -> str:
    """A class and its options from a config, without the path of its module."""
    if not isinstance(component, dict) or "class_path" not in component:
        return str(component)
    arguments = component.get("init_args") or {}
    inner = ", ".join(f"{k}={short(v)}" for k, v in arguments.items() if v is not None)
    return f"{component['class_path'].rsplit('.', 1)[-1]}({inner})"


def duration(manifest: dict[str, Any]) -> str:
    if "end" not in manifest:
        return "no end recorded"
    seconds = datetime.fromisoformat(manifest["end"]) - datetime.fromisoformat(manifest["start"])
    return f"{seconds.total_seconds():.0f} s"


def console() -> Console:
    """A console that does not wrap where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 200)

"""`fmlightning show RUN`: one run on a page."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fmlightning.cli.argparser import Parser, console
from fmlightning.runs.checksum import recorded_step
from fmlightning.runs.directory import Run
from fmlightning.runs.segments import in_words
from fmlightning.studies.report.axes import called, short
from fmlightning.studies.report.records import ASIDE, ScoreRecord, evaluation_records, final_scores


def main(argv: list[str]) -> int:
    """Show one run."""
    parser = Parser(
        "show",
        "Print the facts of a run, its end, its scores, evaluations, checkpoints and images.",
    )
    parser.add_argument("run", help="run directory, or a checkpoint in one")
    run = Run.open(parser.parse_args(argv).run)
    try:
        rows = facts(run)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run.path} is damaged: config.yaml or manifest.json lacks {error}"
        ) from error
    out = console()
    out.print(f"[bold]{escape(str(run.path))}[/]  {run.status}")
    for name, value in rows.items():
        if value:
            fact(out, name, value)
    scores(out, run)
    evaluations(out, run)
    for name, path in files(run):
        fact(out, name, path)
    return 0


def fact(out: Console, name: str, value: str) -> None:
    out.print(f"  {name:11}{escape(value)}", highlight=False, soft_wrap=True)


def facts(run: Run) -> dict[str, str]:
    """Facts of a run and of its end, in words."""
    manifest, config = run.manifest, run.config
    return {
        "experiment": f"{config.get('experiment')}, seed {config.get('seed_everything')}",
        "network": f"{short(config['model']['network'])}, {manifest.get('parameters', 0):,} parameters",
        "path": f"{short(config['model']['path'])} on t in {manifest.get('interval')}",
        "objective": short(config["model"]["objective"]),
        "coupling": short(config["model"]["coupling"]),
        "data": short(config["data"]),
        "steps": f"{manifest.get('end_step', '?')} of {config['trainer']['max_steps']}, {duration(manifest)}",
        "resumed": in_words(manifest),
        "machine": f"{manifest['hardware']['processes']} process(es), {manifest['hardware']['accelerator']}",
        "commit": commit(manifest),
        "error": manifest.get("error", ""),
    }


def commit(manifest: dict[str, Any]) -> str:
    git = manifest.get("git") or {}
    dirty = ", with changes that were not committed" if git.get("dirty") else ""
    return f"{git['commit'][:12]}{dirty}" if git.get("commit") else ""


def duration(manifest: dict[str, Any]) -> str:
    if "end" not in manifest:
        return "no end recorded"
    seconds = datetime.fromisoformat(manifest["end"]) - datetime.fromisoformat(manifest["start"])
    return f"{seconds.total_seconds():.0f} s"


def scores(out: Console, run: Run) -> None:
    """The scores at the end of training, with their spread where there is one."""
    metrics = final_scores(run)
    if metrics:
        table = Table("metric", "value", box=None)
        for name, value in metrics.items():
            table.add_row(f"  {escape(name)}", f"{value:.4g}")
        out.print(table)


def evaluations(out: Console, run: Run) -> None:
    """The cells of `fmlightning evaluate`: the options in which they differ, and their scores."""
    records, wrong = evaluation_records(run, run.config.get("seed_everything", 0))
    if records:
        out.print(cell_table(records))
    for line in wrong:
        fact(out, "wrong", line)


def cell_table(records: list[ScoreRecord]) -> Table:
    axes = [a for a in records[0].options if len({str(r.options.get(a)) for r in records}) > 1]
    axes = axes or ["solver", "nfe"]
    hidden = (
        ASIDE if any(isinstance(r.options.get("nfe"), str) for r in records) else (*ASIDE, "nfe")
    )
    names = dict.fromkeys(n for r in records for n in r.metrics if not n.endswith(hidden))
    table = Table(*(f"  {a}" if k == 0 else a for k, a in enumerate(axes)), *names, box=None)
    for r in sorted(records, key=lambda r: (str(r.options["solver"]), r.metrics.get("nfe", 0))):
        values = [called(r.options.get(a)) for a in axes]
        numbers = [f"{r.metrics[n]:.4g}" if n in r.metrics else "" for n in names]
        table.add_row(f"  {escape(values[0])}", *map(escape, values[1:]), *numbers)
    return table


def files(run: Run) -> Iterator[tuple[str, str]]:
    """Paths of checkpoints and images are, and the command that sends the run to W&B."""
    for path in run.checkpoints:
        yield "checkpoint", f"{path}, {checkpoint_step(path)}, {path.stat().st_size / 1e6:.1f} MB"
    if not run.checkpoints:
        yield "checkpoint", "none"
    for folder in ("samples", "evaluations", "report"):
        yield from (("image", str(p)) for p in sorted((run.path / folder).glob("*.png")))
    if any((run.path / "wandb").glob("offline-run-*")):
        yield "to W&B", f"wandb sync {run.path}/wandb/offline-run-*"


def checkpoint_step(path: Path) -> str:
    step = recorded_step(path)
    return "damaged, or without a checksum" if step is None else f"step {step}"

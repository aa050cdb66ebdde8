"""Scores of a run and the options they were made with: at the end of training, and by `fmlightning evaluate`.

Options of an evaluation are axes as those of training are: solver, nfe, guidance, grid, ema, ... An adaptive solver's
nfe is the tolerance it was given, because how many evaluations that takes is an outcome, and a metric.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any

from fmlightning.runs.checksum import recorded_step
from fmlightning.runs.directory import Run, read_json
from fmlightning.runs.metrics_csv import read_columns
from fmlightning.studies.report.axes import Options, flat, short, split

FINAL, EVALUATIONS = "final", "evaluations"
ASIDE = ("_std", "_low", "_high", "_floor", "_real", "_se")
"""Endings of scores that stand beside others."""

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Methods whose steps follow from a tolerance; `flow.ode` has the same list, and torch."""

SETTLED = ("method", "num_steps", "rtol", "atol", "max_num_steps", "failed")
"""Settings of a solver that are other axes already, or change no sample."""


@dataclass(frozen=True)
class ScoreRecord:
    """Scores of one model under one way to sample it."""

    kind: str
    options: Options
    metrics: dict[str, float]
    extra: Options = field(default_factory=dict)
    """Options that follow from the others, and so are axes only when they are named."""
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)
    """By metric, as its class declares it: None where neither is better. Records of older versions lack it."""


def final_record(run: Run, config: dict[str, Any]) -> ScoreRecord | None:
    """Scores in evaluation.json and the last values in metrics.csv say, or None where there is neither."""
    found, scores = run.evaluation, final_scores(run)
    last = {
        name: points[-1][1]
        for name, points in read_columns(run.path / "metrics.csv").items()
        if points and not name.startswith("eval/")
    }
    if not scores and not last:
        return None
    configs = (config.get("evaluation") or {}).get("metrics") or []
    guidance = (config.get("model") or {}).get("guidance")
    settings = {"metric_configs": configs, "guidance": guidance, "solver": found.get("solver", "")}
    options = sampling(settings, scores.get("nfe")) if scores else {}
    return ScoreRecord(FINAL, options, last | scores, higher_is_better=declared(found))


def final_scores(run: Run) -> dict[str, float]:
    """The scores in evaluation.json, as numbers.

    Raises:
        ValueError: they are none.
    """
    try:
        return {k: float(v) for k, v in run.evaluation.get("metrics", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        file = run.path / "evaluation.json"
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from error


def evaluation_records(
    run: Run, seed: int, requested: bool = False
) -> tuple[list[ScoreRecord], list[str]]:
    """The cells in RUN/evaluations, and what is wrong with those that are not among them.

    Args:
        run: the run.
        seed: of the run.
        requested: whether to take only those that a sweep requested, where it has noted them.
    """
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    files, others = cell_files(run.path / "evaluations", requested)
    if others:
        wrong.append(f"{run.path}/evaluations: {others} left out, which the sweep did not request")
    for file in files:
        try:
            content = read_json(file)
            content["metrics"] = {k: float(v) for k, v in content["metrics"].items()}
            found.append(content | {"written": file.stat().st_mtime_ns})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            wrong.append(f"{file} is left out: {' '.join(str(error).split())}")
    steps = checkpoints_of(run, found)
    stale = [r for r in found if steps.get(str(r.get("checkpoint"))) is None]
    if stale:
        wrong.append(
            f"{run.path}/evaluations: {len(stale)} left out, of checkpoints that are no longer there"
        )
    kept = [(r, steps[str(r.get("checkpoint"))]) for r in found if r not in stale]
    read = [(record(r, step, seed), r["written"]) for r, step in kept]
    # a cell's file is named by all that it was computed from: one scored again may have another name
    newest = {same_options(r): r for r, _ in sorted(read, key=itemgetter(1))}
    if len(newest) < len(read):
        wrong.append(
            f"{run.path}/evaluations: {len(read) - len(newest)} left out, of options that were scored again later"
        )
    return [r for r, _ in read if newest[same_options(r)] is r], wrong


def same_options(record: ScoreRecord) -> str:
    return repr((sorted(record.options.items()), record.extra))


def cell_files(folder: Path, requested: bool) -> tuple[list[Path], int]:
    """The records in a directory, and how many others there are."""
    # older sweeps wrote asked-*.json
    notes = sorted([*folder.glob("request-*.json"), *folder.glob("asked-*.json")])
    files = [f for f in sorted(folder.glob("*.json")) if f.name != "evaluations.json"]
    files = [f for f in files if f not in notes]
    if not (requested and notes):
        return files, 0
    wanted = {str(name) for note in notes for name in read_json(note).get("files") or ()}
    kept = [f for f in files if f.name in wanted]
    return kept, len(files) - len(kept)


def record(content: dict[str, Any], step: Any, seed: int) -> ScoreRecord:
    """A cell of an evaluation."""
    nfe = content.get("nfe")
    noise = content.get("seed")
    options = {"checkpoint": step, **sampling(content, nfe)}
    options |= {"ema": content.get("ema"), "noise": "own" if noise == seed else noise}
    cost = {"nfe": nfe, "seconds_per_sample": content.get("seconds_per_sample")}
    metrics = content["metrics"] | {k: float(v) for k, v in cost.items() if v is not None}
    return ScoreRecord(
        EVALUATIONS, options, metrics, {"budget": content.get("budget")}, declared(content)
    )


def declared(content: dict[str, Any]) -> dict[str, bool | None]:
    """Which way each score is better, by a record.

    Raises:
        ValueError: it is neither true nor false nor null.
    """
    found = content.get("higher_is_better") or {}
    if not isinstance(found, dict) or any(v not in (True, False, None) for v in found.values()):
        raise ValueError(f"higher_is_better is {found}, and must be true, false or null by score")
    return found


def sampling(content: dict[str, Any], nfe: float | None) -> Options:
    """The options by which samples were made and scored."""
    solver = dict(written(str(content.get("solver", ""))))
    method = content.get("method") or solver.get("method", "").strip("'\"")
    options: Options = {"solver": method}
    if method in ADAPTIVE:
        options["nfe"] = f"tol {float(solver.get('rtol', 'nan')):g}"
    else:
        options["nfe"] = None if nfe is None else int(nfe)
    # what is off, an older version may not have known
    options |= {k: v for k, v in solver.items() if k not in SETTLED and v not in ("False", "None")}
    guidance = dict(content.get("guidance") or {})
    options["guidance"] = guidance.pop("scale", 1.0)
    if options["guidance"] != 1 or guidance.get("zero_until"):
        options |= dict(flat(guidance, "guidance"))
    if guide := content.get("guide_model", content.get("weaker")):
        options["guidance.guide_model"] = str(guide)[:8]
    options |= {name: content[name] for name in ("path", "labels") if content.get(name)}
    return options | {"metrics": short(content.get("metric_configs", content.get("judges")) or [])}


def written(text: str) -> Iterator[tuple[str, str]]:
    """The settings in the repr of an object, `Name(a=1, b=C(d=2))`: a and b."""
    for part in split(text[text.find("(") + 1 : text.rfind(")")]):
        name, equals, value = part.partition("=")
        if equals:
            yield name, value.removesuffix("()")


def checkpoints_of(run: Run, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The meaning of each digest in a run's records: 'last', or the step of another checkpoint that is there.

    Records of older versions have no step, and the digest of a file: it is read only where there are several.
    """
    steps = {str(r.get("checkpoint")): r.get("step") for r in records}
    if len(steps) < 2:
        return dict.fromkeys(steps, "last")
    files = {p: "last" if p.stem == "last" else recorded_step(p) for p in reversed(run.checkpoints)}
    at = {recorded_step(p): name for p, name in files.items()}
    named = {digest: at.get(step) for digest, step in steps.items() if step is not None}
    old = {file_digest(p): name for p, name in files.items()} if len(named) < len(steps) else {}
    return old | named


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

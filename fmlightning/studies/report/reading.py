"""Run directories into records: which there are, what each was trained with, and which cannot be used.

A `sweep.json` beside the runs says which options were varied on purpose, and which cells there should be. Without
one, the axes are the options in which the resolved configs differ, of those that change the result of training.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fmlightning.runs.config_hash import result_parts
from fmlightning.runs.directory import Run, folders, is_run, read_json, runs_root
from fmlightning.runs.segments import in_words
from fmlightning.studies.report.axes import Options, Value, flat, short
from fmlightning.studies.report.records import ScoreRecord, evaluation_records, final_record

PLAN = "sweep.json"
SWEEP = "sweep.yaml"
PAGE = "report.html"
COPY = re.compile(r"(.+?)(-reproduced|\.\d+)")
"""Names of runs that `fmlightning reproduce` and `--rerun` leave beside the first one."""


@dataclass(frozen=True)
class Trained:
    """A finished run, as far as a report needs it."""

    run: Run
    seed: int
    options: Options
    manifest: dict[str, Any]
    records: list[ScoreRecord]
    planned: Options = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedRun:
    """A run that is in no table, and why."""

    path: Path
    status: str
    why: str
    planned: Options = field(default_factory=dict)
    seed: Any = None


@dataclass
class FoundRuns:
    """Runs below the given paths.

    Attributes:
        trained: the runs to report.
        left_out: those that are not finished, or are damaged.
        axes: of sweep.json, with their values in its order.
        varied: the options that its cells set, and so differ in on purpose.
        notes: what a reader should know besides.
    """

    trained: list[Trained] = field(default_factory=list)
    left_out: list[SkippedRun] = field(default_factory=list)
    axes: dict[str, list[Value]] = field(default_factory=dict)
    varied: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlannedRun:
    """A run directory to read, with its cell in a plan."""

    path: Path
    cell: dict[str, Any] | None = None


def collect(paths: Sequence[str | Path]) -> FoundRuns:
    """All runs in, below or named by some paths.

    Raises:
        FileNotFoundError: a path does not exist, or there is no run in any.
        ValueError: a run is named twice, or none can be used.
    """
    found = FoundRuns()
    places = unique([place for path in paths for place in run_directories(Path(path), found)])
    if not places:
        raise FileNotFoundError(
            f"{', '.join(map(str, paths))} is not a run directory and has none below it: a run has a config.yaml; "
            "train one with fmlightning fit --config ..."
        )
    for place in without_copies(places, found.notes):
        read(place, found)
    if not found.trained:
        why = "; ".join(f"{x.path}: {x.why}" for x in found.left_out[:6])
        raise ValueError(f"there is nothing to report: {why}")
    found.notes += differing_versions(found.trained)
    return found


def run_directories(path: Path, found: FoundRuns) -> Iterator[PlannedRun]:
    """The run directories that one path stands for.

    Raises:
        FileNotFoundError: the path does not exist.
    """
    if path.name == PLAN and path.is_file():
        yield from planned(path, found)
    elif (path / SWEEP).is_file():
        yield from below(runs_of(path / SWEEP), found)
    elif is_run(path):
        yield PlannedRun(path)
    elif path.is_dir():
        yield from below(path, found)
    elif path.suffix == ".ckpt" or not path.exists():
        yield PlannedRun(Run.open(path).path)


def runs_of(sweep: Path) -> Path:
    """The directory of the runs of an experiment's sweep.

    Raises:
        FileNotFoundError: nowhere.
    """
    content = yaml.safe_load(sweep.read_text())
    folder = runs_root() / str(content.get("name") if isinstance(content, dict) else None)
    if not folder.is_dir():
        raise FileNotFoundError(f"{sweep} has no runs in {folder}: fmlightning sweep {sweep}")
    return folder


def below(root: Path, found: FoundRuns) -> Iterator[PlannedRun]:
    """The cells of a sweep, or all runs below a directory; not what an earlier report wrote."""
    if (root / PLAN).is_file():
        yield from planned(root / PLAN, found)
    elif not (root / PAGE).is_file():
        for path in folders(root):
            yield from [PlannedRun(path)] if is_run(path) else below(path, found)


def planned(file: Path, found: FoundRuns) -> Iterator[PlannedRun]:
    """The cells of a sweep.

    Raises:
        ValueError: its file is damaged.
    """
    plan = read_json(file)
    try:
        cells = [(Path(cell["run"]), cell) for cell in plan["cells"]]
        axes = {name: list(values) for name, values in (plan.get("axes") or {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__} {error}") from error
    for name, values in axes.items():
        known = found.axes.setdefault(name, [])
        known += [v for v in map(value, values) if v not in known]
    found.varied |= {name for _, cell in cells for name in cell.get("options") or {}}
    paths = {resolved(path, file).resolve() for path, _ in cells}
    others = [p for p in folders(file.parent) if is_run(p) and p.resolve() not in paths]
    if others:
        found.notes.append(
            f"{len(others)} runs in {file.parent} are in no cell of {PLAN} and left out"
        )
    for path, cell in cells:
        yield PlannedRun(resolved(path, file), cell)


def resolved(path: Path, plan: Path) -> Path:
    """The directory of a cell, also where the sweep was moved after it was run."""
    for candidate in (path, plan.parent / path, plan.parent / path.name):
        if candidate.is_dir():
            return candidate
    return path


def value(component: Any) -> Value:
    """The name of an axis' value in a plan."""
    plain = component is None or isinstance(component, str | int | float | bool)
    return component if plain else short(component)


def unique(places: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each directory once, with its cell where a plan has one.

    Raises:
        ValueError: a run is named twice.
    """
    found: dict[Path, PlannedRun] = {}
    for place in places:
        key, known = place.path.resolve(), found.get(place.path.resolve())
        if known and known.cell is None and place.cell is None:
            raise ValueError(
                f"{place.path} is named twice, so its seed {seed_of(place.path)} would count twice: name it once"
            )
        found[key] = place if known is None or known.cell is None else known
    return list(found.values())


def seed_of(path: Path) -> Any:
    return Run(path).config.get("seed_everything")


def without_copies(places: Sequence[PlannedRun], notes: list[str]) -> list[PlannedRun]:
    """All but what `reproduce` and `--rerun` left beside a run that is here too."""
    here = {place.path.resolve() for place in places}
    kept = []
    for place in places:
        name = COPY.fullmatch(place.path.name)
        if place.cell is None and name and place.path.with_name(name[1]).resolve() in here:
            notes.append(f"{place.path} is left out: it is a copy of the run beside it")
        else:
            kept.append(place)
    return kept


def read(place: PlannedRun, found: FoundRuns) -> None:
    """Add a run to those that are reported, or to those left out."""
    cell = place.cell or {}
    axes = {name: value(v) for name, v in (cell.get("axes") or {}).items()}
    status, why = str(cell.get("status", "corrupt")), str(cell.get("error") or "")
    try:
        run = Run(place.path)
        require_finished(run, status, why)
        status = "corrupt"
        trained, wrong = whole(run, axes, place.cell is not None)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        known = run.manifest.get("status") if isinstance(error, Unfinished) else status
        found.left_out.append(
            SkippedRun(place.path, known or status, one_line(error), axes, cell.get("seed"))
        )
    else:
        found.trained.append(trained)
        found.notes += wrong
        if cell and cell.get("status") != "finished":
            words = f"{place.path} is trained, and its evaluation is {cell.get('status')}"
            found.notes.append(f"{words}: {why}" if why else words)


class Unfinished(ValueError):
    """A run has not come to its end."""


def require_finished(run: Run, planned: str, why: str) -> None:
    """Refuse a run that is not finished or not there.

    Raises:
        Unfinished: with the error that ended it, where one is known.
        ValueError: it is corrupt.
    """
    if not run.path.is_dir():
        raise Unfinished(f"it is {planned}" + (f": {why}" if why else ""))
    if not (run.path / "config.yaml").is_file():
        raise ValueError("it has no config.yaml")
    if run.status != "finished":
        why = run.manifest.get("error") or why
        raise Unfinished(f"it is {run.status} and not finished" + (f": {why}" if why else ""))


def one_line(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, KeyError):
        return f"it is damaged: config.yaml or manifest.json lacks {error}"
    return " ".join(str(error).split())


def whole(run: Run, axes: Options, planned: bool) -> tuple[Trained, list[str]]:
    """A finished run with its records.

    Raises:
        ValueError: a file is damaged, or there is nothing to report.
    """
    config, manifest = run.trained_config, run.manifest
    seed = int(config["seed_everything"])
    final = final_record(run, config)
    cells, wrong = evaluation_records(run, seed, requested=planned)
    records = ([final] if final else []) + cells
    if not records:
        raise ValueError("it has no evaluation.json, no evaluations and no metrics.csv: no scores")
    parts = {k: v for k, v in result_parts(config).items() if k != "seed_everything"}
    options = dict(flat(parts))
    if resumed := in_words(manifest):
        options["resumed"] = resumed  # an axis: such a run stands beside its like alone
    return Trained(run, seed, options, manifest, records, axes), wrong


def differing_versions(trained: Sequence[Trained]) -> list[str]:
    """Packages of which the runs did not all have the same version."""
    lines = []
    for name in dict.fromkeys(n for t in trained for n in t.manifest.get("versions", {})):
        seen = {json.dumps(t.manifest.get("versions", {}).get(name)) for t in trained}
        if len(seen) > 1:
            lines.append(f"{name} {' and '.join(sorted(seen))}".replace('"', ""))
    return [f"the runs had different versions: {', '.join(lines)}"] if lines else []

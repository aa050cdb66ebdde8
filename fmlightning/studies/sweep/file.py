"""The file of a sweep: what is compared, and what is wrong with it as text.

name: digits_paths                  # runs go to runs/<name>/<hash of config>-s<seed>
configs: [configs/images/digits.yaml]
set: {trainer.max_steps: 700}       # any options, for all cells
axes:                               # training axes; the cells are their product
  model.path: [Linear, VariancePreserving]
  method:                           # settings that move together, by their label
    I-CFM: {model.coupling: Independent}
    OT-CFM: {model.coupling: MinibatchOT}
samples: {n: 8, method: sobol, model.optimizer.lr: {log_uniform: [1.0e-4, 1.0e-2]}}
seeds: [0, 1, 2]
exclude: [{model.path: VariancePreserving, method: OT-CFM, seed: [1, 2]}]
evaluate:                           # options of `fmlightning evaluate`, from each checkpoint
  solvers: [euler, heun2, dopri5]
  nfe: [4, 8, 16]
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fmlightning.cli.config_files import check, read
from fmlightning.runs.directory import NAME
from fmlightning.studies.report.axes import split
from fmlightning.studies.sweep.samples import SAMPLING, sampled

KEYS = ("name", "configs", "set", "axes", "samples", "seeds", "exclude", "evaluate")
EVALUATE = (
    "solvers", "nfe", "tolerances", "grids", "guidance.scale", "ema", "metrics", "labels", "batch_size", "seed",
    "device", "reference", "path",
)  # fmt: skip
LISTS = ("solvers", "nfe", "tolerances", "grids", "guidance.scale", "ema", "metrics")
OWN = {
    "seed_everything": "seeds", "experiment": "name", "run_dir": "name", "config": "configs",
    "ckpt_path": None, "rerun": None,
}  # fmt: skip
"""Options that a sweep sets itself, and the key that stands for them."""

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Level:
    """A value of an axis: what it is called, by axis, and what it sets."""

    label: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """An option or label that is varied, with its values."""

    name: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Sweep:
    """A file that was read.

    Attributes:
        content: the file, as it stands.
        configs: the base configs, as paths that exist.
        settings: options for all cells.
        axes: of training, the sampled one last.
        evaluate: options of `fmlightning evaluate`; empty for none.
    """

    path: Path
    content: dict[str, Any]
    name: str
    configs: tuple[str, ...]
    settings: dict[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    exclude: tuple[dict[str, list[Any]], ...]
    evaluate: dict[str, Any]


def read_sweep(path: str | Path) -> Sweep:
    """Read a file.

    Raises:
        ValueError: what is wrong with it, in one line.
    """
    try:
        return understood(Path(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def understood(path: Path) -> Sweep:
    content = numbers(read(str(path)))
    check(content)
    require_known(content, KEYS, "")
    kinds = {"set": dict, "axes": dict, "samples": dict, "evaluate": dict, "seeds": list, "exclude": list}  # fmt: skip
    for key, kind in kinds.items():
        value = content.get(key)
        if value is not None and not isinstance(value, kind):
            words = "a list such as [a, b]" if kind is list else "a mapping such as {option: value}"
            raise ValueError(f"{key}: {value} must be {words}")
    axes = tuple(axis(str(n), v) for n, v in (content.get("axes") or {}).items())
    if content.get("samples") is not None:
        axes += (sampled_axis(content["samples"]),)
    sweep = Sweep(
        path,
        content,
        name_of(content),
        configs_of(content, path),
        content.get("set") or {},
        axes,
        seeds_of(content),
        tuple(exclusion(rule) for rule in content.get("exclude") or ()),
        evaluate_of(content),
    )
    require_consistent(sweep)
    return sweep


def numbers(value: Any) -> Any:
    """With 1e-4 as a number, which YAML 1.1 takes for text."""
    if isinstance(value, dict):
        return {key: numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def require_known(given: dict[str, Any], known: Sequence[str], place: str) -> None:
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{place}{key}: unknown key; {hint}known: {', '.join(known)}")


def name_of(content: dict[str, Any]) -> str:
    name = content.get("name")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise ValueError(
            f"name: {name} must be letters, digits, '.', '_' and '-', and start with a letter or digit: it is the "
            "folder of the runs"
        )
    return name


def configs_of(content: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The base configs: from the current directory, or else beside the file."""
    given = content.get("configs")
    if not (isinstance(given, list) and given and all(isinstance(name, str) for name in given)):
        raise ValueError(
            f"configs: {given} must be a list of files, such as [configs/toy/moons.yaml]"
        )
    found = []
    for name in given:
        places = (Path(name), path.parent / name)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise ValueError(f"configs: {name}: no such file, here or beside {path.name}")
        try:
            check(read(str(file)))
        except ValueError as error:
            raise ValueError(f"configs: {name}: {error}") from error
        found.append(str(file))
    return tuple(found)


def seeds_of(content: dict[str, Any]) -> tuple[int, ...]:
    seeds = content.get("seeds", [0])
    if not seeds:
        raise ValueError("seeds: the list is empty; give at least one, such as [0]")
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"seeds: {seed} must be a whole number from 0 to {2**32 - 1}")
        if seeds.count(seed) > 1:
            raise ValueError(f"seeds: {seed} stands twice")
    return tuple(seeds)


def axis(name: str, values: Any) -> Axis:
    """An option with its values, or settings that move together with their labels."""
    place = f"axes.{name}"
    if name == "seed":
        raise ValueError(
            f"{place}: is the name of the seeds: give them in seeds, or this axis another name"
        )
    if not values or not isinstance(values, list | dict):
        words = "is empty" if isinstance(values, list | dict) else f"{values} is one value"
        raise ValueError(
            f"{place}: {words}; give a list of values, or a mapping {{label: {{option: value}}}}"
        )
    if isinstance(values, list):
        levels = [Level({name: label_of(v)}, {name: v}) for v in values]
    else:
        levels = [
            Level({name: name_for(k, place)}, settings(v, f"{place}.{k}"))
            for k, v in values.items()
        ]
    labels = [str(level.label[name]) for level in levels]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ValueError(f"{place}: {twice} stands twice")
    return Axis(name, tuple(levels))


def name_for(label: Any, place: str) -> str:
    """A label as it was typed."""
    if isinstance(label, bool) or label is None:
        raise ValueError(
            f"{place}: YAML reads a label as {str(label).lower()}, as which it takes yes, no, on, off and ~: "
            "put it in quotes"
        )
    if len(list(split(str(label)))) > 1:
        raise ValueError(
            f"{place}: {label!r} has a comma, with which lists of labels are written in --where and --baseline: "
            "leave it out, or put it in brackets"
        )
    return str(label)


def same_label(one: Any, other: Any) -> bool:
    """Compare two values of an axis: a number that is a label of settings is text."""
    return bool(one == other or str(one) == str(other))


def settings(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: {value} must be a mapping of options, such as {{model.path: Linear}}"
        )
    return value


def label_of(value: Any) -> Any:
    """A value as it stands in a table: a class by its short name and its arguments."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = value.get("init_args") or {}
        inner = ", ".join(f"{k}={label_of(v)}" for k, v in arguments.items())
        return str(value["class_path"]).rsplit(".", 1)[-1] + (f"({inner})" if inner else "")
    return str(value) if isinstance(value, dict | list) else value


def sampled_axis(content: dict[str, Any]) -> Axis:
    options = [key for key in content if key not in SAMPLING]
    levels = tuple(Level(point, point) for point in sampled(content))
    return Axis(", ".join(options), levels)


def exclusion(rule: Any) -> dict[str, list[Any]]:
    """Which labels, by axis, a rule leaves out."""
    if not isinstance(rule, dict) or not rule:
        raise ValueError(
            f"exclude: {rule} must be a mapping such as {{model.path: Linear, seed: 1}}"
        )
    return {
        str(name): [label_of(v) for v in (value if isinstance(value, list) else [value])]
        for name, value in rule.items()
    }


def evaluate_of(content: dict[str, Any]) -> dict[str, Any]:
    """The options of evaluate, each list with something in it."""
    found = content.get("evaluate") or {}
    if "guidance.guide_model" in found:
        raise ValueError(
            "evaluate.guidance.guide_model: a sweep does not know when another run changes; leave it out, and call "
            "fmlightning evaluate RUN --guidance.guide_model OTHER for its runs"
        )
    require_known(found, EVALUATE, "evaluate.")
    for key in LISTS:
        if key in found and not (isinstance(found[key], list) and found[key]):
            raise ValueError(f"evaluate.{key}: {found[key]} must be a list with at least one value")
    return found


def require_consistent(sweep: Sweep) -> None:
    """Refuse options that two places set, and exclusions of what is not there."""
    owner: dict[str, str] = dict.fromkeys(sweep.settings, "set")
    for each in sweep.axes:
        for option in {option for level in each.levels for option in level.options}:
            if option in owner:
                raise ValueError(
                    f"{option} is set by {owner[option]} and by axes.{each.name}: remove one"
                )
            owner[option] = f"axes.{each.name}"
    for option, place in owner.items():
        if option in OWN:
            use = f"use {OWN[option]}" if OWN[option] else "a sweep resumes by itself"
            raise ValueError(f"{place}: {option} is set by the sweep; {use}")
    labels: dict[str, list[Any]] = {"seed": list(sweep.seeds)}
    for each in sweep.axes:
        for level in each.levels:
            for name, label in level.label.items():
                labels.setdefault(name, []).append(label)
    for rule in sweep.exclude:
        require_known(rule, tuple(labels), "exclude.")
        for name, excluded in rule.items():
            for label in excluded:
                if not any(same_label(label, known) for known in labels[name]):
                    shown = ", ".join(map(str, labels[name]))
                    raise ValueError(
                        f"exclude.{name}: {label} is not one of its values; they are {shown}"
                    )

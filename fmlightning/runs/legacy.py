"""Names of earlier versions: a saved run or export is read under the names of today, one's own config is corrected.

A rename is one line in `OPTIONS`, `CLASSES` or `ARGUMENTS`. Classes are found by the last part of their path, in the
tables of the facades: the file in which a class lies may change, and so may its name.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

Config = dict[str, Any]

OPTIONS = {
    # an option as it was -> as it is, from the top of a config or as a command spells it
    "model.label_drop": "model.class_dropout_prob",
    "model.predicts": "model.objective.prediction",
    "model.weight": "model.objective.weighting",
    "model.ahead": "model.prefetch",
    "model.guidance.interval": "model.guidance.t_range",
    "model.guidance.weaker": "model.guidance.guide_model",
    "guidance.interval": "guidance.t_range",
    "guidance.weaker": "guidance.guide_model",
    "weaker": "guidance.guide_model",
    "evaluation.judges": "evaluation.metrics",
    "judges": "metrics",
}

CLASSES = {
    "ScatteredGaussians": "RandomGaussianMixture",
    "Given": "PairedSource",
    "ListedGrid": "CustomGrid",
    "Neighbours": "KNNAccuracy",
}

ARGUMENTS = {
    # the arguments of a class, by its name of today; those of every class under ""
    "": {"margin": "t_eps", "interval": "t_range"},
    "IndependentCFM": {"s": "noise_std"},
    "SchrodingerBridge": {"s": "noise_std"},
    "SchrodingerBridgeCoupling": {"s": "noise_std"},
    "LatentData": {"drawn": "sample_posterior"},
}

ONLY_CLASSES = {
    "objective": "fmlightning.flow.MaximumLikelihood",
    "solver": "fmlightning.flow.ODESolver",
}
"""Options of the model that take a class, and had one alone."""

FACADES = ("flow", "nets", "data", "metrics", "training")
"""The packages that name the public classes; read by name, since they stand above this one."""

OBJECTIVE = {"predicts": "prediction", "weight": "weighting"}
"""Options of the model that are now its objective's."""

MARKS = ("manifest.json", "model.safetensors")
"""Beside one of these, a config is that of a saved run or export."""

noted: list[str] = []
"""The file that the one note was about."""


def is_saved(config: Path) -> bool:
    """Test whether a config file is that of a run or an export."""
    return any((config.parent / name).is_file() for name in MARKS)


def translate(config: Config, place: str | Path) -> Config:
    """The config of a saved run or export, under the names of today.

    Args:
        place: its file, for the note that is printed the first time that a name is an older one.
    """
    found: Config = in_classes(config)
    if isinstance(found.get("model"), dict):
        found["model"] = with_objects(found["model"])
    for old, new in OPTIONS.items():
        move(found, old.split("."), new.split("."))
    if found != config:
        note(str(place))
    return found


def in_classes(value: Any) -> Any:
    """A copy of a config in which classes and their arguments have the names of today."""
    if isinstance(value, list):
        return [in_classes(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: in_classes(each) for key, each in value.items()}
    if isinstance(path := found.get("class_path"), str):
        found["class_path"] = class_path(path)
        if isinstance(arguments := found.get("init_args"), dict) and path.startswith(
            "fmlightning."
        ):
            names = arguments_of(found["class_path"])
            found["init_args"] = {names.get(key, key): each for key, each in arguments.items()}
    return found


def arguments_of(path: str) -> dict[str, str]:
    """The arguments of a class that were renamed."""
    return ARGUMENTS[""] | ARGUMENTS.get(path.rsplit(".", 1)[-1], {})


def class_path(path: str) -> str:
    """The public path of a class of this package, whose name or file was another one; any other path as it is."""
    package, *inner = path.split(".")
    if package != "fmlightning" or len(inner) < 2:
        return path
    name = CLASSES.get(inner[-1], inner[-1])
    # first where it was: two rooms may each have a class of that name
    for room in sorted(FACADES, key=lambda each: each != inner[0]):
        if name in import_module(f"fmlightning.{room}").__all__:
            return f"fmlightning.{room}.{name}"
    return path


def with_objects(model: Config) -> Config:
    """The options of a model whose objective and solver are objects, of a class with arguments.

    Conditional flow matching was null, its prediction and weighting the model's. Maximum likelihood, which has neither,
    was the one other objective and an ODE solver the one solver: their arguments had no class above them.
    """
    found, inside = dict(model), {}
    for old, new in OBJECTIVE.items():
        if old in found:
            inside[new] = found.pop(old)
    if inside and found.get("objective") is None:
        found["objective"] = {"class_path": "fmlightning.flow.CFM", "init_args": inside}
    for name, only in ONLY_CLASSES.items():
        if isinstance(arguments := found.get(name), dict) and "class_path" not in arguments:
            found[name] = {"class_path": only, "init_args": arguments}
    return found


def move(config: Config, old: list[str], new: list[str]) -> None:
    """Put the value of an option, if it is there, under its new name, which only differs in the last part."""
    *groups, name = old
    for group in groups:
        config = config.get(group) or {}
        if not isinstance(config, dict):
            return
    if name in config and old[:-1] == new[:-1]:
        # in its old place: the order of options is that of a file people read
        items = [(new[-1] if key == name else key, value) for key, value in config.items()]
        config.clear()
        config.update(items)


def renamed(option: str) -> str | None:
    """The new name of an option, or None where it never had another; without the dashes of a command line."""
    return OPTIONS.get(option)


def note(place: str) -> None:
    """Print, once a process and by the first one alone, that older names were read."""
    if noted or any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK")):
        return
    noted.append(place)
    print(
        f"note: {place} is of an earlier version; its options are read under their names of today",
        file=sys.stderr,
    )

"""The one process of a sweep that loads torch before anything is trained.

It reads a request from its standard input, and answers with the directory of each run, or with the first thing that
is wrong: an option that does not exist, a value of a wrong type, a solver that is unknown.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from typing import Any

import torch

from fmlightning.cli.allowed import allowing
from fmlightning.cli.build import instantiate_data, instantiate_model
from fmlightning.cli.errors import is_users
from fmlightning.cli.flow_cli import FlowCLI
from fmlightning.cli.messages import at_work, located
from fmlightning.cli.quiet import quiet
from fmlightning.data.module import FlowData
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.metrics.evaluator import check_metrics
from fmlightning.nets.size import parameter_count
from fmlightning.runs.directory import run_directory
from fmlightning.studies.evaluate.command import parse
from fmlightning.studies.evaluate.grid import budgets
from fmlightning.studies.evaluate.scoring import instantiate_metrics, plain
from fmlightning.studies.sweep.plan import Request

LARGE = 50_000_000
"""Parameters of a network that is not built to be checked alone."""


class ConfigOnlyCLI(FlowCLI):
    """The command line of `fit`, as far as its resolved config."""

    def before_instantiate_classes(self) -> None:
        self.resolve()

    def instantiate_classes(self) -> None:
        """Nothing."""

    def run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def main() -> int:
    """Answer the request on standard input."""
    request: Request = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        found = answer(request)
    json.dump(found, sys.stdout)
    return 0


def answer(request: Request) -> dict[str, Any]:
    """Answer a request, as far as nothing is wrong."""
    found: dict[str, Any] = {"gpus": torch.cuda.device_count(), "scores": 0, "cells": []}
    with quiet(), allowing(request["allow"]):
        try:
            options = None
            if request["evaluate"] is not None:
                options, found["scores"] = evaluation(request["evaluate"])
            for cell in resolved(request, options):
                found["cells"].append(cell)
        except Exception as error:
            if not is_users(error):
                raise
            found["error"] = " ".join(str(error).split())
    return found


def evaluation(arguments: list[str]) -> tuple[Any, int]:
    """The options of `fmlightning evaluate`, each of them understood, and the number of their cells."""
    try:
        options = parse(["RUN", *arguments])
        count = sum(len(budgets(ODESolver(), method, options)) for method in options.solvers)
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error
    return options, count * len(options.guidance.scale or [1]) * len(options.ema)


def resolved(request: Request, options: Any) -> Iterator[dict[str, Any]]:
    """For each combination of the axes its length, and its directory for each seed."""
    reading: ConfigOnlyCLI | None = None
    for arguments in request["combinations"]:
        words = ["fit", *arguments]
        if reading is None:
            reading = ConfigOnlyCLI(words)
        else:
            reading.parse_arguments(reading.parser, words)
            reading.resolve()
        config = reading.resolved
        data = check_built(config)
        if options is not None:
            check_scored(config, options, data)
        yield {
            "max_steps": config["trainer"]["max_steps"],
            "metrics": (config.get("evaluation") or {}).get("metrics") or [],
            "runs": [str(run_directory(config | {"seed_everything": s})) for s in request["seeds"]],
        }


def check_built(config: dict[str, Any]) -> FlowData | None:
    """Refuse what the classes refuse, as `fit` would before training.

    Returns:
        The data, where their files are here.

    Raises:
        ValueError: an argument that has the right type and a wrong value, or two that do not suit each other.
    """
    try:
        data: FlowData | None = None
        with suppress(OSError):  # the files may be where the training will be
            data = instantiate_data(config)
        if is_large(config):
            return data
        model = instantiate_model(config)
        with suppress(OSError):
            if data is not None:
                model.check(data)
    except ValueError as error:
        raise ValueError(located(str(error), config, at_work(error))) from error
    return data


def is_large(config: dict[str, Any]) -> bool:
    """Estimate on the meta device whether the weights take seconds and gigabytes to build."""
    with suppress(Exception), torch.device("meta"):
        return parameter_count(instantiate_model(config).network) > LARGE
    return False


def check_scored(config: dict[str, Any], options: Any, data: FlowData | None) -> None:
    """Refuse an evaluation that could only fail after training."""
    requested = plain(options.metrics or (config.get("evaluation") or {}).get("metrics") or [])
    if not requested:
        raise ValueError(
            "evaluate: there is no metric: set evaluation.metrics in the config, or evaluate.metrics here"
        )
    if any(w != 1 for w in options.guidance.scale or ()) and not config["model"].get(
        "class_dropout_prob"
    ):
        raise ValueError(
            f"evaluate.guidance.scale: {options.guidance.scale} needs a model that was trained without labels too: "
            "model.class_dropout_prob > 0"
        )
    metrics = []
    with suppress(ValueError):  # the weights they need may be where the scoring will be
        metrics = instantiate_metrics(requested)
    with suppress(OSError):
        if data is not None:
            try:
                check_metrics(metrics, data)
            except ValueError as error:
                raise ValueError(f"evaluate: {error}") from error


if __name__ == "__main__":
    sys.exit(main())

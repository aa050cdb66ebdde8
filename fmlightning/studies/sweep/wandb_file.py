"""A sweep as the file that `wandb sweep` takes: its training axes, and the command that an agent starts for a cell.

An agent puts `--option=value` for `${args}`. Values that are neither words nor numbers are written as JSON, which is
what they would be on the command line. Settings that move together become overlays: configs beside the file, of which
`--config` names one. The runs of listed values have the directories that `fmlightning sweep` would give them, so the
same sweep file afterwards computes the scores of its evaluation axes from them. Sampled values are drawn by W&B, as
many as there are cells here.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fmlightning.cli.allowed import named
from fmlightning.runs.files import write_text
from fmlightning.studies.sweep.cells import cells, fit_arguments, shown
from fmlightning.studies.sweep.file import Axis, Sweep
from fmlightning.studies.sweep.samples import SAMPLING

WANDB_DISTRIBUTIONS = {
    "uniform": "uniform",
    "log_uniform": "log_uniform_values",
    "integers": "int_uniform",
}


def export(sweep: Sweep, out: Path) -> list[Path]:
    """Write the file, and the overlays that it names; returns all of them.

    Raises:
        ValueError: W&B has no word for an exclusion, or two overlays would be one file.
    """
    if sweep.exclude:
        raise ValueError(
            f"{sweep.path}: exclude: W&B's sweeps have no exclusions: leave them out, or write two sweeps"
        )
    files = overlays([axis for axis in listed(sweep) if together(axis)], out)
    content = {
        "name": sweep.name,
        "program": "fmlightning",
        **method(sweep),
        "parameters": parameters(sweep, list(files)),
        "command": command(sweep),
    }
    for path, options in {out: content, **files}.items():
        write_text(path, yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
    return [out, *files]


def method(sweep: Sweep) -> dict[str, Any]:
    """Order and number of W&B's cells: a grid has an end of its own."""
    if not sweep.content.get("samples"):
        return {"method": "grid"}
    return {"method": "random", "run_cap": len(cells(sweep))}


def listed(sweep: Sweep) -> tuple[Axis, ...]:
    """The axes whose values are listed; the sampled one is the last."""
    return sweep.axes[:-1] if sweep.content.get("samples") else sweep.axes


def together(axis: Axis) -> bool:
    """Check whether the values of an axis set something else than the option it is named after."""
    return any(set(level.options) != {axis.name} for level in axis.levels)


def overlays(axes: Sequence[Axis], out: Path) -> dict[Path, dict[str, Any]]:
    """For each combination of such axes a config, by their labels."""
    files: dict[Path, dict[str, Any]] = {}
    for levels in product(*(axis.levels for axis in axes)) if axes else ():
        labels = "-".join(str(label) for level in levels for label in level.label.values())
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in labels)
        options = {o: v for level in levels for o, v in level.options.items()}
        path = out.with_name(f"{out.stem}-{safe}.yaml")
        if path in files:
            raise ValueError(
                f"two labels would be one file, {path}, of which {labels} is the second: rename it"
            )
        files[path] = options
    return files


def parameters(sweep: Sweep, files: Sequence[Path]) -> dict[str, Any]:
    """The axes in W&B's words."""
    found: dict[str, Any] = {"config": {"values": [str(file) for file in files]}} if files else {}
    for axis in listed(sweep):
        if not together(axis):
            found[axis.name] = {"values": [word(level.options[axis.name]) for level in axis.levels]}
    for option, distribution in (sweep.content.get("samples") or {}).items():
        if option not in SAMPLING:
            kind, (low, high) = next(iter(distribution.items()))
            found[option] = {"distribution": WANDB_DISTRIBUTIONS[kind], "min": low, "max": high}
    return found | {"seed_everything": {"values": list(sweep.seeds)}}


def word(value: Any) -> Any:
    """A value as it has to stand behind `=`, where an agent would write Python's words."""
    return value if type(value) in (int, float, str) else shown(value)


def command(sweep: Sweep) -> list[str]:
    """The command that an agent starts: a training that scores its model at the end."""
    allow = [f"--allow={module}" for module in named.get()]
    words = [*fit_arguments(sweep, {}), "--evaluation.at_end=true", "--ckpt_path=auto"]
    return ["${env}", "fmlightning", "fit", *allow, *words, "${args}"]

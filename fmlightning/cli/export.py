"""`fmlightning export RUN --out DIR`: a trained network as files that plain torch reads.

    DIR/model.safetensors   the weights, by default the averaged ones; no code; its header describes the samples
    DIR/config.yaml         the config of the run
    DIR/README.md           how to load them

`fmlightning.load(DIR)` gives the field back, as `fmlightning.load(RUN)` does.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmlightning.cli.argparser import Parser
from fmlightning.runs.directory import Run
from fmlightning.runs.files import atomic_folder
from fmlightning.runs.weights import EXPORTED, read_weights

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """Write the weights of a trained network (safetensors), its config and a README into a new directory.
fmlightning.load(DIR) gives the velocity field back, and fit --init_from DIR starts from it."""

README = """\
# {title}

A velocity field, trained by `fmlightning {version}` for {step} steps ({kind} weights), that carries {source} at t = 0
to data of shape {shape} at t = 1.

    import torch, fmlightning

    field = fmlightning.load("{folder}")     # a torch.nn.Module in evaluation mode
    x, t = torch.randn(16, {sizes}), torch.full((16,), 0.5)
    v = field(x, t)                          # the velocity at x and t, t in [0, 1]{label}

The weights alone, for a network of your own of the same layout:

    from safetensors.torch import load_file

    network.load_state_dict(load_file("{folder}/{file}"))

{units}They are of `model.network` in config.yaml, trained by `model.objective` along the path `model.path`.
"""

UNITS = """\
The flow sees its data standardised: data = mean + std * x, column by column, with

    mean = {mean}
    std = {std}

"""


def main(argv: list[str]) -> int:
    """Parse the command line, write, and say how to load it."""
    parser = Parser("export", DESCRIPTION)
    parser.add_argument("run", help="run directory, or a checkpoint in one")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_flag("--ema", "averaged weights; --no_ema: raw ones", default=True)
    options = parser.parse_args(argv)
    export(options.run, options.out, options.ema)
    print(f'written: {options.out}; in Python: fmlightning.load("{options.out}")')
    return 0


def export(run: str | Path, out: Path, ema: bool = True) -> None:
    """Write a trained network into a new directory, whole or not at all.

    Raises:
        FileNotFoundError: there is no such run, or no checkpoint in it.
        ValueError: the directory holds something, or the run has no such weights.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty directory: name a new one")
    opened = Run.open(run)
    weights, record = read_weights(run, ema)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        write(folder, weights, record)
        shutil.copy(opened.path / "config.yaml", folder / "config.yaml")
        (folder / "README.md").write_text(readme(opened, out, record))


def write(folder: Path, weights: dict[str, "Tensor"], record: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    # copies: safetensors refuses tensors that share memory
    tensors = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / EXPORTED, {"format": "pt", "fmlightning": json.dumps(record)})


def readme(run: Run, out: Path, record: dict[str, Any]) -> str:
    from fmlightning import __version__

    flow = record["flow"]
    shape = flow["event_shape"]
    source = run.config["model"].get("source") or {}
    name = str(source.get("class_path", source)).rsplit(".", 1)[-1]
    classes = flow["num_classes"]
    return README.format(
        title=run.path.name,
        version=__version__,
        step=record.get("step", "some"),
        kind="averaged" if record["ema"] else "raw",
        source="the x0 of its data" if flow.get("paired") else name,
        shape=tuple(shape),
        folder=out,
        sizes=", ".join(map(str, shape)),
        label=f"; field(x, t, y) for classes y in 0 ... {classes - 1}" if classes else "",
        file=EXPORTED,
        units=UNITS.format(**flow["units"]) if flow.get("units") else "",
    )

"""Pictures of the theory, from exact velocities: nothing is trained.

python experiments/seed_gallery/gallery.py [--out DIR] [--only NAME ...]
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pictures import comparison, continuity, couplings, density, flow_map, ode_sde, paths
from pictures.scene import Detail, Film, snapshot
from rich.progress import Progress

Draw = Callable[[Detail], Iterator[tuple[str, Figure | Film]]]

PICTURES: dict[str, Draw] = {
    "paths": paths.draw,
    "density": density.draw,
    "flow_map": flow_map.draw,
    "comparison": comparison.draw,
    "continuity": continuity.draw,
    "ode_sde": ode_sde.draw,
    "couplings": couplings.draw,
}


def make(names: Iterable[str], out: Path, detail: Detail) -> Iterator[Path]:
    """Draw pictures into a folder, one file at a time."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for file, picture in PICTURES[name](detail):
            save(picture, out / file, detail.dpi)
            yield out / file


def save(picture: Figure | Film, file: Path, dpi: int) -> None:
    if isinstance(picture, Film):
        picture.save(file)
    else:
        # 256 colours are enough for these pictures and take half the space
        image = snapshot(picture, dpi)
        image.quantize(palette=image.quantize(256)).save(file, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # so small are the tensors that more threads only wait for each other
    with Progress() as progress:
        task = progress.add_task("pictures", total=len(args.only))
        for name in args.only:
            for file in make([name], args.out, Detail()):
                progress.console.print(f"{file}  {file.stat().st_size / 1024:.0f} KB")
            progress.advance(task)


if __name__ == "__main__":
    main()

"""`fmlightning ema RUN`: an average of a run's weights, as a file that every other command takes for a run."""

from pathlib import Path
from typing import Any

from fmlightning.cli.argparser import Parser, choices
from fmlightning.runs.directory import Run
from fmlightning.runs.weights import checkpoint_file

DESCRIPTION = """Write an average of the weights of a run to a file, which `sample`, `evaluate`, `export` and
--init_from take in place of RUN. Its width is chosen after training, from the snapshots that --ema.sigma_rel keeps, or
it is one of the averages that were taken in training. Without an option: the averages there are."""

ROUGH = 0.05
"""A profile that is this far from the one asked for deserves a word."""


def main(argv: list[str]) -> int:
    """Parse the command line, make the average and write it."""
    parser = Parser("ema", DESCRIPTION)
    parser.add_argument("run", help="run directory, or a checkpoint in one")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--sigma_rel", type=float, help="width, relative to the length of training")
    wanted.add_argument("--decay", type=float, help="a decay that was averaged with in training")
    parser.add_argument("--step", type=int, help="where it ends (default: at the last snapshot)")
    parser.add_argument("--out", type=Path, help="file (default: RUN/ema/sigma_rel-S.ckpt)")
    parser.add_flag("--overwrite", "replace the file if it exists")
    options = parser.parse_args(argv)
    if options.step is not None and options.sigma_rel is None:
        parser.error("--step goes with --sigma_rel")
    if options.sigma_rel is None and options.decay is None:
        print("\n".join(listing(options.run)))
        return 0
    path = written(options)
    print(f"written: {path}; to use it: fmlightning sample {path} --n 100")
    return 0


def written(options: Any) -> Path:
    """The file of the average that was asked for.

    Raises:
        ValueError: there is no such average, or the file exists.
    """
    run = Run.open(options.run)
    power = options.sigma_rel is not None
    name = f"sigma_rel={options.sigma_rel:g}" if power else f"decay={options.decay:g}"
    at = "" if options.step is None else f"-{options.step:08d}"
    path = options.out or run.path / "ema" / f"{name.replace('=', '-')}{at}.ckpt"
    if path.exists() and not options.overwrite:
        raise ValueError(f"--out {path} exists: name another file, or add --overwrite")
    if path.suffix != ".ckpt":
        raise ValueError(f"--out {path}: end its name in .ckpt, by which it is known")
    if path.resolve().parent == (run.path / "checkpoints").resolve():
        raise ValueError(
            f"--out {path} is among the checkpoints that the run goes on from: name another folder"
        )
    checkpoint, file = opened(options.run)
    if power:
        made = at_width(run.path, options.sigma_rel, options.step)
        write(path, checkpoint, name, made.weights, made.step)
        print(
            f"{name} at step {made.step}, of {made.count} averages; its profile is {made.fit_error:.1e} off"
        )
        if made.fit_error > ROUGH:
            print(f"warning: that is far; {remedy(run.path, made.step)}")
        return path
    found = averages(checkpoint)
    if name not in found:
        raise ValueError(f"--decay {options.decay:g} is not in {file}: {choices(name, found)}")
    write(path, checkpoint, name, found[name], checkpoint["global_step"])
    return path


def remedy(run: Path, step: int) -> str:
    """What brings a profile nearer."""
    from fmlightning.training.ema.snapshots import snapshots

    kept = [t for t, _ in snapshots(run)]
    if step not in kept:
        near = sorted({max(t for t in kept if t < step), min(t for t in kept if t > step)})
        return f"no snapshot ends at step {step}: take --step {' or '.join(map(str, near))}"
    return "take a width between those that were kept, or a later step"


def opened(named: str) -> tuple[dict[str, Any], Path]:
    """The checkpoint that was named, or the run's newest."""
    from fmlightning.runs.checkpoint import read_checkpoint

    file = checkpoint_file(named)
    return read_checkpoint(file), file


def averages(checkpoint: dict[str, Any]) -> dict[str, Any]:
    from fmlightning.training.ema.callback import averages_of

    return averages_of(checkpoint.get("callbacks", {}).get("EMA", {}))


def at_width(run: Path, sigma_rel: float, step: int | None) -> Any:
    from fmlightning.training.ema.power import require_width
    from fmlightning.training.ema.snapshots import reconstruct

    require_width(sigma_rel, "--sigma_rel")
    return reconstruct(run, sigma_rel, step)


def write(
    path: Path, checkpoint: dict[str, Any], name: str, weights: dict[str, Any], step: int
) -> None:
    """A checkpoint to sample from: its raw weights are the average too, and there is nothing to train on with."""
    from fmlightning.training.lightning.checkpoints import ChecksummedFiles

    raw = checkpoint["state_dict"]
    named = {
        f"network.{key}": value.to(raw[f"network.{key}"].dtype) for key, value in weights.items()
    }
    content = {
        "state_dict": raw | named,
        "flow": checkpoint["flow"],
        "global_step": step,
        "callbacks": {"EMA": {"name": name, "shadow": weights, "updates": step}},
    }
    ChecksummedFiles().save_checkpoint(content, path)


def listing(named: str) -> list[str]:
    """What there is to choose from, in lines."""
    from fmlightning.training.ema.snapshots import snapshots

    run = Run.open(named)
    checkpoint, file = opened(named)
    found = averages(checkpoint)
    lines = [f"{file}, step {checkpoint['global_step']}: {', '.join(found) or 'no average'}"]
    files = snapshots(run.path)
    if not files:
        return [*lines, "no snapshots: another width needs --ema.sigma_rel [0.05,0.10] in training"]
    steps = f"steps {files[0][0]} to {files[-1][0]}"
    return [*lines, f"{len(files)} snapshots, {steps}: a width with --sigma_rel"]

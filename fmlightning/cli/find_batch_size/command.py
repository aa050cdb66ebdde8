"""`fmlightning find_batch_size --config FILE`: the largest global batch that fits, and how fast each one trains."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from fmlightning.cli.allowed import named
from fmlightning.cli.argparser import Parser
from fmlightning.cli.config_files import check_files
from fmlightning.cli.find_batch_size import MARK
from fmlightning.cli.find_batch_size.search import FINE, Trial, largest, search

DESCRIPTION = """Find the largest data.batch_size with which a config trains in the memory there is.

Takes all options of fmlightning fit. Each batch is tried for a few steps in a process of its own, with the run's own
precision, optimiser and average, on one device; nothing is written. On several devices data.batch_size is shared out,
and the batch that is printed is that of all of them together."""

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000 ** (k + 1) for k, p in enumerate("KMGT")},
         **{f"{p}iB": 1024 ** (k + 1) for k, p in enumerate("KMGT")}}  # fmt: skip
GIB = 2**30
USABLE = 0.9
"""Part of a CPU's free memory that is taken without --memory: the rest is for the system and the files it reads."""


def main(argv: list[str]) -> int:
    """Try batches, print each, and say which is the largest."""
    options, fit = parse(argv)
    check_files(fit)
    setting = BatchSizeSearch.of(fit, options.memory)
    multiple, trials = options.multiple * setting.processes, []
    print(f"{'batch':>8}  {'peak memory':>12}  {'samples/s':>10}", flush=True)
    for trial in search(setting.measure, setting.asked, multiple, setting.limit, setting.samples):
        trials.append(trial)
        print(row(trial), flush=True)
    print(verdict(trials, setting))
    return 0 if largest(trials) else 1


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of fit."""
    parser = Parser("find_batch_size", DESCRIPTION)
    parser.usage = "%(prog)s --config FILE [--memory 8GiB] [--OPTION VALUE ...]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--memory", type=size, default=0,
        help="What each process may take, such as 8GiB; by default a GPU's free memory, or 0.9 of a CPU's.",
    )  # fmt: skip
    parser.add_argument(
        "--multiple",
        type=positive,
        default=8,
        help="Of which each process's batch is; by default 8.",
    )
    options, fit = parser.parse_known_args(argv)
    if not any(a.startswith("--config") for a in fit):
        raise ValueError("find_batch_size needs a config: --config configs/images/digits.yaml")
    return options, fit


def size(text: str) -> int:
    """Bytes, from a number with a unit."""
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([KMGT]?i?B?)", text.strip())
    unit = found and (found[2] if found[2].endswith("B") or not found[2] else f"{found[2]}B")
    try:
        total = int(float(found[1]) * UNITS[unit]) if found and unit is not None else 0
    except (ValueError, KeyError):
        total = 0
    if total <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be a size such as 8GiB or 500MB")
    return total


def positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


@dataclass(frozen=True)
class BatchSizeSearch:
    """The config, the device and the limits with which batches are tried.

    Attributes:
        fit: options of fmlightning fit.
        limit: bytes for each process.
        asked: the batch of the config.
        processes: that share a batch.
        device: its name.
        memory: bytes that --memory names, or 0.
        samples: of the training set; None where it has no end.
        held: bytes that a process takes before its first step; 0 of a GPU.
    """

    fit: list[str]
    limit: int
    asked: int
    processes: int
    device: str
    memory: int
    samples: int | None
    held: int = 0

    @classmethod
    def of(cls, fit: list[str], memory: int) -> "BatchSizeSearch":
        """The search for a config, on the device where it would train.

        Raises:
            ValueError: the config is wrong.
        """
        found = run(0, memory, fit)
        if "why" in found:
            raise ValueError(found["why"])
        free = found["free"] if found["card"] else int(USABLE * found["free"])
        return cls(
            fit, memory or free, found["batch"], found["processes"], found["device"], memory,
            found["samples"], found["held"],
        )  # fmt: skip

    def measure(self, batch: int) -> Trial:
        """A few steps with a global batch, of which one process takes its share."""
        found = run(batch // self.processes, self.memory, self.fit)
        peak, rate, why = found.get("peak"), found.get("rate"), found.get("why")
        if peak is not None and peak > self.limit:
            why = f"more than {words(self.limit)}"
        return Trial(batch, peak, None if rate is None else rate * self.processes, why)


def run(batch: int, memory: int, fit: list[str]) -> dict[str, Any]:
    """One trial in a process of its own: what it took, or `why` it could not be.

    Raises:
        RuntimeError: it failed by a fault.
    """
    words = (str(batch), str(memory), ",".join(named.get()), *fit)
    done = subprocess.run(
        [sys.executable, "-m", "fmlightning.cli.find_batch_size.trial", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])["trial"]
        return found
    last = (done.stderr.strip().splitlines() or ["no words"])[-1]
    if done.returncode == 2:
        return {"why": last}
    if done.returncode == -9:
        return {"why": "killed by the system, which was out of memory"}
    raise RuntimeError(f"a trial with batch {batch} ended with status {done.returncode}: {last}")


def row(trial: Trial) -> str:
    """One line of the table."""
    peak = words(trial.peak) if trial.peak is not None else "-"
    rate = f"{trial.rate:.4g}" if trial.rate is not None else "-"
    return f"{trial.batch:>8}  {peak:>12}  {rate:>10}" + (
        f"  does not fit: {trial.why}" if trial.why else ""
    )


def verdict(trials: list[Trial], setting: BatchSizeSearch) -> str:
    """The batch to take, in words."""
    limit, where = words(setting.limit), setting.device
    best = largest(trials)
    if best is None:
        if setting.held:
            return (
                f"no batch fits into {limit} of {where}, of which the program takes {words(setting.held)} before "
                "its first step: name more with --memory, or take a smaller network"
            )
        return f"no batch fits into {limit} of {where}: take a smaller network, or 16-bit precision"
    share = (
        f", {best.batch // setting.processes} for each of {setting.processes} processes"
        if setting.processes > 1
        else ""
    )
    lines = [f"largest that fits into {limit} of {where}: --data.batch_size {best.batch}{share}"]
    if setting.samples and best.batch > setting.samples * (1 - 1 / FINE):
        lines.append(f"there are no more: the training set has {setting.samples} samples")
    quick = [t for t in trials if t.fits and t.rate and best.rate and t.rate >= 0.95 * best.rate]
    enough = min(quick, key=lambda t: t.batch, default=best)
    if enough.batch < best.batch:
        lines.append(f"from {enough.batch} on, a larger batch trains no more samples a second")
    return "\n".join(lines)


def words(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"

"""Two ways to one result, timed by turns in one process, so that a busy machine slows both."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def side_by_side(
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    *,
    repeats: int,
    atol: float,
) -> dict[str, float]:
    """Median seconds of both and the median of the ratios pair by pair.

    Raises:
        ValueError: their results differ by more than atol, so they did not do the same work.
    """
    difference = float((ours() - theirs()).abs().max())  # also the warm-up
    if not difference <= atol:
        raise ValueError(f"the two results differ by {difference:g}, more than atol={atol:g}")
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "times_faster": statistics.median(b / a for a, b in pairs),
        "difference": difference,
    }


def seconds(run: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def settings(description: str, repeats: int) -> argparse.Namespace:
    """The flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file; printed if not given")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    return flags


def report(result: dict[str, Any], flags: argparse.Namespace) -> None:
    """Write or print the result with what it was measured on."""
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": flags.threads,
        "torch": torch.__version__,
        "repeats": flags.repeats,
    }
    text = json.dumps(result, indent=2) + "\n"
    if flags.out is None:
        print(text, end="")
    else:
        flags.out.write_text(text)

"""Two ways to one result, timed by turns in one process, so that a busy machine slows both.

A benchmark is a script that measures, prints one line for each comparison, and writes JSON with `--out`:

    flags = settings(__doc__, repeats=15)
    pairs = by_turns(ours, theirs, flags.repeats)
    rows = [row("what", "against whom", pairs, at_least=2.5)]     # of ratios.py
    report({"rows": rows, ...}, flags)

`make bench` runs them all, and its table is made of their `rows`.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import facts
from ratios import interval
from torch import Tensor

Value = TypeVar("Value")


def side_by_side(
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    *,
    repeats: int,
    atol: float,
) -> dict[str, Any]:
    """Median seconds of both and the median of the ratios pair by pair, with the pairs and an interval.

    Raises:
        ValueError: their results differ by more than atol, so they did not do the same work.
    """
    difference = float((ours() - theirs()).abs().max())  # also the warm-up
    if not difference <= atol:
        raise ValueError(f"the two results differ by {difference:g}, more than atol={atol:g}")
    pairs = by_turns(ours, theirs, repeats)
    ratio = interval([b / a for a, b in pairs])
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "times_faster": ratio.median,
        "interval": [ratio.low, ratio.high],
        "difference": difference,
        "pairs_s": pairs,
    }


def by_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of both, each pair next to each other in time; who goes first alternates. Warm up before."""
    return alternated(lambda: seconds(ours), lambda: seconds(theirs), repeats)


def alternated(
    ours: Callable[[], Value], theirs: Callable[[], Value], repeats: int
) -> list[tuple[Value, Value]]:
    """What both return, in pairs, each going first in every other one."""
    return [turn(k, ours, theirs) for k in range(repeats)]


def turn(k: int, ours: Callable[[], Value], theirs: Callable[[], Value]) -> tuple[Value, Value]:
    """What both return; theirs goes first where k is odd."""
    if k % 2:
        second, first = theirs(), ours()
        return first, second
    return ours(), theirs()


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one call, garbage of earlier ones left out."""
    gc.collect()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The flags of every benchmark, for those that add their own."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--repeats", type=int, default=repeats)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--out", type=Path, help="a JSON file; printed if not given")
    return flags


def settings(description: str, repeats: int) -> argparse.Namespace:
    """The flags of every benchmark, read."""
    flags = parser(description, repeats).parse_args()
    begin(flags)
    return flags


def begin(flags: argparse.Namespace) -> None:
    """Set up this process for measuring: its threads, its garbage, and its memory."""
    torch.set_num_threads(flags.threads)
    gc.collect()
    gc.freeze()  # what is there by now is not looked through before each call
    flags.keeps_memory = keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for the next to take; returns whether it does: only glibc is asked.

    It would else give large tensors back to the system and fetch them again, or not, as the heap happens to lie. That
    alone made one solve take 0.47 s and the next 0.75 s, and whichever side has the larger temporaries the slower one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim, mapped = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    # before 2.35 the second is 32 MiB at most
    return bool(libc.mallopt(trim, 2**31 - 1)) and any(
        libc.mallopt(mapped, n) for n in (2**30, 2**25)
    )


def report(result: dict[str, Any], flags: argparse.Namespace) -> None:
    """Print the table of `rows`, if there are any; write or print the result with what it was measured on."""
    result["machine"] = {
        **facts(),
        "threads": flags.threads,
        "repeats": flags.repeats,
        "keeps_freed_memory": getattr(flags, "keeps_memory", False),
    }
    if result.get("rows"):
        print(table(result["rows"]))
    text = json.dumps(result, indent=2) + "\n"
    if flags.out is None:
        print(text, end="")
    else:
        flags.out.write_text(text)


HEAD = "comparison", "against", "of", "ratio", "95 %", "pairs", "bar", "verdict"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ratios.py in columns."""
    lines = [HEAD, *(cells(r) for r in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    spread = f"{r['low']:.3g} to {r['high']:.3g}"
    return (
        r["name"], r["peer"], r["quantity"], f"{r['ratio']:.3g}", spread,
        str(r["pairs"]), r["bar"] or "", r["verdict"],
    )  # fmt: skip

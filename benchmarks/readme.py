"""The README's table of speeds, from results/*.json.

python benchmarks/readme.py             write it between the two markers
python benchmarks/readme.py --check     exit with 1 if it is not what the results say
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from run import RESULTS, results

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speeds -->", "<!-- end of speeds -->"


def rendered(found: dict[str, dict[str, Any]]) -> str:
    """The comparisons that have a bar, the exponents, and what they were measured on."""
    lines = ["| ours | against | of | ratio [95 %] | bar | |", "|---|---|---|---|---|---|"]
    lines += [line(r) for r in shown(found)]
    lines += ["", "| cost | grows as [95 %] |", "|---|---|"]
    for one in found.values():
        for g in one.get("growth", []):
            power = f"{g['over']}^{g['exponent']:.2f} [{g['low']:.2f}, {g['high']:.2f}]"
            lines.append(f"| {g['name']} | {power} |")
    lines += ["", f"Measured on {machine(found)}."]
    return "\n".join(lines)


def shown(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, but for those that hold one solver of ours against another."""
    rows = [r for one in found.values() for r in one.get("rows", [])]
    return [r for r in rows if r["bar"] or not r["name"].startswith("pairs of")]


def line(r: dict[str, Any]) -> str:
    spread = f"{r['ratio']:.3g} [{r['low']:.3g}, {r['high']:.3g}]"
    bar = (r["bar"] or "").replace(">=", "≥").replace("<=", "≤")
    return f"| {r['name']} | {r['peer']} | {r['quantity']} | {spread} | {bar} | {r['verdict']} |"


def machine(found: dict[str, dict[str, Any]]) -> str:
    """In words, with the loads of all runs and the number of pairs.

    Raises:
        ValueError: the results are of several machines, versions of torch or numbers of threads, or some with freed
            memory kept.
    """
    facts = [one["machine"] for one in found.values()]
    loads = [f["load"] for f in facts]
    pairs = [r["pairs"] for r in shown(found)]
    kinds = {
        f"{f['cores']} cores of {f['processor']}, {f['threads']} thread{'s'[: f['threads'] != 1]}, torch {f['torch']}"
        + (", freed memory kept" if f.get("keeps_freed_memory") else "")
        for f in facts
    }
    if len(kinds) > 1:
        raise ValueError(
            f"the results are not of one machine, so they cannot stand in one table: {'; '.join(sorted(kinds))}. "
            "Run make bench on one"
        )
    return (
        f"{kinds.pop()}, "
        f"at a load of {min(loads):g} to {max(loads):g}, with {min(pairs)} to {max(pairs)} pairs"
    )


def placed(text: str, table: str) -> str:
    """The README with the table between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"README.md has no lines {BEGIN} and {END}: put them where the table belongs"
        )
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--check", action="store_true", help="write nothing")
    check = flags.parse_args().check
    old = README.read_text()
    new = placed(old, rendered(results(RESULTS)))
    if not check:
        README.write_text(new)
    elif new != old:
        print(
            "README.md: the table of speeds is not that of benchmarks/results: run benchmarks/readme.py",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

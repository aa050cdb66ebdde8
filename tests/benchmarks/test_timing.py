"""Two sides by turns, and what is written down beside them."""

import argparse
import json
import platform

import pytest
import torch
from timing import by_turns, report, side_by_side, table

ROW = {
    "name": "step", "peer": "loop", "quantity": "speed", "ours": 1.0, "theirs": 1.5, "ratio": 1.5, "low": 1.25,
    "high": 1.75, "pairs": 15, "bar": ">= 1", "verdict": "met",
}  # fmt: skip


def test_the_two_sides_take_turns_at_going_first():
    order = []
    pairs = by_turns(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert "".join(order) == "abbaab"
    assert len(pairs) == 3
    assert all(a > 0 and b > 0 for a, b in pairs)


def test_different_results_are_refused():
    one = torch.ones(3)
    found = side_by_side(lambda: one, lambda: one + 1e-6, repeats=4, atol=1e-5)
    assert len(found["pairs_s"]) == 4
    assert found["interval"][0] <= found["times_faster"] <= found["interval"][1]
    for other in (one + 1e-3, one * float("nan")):
        with pytest.raises(ValueError, match="the two results differ by"):
            side_by_side(lambda: one, lambda o=other: o, repeats=1, atol=1e-5)


def test_a_report_says_what_it_was_measured_on_and_not_where(tmp_path, capsys):
    flags = argparse.Namespace(threads=1, repeats=15, out=tmp_path / "x.json")
    report({"rows": [dict(ROW)]}, flags)
    text = flags.out.read_text()
    machine = json.loads(text)["machine"]
    assert machine.keys() >= {
        "processor",
        "cores",
        "memory_GB",
        "load",
        "torch",
        "threads",
        "repeats",
    }
    assert machine["torch"] == torch.__version__
    assert platform.node() not in text.replace(machine["processor"], "")
    assert "met" in capsys.readouterr().out


def test_the_table_has_its_columns_one_below_the_other():
    lines = table([ROW, {**ROW, "name": "a longer name", "bar": None, "verdict": ""}]).splitlines()
    assert len({line.index("loop") for line in lines[1:]} | {lines[0].index("against")}) == 1
    assert "1.25 to 1.75" in lines[1]

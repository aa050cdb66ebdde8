"""The benchmark of GPUs: its code runs small on any machine, and it says where there is none."""

import json
import subprocess
import sys

import pytest
import torch
import warm


def bench(repository, *flags):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *flags],
        cwd=repository, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so_in_one_line():
    done = warm.run([sys.executable, "benchmarks/gpu.py"])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("bench-gpu: torch finds no GPU here")
    assert done.stdout == ""


@pytest.mark.slow
def test_small_it_measures_everything(repository, tmp_path):
    out = tmp_path / "tiny.json"
    done = bench(repository, "--tiny", f"--out={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["training"]["float32"]["images_per_s"] > 0
    assert found["sampling"]["float32"]["images_per_s"] > 0
    peers = [r["peer"] for r in found["rows"]]
    assert peers == ["forward, backward, optimiser"] * 2 + ["independent coupling"]
    assert all("share_outside" in r for r in found["rows"][:2])

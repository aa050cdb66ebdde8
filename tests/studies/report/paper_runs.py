"""Run directories as training leaves them, written without any training."""

import json
from pathlib import Path

import yaml

SOLVER = "ODESolver(method='{}', num_steps={}, rtol=1e-05, atol=1e-05, grid={}, max_num_steps=10000, failed='raise')"


def config(seed: int, path: str = "Linear", **changes) -> dict:
    """A resolved config; changes by dotted name below model, data, ..."""
    content = {
        "seed_everything": seed, "experiment": "paper", "ema": {"decay": 0.99}, "trainer": {"max_steps": 100},
        "model": {
            "network": {"class_path": "fmlightning.nets.mlp.TimeMLP", "init_args": {"width": 64}},
            "path": {"class_path": f"fmlightning.flow.paths.schedules.{path}", "init_args": {"sigma_min": 0.0}},
            "coupling": {"class_path": "fmlightning.flow.couplings.Independent"},
            "predicts": "velocity", "optimizer": {"lr": 0.001},
        },
        "data": {"class_path": "fmlightning.data.toy.ToyData", "init_args": {"batch_size": 256}},
    }  # fmt: skip
    for name, value in changes.items():
        *above, last = name.split("__")
        place = content
        for key in above:
            place = place[key]
        place[last] = value
    return content


def manifest(seed: int, status: str = "finished", **more) -> dict:
    return {
        "status": status, "config_hash": f"{seed:08x}", "seed": seed, "versions": {"torch": "2.15.0"},
        "start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:01:00+00:00", "end_step": 100, "parameters": 5,
        "hardware": {"processes": 1, "accelerator": "CPU"}, "git": {"commit": "a" * 40, "dirty": False}, **more,
    }  # fmt: skip


def write_run(
    folder: Path,
    seed: int,
    scores: dict | None = None,
    *,
    status="finished",
    steps=(),
    higher: dict | None = None,
    **changes,
) -> Path:
    """A run with its final scores, which of them are better, and rows of metrics.csv as (step, train/loss)."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(seed, **changes), sort_keys=False))
    (folder / "manifest.json").write_text(json.dumps(manifest(seed, status)))
    if scores is not None:
        record = {"step": 100, "solver": SOLVER.format("heun2", 50, "UniformGrid()")}
        metrics = {**scores, "nfe": 100.0}
        record |= {"higher_is_better": higher} if higher else {}
        (folder / "evaluation.json").write_text(json.dumps({**record, "metrics": metrics}))
    if steps:
        rows = "".join(f"{step},{loss}\n" for step, loss in steps)
        (folder / "metrics.csv").write_text(f"step,train/loss\n{rows}")
    return folder


def write_cell(
    run: Path,
    method: str,
    nfe: int,
    scores: dict,
    *,
    seed=0,
    scale=1.0,
    checkpoint="c",
    grid="UniformGrid()",
    **more,
) -> Path:
    """A record of `fmlightning evaluate`."""
    steps = nfe // {"heun2": 2}.get(method, 1)
    adaptive = method == "dopri5"
    record = {
        "checkpoint": checkpoint, "ema": True, "seed": seed, "batch_size": 100, "metric_configs": [],
        "solver": SOLVER.format(method, 50 if adaptive else steps, grid), "method": method,
        "budget": "tol 1e-05" if adaptive else f"{steps} steps",
        "guidance": {"scale": scale, "interval": [0.0, 1.0], "rescale": False, "zero_until": 0.0},
        "nfe": nfe, "seconds_per_sample": 0.001 * nfe, "metrics": scores, **more,
    }  # fmt: skip
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    file = folder / f"{method}-{nfe}-w{scale:g}-{checkpoint}-{grid[:4]}.json"
    file.write_text(json.dumps(record))
    return file


def write_plan(folder: Path, axes: dict, cells: list[tuple[str, dict, int, str, str]], options=()):  # fmt: skip
    """sweep.json of cells as (run, axes, seed, status, error)."""
    rows = [
        {"run": str(folder / run), "axes": at, "options": dict(options), "seed": seed, "status": status, "error": error}
        for run, at, seed, status, error in cells
    ]  # fmt: skip
    content = {"sweep": {}, "axes": axes, "evaluate": {}, "cells": rows}
    (folder / "sweep.json").write_text(json.dumps(content))

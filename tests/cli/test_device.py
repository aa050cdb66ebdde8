"""Samples in another precision, compiled, and by the exponential method, by the real commands."""

import json

import numpy as np
import pytest
import torch
import yaml

from fmlightning.cli.load import load_flow

SMALL = ("--trainer.max_steps=2", "--model.network.width=16", "--data.val_size=64")


@pytest.fixture
def run(trained):
    return trained(
        "toy/mixture", *SMALL, "--trainer.val_check_interval=2", "--data.eval_batch_size=64"
    )


def samples(folder):
    with np.load(folder / "samples.npz") as file:
        return torch.from_numpy(file["x"])


def test_bf16_samples_are_float32_and_near_the_others(fmlightning, run, tmp_path):
    found = {}
    for precision in ("null", "fp64", "bf16"):
        out = tmp_path / precision
        status, shown = fmlightning(
            "sample", run, "--n=32", f"--out={out}", f"--precision={precision}"
        )
        assert status == 0, shown
        found[precision] = samples(out)
        assert found[precision].dtype == torch.float32
    # an untrained network of order one: its rounding to 8 bits stays below 1e-1 at the end
    torch.testing.assert_close(found["bf16"], found["null"], rtol=0, atol=1e-1)
    torch.testing.assert_close(found["fp64"], found["null"], rtol=0, atol=1e-3)
    assert not torch.equal(found["bf16"], found["null"])


def test_an_unknown_precision_is_refused(fmlightning, run):
    status, shown = fmlightning("sample", run, "--precision=bf17")
    assert status == 2
    assert "precision bf17" in shown
    assert "fp32" in shown


def test_the_exponential_method_is_reached_from_the_command_line(fmlightning, run, tmp_path):
    found = []
    for method in ("dpmpp_2m", "heun2"):
        status, shown = fmlightning(
            "sample", run, "--n=16", f"--out={tmp_path / method}",
            f"--solver.method={method}", "--solver.num_steps=200",
        )  # fmt: skip
        assert status == 0, shown
        found.append(samples(tmp_path / method))
    assert "NFE 400" in shown
    torch.testing.assert_close(*found, rtol=0, atol=1e-2)  # 200 steps of order two each


def test_it_is_evaluated_on_its_own_grid(fmlightning, run):
    judge = '[{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 64}}]'
    status, shown = fmlightning(
        "evaluate", run, "--solvers=dpmpp_2m,euler", "--nfe=8", "--grids=LogSNRGrid",
        f"--metrics={judge}", "--precision=fp64",
    )  # fmt: skip
    assert status == 0, shown
    records = json.loads((run / "evaluations" / "evaluations.json").read_text())
    assert [r["nfe"] for r in records] == [8, 8]
    assert all("LogSNRGrid" in r["solver"] for r in records)
    assert {r["precision"] for r in records} == {"fp64"}


def test_a_config_may_name_method_and_grid(command, tmp_path):
    config = tmp_path / "solver.yaml"
    config.write_text("model: {solver: {method: dpmpp_2m, num_steps: 20, grid: LogSNRGrid}}")
    result = command(
        "fit", "--config", "configs/toy/moons.yaml", "--config", config, "--print_config"
    )
    solver = yaml.safe_load(result.stdout)["model"]["solver"]["init_args"]
    assert solver["method"] == "dpmpp_2m"
    assert solver["grid"]["class_path"].endswith("LogSNRGrid")


def test_a_run_that_was_compiled_is_not_when_it_is_loaded(fit, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("compiled")

    folder = fit(
        "toy/mixture", *SMALL, "--trainer.val_check_interval=2", "--data.eval_batch_size=64"
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["compile"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    load_flow(folder)


def eager(module, *args, **kwargs):
    """`Module.compile` with the backend that traces, and compiles nothing."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")


def test_compiled_samples_are_the_others_and_the_price_is_named(
    fmlightning, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    plain, out = tmp_path / "plain", tmp_path / "compiled"
    assert fmlightning("sample", run, "--n=32", f"--out={plain}")[0] == 0
    status, shown = fmlightning("sample", run, "--n=32", f"--out={out}", "--compile")
    assert status == 0, shown
    assert shown.count("note: --compile takes seconds to minutes") == 1
    torch.testing.assert_close(samples(out), samples(plain), rtol=0, atol=1e-5)  # dopri5's steps


@pytest.mark.slow
def test_torch_compile_itself_gives_the_samples(fmlightning, run, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "compiled"
    options = ("--n=40", "--batch_size=32", "--solver.method=heun2", "--solver.num_steps=10")
    assert fmlightning("sample", run, *options, f"--out={plain}")[0] == 0
    status, shown = fmlightning(
        "sample", run, *options, f"--out={out}", "--compile", "--precision=bf16"
    )
    assert status == 0, shown
    torch.testing.assert_close(samples(out), samples(plain), rtol=0, atol=1e-1)  # bf16, as above

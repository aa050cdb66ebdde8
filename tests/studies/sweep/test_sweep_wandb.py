"""The W&B sweep file: of W&B's schema, and its agents train the cells that the sweep itself would train.

wandb carries no schema any more; that of its extra `wandb[sweeps]` is taken, which its local controller uses.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from fmlightning.cli.allowed import allowing
from fmlightning.runs.directory import Run
from fmlightning.studies.sweep.file import read_sweep
from fmlightning.studies.sweep.plan import plan
from fmlightning.studies.sweep.wandb_file import command

CONFIG = Path(__file__).parents[3] / "configs" / "toy" / "moons.yaml"
AXES = {
    "model.path": ["Linear", {"class_path": "VarianceExploding", "init_args": {"sigma_max": 5.0}}],
    "ema.warmup": [True, False],
    "method": {"plain": {}, "paired": {"model.coupling": "MinibatchOT", "model.network.width": 32}},
}


@pytest.fixture
def write(tmp_path):
    def call(**keys):
        quick = {
            "trainer.max_steps": 2, "data.test_size": 100, "data.val_size": 64, "samples.at_end": False,
            "trajectories.at_end": False, "wandb.mode": "disabled", "evaluation.at_end": False,
            "evaluation.metrics": [{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 100}}],
        }  # fmt: skip
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({"name": "tiny", "configs": [str(CONFIG)], "set": quick} | keys)
        )
        return path

    return call


@pytest.fixture
def exported(write, fmlightning, monkeypatch, tmp_path):
    """What --export writes, as the agent's server reads it."""
    from fmlightning.studies.sweep import resolve

    monkeypatch.setattr("fmlightning.studies.sweep.plan.resolve_in_child", resolve.answer)

    def call(**keys):
        out = tmp_path / "out" / "w.yaml"
        status, shown = fmlightning("sweep", write(**keys), "--export=wandb", f"--out={out}")
        assert status == 0, shown
        return yaml.safe_load(out.read_text())

    return call


def violations(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about its older version
        sweeps = pytest.importorskip("sweeps")
    return sweeps.config.schema_violations_from_proposed_config(content)


def commands(content):
    """The command line of every run of a grid, as the agent builds it: its order of parameters is the server's."""
    from wandb.sdk.launch.sweeps import utils
    from wandb.wandb_agent import Agent

    sweeps = pytest.importorskip("sweeps")
    runs, words = [], utils.create_sweep_command(content["command"])
    while (
        run := sweeps.next_run({k: content[k] for k in ("method", "parameters")}, runs)
    ) is not None:
        runs.append(run)
        values = utils.create_sweep_command_args({"args": run.config}) | {"env": ["/usr/bin/env"]}
        assert Agent.DEFAULT_SWEEP_COMMAND[0] == "${env}"
        yield [
            part
            for word in words
            for part in (
                values[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
            )
        ]


def test_the_file_is_of_the_schema_and_a_wrong_one_is_not(exported):
    content = exported(axes=AXES, seeds=[0, 1])
    assert violations(content) == []
    assert violations(content | {"method": "grids"}) != []
    assert content["method"] == "grid"
    assert content["parameters"]["seed_everything"] == {"values": [0, 1]}
    assert content["parameters"]["ema.warmup"] == {"values": ["true", "false"]}


def test_an_agent_is_given_the_trainings_of_the_sweep(exported, write):
    """By the directories of its commands, resolved as `fit` resolves them."""
    from fmlightning.cli.quiet import quiet
    from fmlightning.runs.directory import run_directory
    from fmlightning.studies.sweep.resolve import ConfigOnlyCLI

    keys = {"axes": {k: AXES[k] for k in ("model.path", "method")}, "seeds": [1]}
    content = exported(**keys)
    given = list(commands(content))
    with quiet():
        reading, found = ConfigOnlyCLI(given[0][2:]), set()
        for words in given:
            assert words[:3] == ["/usr/bin/env", "fmlightning", "fit"]
            reading.parse_arguments(reading.parser, words[2:])
            reading.resolve()
            found.add(run_directory(reading.resolved))
    wanted = plan(read_sweep(write(**keys))).cells
    assert found == {cell.run for cell in wanted}
    assert len(found) == 4


def test_sampled_options_become_distributions(exported):
    distribution = {
        "n": 4,
        "model.optimizer.lr": {"log_uniform": [1e-4, 1e-2]},
        "model.network.width": {"integers": [8, 16]},
    }
    content = exported(samples=distribution, seeds=[0, 1])
    assert (
        content.pop("run_cap") == 8
    )  # else it had no end; W&B knows it, and the extra's older schema does not
    assert violations(content) == []
    assert content["method"] == "random"
    assert content["parameters"]["model.optimizer.lr"] == {
        "distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2,
    }  # fmt: skip
    sweeps = pytest.importorskip("sweeps")
    drawn = sweeps.next_run({k: content[k] for k in ("method", "parameters")}, []).config
    assert 1e-4 <= drawn["model.optimizer.lr"]["value"] <= 1e-2
    assert drawn["model.network.width"]["value"] in range(8, 17)


def test_an_agent_allows_the_modules_that_the_sweep_was_allowed(write):
    with allowing(["mine"]):
        words = command(read_sweep(write()))
    assert words[2:4] == ["fit", "--allow=mine"]


def test_two_labels_of_one_file_are_refused(write, fmlightning, monkeypatch, tmp_path):
    from fmlightning.studies.sweep import resolve

    monkeypatch.setattr("fmlightning.studies.sweep.plan.resolve_in_child", resolve.answer)
    axes = {"m": {"a b": {"data.batch_size": 8}, "a/b": {"data.batch_size": 16}}}
    out = tmp_path / "w.yaml"
    status, shown = fmlightning("sweep", write(axes=axes), "--export=wandb", f"--out={out}")
    assert status == 2
    assert "of which a/b is the second: rename it" in shown
    assert not out.exists()


def test_exclusions_are_refused_because_an_agent_would_run_them(
    write, fmlightning, monkeypatch, tmp_path
):
    from fmlightning.studies.sweep import resolve

    monkeypatch.setattr("fmlightning.studies.sweep.plan.resolve_in_child", resolve.answer)
    path = write(axes=AXES, exclude=[{"method": "plain"}])
    status, shown = fmlightning("sweep", path, "--export=wandb", f"--out={tmp_path / 'w.yaml'}")
    assert status == 2
    assert "W&B's sweeps have no exclusions" in shown
    assert not (tmp_path / "w.yaml").exists()


@pytest.mark.slow
def test_the_command_of_an_agent_trains_and_evaluates(exported, write):
    keys = {"axes": AXES, "seeds": [1]}
    words = next(iter(commands(exported(**keys))))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # what the agent adds
        "WANDB_SWEEP_ID": "abcdefgh", "WANDB_RUN_ID": "12345678",
    }  # fmt: skip
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (cell,) = [c for c in plan(read_sweep(write(**keys))).cells if Run(c.run).status == "finished"]
    assert "w2" in Run(cell.run).evaluation["metrics"]

"""The examples of CONTRIBUTING.md do what it says: each file is written as it stands there, and its command is run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"^    fmlightning (fit .*)$", TEXT, re.MULTILINE)
SMALL = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false", "--data.batch_size=64", "--trainer.val_check_interval=2",
)  # fmt: skip
FOUND = {
    # where the class stands in the config of the run
    "my_path": ("model", "path"),
    "my_curves": ("model", "path", "init_args", "mu"),
    "my_objective": ("model", "objective"),
    "my_solver": ("model", "solver"),
    "my_metric": ("evaluation", "metrics"),
    "my_data": ("data", "init_args", "train"),
    "my_net": ("model", "network"),
}


def test_every_example_has_a_command():
    assert [re.search(r"--allow (\w+)", c)[1] for c in COMMANDS] == list(FILES) == list(FOUND)


@pytest.mark.parametrize("command", COMMANDS, ids=FILES)
def test_an_example_runs(command, fmlightning, tmp_path, monkeypatch):
    name = re.search(r"--allow (\w+)", command)[1]
    (tmp_path / f"{name}.py").write_text(FILES[name])
    monkeypatch.syspath_prepend(tmp_path)
    run, scores = tmp_path / "run", name == "my_metric"
    options = (*SMALL, f"--evaluation.at_end={str(scores).lower()}", f"--run_dir={run}")
    status, shown = fmlightning(*shlex.split(command), *options)
    assert status == 0, shown
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in FOUND[name]:
        config = config[key]
    spec = config[0] if isinstance(config, list) else config
    assert spec["class_path"].startswith(f"{name}.")
    if name == "my_solver":
        asked = ("sample", run, "--n=4", "--device=cpu", "--allow", name)
        status, shown = fmlightning(*asked)
        assert status == 0, shown
        assert "NFE 16" in shown  # twice its eight steps
    if scores:
        record = json.loads((run / "evaluation.json").read_text())
        assert "mean_error" in record["metrics"]
        assert record["higher_is_better"]["mean_error"] is False


def test_a_command_is_a_file_and_a_line(fmlightning, tmp_path, monkeypatch):
    from fmlightning import __main__ as entry

    (tmp_path / "hello.py").write_text("def main(argv):\n    print('hello', *argv)\n    return 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(entry.COMMANDS, "hello", "hello:main")
    status, shown = fmlightning("hello", "you")
    assert (status, shown) == (0, "hello you\n")

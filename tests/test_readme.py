"""The README's code runs."""

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("fmlightning fit --config")
]


def test_a_flow_in_plain_torch():
    (text,) = (t for t in PYTHON if "optimizer" in t)
    room: dict = {}
    exec(text, room)  # the block a reader pastes
    x = room["x"]
    assert x.shape == (1000, 2)
    # the moons times 3 minus 1: mean (0.5, -0.25), spread (2.6, 1.5)
    assert (x.mean(0) - x.new_tensor([0.5, -0.25])).abs().max() < 0.4
    assert (x.std(0) - x.new_tensor([2.6, 1.5])).abs().max() < 0.4


@pytest.mark.parametrize("line", COMMANDS)
def test_the_fit_commands_run(line, fmlightning, tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    for text in PYTHON:
        name = re.match(r"# my_package/(\w+)\.py", text)
        if name:
            (package / f"{name[1]}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = shlex.split(line.split("   #")[0].split("  #")[0])[1:]
    single = ["--trainer.devices=1", "--trainer.accelerator=cpu"]
    quick = ["--trainer.max_steps=2", "--evaluation.at_end=false", "--wandb.mode=disabled"]
    quick += ["--model.solver={method: euler, num_steps: 4}"]
    status, shown = fmlightning(*words, *single, *quick)
    assert status == 0, shown

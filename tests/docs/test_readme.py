"""The README's code runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from fmlightning.flow.keys import Key

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("fmlightning fit --config")
    and len(line.split("#")[0].split()) > 4  # a config as it stands is run by test_configs
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


QUICK = (
    "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--evaluation.at_end=false",
    "--wandb.mode=disabled", "--model.solver={method: euler, num_steps: 4}",
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the repository's configs, and what the README takes for granted in one's own."""
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    package = tmp_path / "my_package"
    package.mkdir()
    for text in PYTHON:
        if name := re.match(r"# my_package/(\w+)\.py", text):
            (package / f"{name[1]}.py").write_text(text)
    points = torch.rand(100, 2, generator=Key(0).generator())
    (tmp_path / "points.csv").write_text("\n".join(f"{x:.4f},{y:.4f}" for x, y in points.tolist()))
    pixels = torch.randint(256, (2, 20, 32, 32, 3), generator=Key(1).generator(), dtype=torch.uint8)
    for kind, images in zip(("cats", "dogs"), pixels.numpy(), strict=True):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "pictures" / kind / f"{number}.png")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(line):
    return shlex.split(line, comments=True)[1:]


@pytest.mark.slow  # that their options are known is tested in test_commands
@pytest.mark.parametrize("line", COMMANDS)
def test_the_fit_commands_run(line, fmlightning, place):
    small = ("--evaluation.metrics=[]", "--data.test_size=4") if "FolderData" in line else ()
    status, shown = fmlightning(*words(line), *QUICK, *small)
    assert status == 0, shown


@pytest.mark.slow
def test_the_tour_goes_from_one_line_to_the_next(fmlightning, place):
    """Each command finds what those before it have left."""
    tour = README.partition("## Five minutes")[2].partition("\n## ")[0]
    lines = [
        line
        for text in re.findall(r"```bash\n(.*?)```", tour, re.DOTALL)
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("fmlightning") and "--help" not in line
    ]
    assert {words(line)[0] for line in lines} >= {"fit", "ls", "show", "sample", "evaluate"}
    for line in lines:
        status, shown = fmlightning(*words(line), *(QUICK if "fmlightning fit" in line else ()))
        assert status == 0, (line, shown)
    (block,) = (text for text in PYTHON if "fmlightning.load(" in text)
    room: dict = {}
    exec(block, room)
    x = torch.zeros(3, 2)
    assert room["field"](x, torch.full((3,), 0.5)).shape == x.shape

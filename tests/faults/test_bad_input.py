"""Bad input ends before any training step, with one message that names the option, the value and the cure."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from bad_inputs import OPTIONS, ROWS

from fmlightning.__main__ import main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run and its broken copies, with a fingerprint of each file."""
    root = tmp_path_factory.mktemp("runs")
    run = root / "runs" / "moons" / "whole"
    config = str(REPOSITORY / "configs/toy/moons.yaml")
    status = main(
        [
            "fit",
            "--config",
            config,
            f"--run_dir={run}",
            "--trainer.max_steps=2",
            "--wandb.mode=disabled",
            "--evaluation.at_end=false",
            "--samples.at_end=false",
            "--trajectories.at_end=false",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert status == 0
    (run / "evaluation.json").write_text(json.dumps({"metrics": {"w2": 1.0}}))
    (root / "file").write_text("neither a config nor a run")
    for name, (file, change) in BROKEN.items():
        copy = root / "broken" / name
        shutil.copytree(run, copy)
        change(copy / file)
    return root


def torn(path):
    path.write_bytes(path.read_bytes()[:1000])


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def text(content):
    return lambda path: path.write_text(content)


def other_class(path):
    path.write_text(path.read_text().replace("fmlightning.nets.TimeMLP", "elsewhere.Net"))


LAST = "checkpoints/last.ckpt"
BROKEN = {
    "torn": (LAST, torn),
    "bit": (LAST, one_bit),
    "empty": (LAST, text("")),
    "foreign": (LAST, lambda path: torch.save({"state_dict": {}}, path)),
    "none": ("checkpoints", shutil.rmtree),
    "config_torn": ("config.yaml", text("model: {network: [")),
    "config_empty": ("config.yaml", text("")),
    "config_bytes": ("config.yaml", lambda path: path.write_bytes(bytes(range(256)))),
    "config_class": ("config.yaml", other_class),
    "manifest_torn": ("manifest.json", text('{"status": ')),
    "manifest_list": ("manifest.json", text("[1, 2]")),
    "manifest_short": ("manifest.json", text('{"status": "finished"}')),
    "scores_torn": ("evaluation.json", text('{"metrics":')),
    "scores_none": ("evaluation.json", text("{}")),
}


def fingerprints(root):
    return {
        p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in root.rglob("*")
    }


@pytest.fixture
def refuse(place, tmp_path, monkeypatch, capsys):
    """Ask for a row of the table; returns the exit status and what was said on the standard error."""

    def step(*args):
        raise AssertionError("a training step was taken")

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(place / "runs"))
    monkeypatch.setattr("fmlightning.training.module.FlowMatching.training_step", step)
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(row):
        names = {
            "run": place / "runs/moons/whole",
            "broken": place / "broken",
            "file": place / "file",
            "tmp": tmp_path,
        }
        if row.yaml is not None:
            content = row.yaml if isinstance(row.yaml, bytes) else row.yaml.encode()
            (tmp_path / "second.yaml").write_bytes(content)
        argv = [filled(word, names) for word in row.argv]
        capsys.readouterr()
        status = main(argv)
        return status, capsys.readouterr().err, [filled(word, names) for word in row.words]

    return call


def filled(word, names):
    """A word with the folders put in; it may hold other braces."""
    for name, path in names.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


def part(name):
    """A row of options takes a third of a second: one in three is asked for in `make test`, all in `make test-all`."""
    slow = name in OPTIONS and list(OPTIONS).index(name) % 3 != 0
    return pytest.param(name, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("name", map(part, ROWS))
def test_it_is_one_message_and_nothing_changes(name, refuse, place):
    before, configs = fingerprints(place), fingerprints(REPOSITORY / "configs")
    status, said, words = refuse(ROWS[name])
    assert status == 2, said
    lines = said[said.index("error: ") :].strip().splitlines()
    assert len(lines) == 1, said
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    for noise in ("NoneType", "Traceback", "Parser key", "<class", "Union", "Namespace("):
        assert noise not in lines[0], lines[0]
    assert len(lines[0]) < 700, "a message, not a page"
    assert fingerprints(place) == before
    assert fingerprints(REPOSITORY / "configs") == configs


def test_the_table_is_as_long_as_promised():
    assert len(ROWS) >= 60


@pytest.mark.parametrize(
    "name", ["misspelt", "sigma_min below 0", "config: tab", "torn checkpoint", "show nowhere"]
)
def test_debug_shows_where_it_came_from(name, refuse):
    row = ROWS[name]
    with pytest.raises((ValueError, OSError)):
        refuse(row._replace(argv=(*row.argv, "--debug")))


REAL = (
    "show nowhere",
    "config: tab",
    pytest.param("sigma_min below 0", marks=pytest.mark.slow),
    pytest.param("torn checkpoint", marks=pytest.mark.slow),
    pytest.param("batch and processes", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name", REAL)
def test_the_real_command_says_the_same(name, refuse, command, place, tmp_path):
    row = ROWS[name]
    _, said, _ = refuse(row)
    names = {"broken": place / "broken", "tmp": tmp_path}
    argv = [filled(word, names) for word in row.argv]
    result = command(*argv, timeout=120, cold=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == said[said.index("error: ") :].strip()
    shown = command(*argv, "--debug", timeout=120)
    assert shown.returncode == 1
    assert "Traceback (most recent call last)" in shown.stderr

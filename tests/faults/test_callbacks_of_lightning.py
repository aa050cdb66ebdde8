"""Callbacks of Lightning that a config names, and networks of one's own that are not what they must be."""

import json

import pytest
import torch

QUICK = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.metrics=[]",
    "--trainer.enable_progress_bar=false", "--trainer.devices=1", "--data.val_size=64", "--data.test_size=64",
    "--model.network.width=16", "--model.network.depth=2", "--trainer.max_steps=4", "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
)  # fmt: skip


@pytest.fixture
def start(fmlightning, repository, tmp_path):
    def call(*options):
        run = tmp_path / "run"
        status, shown = fmlightning(
            "fit", "--config", repository / "configs/toy/moons.yaml", *QUICK, f"--run_dir={run}", *options
        )  # fmt: skip
        return status, shown, run

    return call


def test_a_checkpoint_of_ones_own_lies_in_the_run_and_is_sampled(start, fmlightning, tmp_path):
    callback = {
        "class_path": "ModelCheckpoint",
        "init_args": {"every_n_train_steps": 3, "filename": "mine-{step}"},
    }
    status, shown, run = start(f"--trainer.callbacks=[{json.dumps(callback)}]")
    assert status == 0, shown
    [mine] = run.rglob("mine-*.ckpt")
    assert mine.parent == run / "checkpoints"
    assert torch.load(mine, weights_only=True)["global_step"] == 3
    status, shown = fmlightning("sample", mine, "--n=4", f"--out={tmp_path / 'out'}")
    assert status == 0, shown


@pytest.mark.parametrize(
    "name",
    ["Timer", "LearningRateMonitor", "EarlyStopping", "GradientAccumulationScheduler", "StochasticWeightAveraging"],
)  # fmt: skip
def test_the_others_run_or_are_refused_in_one_message(start, name):
    options = {
        "Timer": {"duration": "00:01:00:00"}, "EarlyStopping": {"monitor": "val/loss"},
        "GradientAccumulationScheduler": {"scheduling": {"0": 2}}, "StochasticWeightAveraging": {"swa_lrs": 0.01},
    }  # fmt: skip
    callback = {"class_path": name, "init_args": options.get(name, {})}
    status, shown, _ = start(f"--trainer.callbacks=[{json.dumps(callback)}]")
    assert "Traceback" not in shown
    # averaging of Lightning's own begins after a share of epochs, which a run of steps has not
    assert status == (2 if name == "StochasticWeightAveraging" else 0), shown
    assert shown.count("error:") == (status == 2)


@pytest.mark.parametrize(
    ("finder", "command"), [("BatchSizeFinder", "find_batch_size"), ("LearningRateFinder", "sweep")]
)
def test_a_finder_is_answered_with_the_command(start, finder, command):
    status, shown, run = start(f'--trainer.callbacks=[{{"class_path": "{finder}"}}]')
    assert status == 2
    assert f"fmlightning {command}" in shown
    assert not run.exists()


def test_a_shell_of_an_allocation_trains_one_process(start, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    status, shown, run = start()
    assert status == 0, shown
    assert json.loads((run / "manifest.json").read_text())["hardware"]["processes"] == 1


NETWORK = """\
import torch
class Swapped(torch.nn.Linear):
    def __init__(self): super().__init__(2, 2)
    def forward(self, t, x): return super().forward(x[:, [0, 1]])
class Broken(Swapped):
    def forward(self, x, t, y=None): return [x][3]
class Pair(Swapped):
    def forward(self, x, t, y=None): return x, t
class OldName(Swapped):
    def forward(self, x, t, y=None, rows=None): return super().forward(t, x)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Swapped", "net(x, t, y=None)"),
        ("Broken", "list index out of range"),
        ("Pair", "returns a tuple"),
        ("OldName", "rows, which are called streams now"),
    ],
)
def test_a_network_of_ones_own_is_told_what_it_did(
    fmlightning, repository, tmp_path, monkeypatch, name, words
):
    (tmp_path / "mine.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.yaml").write_text(f"model: {{network: {{class_path: mine.{name}}}}}")
    status, shown = fmlightning(
        "--allow", "mine", "fit", "--config", repository / "configs/toy/moons.yaml", "--config", tmp_path / "own.yaml",
        "--wandb.mode=disabled", "--evaluation.metrics=[]", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert status == 2, shown
    assert "labels" not in shown
    assert words in shown
    assert not (tmp_path / "run").exists()

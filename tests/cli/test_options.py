"""The command line: what it accepts, what wins, and what it says when it refuses."""

import json

import pytest
import torch
import yaml

MOONS = ("fit", "--config", "configs/toy/moons.yaml")
DIGITS = ("fit", "--config", "configs/images/digits.yaml")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, repository):
    monkeypatch.chdir(repository)


REFUSED = {
    # what was asked for: the option, the value and the cure that the one message must name
    "unknown option": (
        [*MOONS, "--model.class_dropout_pro=0.1"],
        ["--model.class_dropout_pro", "did you mean --model.class_dropout_prob?"],
    ),
    "abbreviation": ([*MOONS, "--trainer.max_step=3"], ["--trainer.max_step", "did you mean --trainer.max_steps?"]),
    "unknown path": ([*MOONS, "--model.path=Linea"], ["--model.path Linea", "did you mean Linear?"]),
    "unknown network": ([*MOONS, "--model.network=UNt"], ["UNt", "did you mean UNet?"]),
    "unknown target": ([*MOONS, "--data.target=Mons"], ["Mons", "did you mean Moons?"]),
    "unknown solver": ([*MOONS, "--model.solver.method=rk99"], ["model.solver.method", "rk99", "dopri5"]),
    "unknown prediction": (
        [*MOONS, "--model.objective.prediction=speed"],
        ["model.objective.prediction", "speed", "velocity"],
    ),
    "bad path value": ([*MOONS, "--model.path=Linear", "--model.path.sigma_min=2"], ["sigma_min=2", "[0, 1)"]),
    "negative batch": ([*MOONS, "--data.batch_size=-8"], ["data.batch_size=-8", "at least 1"]),
    "batch over data": ([*DIGITS, "--data.batch_size=5000"], ["batch_size=5000", "1297"]),
    "label drop": ([*DIGITS, "--model.class_dropout_prob=1.5"], ["class_dropout_prob=1.5", "[0, 1)"]),
    "ema": ([*MOONS, "--ema.decay=1"], ["ema.decay=1", "[0, 1)"]),
    "type": ([*MOONS, "--trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "bool seed": ([*MOONS, "--seed_everything=true"], ["seed_everything"]),
    "no config": (["fit", "--config", "configs/none.yaml"], ["configs/none.yaml"]),
    "no checkpoint": ([*MOONS, "--ckpt_path=none.ckpt"], ["none.ckpt", "no such checkpoint"]),
    "nothing to validate": (["validate", "--config", "configs/toy/moons.yaml"], ["no checkpoint", "Train it first"]),
    "size": ([*DIGITS, "--model.network.channel_mult=[1,2,2,2,2]"], ["8", "16"]),
    "channels": ([*DIGITS, "--model.network.in_channels=3"], ["in_channels=3"]),
    "network for images": (
        [*DIGITS, "--model.network=TimeMLP"], ["TimeMLP", "UNet for images"],
    ),
    "source for images": ([*DIGITS, "--model.source=EightGaussians"], ["EightGaussians", "(1, 8, 8)"]),
    "plain OT with labels": ([*DIGITS, "--model.coupling=MinibatchOT"], ["MinibatchOT", "ClasswiseOT"]),
    "score of a toy source": ([*MOONS, "--model.objective.prediction=score"], ["prediction=score", "Gaussian source"]),
    "experiment name": ([*MOONS, "--experiment=../out"], ["experiment='../out'"]),
    "labels of the network": ([*DIGITS, "--model.network.num_classes=5"], ["num_classes=10", "10 of DigitsData"]),
    "check interval": ([*MOONS, "--trainer.val_check_interval=0"], ["trainer.val_check_interval=0", "positive"]),
    "accumulation": ([*MOONS, "--trainer.accumulate_grad_batches=0"], ["accumulate_grad_batches=0", "positive"]),
    "no steps": ([*MOONS, "--trainer.max_steps=0"], ["trainer.max_steps=0", "positive"]),
    "devices": ([*MOONS, "--trainer.devices=-7"], ["trainer.devices=-7"]),
    "clipping": ([*MOONS, "--trainer.gradient_clip_val=-1"], ["gradient_clip_val=-1"]),
    "rate": ([*MOONS, "--model.optimizer.lr=-1"], ["learning rate", "-1.0"]),
    "scheduler": ([*MOONS, "--model.scheduler=Cosin"], ["Cosin", "did you mean Cosine"]),
    "judge of more than the data": ([*MOONS, "--data.test_size=512"], ["10000", "512", "data.test_size"]),
    "judge of images": ([*MOONS, "--evaluation.metrics=[{class_path: Frechet}]"], ["Frechet", "Wasserstein"]),
    "hidden labels": ([*MOONS, "--model.class_dropout_prob=0.1"], ["class_dropout_prob=0.1", "has none"]),
    "no config at all": (["fit"], ["model.network", "--config"]),
    "not a mapping": ([*MOONS, "--config=.gitignore"], [".gitignore"]),
    "unknown command": (["fitt"], ["fitt", "did you mean 'fit'?"]),
    "no pair": (["sample", "run", "--guidance.t_range=0.5"], ["--guidance.t_range 0.5: must be a list of 2"]),
    "no run": (["sample", "nowhere"], ["nowhere", "config.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_message_before_any_training(fmlightning, name, runs_below_tmp):
    argv, expected = REFUSED[name]
    status, shown = fmlightning(*argv, *([] if argv[0] != "fit" else ["--wandb.mode=disabled"]))
    assert status == 2
    assert all(part in shown for part in expected), shown
    assert "Traceback" not in shown
    assert len(shown[shown.index("error: ") :].strip().splitlines()) <= 3, shown
    assert not list(runs_below_tmp.rglob("*")), "something was written"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_said_with_a_way_on(fmlightning, runs_below_tmp):
    status, shown = fmlightning(*MOONS, "--trainer.accelerator=gpu", "--wandb.mode=disabled")
    assert status == 2
    assert "trainer.accelerator=gpu" in shown
    assert "Set it to cpu or auto" in shown
    assert not list(runs_below_tmp.rglob("*"))


def test_debug_shows_the_traceback(command):
    result = command(*MOONS, "--ema.decay=1", "--debug")
    assert "Traceback" in result.stderr


def test_the_module_runs_as_the_command(command):
    assert command("--help", cold=True).stdout.startswith("usage: fmlightning")
    assert "--model.network" in command("fit", "--help").stdout


def test_print_config_is_a_config_that_gives_itself(command, tmp_path):
    first = command(*MOONS, "--model.path=Trigonometric", "--print_config").stdout
    path = tmp_path / "config.yaml"
    path.write_text(first)
    assert yaml.safe_load(
        command("fit", "--config", path, "--print_config").stdout
    ) == yaml.safe_load(first)


def test_later_configs_and_then_options_win(command, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 7}\nema: {decay: 0.5}\n")
    result = command(*MOONS, "--config", overlay, "--ema.decay=0.25", "--print_config")
    config = yaml.safe_load(result.stdout)
    assert config["trainer"]["max_steps"] == 7
    assert config["ema"]["decay"] == 0.25


@pytest.mark.parametrize("where", ["command line", "overlay"])
def test_another_path_starts_from_its_own_defaults(command, tmp_path, where):
    """What two paths call by one name are two things; an optimiser's rate is one."""
    first = tmp_path / "first.yaml"
    first.write_text("model: {path: {class_path: IndependentCFM, init_args: {noise_std: 0.3}}}")
    second = tmp_path / "second.yaml"
    second.write_text("model: {path: SchrodingerBridge, optimizer: Adam}")
    change = (
        ["--config", second]
        if where == "overlay"
        else ["--model.path=SchrodingerBridge", "--model.optimizer=Adam"]
    )
    config = yaml.safe_load(command(*MOONS, "--config", first, *change, "--print_config").stdout)
    assert config["model"]["path"]["init_args"]["noise_std"] == 1.0
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.Adam"
    assert config["model"]["optimizer"]["init_args"]["lr"] == 5e-3


def test_a_network_of_ones_own_by_its_import_path(fit, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, 2)\n"
        "        self.drop = torch.nn.Dropout(0.5)\n"
        "    def forward(self, x, t, y=None):\n"
        "        return self.drop(self.layer(torch.cat((x, t[:, None]), 1)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="drop is a torch.nn.Dropout"):
        run = fit("toy/moons", "--model.network=mine.Mine", "--allow=mine", "--trainer.max_steps=2")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_the_command_line_beats_what_a_checkpoint_remembers(fit, fmlightning, method):
    run = fit(
        "toy/moons", "--trainer.max_steps=2", "--data.test_size=100", "--evaluation.metrics=[]"
    )
    judge = "[{class_path: Wasserstein, init_args: {subsets: 1, size: 100}}]"
    status, shown = fmlightning(
        "validate", "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt",
        f"--model.solver.method={method}", "--model.solver.num_steps=3", f"--evaluation.metrics={judge}",
    )  # fmt: skip
    assert status == 0, shown
    evaluation = json.loads((run / "validate.json").read_text())
    assert f"method='{method}'" in evaluation["solver"]
    assert evaluation["metrics"]["nfe"] == {"euler": 3, "rk4": 12}[method]


def test_one_config_goes_through_every_command(fit, fmlightning):
    run = fit(
        "images/digits",
        "--trainer.max_steps=2",
        "--model.solver.num_steps=2",
        "--evaluation.metrics=[]",
    )
    for name in ("validate", "test", "predict"):
        status, shown = fmlightning(name, "--ckpt_path", run)  # the run brings its config
        assert status == 0, shown
    import numpy as np

    arrays = np.load(run / "samples" / "predictions.npz")
    assert arrays["x"].shape == (350, 1, 8, 8)
    assert arrays["index"].tolist() == list(range(350))

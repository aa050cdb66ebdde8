"""The run directory: enough by itself, and never overwritten."""

import json
import signal
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import warm
import yaml

import fmlightning as package
from fmlightning.runs.config_hash import config_hash
from fmlightning.runs.directory import Run, require_vacant, run_directory

STEPS = ("--trainer.max_steps=4",)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["file", "with another", "directory", "link"])
def test_a_start_that_was_killed_leaves_its_directory_free_and_nothing_else_does(kind, tmp_path):
    left = tmp_path / ".config.yaml.1a2b3c4d.tmp"
    if kind == "directory":
        left.mkdir()
    elif kind == "link":
        left.symlink_to(tmp_path / "elsewhere")
    else:
        left.write_text("half a conf")
    if kind == "with another":
        (tmp_path / "thesis.tex").touch()
    with nullcontext() if kind == "file" else pytest.raises(ValueError, match="no run"):
        require_vacant(tmp_path)


def test_a_run_holds_all_it_needs(fit):
    run = fit(
        "toy/moons", *STEPS, "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=2"
    )
    assert {"config.yaml", "manifest.json", "metrics.csv", "checkpoints"} <= {
        p.name for p in run.iterdir()
    }
    opened = Run.open(run)
    assert opened.config == opened.saved_config, "taken for one of an earlier version"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["end_step"] == 4
    assert manifest["data"]["splits"].keys() == {"train", "val", "test"}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", *(f"val/loss_bin{k}" for k in range(8))} <= set(header)


def test_the_same_command_twice_is_refused_and_changes_nothing(
    fit, fmlightning, repository, tmp_path
):
    run = fit("toy/moons", *STEPS)
    before = files(run)
    again = (
        "fit",
        "--config",
        repository / "configs/toy/moons.yaml",
        *STEPS,
        f"--run_dir={run}",
        "--wandb.mode=disabled",
    )
    status, shown = fmlightning(*again)
    assert status == 2
    assert f"fmlightning show {run}" in shown
    assert "--rerun" in shown
    assert files(run) == before
    # and --rerun keeps the old one, whole
    fit("toy/moons", *STEPS, "--rerun")
    assert files(run.with_name("run.1")) == before


def test_an_unfinished_run_is_resumed_only_when_asked(fit, fmlightning, repository):
    run = fit("toy/moons", *STEPS)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    longer = (
        repository / "configs/toy/moons.yaml",
        "--trainer.max_steps=6",
        f"--run_dir={run}",
        "--wandb.mode=disabled",
    )
    status, shown = fmlightning("fit", "--config", *longer)
    assert status == 2
    assert "--ckpt_path auto" in shown
    fit("toy/moons", "--trainer.max_steps=6", "--ckpt_path=auto")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert json.loads((run / "manifest.json").read_text())["start_step"] == 4


def test_two_experiments_have_two_directories_and_both_configs(
    fit, fmlightning, runs_below_tmp, repository
):
    for path in ("Linear", "Trigonometric"):
        status, shown = fmlightning(
            "fit", "--config", repository / "configs/toy/moons.yaml", *STEPS, f"--model.path={path}",
            "--wandb.mode=disabled", "--evaluation.at_end=false", "--trajectories.at_end=false",
        )  # fmt: skip
        assert status == 0, shown
    configs = [yaml.safe_load(p.read_text()) for p in sorted(runs_below_tmp.rglob("config.yaml"))]
    assert {c["model"]["path"]["class_path"].split(".")[-1] for c in configs} == {
        "Linear",
        "Trigonometric",
    }
    status, shown = fmlightning("ls", runs_below_tmp)
    assert shown.count("finished") == 2


CONFIG = {
    "seed_everything": 0, "experiment": "e", "ema": {"decay": 0.9},
    "model": {"path": {"class_path": "Linear"}, "solver": {"method": "euler"}},
    "data": {"init_args": {"batch_size": 8}}, "trainer": {"max_steps": 5, "devices": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("ema", {"decay": 0.99}, True),
        ("seed_everything", 1, True),
        ("trainer", {"max_steps": 6, "devices": 1}, True),
        ("trainer", {"max_steps": 5, "devices": 4}, False),
        ("model", {"path": {"class_path": "Linear"}, "solver": {"method": "rk4"}}, False),
        ("wandb", {"mode": "online"}, False),
        ("experiment", "f", False),
    ],
)
def test_the_hash_covers_what_changes_the_result(key, value, changes):
    assert (config_hash(CONFIG) != config_hash({**CONFIG, key: value})) is changes


def test_the_directory_is_named_by_hash_and_seed(runs_below_tmp):
    assert run_directory(CONFIG) == runs_below_tmp / "e" / f"{config_hash(CONFIG)}-s0"


def test_a_loaded_run_is_the_trained_field_in_plain_torch(fit):
    run = fit("toy/moons", "--trainer.max_steps=20")
    averaged, raw = package.load(run), package.load(run, ema=False)
    x, t = torch.zeros(3, 2), torch.tensor(0.5)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for field, weights in (
        (averaged, checkpoint["callbacks"]["EMA"]["shadow"]),
        (raw, {k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()}),
    ):
        assert not field.training
        for name, parameter in field.network.named_parameters():
            assert torch.equal(parameter, weights[name])
    assert averaged(x, t).shape == (3, 2)
    assert not torch.equal(averaged(x, t), raw(x, t))


def test_a_run_without_an_average_says_so(fit, fmlightning):
    run = fit("toy/moons", *STEPS, "--ema.decay=0")
    with pytest.raises(ValueError, match="ema=False"):
        package.load(run)
    assert fmlightning("sample", run, "--n=4", "--no_ema", "--device=cpu")[0] == 0


def test_sample_writes_the_same_samples_in_any_batches(fit, fmlightning, tmp_path):
    run = fit(
        "images/digits", *STEPS, "--model.network.channels=8", "--model.network.head_channels=8"
    )
    outputs = []
    for size in (1, 7, 64):
        out = tmp_path / f"out{size}"
        status, shown = fmlightning(
            "sample",
            run,
            "--n=15",
            f"--out={out}",
            f"--batch_size={size}",
            "--solver.num_steps=4",
            "--device=cpu",
        )
        assert status == 0, shown
        assert (out / "samples.png").is_file()
        outputs.append(np.load(out / "samples.npz"))
    # of 15, each of the ten about equally frequent classes of digits has one or two
    assert set(np.unique(outputs[0]["y"], return_counts=True)[1]) <= {1, 2}
    for other in outputs[1:]:
        assert other["y"].tolist() == outputs[0]["y"].tolist()
        # float32 sums in another order; four steps of a network of unit scale
        np.testing.assert_allclose(other["x"], outputs[0]["x"], atol=1e-5)


def test_sample_refuses_to_overwrite_and_wrong_labels(trained, fmlightning, tmp_path):
    run = trained("toy/moons", *STEPS)
    out = tmp_path / "out"
    assert fmlightning("sample", run, "--n=4", f"--out={out}")[0] == 0
    before = files(out)
    status, shown = fmlightning("sample", run, "--n=5", f"--out={out}")
    assert status == 2
    assert "--overwrite" in shown
    assert files(out) == before
    status, shown = fmlightning("sample", run, "--n=4", "--label=3", f"--out={tmp_path / 'b'}")
    assert status == 2
    assert "not conditional" in shown
    status, shown = fmlightning(
        "sample", run, "--n=4", "--solver.method=euller", f"--out={tmp_path / 'b'}"
    )
    assert status == 2
    assert "euller" in shown


def test_report_gives_mean_and_spread_over_seeds(fit, fmlightning, tmp_path):
    judge = "[{class_path: Wasserstein, init_args: {subsets: 2, size: 50}}]"
    runs = [
        fit("toy/moons", *STEPS, f"--seed_everything={s}", "--data.test_size=100", "--evaluation.at_end=true",
            f"--evaluation.metrics={judge}", name=f"s{s}")
        for s in (0, 1, 2)
    ]  # fmt: skip
    out = tmp_path / "expected.json"
    status, shown = fmlightning("report", *runs, "--write_expected", out)
    assert status == 0, shown
    (cell,) = json.loads(out.read_text())["cells"]
    row = cell["metrics"]["w2"]
    values = [json.loads((r / "evaluation.json").read_text())["metrics"]["w2"] for r in runs]
    assert row["n"] == 3
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["std"] == pytest.approx(np.std(values, ddof=1))
    assert "n = 3" in fmlightning("report", runs[0], "--expected", out)[1]


def test_resuming_a_finished_run_changes_nothing(fit, fmlightning):
    run = fit("toy/moons", *STEPS)
    before = files(run)
    status, shown = fmlightning(
        "fit", "--config", run / "config.yaml", "--ckpt_path=auto", "--wandb.mode=disabled"
    )
    assert status == 0, shown
    assert "finished already" in shown
    assert files(run) == before


def test_a_damaged_checkpoint_is_named(trained, fmlightning, tmp_path):
    run = trained("toy/moons", *STEPS)
    path = run / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1  # one bit, which torch.load would not see
    for content in (whole[:1000], b"", bytes(middle)):
        path.write_bytes(content)
        for argv in (
            ["sample", run, f"--out={tmp_path / 'out'}"],
            ["validate", "--ckpt_path", run],
        ):
            status, shown = fmlightning(*argv)
            assert status == 2, shown
            assert "damaged" in shown
            assert "last.ckpt" in shown


def test_weights_of_another_network_are_refused(trained, fmlightning):
    run = trained("toy/moons", *STEPS)
    status, shown = fmlightning(
        "validate", "--ckpt_path", run, "--config", run / "config.yaml", "--model.network.width=32"
    )
    assert status == 2
    assert "another network" in shown


def test_report_does_not_average_unlike_runs(fit, fmlightning, tmp_path):
    judged = ("--data.test_size=100", "--evaluation.at_end=true",
              "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 2, size: 50}}]")  # fmt: skip
    a = fit("toy/moons", *STEPS, *judged, name="a")
    b = fit(
        "toy/moons", *STEPS, *judged, "--model.path=Trigonometric", "--seed_everything=1", name="b"
    )
    status, shown = fmlightning("report", a, b)
    assert status == 0, shown
    assert "model.path=Linear: only 1 of 2 seeds" in shown
    status, shown = fmlightning("report", a, b, "--rows", "data.batch_size")
    assert status == 2
    assert "model.path (Linear, Trigonometric)" in shown
    status, shown = fmlightning("report", a, a)
    assert status == 2
    assert "seed 0" in shown


def test_the_digits_train_in_bf16(fit):
    fit("images/digits", "--trainer.max_steps=2", "--trainer.precision=bf16-mixed")


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_stopped_run_keeps_its_work_and_says_how_to_go_on(tmp_path, sent, status):
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "fmlightning", "fit", "--config", "configs/toy/moons.yaml", f"--run_dir={run}",
            "--wandb.mode=disabled", "--trainer.max_steps=100000"]  # fmt: skip
    with (tmp_path / "shown").open("w") as file:
        process = warm.Warm(argv, file)
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(sent)
    ended, shown = process.wait(timeout=60), (tmp_path / "shown").read_text()
    assert ended == status, shown
    assert "--ckpt_path auto" in shown
    assert json.loads((run / "manifest.json").read_text())["status"] == "stopped"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 50


@pytest.mark.parametrize("argv", [
    ("export", "NAMED", "--out", "OUT"), ("sample", "NAMED", "--out", "OUT"), ("evaluate", "NAMED"), ("ema", "NAMED"),
    ("fit", "--config", "configs/toy/moons.yaml", "--init_from", "NAMED", "--run_dir", "OUT", "--wandb.mode=disabled"),
], ids=lambda argv: argv[0])  # fmt: skip
def test_a_checkpoint_that_is_not_there_is_not_replaced_by_the_newest(
    trained, fmlightning, repository, monkeypatch, tmp_path, argv
):
    monkeypatch.chdir(repository)
    run, out = trained("toy/moons", *STEPS), tmp_path / "out"
    named = run / "checkpoints" / "00000100.ckpt"  # there are others
    words = {"NAMED": str(named), "OUT": str(out)}
    status, shown = fmlightning(*(words.get(word, word) for word in argv))
    assert status == 2, shown
    assert f"{named}: there is no such checkpoint" in shown
    assert f"{run}: last.ckpt" in shown
    assert shown.count("error: ") == 1
    assert not out.exists()

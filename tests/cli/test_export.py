"""`export`, `--init_from` and Lightning's own loggers: what leaves a run, and what enters one."""

import csv
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fmlightning as package
from fmlightning.runs.directory import Run
from fmlightning.runs.weights import read_export, read_weights

SMALL = ("--trainer.max_steps=4", "--data.val_size=64", "--evaluation.metrics=[]")


@pytest.fixture
def run(trained):
    return trained("toy/moons", *SMALL, name="first")


@pytest.mark.parametrize("ema", [True, False])
def test_an_export_gives_the_field_of_the_run_back(fmlightning, run, tmp_path, ema):
    out = tmp_path / "exported"
    status, shown = fmlightning("export", run, "--out", out, "--ema", str(ema).lower())
    assert status == 0, shown
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 8)
    there, back = package.load(run, ema=ema), package.load(out)
    assert torch.equal(there(x, t), back(x, t))
    state = back.network.state_dict()
    assert state.keys() == load_file(out / "model.safetensors").keys()
    for name, value in there.network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert package.__version__ in (out / "README.md").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("ema", [True, False], ids=["averaged", "raw"])
def test_an_export_of_an_export_says_what_it_is(fmlightning, run, tmp_path, ema):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert fmlightning("export", run, "--out", once, "--ema", str(ema).lower())[0] == 0
    status, shown = fmlightning("export", once, "--out", twice)
    assert status == 0, shown
    kind = "averaged" if ema else "raw"
    for out in (once, twice):
        with safe_open(out / "model.safetensors", framework="pt") as file:
            record = json.loads(file.metadata()["fmlightning"])
        assert (record["ema"], record["step"]) == (ema, 4)
        assert f"for 4 steps ({kind} weights)" in " ".join((out / "README.md").read_text().split())
    a, b = (load_file(out / "model.safetensors") for out in (once, twice))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_averaged_weights_are_not_given_for_raw_ones(fmlightning, run, repository, tmp_path):
    averaged, raw, out = (tmp_path / name for name in ("averaged", "raw", "out"))
    assert fmlightning("export", run, "--out", averaged)[0] == 0
    assert fmlightning("export", run, "--out", raw, "--ema", "false")[0] == 0
    config = ("--config", repository / "configs/toy/moons.yaml", "--wandb.mode=disabled")
    for argv in (
        ("export", averaged, "--out", out, "--ema", "false"),
        ("sample", averaged, "--out", out, "--ema", "false"),
        ("fit", *config, "--run_dir", out, "--init_from", averaged, "--init_ema", "false"),
    ):
        status, shown = fmlightning(*argv)
        assert status == 2, shown
        assert "holds averaged weights and no raw ones" in shown
        assert not out.exists()
    assert package.load(raw, ema=False)


def test_the_averaged_and_the_raw_weights_differ(run):
    averaged, _ = read_weights(run)
    raw, _ = read_weights(run, ema=False)
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


def test_an_export_samples_as_the_run_does(fmlightning, run, tmp_path):
    import numpy as np

    out = tmp_path / "exported"
    assert fmlightning("export", run, "--out", out)[0] == 0
    for place, name in ((run, "a"), (out, "b")):
        status, shown = fmlightning(
            "sample", place, "--n", "5", "--out", tmp_path / name, "--device=cpu"
        )
        assert status == 0, shown
    a, b = (np.load(tmp_path / name / "samples.npz")["x"] for name in "ab")
    assert np.array_equal(a, b)


def test_an_export_refuses_what_is_there_already_and_files_of_others(fmlightning, run, tmp_path):
    out = tmp_path / "exported"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    status, shown = fmlightning("export", run, "--out", out)
    assert status == 2
    assert "not an empty directory" in shown
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    save_file({"a": torch.zeros(1)}, out / "model.safetensors")
    with pytest.raises(ValueError, match="not written by `fmlightning export`"):
        package.load(out)
    (out / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is damaged"):
        package.load(out)


# -- starting from another run ----------------------------------------------------------------------


def test_training_starts_from_the_average_of_another_run_at_step_0(fit, fmlightning, run, tmp_path):
    """With a learning rate of zero the weights stay: those of the end are those of the start."""
    still = ("--model.optimizer.lr=0", "--trainer.max_steps=2", *SMALL[1:])
    out = tmp_path / "exported"
    assert fmlightning("export", run, "--out", out)[0] == 0
    for number, place in enumerate((run, run / "checkpoints" / "last.ckpt", out)):
        tuned = fit("toy/moons", *still, f"--init_from={place}", name=f"tuned{number}")
        start, _ = read_weights(run)
        end, _ = read_weights(tuned, ema=False)
        assert all(torch.equal(start[name], end[name]) for name in start)
        checkpoint = torch.load(tuned / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
        states = checkpoint["optimizer_states"][0]["state"].values()
        assert {float(state["step"]) for state in states} == {2.0}  # and not 6: the moments are new
    raw = fit("toy/moons", *still, f"--init_from={run}", "--init_ema=false", name="raw")
    manifests = [Run(tmp_path / name).manifest for name in ("tuned0", "tuned1", "tuned2", "raw")]
    assert manifests[0]["init_from"]["run"] == str(run)
    digests = [m["init_from"]["digest"] for m in manifests]
    hashes = [m["config_hash"] for m in manifests]
    # one set of weights in three places is one start, and the raw weights are another
    assert len(set(digests[:3])) == len(set(hashes[:3])) == 1
    assert digests[3] != digests[0]
    assert hashes[3] != hashes[0]
    assert Run(run).manifest["config_hash"] not in hashes
    assert Run(raw).config["init_digest"] == digests[3]


def test_the_config_of_a_tuned_run_trains_it_again_unless_the_start_has_changed(
    fit, fmlightning, run, tmp_path
):
    tuned = fit("toy/moons", *SMALL, f"--init_from={run}", name="tuned")
    again = ("fit", "--config", tuned / "config.yaml", f"--run_dir={tmp_path / 'again'}")
    status, shown = fmlightning(*again)
    assert status == 0, shown
    assert all(
        torch.equal(value, read_weights(tmp_path / "again")[0][name])
        for name, value in read_weights(tuned)[0].items()
    )
    fit("toy/moons", *SMALL, "--seed_everything=1", "--rerun", name="first")
    status, shown = fmlightning(*again, "--rerun")
    assert status == 2
    assert "not those of init_digest" in shown


def test_another_architecture_is_one_message_with_its_keys(fmlightning, run, repository, tmp_path):
    status, shown = fmlightning(
        "fit", "--config", repository / "configs/toy/moons.yaml", f"--init_from={run}",
        "--model.network.width=24", f"--run_dir={tmp_path / 'other'}", "--wandb.mode=disabled",
    )  # fmt: skip
    assert status == 2
    error = [line for line in shown.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "of another shape" in error[0]
    assert f"init_from={run}" in error[0]
    assert not (tmp_path / "other").exists()


# -- loggers ------------------------------------------------------------------------------------------


def test_a_logger_of_lightning_stands_beside_the_metrics_file(fit, tmp_path):
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "theirs"), "name": "run", "version": 0},
    }
    run = fit(
        "toy/moons",
        *SMALL,
        f"--trainer.logger={json.dumps(logger)}",
        "--trainer.log_every_n_steps=1",
    )
    ours = [r for r in csv.DictReader((run / "metrics.csv").open()) if r["train/loss"]]
    folder = tmp_path / "theirs" / "run" / "version_0"
    theirs = [r for r in csv.DictReader((folder / "metrics.csv").open()) if r["train/loss"]]
    assert [float(r["train/loss"]) for r in ours] == [float(r["train/loss"]) for r in theirs]
    assert len(ours) == 4
    assert "batch_size" in (folder / "hparams.yaml").read_text()


def test_the_package_says_that_it_is_typed():
    from importlib.resources import files

    assert (files("fmlightning") / "py.typed").is_file()


@pytest.mark.parametrize(
    "header",
    ["{", "3", "[]", '{"flow": 1}', '{"flow": {"event_shape": 2}}', "[" * 100_000],
    ids=range(6),
)
def test_a_header_that_another_program_wrote_is_told_with_its_file(tmp_path, header):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"fmlightning": header})
    with pytest.raises(
        ValueError, match=r"model\.safetensors was not written by `fmlightning export`"
    ):
        read_export(tmp_path)

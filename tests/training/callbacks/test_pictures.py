"""Pictures and scores: in the run directory, and mirrored to an offline W&B file that is read back here."""

import csv
import json
import struct
import time

import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

PICTURES = (
    "--samples.at_end=true",
    "--trajectories.at_end=true",
    "--evaluation.at_end=true",
    "--wandb.mode=auto",
)
SCALED = {
    "toy/moons": (
        "--trainer.max_steps=4", "--data.test_size=200", "--data.val_size=64", "--trainer.log_every_n_steps=2",
        "--trainer.val_check_interval=2", "--model.solver={method: euler, num_steps: 4}",
        "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 2, size: 100}}]",
    ),
    "images/digits": (
        "--trainer.max_steps=4", "--model.solver={method: euler, num_steps: 4}", "--trainer.log_every_n_steps=2",
        "--model.network.channels=8", "--model.network.head_channels=8", "--trainer.val_check_interval=2",
    ),
}  # fmt: skip


def records(path):
    """The records of an offline W&B file: LevelDB's log format around protocol buffers."""
    content, offset, pending = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        if not kind or offset + 7 + length > len(content):
            break
        pending += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def mirrored(path):
    """The records of a finished run; W&B's own process writes the last ones after `finish` has returned."""
    for _ in range(100):
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} does not end")


@pytest.mark.parametrize("config", SCALED)
def test_a_run_draws_scores_and_mirrors(fit, config):
    run = fit(config, *SCALED[config], *PICTURES)
    names = {p.name.split("-")[0] for p in (run / "samples").glob("*.png")}
    assert names == (
        {"samples", "trajectories", "path"}
        if config == "toy/moons"
        else {"samples", "trajectories"}
    )
    for picture in (run / "samples").glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
    scores = json.loads((run / "evaluation.json").read_text())["metrics"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    for name, value in scores.items():
        assert float(rows[-1][f"eval/{name}"]) == pytest.approx(value)
    assert not any("fid" in name for name in scores)
    if config == "images/digits":
        assert {
            "frechet_digits@350",
            "frechet_digits@350_real",
            "accuracy@350",
            "accuracy@350_real",
        } <= set(scores)

    (mirror,) = (run / "wandb").glob("offline-run-*/*.wandb")
    found = mirrored(mirror)
    history = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                history[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    assert {"train/loss", "val/loss", *(f"eval/{n}" for n in scores)} <= set(history)
    assert history["eval/nfe"] == scores["nfe"]
    media = list((run / "wandb").rglob("media/images/*.png"))
    assert {p.name.split("_")[0] for p in media} == names
    assert any(key.startswith("samples") for key in history)
    # the run in W&B is that of the directory
    (started,) = (r.run for r in found if r.WhichOneof("record_type") == "run")
    assert started.run_id == "-".join(run.parts[-2:])
    config_keys = {u.key for r in found if r.WhichOneof("record_type") in ("run", "config")
                   for u in (r.run.config.update if r.HasField("run") else r.config.update)}  # fmt: skip
    assert {"model", "data", "trainer", "seed_everything"} <= config_keys


def test_every_n_steps_is_every_n_optimiser_steps(fit):
    run = fit(
        "toy/moons", *SCALED["toy/moons"], "--trainer.max_steps=6", "--samples.every_n_steps=2",
        "--trainer.accumulate_grad_batches=3", "--samples.num_samples=50",
    )  # fmt: skip
    steps = sorted(int(p.stem.split("-")[1]) for p in (run / "samples").glob("samples-*.png"))
    assert steps == [2, 4, 6]


def test_offline_is_said_once_with_how_to_upload(command, tmp_path):
    result = command(
        "fit", "--config", "configs/toy/moons.yaml", "--trainer.max_steps=1", f"--run_dir={tmp_path / 'run'}",
        "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.at_end=false",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    shown = result.stdout + result.stderr
    assert shown.count("wandb sync") == 1
    assert "anonymous" not in shown
    assert "Warning" not in shown, shown


@pytest.mark.parametrize(
    ("variables", "asked", "expected"),
    [
        ({}, "auto", "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "auto", "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_MODE": "online"}, "offline", "offline"),
        ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_MODE": "online"}, "disabled", "disabled"),
    ],
)
def test_the_mode_follows_what_was_asked_then_the_environment(
    monkeypatch, tmp_path, variables, asked, expected
):
    from fmlightning.training.tracking import resolve_mode

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(asked) == expected


def test_a_mirror_that_cannot_start_is_said_once_and_training_goes_on(fit, monkeypatch, capsys):
    from lightning.pytorch.loggers import WandbLogger

    def fails(self):
        raise ConnectionError("no route to W&B")

    monkeypatch.setattr(WandbLogger, "experiment", property(fails))
    from fmlightning.training.tracking import Tracking, reachable, wandb_logger

    logger = wandb_logger(Tracking(mode="offline"), fit("toy/moons", "--trainer.max_steps=1"), "e")
    assert not reachable(logger)
    assert capsys.readouterr().out.count("no route to W&B") == 1
    run = fit("toy/moons", "--trainer.max_steps=2", "--wandb.mode=offline", name="offline")
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"

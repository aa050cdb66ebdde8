"""A run that is resumed under other options: what may change is taken, the rest refused, and both are on record."""

import csv
import json
import math

import pytest
import torch
import yaml

from fmlightning.cli.reproduce import finished
from fmlightning.runs.directory import Run
from fmlightning.runs.segments import changed_options, config_before, in_words, segments
from fmlightning.runs.signals import STOP_AFTER

TINY = (
    "--model.network.width=16", "--model.network.depth=2", "--data.val_size=64", "--data.test_size=64",
    "--evaluation.metrics=[]", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=20",
)  # fmt: skip


@pytest.fixture
def stopped(fmlightning, trained, tmp_path, monkeypatch):
    """A run of 20 steps, at its end or stopped after some of them; the command that goes on with it."""
    run = trained("toy/moons", *TINY, "--trainer.max_steps=20")

    def call(*overrides):
        return fmlightning("fit", "--config", run / "config.yaml", "--ckpt_path=auto", *overrides)

    return run, call


def rates(run):
    with (run / "metrics.csv").open() as file:
        return {int(r["step"]): float(r["train/lr"]) for r in csv.DictReader(file) if r["train/lr"]}


def files(run):
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_the_schedule_follows_the_new_length_and_the_rate_and_decay_are_those_asked_for(stopped):
    run, go_on = stopped
    status, shown = go_on(
        "--trainer.max_steps=40", "--model.optimizer.lr=0.01", "--model.optimizer.weight_decay=0.5"
    )
    assert status == 0, shown
    found = rates(run)
    # half a cosine over 40 steps from 0.01, at the step before
    for step in (20, 30, 39):
        assert found[step] == pytest.approx(0.01 * (1 + math.cos(math.pi * step / 40)) / 2)
    group = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert group["param_groups"][0]["weight_decay"] == 0.5
    assert segments(Run(run).manifest)[1:] == [
        {
            "step": 20,
            "changes": {
                "model.optimizer.lr": [0.005, 0.01],
                "model.optimizer.weight_decay": [0.0, 0.5],
                "trainer.max_steps": [20, 40],
            },
        }
    ]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 40


@pytest.mark.parametrize("scheduler", ["null", "torch.optim.lr_scheduler.ConstantLR"])
def test_a_rate_without_a_schedule_of_ours_is_taken_too(fmlightning, fit, scheduler):
    run = fit("toy/moons", *TINY, "--trainer.max_steps=3", f"--model.scheduler={scheduler}")
    before = rates(run)
    status, shown = fmlightning(
        "fit", "--config", run / "config.yaml", "--ckpt_path=auto", "--trainer.max_steps=6",
        "--model.optimizer.lr=0.05",
    )  # fmt: skip
    assert status == 0, shown
    found = rates(run)
    assert [found[step] / before[2] for step in (3, 5)] == pytest.approx(
        [
            10,
            10 if scheduler == "null" else 30,
        ]  # torch's ends its third of the rate after five steps
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--seed_everything=7", "seed_everything was 0 and is 7"),
        ("--data.batch_size=64", "data.batch_size was 256 and is 64"),
        ("--model.path=Trigonometric", "model.path was Linear(sigma_min=0.0) and is Trigonometric()"),
        ("--model.objective.prediction=data", "model.objective.prediction was velocity and is data"),
        ("--ema.decay=0.5", "ema.decay was 0.999 and is 0.5"),
        ("--trainer.precision=64-true", "trainer.precision was null and is 64-true"),
        ("--model.scheduler.warmup_steps=3", "model.scheduler.warmup_steps was 0 and is 3"),
        ("--model.scheduler=null", "model.scheduler was Cosine(warmup_steps=0) and is null"),
        ("--model.optimizer=SGD", "model.optimizer was AdamW("),
        ("--model.optimizer.betas=[0.5,0.9]", "model.optimizer.betas was "),
        ("--trainer.gradient_clip_val=1", "trainer.gradient_clip_val was null and is 1"),
        ("--model.network.width=32", "model.network.width was 16 and is 32"),
        ("--model.coupling=MinibatchOT", "model.coupling was Independent() and is MinibatchOT("),
        ("--trainer.max_steps=10", "leaves nothing to train"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_and_nothing_is_written(stopped, override, words):
    run, go_on = stopped
    before = files(run)
    status, shown = go_on("--trainer.max_steps=40", override)
    assert status == 2
    assert words in shown
    assert "--run_dir DIR" in shown or "name more" in shown
    assert files(run) == before


def test_other_data_under_the_same_options_are_refused(fmlightning, fit, tmp_path):
    points = tmp_path / "points.csv"
    points.write_text("\n".join(f"{k % 7},{k % 11}" for k in range(200)))
    data = ("--data.target=PointsFile", f"--data.target.file={points}", "--data.batch_size=16")
    run = fit(
        "toy/moons", *data, "--evaluation.metrics=[]", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"
    )  # fmt: skip
    points.write_text("\n".join(f"{k % 5},{k % 11}" for k in range(200)))
    before = files(run)
    status, shown = fmlightning(
        "fit", "--config", run / "config.yaml", "--ckpt_path=auto", "--trainer.max_steps=4"
    )
    assert status == 2
    assert "their files have changed" in shown
    assert files(run) == before


def test_what_is_no_result_may_change_and_is_no_segment(stopped):
    run, go_on = stopped
    status, shown = go_on("--trainer.max_steps=24", "--trainer.log_every_n_steps=2")
    assert status == 0, shown
    assert list(segments(Run(run).manifest)[1]["changes"]) == ["trainer.max_steps"]


@pytest.mark.slow
def test_a_run_of_two_segments_is_reproduced_and_shown(stopped, fmlightning, monkeypatch):
    """The second begins before the first had come to its end."""
    run, go_on = stopped
    monkeypatch.setenv(STOP_AFTER, "27")
    assert go_on("--trainer.max_steps=40")[0] == 75
    monkeypatch.delenv(STOP_AFTER)
    status, shown = go_on("--trainer.max_steps=44", "--model.optimizer.lr=0.001")
    assert status == 0, shown
    assert [part["step"] for part in segments(Run(run).manifest)] == [0, 20, 27]
    status, shown = fmlightning("reproduce", run)
    assert status == 0, shown
    assert shown.splitlines()[-1].startswith("identical: ")
    words = "step 20: trainer.max_steps 20 -> 40; step 27: model.optimizer.lr 0.005 -> 0.001, "
    assert in_words(Run(run).manifest) == f"{words}trainer.max_steps 40 -> 44"
    assert words in " ".join(fmlightning("show", run)[1].split()) + " "


def test_a_report_does_not_pair_it_with_a_run_of_the_same_length(stopped, fit, fmlightning):
    run, go_on = stopped
    assert go_on("--trainer.max_steps=24")[0] == 0
    other = fit("toy/moons", *TINY, "--trainer.max_steps=24", "--seed_everything=1", name="other")
    status, shown = fmlightning("report", run, other, "--metric=val/loss")
    assert status == 0, shown
    assert "resumed" in shown


def test_going_back_behind_a_segment_forgets_it(stopped):
    run, go_on = stopped
    first = run / "checkpoints/00000020.ckpt"
    kept = first.read_bytes()
    assert go_on("--trainer.max_steps=30")[0] == 0
    first.write_bytes(kept)
    status, shown = go_on(f"--ckpt_path={first}", "--trainer.max_steps=25")
    assert status == 0, shown
    assert in_words(Run(run).manifest) == "step 20: trainer.max_steps 20 -> 25"


def test_options_are_compared_by_name_and_objects_by_class():
    then = {
        "model": {"path": {"class_path": "a.Linear", "init_args": {"sigma_min": 0.0}}},
        "trainer": {},
    }
    now = json.loads(json.dumps(then))
    now["model"]["path"]["init_args"] |= {"sigma_min": 0.1, "new": 3}  # of a later version
    now["trainer"]["max_steps"] = 5
    changes = changed_options(then, now)
    assert changes == {"model.path.sigma_min": [0.0, 0.1], "trainer.max_steps": [None, 5]}
    segment = {"step": 1, "changes": {"trainer.max_steps": [None, 5]}}
    assert config_before(now, [segment])["trainer"]["max_steps"] is None
    assert now["trainer"]["max_steps"] == 5


def test_a_run_killed_behind_its_last_step_ends_and_can_be_reproduced(stopped):
    run, go_on = stopped
    manifest = Run(run).manifest
    kept = {k: v for k, v in manifest.items() if k not in ("end", "end_step", "start_step")}
    (run / "manifest.json").write_text(json.dumps({**kept, "status": "running"}))
    status, shown = go_on("--trainer.max_steps=20")
    assert status == 0, shown
    assert finished(run).manifest["start_step"] == 20

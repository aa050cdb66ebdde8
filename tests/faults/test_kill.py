"""A run killed with SIGKILL at any moment and started again by the same command ends as if nothing had happened.

What a killed process leaves behind is decided by the last thing it did to the disk. So the runs here are killed just
before the n-th such thing: a file opened, half of a checkpoint written, a flush, a rename, a removal. Python starts
`sitecustomize` by itself, which lets the real command be killed from inside, at the same point on any machine.
"""

import csv
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image

from fmlightning.flow.keys import Key

REPOSITORY = Path(__file__).parents[2]

KILLER = r"""
import io, os, re, signal, sys

folder, journal = os.environ["KILL_IN"], os.environ["KILL_JOURNAL"]
at, what = int(os.environ["KILL_AT"]), re.compile(os.environ["KILL_WHAT"])
count = 0

def event(kind, path):
    global count
    if str(path).startswith(folder) and str(path) != journal:
        line = f"{kind} {os.path.basename(str(path))}"
        with real_open(journal, "a") as file:
            file.write(line + "\n")
        count += bool(what.match(line))
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

def audit(name, args):
    if name == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        event("open", args[0])
    elif name in ("os.rename", "os.remove"):
        event(name[3:], args[0])

class Halves(io.BufferedRandom):
    writes = 0
    def write(self, content):
        Halves.writes += 1
        if Halves.writes % 40 == 0:
            super().write(content[: len(content) // 2])
            self.flush()
            event("write", self.name)
            return super().write(content[len(content) // 2 :])
        return super().write(content)

def opened(file, mode="r", *args, **kwargs):
    if str(file).endswith(".tmp") and mode == "w+b":
        return Halves(io.FileIO(str(file), mode))
    return real_open(file, mode, *args, **kwargs)

def fsync(descriptor):
    event("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
    return real_fsync(descriptor)

real_open, real_fsync = io.open, os.fsync
if os.environ.get("LOCAL_RANK", "0") == "0":  # the others write nothing
    io.open, os.fsync = opened, fsync
    sys.addaudithook(audit)
"""

COMMON = (
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false",
    "--model.solver={method: euler, num_steps: 3}",
)  # fmt: skip
JUDGED = (
    "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 2, size: 50}}]", "--data.test_size=100",
    "--data.val_size=100",
)  # fmt: skip
RUNS = {
    # a finite set and pairs, gradients of two batches in a step, scores during training and at its end; a checkpoint
    # and a validation after the same step, at and off the end of an epoch of 10 batches
    "toy": (
        "toy/moons", *JUDGED, "--trainer.max_steps=13", "--trainer.accumulate_grad_batches=2",
        "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=8", "--data.train_size=160",
        "--data.batch_size=16", "--model.coupling=MinibatchOT", "--checkpoints.every_n_train_steps=2",
        "--evaluation.every_n_steps=4",
    ),
    # labels hidden at random, dropout, dequantisation by epoch; epochs of 12 batches
    "digits": (
        "images/digits", "--trainer.max_steps=16", "--trainer.log_every_n_steps=2", "--data.batch_size=100",
        "--model.network.channels=8", "--model.network.head_channels=8", "--model.network.dropout=0.2",
        "--model.class_dropout_prob=0.3", "--trainer.val_check_interval=5", "--checkpoints.every_n_train_steps=3",
        "--evaluation.metrics=[]", "--checkpoints.monitor=val/loss", "--checkpoints.save_top_k=2",
    ),
    # counted in epochs, each validated and saved
    "epochs": (
        "toy/moons", *JUDGED, "--trainer.max_steps=-1", "--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=1.0", "--data.steps_per_epoch=4", "--trainer.log_every_n_steps=1",
        "--checkpoints.every_n_train_steps=null", "--checkpoints.every_n_epochs=1", "--model.class_dropout_prob=0",
    ),
    # read from files by two workers, mirrored at random; epochs of 4 batches
    "workers": (
        "images/photos", "--data=FolderData", "--data.folder={pictures}", "--data.labelled=true", "--data.image_size=8",
        "--data.test_size=8", "--data.flip=true", "--data.num_workers=2", "--data.batch_size=10",
        "--model.network.channels=8", "--model.network.head_channels=8", "--model.network.attention_levels=[]",
        "--model.class_dropout_prob=0.2", "--trainer.max_steps=11", "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=3", "--checkpoints.every_n_train_steps=2", "--evaluation.metrics=[]",
    ),
}  # fmt: skip
# four batches paired together, and killed between them; and a potential that is fitted before the first step
RUNS["pool"] = (*RUNS["toy"], "--model.coupling.ot_batch_size=64", "--model.prefetch=3")
RUNS["semidiscrete"] = (*RUNS["toy"], "--model.coupling=SemidiscreteOT")
RUNS["two processes"] = (*RUNS["toy"], "--trainer.strategy=ddp", "--trainer.devices=2")

WALL_CLOCK = re.compile(r"seconds|per_second|time")
"""Columns that no two runs share."""


def pictures(folder):
    """Two classes of 24 files, the same in every folder."""
    for kind, (name, side) in enumerate((("bright", 12), ("dark", 10))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        generator = Key(kind).fold("pictures").generator()
        shape = (24, side, side, 3)
        pixels = torch.randint(128, shape, generator=generator, dtype=torch.uint8) + 127 * (
            1 - kind
        )
        for number, image in enumerate(pixels.numpy()):
            Image.fromarray(image).save(folder / name / f"{number:02}.png")
    return folder


def start(run, name, at=0, what=""):
    """The real command in its own process, to be killed before the `at`-th thing of a kind that it does to the disk."""
    tools = run.parent / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "sitecustomize.py").write_text(KILLER)
    config, *options = RUNS[name]
    if name == "workers" and not (run.parent / "pictures").exists():
        pictures(run.parent / "pictures")
    options = [option.format(pictures=run.parent / "pictures") if "{pictures}" in option else option
               for option in options]  # fmt: skip
    argv = [sys.executable, "-m", "fmlightning", "fit", "--config", f"configs/{config}.yaml", *COMMON, *options,
            f"--run_dir={run}", "--ckpt_path=auto"]  # fmt: skip
    journal = run.with_suffix(".journal")
    journal.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tools), "KILL_IN": str(run), "KILL_AT": str(at), "KILL_WHAT": what,
                   "KILL_JOURNAL": str(journal), "OMP_NUM_THREADS": "1"}  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        environment.pop(name, None)
    with run.with_suffix(".out").open("w") as shown:
        return warm.Warm(argv, shown, env=environment)


def finish(process, run):
    """Whether a process came to its end, and what it printed; what it started goes with it."""
    status = process.wait(timeout=1200)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    shown = run.with_suffix(".out").read_text()
    assert status in (0, -signal.SIGKILL), shown
    return status == 0, shown


def journal(run):
    return run.with_suffix(".journal").read_text().splitlines()


def state(run):
    """Weights, average, optimiser, schedule and position at the end of a run."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    data = next(v for k, v in checkpoint.items() if k.endswith("Data"))
    return {
        "weights": checkpoint["state_dict"],
        "average": checkpoint["callbacks"]["EMA"],
        "moments": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "position": (checkpoint["global_step"], data),
        "kept": checkpoint["callbacks"]["Checkpoints"]["kept"],
    }


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in r.items() if not WALL_CLOCK.search(k)} for r in csv.DictReader(file)
        ]


def assert_same(run, control):
    ours, theirs = state(run), state(control)
    for part in theirs:
        assert identical(ours[part], theirs[part]), part
    assert metrics(run) == metrics(control)
    steps = [row["step"] for row in metrics(run)]
    assert len(steps) == len(set(steps)), "a step twice"
    names = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (run, control)]
    assert names[0] == names[1], "files left over, or missing"
    assert (control / "evaluation.json").is_file() == (run / "evaluation.json").is_file()


CONTROLS = {}


def control(name, tmp_path_factory):
    """The uninterrupted run, twice, and the two agree."""
    if name not in CONTROLS:
        folder = tmp_path_factory.mktemp(name)
        runs = [folder / "one", folder / "two"]
        for process, run in [(start(run, name), run) for run in runs]:
            done, shown = finish(process, run)
            assert done, shown
            assert "starting at step 0" in shown
        assert_same(*runs)
        CONTROLS[name] = runs[0]
    return CONTROLS[name]


def go_on_to_the_end(run, name, kills):
    """Start the run again and again, each time killed at the next point; returns what each start printed."""
    killed = []
    for kill in (*kills, (0,)):
        done, shown = finish(start(run, name, *kill), run)
        killed.append(
            (done, journal(run)[-1] if run.with_suffix(".journal").exists() else "", shown)
        )
        if done:
            break
    assert killed[-1][0]
    return killed


def drawn(name, count, high):
    """Numbers from 1 to `high`, by their key."""
    generator = Key(0).fold(f"kill {name}").generator()
    return (torch.randint(1, high + 1, (count,), generator=generator)).tolist()


def test_a_run_killed_four_times_ends_like_one_that_was_not(tmp_path, tmp_path_factory):
    whole = control("toy", tmp_path_factory)
    run = tmp_path / "run"
    kills = (
        (1, "rename .config.yaml"),  # when nothing has its name yet
        (1, "write .00000002.ckpt"),  # within the first checkpoint
        (2, "fsync checkpoints"),  # when `last.ckpt` of step 2 has just got its name
        (2, "fsync checkpoints"),  # and that of step 4, which is validated too
    )
    starts = go_on_to_the_end(run, "toy", kills)
    assert [done for done, _, _ in starts] == [False, False, False, False, True]
    assert "starting at step 0" in starts[1][2]
    assert "starting at step 0" in starts[2][2]
    assert f"going on from {run / 'checkpoints' / 'last.ckpt'}, step 2" in starts[3][2]
    assert f"going on from {run / 'checkpoints' / 'last.ckpt'}, step 4" in starts[4][2]
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_a_dozen_random_points_ends_like_one_that_was_not(
    name, tmp_path, tmp_path_factory
):
    whole = control(name, tmp_path_factory)
    events = journal(whole)
    kinds = re.compile(r"(write|fsync|rename|open) \.?\w+\.ckpt")
    inside = [n for n, line in enumerate(events, 1) if kinds.match(line)]
    anywhere = drawn(name, 6, len(events))
    within = [inside[k - 1] for k in drawn(f"{name} within", 6, len(inside))]
    for number, at in enumerate((*anywhere, *within)):  # each from the start
        run = tmp_path / f"run{number}"
        starts = go_on_to_the_end(run, name, [(at,)])
        assert not starts[0][0], starts[0][2]
        assert_same(run, whole)
    # and one after another in one run, wherever they fall
    run = tmp_path / "many"
    go_on_to_the_end(run, name, [(at,) for at in drawn(f"{name} many", 8, len(events) // 2)])
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "digits"])
def test_a_run_killed_from_outside_ends_like_one_that_was_not(name, tmp_path, tmp_path_factory):
    """By the clock, so in the middle of a step, of a validation or of the scores as well."""
    whole = control(name, tmp_path_factory)
    run = tmp_path / "run"
    for delay in drawn(f"{name} outside", 5, 1000):
        process = start(run, name)
        deadline = time.monotonic() + 600
        while not run.with_suffix(".journal").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay / 500)  # where it falls is chance, and nothing depends on it
        process.kill()
        if finish(process, run)[0]:
            break
    go_on_to_the_end(run, name, ())
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["term", "ctrl-c"])
def test_a_run_that_was_asked_to_stop_ends_like_one_that_was_not(
    name, sent, tmp_path, tmp_path_factory
):
    whole = control(name, tmp_path_factory)
    run = tmp_path / "run"
    for rows in (2, 5, 9):
        # a run that is slow to stop leaves more rows, and the next must have started before it is stopped
        there = len(metrics(run)) if (run / "metrics.csv").is_file() else 0
        process = start(run, name)
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.csv").is_file() and len(metrics(run)) >= max(rows, there + 1):
                process.send_signal(sent)
                break
            time.sleep(0.005)
        assert process.wait(timeout=600) >= 0, run.with_suffix(".out").read_text()
    go_on_to_the_end(run, name, ())
    steps = [row["step"] for row in metrics(run)]
    assert len(steps) == len(set(steps))
    for part in ("weights", "average", "moments", "schedule", "position"):
        assert identical(state(run)[part], state(whole)[part]), part
    assert metrics(run) == metrics(whole)

"""Bad files and dying workers under the real command: one message, a non-zero exit, and a run that goes on exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image

from fmlightning.flow.keys import Key

REPOSITORY = Path(__file__).parents[3]
PATIENCE = 240  # seconds; a busy machine takes long to start


@pytest.fixture
def folder(tmp_path):
    images = torch.randint(0, 256, (40, 8, 8, 3), generator=Key(0).generator())
    root = tmp_path / "images"
    root.mkdir()
    for number, image in enumerate(images.to(torch.uint8).numpy()):
        Image.fromarray(image).save(root / f"{number:02}.png")
    return root


def command(folder, run, steps, *options):
    """A flow on the images of a folder, which two workers read."""
    network = '{"class_path": "UNet", "init_args": {"in_channels": 3, "channels": 8, "channel_mult": [1], ' \
        '"num_blocks": 1, "attention_levels": [], "head_channels": 8}}'  # fmt: skip
    return [
        sys.executable, "-m", "fmlightning", "fit", f"--run_dir={run}", "--model.network", network,
        "--data", "FolderData", f"--data.folder={folder}", "--data.image_size=8", "--data.test_size=8",
        "--data.batch_size=8", "--data.num_workers=2", f"--trainer.max_steps={steps}", "--wandb.mode=disabled",
        "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.at_end=false",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
        "--trainer.check_val_every_n_epoch=1000", "--checkpoints.every_n_train_steps=5", *options,
    ]  # fmt: skip


def run(*args):
    return warm.run(args, timeout=PATIENCE)


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def workers_of(pid):
    """The children of a process that are copies of it."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        line = Path(f"/proc/{child}/cmdline").read_bytes()
        if line == Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(child))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_worker_that_dies_ends_the_run_with_one_message_and_it_resumes_exactly(folder, tmp_path):
    control, killed = tmp_path / "control", tmp_path / "killed"
    steps = 40
    assert run(*command(folder, control, steps)).returncode == 0
    # far more steps than it will take, until a worker is killed
    process = subprocess.Popen(
        command(folder, killed, 1_000_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    try:
        limit = time.monotonic() + PATIENCE
        while not (killed / "checkpoints" / "last.ckpt").exists() or not workers_of(process.pid):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, shown = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    errors = [line for line in shown.splitlines() if line.startswith("error:")]
    assert process.returncode == 2, shown
    assert len(errors) == 1
    assert "data.num_workers=2: a process that reads images died" in errors[0]
    assert "--ckpt_path auto" in errors[0]
    assert "Traceback" not in shown
    # what it left is whole: it goes on, with another number of workers, and ends where the control ends
    reached = torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    end = max(steps, reached + 7)
    for place, options in ((control, ()), (killed, ("--data.num_workers=1",))):
        result = run(*command(folder, place, end, "--ckpt_path=auto", *options))
        assert result.returncode == 0, result.stderr
    ours, theirs = weights(killed), weights(control)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_bad_image_is_named_and_fatal_or_skipped_as_configured(folder, tmp_path, policy):
    (folder / "17.png").write_bytes(b"no image")
    (folder / "18.png").write_bytes((folder / "18.png").read_bytes()[:100])
    result = run(*command(folder, tmp_path / "run", 8, f"--data.on_corrupt={policy}"))
    shown = result.stdout + result.stderr
    assert "Traceback" not in shown
    bad = [line for line in shown.splitlines() if "no readable image" in line]
    if policy == "fail":
        assert result.returncode == 2, shown
        assert len(bad) == 1
        assert bad[0].startswith("error: ")
        assert f"{folder}/1" in bad[0]
    else:
        assert result.returncode == 0, shown
        assert any(f"{folder}/17.png" in line for line in bad), shown
        assert any("skipped, 2 so far" in line for line in bad)

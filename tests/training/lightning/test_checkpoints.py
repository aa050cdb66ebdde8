"""Checkpoints: whole or not there, checked before they are read, and the right ones kept."""

import csv
import io
import os
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from fmlightning.cli.load import load
from fmlightning.runs.checkpoint import read_checkpoint
from fmlightning.runs.checksum import append_checksum, recorded_step, require_intact
from fmlightning.runs.directory import Run
from fmlightning.runs.files import atomic_write
from fmlightning.training.lightning.checkpoints import Checkpoints, ChecksummedFiles

CONTENT = {"state_dict": {"w": torch.arange(4.0)}, "flow": {}, "global_step": 7}
QUICK = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.at_end=false",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.devices=1",
)  # fmt: skip
SMALL = (
    "--trainer.max_steps=12", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=4", "--data.val_size=100",
    "--data.batch_size=32", "--model.network.width=8", "--checkpoints.every_n_train_steps=4",
)  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.ckpt"
    ChecksummedFiles().save_checkpoint(CONTENT, path)
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# -- the file -----------------------------------------------------------------------------------------


def test_others_read_it_as_ever(saved):
    for content in (
        torch.load(saved, weights_only=True),
        torch.load(saved, weights_only=True, mmap=True),
        TorchCheckpointIO().load_checkpoint(saved),
        read_checkpoint(saved),
    ):
        assert torch.equal(content["state_dict"]["w"], CONTENT["state_dict"]["w"])
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
    require_intact(saved)
    assert recorded_step(saved) == 7


def test_any_flipped_bit_is_refused(saved):
    whole = saved.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"x\.ckpt is damaged"):
            require_intact(saved)


def test_any_torn_or_longer_file_is_refused(saved):
    whole = saved.read_bytes()
    for content in (
        *(whole[:size] for size in range(0, len(whole), 7)),
        whole + b"\0",
        b"\0" * 999,
    ):
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ckpt is damaged"):
            require_intact(saved)


class Harmful:
    ran: list[int] = []  # noqa: RUF012

    def __reduce__(self):
        return (Harmful.ran.append, (1,))


def test_code_in_a_file_is_never_run(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({**CONTENT, "harm": Harmful()}, path)
    with pytest.raises(ValueError, match="no checksum"):
        read_checkpoint(path)
    with path.open("r+b") as file:
        append_checksum(file, 7)
    with pytest.raises(ValueError, match="not read"):
        read_checkpoint(path)
    assert not Harmful.ran


def test_a_file_of_plain_lightning_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "x.ckpt"
    TorchCheckpointIO().save_checkpoint(CONTENT, path)
    with pytest.raises(ValueError, match=r"it has no checksum\. Name another checkpoint"):
        read_checkpoint(path)


def test_a_file_of_an_older_layout_says_what_it_lacks(tmp_path):
    path = tmp_path / "x.ckpt"
    ChecksummedFiles().save_checkpoint({"state_dict": {}, "global_step": 0}, path)
    with pytest.raises(ValueError, match="no 'flow'"):
        read_checkpoint(path)


# -- writing ------------------------------------------------------------------------------------------


def test_the_order_is_flush_rename_flush(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(a, b):
        assert Path(a).parent == Path(b).parent
        done.append(("replace", Path(b).name))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    ChecksummedFiles().save_checkpoint(CONTENT, tmp_path / "x.ckpt")
    temporary = done[0][1]
    assert temporary.startswith(".x.ckpt.")
    assert temporary.endswith(".tmp")
    assert done == [("fsync", temporary), ("replace", "x.ckpt"), ("fsync", tmp_path.name)]


def test_what_is_written_takes_its_name_only_when_it_is_whole(saved):
    before = saved.read_bytes()

    def half():
        with atomic_write(saved) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["x.ckpt"]


def test_at_every_moment_of_a_run_each_checkpoint_is_whole(fit, monkeypatch, tmp_path):
    folder, seen = tmp_path / "run" / "checkpoints", []
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def watched(name):
        def call(*args, **kwargs):
            for path in folder.glob("*.ckpt"):
                assert not path.is_symlink()
                require_intact(path)
            seen.append(len(list(folder.glob("*.ckpt"))))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        monkeypatch.setattr(os, name, watched(name))
    fit("toy/moons", *SMALL)
    after_first = seen[seen.index(2) :]
    assert min(after_first) >= 2  # one to fall back on
    assert names(folder) == ["00000012.ckpt", "last.ckpt"]


def full_disk(folder):
    """A small file system, where the rights allow one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("room", [0, 16_000], ids=["nothing", "a part of a checkpoint"])
def test_a_full_disk_is_one_error_and_leaves_the_earlier_ones_whole(
    fmlightning, fit, repository, tmp_path, room
):
    same = (*QUICK, *SMALL, "--model.scheduler=null")  # a schedule would know of the length
    control = fit("toy/moons", *same, name="control")
    disk = tmp_path / "disk"
    if not full_disk(disk):
        pytest.skip("no right to mount a file system")
    run, ballast = disk / "run", disk / "ballast"
    config = repository / "configs/toy/moons.yaml"
    command = ("fit", "--config", config, *same, f"--run_dir={run}", "--ckpt_path=auto")
    try:
        status, shown = fmlightning(*command, "--trainer.max_steps=4")
        assert status == 0, shown
        before = {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}
        assert room < len(before["last.ckpt"])
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))
        status, shown = fmlightning(*command)
        assert status == 2, shown
        assert shown.count("error:") == 1
        assert "No space left on device" in shown
        assert "--ckpt_path auto" in shown
        assert {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()} == before
        # with room, it goes on as if nothing had happened
        ballast.unlink()
        status, shown = fmlightning(*command)
        assert status == 0, shown
        last = [read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (control, run)]
        for name, value in last[0]["state_dict"].items():
            assert torch.equal(last[1]["state_dict"][name], value)
        assert (run / "metrics.csv").read_text() == (control / "metrics.csv").read_text()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_on_file_sizes_is_the_same_error(saved):
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*--ckpt_path auto"):
            ChecksummedFiles().save_checkpoint({**CONTENT, "large": torch.zeros(100_000)}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["x.ckpt"]


# -- finding the one to resume from -------------------------------------------------------------------


def torn(path):
    path.write_bytes(path.read_bytes()[:-500])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def broken_link(path):
    path.unlink()
    path.symlink_to("nowhere.ckpt")


@pytest.fixture
def resume(fmlightning, repository):
    def call(run, *options, steps=12):
        return fmlightning(
            "fit", "--config", repository / "configs/toy/moons.yaml", *QUICK, *SMALL, f"--trainer.max_steps={steps}",
            f"--run_dir={run}", *options,
        )  # fmt: skip

    return call


@pytest.mark.parametrize(
    ("named", "harm"),
    [("auto", torn), ("last", flipped), ("auto", Path.unlink), ("last", broken_link)],
)
def test_the_last_good_one_is_found(trained, resume, named, harm):
    run = trained("toy/moons", *SMALL, "--trainer.max_steps=8")
    harm(run / "checkpoints" / "last.ckpt")
    status, shown = resume(run, f"--ckpt_path={named}")
    assert status == 0, shown
    assert f"going on from {run / 'checkpoints' / '00000008.ckpt'}, step 8" in shown
    assert shown.count("is damaged") == (harm in (torn, flipped))
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    require_intact(run / "checkpoints" / "last.ckpt")


def test_a_run_with_no_whole_checkpoint_is_not_started_again_unasked(trained, resume):
    run = trained("toy/moons", *SMALL, "--trainer.max_steps=8")
    for path in (run / "checkpoints").iterdir():
        torn(path)
    status, shown = resume(run, "--ckpt_path=auto")
    assert status == 2
    assert "no checkpoint that is whole" in shown
    assert "--rerun" in shown


def test_what_a_killed_write_left_is_removed_and_never_read(resume, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "manifest.json").write_text('{"status": "new", "config_hash": ""}')
    for name in (".last.ckpt.1a2b3c4d.tmp", ".00000008.ckpt.1a2b3c4d.tmp"):
        (run / "checkpoints" / name).write_bytes(b"half")
    assert Run(run).last_checkpoint is None
    status, shown = resume(run, "--ckpt_path=auto")
    assert status == 0, shown
    assert "starting at step 0" in shown
    assert names(run / "checkpoints") == ["00000012.ckpt", "last.ckpt"]


def test_the_state_is_gathered_once_and_each_name_has_bytes_of_its_own(fit, monkeypatch):
    gathered, save = [], ChecksummedFiles.save_checkpoint

    def counting(files, checkpoint, path, *args, **options):
        gathered.append(Path(path).name)
        save(files, checkpoint, path, *args, **options)

    monkeypatch.setattr(ChecksummedFiles, "save_checkpoint", counting)
    options = (*SMALL, "--trainer.max_steps=8", "--checkpoints.every_n_train_steps=4")
    folder = fit("toy/moons", *options) / "checkpoints"
    assert gathered == ["00000004.ckpt", "00000008.ckpt"]
    newest, last = folder / "00000008.ckpt", folder / "last.ckpt"
    assert newest.read_bytes() == last.read_bytes()
    torn(last)
    assert read_checkpoint(newest)["global_step"] == 8
    gathered.clear()
    fit("toy/moons", *options, "--checkpoints.save_top_k=0", name="last")
    assert gathered == ["last.ckpt", "last.ckpt"]


def test_a_checkpoint_that_is_due_at_the_end_of_training_is_there(fit):
    run = fit("toy/moons", *SMALL, "--trainer.max_steps=10")  # 4, 8 and the end
    assert names(run / "checkpoints") == ["00000010.ckpt", "last.ckpt"]
    assert recorded_step(run / "checkpoints" / "last.ckpt") == 10


def test_all_processes_resume_from_one_checkpoint_or_none_does():
    asked = []

    def trainer(mine):
        def decide(same):
            asked.append(same)
            return same

        strategy = SimpleNamespace(
            broadcast=lambda text: "last.ckpt of step 8", reduce_boolean_decision=decide
        )
        return SimpleNamespace(strategy=strategy, ckpt_path=mine, global_rank=1)

    with pytest.raises(
        ValueError, match=r"process 0 from last\.ckpt of step 8, process 1 from step 0"
    ):
        Checkpoints().on_fit_start(trainer(None), None)
    assert asked == [False]  # and by it the others know


# -- another network ----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_network_says_which_keys_differ(fit, resume):
    run = fit("toy/moons", *SMALL, "--trainer.max_steps=4", "--model.network.depth=3")
    # outside a run nothing but its layout says what a checkpoint is of
    lost = shutil.copy(run / "checkpoints/last.ckpt", run.with_name("lost.ckpt"))
    new = run.with_name("new")
    status, shown = resume(
        new, f"--ckpt_path={lost}", "--model.network.depth=4", "--model.network.width=16"
    )
    assert status == 2
    assert shown.count("error:") == 1
    assert "another network" in shown
    for part in (
        "missing in the file: network.",
        "of another shape: network.",
        "(8,) instead of (16,)",
    ):
        assert part in shown
    status, shown = resume(new, f"--ckpt_path={lost}", "--model.network.depth=2")
    assert status == 2
    assert "unexpected in the file: network." in shown
    # as in python
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("depth: 3", "depth: 4"))
    with pytest.raises(ValueError, match="missing in the file"):
        load(run)


# -- the best -----------------------------------------------------------------------------------------


JUDGED = (
    "--evaluation.metrics=[{class_path: Wasserstein, init_args: {subsets: 2, size: 50}}]", "--data.test_size=100",
    "--evaluation.every_n_steps=4", "--model.solver={method: euler, num_steps: 3}",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("monitor", ["val/loss", "train/loss", "eval/w2"])
def test_the_best_by_any_logged_metric_are_kept(fit, monitor, mode):
    run = fit(
        "toy/moons", *SMALL, *JUDGED, "--trainer.max_steps=20", "--checkpoints.save_top_k=2",
        f"--checkpoints.monitor={monitor}", f"--checkpoints.mode={mode}",
    )  # fmt: skip
    ahead = 0 if monitor.startswith("eval") else 1  # scores have the number of their step
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    scores = {int(r["step"]) + ahead: float(r[monitor]) for r in rows if r[monitor]}
    saved = [step for step in scores if step % 4 == 0]
    best = sorted(saved, key=lambda step: scores[step], reverse=mode == "max")[:2]
    expected = sorted(f"{step:08d}.ckpt" for step in {*best, 20})  # the newest is there in any case
    assert names(run / "checkpoints") == [*expected, "last.ckpt"]
    for name in expected:
        assert recorded_step(run / "checkpoints" / name) == int(name[:8])


def test_only_a_metric_that_is_new_ranks_a_checkpoint(fit):
    run = fit(
        "toy/moons", *SMALL, "--trainer.max_steps=20", "--trainer.val_check_interval=8",
        "--checkpoints.save_top_k=-1", "--checkpoints.monitor=val/loss",
    )  # fmt: skip
    numbered = ["00000008.ckpt", "00000016.ckpt", "00000020.ckpt"]  # steps 4 and 12 have made room
    assert names(run / "checkpoints") == [*numbered, "last.ckpt"]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"][
        "Checkpoints"
    ]
    assert set(saved["kept"]) == set(numbered[:2])
    assert saved["backup"] == numbered[2]


def test_a_metric_of_validation_has_a_checkpoint_wherever_it_is_measured(fit):
    """Validation after 4, 8, 12 and a checkpoint after 5, 10: the ranks need both, and so does a damaged last one."""
    options = (
        *SMALL, "--trainer.max_steps=12", "--checkpoints.every_n_train_steps=5", "--checkpoints.save_top_k=1",
        "--checkpoints.monitor=val/loss",
    )  # fmt: skip
    run = fit("toy/moons", *options)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    scores = {int(r["step"]) + 1: float(r["val/loss"]) for r in rows if r["val/loss"]}
    assert list(scores) == [4, 8, 12]
    best = min(scores, key=lambda step: scores[step])
    assert names(run / "checkpoints") == [*sorted(f"{s:08d}.ckpt" for s in {best, 12}), "last.ckpt"]
    run = fit("toy/moons", *options, "--trainer.max_steps=10", name="ten")
    assert names(run / "checkpoints")[-2:] == ["00000010.ckpt", "last.ckpt"]  # unranked, and there


@pytest.mark.parametrize(
    ("monitor", "said"),
    [
        ("val/los", "val/loss"),
        ("train/los", "train/loss"),
        ("loss", "val/loss"),
        ("eval/w2", "evaluation.metrics"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_before_the_first_step(
    resume, tmp_path, monitor, said
):
    status, shown = resume(tmp_path / "run", f"--checkpoints.monitor={monitor}")
    assert status == 2
    assert f"checkpoints.monitor={monitor}" in shown
    assert said in shown
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_score_that_is_not_there_is_refused_at_the_first_scores(resume, tmp_path):
    status, shown = resume(tmp_path / "run", *JUDGED, "--checkpoints.monitor=eval/w3")
    assert status == 2
    assert "eval/w2" in shown


def test_archives_get_a_checksum_wherever_they_end(tmp_path):
    """The digest is of the bytes before it, whatever their number: sizes around the block of reading."""
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        path, content = tmp_path / f"{size}.ckpt", io.BytesIO()
        torch.save(torch.zeros(size, dtype=torch.uint8), content)
        with atomic_write(path) as file:
            file.write(content.getvalue())
            append_checksum(file, size)
        require_intact(path)
        assert recorded_step(path) == size


def test_the_state_of_a_run_before_a_name_was_changed_is_read():
    callback = Checkpoints()
    callback.load_state_dict(
        {"monitor": None, "kept": {"00000008.ckpt": 8.0}, "spare": "00000004.ckpt"}
    )
    assert callback.backup == "00000004.ckpt"
    again = Checkpoints()
    again.load_state_dict(callback.state_dict())
    assert (again.kept, again.backup) == (callback.kept, callback.backup)

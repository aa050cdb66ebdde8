"""`fmlightning ema`: averages that are chosen after training, as files that other commands take for a run."""

import numpy as np
import pytest
import torch

import fmlightning as package
from fmlightning.runs.checksum import require_intact
from fmlightning.training.ema.snapshots import read_snapshot, snapshots

SMALL = (
    "toy/moons", "--model.network.width=16", "--model.network.depth=2", "--data.val_size=64", "--data.test_size=64",
    "--data.batch_size=32", "--trainer.max_steps=40", "--trainer.limit_val_batches=0", "--evaluation.metrics=[]",
    "--checkpoints.every_n_train_steps=15", "--checkpoints.save_top_k=-1", "--ema.decay=[0.99,0.9]",
    "--ema.sigma_rel=[0.05,0.1]", "--ema.snapshots=8", "--model.solver={method: euler, num_steps: 2}",
)  # fmt: skip


def sampled(fmlightning, path, out):
    status, shown = fmlightning("sample", path, "--n", "8", "--out", out, "--device=cpu")
    assert status == 0, shown
    return np.load(out / "samples.npz")["x"]


def test_a_width_is_made_written_and_used_by_the_other_commands(trained, fmlightning, tmp_path):
    run = trained(*SMALL)
    (run / "ema" / "notes.pt").write_bytes(b"of somebody else")
    assert [step for step, _ in snapshots(run)] == list(range(5, 41, 5))
    status, shown = fmlightning("ema", run)
    assert status == 0
    for name in ("decay=0.99", "decay=0.9", "sigma_rel=0.05", "sigma_rel=0.1", "8 snapshots"):
        assert name in shown
    status, shown = fmlightning("ema", run, "--sigma_rel", "0.08")
    assert status == 0, shown
    path = run / "ema" / "sigma_rel-0.08.ckpt"
    assert f"fmlightning sample {path}" in shown
    require_intact(path)
    content = torch.load(path, weights_only=True)
    averaged = content["callbacks"]["EMA"]["shadow"]
    for key, value in averaged.items():
        assert torch.equal(content["state_dict"][f"network.{key}"], value)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 0.3)
    fields = [package.load(path, ema=ema)(x, t) for ema in (True, False)]
    assert torch.equal(*fields)
    assert not torch.equal(fields[0], package.load(run)(x, t))
    one, other = (sampled(fmlightning, p, tmp_path / n) for n, p in (("a", path), ("b", run)))
    assert not np.array_equal(one, other)
    assert fmlightning("export", path, "--out", tmp_path / "exported")[0] == 0
    # and the run itself is as it was: its newest checkpoint is another file
    assert package.load(run)(x, t).equal(package.load(run / "checkpoints" / "last.ckpt")(x, t))


def test_a_rough_profile_comes_with_what_would_be_nearer(trained, fmlightning):
    run = trained(*SMALL)
    for words, remedy in (
        (("0.08", "--step", "33"), "no snapshot ends at step 33: take --step 30 or 35"),
        (("0.01",), "take a width between those that were kept"),
    ):
        status, shown = fmlightning("ema", run, "--sigma_rel", *words)
        assert status == 0
        assert f"warning: that is far; {remedy}" in shown
    assert "warning" not in fmlightning("ema", run, "--sigma_rel", "0.08", "--step", "30")[1]


def test_a_decay_of_training_is_written_as_it_was(fit, fmlightning, tmp_path):
    run, out = fit(*SMALL, "--ema.warmup=false"), tmp_path / "sooner.ckpt"
    assert fmlightning("ema", run, "--decay", "0.9", "--out", out)[0] == 0
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["EMA"]
    written = torch.load(out, weights_only=True)["callbacks"]["EMA"]["shadow"]
    assert all(torch.equal(written[k], v) for k, v in last["others"]["decay=0.9"]["shadow"].items())
    assert not all(torch.equal(written[k], v) for k, v in last["shadow"].items())


@pytest.mark.parametrize("step", [15, 30])
def test_a_resumed_run_has_the_snapshots_of_one_that_was_not_stopped(fit, trained, tmp_path, step):
    whole, on = trained(*SMALL, name="whole"), tmp_path / "on"
    (on / "ema").mkdir(parents=True)
    (on / "manifest.json").write_text('{"status": "new", "config_hash": ""}')
    (on / "ema" / ".00000035.pt.1a2b3c4d.tmp").write_bytes(b"half")  # as a kill leaves it
    fit(*SMALL, f"--ckpt_path={whole / 'checkpoints' / f'{step:08d}.ckpt'}", name="on")
    assert not list((on / "ema").glob(".*.tmp"))
    expected = [found for found in snapshots(whole) if found[0] > step]
    for (n, a), (m, b) in zip(expected, snapshots(on), strict=True):
        assert n == m
        one, other = read_snapshot(a), read_snapshot(b)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k][p], other[k][p]) for k in one for p in one[k])


REFUSED = {
    "no snapshots": (("--ema.sigma_rel=null",), ("--sigma_rel", "0.08"), "train with --ema.sigma_rel"),
    "a width there is not": ((), ("--sigma_rel", "0.4"), "--sigma_rel=0.4 must lie in"),
    "a decay there is not": ((), ("--decay", "0.5"), "--decay 0.5 is not in"),
    "a step after them": ((), ("--sigma_rel", "0.08", "--step", "99"), "step=99 must lie between"),
    "two at once": ((), ("--sigma_rel", "0.08", "--decay", "0.9"), "not allowed with"),
    "a step of nothing": ((), ("--step", "5"), "--step goes with --sigma_rel"),
    "the run's own checkpoint": (
        (), ("--decay", "0.9", "--overwrite", "--out", "checkpoints/last.ckpt"), "that the run goes on from"
    ),
    "another suffix": ((), ("--sigma_rel", "0.08", "--out", "a.pt"), "end its name in .ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused_with_one_line(name, trained, fmlightning, monkeypatch):
    options, argv, words = REFUSED[name]
    run = trained(*SMALL, "--trainer.max_steps=10", *options)
    monkeypatch.chdir(run)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    status, shown = fmlightning("ema", run, *argv)
    assert status == 2
    assert words in shown
    assert shown.count("error:") == 1
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list((run / "ema").glob("*.ckpt"))


def test_a_damaged_snapshot_is_named(trained, fmlightning):
    run = trained(*SMALL, "--trainer.max_steps=10")
    path = snapshots(run)[-1][1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, shown = fmlightning("ema", run, "--sigma_rel", "0.08")
    assert status == 2
    assert f"{path} is damaged" in shown


def test_an_average_that_begins_with_the_run_cannot_begin_later(fit, fmlightning, tmp_path):
    run = fit(*SMALL, "--ema.sigma_rel=null")
    (run / "config.yaml").unlink()  # else it is refused as another run's
    status, shown = fmlightning(
        "fit", "--config", "configs/toy/moons.yaml", *SMALL[1:], "--wandb.mode=disabled", "--trainer.accelerator=cpu",
        f"--run_dir={tmp_path / 'late'}", f"--ckpt_path={run / 'checkpoints' / '00000015.ckpt'}",
    )  # fmt: skip
    assert status == 2
    assert "begins with the run" in shown

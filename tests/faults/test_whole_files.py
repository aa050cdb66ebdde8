"""Files of samples and predictions are whole or not there, and a full disk names the file that it had no room for."""

import errno

import numpy as np
import pytest

SHORT = (
    "--trainer.max_steps=2",
    "--data.val_size=64",
    "--data.test_size=64",
    "--evaluation.metrics=[]",
)


@pytest.mark.parametrize("command", ["sample", "predict"])
def test_a_full_disk_leaves_no_torn_file_and_names_it(trained, fmlightning, monkeypatch, command):
    run = trained("toy/moons", *SHORT)

    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    name = {"sample": "samples.npz", "predict": "predictions.npz"}[command]
    words = ("sample", run, "--n=8") if command == "sample" else ("predict", f"--ckpt_path={run}")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", savez)
        status, shown = fmlightning(*words)
    assert status == 2
    assert "No space left on device" in shown
    assert name in shown
    assert not (run / "samples" / name).exists()
    assert not list((run / "samples").glob(".*.tmp"))
    status, shown = fmlightning(*words)
    assert status == 0, shown
    assert np.isfinite(np.load(run / "samples" / name)["x"]).all()

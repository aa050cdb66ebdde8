"""A run without enough memory says which option to lower, and which command finds its value."""

import pytest
import torch

from fmlightning.training.module import FlowMatching

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"  # noqa: E501
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


@pytest.mark.parametrize(
    "error", [RuntimeError(CPU), torch.OutOfMemoryError(GPU), MemoryError()], ids=["cpu", "cuda", "python"]
)  # fmt: skip
def test_out_of_memory_names_the_batch(fmlightning, repository, tmp_path, monkeypatch, error):
    def step(*args):
        raise error

    monkeypatch.setattr(FlowMatching, "training_step", step)
    status, shown = fmlightning(
        "fit", "--config", repository / "configs/toy/moons.yaml", "--wandb.mode=disabled",
        "--trainer.limit_val_batches=0", "--evaluation.metrics=[]", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert status == 2
    assert "Traceback" not in shown
    [line] = [line for line in shown.splitlines() if line.startswith("error:")]
    assert "out of memory" in line
    assert "data.batch_size" in line
    assert "find_batch_size" in line
    assert "alloc_cpu.cpp" not in line

"""`fmlightning evaluate` on any number of processes: the same cells with the same scores."""

import json
import os
import subprocess
import sys

import pytest

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TOY = (
    "toy/moons", "--trainer.max_steps=20", "--data.test_size=100", "--data.val_size=64", "--evaluation.metrics=[]",
)  # fmt: skip
DIGITS = (
    "images/digits", "--trainer.max_steps=20", "--model.network.channels=8", "--model.network.head_channels=8",
    "--model.class_dropout_prob=0.2", "--model.optimizer.lr=0.003",
)  # fmt: skip
W2 = [{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 100}}]
FRECHET = [
    {"class_path": "Frechet", "init_args": {"features": "digits", "num_samples": 100}},
    {"class_path": "NegativeLogLikelihood", "init_args": {
        "size": 6, "rtol": 1e-5, "atol": 1e-5, "within": 1e9, "divergence": "hutchinson"}},
]  # fmt: skip
CASES = {
    # 100 samples in blocks of 40: one of two processes, or of four, gets none in its last round
    "toy": (TOY, W2, ("--solvers=euler,dopri5", "--nfe=5", "--batch_size=40")),
    "guided": (DIGITS, FRECHET, ("--solvers=euler,heun2", "--nfe=2", "--guidance.scale=1,3", "--batch_size=40")),
}  # fmt: skip


def within(name):
    """The likelihood is solved at 1e-5, in blocks that depend on the number of processes; the rest is sums."""
    return 1e-3 if name in ("nll", "bits_per_dimension") else 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_processes_says_the_same(fit, repository, case):
    config, metrics, options = CASES[case]
    run = fit(*config)
    argv = (
        "-m",
        "fmlightning",
        "evaluate",
        run,
        "--device=cpu",
        f"--metrics={json.dumps(metrics)}",
    )
    found = {}
    for size in (1, 2, 4):
        launch = (sys.executable,) if size == 1 else (*TORCHRUN, f"--nproc-per-node={size}")
        result = subprocess.run(
            [*launch, *argv, *options], cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        found[size] = json.loads((run / "evaluations" / "evaluations.json").read_text())
        for file in (run / "evaluations").iterdir():
            file.unlink()
    alone = found.pop(1)
    # else equal scores say little
    assert len({json.dumps(r["metrics"]) for r in alone}) == len(alone) > 1
    for records in found.values():
        for mine, its in zip(alone, records, strict=True):
            same = ("file", "label", "budget", "guidance", "nfe", "samples")
            assert {k: mine[k] for k in same} == {k: its[k] for k in same}
            assert mine["metrics"].keys() == its["metrics"].keys()
            for name, value in mine["metrics"].items():
                if name != "nll_difference":
                    expected = pytest.approx(value, rel=within(name))
                    assert its["metrics"][name] == expected, (name, its["label"])

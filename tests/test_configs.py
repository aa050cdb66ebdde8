"""Every config runs as it stands, with no account and no network."""

from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parent.parent / "configs"
WHOLE = sorted(
    p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("trainer", "papers", "cluster")
)
OVERLAYS = sorted((CONFIGS / "trainer").glob("*.yaml"))


@pytest.mark.parametrize("path", WHOLE, ids=lambda p: p.stem)
def test_fit_runs_two_steps(fit, path):
    short = (
        ("--data.autoencoder.init_args.steps=20",) if "SmallAutoencoder" in path.read_text() else ()
    )
    run = fit(
        str(path.relative_to(CONFIGS).with_suffix("")),
        "--trainer.max_steps=2",
        "--wandb.mode=auto",
        *short,
    )
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_an_overlay_parses_over_a_config(command, path):
    result = command(
        "fit", "--config", "configs/toy/moons.yaml", "--config", path, "--print_config"
    )
    assert result.returncode == 0, result.stderr

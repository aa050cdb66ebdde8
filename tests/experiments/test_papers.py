"""The configs of papers: they hold the published networks, and train two steps small and without a download."""

from pathlib import Path

import pytest
import torch
import yaml

from fmlightning.nets.dit import DiT
from fmlightning.nets.size import parameter_count
from fmlightning.nets.unet import UNet

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
# as tests/nets holds them against the published definitions
PARAMETERS = {
    "cifar10_unet_lipman2023": 171_268_099,
    "cifar10_unet_torchcfm": 35_746_307,
    "imagenet32_unet_lipman2023": 228_149_507,
    "imagenet64_unet_lipman2023": 295_131_267,
    "sit_b2_latents": 130_303_504,
}
SMALL = {
    "UNet": ("--model.network.channels=32", "--model.network.head_channels=32"),
    "DiT": (
        "--model.network.size={width: 16, depth: 1, heads: 2, patch: 4}",
        "--model.network.in_channels=3",
        "--model.network.num_classes=2",
    ),
}
DATA = (
    "--data=PhotosData",
    "--data.batch_size=4",
    "--trainer.limit_val_batches=0",
    "--trainer.max_steps=2",
)


def network(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["network"]


def test_every_config_is_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_its_network_has_the_published_size(name):
    wanted = network(name)
    with torch.device("meta"):
        net = {"UNet": UNet, "DiT": DiT}[wanted["class_path"]](**wanted["init_args"])
    assert parameter_count(net) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_fit_runs_two_small_steps(fit, name):
    small = SMALL[network(name)["class_path"]]
    run = fit(f"papers/{name}", *DATA, *small, "--trainer.precision=32-true")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2

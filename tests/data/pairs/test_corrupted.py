"""Pairs of a corrupted and a clean image: what batches hold, what training uses, and where samples start."""

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from fmlightning.data.images.digits import DigitsData
from fmlightning.data.order import Shard
from fmlightning.data.pairs.base import CorruptedData
from fmlightning.data.pairs.corruptions import Blurred, Downsampled, Noisy
from fmlightning.flow.keys import Key

SMALL = (
    "images/denoise_digits", "--trainer.max_steps=2", "--evaluation.metrics=[]", "--model.solver.num_steps=4",
    "--model.network.channels=8", "--model.network.head_channels=8",
)  # fmt: skip


@pytest.fixture
def images():
    return DigitsData().eval_samples("test")["x1"]


def test_a_blur_is_torchvisions(images):
    streams = Key(0).streams(torch.arange(len(images)))
    ours = Blurred(noise=0, width=0.6)(images, streams)
    # within three widths of the edge the two continue the image differently
    theirs = gaussian_blur(images, [5, 5], [0.6, 0.6])
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-6, rtol=0)


def test_downsampling_keeps_means_and_forgets_the_rest(images):
    streams = Key(0).streams(torch.arange(len(images)))
    x0 = Downsampled(noise=0, factor=2)(images, streams)
    squares = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    for i in (0, 1):
        for j in (0, 1):
            torch.testing.assert_close(x0[..., i::2, j::2], squares)


def test_noise_is_that_of_the_sample_and_not_of_the_batch(images):
    streams = Key(3).streams(torch.arange(len(images)))
    noise = Noisy(noise=0.5)(images, streams) - images
    # 350 x 64 numbers: the standard error of their deviation is 0.5 / sqrt(2 x 22400) = 0.0024
    assert float(noise.std()) == pytest.approx(0.5, abs=0.01)
    some = torch.tensor([7, 100, 349])
    assert torch.equal(
        Noisy(noise=0.5)(images[some], Key(3).streams(some)) - images[some], noise[some]
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_out_the_same_pairs_whose_x1_is_the_data_itself(world_size):
    data, plain = CorruptedData(DigitsData(), batch_size=32, seed=5), DigitsData(32, seed=5)
    for step in (0, 57):
        whole = data.train_batch(step, slice(0, 32))
        assert torch.equal(whole["x1"], plain.train_batch(step, slice(0, 32))["x1"])
        parts = [data.train_batch(step, Shard(r, world_size).rows(32)) for r in range(world_size)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([p[name] for p in parts]), value)


def test_held_out_pairs_are_the_same_whole_and_in_blocks():
    data = CorruptedData(DigitsData(), eval_batch_size=100)
    whole, blocks = data.eval_samples("val"), list(data.eval_batches("val"))
    for name in ("x0", "x1", "y"):
        assert torch.equal(whole[name], torch.cat([b[name] for b in blocks]))


def test_training_uses_the_x0_of_the_batch():
    from fmlightning.data.order import Shard
    from fmlightning.nets.mlp import TimeMLP
    from fmlightning.training.draws import Draws
    from fmlightning.training.held_out import HeldOut
    from fmlightning.training.module import FlowMatching

    recipe = FlowMatching(TimeMLP(dim=2)).recipe
    x1, x0 = torch.zeros(4, 2), torch.arange(8.0).reshape(4, 2)
    draws = Draws(recipe, Key(0), 4, slice(0, 4), 0, 0.0, keyed=False)
    point = draws({"x1": x1, "x0": x0}, 0).on(recipe.path)
    assert torch.equal(point.x0, x0)
    # on the linear path, u = x1 - x0
    torch.testing.assert_close(point.ut, x1 - x0)
    held = HeldOut(recipe, 4, Shard()).of(x1, None, Key(0).streams(torch.arange(4)), x0)
    assert torch.equal(held.x0, x0)


def test_samples_start_from_the_held_out_x0_of_the_data(fit, fmlightning, tmp_path):
    """With a learning rate of zero the network is zero, so each sample stays where it starts."""
    run = fit(
        *SMALL, "--model.optimizer.lr=0", "--samples.at_end=true", "--data.eval_batch_size=100"
    )
    assert (run / "samples" / "samples-00000002.png").is_file()
    out = tmp_path / "out"
    status, shown = fmlightning("sample", run, "--n", "360", "--out", out, "--device=cpu")
    assert status == 0, shown
    held_out = CorruptedData(DigitsData()).eval_samples("test")
    found = np.load(out / "samples.npz")
    first = torch.arange(360) % 350
    assert np.array_equal(found["x"], held_out["x0"][first].numpy())
    assert np.array_equal(found["y"], held_out["y"][first].numpy())
    status, shown = fmlightning("sample", run, "--label", "3", "--out", tmp_path / "no")
    assert (status, "have their labels" in shown) == (2, True)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.coupling=MinibatchOT", "is not paired anew"),
        ("--model.source=EightGaussians", "no source is drawn from"),
        ("--model.objective.prediction=score", "model.objective.prediction=score needs a Gaussian source"),
        ("--model.objective=MaximumLikelihood", "needs the density of x0"),
        ("--data.corruption={class_path: Downsampled, init_args: {factor: 3}}", "factor=3 must divide"),
    ],
)  # fmt: skip
def test_what_speaks_of_another_x0_is_refused_before_training(
    fmlightning, repository, tmp_path, option, words
):
    config = repository / "configs/images/denoise_digits.yaml"
    status, shown = fmlightning(
        "fit", "--config", config, option, f"--run_dir={tmp_path / 'run'}", "--wandb.mode=disabled"
    )
    assert status == 2
    assert words in shown
    assert not (tmp_path / "run").exists()

"""Latents of images: encoded once, read back as they were, and decoded wherever samples are seen."""

import json

import numpy as np
import pytest
import torch

from fmlightning.cli.build import instantiate_data
from fmlightning.data.images.digits import DigitsData
from fmlightning.data.latents.autoencoders import DiffusersAutoencoder, SmallAutoencoder
from fmlightning.data.latents.base import LatentData, LatentStore
from fmlightning.data.order import Shard
from fmlightning.runs.directory import Run

TINY = SmallAutoencoder(steps=3, channels=8)
CONFIG = (
    "images/digits_latent", "--trainer.max_steps=2", "--model.solver.num_steps=2", "--model.network.channels=8",
    "--model.network.head_channels=8", "--data.autoencoder.steps=3", "--data.autoencoder.channels=8",
)  # fmt: skip


def test_the_files_hold_what_the_autoencoder_says_of_the_images():
    data = LatentData(DigitsData(), TINY)
    for split in ("reference", "val", "test"):
        batch = data.images.eval_samples(split)
        with torch.no_grad():
            mean, std = data.network.encode(batch["x1"])
        moments, y = data.store.take(split, torch.arange(len(mean)))
        # the same convolutions in other batches
        torch.testing.assert_close(moments[:, 0], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moments[:, 1], std, atol=1e-5, rtol=1e-5)
        assert torch.equal(y, batch["y"])
    assert data.event_shape == tuple(mean.shape[1:])


def test_latents_have_unit_scale_and_an_explicit_scale_is_kept():
    data = LatentData(DigitsData(), TINY, batch_size=1297)
    # its numbers are drawn from the very law whose deviation is divided by: 41,504 of them, so 1 / sqrt(2 x 41504)
    assert float(data.train_batch(0, slice(0, 1297))["x1"].std()) == pytest.approx(1, abs=0.02)
    given = LatentData(DigitsData(), TINY, scale=0.18215)
    assert given.scale == 0.18215
    ratio = given.eval_samples("test")["x1"] / data.eval_samples("test")["x1"]
    torch.testing.assert_close(
        ratio, torch.full_like(ratio, 0.18215 / data.scale), rtol=1e-4, atol=0
    )


def test_means_are_decoded_to_what_the_autoencoder_makes_of_the_image():
    data = LatentData(DigitsData(), TINY, sample_posterior=False)
    x = data.images.eval_samples("test")["x1"]
    with torch.no_grad():
        direct = data.network.decode(data.network.encode(x)[0])
    torch.testing.assert_close(
        data.decode(data.eval_samples("test")["x1"]), direct, atol=1e-4, rtol=1e-4
    )


def test_draws_are_keyed_by_epoch_and_processes_share_them_out():
    data = LatentData(DigitsData(), TINY, batch_size=32, flip=True, seed=4)
    whole = data.train_batch(7, slice(0, 32))
    parts = [data.train_batch(7, Shard(r, 2).rows(32)) for r in range(2)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([p[name] for p in parts]), value)
    size = data.order.size
    index = torch.arange(size)
    assert not torch.equal(*(data.train_batch(s, slice(0, 32))["x1"] for s in (0, 40)))
    held = data.eval_samples("val")["x1"]
    assert torch.equal(held, torch.cat([b["x1"] for b in data.eval_batches("val")]))
    assert torch.equal(
        LatentData(DigitsData(), TINY, flip=True, seed=5).eval_samples("val")["x1"], held
    )
    assert len(data.store.take("mirrored", index)[0]) == size


def test_half_of_the_training_latents_are_mirrored():
    data = LatentData(DigitsData(), TINY, batch_size=100, sample_posterior=False, flip=True)
    x1, index = data.train_batch(0, slice(0, 100))["x1"] / data.scale, data.order.indices(0)
    plain, mirrored = (data.store.take(name, index)[0][:, 0] for name in ("reference", "mirrored"))
    is_plain, is_mirrored = ((x1 - z).abs().flatten(1).amax(1) < 1e-5 for z in (plain, mirrored))
    assert bool((is_plain ^ is_mirrored).all())
    # 100 fair coins: five standard deviations are 25
    assert 25 < int(is_mirrored.sum()) < 75


def test_a_mirrored_latent_is_that_of_the_mirrored_image():
    data = LatentData(DigitsData(), TINY, flip=True)
    x = data.images.eval_samples("reference")["x1"].flip(-1)
    with torch.no_grad():
        mean, _ = data.network.encode(x)
    moments, _ = data.store.take("mirrored", torch.arange(len(x)))
    torch.testing.assert_close(moments[:, 0], mean, atol=1e-5, rtol=1e-5)


def test_images_are_encoded_once_and_anew_for_another_autoencoder(capsys):
    first = LatentData(DigitsData(), TINY)
    first.setup("fit")
    assert capsys.readouterr().out.count(", once\n") == 2  # trained and encoded
    again = LatentData(DigitsData(), TINY, seed=9)
    again.setup("fit")
    assert capsys.readouterr().out == ""
    assert again.fingerprint == first.fingerprint
    other = LatentData(DigitsData(), SmallAutoencoder(steps=3, channels=8, seed=1))
    assert other.folder != first.folder
    assert other.fingerprint != first.fingerprint


def test_an_encoding_that_fails_leaves_nothing_behind(monkeypatch):
    data = LatentData(DigitsData(), TINY)
    folder = data.folder

    def fail(split):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(data.images, "eval_batches", fail)
        with pytest.raises(OSError, match="no space"):
            data.setup("fit")
    assert [p.name for p in folder.parent.glob(f"*{folder.name}*") if p.is_dir()] == []
    data.setup("fit")
    assert LatentStore(folder).size("test") == 350


def test_a_pickle_in_the_cache_is_not_read():
    data = LatentData(DigitsData(), TINY)
    data.setup("fit")
    np.save(data.folder / "test-y.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        LatentStore(data.folder).size("test")


# -- the whole way ------------------------------------------------------------------------------------


def test_samples_are_decoded_for_pictures_judges_and_files(fit, fmlightning, tmp_path):
    run = fit(
        *CONFIG, "--samples.at_end=true", "--trajectories.at_end=true", "--evaluation.at_end=true"
    )
    scores = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert {"frechet_digits@350", "accuracy@350_real"} <= scores.keys()
    assert scores["accuracy@350_real"] > 0.9  # of the images themselves, and not of their latents
    status, shown = fmlightning(
        "sample", run, "--n", "20", "--out", tmp_path / "out", "--device=cpu"
    )
    assert status == 0, shown
    assert np.load(tmp_path / "out" / "samples.npz")["x"].shape == (20, 1, 8, 8)
    status, shown = fmlightning(
        "evaluate", run, "--solvers=euler", "--nfe=2", "--device=cpu", "--batch_size=350"
    )
    assert status == 0, shown
    status, shown = fmlightning("predict", "--ckpt_path", run, "--trainer.accelerator=cpu")
    assert status == 0, shown
    assert np.load(run / "samples" / "predictions.npz")["x"].shape == (350, 1, 8, 8)
    data = instantiate_data(Run(run).config)
    assert Run(run).manifest["data"]["fingerprint"] == data.fingerprint


def test_a_judge_of_the_density_of_images_refuses_latents(fmlightning, repository, tmp_path):
    status, shown = fmlightning(
        "fit", "--config", repository / "configs/images/digits_latent.yaml",
        "--evaluation.metrics=[{class_path: NegativeLogLikelihood}]", f"--run_dir={tmp_path / 'run'}",
        "--wandb.mode=disabled", "--data.autoencoder.init_args.steps=20",
    )  # fmt: skip
    assert (status, "this one is of the latents" in shown) == (2, True), shown
    assert not (tmp_path / "run").exists()


# -- published weights --------------------------------------------------------------------------------


def test_a_folder_without_weights_says_what_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json.*hf download stabilityai"):
        LatentData(DigitsData(), DiffusersAutoencoder(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        LatentData(DigitsData(), DiffusersAutoencoder(str(tmp_path)))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(ValueError, match="is of UNet2DModel and not of AutoencoderKL"):
        LatentData(DigitsData(), DiffusersAutoencoder(str(tmp_path)))


def test_an_autoencoder_of_diffusers_encodes_and_decodes_as_diffusers_says(tmp_path):
    import diffusers

    with torch.random.fork_rng(devices=[]):
        theirs = diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "vae")
    data = LatentData(
        DigitsData(),
        DiffusersAutoencoder(str(tmp_path / "vae")),
        scale=0.18215,
        sample_posterior=False,
    )
    assert data.event_shape == (2, 4, 4)
    x = data.images.eval_samples("test")["x1"]
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mean * 0.18215
        back = theirs.decode(z / 0.18215).sample
    # the same convolutions in other batches
    torch.testing.assert_close(data.eval_samples("test")["x1"], z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(data.decode(z), back, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="sha256=00"):
        LatentData(DigitsData(), DiffusersAutoencoder(str(tmp_path / "vae"), "00")).setup("fit")

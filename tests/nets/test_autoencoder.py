"""The autoencoder's loss is the negative evidence bound, and training on digits brings it down."""

import torch
from torch.distributions import Normal, kl_divergence

from fmlightning.data.images.digits import DigitsData
from fmlightning.flow.determinism import seeded
from fmlightning.flow.keys import Key
from fmlightning.nets.autoencoder import KLAutoencoder, elbo_loss, train_autoencoder


def built(seed=0):
    with seeded(Key(seed)):
        return KLAutoencoder(in_channels=1, latent_channels=2, channels=8)


def test_the_loss_is_the_error_and_the_divergence_of_torchs_normals():
    network, generator = built(), torch.Generator().manual_seed(0)
    x = torch.rand(5, 1, 8, 8, generator=generator)
    eps = torch.randn(5, 2, 4, 4, generator=generator)
    mean, std = network.encode(x)
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).flatten(1).sum(1)
    error = (network.decode(mean + std * eps) - x).square().flatten(1).sum(1)
    torch.testing.assert_close(elbo_loss(network, x, eps, 0.3), (error + 0.3 * divergence) / 64)


def test_training_reconstructs_and_is_a_function_of_its_key():
    x = DigitsData().eval_samples("reference")["x1"][:128]
    found = [
        train_autoencoder(built(), lambda step: x, steps=60, rate=1e-2, beta=1e-3, key=Key(k))
        for k in (0, 0, 1)
    ]
    with torch.no_grad():
        error = (found[0].decode(found[0].encode(x)[0]) - x).square().mean()
    # a constant image has the variance of the pixels; a few steps leave far less than half of it
    assert float(error) < 0.3 * float(x.var())
    a, b, c = (network.state_dict()["encoder.0.weight"] for network in found)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)

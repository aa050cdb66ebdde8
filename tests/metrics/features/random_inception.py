"""Random Inception weights in the published file's format, whose features have the variance of a real network's."""

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as room

from fmlightning.flow.keys import Key


class Stop(Exception):
    """In place of a download."""


def stop(*args, **kwargs):
    raise Stop


def pictures(count, size=16, seed=0):
    """Smooth bytes of many colours: means and contrasts differ from image to image, (count, 3, size, size)."""
    generator = Key(seed).fold("pictures").generator()
    coarse = torch.randn(count, 3, 4, 4, generator=generator) * 45
    base = torch.rand(count, 3, 1, 1, generator=generator) * 255
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic") + base
    return x.round().clamp(0, 255).byte()


@torch.no_grad()
def random_inception(path, images, seed=0):
    """Write such a file: each normalisation layer holds the moments of its input for these images."""
    network = room.FeatureExtractorInceptionV3.__new__(room.FeatureExtractorInceptionV3)
    original, room.load_state_dict_from_url = room.load_state_dict_from_url, stop
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network.__init__("inception-v3-compat", ["2048"])
        except Stop:  # all layers are there by then
            network.feature_extractor_internal_dtype = torch.float32
        finally:
            room.load_state_dict_from_url = original
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.momentum = 1.0
    network(images)
    (features,) = network.eval()(images)
    scale = 1 / float(features.std(0).mean())
    for name, layer in network.Mixed_7c.named_modules():
        # the branches that are concatenated; after a ReLU their scale is that of the features
        if isinstance(layer, nn.BatchNorm2d) and not name.startswith(ENTRIES):
            layer.weight.mul_(scale)
            layer.bias.mul_(scale)
    torch.save({name: value.clone() for name, value in network.state_dict().items()}, path)


ENTRIES = ("branch3x3_1", "branch3x3dbl_1", "branch3x3dbl_2")

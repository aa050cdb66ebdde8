"""Networks made elsewhere: what the adapter passes, and what it takes back."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fmlightning.flow.keys import Key
from fmlightning.flow.models import evaluate
from fmlightning.flow.paths.schedules import Linear
from fmlightning.nets.adapter import Adapter
from fmlightning.nets.size import describe

G = Key(13)


class Output(NamedTuple):
    """As diffusers' outputs: a record, the prediction of which is its `sample`."""

    noise: Tensor
    sample: Tensor


class Foreign(nn.Module):
    """The signature of diffusers' UNet2DModel, which refuses labels where it has no embedding of them."""

    def __init__(self, num_class_embeds=None):
        super().__init__()
        self.class_embedding = num_class_embeds and nn.Embedding(num_class_embeds, 1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError("class_labels")
        out = self.conv(sample) + timestep[:, None, None, None]
        if class_labels is not None:
            out = out + self.class_embedding(class_labels)[:, :, None, None]
        return Output(-out, out) if return_dict else (out,)


class TimeFirst(nn.Module):
    """The signature of TorchCFM's UNetModelWrapper."""

    def forward(self, t, x, y=None):
        return t[:, None, None, None] * x + (0 if y is None else y[:, None, None, None])


def inputs(n=4):
    g = G.generator()
    x = torch.randn(n, 1, 6, 6, generator=g)
    return x, torch.rand(n, generator=g), torch.randint(0, 3, (n,), generator=g)


def test_the_unet_of_diffusers_itself():
    import diffusers

    with torch.random.fork_rng(devices=[]):
        theirs = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            num_class_embeds=4,
        ).eval()  # fmt: skip
    t, y = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0, 1, 2])
    x = torch.randn(3, 1, 8, 8, generator=G.generator())
    net = Adapter(theirs, num_classes=3)
    with torch.no_grad():
        for labels, known in ((y, y), (None, torch.full((3,), 3))):
            want = theirs(x, torch.tensor([0.0, 250.0, 1000.0]), class_labels=known).sample
            assert torch.equal(net(x, t, labels), want)


def test_a_network_of_diffusers_gets_its_timesteps_and_labels():
    x, t, y = inputs()
    inner = Foreign(num_class_embeds=4)
    net = Adapter(inner, num_classes=3)
    assert torch.equal(net(x, t, y), inner(x, 1000 * t, class_labels=y).sample)
    assert torch.equal(net(x, t), inner(x, 1000 * t, class_labels=torch.full((4,), 3)).sample)


def test_a_network_without_labels_is_given_none():
    x, t, y = inputs()
    inner = Foreign()
    assert torch.equal(Adapter(inner)(x, t, y), inner(x, 1000 * t).sample)


def test_a_network_of_torchcfm_gets_the_time_first():
    x, t, y = inputs()
    net = Adapter(TimeFirst(), time_scale=1.0, num_classes=3, labels="y", time_first=True)
    assert torch.equal(net(x, t, y), TimeFirst()(t, x, y))


def test_a_tuple_gives_its_first():
    class Pair(nn.Module):
        def forward(self, x, t):
            return x, t

    x, t, _ = inputs()
    assert Adapter(Pair())(x, t) is x


def test_what_holds_no_tensor_is_named():
    class Wrong(nn.Module):
        def forward(self, x, t):
            return {"out": x}

    x, t, _ = inputs()
    with pytest.raises(ValueError, match="returns a dict: it must be a tensor"):
        Adapter(Wrong())(x, t)
    with pytest.raises(ValueError, match="num_classes=-1"):
        Adapter(Foreign(), num_classes=-1)


def test_the_library_calls_it_as_it_calls_its_own_and_trains_its_weights():
    x, t, y = inputs()
    net = Adapter(Foreign(num_class_embeds=4), num_classes=3)
    evaluate(net, Linear(), x, t, y).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert describe(net, x.shape[1:], labels=True).startswith("Foreign: 14 parameters, 324 FLOPs")

"""TorchCFM's U-Net beside ours: the same width, depth, attention and dropout, and the same weights where wanted."""

import torch
from torch import Tensor, nn
from torchcfm.models.unet import UNetModel
from torchcfm.models.unet.unet import AttentionBlock

from fmlightning.nets.adapter import Adapter
from fmlightning.nets.embeddings import HALF, Dropout
from fmlightning.nets.size import multiply_adds, parameter_count
from fmlightning.nets.unet import SpatialAttention, UNet

SHAPE = (3, 32, 32)
MULT, BLOCKS, HEADS = (1, 2, 2, 2), 2, 4
"""As in TorchCFM's examples for CIFAR-10, which have 128 channels and a dropout of 0.1."""


def ours(channels: int, dropout: float) -> UNet:
    """Our U-Net of that description."""
    half = channels // 2
    # its time features are cos and sin at 10000**(-k / half), k = 0 ... half - 1
    frequencies = (10_000 ** (1 / half - 1), 1.0)
    return UNet(
        3, channels, MULT, BLOCKS, (1,), MULT[1] * channels // HEADS, dropout=dropout, scale_shift=False,
        frequencies=frequencies,
    )  # fmt: skip


def theirs(channels: int, dropout: float) -> nn.Module:
    """TorchCFM's, called as net(t, x)."""
    return UNetModel(
        SHAPE, channels, BLOCKS, channel_mult=MULT, attention_resolutions="16", num_heads=HEADS,
        num_head_channels=MULT[1] * channels // HEADS, dropout=dropout,
    )  # fmt: skip


def work(net: nn.Module) -> dict[str, float]:
    """What a call of a U-Net, ours or theirs, takes."""
    called = net if isinstance(net, UNet) else Adapter(net, time_scale=1, time_first=True)
    drops = [dropped(m) for m in net.modules() if isinstance(m, Dropout | nn.Dropout)]
    return {
        "parameters": parameter_count(net),
        "multiply-adds": multiply_adds(called, SHAPE) or 0,
        "attentions": sum(isinstance(m, SpatialAttention | AttentionBlock) for m in net.modules()),
        "layers of dropout": len(drops),
        "dropout": max(drops),
    }


def dropped(layer: Dropout | nn.Dropout) -> float:
    return layer.p if isinstance(layer, nn.Dropout) else round(1 - layer.kept / HALF, 4)


def copy_weights(source: nn.Module, target: UNet) -> None:
    """TorchCFM's weights into ours."""
    parts: dict[str, list[nn.Module]] = {
        "time_embed": [target.time],
        "input_blocks": [target.input, target.encoder],
        "middle_block": [target.middle],
        "output_blocks": [target.decoder],
        "out": [target.norm, target.output],
    }
    for name, mine in parts.items():
        into = [p for part in mine for p in part.parameters()]
        for a, b in zip(into, source.get_submodule(name).parameters(), strict=True):
            a.data.copy_(b.data.reshape(a.shape))
    first = target.time.get_parameter(
        "1.weight"
    ).data  # ours has sines first and both from slow to fast
    cosines, sines = first.clone().chunk(2, 1)
    first.copy_(torch.cat((sines.flip(1), cosines.flip(1)), 1))
    for layer in target.modules():
        if isinstance(layer, SpatialAttention):
            for p in (p.data for p in layer.qkv.parameters()):
                by_head = p.unflatten(
                    0, (-1, 3, layer.head_channels)
                )  # theirs: heads, then q, k, v
                p.copy_(by_head.transpose(0, 1).flatten(0, 2))


def difference(x: Tensor, t: Tensor) -> float:
    """The largest relative difference of two U-Nets of 128 channels with the same weights, none of them zero."""
    mine, its = ours(128, 0.0).eval(), theirs(128, 0.0).eval()
    for p in its.parameters():
        nn.init.normal_(p, std=0.05)
    copy_weights(its, mine)
    with torch.no_grad():
        a, b = mine(x, t), its(t, x)
    return float((a - b).norm() / b.norm())

r"""The U-Net of diffusion models, for images.

An encoder halves the image level by level, a decoder doubles it again, and each decoder block reads what the
encoder saw at its size. Time and class enter every residual block as a scale and a shift of its channels:

    h = conv_1(silu(norm(x)))                                                                     (1)
    out = s (skip(x) + conv_2(dropout(silu((1 + scale) norm(h) + shift))))                        (2)
    (scale, shift) = affine(silu(time(t) + class(y)))                                             (3)

or, without adaptive norms, as a shift alone, which is added to h before its norm. s is 1 or, in DDPM++, sqrt(1/2).
A size is changed by a convolution, or by a residual block whose x and whose silu(norm(x)) are both pooled or
repeated, as in BigGAN.

The last layer of every block, of every attention and of the network starts at zero, and with it the first
prediction.

Source: Ho et al. 2020, arXiv:2006.11239, app. B (DDPM); Song et al. 2021, arXiv:2011.13456, app. H (DDPM++);
(2), (3) and the blocks that change the size: Dhariwal & Nichol 2021, arXiv:2105.05233, sec. 3 (ADM).
"""

from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.shapes import Labels, PerSample, Points
from fmlightning.nets.embeddings import (
    ClassEmbedding,
    Dropout,
    Duration,
    TimeFeatures,
    refuse_second_time,
)

MAX_GROUPS = 32
"""GroupNorm has as many groups as divide the channels, up to this and with 4 channels in each."""

EDM_LAST, EDM_QKV = 1e-5, 0.2**0.5
"""Gains of the last layers and of queries, keys and values: Karras et al. 2022, arXiv:2206.00364, the authors' code."""


class UNet(nn.Module):
    """A velocity network for images of shape (B, in_channels, H, W).

    Level l of the U works at the size (H, W) / 2**l with `channels * channel_mult[l]` channels. The U-Net of
    DDPM is scale_shift=False; ADM's is resample="block"; DDPM++ has skip_scale=0.7071 and init="edm" besides.

    Args:
        in_channels: channels of the image.
        channels: channels at the first level, before `channel_mult`; even.
        channel_mult: factor of the channels at each level; with L levels, H and W must be
            multiples of 2**(L - 1).
        num_blocks: residual blocks of the encoder at each level; the decoder has one more.
        attention_levels: levels with self-attention after every block, 0 being the full size; the
            middle, at the smallest size, always has it.
        head_channels: channels of an attention head; divides the channels wherever there is attention.
        num_classes: number of labels; 0 makes a network without labels, which ignores them.
        dropout: probability of dropping an element inside a block; 0 switches it off.
        scale_shift: whether time and class scale and shift the channels (adaptive group norm), or shift them alone.
        resample: what halves and doubles the size: a convolution or a residual block.
        skip_scale: factor of the sum of a branch and its skip; 1 switches it off.
        init: "plain" is torch's own with last layers at zero; "edm" is Xavier's without biases, and last layers
            that are small, so that the first prediction is nearly zero.
        frequencies: the smallest and the largest of the time features, in radians per unit of time.
        two_times: whether the network takes a second time *to*, as flow maps need, and predicts the average velocity
            from t to *to*. Its layers come last and start at zero, so that weights trained without them fit.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_blocks: int = 2,
        attention_levels: tuple[int, ...] = (1,),
        head_channels: int = 32,
        num_classes: int = 0,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: Literal["conv", "block"] = "conv",
        skip_scale: float = 1.0,
        init: Literal["plain", "edm"] = "plain",
        frequencies: tuple[float, float] = (1.0, 1000.0),
        two_times: bool = False,
    ) -> None:
        super().__init__()
        sizes = (in_channels, channels, num_blocks, head_channels, *channel_mult)
        if min(sizes) < 1 or not channel_mult:
            raise ValueError(
                f"in_channels={in_channels}, channels={channels}, num_blocks={num_blocks}, "
                f"head_channels={head_channels} and every factor of channel_mult={channel_mult} must be at least 1"
            )
        if not set(attention_levels) <= set(range(len(channel_mult))):
            raise ValueError(
                f"attention_levels={attention_levels} must lie between 0 and {len(channel_mult) - 1}: "
                f"channel_mult={channel_mult} makes {len(channel_mult)} levels"
            )
        require_one_of("resample", resample, ("conv", "block"))
        require_one_of("init", init, ("plain", "edm"))
        self.in_channels, self.num_classes, self.draws = in_channels, num_classes, dropout > 0
        self.factor = 2 ** (len(channel_mult) - 1)
        """H and W must be its multiples."""
        width, streams = 4 * channels, count()

        def block(c_in: int, c_out: int, change: nn.Module | None = None) -> ResBlock:
            drop = Dropout(dropout, next(streams))
            return ResBlock(c_in, c_out, width, drop, scale_shift, skip_scale, change)

        def attention(c: int, level: int) -> SpatialAttention | None:
            return (
                SpatialAttention(c, head_channels, skip_scale)
                if level in attention_levels
                else None
            )

        def down(c: int) -> nn.Module:
            return Downsample(c) if resample == "conv" else block(c, c, nn.AvgPool2d(2))

        def up(c: int) -> nn.Module:
            return Upsample(c) if resample == "conv" else block(c, c, nn.Upsample(scale_factor=2))

        self.time = nn.Sequential(
            TimeFeatures(channels, frequencies[1], frequencies[0]),
            nn.Linear(channels, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )
        self.label = ClassEmbedding(num_classes, width) if num_classes else None
        self.input = conv(in_channels, channels)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        c, skips = channels, [channels]
        for level, mult in enumerate(channel_mult):
            if level > 0:
                self.encoder.append(down(c))
                skips.append(c)
            for _ in range(num_blocks):
                out = channels * mult
                self.encoder.append(Stage(block(c, out), attention(out, level)))
                c = out
                skips.append(c)
        middle = Stage(block(c, c), SpatialAttention(c, head_channels, skip_scale))
        self.middle = nn.ModuleList([middle, Stage(block(c, c))])
        for level, mult in reversed(list(enumerate(channel_mult))):
            for k in range(num_blocks + 1):
                out, last = channels * mult, level > 0 and k == num_blocks
                stage = Stage(
                    block(c + skips.pop(), out), attention(out, level), up(out) if last else None
                )
                self.decoder.append(stage)
                c = out
        self.norm = group_norm(c)
        self.output = zeroed(conv(c, in_channels))
        if init == "edm":
            start_as_edm(self)
        self.duration = Duration(width) if two_times else None

    def forward(
        self,
        x: Points,
        t: PerSample,
        y: Labels | None = None,
        streams: KeyedStreams | None = None,
        to: PerSample | None = None,
    ) -> Points:
        """The prediction at x (B, in_channels, H, W).

        Args:
            y: labels; `num_classes`, or None for the whole batch, stands for "no label".
            streams: keyed streams of the samples, needed while training with dropout.
            to: the second time, (B,), of a network with `two_times`; None stands for t.

        Raises:
            ValueError: x has other channels or a size that cannot be halved often enough, streams are missing, or
                *to* is given to a network of one time.
        """
        self.check(x)
        if self.duration is None:
            refuse_second_time(self, to)
        e = self.time(t)
        e = e if self.duration is None else e + self.duration(t, to)
        e = F.silu(e if self.label is None else e + self.label(y))
        h = self.input(x)
        skips = [h]
        for stage in self.encoder:
            h = stage(h, e, streams)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, e, streams)
        for stage in self.decoder:
            h = stage(torch.cat((h, skips.pop()), 1), e, streams)
        return self.output(F.silu(self.norm(h))).to(x.dtype)

    def check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but UNet(in_channels={self.in_channels}) takes images of shape "
                f"(B, {self.in_channels}, H, W): set in_channels to theirs, or take a TimeMLP for vectors"
            )
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            up = [max(1, -(-side // self.factor)) * self.factor for side in (height, width)]
            raise ValueError(
                f"images of {height} x {width} cannot be halved often enough: this U-Net divides both sides by "
                f"{self.factor}. Resize or pad them to {up[0]} x {up[1]} or another multiple of {self.factor}, "
                "or shorten channel_mult"
            )


class Stage(nn.Module):
    """A residual block, then perhaps attention, then perhaps doubling of the size."""

    def __init__(
        self,
        block: "ResBlock",
        attention: "SpatialAttention | None" = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block, self.attention, self.upsample = block, attention, upsample

    def forward(self, x: Tensor, e: Tensor, streams: KeyedStreams | None) -> Tensor:
        h = self.block(x, e, streams)
        h = h if self.attention is None else self.attention(h)
        return h if self.upsample is None else self.upsample(h, e, streams)


class ResBlock(nn.Module):
    """The residual block, equations (1) to (3).

    Args:
        resample: what changes the size of x and of silu(norm(x)); None keeps it.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        width: int,
        dropout: Dropout,
        scale_shift: bool = True,
        skip_scale: float = 1.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.skip_scale = scale_shift, skip_scale
        self.norm1, self.conv1 = group_norm(c_in), conv(c_in, c_out)
        self.affine = nn.Linear(width, 2 * c_out if scale_shift else c_out)
        self.norm2, self.conv2 = group_norm(c_out), zeroed(conv(c_out, c_out))
        self.dropout = dropout
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor, e: Tensor, streams: KeyedStreams | None) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = F.silu(self.modulated(h, self.affine(e)[:, :, None, None]))
        h = self.conv2(self.dropout(h, streams))
        return joined(self.skip(self.resample(x)), h, self.skip_scale)

    def modulated(self, h: Tensor, e: Tensor) -> Tensor:
        """The normalised h, as time and class want it."""
        if not self.scale_shift:
            return self.norm2(h + e)
        scale, shift = e.chunk(2, 1)
        return self.norm2(h) * (1 + scale) + shift


class SpatialAttention(nn.Module):
    """Self-attention between the pixels, added to its input."""

    def __init__(self, channels: int, head_channels: int, skip_scale: float = 1.0) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} does not divide the {channels} channels of a level with attention; "
                "choose a divisor of channels * channel_mult there (the middle, at the last level, always attends)"
            )
        self.head_channels, self.skip_scale = head_channels, skip_scale
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.output = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # heads n, channels of a head k, pixels l
        qkv_b3nkl = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, self.head_channels))
        # the fused kernels, which never hold the l x l scores, want the channels of a head side by side
        q_bnlk, k_bnlk, v_bnlk = qkv_b3nkl.mT.contiguous().unbind(1)
        h_bnlk = F.scaled_dot_product_attention(q_bnlk, k_bnlk, v_bnlk)
        return joined(x, self.output(h_bnlk.mT.reshape(x.shape)), self.skip_scale)


class Downsample(nn.Module):
    """A strided convolution that halves the size; time and class do not enter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor, streams: KeyedStreams | None) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubling of the size by repetition, then a convolution; time and class do not enter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor, e: Tensor, streams: KeyedStreams | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def joined(skip: Tensor, branch: Tensor, scale: float) -> Tensor:
    return skip + branch if scale == 1 else scale * (skip + branch)


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    most = max(1, min(MAX_GROUPS, channels // 4))
    groups = max(g for g in range(1, most + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def start_as_edm(net: UNet) -> None:
    """Xavier's uniform weights and no biases; last layers small, and queries, keys and values smaller."""
    gains: dict[nn.Module, float] = {net.output: EDM_LAST}
    for part in net.modules():
        if isinstance(part, ResBlock):
            gains[part.conv2] = EDM_LAST
        elif isinstance(part, SpatialAttention):
            gains |= {part.output: EDM_LAST, part.qkv: EDM_QKV}
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gains.get(layer, 1.0))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")

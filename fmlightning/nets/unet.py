r"""The U-Net of diffusion models, for images.

An encoder halves the image level by level, a decoder doubles it again, and each decoder block reads what the
encoder saw at its size. Time and class enter every residual block as a scale and a shift of its channels:

    h = conv_1(silu(norm(x)))                                                                     (1)
    out = skip(x) + conv_2(dropout(silu((1 + scale) norm(h) + shift)))                            (2)
    (scale, shift) = affine(silu(time(t) + class(y)))                                             (3)

The last layer of every block, of every attention and of the network starts at zero, and with it the first
prediction.

Source: Ho et al. 2020, arXiv:2006.11239, app. B; (2) and (3): Dhariwal & Nichol 2021, arXiv:2105.05233, sec. 3.
"""

from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmlightning.flow.keys import Rows
from fmlightning.flow.shapes import Labels, PerSample, Points
from fmlightning.nets.embeddings import ClassEmbedding, Dropout, TimeFeatures

MAX_FREQUENCY = 1000.0
MAX_GROUPS = 32
"""GroupNorm has as many groups as divide the channels, up to this and with 4 channels in each."""


class UNet(nn.Module):
    """A velocity network for images of shape (B, in_channels, H, W).

    Level l of the U works at the size (H, W) / 2**l with `channels * channel_mult[l]` channels.

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
        self.in_channels, self.num_classes = in_channels, num_classes
        self.factor = 2 ** (len(channel_mult) - 1)
        """H and W must be its multiples."""
        width, streams = 4 * channels, count()

        def stage(c_in: int, c_out: int, attends: bool, up: bool = False) -> Stage:
            block = Block(c_in, c_out, width, Dropout(dropout, next(streams)))
            return Stage(block, head_channels if attends else None, up)

        self.time = nn.Sequential(
            TimeFeatures(channels, MAX_FREQUENCY),
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
                self.encoder.append(Downsample(c))
                skips.append(c)
            for _ in range(num_blocks):
                self.encoder.append(stage(c, channels * mult, level in attention_levels))
                c = channels * mult
                skips.append(c)
        self.middle = nn.ModuleList([stage(c, c, True), stage(c, c, False)])
        for level, mult in reversed(list(enumerate(channel_mult))):
            for block in range(num_blocks + 1):
                up = level > 0 and block == num_blocks
                attends = level in attention_levels
                self.decoder.append(stage(c + skips.pop(), channels * mult, attends, up))
                c = channels * mult
        self.norm = group_norm(c)
        self.output = zeroed(conv(c, in_channels))

    def forward(
        self, x: Points, t: PerSample, y: Labels | None = None, rows: Rows | None = None
    ) -> Points:
        """The prediction at x (B, in_channels, H, W).

        Args:
            y: labels; `num_classes`, or None for the whole batch, stands for "no label".
            rows: keyed streams of the samples, needed while training with dropout.

        Raises:
            ValueError: x has other channels or a size that cannot be halved often enough, or rows are missing.
        """
        self.check(x)
        e = self.time(t)
        e = F.silu(e if self.label is None else e + self.label(y))
        h = self.input(x)
        skips = [h]
        for stage in self.encoder:
            h = stage(h, e, rows)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, e, rows)
        for stage in self.decoder:
            h = stage(torch.cat((h, skips.pop()), 1), e, rows)
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

    def __init__(self, block: "Block", head_channels: int | None, up: bool) -> None:
        super().__init__()
        self.block = block
        self.attention = Attention(block.c_out, head_channels) if head_channels else nn.Identity()
        self.upsample = Upsample(block.c_out) if up else nn.Identity()

    def forward(self, x: Tensor, e: Tensor, rows: Rows | None) -> Tensor:
        return self.upsample(self.attention(self.block(x, e, rows)))


class Block(nn.Module):
    """The residual block, equations (1) to (3)."""

    def __init__(self, c_in: int, c_out: int, width: int, dropout: Dropout) -> None:
        super().__init__()
        self.c_out = c_out
        self.norm1, self.conv1 = group_norm(c_in), conv(c_in, c_out)
        self.affine = nn.Linear(width, 2 * c_out)
        self.norm2, self.conv2 = group_norm(c_out), zeroed(conv(c_out, c_out))
        self.dropout = dropout
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, e: Tensor, rows: Rows | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(e)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h, rows))


class Attention(nn.Module):
    """Self-attention between the pixels, added to its input."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels={head_channels} does not divide the {channels} channels of a level with attention; "
                "choose a divisor of channels * channel_mult there (the middle, at the last level, always attends)"
            )
        self.head_channels = head_channels
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.output = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # heads n, channels of a head k, pixels l
        qkv_b3nkl = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, self.head_channels))
        q_bnlk, k_bnlk, v_bnlk = qkv_b3nkl.mT.unbind(1)
        h_bnlk = F.scaled_dot_product_attention(q_bnlk, k_bnlk, v_bnlk)
        return x + self.output(h_bnlk.mT.reshape(x.shape))


class Downsample(nn.Module):
    """A strided convolution that halves the size; time and class do not enter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor, rows: Rows | None) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubling of the size by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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

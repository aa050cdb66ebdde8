r"""The diffusion transformer, for images and latents: DiT, and SiT where it predicts a velocity.

Patches of p x p pixels are tokens. In every block time and class scale and shift the normalised tokens, and
say how much each branch counts:

    h = x + gate_1 attention((1 + scale_1) norm(x) + shift_1)                                     (1)
    out = h + gate_2 mlp((1 + scale_2) norm(h) + shift_2)                                         (2)
    (shift_1, scale_1, gate_1, shift_2, scale_2, gate_2) = affine(silu(time(t) + class(y)))       (3)

The affine map of (3) starts at zero ("adaLN-zero"), so every block starts as the identity; the last layer starts
at zero too, and with it the first prediction. Where a token stands, column i and row j, enters through the angles

    i omega_k and j omega_k,  omega_k = base^(-k / n),  k = 0 ... n - 1                           (4)

either as their sines and cosines, added to the tokens once, or in every attention as rotations of pairs of channels
of queries and keys, whose products then depend on the distance alone (RoPE).

Source: Peebles & Xie 2023, arXiv:2212.09748, sec. 3; Ma et al. 2024, arXiv:2401.08740 (SiT);
RoPE: Su et al. 2021, arXiv:2104.09864, along two axes as in Heo et al. 2024, arXiv:2403.13298, sec. 3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
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

TIME_FEATURES = 256
SINCOS_BASE, ROPE_BASE = 10_000.0, 100.0

WIDTH_DEPTH_HEADS = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""Peebles & Xie 2023, table 1."""

Tokens = Float[Tensor, "B L D"]
Modulation = Float[Tensor, "B D"]


@dataclass(frozen=True)
class Size:
    """The size of a transformer.

    Args:
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads; they share the width.
        patch: side of a patch, in pixels.
    """

    width: int
    depth: int
    heads: int
    patch: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.patch) < 1:
            raise ValueError(f"every number of size={self} must be at least 1")
        if self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}: choose a divisor"
            )

    @classmethod
    def named(cls, name: str) -> "Size":
        """The published size "S/2", "XL/4", ...: width, depth and heads, then the patch."""
        letters, _, patch = name.partition("/")
        if letters not in WIDTH_DEPTH_HEADS or not patch.isdecimal():
            raise ValueError(
                f"size={name!r} must be one of {', '.join(WIDTH_DEPTH_HEADS)}, a slash and the side of a patch, "
                'such as "B/2", or the numbers width, depth, heads and patch'
            )
        return cls(*WIDTH_DEPTH_HEADS[letters], int(patch))


class DiT(nn.Module):
    """A velocity network for images or latents of shape (B, in_channels, H, W).

        DiT("B/2", in_channels=4, num_classes=1000)                 the published DiT-B/2
        DiT(Size(width=64, depth=4, heads=4, patch=2))              one of your own

    Args:
        size: a published one, "S", "B", "L" or "XL", a slash and the side of a patch; or width, depth, heads and
            patch. H and W must be multiples of the patch.
        in_channels: channels of the image.
        num_classes: number of labels; 0 makes a network without labels, which ignores them.
        positions: how a token knows its place: "sincos", added once, or "rope", rotations in every attention.
        mlp_ratio: units of an MLP for each channel of a token.
        dropout: probability of dropping an element at the end of a branch; 0 switches it off.
        frequencies: the smallest and the largest of the time features, in radians per unit of time.
        two_times: whether the network takes a second time *to*, as flow maps need, and predicts the average velocity
            from t to *to*. Its layers come last and start at zero, so that weights trained without them fit.
    """

    def __init__(
        self,
        size: str | Size = "S/2",
        in_channels: int = 3,
        num_classes: int = 0,
        positions: Literal["sincos", "rope"] = "sincos",
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        frequencies: tuple[float, float] = (1.0, 1000.0),
        two_times: bool = False,
    ) -> None:
        super().__init__()
        self.size = size = Size.named(size) if isinstance(size, str) else size
        if min(in_channels, mlp_ratio) < 1:
            raise ValueError(
                f"in_channels={in_channels} and mlp_ratio={mlp_ratio} must be at least 1"
            )
        check_positions(positions, size)
        self.in_channels, self.num_classes, self.positions = in_channels, num_classes, positions
        self.draws = dropout > 0
        width, pixels = size.width, in_channels * size.patch**2
        self.time = nn.Sequential(
            TimeFeatures(TIME_FEATURES, frequencies[1], frequencies[0]),
            nn.Linear(TIME_FEATURES, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )
        self.label = ClassEmbedding(num_classes, width) if num_classes else None
        self.input = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(
            DiTBlock(size, mlp_ratio, dropout, layer) for layer in range(size.depth)
        )
        self.norm, self.affine = layer_norm(width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, pixels)
        start(self)
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
            ValueError: x has other channels or a size that the patch does not divide, streams are missing, or *to* is
                given to a network of one time.
        """
        self.check(x)
        grid = x.shape[2] // self.size.patch, x.shape[3] // self.size.patch
        if self.duration is None:
            refuse_second_time(self, to)
        e = self.time(t)
        e = e if self.duration is None else e + self.duration(t, to)
        e = F.silu(e if self.label is None else e + self.label(y))
        h, turn = self.placed(self.input(patchify(x, self.size.patch)), grid)
        for block in self.blocks:
            h = block(h, e, turn, streams)
        shift, scale = self.affine(e).chunk(2, 1)
        h = self.output(modulate(self.norm(h), shift, scale))
        return unpatchify(h, grid, self.size.patch).to(x.dtype)

    def placed(self, h: Tokens, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The tokens, and the angles by which attention turns its queries and keys, if it does."""
        if self.positions == "rope":
            return h, angles(grid, self.size.width // self.size.heads // 4, ROPE_BASE, h.device)
        place = angles(grid, self.size.width // 4, SINCOS_BASE, h.device)
        return h + waves(place).to(h.dtype), None

    def check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but DiT(in_channels={self.in_channels}) takes images of shape "
                f"(B, {self.in_channels}, H, W): set in_channels to theirs, or take a TimeMLP for vectors"
            )
        height, width = x.shape[2:]
        if height % self.size.patch or width % self.size.patch:
            raise ValueError(
                f"images of {height} x {width} cannot be cut into patches of side {self.size.patch}: "
                "choose a size whose patch divides both sides, or resize or pad them"
            )


class DiTBlock(nn.Module):
    """The transformer block, equations (1) to (3)."""

    def __init__(self, size: Size, mlp_ratio: int, dropout: float, layer: int) -> None:
        super().__init__()
        width = size.width
        self.affine = nn.Linear(width, 6 * width)
        self.norm_1, self.norm_2 = layer_norm(width), layer_norm(width)
        self.attention = TokenAttention(width, size.heads)
        self.drop_1, self.drop_2 = (Dropout(dropout, 2 * layer + branch) for branch in (0, 1))
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * width, width),
        )

    def forward(
        self, x: Tokens, e: Modulation, turn: Tensor | None, streams: KeyedStreams | None
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.affine(e).chunk(6, 1)
        h = self.attention(modulate(self.norm_1(x), shift_1, scale_1), turn)
        x = x + gate_1[:, None] * self.drop_1(h, streams)
        h = self.mlp(modulate(self.norm_2(x), shift_2, scale_2))
        return x + gate_2[:, None] * self.drop_2(h, streams)


class TokenAttention(nn.Module):
    """Self-attention between tokens; `turn` (L, K / 2) holds the angles of RoPE."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tokens, turn: Tensor | None) -> Tokens:
        # heads n, channels of a head k, tokens l
        qkv_bl3nk = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q_bnlk, k_bnlk, v_bnlk = qkv_bl3nk.permute(2, 0, 3, 1, 4)
        if turn is not None:
            q_bnlk, k_bnlk = rotate(q_bnlk, turn), rotate(k_bnlk, turn)
        h_bnlk = F.scaled_dot_product_attention(q_bnlk, k_bnlk, v_bnlk)
        return self.output(h_bnlk.transpose(1, 2).flatten(2))


def modulate(x: Tokens, shift: Modulation, scale: Modulation) -> Tokens:
    return x * (1 + scale[:, None]) + shift[:, None]


def patchify(x: Float[Tensor, "B C H W"], patch: int) -> Tokens:
    """The patches of an image as tokens, row by row; in each, channels first."""
    # rows of patches i, columns of patches j, pixels of a patch p x q
    x_bcipjq = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return x_bcipjq.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(h: Tokens, grid: tuple[int, int], patch: int) -> Float[Tensor, "B C H W"]:
    """The image that `patchify` cuts into these tokens."""
    h_bijcpq = h.unflatten(2, (-1, patch, patch)).unflatten(1, grid)
    return h_bijcpq.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def angles(
    grid: tuple[int, int], n: int, base: float, device: torch.device
) -> Float[Tensor, "L angles"]:
    """Equation (4) for each token, row by row: n angles of its column, then n of its row."""
    omega = base ** (-torch.arange(n, device=device) / n)
    row, column = (torch.arange(side, device=device)[:, None] * omega for side in grid)
    shape = (*grid, n)
    return torch.cat((column.expand(shape), row[:, None].expand(shape)), 2).flatten(0, 1)


def waves(place: Float[Tensor, "L angles"]) -> Float[Tensor, "L features"]:
    """Sines and cosines of the column's angles, then of the row's."""
    return torch.cat([f(axis) for axis in place.chunk(2, 1) for f in (torch.sin, torch.cos)], 1)


def rotate(
    x: Float[Tensor, "B heads L K"], turn: Float[Tensor, "L angles"]
) -> Float[Tensor, "B heads L K"]:
    """Pairs of channels (c, c + K / 2) of each token, turned by its angles."""
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    a, b = x.chunk(2, 3)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), 3)


def layer_norm(width: int) -> nn.LayerNorm:
    """Without a scale and shift of its own: equation (3) has them."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def start(net: DiT) -> None:
    """The published initial weights: Xavier's, small embeddings, and zeros where the module's text says so."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
            if name.startswith("time"):
                nn.init.normal_(layer.weight, std=0.02)
            elif name == "output" or name.endswith("affine"):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
    if net.label is not None:
        nn.init.normal_(net.label.rows.weight, std=0.02)


def check_positions(positions: str, size: Size) -> None:
    """Sines and cosines of two axes need channels in fours."""
    if positions not in ("sincos", "rope"):
        raise ValueError(f"positions={positions!r} must be one of sincos, rope")
    name, channels = "width", size.width
    if positions == "rope":
        name, channels = "width / heads", size.width // size.heads
    if channels % 4:
        raise ValueError(
            f"positions={positions} needs a multiple of 4 as {name}, which is {channels}: two axes, and a sine and "
            "a cosine of each angle"
        )

r"""All randomness, as a pure function of (seed, purpose, step, sample index).

A `Key` names a stream of random numbers; `fold` derives another from it:

    Key(seed).fold("noise", step)

and gives numbers in two ways. `generator` seeds torch's own generator: the fastest draw for a whole
batch, whose row i depends on the key, the row and the batch size. `streams` is counter-based: row i
depends on the key and on `index[i]` alone, so sample 137 is the same in any batch, on any process
and on any device. Neither reads or moves a global random state.

The counter-based numbers are Philox-4x32-10 in integer tensor arithmetic; normals are Box-Muller. Masks, which need
a random number for every activation of a network, take 16-bit lanes of SplitMix64, a twentieth of the arithmetic.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators", with the shifts and factors of Java's SplittableRandom (SplitMix64).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, as are the next
MIXERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Key:
    """The name of a stream: `seed` at the root, then whatever was folded in, hashed to 63 bits."""

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63)")

    def fold(self, *names: int | str) -> "Key":
        """The key of a stream within this one; different names give unrelated streams."""
        text = repr((self.seed, *names)).encode()
        return Key(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator at the start of this stream.

        CPU and CUDA generators give different numbers for one seed, and on the CPU `randn(n)[:k]`
        is not `randn(k)`: always draw the same shape, and slice.
        """
        return torch.Generator(device).manual_seed(self.seed)

    def streams(self, index: Int[Tensor, " B"]) -> "KeyedStreams":
        """One stream for each sample index."""
        words = torch.tensor([self.seed & MASK, self.seed >> 32], device=index.device)
        return KeyedStreams(words, index.long())


class KeyedStreams(NamedTuple):
    """One random stream for each sample of a batch: a pair of tensors, so it passes through compiled code.

    `stream` numbers unrelated draws of the same samples (for example, the dropout layers of a network).
    """

    words: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    def bits(self, count: int, stream: int | Tensor = 0) -> Int[Tensor, "B count"]:
        """Independent 32-bit words, as int64 in [0, 2**32); `stream` may be one for each sample, (B,)."""
        blocks = torch.arange(math.ceil(count / 4), device=self.index.device)
        low, high = (self.index & MASK)[:, None], (self.index >> 32 & MASK)[:, None]
        number = torch.full_like(low, stream) if isinstance(stream, int) else stream[:, None]
        c = philox((blocks[None], low, high, number), (self.words[0], self.words[1]))
        return torch.stack(torch.broadcast_tensors(*c), -1).flatten(1)[:, :count]

    def mask_bits(self, count: int, stream: int = 0) -> Int[Tensor, "B count"]:
        """Independent 16-bit numbers, as int16 in [-2**15, 2**15): cheap ones, for masks.

        Four are the SplitMix64 word j of a sample, mix(start + (j + 1) step), where the start is mixed of key, index
        and stream, and the odd step of the start, as when a SplittableRandom splits.
        """
        start = mix((self.words[1] << 32) + self.words[0] + GOLDEN * (self.index + 1))
        start = mix(start + (GOLDEN * (stream + 1) + 2**63) % 2**64 - 2**63)[:, None]
        step = mix(start + GOLDEN) | 1  # GOLDEN itself times a range is what Inductor overflows on
        number = torch.arange(1, math.ceil(count / 4) + 1, device=self.index.device)
        return mix(start + step * number).view(torch.int16)[:, :count]

    def uniform(
        self, shape: Sequence[int], stream: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Uniform numbers in the open interval (0, 1), of shape (B, *shape)."""
        # 23 bits: the largest value, 1 - 2**-24, is still below one in float32
        words = self.bits(math.prod(shape), stream) >> 9
        return (words + 0.5).mul_(2.0**-23).to(dtype).reshape(len(words), *shape)

    def normal(
        self, shape: Sequence[int], stream: int | Tensor = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal numbers of shape (B, *shape); none is farther out than 6.8."""
        count = math.prod(shape)
        half = math.ceil(count / 2)
        words = self.bits(2 * half, stream)
        u = ((words + 0.5) * 2.0**-32).reshape(len(words), half, 2)
        radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
        return pairs.flatten(1)[:, :count].reshape(len(words), *shape).to(dtype)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four words of counter and two of key into four random words.

    Words are int64 tensors in [0, 2**32). A product wraps in int64, which keeps its 64 bits: the
    shift brings the high word down and the mask drops the copies of the sign. The low words wait for
    theirs: until the end they meet no more than the next round's mask. What is in place is new.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (p1 >> 32) ^ c1, (p0 >> 32) ^ c3
        c0 ^= k0
        c2 ^= k1
        c0 &= MASK
        c2 &= MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def mix(z: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """SplitMix64's scrambling of 64-bit words, in place. The masks make shifts of int64 logical ones."""
    z ^= (z >> 30).bitwise_and_(2**34 - 1)
    z *= MIXERS[0]
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= MIXERS[1]
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z

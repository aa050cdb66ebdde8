"""Philox against its published vectors, the laws of the numbers, and what a row may depend on."""

import pytest
import torch
from scipy import stats

from fmlightning.flow.keys import GOLDEN, Key, mix, philox

# Random123 1.14, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, result):
    assert philox(words(counter), words(key)) == words(result)


# SplitMix64 from 1234567, as Rosetta Code and Vigna's splitmix64.c give it
SPLITMIX = (
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)


def test_splitmix_gives_the_known_answers():
    words = mix(1234567 + GOLDEN * torch.arange(1, 6))
    assert [word % 2**64 for word in words.tolist()] == list(SPLITMIX)


def splitmix(seed, step, gamma=0x9E3779B97F4A7C15):
    """Word `step` after the seed, in Python's integers."""
    z = (seed + step * gamma) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("stream", [0, 5, 10**6])
def test_lanes_are_splitmix_of_key_index_stream_and_word(stream):
    seed, index = 2**62 + 12345, [0, 7, 2**40 + 3]
    mask_bits = Key(seed).streams(torch.tensor(index)).mask_bits(11, stream)
    for row, i in zip(mask_bits.tolist(), index, strict=True):
        start = splitmix(splitmix(seed, i + 1), stream + 1)
        gamma = splitmix(start, 1) | 1
        words = [splitmix(start, j, gamma) for j in (1, 2, 3)]
        expected = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
        assert [lane % 2**16 for lane in row] == expected[:11]


def test_lanes_are_uniform_and_unrelated_to_their_neighbours():
    n = 20_000
    streams = Key(3).fold("mask_bits").streams(torch.arange(n))
    mask_bits, another = (((streams.mask_bits(12, k).double() + 0.5) / 2**16) + 0.5 for k in (0, 1))
    for column in mask_bits.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    other = {"row": mask_bits.roll(1, 0), "stream": another}
    other |= {f"lag {k}": mask_bits.roll(k, 1) for k in range(1, 12)}
    for name, shifted in other.items():
        correlation = torch.stack((mask_bits.flatten(), shifted.flatten())).corrcoef()[0, 1]
        assert abs(float(correlation)) < 4 / (12 * n) ** 0.5, name


def test_lanes_along_a_row_fill_every_value():
    mask_bits = Key(8).streams(torch.tensor([42])).mask_bits(2**20)
    counts = torch.bincount(mask_bits[0].long() + 2**15, minlength=2**16)
    # a chi-square of 2**16 cells with 16 expected in each
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_lanes_of_a_row_are_the_same_in_any_batch_and_do_not_change_the_index():
    key, index = Key(5), torch.arange(64)
    whole = key.streams(index).mask_bits(33, 2)
    for part in (torch.tensor([17]), torch.tensor([63, 17, 2])):
        assert torch.equal(key.streams(part).mask_bits(33, 2), whole[part])
    assert torch.equal(index, torch.arange(64))  # mixing works in place


def test_rows_are_philox_of_block_index_and_stream():
    seed, index = 0x299F31D0A4093822 & (2**63 - 1), 0x13198A2E85A308D3
    streams = Key(seed).streams(torch.tensor([index]))
    expected = philox(words("00000001 85a308d3 13198a2e 00000005"), words("a4093822 299f31d0"))
    assert streams.bits(8, stream=5)[0, 4:].tolist() == [int(w) for w in expected]


@pytest.mark.parametrize("stream", [0, 1])
def test_uniform_numbers_are_uniform(stream):
    u = Key(3).fold("test").streams(torch.arange(20_000)).uniform((2,), stream)
    for column in u.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(*u.T.numpy()).statistic) < 4 / 20_000**0.5


def test_normal_numbers_are_normal_and_uncorrelated():
    z = Key(3).fold("test").streams(torch.arange(20_000)).normal((3,))
    for column in z.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    # 4 standard errors of a correlation
    off = z.T.double().cov() - torch.eye(3)
    assert (off.abs() < 4 * 2**0.5 / 20_000**0.5).all()


def test_numbers_along_a_row_are_normal_too():
    z = Key(4).streams(torch.tensor([137])).normal((100, 200))
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_neighbouring_rows_keys_and_streams_are_unrelated():
    n, index = 20_000, torch.arange(20_001)
    z = Key(0).streams(index).normal((1,))[:, 0]
    others = {
        "row": z[1:],
        "key": Key(1).streams(index).normal((1,))[:-1, 0],
        "fold": Key(0).fold("a").streams(index).normal((1,))[:-1, 0],
        "stream": Key(0).streams(index).normal((1,), stream=1)[:-1, 0],
    }
    for name, other in others.items():
        assert abs(stats.spearmanr(z[:-1], other).statistic) < 4 / n**0.5, name


@pytest.mark.parametrize("draw", ["uniform", "normal"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 5)], ids=str)
def test_a_row_is_the_same_in_any_batch(draw, shape):
    key = Key(5)
    whole = getattr(key.streams(torch.arange(64)), draw)(shape)
    for index in (torch.tensor([17]), torch.tensor([63, 17, 2]), torch.arange(10, 20)):
        assert torch.equal(getattr(key.streams(index), draw)(shape), whole[index])


def test_large_indices_have_streams_of_their_own():
    index = torch.tensor([1, 1 + 2**32, 1 + 2**40])
    assert len(Key(0).streams(index).bits(1).unique()) == 3


def test_uniform_numbers_stay_inside_the_open_interval():
    u = Key(0).streams(torch.arange(2000)).uniform((1000,))
    assert u.min() > 0
    assert u.max() < 1


@pytest.mark.parametrize("shape", [(0,), (2,)], ids=str)
@pytest.mark.parametrize("batch", [0, 3])
def test_empty_draws_are_empty(batch, shape):
    streams = Key(0).streams(torch.arange(batch))
    assert streams.normal(shape).shape == streams.uniform(shape).shape == (batch, *shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_precision_rounds_the_same_numbers(dtype):
    streams = Key(0).streams(torch.arange(100))
    z = streams.normal((5,), dtype=dtype)
    assert z.dtype == dtype
    assert torch.equal(z, streams.normal((5,)).to(dtype))


def test_no_global_random_state_is_read_or_moved():
    def draws():
        key = Key(7).fold("a", 1)
        return torch.cat(
            (
                key.streams(torch.arange(4)).normal((3,)),
                torch.randn(4, 3, generator=key.generator()),
            )
        )

    state = torch.get_rng_state()
    first = draws()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(11)
    assert torch.equal(first, draws())


def test_folded_keys_are_stable_and_distinct():
    # written down once: a change would silently change every run
    assert Key(0).fold("noise", 3).seed == 6347807290990278987
    keys = [Key(0).fold(name, step) for name in ("noise", "time") for step in range(100)]
    keys += [Key(1).fold("noise", 0), Key(0).fold("noise"), Key(0).fold("noise", "0")]
    assert len({key.seed for key in keys}) == len(keys)
    assert all(0 <= key.seed < 2**63 for key in keys)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_do_not_fit_are_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed}"):
        Key(seed)

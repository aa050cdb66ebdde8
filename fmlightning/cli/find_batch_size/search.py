r"""The next batch to try, from what the earlier ones took.

Training takes memory m(B) = m_0 + c B: weights, averages and the libraries, and the activations of each sample. Two
trials that fit tell both numbers, and so the batch that fills the memory M,

    B = B_2 + (M - m(B_2)) (B_2 - B_1) / (m(B_2) - m(B_1))                                          (1)

which is then tried as well, until the next one would be larger by less than a sixteenth. What (1) expects not to fit
is not tried: on a CPU that would drive the machine to its swap.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

FINE = 16
"""The search ends where the next batch to try is larger by less than this part."""

LEAP = 8
"""The factor by which the next batch may be larger."""


@dataclass(frozen=True)
class Trial:
    """The memory and the time of a few steps of training.

    Attributes:
        batch: samples in a step, over all processes.
        peak: bytes at most in each process; None where it did not end.
        rate: samples a second of all processes.
        why: why it does not fit, or None.
    """

    batch: int
    peak: int | None = None
    rate: float | None = None
    why: str | None = None

    @property
    def fits(self) -> bool:
        return self.why is None


def search(
    measure: Callable[[int], Trial], first: int, multiple: int, memory: int, cap: int | None = None
) -> Iterator[Trial]:
    """Trials, until the largest batch that fits is known.

    Args:
        measure: takes a few steps with a batch.
        first: the batch to begin with.
        multiple: of which all batches are.
        memory: bytes that each process may take.
        cap: samples that there are, which no batch exceeds.
    """
    start = max(first // multiple, 1) * multiple
    if cap is not None and start > cap:
        raise ValueError(f"there are {cap} training samples, fewer than a batch of {start}")
    done: list[Trial] = []
    batch: int | None = start
    while batch is not None:
        done.append(measure(batch))
        yield done[-1]
        batch = following(done, multiple, memory, cap)


def largest(trials: list[Trial]) -> Trial | None:
    """The largest batch that fits."""
    return max((t for t in trials if t.fits), key=lambda t: t.batch, default=None)


def following(done: list[Trial], multiple: int, memory: int, cap: int | None = None) -> int | None:
    """The next batch to try; None where the search is over."""
    most = min((t.batch for t in done if not t.fits), default=None)
    best = largest(done)
    if best is None:
        assert most is not None, "there was a trial"
        return max(most // 4 // multiple, 1) * multiple if most > multiple else None
    wanted = expected([t for t in done if t.fits], memory)
    if len(done) == 1 and wanted * FINE > best.batch * (FINE + 1):
        wanted = max(
            wanted, best.batch + multiple
        )  # else a first batch of one multiple is the last
    batch = int(min(wanted, LEAP * best.batch, cap or wanted)) // multiple * multiple
    if batch > best.batch and batch == (cap or 0) // multiple * multiple and most is None:
        return batch  # the last there is, however near
    if most is not None and batch >= most:
        batch = (best.batch + most) // 2 // multiple * multiple
    return batch if batch - best.batch >= max(multiple, best.batch / FINE) else None


def expected(fitting: list[Trial], memory: int) -> float:
    """The batch that fills the memory, equation (1); with one trial as if m_0 were 0, which it takes at most."""
    *others, best = sorted(fitting, key=lambda t: t.batch)
    assert best.peak is not None, "it fits"
    before = others[-1] if others else None
    if before is None or before.peak is None:
        return min(2.0, memory / best.peak) * best.batch
    slope = (best.peak - before.peak) / (best.batch - before.batch)
    # where memory does not grow with the batch yet, as of small networks, (1) tells nothing
    return best.batch + (memory - best.peak) / slope if slope > 0 else LEAP * best.batch

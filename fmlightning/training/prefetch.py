"""Work on numbered batches, done by threads while the batches before them are trained on.

What a number needs is read in the main thread, in the order of the numbers: there may be collectives in it, which all
processes must call in the same order. What is then made of it is a function of what was read. So threads change how
soon it is there and nothing else, and after a resume the first number that is asked for is the first that is read.
The solvers of scipy and POT let go of Python's lock, so they take no time from the training beside them as long as
there is a core to run on.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Read = TypeVar("Read")
Made = TypeVar("Made")

MOST_AHEAD = 64
"""Threads that are plenty on any machine; each holds a batch."""

NAME = "ahead"
"""What the names of the threads begin with."""


class Prefetcher(Generic[Read, Made]):
    """The results of `make(read(number))`, by number.

    Args:
        read: what a number needs; called in the thread that asks.
        make: the result of it; called in a thread of its own, and must draw from no global generator.
        depth: how many results are made ahead, each in its thread; 0 makes each when it is asked for.
    """

    def __init__(
        self, read: Callable[[int], Read], make: Callable[[Read], Made], depth: int
    ) -> None:
        self.read, self.make, self.depth = read, make, depth
        self.pool: ThreadPoolExecutor | None = None
        self.waiting: dict[int, Future[Made]] = {}

    def __call__(self, number: int) -> Made:
        """The result of a number; what making it raised is raised here."""
        if not self.depth:
            return self.make(self.read(number))
        if number not in self.waiting:  # the first, or one that nobody expected
            self.close()
        self.start(number)
        return self.waiting.pop(number).result()

    def start(self, number: int) -> None:
        """Have this number and the next ones made."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.depth, NAME)
        for each in range(number, number + self.depth + 1):
            if each not in self.waiting:
                self.waiting[each] = self.pool.submit(self.make, self.read(each))

    def close(self) -> None:
        """End the threads, when each has finished what it is at."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.pool, self.waiting = None, {}

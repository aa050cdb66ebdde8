"""Worker processes that read images ahead of training.

What a step reads is a function of its number. So workers change how soon a batch is there and nothing else: they
draw no random number, any number of them gives the same batches, and after a resume the first one is asked for by
its number.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from fmlightning.data.images.datasets import ImageBatch, ImageDataset
from fmlightning.data.images.decode import BadImage
from fmlightning.data.order import Order
from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Labels


class Reader(Protocol):
    """Blocks by number."""

    def read(self, number: int) -> ImageBatch: ...


@dataclass(frozen=True)
class TrainReader:
    """This process's rows of the global batch of a step."""

    images: ImageDataset
    order: Order
    rows: slice
    skip: bool

    def read(self, number: int) -> ImageBatch:
        place = self.order.positions(number)
        positions = range(place.start, place.stop)[self.rows]
        return self.images.read(
            self.order.permutation(self.order.epoch(number)), positions, self.skip
        )


@dataclass(frozen=True)
class FixedReader:
    """Blocks of a fixed set, in its own order."""

    images: ImageDataset
    blocks: tuple[Labels, ...]
    skip: bool

    def read(self, number: int) -> ImageBatch:
        order = torch.arange(len(self.images))
        return self.images.read(order, self.blocks[number].tolist(), self.skip)


@dataclass(frozen=True)
class Steps:
    """A reader as the data set of a DataLoader."""

    reader: Reader

    def __getitem__(self, number: int) -> ImageBatch | BadImage:
        # an exception that is raised in a worker comes back as a traceback inside its own message
        try:
            return self.reader.read(number)
        except BadImage as error:
            return BadImage(str(error))


def one_more(number: int) -> int:
    return number + 1


class ReadAhead:
    """The blocks of a reader, by number; those that follow are read ahead.

    Args:
        reader: what is read.
        num_workers: processes; 0 reads in this one.
        end: how many blocks there are; None for no end.
        pin: whether blocks go on to a GPU.
        after: the number that follows another.
    """

    def __init__(
        self,
        reader: Reader,
        num_workers: int,
        end: int | None = None,
        pin: bool = False,
        after: Callable[[int], int] = one_more,
    ) -> None:
        self.after = after
        self.reader, self.num_workers, self.end, self.pin = reader, num_workers, end, pin
        self.next = -1
        self.blocks: Iterator[Any] = iter(())

    def __call__(self, number: int) -> ImageBatch:
        if self.num_workers == 0:
            return self.reader.read(number)
        if number != self.next:
            self.start(number)
        try:
            block = next(self.blocks)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # a worker that dies while it hands a tensor over breaks the connection first
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(self.death(str(error) or "nothing more came")) from error
        self.next = self.after(number)
        if self.next == self.end:
            self.blocks = iter(())  # all is read: the workers end
        if isinstance(block, Exception):
            raise block
        return block

    def start(self, number: int) -> None:
        loader: Any = DataLoader(
            Steps(self.reader),  # type: ignore[arg-type]
            batch_size=None,
            sampler=following(number, self.end, self.after),
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            pin_memory=self.pin,
            generator=Key(0).generator(),  # or it would move the global random state
        )
        main = threading.current_thread() is threading.main_thread()
        # torch would raise at a worker's death from a signal handler, in the middle of an optimiser step
        before = signal.getsignal(signal.SIGCHLD) if main else None
        self.blocks = iter(loader)
        if main:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def death(self, cause: str) -> str:
        return (
            f"data.num_workers={self.num_workers}: a process that reads images died ({cause.splitlines()[0]}); often "
            "memory or /dev/shm ran out, and fewer workers take less. To go on: the same command with --ckpt_path auto"
        )


def following(number: int, end: int | None, after: Callable[[int], int]) -> Iterator[int]:
    """Numbers from one on, to before the end; no method, since workers end late where something holds a circle."""
    while number != end:
        yield number
        number = after(number)


def as_it_is(block: Any) -> Any:
    return block

"""One process trains a run directory at a time.

The lock is a file beside the directory, which the operating system holds for as long as the process lives: however a
process ends, nothing is left to clear away. Where a file system has no locks, none is kept.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

HELD: list[FileLock] = []
"""The locks of this process."""


def lock_file(folder: Path) -> Path:
    """Beside the directory: what is in a directory says whether it is a run's."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.lock")


def occupy(folder: Path) -> None:
    """Hold a run directory until `leave`, or until the process has gone.

    Raises:
        ValueError: a process that is alive holds it.
    """
    path = lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=1)  # another may just be asking who is there
    try:
        with suppress(NotImplementedError):
            lock.acquire()
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            HELD.append(lock)
    except Timeout as error:
        raise ValueError(
            f"{folder} is being trained by {occupant(folder)}: wait until it has ended, or stop it"
        ) from error


def leave() -> None:
    """Give back all that this process holds."""
    while HELD:
        HELD.pop().release()


def occupant(folder: Path) -> str | None:
    """Who trains in a run directory, or None; writes nothing."""
    path = lock_file(folder)
    if not path.is_file():
        return None
    try:
        with suppress(NotImplementedError), FileLock(path, timeout=0):
            return None
    except (Timeout, OSError):
        with suppress(OSError):
            return path.read_text() or "another process"
    return None

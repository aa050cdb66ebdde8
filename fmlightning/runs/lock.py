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


def lock(folder: Path) -> None:
    """Lock a run directory until `unlock`, or until the process has ended.

    Raises:
        ValueError: a process that is alive has locked it, or nothing can be written there.
    """
    path = lock_file(folder)
    file_lock = FileLock(path, timeout=1)  # another may be reading who the owner is
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):
            file_lock.acquire()
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            HELD.append(file_lock)
    except Timeout as error:
        raise ValueError(
            f"{folder} is being trained by {owner(folder)}: wait until it has ended, or stop it"
        ) from error
    except OSError as error:
        raise ValueError(
            f"run_dir={folder} cannot be written ({error.strerror}): name another directory with --run_dir, or another "
            "root with $FMLIGHTNING_RUNS"
        ) from error


def unlock() -> None:
    """Release all locks of this process."""
    while HELD:
        HELD.pop().release()


def owner(folder: Path) -> str | None:
    """The process that trains in a run directory, in words, or None; writes nothing."""
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

"""Files and folders that take their name when they are whole, and not before.

A file is written under another name in the same directory, flushed to the disk, and then renamed: at any moment,
and after a crash of the machine too, its name stands for the old file or the new one.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def unfinished(path: Path) -> Path:
    """A name beside a path for what is being written, which no other process on any machine uses."""
    return path.with_name(f".{path.name}.{token_hex(4)}.tmp")


def is_unfinished(path: Path) -> bool:
    """True for a file that was left by a write which was killed."""
    named = UNFINISHED.fullmatch(path.name)
    return bool(named) and path.is_file() and not path.is_symlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A new file, for writing and reading, that takes its name when it is whole and on the disk.

    Raises:
        OSError: it could not be written; what had the name has it still.
    """
    temporary = unfinished(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_directory(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes its name when all that is in it is written; the name is free, or an empty folder's."""
    temporary = unfinished(path)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, and the directory it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def flush_directory(folder: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_unfinished(folder: Path) -> None:
    """Remove files that writes left which were killed."""
    for path in folder.glob(".*.tmp"):
        if is_unfinished(path):
            path.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Give the error of a write the name of its file and a way on.

    Raises:
        OSError: the error of the disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns an error of the disk into a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            f"{path} could not be written: {cause.strerror}. The checkpoints before it are whole: make room, "
            "then go on with the same command and --ckpt_path auto"
        ) from error

r"""Files that are whole or not there, and that prove it.

A checkpoint is a zip archive. Its checksum is in the place that zip archives have for a comment, at the end, so
that every reader of such archives, torch.load among them, finds the file as it always was:

    file = archive | "fmlightning step=00001000 sha256=" | digest,    digest = SHA-256 of all bytes before it    (1)

A file is written under another name in the same directory, flushed to the disk, and then renamed: at any moment,
and after a crash of the machine too, its name stands for the old file or the new one.

Source: the comment is that of the end record of PKWARE's APPNOTE.TXT 6.3, section 4.3.16.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LABEL = "fmlightning step={:08d} sha256="
SEAL = re.compile(rb"fmlightning step=(\d{8,}) sha256=([0-9a-f]{64})\Z")
DIGEST, TAIL = 64, 128
"""Length of the digest, and more than that of the longest seal."""


# -- writing ----------------------------------------------------------------------------------------


@contextmanager
def put_in_place(path: Path) -> Iterator[BinaryIO]:
    """A new file, for writing and reading, that takes its name when it is whole and on the disk.

    Raises:
        OSError: it could not be written; what had the name has it still.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the error of a write the name of its file and a way on.

    Raises:
        OSError: what the disk said.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save turns what the disk says into a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            f"{path} could not be written: {cause.strerror}. The checkpoints before it are whole: make room, "
            "then go on with the same command and --ckpt_path auto"
        ) from error


def flush_directory(folder: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_unfinished(folder: Path) -> None:
    """Remove what writes that were killed have left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def seal(file: BinaryIO, step: int) -> None:
    """Append (1) to an archive that has just been written."""
    label = LABEL.format(step).encode()
    file.seek(-2, os.SEEK_END)  # the end record ends with the length of the comment
    file.write((len(label) + DIGEST).to_bytes(2, "little") + label)
    digest = digest_of(file, file.tell())
    file.write(digest.encode())


def seal_file(path: str | Path, step: int = 0) -> None:
    """Give a checkpoint of plain Lightning its checksum: from here on, any change is seen.

    Raises:
        ValueError: it is not whole, as far as its archive tells, or has a checksum.
    """
    path = Path(path)
    content = path.read_bytes()
    if SEAL.search(content[-TAIL:]):
        raise ValueError(f"{path} has a checksum already")
    require_archive(path)
    with put_in_place(path) as file:
        file.write(content)
        seal(file, step)


# -- reading ----------------------------------------------------------------------------------------


def sealed_step(path: Path) -> int | None:
    """The step of a checkpoint, from the end of the file alone; None where there is no seal."""
    with path.open("rb") as file:
        found = SEAL.search(tail(file))
    return int(found[1]) if found else None


def tail(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    return file.read()


def require_whole(path: Path) -> None:
    """Refuse a checkpoint that is torn or altered.

    Raises:
        ValueError: a byte is not what was written, or there is no checksum to tell.
    """
    with path.open("rb") as file:
        require_sealed(file, path)


def require_sealed(file: BinaryIO, path: Path) -> None:
    """As `require_whole`, for an open file, which is left at its start."""
    found = SEAL.search(tail(file))
    if found is None:
        require_archive(path)
        raise ValueError(
            f"{path} is damaged, or fmlightning did not write it: it has no checksum. To take it as it is: "
            f"python -c \"from fmlightning.runs.checksum import seal_file; seal_file('{path}')\""
        )
    if digest_of(file, file.tell() - DIGEST).encode() != found[2]:
        raise ValueError(f"{path} is damaged: its content does not match the checksum in it")
    file.seek(0)


def digest_of(file: BinaryIO, size: int) -> str:
    """The digest of a file's first bytes; the file is left behind them."""
    file.seek(0)
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def require_archive(path: Path) -> None:
    """Refuse what is no zip archive, or one with a part that does not match its own small checksum.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint: {error}") from error
    if broken:
        raise ValueError(f"{path} is damaged: {broken} in it does not match its checksum")

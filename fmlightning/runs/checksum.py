r"""Checkpoints that prove that they are whole.

A checkpoint is a zip archive. Its checksum is in the place that zip archives have for a comment, at the end, so
that every reader of such archives, torch.load among them, finds the file as it always was:

    file = archive | "fmlightning step=00001000 sha256=" | digest,    digest = SHA-256 of all bytes before it    (1)

Source: the comment is that of the end record of PKWARE's APPNOTE.TXT 6.3, section 4.3.16.
"""

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

LABEL = "fmlightning step={:08d} sha256="
CHECKSUM = re.compile(rb"fmlightning step=(\d{8,}) sha256=([0-9a-f]{64})\Z")
DIGEST, TAIL = 64, 128
"""Length of the digest, and more than that of the longest label with its digest."""


def append_checksum(file: BinaryIO, step: int) -> None:
    """Append (1) to an archive that has just been written."""
    label = LABEL.format(step).encode()
    file.seek(-2, os.SEEK_END)  # the end record ends with the length of the comment
    file.write((len(label) + DIGEST).to_bytes(2, "little") + label)
    digest = digest_of(file, file.tell())
    file.write(digest.encode())


def recorded_step(path: Path) -> int | None:
    """The step of a checkpoint, from the end of the file alone; None where there is no checksum."""
    with path.open("rb") as file:
        found = CHECKSUM.search(tail(file))
    return int(found[1]) if found else None


def recorded_digest(path: Path) -> str:
    """The digest of a checkpoint, from the end of the file alone: another checkpoint has another."""
    with path.open("rb") as file:
        return tail(file)[-DIGEST:].decode(errors="replace")


def tail(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    return file.read()


def require_intact(path: Path) -> None:
    """Refuse a checkpoint that is corrupt or altered.

    Raises:
        ValueError: a byte is not what was written, or there is no checksum.
    """
    with path.open("rb") as file:
        verify_checksum(file, path)


def verify_checksum(file: BinaryIO, path: Path) -> None:
    """Check as `require_intact` an open file, which is left at its start."""
    found = CHECKSUM.search(tail(file))
    if found is None:
        require_archive(path)
        raise ValueError(
            f"{path} is damaged, or fmlightning did not write it: it has no checksum. Name another checkpoint of its "
            "run, or train it again"
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
    """Refuse a file that is no zip archive, or has a part that does not match its own small checksum.

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

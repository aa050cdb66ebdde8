"""Published data sets: their folders, their download, and the errors where they are missing.

Nothing is fetched unless a config asks for it, and nothing is unpickled whose published checksum has not been verified.
"""

import os
import socket
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

VARIABLE = "FMLIGHTNING_DATA"
TIMEOUT = 60.0


def data_root(root: str | None) -> Path:
    """The folder named, or $FMLIGHTNING_DATA, or `data` in the current directory."""
    return Path(root or os.environ.get(VARIABLE) or "data").expanduser()


def absent(title: str, files: Sequence[Path], remedy: str) -> FileNotFoundError:
    """An error that names the missing files, the remedy, and the option for another folder."""
    names = ", ".join(path.name for path in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return FileNotFoundError(
        f"{title} is not in {files[0].parent}: there is no {names}{more}. {remedy}. If it is elsewhere, data.root or "
        f"${VARIABLE} says where"
    )


def verify(title: str, files: Sequence[tuple[Path, str]]) -> None:
    """Hold files against their published md5.

    Raises:
        ValueError: one is not what was published. Of a pickle, reading it could run its code.
    """
    from torchvision.datasets.utils import check_integrity

    for path, published in files:
        if not check_integrity(path, published):
            raise ValueError(
                f"{path} is not the published file of {title}, whose md5 is {published}. It was not read; remove it "
                "and fetch it again"
            )


def fetch(
    title: str, root: Path, download: Callable[[], object], sources: str, target: Path
) -> None:
    """Let torchvision download and unpack, one process at a time.

    Raises:
        ConnectionError: it could not be fetched, or what came is not what was published.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(
            TIMEOUT
        )  # torchvision itself waits for a silent server without end
        try:
            download()
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise ConnectionError(
                f"data.download=true: {title} could not be fetched ({' '.join(str(error).split())}). Fetch it by hand "
                f"from {sources} and put it into {target}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)

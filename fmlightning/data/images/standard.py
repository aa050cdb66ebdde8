"""The small published sets, held whole: MNIST, Fashion-MNIST, CIFAR-10 and -100, SVHN.

They lie where torchvision puts them: `MNIST/raw`, `FashionMNIST/raw`, `cifar-10-batches-py`, `cifar-100-python` and
`svhn` below the root, and torchvision downloads them if asked to.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmlightning.data.images.base import ImageData, Splits
from fmlightning.data.images.datasets import ImageDataset, InMemoryImages
from fmlightning.data.images.download import absent, data_root, fetch, verify

DIGITS = tuple("0123456789")
ASK = "or set data.download=true"


class MNISTData(ImageData):
    """70,000 handwritten digits of 28 x 28 pixels, in ten classes; 60,000 are for training.

    Source: LeCun et al. 1998, http://yann.lecun.com/exdb/mnist/

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        download: whether to fetch what is not there.
        image_size: 28, or 32 with a black border of two pixels.
        **options: those of ImageData.
    """

    title = "MNIST"

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        image_size: Literal[28, 32] = 28,
        **options: Any,
    ) -> None:
        sets = idx_sets("MNIST", data_root(root), download, image_size)
        super().__init__(Splits(sets, DIGITS), **options)


class FashionMNISTData(ImageData):
    """70,000 images of clothes of 28 x 28 pixels, in ten classes; 60,000 are for training.

    Source: Xiao et al. 2017, arXiv:1708.07747.

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        download: whether to fetch what is not there.
        image_size: 28, or 32 with a black border of two pixels.
        **options: those of ImageData.
    """

    title = "Fashion-MNIST"

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        image_size: Literal[28, 32] = 28,
        **options: Any,
    ) -> None:
        from torchvision.datasets import FashionMNIST

        sets = idx_sets("FashionMNIST", data_root(root), download, image_size)
        super().__init__(Splits(sets, tuple(FashionMNIST.classes)), **options)


class CIFAR10Data(ImageData):
    """60,000 colour images of 32 x 32 pixels, in ten classes; 50,000 are for training.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        download: whether to fetch what is not there.
        **options: those of ImageData.
    """

    title = "CIFAR-10"

    def __init__(self, root: str | None = None, download: bool = False, **options: Any) -> None:
        super().__init__(cifar("CIFAR10", self.title, data_root(root), download), **options)


class CIFAR100Data(ImageData):
    """60,000 colour images of 32 x 32 pixels, in a hundred classes; 50,000 are for training.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        download: whether to fetch what is not there.
        **options: those of ImageData.
    """

    title = "CIFAR-100"

    def __init__(self, root: str | None = None, download: bool = False, **options: Any) -> None:
        super().__init__(cifar("CIFAR100", self.title, data_root(root), download), **options)


class SVHNData(ImageData):
    """99,289 house numbers, cut to colour images of 32 x 32 pixels; 73,257 are for training.

    Source: Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        download: whether to fetch what is not there.
        extra: whether to train on the 531,131 easier images as well.
        **options: those of ImageData.
    """

    title = "SVHN"

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        extra: bool = False,
        **options: Any,
    ) -> None:
        folder = data_root(root) / "svhn"
        train = [svhn(folder, part, download) for part in ("train", *(["extra"] if extra else []))]
        pixels, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        sets: dict[str, ImageDataset] = {
            "train": InMemoryImages(pixels, labels),
            "test": InMemoryImages(*svhn(folder, "test", download)),
        }
        super().__init__(Splits(sets, DIGITS), **options)


# -- the published formats --------------------------------------------------------------------------


def idx_sets(kind: str, root: Path, download: bool, image_size: int) -> dict[str, ImageDataset]:
    """Both parts of MNIST or a set in its format."""
    from torchvision import datasets

    published = getattr(datasets, kind)
    folder, sources = root / kind / "raw", " or ".join(published.mirrors)
    names = [Path(name).stem for name, _ in published.resources]
    if download and not all(idx_file(folder / name) for name in names):
        fetch(kind, root, lambda: published(root, download=True), sources, folder)
    missing = [folder / name for name in names if idx_file(folder / name) is None]
    if missing:
        raise absent(kind, missing, f"Put the files of {sources} there, {ASK}")
    border = (image_size - 28) // 2
    sets: dict[str, ImageDataset] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = read_idx(folder / f"{prefix}-images-idx3-ubyte", (28, 28))
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", ())
        if len(pixels) != len(labels):
            raise ValueError(
                f"{folder}: {len(pixels)} images and {len(labels)} labels for {split}; fetch the files again"
            )
        sets[split] = InMemoryImages(F.pad(pixels[:, None], [border] * 4), labels.long())
    return sets


def idx_file(path: Path) -> Path | None:
    """A file or its compressed form."""
    found = [p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()]
    return found[0] if found else None


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Bytes in the idx format: two zeros, type 8, the number of axes, their lengths, the values.

    Raises:
        ValueError: the file is not of this format, not of this shape, cut short, or empty.
    """
    file = idx_file(path)
    assert file is not None
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged ({error}); fetch it again") from error
    axes = len(shape) + 1
    header = 4 * (axes + 1)
    sizes = tuple(int(n) for n in np.frombuffer(data[4:header], ">u4"))
    whole = len(sizes) == axes and len(data) == header + math.prod(sizes)
    if data[:4] != bytes((0, 0, 8, axes)) or not whole or sizes[1:] != shape:
        raise ValueError(
            f"{file} is no idx file of bytes of shape {('N', *shape)}, or is cut short; fetch it again"
        )
    if not sizes[0]:
        raise ValueError(
            f"{file} holds nothing: its header says 0 of shape {shape}; fetch it again"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).reshape(sizes)


def cifar(kind: str, title: str, root: Path, download: bool) -> Splits:
    """Both parts of CIFAR and its classes, read by torchvision once their checksums are verified."""
    from torchvision import datasets

    published = getattr(datasets, kind)
    folder = root / published.base_folder
    meta = published.meta
    listed = [
        *published.train_list,
        *published.test_list,
        (meta["filename"], meta["md5"]),
    ]
    files = [(folder / name, md5) for name, md5 in listed]
    missing = [path for path, _ in files if not path.is_file()]
    if missing and download:
        fetch(title, root, lambda: published(root, download=True), published.url, root)
    elif missing:
        raise absent(title, missing, f"Unpack {published.url} in {root}, {ASK}")
    verify(title, files)
    parts = {split: published(root, train=split == "train") for split in ("train", "test")}
    sets: dict[str, ImageDataset] = {
        split: InMemoryImages(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for split, part in parts.items()
    }  # fmt: skip
    return Splits(sets, tuple(parts["train"].classes))


def svhn(folder: Path, part: str, download: bool) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a part of SVHN, read by torchvision, which numbers the digit 0 as 0."""
    from torchvision.datasets import SVHN

    url, name, md5 = SVHN.split_list[part]
    if not (folder / name).is_file():
        if not download:
            raise absent(SVHNData.title, [folder / name], f"Put {url} there, {ASK}")
        fetch(SVHNData.title, folder, lambda: SVHN(folder, part, download=True), url, folder)
    verify(SVHNData.title, [(folder / name, md5)])
    data = SVHN(folder, part)
    return torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels)

"""ImageNet: its image folders, streamed by workers, or the published small version, held whole."""

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmlightning.data.images.base import ImageData, LoaderOptions, OnCorrupt, Splits
from fmlightning.data.images.datasets import ImageDataset, InMemoryImages, shuffled
from fmlightning.data.images.decode import Background, Decoder
from fmlightning.data.images.download import absent, data_root
from fmlightning.data.images.folders import image_files, subfolders

PAGE = "https://image-net.org/download-images (an account is needed)"


class ImageNetData(ImageData):
    """1,281,167 images of a thousand classes for training, and 50,000 for testing.

    `layout: folder` reads `imagenet/train/<class>/*.JPEG` and `imagenet/val/<class>/*.JPEG`, as torchvision lays them
    out, with its order of classes; they are cropped at the centre and shrunk. `layout: npz` reads the published
    versions of 32 and 64 pixels, `imagenet/train_data_batch_1.npz` to `_10.npz` and `imagenet/val_data.npz`, which
    were shrunk with a box filter and number the classes in another order. They are held whole: 4 and 16 GB.

    Source: Deng et al. 2009; npz: Chrabaszcz et al. 2017, arXiv:1707.08819.

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        image_size: side of the images.
        layout: which files to read.
        background: black or white, the colour that transparent pixels are put on; null refuses such images.
        on_corrupt: `fail` stops at a file that is no image and names it; `skip` names it, and takes the next good
            image of the epoch's order in its place.
        num_workers: processes that read ahead; the batches do not depend on it. 0 reads in the training process.
        **options: those of ImageData.
    """

    title = "ImageNet"

    def __init__(
        self,
        root: str | None = None,
        image_size: Literal[32, 64, 128, 256] = 64,
        layout: Literal["folder", "npz"] = "folder",
        background: Background | None = None,
        on_corrupt: OnCorrupt = "fail",
        num_workers: int = 8,
        **options: Any,
    ) -> None:
        folder = data_root(root) / "imagenet"
        sets, names = (
            npz_sets(folder, image_size)
            if layout == "npz"
            else imagenet_folders(folder, Decoder(image_size, background=background))
        )
        super().__init__(Splits(sets, names, LoaderOptions(on_corrupt, num_workers)), **options)


def imagenet_folders(
    folder: Path, decoder: Decoder
) -> tuple[dict[str, ImageDataset], tuple[str, ...]]:
    missing = [folder / part for part in ("train", "val") if not (folder / part).is_dir()]
    if missing:
        raise absent(ImageNetData.title, missing, f"Fetch it from {PAGE} and put it there")
    names = subfolders(folder / "train")
    sets: dict[str, ImageDataset] = {
        split: image_files(
            folder / part, names, decoder, labelled=True, all_classes=split == "train"
        )
        for split, part in (("train", "train"), ("test", "val"))
    }
    return {**sets, "test": shuffled(sets["test"])}, names


def npz_sets(folder: Path, image_size: int) -> tuple[dict[str, ImageDataset], tuple[str, ...]]:
    if image_size not in (32, 64):
        raise ValueError(
            f"data.image_size={image_size}: layout=npz is published at 32 and 64 pixels; take layout=folder"
        )
    train = [folder / f"train_data_batch_{n}.npz" for n in range(1, 11)]
    test = folder / "val_data.npz"
    missing = [path for path in (*train, test) if not path.is_file()]
    if missing:
        raise absent(ImageNetData.title, missing, f"Fetch it from {PAGE} and put it there")
    parts = [read_npz(path, image_size) for path in train]
    pixels, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    sets: dict[str, ImageDataset] = {
        "train": InMemoryImages(pixels, labels),
        "test": InMemoryImages(*read_npz(test, image_size)),
    }
    return sets, tuple(str(n) for n in range(1, 1001))


def read_npz(path: Path, image_size: int) -> tuple[Tensor, Tensor]:
    """Rows of all red, then all green, then all blue bytes, and labels from 1.

    Raises:
        ValueError: the file is damaged, holds pickled objects, or is of another size.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data, labels = file["data"], file["labels"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not the published file ({error}); fetch it again") from error
    expected = 3 * image_size**2
    if data.dtype != np.uint8 or data.shape != (len(labels), expected):
        raise ValueError(
            f"{path}: {data.dtype} of shape {data.shape} is not N rows of {expected} bytes, as images of "
            f"data.image_size={image_size} are"
        )
    return torch.from_numpy(data).reshape(-1, 3, image_size, image_size), torch.from_numpy(
        labels.astype(np.int64) - 1
    )

"""Any folder of images, streamed by workers."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fmlightning.data.images.base import ImageData, LoaderOptions, OnCorrupt, Splits
from fmlightning.data.images.datasets import ImageDataset, ImageFiles, hold_out, shuffled, spread
from fmlightning.data.images.decode import SUFFIXES, Background, Decoder, file_size

PROBES = 16
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Names of the folders of a split, in any case."""


class FolderData(ImageData):
    """The images below a folder, cropped at the centre and shrunk to one size.

    A folder with a subfolder `train` (or `training`) and perhaps `val` (`valid`, `validation`, `dev`) and `test`
    (`testing`), in any case, holds these splits; with only one of the last two, that one is for testing. Of a folder
    without such names `test_size` images are held out. With labels, each class is a folder of its own in its split, as
    for torchvision's ImageFolder; without, any depth will do.

    Args:
        folder: where the images are.
        image_size: side of the images.
        channels: 3 for colour, 1 for grey.
        crop: side of the central square that is cut out before shrinking; null for the largest.
        background: black or white, the colour that transparent pixels are put on; null refuses such images.
        test_size: images held out for testing where the folder has no split for it, the same for every seed.
        has_splits: whether subfolders are splits, and others than these are left out; false takes them for classes,
            and null asks where their names leave that open.
        on_corrupt: `fail` stops at a file that is no image and names it; `skip` names it, and takes the next good
            image of the epoch's order in its place.
        num_workers: processes that read ahead; the batches do not depend on it. 0 reads in the training process.
        in_memory: whether to read all images at the start and hold them as bytes.
        labelled: whether the folders are classes.
        **options: those of ImageData.
    """

    title = "a folder"

    def __init__(
        self,
        folder: str,
        image_size: int = 64,
        channels: int = 3,
        crop: int | None = None,
        background: Background | None = None,
        test_size: int = 500,
        has_splits: bool | None = None,
        on_corrupt: OnCorrupt = "fail",
        num_workers: int = 2,
        in_memory: bool = False,
        labelled: bool = False,
        **options: Any,
    ) -> None:
        self.title = folder
        decoder = Decoder(image_size, channels, crop, background)
        place = Path(folder).expanduser()
        sets, names = folder_sets(place, decoder, labelled, test_size, has_splits)
        reading = LoaderOptions(on_corrupt, num_workers, in_memory)
        super().__init__(Splits(sets, names, reading), labelled=labelled, **options)


def folder_sets(
    folder: Path, decoder: Decoder, labelled: bool, test_size: int, has_splits: bool | None
) -> tuple[dict[str, ImageDataset], tuple[str, ...]]:
    """The splits of a folder and its classes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder={folder}: no such folder")
    parts = {} if has_splits is False else split_folders(folder, has_splits)
    if not parts:
        names = subfolders(folder) if labelled else ()
        everything = image_files(folder, names, decoder, labelled)
        train, test = hold_out(everything, test_size, "test_size")
        return {"train": train, "test": shuffled(test)}, names
    names = subfolders(folder / parts["train"]) if labelled else ()
    sets: dict[str, ImageDataset] = {
        split: image_files(folder / part, names, decoder, labelled, split == "train")
        for split, part in sorted(parts.items())
    }
    if "test" not in sets:
        if "val" in sets:
            sets["test"] = sets.pop("val")
        else:
            sets["train"], sets["test"] = hold_out(sets["train"], test_size, "test_size")
    return {k: v if k == "train" else shuffled(v) for k, v in sets.items()}, names


def split_folders(folder: Path, required: bool | None) -> dict[str, str]:
    """The subfolder of each split; none where no name is that of a split.

    Raises:
        ValueError: their names leave open what they are, or there is none for training.
    """
    names = subfolders(folder)
    found = [(split, n) for split, known in SPLITS.items() for n in names if n.lower() in known]
    parts, others = dict(found), sorted(set(names) - {name for _, name in found})
    if not found and not required:
        return {}
    if "train" not in parts or len(parts) < len(found) or (others and required is None):
        raise ValueError(
            f"data.folder={folder} has {', '.join(names) or 'no subfolders'}: are these splits or classes? Name splits "
            "train, val and test, each once, with nothing beside them, or set data.has_splits: true leaves others out, "
            "false takes all as classes"
        )
    return parts


def image_files(
    folder: Path,
    names: tuple[str, ...],
    decoder: Decoder,
    labelled: bool,
    all_classes: bool = True,
) -> ImageFiles:
    """The images below a folder in the order of their names, class after class.

    Raises:
        ValueError: there are none, a class has none, or they are all too small.
    """
    if labelled and not names:
        raise ValueError(
            f"data.labelled=true: {folder} has no folders to be classes; put the images of each class into one, or set "
            "data.labelled=false"
        )
    foreign = sorted(set(subfolders(folder)) - set(names)) if labelled else []
    if foreign:
        raise ValueError(f"{folder / foreign[0]} is a class that the training images do not have")
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(names or ("",)):
        found = [f"{name}/{f}" if name else f for f in listed(folder / name)]
        if not found and all_classes:
            raise ValueError(
                f"{folder / name} has no images; they end in {', '.join(SUFFIXES)}, in small letters or capitals"
            )
        files += found
        labels += [number] * len(found)
    if not files:
        raise ValueError(f"{folder} has no images; they end in {', '.join(SUFFIXES)}")
    images = ImageFiles(str(folder), files, torch.tensor(labels) if names else None, decoder)
    check_sizes(images)
    return images


def subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    )


def listed(folder: Path) -> Iterable[str]:
    """The images below a folder, by their paths in it; hidden files are left out."""
    if not folder.is_dir():
        return
    for place, folders, files in sorted(os.walk(folder, followlinks=True)):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.path.relpath(os.path.join(place, file), folder)


def check_sizes(images: ImageFiles) -> None:
    """Refuse to enlarge a whole set; a few small images among larger ones are enlarged."""
    paths = [images.path(n) for n in spread(len(images), PROBES)]
    sizes = {path: size for path in paths if (size := file_size(path))}
    if sizes and max(min(size) for size in sizes.values()) < images.decoder.size:
        path, (width, height) = next(iter(sizes.items()))
        raise ValueError(
            f"data.image_size={images.decoder.size}: the images are smaller, {path} for one is {width} x {height}; "
            f"choose at most {max(min(size) for size in sizes.values())}"
        )

"""CelebA: faces, streamed by workers."""

import sys
from pathlib import Path
from typing import Any

import torch

from fmlightning.data.images.base import ImageData, LoaderOptions, OnCorrupt, Splits
from fmlightning.data.images.datasets import ImageDataset, ImageFiles
from fmlightning.data.images.decode import Decoder
from fmlightning.data.images.download import absent, data_root
from fmlightning.flow.shapes import Labels

PAGE = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (aligned and cropped images)"
PARTITION, ATTRIBUTES, IDENTITIES = (
    "list_eval_partition.txt",
    "list_attr_celeba.txt",
    "identity_CelebA.txt",
)
IMAGES = "img_align_celeba"


class CelebAData(ImageData):
    """202,599 faces of 178 x 218 pixels with their published splits, cropped at the centre and shrunk.

    They lie where torchvision has them: `celeba/img_align_celeba`, `celeba/list_eval_partition.txt`, and for labels
    `celeba/list_attr_celeba.txt` or `celeba/identity_CelebA.txt`.

    Source: Liu et al. 2015, arXiv:1411.7766.

    Args:
        root: folder of the data sets; null is $FMLIGHTNING_DATA or `data`.
        image_size: side of the images.
        crop: side of the central square that is cut out before shrinking; null for all of the width.
        label: what y is: an attribute such as `Smiling` (two classes), `identity`, or null for no labels.
        on_corrupt: `fail` stops at a file that is no image and names it; `skip` names it, and takes the next good
            image of the epoch's order in its place.
        num_workers: processes that read ahead; the batches do not depend on it. 0 reads in the training process.
        in_memory: whether to read all images at the start and hold them as bytes.
        **options: those of ImageData; `labelled=false` hides the labels.
    """

    title = "CelebA"

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 64,
        crop: int | None = 140,
        label: str | None = None,
        on_corrupt: OnCorrupt = "fail",
        num_workers: int = 2,
        in_memory: bool = False,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        folder = data_root(root) / "celeba"
        needed = [PARTITION, *([label_file(label)] if label else []), IMAGES]
        missing = [folder / name for name in needed if not (folder / name).exists()]
        if missing:
            raise absent(self.title, missing, f"Fetch it from {PAGE} and put it there")
        decoder = Decoder(image_size, crop=crop)
        if image_size > (crop or 178):
            raise ValueError(
                f"data.image_size={image_size}: the crop of the faces is {crop or 178} pixels wide; choose at most that"
            )
        sets, names = celeba_sets(folder, decoder, label)
        reading = LoaderOptions(on_corrupt, num_workers, in_memory)
        super().__init__(
            Splits(sets, names, reading), labelled=labelled and label is not None, **options
        )


def label_file(label: str) -> str:
    return IDENTITIES if label == "identity" else ATTRIBUTES


def celeba_sets(
    folder: Path, decoder: Decoder, label: str | None
) -> tuple[dict[str, ImageDataset], tuple[str, ...]]:
    """The published splits, and the classes of a label."""
    rows = table(folder / PARTITION)
    what = "an image and its part: 0 for train, 1 for val, 2 for test"
    part = torch.tensor([whole_number(folder / PARTITION, row, 1, what, range(3)) for row in rows])
    labels, classes = celeba_labels(folder, label, [name for name, *_ in rows])
    everything = ImageFiles(str(folder / IMAGES), [name for name, *_ in rows], labels, decoder)
    sets: dict[str, ImageDataset] = {}
    for number, name in enumerate(("train", "val", "test")):
        index = (part == number).nonzero().flatten()
        if not len(index):
            raise ValueError(f"{folder / PARTITION} has no image in part {number} ({name})")
        sets[name] = everything.subset(index)
    return sets, classes


def celeba_labels(
    folder: Path, label: str | None, names: list[str]
) -> tuple[Labels | None, tuple[str, ...]]:
    """The label of each image and the names of the classes."""
    if label is None:
        return None, ()
    path = folder / label_file(label)
    if label == "identity":
        what, people = "an image and the number of its person, from 1 on", range(1, sys.maxsize)
        values = {row[0]: whole_number(path, row, 1, what, people) - 1 for row in table(path)}
        classes = tuple(str(n + 1) for n in range(max(values.values()) + 1))
    else:
        rows = table(path, skip=2)
        known = path.read_text().splitlines()[1].split()
        if label not in known:
            raise ValueError(f"data.label={label}: CelebA has identity and {', '.join(known)}")
        column = 1 + known.index(label)
        what, signs = f"an image and 1 or -1 for each attribute, such as {label}", range(-1, 2, 2)
        values = {row[0]: whole_number(path, row, column, what, signs) > 0 for row in rows}
        classes = (f"not {label}", label)
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ValueError(f"{path} has no line for {unknown[0]}; fetch it again")
    return torch.tensor([values[name] for name in names], dtype=torch.int64), classes


def whole_number(path: Path, row: list[str], column: int, what: str, known: range) -> int:
    """A number in a line.

    Args:
        what: a line of the published table, in words.
        known: what the number may be.

    Raises:
        ValueError: it is none of these.
    """
    value = row[column] if column < len(row) else ""
    if not (value.removeprefix("-").isdecimal() and int(value) in known):
        raise ValueError(
            f"{path}: the line {' '.join(row)!r} is not that of the published table, which has {what}; fetch it again"
        )
    return int(value)


def table(path: Path, skip: int = 0) -> list[list[str]]:
    """The words of each line.

    Raises:
        ValueError: a line is not as long as the others.
    """
    rows = [line.split() for line in path.read_text().splitlines()[skip:] if line.strip()]
    if not rows or any(len(row) != len(rows[0]) or len(row) < 2 for row in rows):
        raise ValueError(f"{path} is not the published table, or is cut short; fetch it again")
    return rows

"""CelebA: faces, streamed by workers."""

from pathlib import Path
from typing import Any

import torch

from fmlightning.data.images.base import ImageData, LoaderOptions, OnCorrupt, Splits
from fmlightning.data.images.datasets import ImageDataset, ImageFiles
from fmlightning.data.images.decode import Background, Decoder
from fmlightning.data.images.download import absent, data_root, verify
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
        background: black or white, the colour that transparent pixels are put on; null refuses such images.
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
        background: Background | None = None,
        label: str | None = None,
        on_corrupt: OnCorrupt = "fail",
        num_workers: int = 2,
        in_memory: bool = False,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        from torchvision import datasets

        folder = data_root(root) / "celeba"
        needed = [
            PARTITION,
            *([IDENTITIES if label == "identity" else ATTRIBUTES] if label else []),
            IMAGES,
        ]
        missing = [folder / name for name in needed if not (folder / name).exists()]
        if missing:
            raise absent(self.title, missing, f"Fetch it from {PAGE} and put it there")
        published = {name: md5 for _, md5, name in datasets.CelebA.file_list}
        verify(self.title, [(folder / name, published[name]) for name in needed[:-1]])
        decoder = Decoder(image_size, 3, crop, background)
        if image_size > (crop or 178):
            raise ValueError(
                f"data.image_size={image_size}: the crop of the faces is {crop or 178} pixels wide; choose at most that"
            )
        sets, names = celeba_sets(folder, decoder, label)
        reading = LoaderOptions(on_corrupt, num_workers, in_memory)
        super().__init__(
            Splits(sets, names, reading), labelled=labelled and label is not None, **options
        )


def celeba_sets(
    folder: Path, decoder: Decoder, label: str | None
) -> tuple[dict[str, ImageDataset], tuple[str, ...]]:
    """The published splits, and the classes of a label."""
    rows = table(folder / PARTITION)
    part = torch.tensor([int(number) for _, number in rows])
    labels, classes = (None, ()) if label is None else celeba_labels(folder, label)
    everything = ImageFiles(str(folder / IMAGES), [name for name, _ in rows], labels, decoder)
    sets: dict[str, ImageDataset] = {
        name: everything.subset((part == number).nonzero().flatten())
        for number, name in enumerate(("train", "val", "test"))
    }
    return sets, classes


def celeba_labels(folder: Path, label: str) -> tuple[Labels, tuple[str, ...]]:
    """The label of each image, all tables being in one order, and the names of the classes."""
    if label == "identity":
        people = torch.tensor([int(person) for _, person in table(folder / IDENTITIES)])
        return people - 1, tuple(str(n + 1) for n in range(int(people.max())))
    _, known, *rows = table(folder / ATTRIBUTES)
    if label not in known:
        raise ValueError(f"data.label={label}: CelebA has identity and {', '.join(known)}")
    signs = torch.tensor([int(row[1 + known.index(label)]) for row in rows])
    return (signs > 0).long(), (f"not {label}", label)


def table(path: Path) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in path.read_text().splitlines()]

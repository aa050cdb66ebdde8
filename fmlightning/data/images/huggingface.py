"""Image data sets of the Hugging Face Hub, or saved with its `datasets` library, streamed by workers."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmlightning.data.images.base import ImageData, LoaderOptions, OnCorrupt, Splits
from fmlightning.data.images.datasets import (
    PROBES,
    ImageDataset,
    digest,
    hold_out,
    shuffled,
    spread,
)
from fmlightning.data.images.decode import Background, Decoder


class HuggingFaceData(ImageData):
    """The images of a data set of the Hub, cropped at the centre and shrunk.

    It needs `pip install fmlightning[datasets]`. No code of a data set is run.

    Args:
        dataset: its name on the Hub, or a folder that `save_to_disk` wrote.
        subset: which of its configurations, where it has several.
        revision: branch, tag or commit; name a commit to be sure of the same data.
        download: whether to ask the Hub; if not, only what is on this machine is used.
        image_size: side of the images.
        channels: 3 for colour, 1 for grey.
        crop: side of the central square that is cut out before shrinking; null for the largest.
        background: black or white, the colour that transparent pixels are put on; null refuses such images.
        image_column: the column of images; null finds the only one.
        label_column: the column of classes; null finds the only one.
        train_split: its split for training.
        test_split: its split for testing; null holds `test_size` images out.
        test_size: images held out for testing where `test_split` is null, the same for every seed.
        on_corrupt: `fail` stops at a row that is no image and names it; `skip` names it, and takes the next good
            image of the epoch's order in its place.
        num_workers: processes that read ahead; the batches do not depend on it. 0 reads in the training process.
        in_memory: whether to read all images at the start and hold them as bytes.
        labelled: whether batches carry the class y.
        **options: those of ImageData.
    """

    title = "a data set of Hugging Face"

    def __init__(
        self,
        dataset: str,
        subset: str | None = None,
        revision: str | None = None,
        download: bool = False,
        image_size: int = 64,
        channels: int = 3,
        crop: int | None = None,
        background: Background | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str | None = "test",
        test_size: int = 500,
        on_corrupt: OnCorrupt = "fail",
        num_workers: int = 2,
        in_memory: bool = False,
        labelled: bool = False,
        **options: Any,
    ) -> None:
        self.title = dataset
        decoder = Decoder(image_size, channels, crop, background)
        tables = hub_tables(dataset, subset, revision, download)
        names: tuple[str, ...] = ()
        sets: dict[str, ImageDataset] = {}
        for part, split in (("train", train_split), ("test", test_split)):
            if split is None:
                continue
            if split not in tables:
                raise ValueError(
                    f"data.{part}_split={split}: {dataset} has the splits {', '.join(tables)}"
                    + ("; data.test_split=null holds images out" if part == "test" else "")
                )
            table = tables[split]
            column = the_column(table, "image", image_column, dataset)
            label = the_column(table, "label", label_column, dataset) if labelled else None
            names = tuple(table.features[label].names) if label else ()
            sets[part] = HubRows(table, column, label, decoder, f"{dataset} {split}")
        if "test" not in sets:
            sets["train"], sets["test"] = hold_out(sets["train"], test_size, "test_size")
        labels = sets["test"].labels
        if labels is not None and bool((labels.diff() >= 0).all()):
            sets["test"] = shuffled(sets["test"])
        reading = LoaderOptions(on_corrupt, num_workers, in_memory)
        super().__init__(Splits(sets, names, reading), labelled=labelled, **options)


class HubRows(ImageDataset):
    """The rows of a table with a column of encoded images."""

    indexed = ("rows", "labels")

    def __init__(
        self, table: Any, column: str, label: str | None, decoder: Decoder, name: str
    ) -> None:
        from datasets import Image

        # undecoded, so that every file goes through the one decoder
        self.images = table.select_columns([column]).cast_column(column, Image(decode=False))
        self.column, self.decoder, self.name, self.shape = column, decoder, name, decoder.shape
        self.labels = None if label is None else torch.tensor(table[label][:], dtype=torch.int64)
        self.rows = torch.arange(len(table))

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, number: int) -> Tensor:
        row = int(self.rows[number])
        image = self.images[row][self.column] or {}
        encoded = image.get("bytes")
        file = io.BytesIO(encoded) if encoded else image.get("path") or io.BytesIO()
        return self.decoder(file, f"{self.name} row {row}")

    def digest(self) -> str:
        """A digest of the labels, the row numbers and a few images spread over the set."""
        skip = torch.arange(len(self))
        probes = self.read(skip, spread(len(self), PROBES), skip=True)
        return digest(self.rows, self.labels, probes.pixels)


def hub_tables(dataset: str, subset: str | None, revision: str | None, download: bool) -> Any:
    """The splits of a data set.

    Raises:
        ValueError: the library is not there, or the data set is not.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data.class_path=HuggingFaceData needs the library `datasets`: pip install 'fmlightning[datasets]'"
        ) from error
    try:
        if (Path(dataset) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(dataset)
        if (Path(dataset) / "dataset_info.json").is_file():
            return {"train": datasets.load_from_disk(dataset)}
        with hub(download):
            return datasets.load_dataset(dataset, subset, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = (
            "check its name and the network"
            if download
            else "set data.download=true, or name a folder that save_to_disk wrote"
        )
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"data.dataset={dataset} could not be loaded ({cause}); {remedy}"
        ) from error


@contextmanager
def hub(reachable: bool) -> Iterator[None]:
    """With the Hub, or without it as HF_HUB_OFFLINE=1 has it."""
    import datasets.config
    import huggingface_hub.constants as constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def the_column(table: Any, kind: str, named: str | None, dataset: str) -> str:
    """The column of images or of classes, named or the only one.

    Raises:
        ValueError: there is none, there are several, or the one named is of another kind.
    """
    from datasets import ClassLabel, Image

    wanted = Image if kind == "image" else ClassLabel
    known = [name for name, feature in table.features.items() if isinstance(feature, wanted)]
    if named is None and len(known) == 1:
        return known[0]
    if named in known:
        return str(named)
    raise ValueError(
        f"data.{kind}_column={named or 'null'}: {dataset} has these columns of {wanted.__name__}: "
        f"{', '.join(known) or 'none'}" + ("; name one" if len(known) > 1 else "")
    )

"""Data sets of Hugging Face, from tables that its own library writes."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fmlightning.data.images.huggingface import HuggingFaceData
from fmlightning.flow.keys import Key


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fmlightning\[datasets\]'"):
        HuggingFaceData(dataset="somebody/something")


@pytest.fixture
def library(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    return datasets


@pytest.fixture
def table(library, tmp_path):
    """Two splits with a column of images and one of classes, saved by the library."""

    def split(size, seed):
        numbers = torch.randint(0, 256, (size, 16, 16, 3), generator=Key(seed).generator())
        features = library.Features(
            {"picture": library.Image(), "kind": library.ClassLabel(names=["ant", "bee"])}
        )
        rows = {
            "picture": [Image.fromarray(x) for x in numbers.to(torch.uint8).numpy()],
            "kind": [n % 2 for n in range(size)],
        }
        return library.Dataset.from_dict(rows, features)

    saved = library.DatasetDict({"train": split(24, 0), "test": split(6, 1)})
    saved.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def saved_data(path, **options):
    defaults = {"image_size": 16, "batch_size": 6, "num_workers": 0, "labelled": True}
    return HuggingFaceData(dataset=str(path), **{**defaults, **options})


def test_pixels_and_labels_are_those_of_the_library(library, table):
    data = saved_data(table)
    theirs = library.load_from_disk(str(table))
    for split in ("train", "test"):
        assert len(data.sets[split]) == len(theirs[split])
        for number, row in enumerate(theirs[split]):
            ours = data.sets[split].image(number).permute(1, 2, 0)
            assert np.array_equal(ours, np.array(row["picture"]))
            assert int(data.sets[split].labels[number]) == row["kind"]
    assert data.class_names == ("ant", "bee")


def test_workers_and_held_out_rows_give_the_same_batches(table):
    options = {"test_split": None, "test_size": 4, "val_size": 2, "flip": True}
    one, many = (saved_data(table, num_workers=n, **options) for n in (0, 2))
    assert [len(one.sets[s]) for s in ("train", "val", "test")] == [18, 2, 4]
    for step in range(4):
        for name, value in one.train_batch(step, slice(0, 6)).items():
            assert torch.equal(many.train_batch(step, slice(0, 6))[name], value)
    many.teardown("fit")
    assert one.fingerprint == many.fingerprint != saved_data(table).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "validation"}, "test_split=validation: .* has the splits train, test"),
        ({"image_column": "photo"}, "image_column=photo: .* columns of Image: picture"),
        ({"label_column": "picture"}, "label_column=picture: .* columns of ClassLabel: kind"),
        ({"batch_size": 25}, "batch_size=25"),
    ],
    ids=["split", "image column", "label column", "batch"],
)
def test_what_does_not_fit_is_refused(table, options, message):
    with pytest.raises(ValueError, match=message) as error:
        saved_data(table, **options)
    assert "\n" not in str(error.value)


def test_without_download_the_hub_is_not_asked(library, tmp_path, monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(ValueError, match=r"could not be loaded .*set data.download=true"):
        HuggingFaceData(dataset="somebody/something")


def test_images_without_a_label_are_refused_naming_their_split(library, table, tmp_path):
    saved = library.load_from_disk(str(table))
    saved["test"] = saved["test"].map(lambda row: {"kind": -1})
    saved.save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(
        ValueError, match=r"without a label in test, marked -1; set data.labelled=false"
    ):
        saved_data(tmp_path / "unlabelled")

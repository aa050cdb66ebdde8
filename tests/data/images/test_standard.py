"""The small published sets, from files that the test writes in the published layout and torchvision reads too."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets

from fmlightning.data.images.standard import (
    CIFAR10Data,
    CIFAR100Data,
    FashionMNISTData,
    MNISTData,
    SVHNData,
)
from fmlightning.flow.keys import Key

SIZES = {"train": 20, "test": 10}
CLASSES = {"CIFAR10": 10, "CIFAR100": 100}


def random_bytes(*shape, seed=0):
    numbers = torch.randint(0, 256, shape, generator=Key(seed).generator())
    return numbers.to(torch.uint8).numpy()


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(root, kind, compressed=False):
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for prefix, size in (("train", 20), ("t10k", 10)):
        images = random_bytes(size, 28, 28, seed=size)
        labels = (np.arange(size) * 7 % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
            path = folder / f"{prefix}-{name}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(header + values.tobytes()))  # fmt: skip
            else:
                path.write_bytes(header + values.tobytes())
    return folder


def write_cifar(root, kind, monkeypatch):
    """The pickles of CIFAR; their checksums become the published ones."""
    published = getattr(torchvision.datasets, kind)
    folder = root / published.base_folder
    folder.mkdir(parents=True)
    labels = "labels" if kind == "CIFAR10" else "fine_labels"
    lists = {}
    for name, size in (("train_list", 20), ("test_list", 10)):
        lists[name] = []
        for number, (file, _) in enumerate(getattr(published, name)):
            count = size // len(getattr(published, name))
            batch = {
                "data": random_bytes(count, 3072, seed=number + size),
                labels: [7 * (number + k) % CLASSES[kind] for k in range(count)],
            }
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
            lists[name].append([file, md5(folder / file)])
    meta = dict(published.meta)
    names = [f"class {n}" for n in range(CLASSES[kind])]
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}, protocol=2))
    lists["meta"] = {**meta, "md5": md5(folder / meta["filename"])}
    for name, value in lists.items():
        monkeypatch.setattr(published, name, value)
    return folder


def write_svhn(root, monkeypatch, parts=("train", "test")):
    folder = root / "svhn"
    folder.mkdir(parents=True)
    listed = dict(torchvision.datasets.SVHN.split_list)
    for part in parts:
        size = SIZES.get(part, 5)
        labels = (np.arange(size) % 10 + 1).astype(np.uint8)[:, None]  # 10 is the digit 0
        path = folder / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": random_bytes(32, 32, 3, size, seed=size), "y": labels})
        listed[part] = [listed[part][0], path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    return folder


def assert_same(data, theirs, split):
    """Every pixel and label as torchvision's class gives them to its users."""
    ours = data.sets[split]
    assert len(ours) == len(theirs) == SIZES[split]
    for number, (image, label) in enumerate(theirs):
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        assert torch.equal(ours.pixels[number], pixels)
        assert int(ours.labels[number]) == label


@pytest.mark.parametrize(
    ("kind", "data"), [("MNIST", MNISTData), ("FashionMNIST", FashionMNISTData)]
)
def test_idx_files_are_read_as_torchvision_reads_them(tmp_path, kind, data):
    write_idx(tmp_path, kind)
    ours = data(root=str(tmp_path), batch_size=4)
    for split in SIZES:
        theirs = getattr(torchvision.datasets, kind)(tmp_path, train=split == "train")
        assert_same(ours, theirs, split)
    assert (ours.event_shape, ours.num_classes) == ((1, 28, 28), 10)


def test_compressed_idx_files_are_read_too_and_padded_if_asked(tmp_path):
    write_idx(tmp_path / "raw", "MNIST")
    write_idx(tmp_path / "gz", "MNIST", compressed=True)
    raw, packed = (MNISTData(root=str(tmp_path / n), batch_size=4) for n in ("raw", "gz"))
    assert raw.fingerprint == packed.fingerprint
    padded = MNISTData(root=str(tmp_path / "gz"), batch_size=4, image_size=32).sets["test"].pixels
    assert torch.equal(padded[..., 2:30, 2:30], raw.sets["test"].pixels)
    assert padded.long().sum() == raw.sets["test"].pixels.long().sum()  # the border is black


def test_a_damaged_or_empty_idx_file_is_named(tmp_path):
    folder = write_idx(tmp_path, "MNIST", compressed=True)
    images = folder / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for at in (1, 12, len(whole) - 2):  # the magic number, the stream and the checksum
        damaged = bytearray(whole)
        damaged[at] ^= 255
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged .*fetch it"):
            MNISTData(root=str(tmp_path), batch_size=4)
    images.write_bytes(gzip.compress(struct.pack(">IIII", 0x0803, 0, 28, 28)))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz holds nothing: .*fetch it"):
        MNISTData(root=str(tmp_path), batch_size=4)


@pytest.mark.parametrize(("kind", "data"), [("CIFAR10", CIFAR10Data), ("CIFAR100", CIFAR100Data)])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, kind, data):
    write_cifar(tmp_path, kind, monkeypatch)
    ours = data(root=str(tmp_path), batch_size=4)
    for split in SIZES:
        theirs = getattr(torchvision.datasets, kind)(tmp_path, train=split == "train")
        assert_same(ours, theirs, split)
    assert ours.class_names[3] == "class 3"
    assert (ours.event_shape, ours.num_classes) == ((3, 32, 32), CLASSES[kind])


def test_svhn_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    folder = write_svhn(tmp_path, monkeypatch, ("train", "test", "extra"))
    ours = SVHNData(root=str(tmp_path), batch_size=4)
    for split in SIZES:
        assert_same(ours, torchvision.datasets.SVHN(folder, split), split)
    assert int(ours.sets["train"].labels[9]) == 0
    assert len(SVHNData(root=str(tmp_path), batch_size=4, extra=True).sets["train"]) == 25


def test_a_pickle_that_was_not_published_is_never_opened(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, "CIFAR10", monkeypatch)
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return trap.touch, ()

    for name in ("data_batch_3", "batches.meta"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps({"data": Trap()}))
        with pytest.raises(ValueError, match=rf"{name} is not the published file of CIFAR-10"):
            CIFAR10Data(root=str(tmp_path), batch_size=4)
        (folder / name).write_bytes(good)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    ("data", "file", "url"),
    [
        (MNISTData, "MNIST/raw", "yann.lecun.com"),
        (FashionMNISTData, "FashionMNIST/raw", "fashion-mnist"),
        (CIFAR10Data, "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        (CIFAR100Data, "cifar-100-python", "cifar-100-python.tar.gz"),
        (SVHNData, "svhn", "train_32x32.mat"),
    ],
)
def test_what_is_not_there_is_one_error_with_source_and_place(tmp_path, data, file, url):
    with pytest.raises(FileNotFoundError) as error:
        data(root=str(tmp_path))
    message = str(error.value)
    assert str(tmp_path / file) in message
    assert url in message
    assert "data.download=true" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [MNISTData, CIFAR10Data, SVHNData])
def test_without_network_a_download_says_so(tmp_path, monkeypatch, data):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(ConnectionError) as error:
        data(root=str(tmp_path), download=True)
    message = str(error.value)
    assert "could not be fetched" in message
    assert "Name or service not known" in message
    assert "by hand from http" in message
    assert "\n" not in message


def serve(monkeypatch, content):
    """Let every address answer with these bytes."""

    def answer(request, *args, **kwargs):
        body = io.BytesIO(content)
        body.url, body.length = getattr(request, "full_url", request), len(content)
        return body

    monkeypatch.setattr(urllib.request, "urlopen", answer)


def archive(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_a_download_is_checked_unpacked_and_read(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path / "made", "CIFAR10", monkeypatch)
    packed = archive({f"{folder.name}/{p.name}": p.read_bytes() for p in folder.iterdir()})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(packed).hexdigest())
    serve(monkeypatch, packed)
    fetched = CIFAR10Data(root=str(tmp_path / "fetched"), download=True, batch_size=4)
    assert fetched.fingerprint == CIFAR10Data(root=str(tmp_path / "made"), batch_size=4).fingerprint


@pytest.mark.parametrize("published", [False, True], ids=["another file", "even if published"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, published):
    packed = archive({"../../outside": b"x", "cifar-10-batches-py/data_batch_1": b"x"})
    if published:
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(packed).hexdigest())  # fmt: skip
    serve(monkeypatch, packed)
    root = tmp_path / "a" / "b"
    with pytest.raises(ConnectionError, match="could not be fetched"):
        CIFAR10Data(root=str(root), download=True)
    assert not list(tmp_path.rglob("outside"))
    assert published or not list(root.rglob("data_batch_1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "cut short"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "no idx file of bytes"),
        (lambda raw: b"", "no idx file of bytes"),
        (lambda raw: raw[:8] + struct.pack(">2I", 14, 56) + raw[16:], "no idx file of bytes of shape"),
    ],
    ids=["short", "floats", "empty", "size"],
)  # fmt: skip
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    path = write_idx(tmp_path, "MNIST") / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        MNISTData(root=str(tmp_path))
    assert str(path) in str(error.value)


def test_the_place_is_the_option_then_the_environment(tmp_path, monkeypatch):
    write_idx(tmp_path / "here", "MNIST")
    monkeypatch.setenv("FMLIGHTNING_DATA", str(tmp_path / "here"))
    assert len(MNISTData(batch_size=4).sets["train"]) == 20
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MNISTData(root=str(tmp_path / "nowhere"))

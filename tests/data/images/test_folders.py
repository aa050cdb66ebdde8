"""Streamed pictures: folders, CelebA, ImageNet, bad files, workers; from files in the published layouts."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from fmlightning.data.images.celeba import CelebAData
from fmlightning.data.images.decode import BadImage, Decoder, centre_crop
from fmlightning.data.images.folders import FolderData
from fmlightning.data.images.imagenet import ImageNetData
from fmlightning.data.order import Shard
from fmlightning.flow.keys import Key
from fmlightning.flow.pixels import quantise


def random_bytes(*shape, seed=0):
    numbers = torch.randint(0, 256, shape, generator=Key(seed).generator())
    return numbers.to(torch.uint8).numpy()


def write_image(path, size=(16, 16), seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(random_bytes(*shape, seed=seed)).save(path)


def write_folder(root, classes=("ant", "bee"), size=20, side=16):
    """PNGs, which keep every byte; each is of another seed."""
    for label, name in enumerate(classes):
        for number in range(size):
            write_image(root / name / f"{number:03}.png", (side, side), seed=1000 * label + number)
    return root


def folder_data(folder, **options):
    defaults = {"image_size": 16, "test_size": 8, "batch_size": 8, "num_workers": 0}
    return FolderData(folder=str(folder), **{**defaults, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


def stream(data, steps, start=0):
    data.load_state_dict({"step": start})
    batches, seen = data.train_dataloader(), []
    while len(seen) < steps:
        for batch in batches:
            seen.append(batch)
            if len(seen) == steps:
                break
    data.teardown("fit")
    return seen


def assert_equal_batches(some, others):
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name])


# -- from a file to bytes -----------------------------------------------------------------------------


def test_a_square_of_the_right_size_is_not_touched(tmp_path):
    for mode, channels in (("RGB", 3), ("L", 1)):
        path = tmp_path / f"{mode}.png"
        write_image(path, (16, 16), mode=mode)
        pixels = torch.from_numpy(np.atleast_3d(np.array(Image.open(path)))).permute(2, 0, 1)
        assert torch.equal(Decoder(16, channels)(str(path), "x"), pixels)


def test_the_crop_halves_with_a_box_and_takes_the_centre():
    """At a power of two the result is the mean of each block, of the centre of the longer side."""
    image = random_bytes(64, 104, 3)
    ours = np.array(centre_crop(Image.fromarray(image), 16)).astype(float)
    means = image[:, 20:84].reshape(16, 4, 16, 4, 3).mean((1, 3))
    # four passes, two a halving, each rounding halves up
    assert (ours - means).min() >= 0
    assert (ours - means).max() <= 2


def test_shrinking_is_antialiased():
    """Stripes of one pixel, which a resize that only picks pixels would keep or turn into wider ones."""
    stripes = np.zeros((24, 24, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = np.array(centre_crop(Image.fromarray(stripes), 16)).astype(float)
    picked = np.array(Image.fromarray(stripes).resize((16, 16), Image.Resampling.NEAREST))
    assert shrunk.std() < 0.4 * picked.std()


def test_a_central_square_can_be_cut_out_first(tmp_path):
    write_image(tmp_path / "a.png", (30, 40))
    ours = Decoder(8, crop=8)(str(tmp_path / "a.png"), "a")
    assert np.array_equal(ours.permute(1, 2, 0), random_bytes(40, 30, 3)[16:24, 11:19])


@pytest.mark.parametrize(
    ("write", "cause"),
    [
        (lambda p: p.write_bytes(b"no image at all"), "of no known format"),
        (lambda p: p.write_bytes(b""), "of no known format"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "truncated|Truncated"),
        (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n"), "of no known"),
        (lambda p: Image.fromarray(random_bytes(16, 16).astype("uint16") * 256).save(p), "8 bits"),
        (lambda p: p.unlink(), "No such file"),
    ],
    ids=["text", "empty", "truncated", "postscript", "16 bits", "gone"],
)  # fmt: skip
def test_a_file_that_is_no_image_is_named(tmp_path, write, cause):
    path = tmp_path / "broken.png"
    write_image(path)
    write(path)
    with pytest.raises(BadImage, match=cause) as error:
        Decoder(16)(str(path), str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


# -- folders --------------------------------------------------------------------------------------------


def test_classes_and_pixels_are_those_of_torchvision(tmp_path):
    for part in ("train", "val"):
        write_folder(tmp_path / part, ("bee", "ant", "Cat"), size=3 if part == "train" else 1)
    write_image(tmp_path / "train" / "bee" / "deep" / "er" / "x.png", seed=77)
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "bee" / "._001.png").write_bytes(b"left by a Macintosh")
    data = folder_data(tmp_path, labelled=True, batch_size=2)
    theirs = torchvision.datasets.ImageFolder(
        tmp_path / "train", is_valid_file=lambda p: p.endswith(".png") and "._" not in p
    )
    assert data.class_names == tuple(theirs.classes) == ("Cat", "ant", "bee")
    ours = data.sets["train"]
    assert len(ours) == len(theirs) == 10
    for number, (image, label) in enumerate(theirs):
        assert np.array_equal(ours.image(number).permute(1, 2, 0), np.array(image))
        assert int(ours.labels[number]) == label
    assert len(data.sets["test"]) == 3


def test_a_folder_without_splits_holds_out_the_same_images_for_every_seed(folder):
    one, other = (folder_data(folder, seed=s) for s in (0, 1))
    assert [len(one.sets[s]) for s in ("train", "test")] == [32, 8]
    names = {s: set(one.sets[s].names.tolist()) for s in ("train", "test")}
    assert not names["train"] & names["test"]
    assert names["test"] == set(other.sets["test"].names.tolist())
    assert "y" not in one.train_batch(0, slice(0, 8))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_does_not_depend_on_the_number_of_workers(folder, workers):
    options = {"labelled": True, "flip": True, "eval_batch_size": 3}
    alone, many = (folder_data(folder, num_workers=n, **options) for n in (0, workers))
    assert_equal_batches(stream(alone, 11), stream(many, 11))  # two epochs and a half
    assert_equal_batches(list(alone.eval_batches("test")), list(many.eval_batches("test")))


def test_streamed_batches_resume_in_the_middle_of_an_epoch(folder):
    data = folder_data(folder, num_workers=2, flip=True)
    whole = stream(data, 11)
    assert_equal_batches(whole[6:], stream(folder_data(folder, num_workers=1, flip=True), 5, 6))


def test_a_step_may_be_asked_for_out_of_turn(folder):
    one, many = (folder_data(folder, num_workers=n, flip=True) for n in (0, 2))
    rows = slice(0, 8)
    for step in (0, 1, 9, 2, 2):
        assert_equal_batches([many.train_batch(step, rows)], [one.train_batch(step, rows)])
    many.teardown("fit")


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_streamed_batch(folder, world_size):
    data = folder_data(folder, flip=True)
    for step in (0, 5):
        whole = data.train_batch(step, slice(0, 8))["x1"]
        shards = [Shard(r, world_size) for r in range(world_size)]
        parts = [folder_data(folder, flip=True).train_batch(step, s.rows(8))["x1"] for s in shards]
        assert torch.equal(torch.cat(parts), whole)


def test_workers_draw_nothing_from_the_global_generator(folder):
    before = torch.get_rng_state()
    stream(folder_data(folder, num_workers=2, flip=True), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_memory_the_batches_are_the_same(folder):
    options = {"labelled": True, "flip": True, "val_size": 4}
    streamed, kept = (folder_data(folder, in_memory=m, **options) for m in (False, True))
    assert_equal_batches(stream(streamed, 5), stream(kept, 5))
    assert_equal_batches([streamed.eval_samples("val")], [kept.eval_samples("val")])


def test_the_fingerprint_sees_a_file_changed_renamed_or_moved_to_another_class(tmp_path):
    write_folder(tmp_path, size=6)
    options = {"labelled": True, "test_size": 1, "batch_size": 2}
    prints = [folder_data(tmp_path, **options).fingerprint]
    file = sorted((tmp_path / "bee").iterdir())[2]
    write_image(file, seed=5000)
    prints.append(folder_data(tmp_path, **options).fingerprint)
    file.rename(file.with_name("zz.png"))
    prints.append(folder_data(tmp_path, **options).fingerprint)
    file.with_name("zz.png").rename(tmp_path / "ant" / "zz.png")
    prints.append(folder_data(tmp_path, **options).fingerprint)
    assert len(set(prints)) == 4
    assert folder_data(tmp_path, seed=4, **options).fingerprint == prints[-1]


# -- bad files --------------------------------------------------------------------------------------------


def spoil(data, *numbers):
    """Overwrite training images by what is no image."""
    paths = [data.sets["train"].path(n) for n in numbers]
    for path in paths:
        with open(path, "wb") as file:
            file.write(b"no image")
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_stops_the_stream_and_is_named(tmp_path, workers):
    data = folder_data(write_folder(tmp_path), num_workers=workers)
    (path,) = spoil(data, 7)
    with pytest.raises(BadImage) as error:
        stream(data, 4)
    assert str(error.value) == f"{path}: no readable image (of no known format)"
    data.teardown("fit")


@pytest.mark.filterwarnings("ignore:.*so far")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_replaced_by_the_next_good_one_of_the_order(tmp_path, workers):
    options = {"labelled": True, "flip": True, "on_corrupt": "skip"}
    good = folder_data(write_folder(tmp_path), **options)
    permutation = good.order.permutation(0)
    whole = torch.cat([b["x1"] for b in stream(good, 4)])
    # the third, the fifth and sixth, and the last of the order, whose next one is the first
    paths = spoil(good, *permutation[[2, 4, 5, 31]].tolist())
    data = folder_data(tmp_path, num_workers=workers, **options)
    with pytest.warns(UserWarning, match=r"no readable image .*; skipped, 4 so far"):
        batches = stream(data, 4)
    replaced = torch.cat([b["x1"] for b in batches])
    levels, noise = quantise(replaced, 256), ((replaced + 1) * 128).frac()
    for place, source in ((2, 3), (4, 6), (5, 6), (31, 0)):
        same = quantise(whole[source], 256)
        assert torch.equal(levels[place], same) or torch.equal(levels[place], same.flip(-1))
        # its noise is that of the picture it stands for, so two of the same differ; 2**-16 is the rounding
        asked = ((whole[place] + 1) * 128).frac()
        assert torch.allclose(noise[place], asked, rtol=0, atol=2.0**-15)
    kept = [p for p in range(32) if p not in (2, 4, 5, 31)]
    assert torch.equal(replaced[kept], whole[kept])
    labels = torch.cat([b["y"] for b in batches])
    assert labels[4] == labels[6]
    assert data.bad == {f"{p}: no readable image (of no known format)" for p in paths}
    assert_equal_batches(batches[2:], stream(folder_data(tmp_path, **options), 2, start=2))


def test_each_bad_file_is_named_once(tmp_path):
    data = folder_data(write_folder(tmp_path), on_corrupt="skip")
    spoil(data, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stream(data, 9)  # more than two epochs
    assert len(said) == 1


def test_a_folder_of_bad_files_alone_is_an_error(tmp_path):
    data = folder_data(write_folder(tmp_path, size=6), test_size=2, batch_size=2, on_corrupt="skip")
    spoil(data, *range(10))
    with pytest.raises(BadImage, match="none of the 10 files is a readable image"):
        data.train_batch(0, slice(0, 2))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda p: None, {}, "has no images"),
        (lambda p: (p / "a.txt").write_text("x"), {}, "has no images"),
        (lambda p: write_image(p / "a.png"), {"labelled": True}, "no folders to be classes"),
        (lambda p: (write_folder(p, size=2), (p / "cow").mkdir()), {"labelled": True}, "cow has no images"),
        (lambda p: write_folder(p, side=8), {}, r"data.image_size=16: .* 8 x 8; choose at most 8"),
        (lambda p: write_folder(p, size=4), {"test_size": 8}, "test_size=8 must lie between 1 and 7"),
        (lambda p: write_folder(p), {"batch_size": 33}, "batch_size=33 .* 32 training samples"),
        (lambda p: write_folder(p), {"num_workers": -1}, "num_workers=-1"),
        (lambda p: write_folder(p), {"image_size": 0}, "image_size=0"),
        (lambda p: write_folder(p), {"channels": 2}, "channels=2"),
        (lambda p: write_folder(p), {"crop": 0}, "crop=0"),
        (
            lambda p: (write_folder(p / "train"), write_folder(p / "test", ("ant", "cow"))),
            {"labelled": True},
            "test/cow is a class that the training images do not have",
        ),
    ],
    ids=["empty", "no image", "no classes", "empty class", "small", "held out", "batch", "workers", "size", "channels",
         "crop", "foreign class"],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_at_once(tmp_path, make, options, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        folder_data(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        folder_data(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train", "valid"), (12, 6, 6)),
        (("train", "validation", "test"), (12, 4, 6)),
        (("Train", "Test"), (12, 6, 6)),
        (("training", "testing"), (12, 6, 6)),
        (("TRAINING", "dev"), (12, 6, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("labelled", [False, True])
def test_splits_are_known_by_their_usual_names(tmp_path, parts, sizes, labelled):
    for part, size in zip(parts, (6, 2, 3) if len(parts) == 3 else (6, 3), strict=True):
        write_folder(tmp_path / part, size=size)
    data = folder_data(tmp_path, labelled=labelled)
    assert tuple(len(data.sets[name]) for name in ("train", "val", "test")) == sizes
    assert data.class_names == (("ant", "bee") if labelled else ())


@pytest.mark.parametrize(
    "parts",
    [("train", "plane"), ("train", "test", "extra"), ("train", "training"), ("val", "valid"), ("test", "cow")],
    ids=str,
)  # fmt: skip
def test_folders_that_may_be_splits_or_classes_are_asked_about(tmp_path, parts):
    for part in parts:
        write_folder(tmp_path / part, size=10)
    with pytest.raises(ValueError, match=r"splits or classes.* data.has_splits"):
        folder_data(tmp_path)
    everything = folder_data(tmp_path, has_splits=False, labelled=True)
    assert everything.class_names == tuple(sorted(parts))
    if parts[0] == "train" and parts[1] != "training":
        splits = folder_data(tmp_path, has_splits=True)
        assert all(name.startswith(b"ant") for name in splits.sets["train"].names[:5])
        assert len(splits.sets["train"]) == (12 if parts[1] == "plane" else 20)


@pytest.mark.parametrize("split", [True, False])
def test_the_first_held_out_images_are_of_all_classes(tmp_path, split):
    for part in ("train", "test") if split else ("",):
        write_folder(tmp_path / part, ("ant", "bee", "cow"), size=40)
    data = folder_data(tmp_path, labelled=True, test_size=60)
    counts = torch.bincount(data.eval_samples("test")["y"][:30], minlength=3)
    assert counts.min() >= 4  # 10 of each are expected


# -- pixels that are seen -----------------------------------------------------------------------------------


def strokes(mode):
    """A black stroke on nothing, whose hidden colour is black too, or red in a palette."""
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4:8] = 255
    if mode == "P":
        image = Image.fromarray((alpha == 0).astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.info["transparency"] = 1
        return image
    image = Image.new("L" if mode == "LA" else "RGB", (16, 16))
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_pixels_show_the_background_or_are_refused(tmp_path, mode, channels):
    file = str(tmp_path / "a.png")
    strokes(mode).save(file)
    with pytest.raises(BadImage, match=r"a.png: .*transparent pixels; data.background"):
        Decoder(16, channels)(file, file)
    expected = torch.full((channels, 16, 16), 255, dtype=torch.uint8)
    expected[:, 4:8] = 0
    assert torch.equal(Decoder(16, channels, background="white")(file, file), expected)
    assert not Decoder(16, channels, background="black")(file, file).any()


def test_an_opaque_alpha_needs_no_background(tmp_path):
    file, pixels = str(tmp_path / "a.png"), random_bytes(16, 16, 3)
    image = Image.fromarray(pixels)
    image.putalpha(255)
    image.save(file)
    assert np.array_equal(Decoder(16)(file, file).permute(1, 2, 0).numpy(), pixels)


def test_the_background_reaches_the_data_and_its_fingerprint(tmp_path):
    for number in range(20):
        file = tmp_path / f"{number}.png"
        strokes("RGBA").save(file)
    white, black = (folder_data(tmp_path, background=colour) for colour in ("white", "black"))
    assert white.eval_samples("test")["x1"].max() > 0.99 > black.eval_samples("test")["x1"].max()
    assert white.fingerprint != black.fingerprint


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(tmp_path, orientation):
    from PIL import ImageOps

    file, exif = str(tmp_path / "a.png"), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(random_bytes(16, 16, 3)).save(file, exif=exif)
    with Image.open(file) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(Decoder(16)(file, file).permute(1, 2, 0).numpy(), upright)


# -- CelebA -------------------------------------------------------------------------------------------------


ATTRIBUTES = ["Male", "Smiling", "Young"]


def write_celeba(root, monkeypatch):
    """Twelve faces with all the published tables; their checksums become the published ones."""
    folder = root / "celeba"
    names = [f"{n:06}.jpg" for n in range(1, 13)]
    for number, name in enumerate(names):
        write_image(folder / "img_align_celeba" / name, (178, 218), seed=number)
    bits = Key(3).streams(torch.arange(12)).bits(3) & 1
    signs = [[" 1" if b else "-1" for b in row] for row in bits.tolist()]
    tables = {
        "list_eval_partition.txt": [f"{n} {k // 6 + k // 9}" for k, n in enumerate(names)],
        "identity_CelebA.txt": [f"{n} {k % 5 + 1}" for k, n in enumerate(names)],
        "list_attr_celeba.txt": ["12", " ".join(ATTRIBUTES) + " "]
        + [f"{n} {' '.join(s)}" for n, s in zip(names, signs, strict=True)],
        "list_bbox_celeba.txt": ["12", "image_id x_1 y_1 width height"]
        + [f"{n}    95  71 226 313" for n in names],
        "list_landmarks_align_celeba.txt": ["12", "lefteye_x lefteye_y"]
        + [f"{n} 69  109" for n in names],
    }
    listed = []
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n")
        listed.append(("id", hashlib.md5((folder / name).read_bytes()).hexdigest(), name))
    monkeypatch.setattr(torchvision.datasets.CelebA, "file_list", listed)
    return folder


def test_celeba_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    write_celeba(tmp_path, monkeypatch)
    options = {"root": str(tmp_path), "image_size": 178, "crop": None, "batch_size": 2, "num_workers": 0}  # fmt: skip
    smiling = CelebAData(label="Smiling", **options)
    people = CelebAData(label="identity", **options)
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        theirs = torchvision.datasets.CelebA(tmp_path, name, ["attr", "identity"])
        assert len(smiling.sets[split]) == len(theirs) in (6, 3)
        for number, (image, (attributes, person)) in enumerate(theirs):
            ours = smiling.sets[split].image(number).permute(1, 2, 0)
            assert np.array_equal(ours, np.array(image)[20:198])
            assert int(smiling.sets[split].labels[number]) == int(attributes[1])
            assert int(people.sets[split].labels[number]) == int(person) - 1
    assert smiling.class_names == ("not Smiling", "Smiling")
    assert people.num_classes == 5
    assert CelebAData(**{**options, "image_size": 64, "crop": 140}).num_classes == 0


def test_celeba_says_what_is_missing_or_unknown(tmp_path, monkeypatch):
    options = {"root": str(tmp_path), "batch_size": 2}
    with pytest.raises(FileNotFoundError, match=r"mmlab.ie.cuhk.edu.hk.*data.root"):
        CelebAData(**options)
    write_celeba(tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match="label=Bald: CelebA has identity and Male, Smiling, Young"
    ):
        CelebAData(label="Bald", **options)
    with pytest.raises(ValueError, match="image_size=256: the crop of the faces is 140"):
        CelebAData(image_size=256, **options)


@pytest.mark.parametrize(
    ("name", "label"),
    [("list_eval_partition.txt", None), ("identity_CelebA.txt", "identity"), ("list_attr_celeba.txt", "Male")],
)  # fmt: skip
@pytest.mark.parametrize("change", ["a number", "a line"])
def test_a_table_that_is_not_the_published_one_is_named(tmp_path, monkeypatch, name, label, change):
    table = write_celeba(tmp_path, monkeypatch) / name
    text = table.read_text()
    table.write_text(
        f"{text[:-2]}7\n" if change == "a number" else "\n".join(text.splitlines()[:-1])
    )
    with pytest.raises(
        ValueError, match=f"{name} is not the published file of CelebA, .*fetch it again"
    ):
        CelebAData(root=str(tmp_path), batch_size=2, label=label)


# -- ImageNet ---------------------------------------------------------------------------------------------------


def test_imagenet_folders_are_those_of_torchvision(tmp_path):
    root = tmp_path / "imagenet"
    wnids = ("n02", "n01")
    for part in ("train", "val"):
        for label, wnid in enumerate(wnids):
            for number in range(3):
                name = f"{wnid}_{number}.JPEG"
                seed = 10 * label + number + 100 * (part == "val")
                write_image(root / part / wnid / name, (48, 40), seed=seed)
    torch.save(({"n01": ("ant",), "n02": ("bee",)}, ["n01"]), root / "meta.bin")
    data = ImageNetData(root=str(tmp_path), image_size=32, batch_size=2, num_workers=0)
    for split, part in (("train", "train"), ("test", "val")):
        theirs = torchvision.datasets.ImageNet(root, part)
        assert len(data.sets[split]) == len(theirs) == 6
        in_order = np.argsort(data.sets[split].names)  # held-out images are in a random one
        for number, (image, label) in zip(in_order, theirs, strict=True):
            ours = data.sets[split].image(number).permute(1, 2, 0)
            assert np.array_equal(ours, np.array(centre_crop(image, 32)))
            assert int(data.sets[split].labels[number]) == label
    assert data.class_names == ("n01", "n02")


def write_npz(root, size=32):
    folder = root / "imagenet"
    folder.mkdir(parents=True)
    images = random_bytes(24, size, size, 3)
    rows = images.transpose(0, 3, 1, 2).reshape(24, -1)  # all red bytes, then green, then blue
    labels = np.arange(24) * 43 % 1000 + 1
    for n in range(10):
        part = slice(2 * n, 2 * n + 2)
        np.savez(folder / f"train_data_batch_{n + 1}.npz", data=rows[part], labels=labels[part],
                 mean=rows.mean(0))  # fmt: skip
    np.savez(folder / "val_data.npz", data=rows[20:], labels=labels[20:])
    return folder, images, labels


def test_small_imagenet_is_read_from_its_published_arrays(tmp_path):
    _, images, labels = write_npz(tmp_path)
    data = ImageNetData(root=str(tmp_path), image_size=32, layout="npz", batch_size=4)
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        assert np.array_equal(data.sets[split].pixels.permute(0, 2, 3, 1), images[part])
        assert np.array_equal(data.sets[split].labels, labels[part] - 1)
    assert data.num_classes == 1000


def test_small_imagenet_is_never_unpickled(tmp_path):
    folder, _, labels = write_npz(tmp_path)
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return trap.touch, ()

    for content in ({"data": np.array([Trap()], object), "labels": labels[:1]}, {"labels": labels}):
        np.savez(folder / "val_data.npz", **content)
        with pytest.raises(ValueError, match=r"val_data.npz is not the published file"):
            ImageNetData(root=str(tmp_path), image_size=32, layout="npz")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 64, "layout": "npz"}, r"uint8 of shape \(2, 3072\) .* data.image_size=64"),
        ({"image_size": 128, "layout": "npz"}, "layout=npz is published at 32 and 64"),
    ],
)
def test_small_imagenet_of_another_size_is_refused(tmp_path, options, message):
    write_npz(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageNetData(root=str(tmp_path), **options)


@pytest.mark.parametrize("layout", ["folder", "npz"])
def test_imagenet_that_is_not_there_says_where_it_is(tmp_path, layout):
    with pytest.raises(FileNotFoundError, match=r"imagenet: there is no .*https://image-net.org"):
        ImageNetData(root=str(tmp_path), image_size=32, layout=layout)

"Pictures as they come: depths, channels, palettes, and what is wrong with them."

from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch.nn.functional as F
from examples import examples
from hypothesis import given, strategies as st
from PIL import Image

from dinolab.data.augment import find_augment
from dinolab.core.errors import InputError
from dinolab.data.classes import Classes, look_up, nearest_colour, read_mask
from dinolab.data.images import ImageDataset, check_pairs, count_labels, cut, read_pair, scaled
from dinolab.data.pixels import read_image
from dinolab.data.folders import ImagePair, folder_pairs, list_images
from dinolab.data.tables import table_pairs

TWO = Classes(("a", "b"))


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("kind,channels", [("u1", 1), ("u1", 3), ("u2", 1), ("u2", 3), ("u1", 4)])
def test_read_image_of_any_kind(tmp_path, suffix, kind, channels):
    "As written, by libraries of their own; alpha is dropped."
    if suffix == ".jpg" and (kind == "u2" or channels == 4):
        pytest.skip("there is no such JPEG")
    top = np.iinfo(kind).max
    pixels = np.round(np.linspace(0, top, 12 * 10 * channels)).astype(kind).reshape(12, 10, channels)
    path = tmp_path / f"x{suffix}"
    one = pixels[..., 0] if channels == 1 else pixels
    if suffix == ".tif":
        tifffile.imwrite(path, one, photometric="rgb" if channels > 1 else "minisblack", compression="lzw")
    elif suffix == ".jpg":
        Image.fromarray(one).save(path, quality=100, subsampling=0)
    else:
        path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(one)))
    expected = pixels[..., :3].transpose(2, 0, 1) / top
    got = read_image(path)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() < (0.05 if suffix == ".jpg" else 1e-6)


def test_orientation_of_photographs(tmp_path):
    image = Image.fromarray((rng().random((4, 9, 3)) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png").shape == (3, 9, 4)


@pytest.mark.parametrize(
    "array,message",
    [
        (np.full((4, 4), np.inf, "f4"), "not finite"),
        (np.full((4, 4), -1.0, "f4"), "expected 0 to 1; give white="),
        (np.zeros((3, 4, 5, 3), "u1"), "expected one image"),
    ],
)
def test_wrong_images(tmp_path, array, message):
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="minisblack")
    with pytest.raises(InputError, match=message) as e:
        read_image(tmp_path / "x.tif")
    assert "x.tif" in str(e.value) and "\n" not in str(e.value)


def test_broken_and_missing_files(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n broken file")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("x.png", "empty.png"):
        with pytest.raises(InputError, match="cannot be read"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="no image"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="no image in the folder"):
        list_images((tmp_path / "d").mkdir() or tmp_path / "d")
    with pytest.raises(InputError, match="set in_channels=3"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
        read_image(tmp_path / "rgb.png", 1)


@examples(40)
@given(st.lists(st.integers(0, 254), min_size=1, max_size=6, unique=True), st.integers(0, 99))
def test_values_of_classes(values, seed):
    known = Classes(tuple(f"c{v}" for v in values), tuple(values))
    index = rng(seed).integers(0, len(values), (5, 7))
    hidden = rng(seed + 1).random((5, 7)) < 0.2
    pixels = np.where(hidden, 255, np.array(values)[index])
    got, valid = known.index(pixels)
    assert (valid == ~hidden).all() and (got[valid] == index[valid]).all()


def test_wrong_masks(tmp_path):
    Image.fromarray(np.full((4, 4), 2, np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(
        InputError, match=r"m.png has the value 2 in 16 pixels: expected 0 \(a\), 1 \(b\), or 255"
    ):
        read_mask(tmp_path / "m.png", TWO)
    tifffile.imwrite(tmp_path / "f.tif", np.full((4, 4), 0.5, "f4"))
    with pytest.raises(InputError, match="no integers"):
        read_mask(tmp_path / "f.tif", TWO)
    tifffile.imwrite(tmp_path / "g.tif", np.ones((4, 4), "f4"))
    assert read_mask(tmp_path / "g.tif", TWO)[0].all()
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).save(tmp_path / "b.png")
    assert read_mask(tmp_path / "b.png", Classes(("a", "b"), kind="binary"))[0].tolist() == [[0, 1], [1, 0]]
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "i.png")
    with pytest.raises(InputError, match="is 5 x 4, its mask .* 2 x 2"):
        read_pair(
            ImagePair("x", str(tmp_path / "i.png"), str(tmp_path / "b.png")),
            Classes(("a", "b"), kind="binary"),
        )
    with pytest.raises(InputError, match="x has no mask"):
        read_pair(ImagePair("x", str(tmp_path / "i.png")), TWO)
    Image.fromarray(np.full((5, 4), 255, np.uint8)).save(tmp_path / "void.png")
    with pytest.raises(InputError, match="all pixels of all masks are ignored"):
        count_labels([ImagePair("x", str(tmp_path / "i.png"), str(tmp_path / "void.png"))], TWO)


def pairs(folder, n=3, size=(40, 30)):
    "Images that show their own masks."
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    for i in range(n):
        mask = np.kron(rng(i).integers(0, 2, (size[0] // 5, size[1] // 5)), np.ones((5, 5))).astype(np.uint8)
        Image.fromarray(mask * 255).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    return folder_pairs(folder / "images", folder / "masks")


def test_pairs_and_tables(tmp_path):
    assert [p.name for p in pairs(tmp_path)] == ["0", "1", "2"]
    (tmp_path / "images/1.png").rename(tmp_path / "images/one.png")
    with pytest.raises(InputError, match="1 without mask: one; expected the same names"):
        folder_pairs(tmp_path / "images", tmp_path / "masks")
    (tmp_path / "images/0.tif").write_bytes((tmp_path / "images/0.png").read_bytes())
    with pytest.raises(InputError, match="differ only by the suffix"):
        folder_pairs(tmp_path / "images")
    (tmp_path / "t.csv").write_text("picture,mask\na,b\n")
    with pytest.raises(InputError, match="columns picture, mask: expected image; image is missing"):
        table_pairs(tmp_path / "t.csv")


@examples(30)
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 60), st.integers(1, 60))
def test_cut_against_a_mirrored_plane(y, x, h, w):
    "The same as cutting from a plane that NumPy has mirrored on all sides."
    image, label = (
        rng().random((2, 16, 12)).astype(np.float32),
        rng(1).integers(0, 2, (16, 12)).astype(np.uint8),
    )
    y, x = min(max(y, -h + 1), 15), min(max(x, -w + 1), 11)
    big = np.pad(image, [(0, 0), (80, 80), (80, 80)], "symmetric")
    got, found, valid = cut(image, label, np.ones(label.shape, bool), (h, w), (y, x))
    inside = np.pad(np.ones(label.shape, bool), 80)[80 + y : 80 + y + h, 80 + x : 80 + x + w]
    assert got.shape == (2, h, w) and (valid == inside).all()
    assert (got[:, inside] == big[:, 80 + y : 80 + y + h, 80 + x : 80 + x + w][:, inside]).all()
    assert (found[inside] == np.pad(label, 80)[80 + y : 80 + y + h, 80 + x : 80 + x + w][inside]).all()


def test_crops_follow_from_their_seed(tmp_path):
    data = ImageDataset(pairs(tmp_path), TWO, (24, 32), channels=3, length=7)
    other = ImageDataset(pairs(tmp_path), TWO, (24, 32), channels=3, length=7)
    for i in range(7):
        a, b, c = data.item(i, 5), other.item(i, 5), data.item(i, 6)
        assert (
            all((a[k] == b[k]).all() for k in ("image", "target", "mask"))
            and not (a["image"] == c["image"]).all()
        )
        assert (
            a["image"].shape == (3, 24, 32)
            and a["target"].shape == a["mask"].shape == (24, 32)
            and 0 <= a["image"].min() <= a["image"].max() <= 1
        )


@examples(30)
@given(st.integers(0, 2**31), st.sampled_from([(0.5, 0.6), (1, 1), (1.6, 2)]))
def test_image_and_mask_stay_together(tmp_path_factory, seed, scale):
    folder = test_image_and_mask_stay_together.__dict__.setdefault("folder", tmp_path_factory.mktemp("pairs"))
    item = ImageDataset(
        pairs(folder), TWO, (32, 32), channels=1, augment=find_augment("turns"), scale=scale
    ).item(seed % 3, seed)
    around = F.unfold(F.pad(item["target"][None, None].float(), (1,) * 4, mode="replicate"), 3)[0]
    inner = (around.amin(0) == around.amax(0)).view(32, 32) & item[
        "mask"
    ]  # away from borders, where antialiasing and the nearest pixel differ
    assert inner.any() and ((item["image"][0] > 0.5) == item["target"].bool())[inner].all()


def test_balance_finds_a_rare_class(tmp_path):
    mask = np.zeros((200, 200), np.uint8)
    mask[150:153, 20:23] = 1
    for name, pixels in dict(i=mask * 255, m=mask).items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    picture = [ImagePair("x", str(tmp_path / "i.png"), str(tmp_path / "m.png"))]
    seen = lambda balance: np.mean(
        [
            bool(
                ImageDataset(picture, TWO, (32, 32), channels=1, scale=(1, 1), balance=balance)
                .item(0, s)["target"]
                .any()
            )
            for s in range(60)
        ]
    )
    assert seen(0.0) < 0.15 and 0.3 < seen(1.0) < 0.8  # half of the crops at balance 1


def test_scaled_keeps_borders():
    label = np.zeros((20, 20), np.uint8)
    label[:, 10:] = 1
    image, found, valid = scaled(label[None].astype(np.float32), label, np.ones_like(label, bool), (50, 30))
    assert (
        (found[:, :15] == 0).all()
        and (found[:, 15:] == 1).all()
        and valid.all()
        and np.abs(image[0] - found)[:, [0, 5, 24, 29]].max() < 1e-6
    )


def test_blue_is_no_ignored_value():
    "Pure blue is 255 as a number, which means ignored in masks of numbers only."
    classes = Classes(("a", "b"), colours=("#000000", "#ff0000"))
    with pytest.raises(InputError, match="#0000ff in 1 pixels"):
        classes.index(np.array([[[0, 0, 255]]], np.uint8))


@examples(40)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_nearest_colour_is_the_least_distance(seed, n):
    "Squared distances one by one; the first of equal ones."
    colours = rng(seed).integers(0, 256, (n, 3))
    pixels = rng(seed + 1).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    names = ["#" + bytes(c.tolist()).hex() for c in colours]
    distances = [((pixels.astype(int) - c) ** 2).sum(-1) for c in colours]
    assert (nearest_colour(pixels, names, "mask") == np.argmin(distances, 0)).all()


@examples(60)
@given(
    st.sampled_from(["u1", "u2", "i2", "i8"]),
    st.dictionaries(st.integers(0, 200), st.integers(0, 9), min_size=1, max_size=8),
    st.integers(0, 10**6),
)
def test_look_up_is_a_dictionary(kind, table, seed):
    "Every integer type gives what the dictionary gives, value by value."
    values = rng(seed).choice([*table, 255], (7, 4)).astype(kind)
    index, known = look_up(values, table, tuple("abcdefghij"), 255, "mask")
    assert known.tolist() == [[v in table for v in row] for row in values.tolist()]
    assert index.tolist() == [[table.get(v, 0) for v in row] for row in values.tolist()]
    with pytest.raises(InputError, match="mask has the value 250 in 1 pixels"):
        look_up(np.append(values.ravel(), 250).astype(kind), table, tuple("abcdefghij"), 255, "mask")


def reads(monkeypatch):
    "The masks that are read from now on."
    import dinolab.data.windows as windows

    seen, read = [], windows.read_mask
    monkeypatch.setattr(windows, "read_mask", lambda path, classes: seen.append(path) or read(path, classes))
    return seen


def test_pairs_are_checked_once(tmp_path, monkeypatch):
    some, kept = pairs(tmp_path), tmp_path / "run/checked.json"
    first = count_labels(some, TWO, remember=kept)
    assert (first == [[np.sum(mask(p) == k) for k in (0, 1)] for p in some]).all()
    seen = reads(monkeypatch)
    assert (count_labels(some, TWO, remember=kept) == first).all() and seen == []
    changed = 1 - mask(some[1])
    Image.fromarray(changed).save(some[1].mask)
    again = count_labels(some, TWO, remember=kept)
    assert seen == [some[1].mask] and (again[1] == first[1][::-1]).all()


def mask(pair):
    return np.asarray(Image.open(pair.mask))


@pytest.mark.parametrize(
    "other",
    [
        dict(classes=Classes(("a", "b", "c"))),
        dict(classes=Classes(("a", "b"), (1, 0))),
        dict(classes=Classes(("a", "b"), kind="binary")),
        dict(classes=Classes(("a", "b"), ignore=7)),
        dict(channels=1),
        dict(white=300.0),
    ],
)
def test_what_was_asked_otherwise_is_checked_again(tmp_path, monkeypatch, other):
    some, kept = pairs(tmp_path), tmp_path / "checked.json"
    count_labels(some, TWO, remember=kept)
    seen = reads(monkeypatch)
    asked = dict(classes=TWO) | other
    assert (count_labels(some, **asked, remember=kept) == count_labels(some, **asked)).all()
    assert len(seen) == 2 * len(some)


def test_mistakes_are_not_remembered(tmp_path):
    some, kept = pairs(tmp_path), tmp_path / "checked.json"
    whole = (tmp_path / "images/1.png").read_bytes()
    (tmp_path / "images/1.png").write_bytes(whole[:40])
    (tmp_path / "masks/2.png").unlink()
    found = check_pairs(some, TWO, remember=kept)
    assert [bool(one.problem) for one in found] == [False, True, True]
    assert "cannot be read" in found[1].problem and "no image" in found[2].problem
    with pytest.raises(InputError, match=r"images/1.png cannot be read .* \(and 1 more of 3 pairs\)"):
        count_labels(some, TWO, remember=kept)
    (tmp_path / "images/1.png").write_bytes(whole)
    assert count_labels(some[:2], TWO, remember=kept).shape == (2, 2)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1}', "\x00"])
def test_a_damaged_memory_is_made_anew(tmp_path, content):
    some, kept = pairs(tmp_path), tmp_path / "checked.json"
    kept.write_text(content)
    assert (count_labels(some, TWO, remember=kept) == count_labels(some, TWO)).all()


def test_a_check_that_was_killed_goes_on(tmp_path, monkeypatch):
    import dinolab.data.images as images
    import dinolab.data.windows as windows

    monkeypatch.setattr(images, "AT_ONCE", 1)
    some, kept = pairs(tmp_path), tmp_path / "checked.json"
    read = windows.read_mask

    def stop_at_the_third(path, classes):
        if path == some[2].mask:
            raise KeyboardInterrupt
        return read(path, classes)

    monkeypatch.setattr(windows, "read_mask", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        count_labels(some, TWO, remember=kept)
    monkeypatch.setattr(windows, "read_mask", read)
    seen = reads(monkeypatch)
    count_labels(some, TWO, remember=kept)
    assert seen == [some[2].mask]


def test_a_memory_that_cannot_be_written_stops_nothing(tmp_path):
    some = pairs(tmp_path)
    (tmp_path / "file").write_text("")
    assert count_labels(some, TWO, remember=tmp_path / "file/checked.json").sum() == 3 * 40 * 30


@pytest.mark.parametrize("name", ["length", "channels", "white", "scale", "balance", "memory", "crop"])
@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), "x", True, (0, 1), (1, float("nan")), [1] * 5]
)
def test_wrong_numbers_of_a_dataset(tmp_path, name, value):
    if (name, value) in [("balance", 0), ("memory", 0)]:
        pytest.skip("means none")
    given = dict(crop=(8, 8)) | {name: value}
    with pytest.raises(InputError, match=name) as e:
        ImageDataset([ImagePair("x", "i.png", "m.png")], TWO, **given)
    assert "\n" not in str(e.value)


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text,encoding,said",
    [
        ("image,mask\na.png,a.png\n", "utf-16-le", "is UTF-16 or no text at all"),
        ("image,mask\na.png,a.png\né.png,b.png\n", "latin-1", "line 3: the byte 0xe9 is not UTF-8"),
        ("image,mask\na.png,a.png\nb.png\n", "utf-8", "line 3: got 1 fields, expected 2 .image, mask."),
        ("image,mask\na.png,a.png,train\n", "utf-8", "line 2: got 3 fields, expected 2"),
        ("image,mask\na.png,a.png\n\n\n,b.png\n", "utf-8", "line 5: image is empty"),
        ("image,mask\n  ,b.png\n", "utf-8", "line 2: image is empty"),
        ("image,image\na.png,b.png\n", "utf-8", "the column 'image' twice"),
        ('image,mask\n"a.png,b.png\n', "utf-8", "line 2: unexpected end of data"),
        ('image,mask\n"a"b,c\n', "utf-8", "line 2: .*expected fields separated by commas"),
        ("image,mask\n%s,b\n" % ("x" * 200_000), "utf-8", "line 2: field larger than field limit"),
        ("image,mask\n", "utf-8", "has no rows"),
        ("", "utf-8", "has no rows"),
        ("\n\n", "utf-8", "has no rows"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, encoding, said):
    path = written(tmp_path / "t.csv", text, encoding)
    with pytest.raises(InputError, match=said) as e:
        table_pairs(path)
    assert "\n" not in str(e.value) and "t.csv" in str(e.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_as_spreadsheets_save_them(tmp_path, encoding, end):
    lines = ["image,mask,split", '"a, b/é.png",m/é.png,train', "", "c/2024_01.png,,test"]
    path = written(tmp_path / "t.csv", end.join(lines), encoding)
    pairs = table_pairs(path)
    assert [(p.name, Path(p.image).relative_to(tmp_path).as_posix()) for p in pairs] == [
        ("é", "a, b/é.png"),
        ("2024_01", "c/2024_01.png"),
    ]
    assert pairs[1].mask is None and [p.name for p in table_pairs(path, "test")] == ["2024_01"]


def test_equal_names_in_two_folders_stay_apart(tmp_path):
    path = written(tmp_path / "t.csv", "image\na/1.png\nb/1.png\nb/2.png\n")
    assert [p.name for p in table_pairs(path)] == ["a/1", "b/1", "b/2"]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "x", True, [1], {}])
def test_wrong_numbers_of_reading(tmp_path, value):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "i.png")
    pair = ImagePair("x", str(tmp_path / "i.png"), str(tmp_path / "i.png"))
    calls = dict(
        channels=lambda: read_image(pair.image, channels=value),
        white=lambda: read_image(pair.image, white=value),
        workers=lambda: check_pairs([pair], TWO, workers=value),
        ignore=lambda: Classes(("a", "b"), ignore=value),
    )
    for name, call in calls.items():
        if name == "ignore" and value in (0, -1) and value is not True:
            continue  # labels that mean nothing
        with pytest.raises(InputError, match=f"{name}=") as e:
            call()
        assert "\n" not in str(e.value)


def test_a_training_that_is_queued_again_reads_no_pair_twice(tmp_path, monkeypatch):
    import dinolab.tasks.image_data as tasks

    some = pairs(tmp_path, 4)
    s = SimpleNamespace(out=str(tmp_path / "runs"), in_channels=1, white=None)
    first = tasks.check_training_pairs(s, some, TWO)
    assert len(first) == 4 and not (tmp_path / "runs").exists()  # a few are read again
    monkeypatch.setattr(tasks, "MANY", 4)
    tasks.check_training_pairs(s, some, TWO)
    seen = reads(monkeypatch)
    assert tasks.check_training_pairs(s, some, TWO) == first and seen == []

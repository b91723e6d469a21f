"From folders as people have them to pairs and classes: every habit is read, named, or asked about."

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinolab.core.errors import InputError
from dinolab.data.classes import name_classes, read_mask
from dinolab.data.folders import ImagePair, folder_pairs, images_below, list_images, pair_folders, with_groups
from dinolab.data.masks import understand
from dinolab.data.tables import table_pairs
from dinolab.tasks.common import hold_out_groups
from dinolab.tasks.configs import TrainSegmenter
from dinolab.tasks.image_data import open_images
from dinolab.tasks.recipes import make_settings, recipe_of


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder, images="images", masks="masks"):
    "Pairs as names relative to the folder, and what was left out."
    done = pair_folders(folder / images, None if masks is None else folder / masks)
    short = lambda path: Path(path).relative_to(folder).as_posix()
    left = {why: [short(name) for name in names] for why, names in done.left_out.items()}
    return {short(p.image): short(p.mask) for p in done.pairs}, left


@pytest.mark.parametrize(
    "images,masks",
    [
        (["a.png", "b.png"], ["a.tif", "b.gif"]),
        (["A.JPG", "B.JPEG"], ["A.png", "B.PNG"]),
        (["DSC_1.JPG", "DSC_2.JPG"], ["dsc_1.png", "dsc_2.png"]),
        (["img_001.png", "img_002.png"], ["mask_001.png", "mask_002.png"]),
        (["a.jpg", "b.jpg"], ["a_mask.png", "b_mask.png"]),
        (["a_image.jpg", "b_image.jpg"], ["a-mask.png", "b-mask.png"]),
        (["a.jpg", "b.jpg"], ["a_gt.png", "b_label.png"]),
        (["21_training.tif", "22_training.tif"], ["21_manual1.gif", "22_manual1.gif"]),
        (["Image_01L.jpg", "Image_01R.jpg"], ["Image_01L_1stHO.png", "Image_01R_1stHO.png"]),
        (
            ["aachen/aachen_000000_leftImg8bit.png", "ulm/ulm_000001_leftImg8bit.png"],
            ["aachen/aachen_000000_gtFine_labelIds.png", "ulm/ulm_000001_gtFine_labelIds.png"],
        ),
        (["a/1.png", "b/1.png", "2.png"], ["a/1.png", "b/1.png", "2.png"]),
        (["x/1.png", "x/2.png"], ["y/1.png", "y/2.png"]),
        (["caf\u00e9.png", "a b.png"], ["cafe\u0301.png", "a b.png"]),
        (["1.png", "10.png", "2.png"], ["1.png", "10.png", "2.png"]),
        (["scan.v1.png", "scan.v2.png"], ["scan.v1.png", "scan.v2.png"]),
    ],
)
def test_names_that_belong_together(tmp_path, images, masks):
    touch(tmp_path, *(f"images/{n}" for n in images), *(f"masks/{n}" for n in masks))
    pairs, left = found(tmp_path)
    assert pairs == {f"images/{i}": f"masks/{m}" for i, m in zip(images, masks)} and not left


def test_what_has_no_partner_is_named(tmp_path):
    touch(
        tmp_path, "images/a.png", "images/b.png", "images/c.png", "masks/a.png", "masks/b.png", "masks/d.png"
    )
    touch(tmp_path, "images/._a.png", "images/.hidden.png", "images/Thumbs.db", "images/__MACOSX/a.png")
    pairs, left = found(tmp_path)
    assert len(pairs) == 2
    assert left == {"images without mask": ["images/c.png"], "masks without image": ["masks/d.png"]}
    with pytest.raises(InputError, match="1 without mask: c; expected the same names in"):
        folder_pairs(tmp_path / "images", tmp_path / "masks")


def test_two_masks_of_one_image_are_no_pair(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png", "masks/a_mask.png", "masks/a_gt.png", "masks/b_mask.png")
    pairs, left = found(tmp_path)
    assert pairs == {"images/b.png": "masks/b_mask.png"} and len(left["masks without image"]) == 2
    touch(tmp_path, "images/a.jpg")
    with pytest.raises(InputError, match="differ only by the suffix: a.jpg, a.png"):
        found(tmp_path)


def test_one_folder(tmp_path):
    touch(tmp_path, "s/1.png", "s/1_mask.png", "s/2.png", "s/2_mask.png", "s/unmasked.png")
    pairs, left = found(tmp_path, "s", None)
    assert pairs == {f"s/{i}.png": f"s/{i}_mask.png" for i in (1, 2)}
    assert left == {"images without mask": ["s/unmasked.png"]}
    touch(tmp_path, "d/Images/1.png", "d/Labels/1.png", "p/1.jpg", "p/1.png", "p/2.jpg", "p/2.png")
    assert found(tmp_path, "d", None)[0] == {"d/Images/1.png": "d/Labels/1.png"}
    assert found(tmp_path, "p", None)[0] == {f"p/{i}.jpg": f"p/{i}.png" for i in (1, 2)}
    touch(tmp_path, "w/images/1.png", "w/images/2.png", "w/masks/1.png")
    with pytest.raises(InputError, match="where are the masks. give masks=.*w/masks"):
        found(tmp_path, "w/images", None)


def test_a_folder_inside_the_other(tmp_path):
    touch(tmp_path, "photos/a.jpg", "photos/b.jpg", "photos/masks/a.png", "photos/masks/b.png")
    pairs, left = found(tmp_path, "photos", "photos/masks")
    assert len(pairs) == 2 and not left


def test_loose_images_beside_folders(tmp_path, capsys):
    touch(tmp_path, "a.png", "old/b.png", "old/c.png")
    assert [p.name for p in list_images(tmp_path)] == ["a.png"]
    assert "are not read: old (2)" in capsys.readouterr().out
    assert len(images_below(tmp_path)) == 3
    (tmp_path / "a.png").unlink()
    assert [p.name for p in list_images(tmp_path)] == ["b.png", "c.png"] and not capsys.readouterr().out


def test_a_folder_per_class(tmp_path):
    touch(
        tmp_path,
        "images/a.png",
        "images/b.png",
        "masks/cell/a.png",
        "masks/cell/b.png",
        "masks/nucleus/b.png",
    )
    done = pair_folders(tmp_path / "images", tmp_path / "masks")
    assert done.classes == ("cell", "nucleus") and [p.mask[1] is None for p in done.pairs] == [True, False]


def test_groups(tmp_path):
    touch(tmp_path, *(f"images/{p}/{i}.png" for p in "ab" for i in (1, 2)))
    touch(tmp_path, *(f"masks/{p}/{i}.png" for p in "ab" for i in (1, 2)))
    pairs = pair_folders(tmp_path / "images", tmp_path / "masks").pairs
    assert len({p.group for p in with_groups(pairs, "folder")}) == 2
    assert {p.group for p in with_groups(pairs, "^(a|b)/")} == {"a", "b"}
    for wrong in ("[", "^c"):
        with pytest.raises(InputError, match="group="):
            with_groups(pairs, wrong)


@pytest.mark.parametrize("between", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets(tmp_path, between, encoding):
    lines = [["Image", " mask", "group"], ["é.png", "m/1.png", "p1"], [" b.png ", "", "p2"], ["", "", ""]]
    text = "\r\n".join(between.join(line) for line in lines)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    pairs = table_pairs(tmp_path / "t.csv")
    assert [(p.name, p.group) for p in pairs] == [("é", "p1"), ("b", "p2")]
    assert pairs[0].mask == str(tmp_path / "m/1.png") and pairs[1].mask is None


def test_a_workbook_is_no_table(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(InputError, match="is a workbook: expected text"):
        table_pairs(tmp_path / "t.xlsx")


YY, XX = np.mgrid[:64, :80]
DISC = np.hypot(YY - 30, XX - 40) < 18
RING = np.abs(np.hypot(YY - 30, XX - 40) - 26) < 6
AREAS = (DISC + 2 * RING).astype(np.uint8)  # 0, 1, 2


def saved(folder, mask, name="m.png", **options):
    "A mask in a file, as pairs of one image."
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image.save(folder / name, **options)
    return [ImagePair(name, "a.png", str(folder / name))]


def with_palette(index, colours):
    image = Image.fromarray(index.astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(np.ravel(colours).tolist() + [0] * (768 - 3 * len(colours)))
    return image


def half_size(mask):
    return Image.fromarray(mask * np.uint8(255)).resize((40, 32), Image.BILINEAR)


BINARY = dict(
    ones=lambda d: saved(d, DISC.astype(np.uint8)),
    white=lambda d: saved(d, DISC * np.uint8(255)),
    grey=lambda d: saved(d, DISC * np.uint8(128)),
    bits=lambda d: saved(d, DISC),
    bits_tiff=lambda d: saved(d, DISC, "m.tif"),
    sixteen=lambda d: saved(d, DISC * np.uint16(1000)),
    full_sixteen=lambda d: saved(d, DISC * np.uint16(65535)),
    int32=lambda d: saved(d, DISC * np.int32(70000), "m.tif"),
    floats=lambda d: saved(d, DISC * np.float32(1), "m.tif"),
    float_255=lambda d: saved(d, DISC * np.float32(255), "m.tif"),
    probabilities=lambda d: saved(d, (0.1 + DISC * 0.85).astype(np.float32), "m.tif"),
    jpeg=lambda d: saved(d, DISC * np.uint8(255), "m.jpg"),
    jpeg_50=lambda d: saved(d, DISC * np.uint8(255), "m.jpg", quality=50),
    rgb=lambda d: saved(d, np.dstack([DISC * np.uint8(255)] * 3)),
    rgb_jpeg=lambda d: saved(d, np.dstack([DISC * np.uint8(255)] * 3), "m.jpg"),
    rgba=lambda d: saved(d, np.dstack([DISC * np.uint8(255)] * 3 + [np.full(DISC.shape, 255, np.uint8)])),
    grey_alpha=lambda d: saved(d, np.dstack([DISC * np.uint8(255), np.full(DISC.shape, 255, np.uint8)])),
    red=lambda d: saved(d, np.dstack([DISC * np.uint8(255), DISC * 0, DISC * 0]).astype(np.uint8)),
    inverted_palette=lambda d: saved(d, with_palette(~DISC, [[255] * 3, [0] * 3])),
    palette=lambda d: saved(d, with_palette(DISC, [[0, 0, 0], [255, 0, 0]])),
    gif=lambda d: saved(d, with_palette(DISC, [[0] * 3, [255] * 3]), "m.gif"),
)


@pytest.mark.parametrize("way", BINARY)
@pytest.mark.parametrize("names", [None, ["disc"], ["ground", "disc"], 2, 1])
def test_two_values_are_two_classes(tmp_path, way, names):
    "Whatever the file says: the foreground is the disc, by less than a pixel of its border."
    pairs = BINARY[way](tmp_path)
    classes = understand(pairs, names).classes
    index, valid = read_mask(pairs[0].mask, classes)
    assert len(classes) == 2 and valid.all()
    assert index.sum() == pytest.approx(DISC.sum(), rel=0.01)
    assert (index.astype(bool) ^ DISC).sum() < 0.02 * DISC.sum()
    if names and names != 2:
        assert classes.names[1] == ("disc" if isinstance(names, list) else "foreground")


def test_shares_of_probabilities(tmp_path):
    noisy = (DISC * 0.8 + np.random.default_rng(0).random((64, 80)) * 0.1).astype(np.float32)
    big = np.kron(noisy, np.ones((4, 4), np.float32)) + np.random.default_rng(1).random((256, 320)) / 100
    rows = understand(saved(tmp_path, big.astype(np.float32), "m.tif")).rows
    assert [float(row["pixels"].split()[0]) for row in rows] == pytest.approx(
        [100 * (1 - DISC.mean()), 100 * DISC.mean()], rel=0.01
    )


def test_soft_edges_of_another_size(tmp_path):
    pairs = saved(tmp_path, half_size(DISC))
    report = understand(pairs, ["disc"])
    index, _ = read_mask(pairs[0].mask, report.classes)
    assert index.sum() == pytest.approx(DISC.sum() / 4, rel=0.02) and "soft edges" in str(report)
    told = understand(pairs, {255: "crack", 0: "ground"}).classes
    assert told.names == ("ground", "crack") and told.threshold == 127.5


def test_classes_as_they_are_numbered(tmp_path):
    for values, hidden in (
        ((0, 1, 2), ()),
        ((0, 1, 255), (255,)),
        ((1, 2, 3), ()),
        ((-1, 0, 1), (-1,)),
        ((0, 4, 9), ()),
    ):
        mask = np.array(values, np.int32)[AREAS]
        pairs = saved(tmp_path, mask, "m.tif")
        classes = understand(pairs).classes
        index, valid = read_mask(pairs[0].mask, classes)
        assert classes.values == tuple(v for v in values if v not in hidden)
        assert (valid == ~np.isin(mask, hidden)).all()
        assert (np.array(classes.values)[index[valid]] == mask[valid]).all()


def test_many_classes(tmp_path):
    "300 classes, values beyond 255, and names for them."
    mask = np.zeros((64, 80), np.uint16)
    mask.ravel()[:4800] = np.repeat(np.arange(300), 16) * 7
    pairs = saved(tmp_path, mask)
    with pytest.raises(InputError, match="300 values from 0 to 2093 .*: are they numbers of objects"):
        understand(saved(tmp_path, mask, "q.png"))
    classes = understand(pairs, {7 * i: f"c{i}" for i in range(300)}).classes
    index, valid = read_mask(pairs[0].mask, classes)
    assert index.dtype == np.uint16 and valid.all() and (index * 7 == mask).all()
    assert len(understand(pairs, None, "labels").classes) == 300


def test_palettes(tmp_path):
    colours = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
    pairs = saved(tmp_path, with_palette(AREAS, colours))
    classes = understand(pairs).classes
    assert classes.values == (0, 1, 2) and classes.colours == ("#000000", "#ff0000", "#0000ff")
    assert (read_mask(pairs[0].mask, classes)[0] == AREAS).all()
    named = understand(pairs, {"#0000ff": "road", "#ff0000": "roof", "#000000": "rest"}).classes
    assert (read_mask(pairs[0].mask, named)[0] == np.array([2, 1, 0])[AREAS]).all()
    other = saved(tmp_path, with_palette((AREAS + 1) % 3, colours[2:] + colours[:2]), "n.png")
    both = understand([*pairs, *other])
    assert both.classes.kind == "colours"  # two palettes: colours mean the same, indices do not
    a, b = (read_mask(p.mask, both.classes)[0] for p in (pairs[0], other[0]))
    assert (a == b).all() and len(np.unique(a)) == 3


def test_colours(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 160, 0]], np.uint8)
    told = {"#000000": "rest", "#ff0000": "roof", "#00a000": "tree"}
    pairs = saved(tmp_path, colours[AREAS])
    empty = saved(tmp_path, np.zeros((64, 80, 3), np.uint8), "empty.png")
    assert understand(pairs).classes.names == ("#000000", "#00a000", "#ff0000")
    classes = understand([*pairs, *empty], told).classes
    assert classes.kind == "colours" and (read_mask(pairs[0].mask, classes)[0] == AREAS).all()
    assert not read_mask(empty[0].mask, classes)[0].any()
    lossy = saved(tmp_path, colours[AREAS], "m.jpg", quality=90)
    report = understand(lossy, told)
    index, _ = read_mask(lossy[0].mask, report.classes)
    assert report.classes.kind == "nearest" and (index != AREAS).mean() < 0.03
    with pytest.raises(InputError, match="near these are most pixels: .*#000000.*: background"):
        understand(lossy)


@pytest.mark.parametrize("name", ["m.png", "m.jpg"])
def test_other_colours_are_refused_by_distance(tmp_path, name):
    "Blue and red swapped, and a class that was not named."
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 160, 0]], np.uint8)
    pairs = saved(tmp_path, colours[AREAS][..., ::-1], name)
    with pytest.raises(InputError, match=r"colours without a class: #0.*\d+ from the nearest"):
        understand(pairs, {"#000000": "rest", "#ff0000": "roof", "#00a000": "tree"})
    pairs = saved(tmp_path, colours[AREAS], f"q{name}")
    with pytest.raises(InputError, match="colours without a class"):
        understand(pairs, {"#000000": "rest", "#ff0000": "roof"})


def objects():
    return np.kron(np.arange(1, 13).reshape(3, 4), np.pad(np.ones((14, 14)), 3)).astype(np.uint8)


NOISE = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
QUESTIONS = {
    "all pixels of all masks are 0": (AREAS * 0, None),
    "all pixels of all masks are 255": (AREAS * 0 + 255, None),
    "all pixels of all masks are #ff0000": (np.full((9, 9, 3), [255, 0, 0], np.uint8), None),
    "values that change from pixel to pixel.*swapped": (NOISE[..., 0], None),
    "colours that change from pixel to pixel.*swapped": (NOISE, None),
    "13 values, each one piece.*mask_kind=binary": (objects(), None),
    "is 255 a class.*classes={0: background, 15: b, 255: c}": (np.array([0, 15, 255], np.uint8)[AREAS], None),
    "3 classes, and 255 among": (np.array([0, 1, 255], np.uint8)[AREAS], 3),
    "which is which.*classes={0: a, 3: b, 7: c}": (np.array([0, 3, 7], np.uint8)[AREAS], ["a", "b", "c"]),
    "which is which.*classes={1: a, 2: b, 3: c}": (AREAS + 1, ["a", "b", "c"]),
    "2 classes are named.*0: road, 1: car, 2: c": (AREAS, ["road", "car"]),
    "values without a class: 2 .*or ignore=2": (AREAS, {0: "a", 1: "b"}),
    "indices of the colours #fde725 and #440154.*'#440154': a, '#fde725': b": (
        with_palette(DISC, [[253, 231, 37], [68, 1, 84]]),
        ["a", "b"],
    ),
    "#000000.*#ffffff": (np.array([[0] * 3, [255] * 3, [1, 0, 1]], np.uint8)[AREAS], None),
    "which is which.*#000000.*a": (
        np.array([[0] * 3, [255, 0, 0], [0, 0, 255]], np.uint8)[AREAS],
        list("abc"),
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_have_answers(tmp_path, question):
    mask, classes = QUESTIONS[question]
    with pytest.raises(InputError, match=question) as e:
        understand(saved(tmp_path, mask), classes)
    assert "\n" not in str(e.value) and "m.png" in str(e.value)


@pytest.mark.parametrize(
    "wrong", ["no.txt", {"red": "roof"}, {0: "a", "#000000": "b"}, {0: "a", 1: ["b"]}, ["a", "a"]]
)
def test_wrong_classes(wrong):
    with pytest.raises(InputError, match="classes") as e:
        name_classes(wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name,text",
    [
        ("c.txt", "ground\nroof\n"),
        ("c.json", '{"0": "ground", "1": "roof"}'),
        ("c.yaml", "classes: {ground: 0, roof: 1}"),
        ("c.csv", "Value,Name\n0,ground\n1,roof\n"),
    ],
)
def test_files_of_classes(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    mask = saved(tmp_path, DISC * np.uint8(1))
    assert understand(mask, str(tmp_path / name)).classes.names == ("ground", "roof")


@pytest.mark.parametrize("seed", range(6))
def test_hold_out_by_class_and_group(seed):
    "Shuffled by names; every class on both sides where two groups have it; no group on both."
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 40))
    groups = [f"g{g}" for g in rng.integers(0, max(2, n // 2), n)]
    present = rng.random((n, 4)) < [1, 0.5, 0.15, 0.05]
    held = hold_out_groups(groups, present, 0.25, seed)
    order = rng.permutation(n)
    again = hold_out_groups([groups[i] for i in order], present[order], 0.25, seed)
    assert (again == held[order]).all()
    assert not {g for g, h in zip(groups, held) if h} & {g for g, h in zip(groups, held) if not h}
    for c in range(4):
        having = {g for g, p in zip(groups, present[:, c]) if p}
        assert not having or present[~held, c].any(), "a class was lost to training"
    if len(set(groups)) > 1:
        assert 0 < held.sum() < n


def test_a_pair_of_turned_image_and_mask_says_why(tmp_path):
    photo = Image.fromarray(NOISE)
    turned = photo.getexif()
    turned[0x0112] = 6
    for place in ("photos", "masks"):
        (tmp_path / place).mkdir()
    for i in range(2):
        photo.save(tmp_path / f"photos/{i}.jpg", exif=turned)
        Image.fromarray(AREAS).save(tmp_path / f"masks/{i}.png")
    s = TrainSegmenter(images=tmp_path / "photos", masks=tmp_path / "masks", crop=32)
    with pytest.raises(InputError, match="80 x 64, its mask .* 64 x 80.*EXIF orientation"):
        open_images(s)


def scene(folder, n=5, **masks):
    for place in ("photos", "masks"):
        (folder / place).mkdir(exist_ok=True)
    for i in range(n):
        Image.fromarray(NOISE // 3 + 90 * DISC[..., None].astype(np.uint8)).save(folder / f"photos/{i}.png")
        Image.fromarray(masks.get(f"m{i}", DISC * np.uint8(255))).save(folder / f"masks/{i}.png")
    return dict(images=folder / "photos", masks=folder / "masks", crop=32)


def test_what_cannot_be_learned_or_read_is_named(tmp_path, capsys):
    given = scene(tmp_path)
    (tmp_path / "photos/2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"2.png .*; skip_unreadable=true leaves such files out"):
        open_images(TrainSegmenter(**given))
    opened = open_images(TrainSegmenter(**given, skip_unreadable=True))
    said = capsys.readouterr().err
    assert len(opened.train.pairs) + len(opened.valid) == 4 and "left out, unreadable: " in said
    scene(tmp_path)
    with pytest.raises(InputError, match="class crack .3. has no pixel in the 4 masks of the training set"):
        open_images(TrainSegmenter(**given, classes={0: "ground", 255: "disc", 3: "crack"}))
    with pytest.raises(InputError, match="weighting="):
        open_images(TrainSegmenter(**given, weighting=[1, 2, 3]))
    assert open_images(TrainSegmenter(**given, weighting={"foreground": 7})).more["weights"][1] == 7
    Image.fromarray(DISC[:30]).save(tmp_path / "masks/0.png")
    with pytest.raises(InputError, match="0.png is 64 x 80, its mask .* 30 x 80"):
        open_images(TrainSegmenter(**given))


def test_swapped_folders(tmp_path):
    given = scene(tmp_path)
    with pytest.raises(InputError, match="are images= and masks= swapped"):
        open_images(TrainSegmenter(images=given["masks"], masks=given["images"]))


def test_what_was_understood_is_said_and_kept(tmp_path, capsys):
    given = scene(tmp_path, 8, m3=DISC * np.uint8(0))
    opened = open_images(TrainSegmenter(**given))
    said = capsys.readouterr().err
    for word in ("8 pairs (the same names): 64 x 80 pixels, 3 channels of uint8", "255", "foreground", "7"):
        assert word in said
    assert "validation: 2 of 8 images, shuffled by seed 0: " in said
    assert len(opened.valid) == 2 and len(opened.train.pairs) == 6


OLD = """
model: {model_path: nnunetv2.model.model_upernet, backbone: dinov3, backbone_size: small, checkpoint_path: "",
  decoder: {hidden_size: 32, pool_scales: [1, 2]}}
lora: {enabled: false, r: 8, lora_alpha: 16, target_modules: [qkv], lora_dropout: 0.05}
train: {initial_lr: 0.001, weight_decay: 3.0e-05, gradient_clip: 12.0, num_epochs: 7,
  num_iterations_per_epoch: 250, num_val_iterations_per_epoch: 50}
"""


def test_recipes_of_the_predecessor(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(OLD)
    recipe, given = recipe_of("train", tmp_path / "old.yaml", ["images=a", "masks=b", "train.batch_size=2"])
    s = make_settings(recipe, given)
    assert (s.head, s.hidden_size, s.pool_scales, s.lora, s.weights) == ("upernet", 32, (1, 2), None, None)
    assert (s.train.lr, s.train.clip, s.train.epochs, s.crops_per_epoch) == (0.001, 12.0, 7, 500)
    assert "lora.r is lora.rank" in capsys.readouterr().err
    with pytest.raises(InputError, match="model.model_path=x.model_vit: expected head="):
        recipe_of("train", None, ["model.model_path=x.model_vit", "images=a"])


@pytest.mark.parametrize(
    "typed,meant",
    [
        ("classes={0: ground, 255: crack}", {0: "ground", 255: "crack"}),
        ("classes={'#ff0000': roof, \"#000000\": rest}", {"#ff0000": "roof", "#000000": "rest"}),
        ("classes=[a, b]", ("a", "b")),
        ("classes=3", 3),
        ("weighting={a: 2}", {"a": 2}),
        ("weighting=[1, 2.5]", [1, 2.5]),
    ],
)
def test_classes_of_the_command_line(typed, meant):
    recipe, given = recipe_of("train", None, ["images=a", typed])
    assert getattr(make_settings(recipe, given), typed.partition("=")[0]) == meant


def test_overlapping_classes_are_learned(tmp_path):
    "A folder of masks per class: loss and scores of each class by itself."
    from dinolab.tasks.images import predict_images, train_segmenter
    from dinolab.train.settings import TrainArgs

    yy, xx = np.mgrid[:32, :32]
    for place in ("images", "masks/cell", "masks/nucleus"):
        (tmp_path / place).mkdir(parents=True)
    for i in range(4):
        cell, nucleus = (np.hypot(yy - 16, xx - 10 - 3 * i) < r for r in (9, 4))
        Image.fromarray((60 + 60 * cell + 90 * nucleus).astype(np.uint8)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(cell * np.uint8(255)).save(tmp_path / f"masks/cell/{i}.png")
        if i:
            Image.fromarray(nucleus).save(tmp_path / f"masks/nucleus/{i}.png")
    args = TrainArgs(epochs=12, batch_size=2, lr=1e-2, monitor="mean_iou", mode="max", device="cpu")
    with pytest.raises(InputError, match="^head='mask' with classes that overlap.*expected another head"):
        train_segmenter(tmp_path / "images", tmp_path / "masks", head="mask", out=tmp_path / "runs")
    with pytest.raises(
        InputError, match="^loss='ce' with head='mask': its queries bring a loss of their own"
    ):
        train_segmenter(
            tmp_path / "images", tmp_path / "masks/cell", head="mask", loss="ce", out=tmp_path / "runs"
        )
    assert not (tmp_path / "runs").exists()
    done = train_segmenter(
        tmp_path / "images",
        tmp_path / "masks",
        out=tmp_path / "runs",
        backbone="resnet10t",
        head="upernet",
        hidden_size=16,
        stem=8,
        crop=32,
        scale=(1, 1),
        augment="none",
        crops_per_epoch=8,
        train=args,
    )
    assert done.classes.overlap and done.classes.names == ("cell", "nucleus")
    assert done.run.history()[-1]["valid/mean_iou"] > 0.7, done.run.history()[-1]
    with pytest.raises(InputError, match="its classes overlap .cell, nucleus."):
        predict_images(done.run.path, tmp_path / "images", tmp_path / "out")


def held_by_the_plain_way(sizes, has, share, wanted):
    "Each class in turn, then all: what is held is counted anew for every unit."
    taken = []

    def try_to_take(unit):
        left = has.sum(0) - has[taken].sum(0)
        alone = (left[has[unit]] < 2).any() or len(taken) == len(sizes) - 1
        if unit not in taken and sizes[taken].sum() + sizes[unit] <= wanted and not alone:
            taken.append(unit)

    for c in np.argsort(has.sum(0), kind="stable"):
        for unit in np.flatnonzero(has[:, c]):
            if has[taken, c].sum() < max(1, round(share * has[:, c].sum())):
                try_to_take(unit)
    for unit in range(len(sizes)):
        try_to_take(unit)
    return set(taken)


@pytest.mark.parametrize("seed", range(20))
def test_held_out_units_are_those_of_the_plain_way(seed):
    from dinolab.tasks.common import _deal

    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 40))
    sizes, has = rng.integers(1, 4, n), rng.random((n, 4)) < rng.random(4)
    wanted = max(4, round(0.3 * sizes.sum()))
    expected = held_by_the_plain_way(sizes, has, 0.3, wanted)
    assert not expected or _deal(sizes, has, 0.3, wanted) == expected

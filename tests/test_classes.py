"From folders as people have them to pairs and classes: every habit is read, named, or asked about."

from pathlib import Path

import pytest

from dinolab.core.errors import InputError
from dinolab.data.folders import folder_pairs, images_below, list_images, pair_folders, with_groups
from dinolab.data.tables import table_pairs


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

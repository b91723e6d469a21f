"Image, label and validity move together; channels do not mix; the same key gives the same bytes; odd inputs."

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, strategies as st
from PIL import Image

from dinolab.core.errors import InputError
from dinolab.core.keys import keyed_rng
from dinolab.data.augment import Augment
from dinolab.data.augment_images import (
    IMAGE_SETS,
    ImageAugment,
    blurred,
    change_image,
    change_stains,
    colour_matrix,
    described,
    draw_warp,
    find_image_augment,
    through_jpeg,
    vary,
    with_shot_noise,
)
from dinolab.data.classes import Classes
from dinolab.data.images import ImageDataset
from dinolab.data.tables import ImagePair

STILL = ImageAugment(flip=0, rotate=0)
SHAPES = dict(
    flip=dict(flip=1),
    quarter=dict(rotate=1),
    turn=dict(turn=180, warp_probability=1),
    zoom=dict(zoom=1, warp_probability=1),
    stretch=dict(stretch=1, warp_probability=1),
    shear=dict(shear=40, warp_probability=1),
    shift=dict(shift=0.4, warp_probability=1),
    elastic=dict(elastic=6, elastic_scale=24, warp_probability=1),
)
SETS = [name for name in IMAGE_SETS if name != "none"]


def blocks(height, width, seed):
    "Labels 0 to 2 in blocks of four pixels."
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (-(-height // 4), -(-width // 4)))
    return np.kron(coarse, np.ones((4, 4)))[:height, :width].astype(np.uint8)


def pure(plane, label):
    "Whether interpolated pixels show one label: where, and which."
    shown = np.round(plane * 2)
    return np.abs(plane * 2 - shown) < 1e-5, shown


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (1, 50)])
def test_an_image_that_shows_its_label_still_does(kind, size):
    augment, moved = replace(STILL, **SHAPES[kind]), 0
    for seed in range(12):
        label = blocks(*size, seed)
        valid = blocks(*size, seed + 100) > 0
        planes = np.stack([label / 2, valid, np.ones(size)]).astype(np.float32)
        image, got, on = vary(planes, label, valid, augment, keyed_rng(seed))
        assert image.shape == (3, *got.shape) and got.shape == on.shape == size
        where, shown = pure(image[0], got)
        assert np.array_equal(shown[where & on], got[where & on])
        sure, shows_valid = pure(image[1] / 2, on)
        assert not (on & sure & (shows_valid == 0)).any()
        moved += not np.array_equal(got, label)
    assert moved > 2 or size[0] == 1


@pytest.mark.parametrize("kind", ["turn", "zoom", "shift", "shear"])
def test_outside_counts_nowhere(kind):
    "What comes from beyond the image is not valid, and is not black either."
    augment = replace(STILL, **SHAPES[kind])
    lost = 0
    for seed in range(10):
        warp = draw_warp(augment, keyed_rng(seed), (48, 48))
        image, label, on = warp.apply(
            np.full((1, 48, 48), 0.7, np.float32),
            np.ones((48, 48), np.uint8),
            np.ones((48, 48), bool),
            (48, 48),
        )
        places = warp.places((48, 48)).numpy()
        inside = (np.abs(places) < 23.99).all(0)
        outside = (np.abs(places) > 24.01).any(0)
        assert on[inside].all() and not on[outside].any()
        assert (label[on] == 1).all() and np.allclose(image, 0.7, atol=1e-5)
        lost += int(outside.sum())
    assert lost > 100


@examples(25)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 999))
def test_the_room_of_a_warp_is_enough(height, width, seed):
    augment = ImageAugment(turn=180, zoom=1, stretch=1, shear=40, shift=0.2, elastic=9, warp_probability=1)
    warp = draw_warp(augment, keyed_rng(seed), (height, width))
    room = warp.room((height, width))
    assert room[0] >= height and room[1] >= width
    reach = warp.places((height, width)).abs().amax((1, 2)).numpy()
    assert (reach <= np.array(room) / 2 + 0.25 * 9).all()


def test_blur_keeps_channels_apart():
    impulse = np.zeros((3, 12, 20), np.float32)
    impulse[0, -1, 7] = impulse[1, 0, 3] = 1
    blur = replace(STILL, blur=4, blur_probability=1)
    for seed in range(5):
        together = change_image(impulse, blur, keyed_rng(seed))
        assert together[2].max() == 0
        for c in range(3):
            alone = np.zeros_like(impulse)
            alone[c] = impulse[c]
            np.testing.assert_array_equal(change_image(alone, blur, keyed_rng(seed))[c], together[c])
    wide = np.zeros((1, 61, 61), np.float32)
    wide[0, 30, 30] = 1
    x = np.arange(-30, 31)
    gauss = np.exp(-0.5 * (x / 2) ** 2)
    gauss /= gauss.sum()
    np.testing.assert_allclose(blurred(wide, 2)[0], np.outer(gauss, gauss), atol=1e-5)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_same_key_gives_the_same_bytes_for_any_channels(name, channels):
    rng = np.random.default_rng(0)
    planes = rng.random((channels, 40, 33)).astype(np.float32)
    kept, label = planes.copy(), blocks(40, 33, 1)
    different = 0
    for seed in range(8):
        augment = find_image_augment(name)
        a, b = (vary(planes, label, label < 2, augment, keyed_rng(seed)) for _ in range(2))
        assert all(x.tobytes() == y.tobytes() for x, y in zip(a, b))
        assert a[0].dtype == np.float32 and 0 <= a[0].min() and a[0].max() <= 1
        assert a[1].dtype == np.uint8 and a[2].dtype == bool
        different += not np.array_equal(a[0], planes)
    assert different and np.array_equal(planes, kept)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (7, 30)])
def test_images_of_one_pixel_and_other_odd_sizes(name, size):
    for seed in range(6):
        image, label, valid = vary(
            np.full((3, *size), 0.5, np.float32),
            np.ones(size, np.uint8),
            np.ones(size, bool),
            find_image_augment(name),
            keyed_rng(seed),
        )
        assert image.shape == (3, *size) and label.shape == valid.shape == size
        assert np.isfinite(image).all()


def test_up_stays_up_in_photographs():
    column = np.repeat(np.linspace(0, 1, 32, dtype=np.float32)[:, None], 32, 1)[None]
    label = np.zeros((32, 32), np.uint8)
    upside_down = dict.fromkeys(("photo", "aerial"), 0)
    for name in upside_down:
        quiet = replace(find_image_augment(name), intensity=0, colour=0, grey=0, noise_probability=0)
        for seed in range(30):
            image = vary(column, label, label == 0, quiet, keyed_rng(seed))[0][0]
            upside_down[name] += image[:8].mean() > image[-8:].mean()
    assert upside_down["photo"] == 0 and upside_down["aerial"] > 5


def test_colours_are_those_of_torchvision_and_stains_those_of_scikit_image():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    from skimage.color import hed2rgb, rgb2hed

    x = 0.2 + 0.6 * np.random.default_rng(0).random((3, 9, 7)).astype(np.float32)
    for factor in (0, 0.4, 1.3):
        mine = np.tensordot(colour_matrix(factor, 0), x, 1)
        theirs = functional.adjust_saturation(torch.from_numpy(x), factor).numpy()
        np.testing.assert_allclose(mine.clip(0, 1), theirs, atol=1e-3)
    luminance = [0.299, 0.587, 0.114]
    for hue in (0.3, 2.0):
        turned = np.tensordot(colour_matrix(1, hue), x, 1)
        np.testing.assert_allclose(
            np.tensordot(luminance, turned, 1), np.tensordot(luminance, x, 1), atol=1e-5
        )
    turn = np.linalg.matrix_power(colour_matrix(1, 2 * np.pi / 3), 3)
    np.testing.assert_allclose(turn, np.eye(3), atol=1e-6)
    amounts = np.array([0.06, 0.05, 0.02])
    tissue = hed2rgb(np.broadcast_to(amounts, (4, 4, 3))).transpose(2, 0, 1)
    varied = change_stains(tissue, ImageAugment(stain=0.3), keyed_rng(1)).transpose(1, 2, 0)
    factors = 1 + 0.3 * keyed_rng(1).uniform(-1, 1, 3)
    np.testing.assert_allclose(rgb2hed(varied)[0, 0], amounts * factors, atol=1e-3)


def test_noise_has_the_variance_that_is_said():
    for level in (0.09, 0.64):
        flat = np.full((1, 400, 400), level, np.float32)
        shot = with_shot_noise(flat, 0.1, keyed_rng(0))
        assert shot.mean() == pytest.approx(level, rel=0.01)
        assert shot.std() == pytest.approx(0.1 * level**0.5, rel=0.02)
    drawn = [
        change_image(flat, replace(STILL, noise=0.1, noise_probability=1), keyed_rng(s)).std()
        for s in range(20)
    ]
    assert max(drawn) <= 0.102 and 0.03 < np.mean(drawn) < 0.07


def test_jpeg_is_that_of_pillow(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=30)
    theirs = np.asarray(Image.open(tmp_path / "a.jpg"))
    mine = through_jpeg(pixels.transpose(2, 0, 1).astype(np.float32) / 255, 30)
    np.testing.assert_array_equal(np.round(mine * 255), theirs.transpose(2, 0, 1))
    assert through_jpeg(np.zeros((5, 3, 4), np.float32), 30).shape == (5, 3, 4)


@pytest.mark.parametrize("field", [f.name for f in fields(ImageAugment)])
def test_every_field_changes_something_and_is_checked(field):
    rng = np.random.default_rng(1)
    image = rng.random((3, 48, 48)).astype(np.float32)
    label = blocks(48, 48, 0)
    base = replace(
        ImageAugment(
            flip=0.5, rotate=0.5, warp_probability=1, turn=9, zoom=0.2, stretch=0.2, shear=5, shift=0.1
        ),
        **dict(elastic=5, elastic_scale=16, contrast=0.3, brightness=0.1, gamma=0.2, intensity=0.9),
        **dict(saturation=0.5, hue=20, stain=0.2, colour=0.9, grey=0.5, blur=2, blur_probability=0.5),
        **dict(
            shot=0.1, shot_probability=0.5, noise=0.1, noise_probability=0.5, jpeg=30, jpeg_probability=0.5
        ),
    )
    value = getattr(base, field)
    other = not value if isinstance(value, bool) else 90 if field == "jpeg" else value * 0.3
    outputs = []
    for augment in (base, replace(base, **{field: other})):
        drawn = [vary(image, label, label < 3, augment, keyed_rng(s))[0].tobytes() for s in range(15)]
        outputs.append(drawn)
    assert outputs[0] != outputs[1], f"{field} changes nothing"
    for wrong in (-1, float("nan"), "much"):
        with pytest.raises(InputError, match=field):
            ImageAugment(**{field: wrong})


def test_names_old_and_new():
    assert find_image_augment(None) is find_image_augment("none") is None
    assert find_image_augment("turns") == ImageAugment()
    old = find_image_augment(Augment(noise=0.2, flip=0.1))
    assert (old.noise, old.flip, old.rotate, old.warp_probability) == (0.2, 0.1, 1, 0)
    assert find_image_augment(dict(like="em", turn=3)) == replace(IMAGE_SETS["em"], turn=3)
    assert find_image_augment(dict(like="none", blur=1)).flip == 0
    for wrong in ("foto", 3, dict(trun=3), dict(like="ems"), dict(drop_slice=0.1)):
        with pytest.raises(InputError, match="expected one of"):
            find_image_augment(wrong)
    for name in IMAGE_SETS:
        assert name in described(name) and "\n" not in described(name)


@pytest.mark.parametrize("name", ["none", *SETS])
@pytest.mark.parametrize("size, channels", [((20, 30), 1), ((33, 17), 5), ((1, 40), 3)])
def test_crops_are_whole_where_the_image_is(name, size, channels, tmp_path):
    "A crop from the middle of a large image is valid everywhere, however it is turned; odd images give crops too."
    import tifffile

    rng = np.random.default_rng(0)
    two = Classes(("ground", "thing"))
    for what, shape in (("large", (160, 160)), ("odd", size)):
        planes = rng.integers(0, 256, (*shape, channels)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{what}.tif", planes.squeeze() if channels == 1 else planes)
        Image.fromarray(rng.integers(0, 2, shape).astype(np.uint8)).save(tmp_path / f"{what}.png")
    for what, crop in (("large", (32, 32)), ("odd", (32, 48))):
        pair = ImagePair(what, str(tmp_path / f"{what}.tif"), str(tmp_path / f"{what}.png"))
        data = ImageDataset([pair], two, crop, channels=channels, augment=name, scale=(0.9, 1.2), balance=0)
        shares = []
        for seed in range(8):
            item, again = data.item(0, seed), data.item(0, seed)
            assert item["image"].shape == (channels, *crop) and item["mask"].shape == crop
            assert all(torch.equal(item[k], again[k]) for k in ("image", "target", "mask"))
            shares.append(float(item["mask"].float().mean()))
        assert what == "odd" or np.median(shares) == 1
        assert max(shares) > 0

"Crops: what is turned is turned together, what is made up does not count, and features belong to their own volume."

import itertools
import shutil

import numpy as np
import pytest
import torch

from dinolab.core.errors import InputError
from dinolab.data.augment import Orientation
from dinolab.features.cache import CellFeatures, Extraction, LiveFeatures, cache_features
from dinolab.features.cases import Case, kept_image, open_case, scan_labels
from dinolab.features.crops import CropDataset, GridDataset, draw_crop, read_context, read_crop
from dinolab.features.extract import PatchMean
from dinolab.features.layout import make_layout
from dinolab.features.targets import ClassTarget, InstanceTarget
from dinolab.volumes.grid import Grid
from dinolab.volumes.sources import open_volume
from dinolab.volumes.volume import Volume

ORIENTATIONS = [
    Orientation(permutation, flips)
    for permutation in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]
SHAPE, CROP = (10, 12, 14), (8, 8, 8)


def turned(x, orientation):
    "Voxel by voxel: the new axis a runs along the old axis permutation[a], backwards where it is flipped."
    last = [x.shape[old] - 1 for old in orientation.permutation]
    new = np.indices([n + 1 for n in last])
    old = [None] * 3
    for a, axis in enumerate(orientation.permutation):
        old[axis] = last[a] - new[a] if orientation.flips[a] else new[a]
    return x[tuple(old)]


class Patches:
    "Features that count their own voxels, a thousand more for each plane."

    def __init__(self, layout):
        self.layout = layout

    def read(self, roi):
        sizes = self.layout.sizes()
        return {
            p: torch.arange(float(np.prod(n))).reshape(1, *n) + 1000 * i
            for i, (p, n) in enumerate(sizes.items())
        }


@pytest.fixture(scope="module")
def case():
    rng, grid = np.random.default_rng(0), Grid(SHAPE, (40, 8, 8))
    layout = make_layout(grid, CROP, 16, ("xy", "xz", "yz"))
    of = lambda x: Volume(x, grid)
    raw, labels = rng.random(SHAPE, dtype=np.float32), rng.integers(0, 5, SHAPE).astype(np.uint8)
    return Case("demo", grid, of(raw), (0, 1), Patches(layout), of(labels), of(rng.random(SHAPE) < 0.7))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_everything_of_a_crop_turns_together(case, orientation):
    "Image, labels and mask have no symmetry, so each that stayed behind, or was turned otherwise, would show."
    roi = np.s_[1:9, 2:10, 4:12]
    labels, mask = case.labels.read(roi), case.mask.read(roi)
    item = read_crop(case, roi, ClassTarget(5), orientation=orientation)
    np.testing.assert_allclose(item["raw"][0], turned(case.raw.read(roi), orientation), atol=1e-6)
    np.testing.assert_array_equal(item["mask"], turned(mask, orientation))
    np.testing.assert_array_equal(item["target"], turned(np.where(mask, labels, 0), orientation))


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_features_and_surroundings_turn_too(case, orientation):
    roi = np.s_[0:8, 4:12, 4:12]
    plain = read_crop(case, roi, None, context_scale=2)
    item = read_crop(case, roi, None, orientation=orientation, context_scale=2)
    np.testing.assert_array_equal(item["context"][0], turned(plain["context"][0].numpy(), orientation))
    assert set(item["features"]) == {"xy", "xz", "yz"}
    normals = dict(xy=0, xz=1, yz=2)
    for plane, x in plain["features"].items():
        now = next(p for p in normals if orientation.permutation[normals[p]] == normals[plane])
        np.testing.assert_array_equal(item["features"][now][0], turned(x[0].numpy(), orientation))


def test_targets_see_voxels_as_they_are_turned(case):
    seen = []

    def target(labels, valid, voxel_size):
        seen.append(voxel_size)
        return labels, valid

    for orientation in ORIENTATIONS:
        read_crop(case, np.s_[0:8, 0:8, 0:8], target, orientation=orientation)
        assert seen.pop().index(40) == orientation.permutation.index(0)


@pytest.mark.parametrize("orientation", (None, *ORIENTATIONS[3::11]))
def test_what_lies_behind_the_end_does_not_count(case, orientation):
    "The image goes on mirrored, labels and mask are zero, also where a turn brings the end to the front."
    roi, behind = np.s_[4:12, 6:14, 6:14], np.zeros(CROP, bool)
    behind[6:], behind[:, 6:] = True, True
    item = read_crop(case, roi, ClassTarget(5), orientation=orientation)
    place = turned(behind, orientation) if orientation else behind
    assert not item["mask"][place].any() and not item["target"][place].any() and item["mask"].any()
    raw = np.pad(case.raw.read(np.s_[4:10, 6:12, 6:14]), ((0, 2), (0, 2), (0, 0)), mode="symmetric")
    np.testing.assert_allclose(item["raw"][0], turned(raw, orientation) if orientation else raw, atol=1e-6)


def test_changes_of_intensity_reach_the_image_alone(case):
    roi, target = np.s_[0:8, 0:8, 0:8], ClassTarget(5)
    a = read_crop(case, roi, target, context_scale=2)
    b = read_crop(case, roi, target, context_scale=2, intensity=lambda x: 1 - x)
    torch.testing.assert_close(b["raw"], 1 - a["raw"])
    assert all(torch.equal(a[k], b[k]) for k in ("target", "mask", "context"))


def test_both_ends_of_an_affinity_are_valid():
    "Against two loops over voxels."
    rng = np.random.default_rng(1)
    labels, valid = rng.integers(0, 3, (5, 6, 7)), rng.random((5, 6, 7)) < 0.6
    target = InstanceTarget(((-1, 0, 0), (0, -3, 0), (0, 0, 2)), sigma=0)
    affinities, counts = target(labels, valid, (8, 8, 8))
    for c, offset in enumerate(target.offsets):
        for at in np.ndindex(labels.shape):
            to = tuple(a + o for a, o in zip(at, offset))
            inside = all(0 <= i < n for i, n in zip(to, labels.shape))
            assert counts[c][at] == (inside and valid[at] and valid[to])
            if counts[c][at]:
                assert affinities[c][at] == (labels[at] == labels[to] > 0)


def test_descriptors_count_inside_valid_objects():
    labels, valid = np.zeros((6, 6, 6), int), np.ones((6, 6, 6), bool)
    labels[:3], valid[:, :2] = 1, False
    _, counts = InstanceTarget(((-1, 0, 0),))(labels, valid, (8, 8, 8))
    np.testing.assert_array_equal(counts[1:], np.broadcast_to(valid & (labels > 0), (10, 6, 6, 6)))


def test_validation_counts_every_valid_voxel_once(case):
    grid = GridDataset([case], ClassTarget(5), CROP)
    counted = np.zeros([n + 8 for n in SHAPE], int)
    for place, item in zip(grid.places, grid):
        counted[place.box.slices] += item["mask"].numpy()
    valid = case.mask.read()
    np.testing.assert_array_equal(counted[: SHAPE[0], : SHAPE[1], : SHAPE[2]], valid)
    assert counted.sum() == valid.sum()


@pytest.mark.parametrize("offset", (0.0, 2.0**31, -(2.0**31)))
def test_an_offset_keeps_the_contrast_of_image_and_surroundings(case, offset):
    "The low end is subtracted before float32 would cut the digits: 2**31 has room for steps of 256 there."
    shifted = Volume(case.raw.read().astype(np.float64) + offset, case.grid)
    other = Case("shifted", case.grid, shifted, (offset, offset + 1), case.features)
    roi = np.s_[1:9, 2:10, 4:12]
    np.testing.assert_allclose(other.image(roi), case.image(roi), atol=1e-6)
    np.testing.assert_allclose(read_context(other, roi, 2), read_context(case, roi, 2), atol=1e-6)
    for kept in (kept_image(other, 1e9), kept_image(other, 0)):
        np.testing.assert_allclose(kept.image(roi), case.image(roi), atol=1e-6)


@pytest.mark.parametrize("scale", (1, 2, 5))
def test_surroundings_share_the_centre_and_are_the_mean_of_what_they_cover(case, scale):
    "A ramp is its own mean, so a voxel of the surroundings holds the place of its centre; beyond the end the ramp is mirrored."
    z = np.broadcast_to(np.linspace(0, 1, SHAPE[0])[:, None, None], SHAPE)
    ramp = Case("ramp", case.grid, Volume(z.copy(), case.grid), (0, 1), case.features)
    found = read_context(ramp, np.s_[1:9, 2:10, 4:12], scale)
    centres = 4.5 + scale * (np.arange(8) - 3.5)  # in voxels, of which the first has its centre at 0
    whole = (centres - scale / 2 >= -0.5) & (centres + scale / 2 <= SHAPE[0] - 0.5)
    want = centres[whole] / (SHAPE[0] - 1)
    np.testing.assert_allclose(found[whole, 3, 3], want, atol=1e-6)
    assert whole.sum() >= 2


@pytest.mark.parametrize("scale", (2, 3))
@pytest.mark.parametrize("roi", (np.s_[1:9, 2:10, 4:12], np.s_[0:8, 0:8, 6:14], np.s_[2:10, 0:8, 3:11]))
def test_surroundings_beyond_the_end_are_mirrored(case, roi, scale):
    "Against the mean over boxes of the whole volume, continued by numpy."
    around = np.pad(case.raw.read(), 16, "symmetric")
    starts = [s.start + 4 - 4 * scale + 16 for s in roi]
    part = around[tuple(slice(a, a + 8 * scale) for a in starts)]
    want = part.reshape(8, scale, 8, scale, 8, scale).mean((1, 3, 5))
    np.testing.assert_allclose(read_context(case, roi, scale), want, atol=1e-6)


def test_surroundings_at_the_edge_of_a_long_volume_read_what_is_near():
    class Seen:
        shape, dtype, read = (8, 8, 400), np.dtype(np.uint8), []

        def __getitem__(self, at):
            Seen.read.append(at[2])
            return np.zeros([s.stop - s.start for s in at], np.uint8)

    grid = Grid(Seen.shape, 8)
    read_context(Case("long", grid, Volume(Seen(), grid), (0, 1)), np.s_[0:8, 0:8, 0:8], 3)
    assert Seen.read[-1] == slice(0, 17)  # twelve voxels on each side of 4, and one for the interpolation


@pytest.mark.parametrize("budget", (0, 2**30))
@pytest.mark.parametrize("cell", ((8, 8, 8), (4, 12, 8)))
def test_cells_give_what_extraction_gives(cell, budget):
    "Whatever the cells and however few are kept; also for a region that ends beyond the volume. One outside is refused."
    rng = np.random.default_rng(0)
    raw = Volume(rng.integers(0, 256, (18, 22, 26)).astype(np.uint8), Grid((18, 22, 26), 8))
    extraction = Extraction(PatchMean(4), planes="xy,yz", pixel_size=8)
    layout = extraction.layout(raw.grid, raw.grid, CROP)
    live = LiveFeatures(extraction, raw, raw.grid, layout, (0, 255))
    cells = CellFeatures(live, cell, budget)
    for roi in (np.s_[4:12, 8:16, 0:8], np.s_[12:20, 16:24, 20:28], np.s_[0:16, 4:24, 8:16]):
        want = live.read(roi)
        found = cells.read(roi)
        assert found.keys() == want.keys()
        for plane, x in found.items():
            torch.testing.assert_close(x, want[plane], atol=1e-3, rtol=0)
    assert len(cells.kept) == 1 or budget
    with pytest.raises(InputError, match="begin inside"):
        cells.read(np.s_[20:28, 0:8, 0:8])


def test_balanced_crops_hold_rare_classes(case):
    labels = np.zeros(SHAPE, np.uint8)
    labels[9, 11, 13] = 1
    rare = Case("rare", case.grid, case.raw, (0, 1), case.features, Volume(labels, case.grid))
    scan, rng = scan_labels(rare, 2), np.random.default_rng(0)
    rois = [draw_crop(rare, scan, CROP, rng, 1.0, 0.05) for _ in range(60)]
    holds = [all(s.start <= n < s.stop for s, n in zip(roi, (9, 11, 13))) for roi in rois]
    assert 0.3 < np.mean(holds) < 0.7  # one of two classes, drawn evenly
    assert all(s.start % k == 0 for roi in rois for s, k in zip(roi, case.features.layout.step))


@pytest.mark.parametrize("wrong", (0, -1, float("nan"), "8", True, 2.5))
@pytest.mark.parametrize("name", ("crop", "length", "balance", "min_labelled"))
def test_every_number_is_checked(case, name, wrong):
    if name in ("balance", "min_labelled") and wrong == 0:
        return
    options = dict(crop=CROP, length=4, balance=0.5, min_labelled=0.1) | {name: wrong}
    with pytest.raises(InputError, match=f"^{name}=.*expected") as e:
        CropDataset([case], ClassTarget(5), **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ("pixel_size", "halo", "block", "batch_size"))
@pytest.mark.parametrize("wrong", (-1, float("nan"), "8", True))
def test_extraction_is_checked(name, wrong):
    with pytest.raises(InputError, match=f"^{name}=.*expected"):
        Extraction(PatchMean(4), **{name: wrong})


# --- features belong to their own volume --------------------------------------------------------


def cached(folder, path):
    raw = open_volume(np.load(path, mmap_mode="r"))
    raw = Volume(raw.array, Grid(raw.shape, 8), path.name, str(path))
    means = Extraction(PatchMean(4), pixel_size=8)
    layout = means.layout(raw.grid, raw.grid, (8, 8, 8))
    return cache_features(means, raw, raw.grid, layout, folder, (0, 255)).read(np.s_[0:8, 0:8, 0:8])["xy"]


def test_the_cache_is_keyed_by_content(tmp_path):
    "Two files of one name have their own features; a replaced one is extracted again; a copy is not."
    x = np.random.default_rng(0).integers(0, 255, (16, 16, 16)).astype(np.uint8)
    for folder, values in (("a", x), ("b", 255 - x), ("c", x)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "em.npy", values)
    kept = tmp_path / "cache"
    means = lambda v: v[:8, :8, :8].reshape(8, 2, 4, 2, 4).mean((2, 4)) / 255
    for folder, values in (("a", x), ("b", 255 - x)):
        np.testing.assert_allclose(cached(kept, tmp_path / folder / "em.npy")[0], means(values), atol=1e-3)
    assert len(list(kept.iterdir())) == 6
    cached(kept, tmp_path / "c/em.npy")
    assert len(list(kept.iterdir())) == 6
    shutil.copy(tmp_path / "b/em.npy", tmp_path / "c/em.npy")
    np.testing.assert_allclose(cached(kept, tmp_path / "c/em.npy")[0], means(255 - x), atol=1e-3)
    assert len(list(kept.iterdir())) == 6


class Huge(PatchMean):
    def forward(self, images):
        return [1e7 * m for m in super().forward(images)]


def test_features_of_a_crop_are_finite():
    "1e7 is no float16, in which crops have their features."
    raw = Volume(np.random.default_rng(0).random((8, 8, 8)), Grid((8, 8, 8), 8), "demo")
    huge = Extraction(Huge(4), pixel_size=8)
    live = LiveFeatures(huge, raw, raw.grid, huge.layout(raw.grid, raw.grid, (8, 8, 8)), (0, 1))
    with pytest.raises(InputError, match="demo: features are NaN or infinite"):
        live.read(np.s_[0:8, 0:8, 0:8])


def test_wrong_settings_of_a_case():
    raw = Volume(np.arange(512.0).reshape(8, 8, 8), Grid((8, 8, 8), 8))
    for name, wrong in (("voxel_size", 0), ("raw_resolution", -1), ("intensity", (0, float("inf")))):
        with pytest.raises(InputError, match=f"^{name}=.*expected"):
            open_case("demo", raw, **{name: wrong})

"Images larger than memory, what is white in a data set, and where on Earth a mask lies."

import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

import dinolab.data.windows as windows
from dinolab.core.errors import InputError
from dinolab.core.region import Box
from dinolab.data.classes import Classes, read_mask
from dinolab.data.folders import pair_folders
from dinolab.data.geotiff import georeference, write_geotiff
from dinolab.data.images import ImageDataset, check_pairs, count_labels, read_scaled, scaled
from dinolab.data.pixels import Range, as_range, open_image, pieces, plain_range, read_image
from dinolab.data.ranges import Values, band_range, white_of
from dinolab.data.windows import (
    ClassPlaces,
    MaskView,
    nearest_pixels,
    open_pair,
    pair_pieces,
    read_labels,
    read_mask_at,
)
from dinolab.tasks.images import predict_image

TWO = Classes(("a", "b"))


def rng(seed=0):
    return np.random.default_rng(seed)


def pair(folder, image, mask, **options):
    "A pair of TIFF files, in tiles."
    pixels = dict(photometric="rgb") if image.ndim == 3 else {}
    tifffile.imwrite(folder / "i.tif", image, tile=(32, 48), compression="zlib", **pixels, **options)
    tifffile.imwrite(folder / "m.tif", mask, tile=(64, 32), compression="zlib")
    from dinolab.data.images import ImagePair

    return ImagePair("x", str(folder / "i.tif"), str(folder / "m.tif"))


@pytest.fixture
def large(monkeypatch):
    "Everything above 5,000 pixels is large."
    monkeypatch.setattr(windows, "HUGE", 5000)
    monkeypatch.setattr("dinolab.data.pixels.HUGE", 5000)


def scene(h=150, w=220):
    image = rng().integers(0, 256, (h, w, 3), np.uint8)
    mask = np.zeros((h, w), np.uint8)
    mask[100:104, 30:35] = 1
    mask[:, 200:] = 255
    return image, mask


def test_windows_are_those_of_the_whole(tmp_path, large):
    image, mask = scene()
    one, label, valid = open_pair(pair(tmp_path, image, mask), TWO)
    assert isinstance(label, MaskView) and one.raster.lazy
    for seed in range(20):
        corner = rng(seed).integers((0, 0), (149, 219))
        box = Box.sized(corner, rng(seed + 1).integers(1, 90, 2)).clip(mask.shape)
        assert (one[(slice(None), *box)] * 255 == image[box.slices].transpose(2, 0, 1)).all()
        assert (label[box.slices] == (mask == 1)[box.slices]).all()
        assert (valid[box.slices] == (mask != 255)[box.slices]).all()


def test_crops_of_a_large_image_are_those_of_a_small_one(tmp_path, monkeypatch):
    "The same seed, the same crop; balanced ones find the rare class, and nothing is kept."
    image, mask = scene()
    one = pair(tmp_path, image, mask)
    options = dict(scale=(0.8, 1.25), augment=None)
    small = ImageDataset([one], TWO, (64, 64), balance=0.0, **options)
    whole = [small.item(0, seed) for seed in range(5)]
    monkeypatch.setattr(windows, "HUGE", 5000)
    monkeypatch.setattr("dinolab.data.pixels.HUGE", 5000)
    parts = ImageDataset([one], TWO, (64, 64), balance=0.0, **options)
    for seed, expected in enumerate(whole):
        got = parts.item(0, seed)
        assert all((got[k] == expected[k]).all() for k in ("image", "target", "mask"))
    assert parts._bytes == 0 and small._bytes == image.nbytes + 2 * mask.nbytes
    balanced = ImageDataset([one], TWO, (32, 32), balance=1.0, scale=(1, 1), augment=None)
    found = np.mean([bool(balanced.item(0, seed)["target"].any()) for seed in range(60)])
    assert 0.3 < found < 0.8


def test_places_of_classes(tmp_path, large, monkeypatch):
    image, mask = scene()
    monkeypatch.setattr(
        windows, "pieces", lambda shape, most: [Box((0, 0), (102, 220)), Box((102, 0), (150, 220))]
    )
    _, label, valid = open_pair(pair(tmp_path, image, mask), TWO)
    places = ClassPlaces(label, valid)
    drawn = [places.draw(1, rng(seed)) for seed in range(200)]
    assert places.present == [0, 1] and all(mask[p] == 1 for p in drawn)
    assert len(set(drawn)) > 15 and 0.3 < np.mean([y < 102 for y, _ in drawn]) < 0.7
    assert all(mask[places.draw(0, rng(seed))] == 0 for seed in range(50))


def test_large_pairs_are_checked_and_validated_in_pieces(tmp_path, large):
    image, mask = scene()
    one = pair(tmp_path, image, mask)
    assert count_labels([one], TWO).tolist() == [[int((mask == 0).sum()), 20]]
    parts = list(pair_pieces(one, TWO, 3, side=64))
    assert len(parts) == 3 * 4 and sum(part[1].size for part in parts) == mask.size
    assert sum(int(label[valid].sum()) for _, label, valid in parts) == 20
    tifffile.imwrite(tmp_path / "m.tif", mask[:, :-1])
    assert "is 150 x 220, its mask" in check_pairs([one], TWO)[0].problem
    tifffile.imwrite(tmp_path / "m.tif", np.ascontiguousarray(mask.T))
    assert "one of them may lie on its side" in check_pairs([one], TWO)[0].problem
    tifffile.imwrite(tmp_path / "m.tif", mask + (mask == 0) * np.uint8(9))
    assert "value 9" in check_pairs([one], TWO)[0].problem


class Shift(nn.Module):
    "A pixel's class from its values alone."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * torch.cat([x, 1 - x[:, :1]], 1)


@pytest.mark.parametrize(
    "tile,overlap", [((64, 64), 0.5), ((40, 300), 0.25), ((300, 300), 0.5), ((33, 17), 0.9)]
)
def test_prediction_of_an_open_image(tmp_path, large, tile, overlap):
    "From the file tile by tile, as from an array."
    image, mask = scene()
    one = pair(tmp_path, image, mask)
    got, p = predict_image(Shift(), open_image(one.image, 3), tile, overlap, probabilities=True)
    whole = Shift()(torch.from_numpy(read_image(one.image, 3))[None])[0]
    assert (got == whole.argmax(0).numpy()).mean() > 0.999
    assert np.abs(p / 255 - whole.softmax(0).detach().numpy()).max() < 0.003
    again = predict_image(Shift(), read_image(one.image, 3), tile, overlap)[0]
    assert (again == got).all()


def test_memory_of_a_large_image(tmp_path):
    "Crops of an image of 1.2 GB in floats, in less than a fifth of that."
    tile = rng().integers(0, 256, (512, 512, 3), np.uint8)
    tiles = lambda part: (part for _ in range(20 * 20))
    options = dict(tile=(512, 512), compression="zlib")
    tifffile.imwrite(
        tmp_path / "i.tif", tiles(tile), shape=(10240, 10240, 3), dtype="u1", photometric="rgb", **options
    )
    tifffile.imwrite(
        tmp_path / "m.tif", tiles(tile[..., 0] // 128), shape=(10240, 10240), dtype="u1", **options
    )
    code = """
import sys
from dinolab.core.machine import memory_mb, reset_peak_memory
from dinolab.data.classes import Classes
from dinolab.data.images import ImageDataset, ImagePair
before = memory_mb()[1]
crops = ImageDataset([ImagePair("x", "i.tif", "m.tif")], Classes(("a", "b")), (512, 512), augment=None)
for seed in range(8):
    crops.item(0, seed)
print(memory_mb()[1] - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert float(done.stdout) < 250


@pytest.mark.parametrize("size", [(75, 110), (64, 64), (300, 10), (1, 1), (150, 220)])
def test_nearest_pixels_are_those_of_torch(size):
    pixels = rng().integers(0, 99, (150, 220))
    x = torch.from_numpy(pixels)[None, None].double()
    expected = torch.nn.functional.interpolate(x, size=size, mode="nearest-exact")[0, 0].numpy()
    assert (nearest_pixels(pixels, size) == expected).all()


def test_masks_are_made_small_before_they_are_read(tmp_path):
    image, mask = scene()
    one = pair(tmp_path, image, mask)
    got = read_scaled(one, TWO, (64, 64), 3)
    whole, label, valid = open_pair(one, TWO, 3)
    for a, b in zip(got, scaled(whole.read()[0], label, valid, (64, 64))):
        assert (a == b).all()
    assert read_mask_at(one.mask, TWO, (10, 20))[2] == (150, 220)


def test_nodata_of_the_image_does_not_count(tmp_path, monkeypatch):
    image, mask = scene()
    image[20:40, 50:60] = 0
    nodata = [(42113, 2, 2, "0", True)]
    one = pair(tmp_path, image, mask, extratags=nodata)
    for size in (10**9, 5000):
        monkeypatch.setattr(windows, "HUGE", size)
        _, label, valid = open_pair(one, TWO)
        assert not valid[20:40, 50:60].any() and valid[40:60, 50:60].all()
    assert count_labels([one], TWO).sum() == (mask != 255).sum() - 200
    assert not read_scaled(one, TWO, (150, 220), 3)[2][20:40, 50:60].any()


def test_white_of_a_data_set(tmp_path):
    "Twelve bits in sixteen: one white for all, whatever each image holds."
    for i, top in enumerate((3000, 200)):
        tifffile.imwrite(tmp_path / f"{i}.tif", np.full((40, 48), top, np.uint16))
    tifffile.imwrite(tmp_path / "m.tif", np.zeros((40, 48), np.uint8))
    from dinolab.data.images import ImagePair

    pairs = [ImagePair(str(i), str(tmp_path / f"{i}.tif"), str(tmp_path / "m.tif")) for i in range(2)]
    kept = tmp_path / "checked.json"
    for _ in range(2):  # the second time from what was remembered
        found = check_pairs(pairs, TWO, 1, remember=kept)
        assert [one.values for one in found] == [
            Values("uint16", 3000, 3000, False),
            Values("uint16", 200, 200, False),
        ]
        assert white_of([one.values for one in found]) == 4095
    tifffile.imwrite(tmp_path / "1.tif", np.full((40, 48), -200, np.int16))
    found = check_pairs(pairs, TWO, 1)
    with pytest.raises(
        InputError, match="2 of 2 images hold int16 and uint16 from -200 to 3000.*scaling=percentile"
    ):
        white_of([one.values for one in found])


@pytest.mark.parametrize(
    "high,white", [(1, 255), (255, 255), (256, 511), (4095, 4095), (16383, 16383), (16384, None)]
)
def test_the_smallest_white_that_holds_all(high, white):
    assert white_of([Values("uint16", 0, high, False)]) == white


@pytest.mark.parametrize("scaling", ["percentile", "meanstd"])
def test_bands_of_different_scales(tmp_path, scaling):
    "A hundred bands, each by its own numbers, in NumPy's words."
    scale, shift = 10.0 ** rng(1).integers(-3, 6, 100), rng(2).normal(0, 1e4, 100)
    values = (rng().normal(size=(60, 50, 100)) * scale + shift).astype(np.float64)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", planarconfig="contig")
    found = band_range([tmp_path / "x.tif"], scaling)
    flat = values.reshape(-1, 100)
    if scaling == "percentile":
        low, high = np.percentile(flat, (0.5, 99.5), 0)
    else:
        low, high = flat.mean(0) - 2 * flat.std(0), flat.mean(0) + 2 * flat.std(0)
    assert np.allclose(found.low, low) and np.allclose(found.high, high)
    got = read_image(tmp_path / "x.tif", white=found)
    expected = ((values - low) / (high - low)).transpose(2, 0, 1)
    expected = expected.clip(0, 1) if scaling == "percentile" else expected
    assert np.abs(got - expected).max() < 1e-5
    assert as_range(plain_range(found)) == found and as_range(plain_range(7.0)) == 7.0


def test_ranges_that_cannot_be_measured(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9), np.float32))
    tifffile.imwrite(tmp_path / "b.tif", np.full((9, 9), np.nan, np.float32))
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((9, 9, 3), np.uint8), photometric="rgb")
    assert not read_image(tmp_path / "a.tif", white=band_range([tmp_path / "a.tif"])).any()
    with pytest.raises(InputError, match="not finite"):
        band_range([tmp_path / "a.tif", tmp_path / "b.tif"])
    with pytest.raises(InputError, match="1 and 3 bands"):
        band_range([tmp_path / "a.tif", tmp_path / "c.tif"])
    with pytest.raises(InputError, match="scaling"):
        band_range([tmp_path / "a.tif"], "minmax")


@pytest.mark.parametrize("kind", ["north", "turned", "degrees"])
def test_georeference_as_rasterio_reads_it(tmp_path, kind):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import Affine, from_origin

    place = dict(
        north=("EPSG:32633", from_origin(399_999.75, 5_800_000.5, 0.5, 0.25)),
        turned=("EPSG:3857", Affine(0.4, 0.3, 1e6, 0.3, -0.4, 6e6)),
        degrees=("EPSG:4326", from_origin(13.1, 52.6, 1e-4, 1e-4)),
    )
    crs, transform = place[kind]
    options = dict(
        driver="GTiff", height=300, width=280, count=1, dtype="uint8", crs=crs, transform=transform
    )
    with rasterio.open(tmp_path / "i.tif", "w", **options) as f:
        f.write(rng().integers(0, 255, (1, 300, 280), np.uint8))
    labels = rng(1).integers(0, 3, (300, 280)).astype(np.uint8)
    write_geotiff(
        tmp_path / "m.tif", labels, georeference(tmp_path / "i.tif"), ["#000000", "#ff0000", "#00ff00"], 255
    )
    with rasterio.open(tmp_path / "i.tif") as a, rasterio.open(tmp_path / "m.tif") as b:
        assert a.crs == b.crs and a.transform.almost_equals(b.transform) and b.nodata == 255
        assert (b.read(1) == labels).all() and b.colormap(1)[1][:3] == (255, 0, 0)


def test_world_files_as_rasterio_reads_them(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "x.pgw").write_text("0.4\n0.3\n0.3\n-0.4\n1000000.5\n6000000.25\n")
    write_geotiff(tmp_path / "m.tif", np.zeros((30, 40), np.uint8), georeference(tmp_path / "x.png"))
    with rasterio.open(tmp_path / "x.png") as a, rasterio.open(tmp_path / "m.tif") as b:
        assert a.transform.almost_equals(b.transform)


def test_images_that_are_nowhere(tmp_path):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "x.png")
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((30, 40), np.uint8))
    assert georeference(tmp_path / "x.png") is None and georeference(tmp_path / "x.tif") is None
    assert Range((0,), (255,)).beyond == "refuse"


@pytest.mark.parametrize("scaling,bands", [("white", 3), ("percentile", 5)])
def test_from_placed_images_to_placed_masks(tmp_path, scaling, bands):
    "Sensor values of 12 bits, or five bands of floats: what is white is kept with the network, and masks lie where images lie."
    from dinolab.data.geotiff import DOUBLE, SHORT, Georeference
    from dinolab.tasks.images import predict_images, train_segmenter
    from dinolab.train.settings import TrainArgs

    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)
    place = Georeference(
        (
            (33550, DOUBLE, (2.0, 2.0, 0.0)),
            (33922, DOUBLE, (0.0, 0.0, 0.0, 400000.0, 5800000.0, 0.0)),
            (34735, SHORT, keys),
        )
    )
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(4):
        mask = np.kron(rng(i).integers(0, 2, (6, 7)), np.ones((16, 16))).astype(np.uint8)
        sensor = (1000 + 2000.0 * mask + rng(i).integers(0, 900, mask.shape)).astype(np.uint16)
        if scaling == "percentile":
            sensor = sensor.astype(np.float32) - 1e5
        tags = [(code, kind, len(values), values, True) for code, kind, values in place.tags]
        tifffile.imwrite(
            tmp_path / f"images/{i}.tif",
            np.dstack([sensor] * bands),
            photometric="minisblack",
            planarconfig="contig",
            extratags=tags,
        )
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    args = TrainArgs(epochs=2, batch_size=2, monitor="mean_iou", mode="max", lr=3e-3, device="cpu")
    done = train_segmenter(
        tmp_path / "images",
        tmp_path / "masks",
        backbone="resnet10t",
        head="linear",
        neck="none",
        crop=64,
        scale=(1, 1),
        crops_per_epoch=8,
        in_channels=bands,
        scaling=scaling,
        train=args,
        out=tmp_path / "runs",
    )
    white = done.white
    if scaling == "white":
        assert white == 4095
    else:
        assert len(white.low) == bands and -1e5 < white.low[0] < white.high[0] < -9e4
    x = done.open(tmp_path / "images/0.tif")[:]
    assert 0 <= x.min() < 0.3 and 0.7 < x.max() <= 1
    predict_images(done.run.path, tmp_path / "images", tmp_path / "found")
    for i in range(4):
        got = tifffile.imread(tmp_path / f"found/geotiff/{i}.tif")
        assert (got == np.asarray(Image.open(tmp_path / f"found/{i}.png"))).all() and got.shape == (96, 112)
        assert georeference(tmp_path / f"found/geotiff/{i}.tif") == place
    again = pair_folders(tmp_path / "images", tmp_path / "found")
    assert [one.mask for one in again.pairs] == [str(tmp_path / f"found/{i}.png") for i in range(4)]


def test_placed_results_are_kept_whole(tmp_path):
    "A GeoTIFF that is missing is made again; values beyond 16 bits and probabilities lie where the image lies."
    from dinolab.data.geotiff import DOUBLE, SHORT, Georeference
    from dinolab.tasks.images import predict_images, train_segmenter
    from dinolab.train.settings import TrainArgs

    place = Georeference(
        (
            (33550, DOUBLE, (2.0, 2.0, 0.0)),
            (33922, DOUBLE, (0.0, 0, 0, 4e5, 5e6, 0)),
            (34735, SHORT, (1, 1, 0, 1, 1025, 0, 1, 1)),
        )
    )
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(2):
        mask = np.kron(rng(i).integers(0, 2, (2, 3)), np.ones((16, 16))).astype(np.int32)
        image = np.repeat((50 + 100 * mask)[..., None], 3, 2).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"images/{i}.tif", image, photometric="rgb", extratags=place.extratags())
        tifffile.imwrite(tmp_path / f"masks/{i}.tif", mask * 100000)
    args = TrainArgs(epochs=1, batch_size=2, monitor="mean_iou", mode="max", lr=3e-3, device="cpu")
    options = dict(backbone="resnet10t", head="linear", neck="none", crop=32, crops_per_epoch=2)
    options |= dict(holdout=0.0, train=args, out=tmp_path / "runs")
    options |= dict(classes={0: "ground", 100000: "roof"})
    done = train_segmenter(tmp_path / "images", tmp_path / "masks", **options)
    out = tmp_path / "found"
    given = dict(probabilities=True, probability_format="tiff8", overlays=False)
    found = predict_images(done.run.path, tmp_path / "images", out, **given)
    assert sorted(found.values()) == [str(out / f"{i}.tif") for i in range(2)]
    for name in ("0.tif", "1.tif", "0_probabilities.tif"):
        assert georeference(out / name) == place
    assert set(np.unique(tifffile.imread(out / "0.tif"))) <= {0, 100000}

    options["classes"] = ["ground", "roof"]
    for i in range(2):
        Image.fromarray((tifffile.imread(tmp_path / f"masks/{i}.tif") > 0).astype(np.uint8)).save(
            tmp_path / f"masks/{i}.png"
        )
        (tmp_path / f"masks/{i}.tif").unlink()
    done = train_segmenter(tmp_path / "images", tmp_path / "masks", **options)
    out = tmp_path / "small"
    predict_images(done.run.path, tmp_path / "images", out)
    lost, kept = out / "geotiff/0.tif", out / "geotiff/1.tif"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    predict_images(done.run.path, tmp_path / "images", out)
    assert georeference(lost) == place and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("value", [0, 1, 200, 255])
def test_a_class_counts_whatever_gdal_calls_it(tmp_path, monkeypatch, value):
    "Masks made by gdal_rasterize say that 0 is nodata; a value of a class is a class, in small and in large masks."
    image, mask = scene()
    mask[:7, :9] = 255
    one = pair(tmp_path, image, mask)
    tags = [(42113, 2, len(str(value)) + 1, str(value), True)]
    tifffile.imwrite(one.mask, mask, extratags=tags)
    label, valid = read_mask(one.mask, TWO)
    assert (valid == (mask != 255)).all()
    monkeypatch.setattr("dinolab.data.windows.HUGE", 100)
    monkeypatch.setattr("dinolab.data.windows.pieces", lambda shape: pieces(shape, 4000))
    for got in (read_labels(one.mask, TWO), [part[0:150, 0:220] for part in open_pair(one, TWO, 3)[1:]]):
        assert (got[0] == label).all() and (got[1] == valid).all() and got[0].dtype == label.dtype

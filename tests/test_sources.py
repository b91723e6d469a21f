"Sources of volumes, each written by its own library: values, voxel size, origin, orientation."

import functools
import http.server
import json
import pickle
import threading
import warnings

import h5py
import mrcfile
import nibabel as nib
import numpy as np
import imagecodecs
import pytest
from PIL import Image
import tifffile
import zarr

from dinolab.core.errors import InputError, MissingError
from dinolab.features.cases import open_case
from dinolab.volumes.sources import open_levels, open_volume
from dinolab.volumes.write import write_multiscale

ts = pytest.importorskip("tensorstore")


def values(*shape, dtype="uint8", seed=0):
    return (np.random.default_rng(seed).random(shape) * 200).astype(dtype)


def refused(call, *words):
    "The message of an `InputError`, which is one line with these words."
    with pytest.raises(InputError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and len(text) < 700 and all(word in text for word in words), text
    return text


# ---- N5


GZIP = dict(type="gzip")


def write_n5(path, data, compression=GZIP, block=None, **attrs):
    "An N5 array by tensorstore; data in C order, so axes are reversed in its file."
    layout = dict(dimensions=list(data.shape[::-1]), blockSize=block or [16] * data.ndim)
    layout |= dict(dataType=str(data.dtype), compression=compression)
    spec = dict(driver="n5", kvstore=dict(driver="file", path=str(path)), metadata=layout)
    ts.open(spec, create=True).result()[...] = data.T
    file = path / "attributes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | attrs))


def nm(*xyz):
    return dict(dimensions=list(xyz), unit="nm")


BLOSC = dict(type="blosc", cname="lz4", clevel=5, shuffle=1, blocksize=0)
ZLIB = dict(type="gzip", useZlib=True)
PACKED = [dict(type="raw"), GZIP, ZLIB, dict(type="bzip2"), dict(type="xz"), dict(type="zstd"), BLOSC]


@pytest.mark.parametrize("dtype", ("uint8", "uint16", "int64", "float32"))
@pytest.mark.parametrize("compression", PACKED, ids=str)
def test_n5_values(tmp_path, compression, dtype):
    data = values(33, 20, 41, dtype=dtype)
    write_n5(tmp_path / "a.n5/em", data, compression, [16, 7, 16], pixelResolution=nm(4, 6, 40))
    volume = open_volume(tmp_path / "a.n5/em")
    assert volume.voxel_size == (40, 6, 4) and volume.dtype == dtype and volume.dtype.isnative
    np.testing.assert_array_equal(volume.read(), data)
    np.testing.assert_array_equal(volume.read(np.s_[15:20, 6:9, 30:41]), data[15:20, 6:9, 30:41])


FACTORS = ([1, 1, 1], [2, 2, 1], [4, 4, 2])
HABITS = dict(
    of_the_full_image=lambda f: dict(pixelResolution=nm(4, 4, 40), downsamplingFactors=f),
    of_each_level=lambda f: dict(
        pixelResolution=nm(*np.multiply([4, 4, 40], f).tolist()), downsamplingFactors=f
    ),
    scales_of_the_group=lambda f: {},
    factors_of_each_level=lambda f: dict(downsamplingFactors=f),
)


@pytest.mark.parametrize("habit", HABITS)
def test_n5_pyramids(tmp_path, habit):
    group = tmp_path / "a.n5/em"
    for i, f in enumerate(FACTORS):
        write_n5(group / f"s{i}", values(64 // f[2], 64 // f[1], 64 // f[0]), **HABITS[habit](f))
    above = dict(pixelResolution=nm(4, 4, 40))
    above |= dict(scales=FACTORS) if habit == "scales_of_the_group" else {}
    if habit not in ("of_the_full_image", "of_each_level"):
        (group / "attributes.json").write_text(json.dumps(above))
    levels = open_levels(group).levels
    assert [v.voxel_size for v in levels] == [(40, 4, 4), (40, 8, 8), (80, 16, 16)]
    assert [v.origin for v in levels] == [(0, 0, 0), (0, 2, 2), (20, 6, 6)]  # one corner
    for i in range(3):
        alone = open_volume(group / f"s{i}")
        assert alone.grid == levels[i].grid


def test_n5_with_channels(tmp_path):
    data = values(3, 8, 9, 10)
    write_n5(tmp_path / "a.n5/em", data, pixelResolution=nm(4, 4, 40))
    refused(lambda: open_volume(tmp_path / "a.n5/em"), "channel=0..2")
    volume = open_volume(tmp_path / "a.n5/em", channel=2)
    assert volume.voxel_size == (40, 4, 4)
    np.testing.assert_array_equal(volume.read(), data[2])


def test_n5_elsewhere(tmp_path):
    "By fsspec, in memory and over http; groups and arrays."
    import fsspec

    data = values(20, 30, 40)
    group = tmp_path / "a.n5/em"
    write_n5(group / "s0", data, pixelResolution=nm(4, 4, 40), downsamplingFactors=[1, 1, 1])
    write_n5(group / "s1", data[::2, ::2, ::2], pixelResolution=nm(4, 4, 40), downsamplingFactors=[2, 2, 2])
    fsspec.filesystem("memory").put(str(tmp_path / "a.n5"), "/sources.n5", recursive=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    serve = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for place in ("memory://sources.n5/em", f"http://127.0.0.1:{server.server_port}/a.n5/em"):
            assert [v.voxel_size for v in open_levels(place).levels] == [(40, 4, 4), (80, 8, 8)]
            np.testing.assert_array_equal(open_volume(f"{place}/s0").read(), data)
        server.shutdown()


def test_n5_blank_and_damaged_blocks(tmp_path):
    path = tmp_path / "a.n5/em"
    write_n5(path, values(32, 32, 32) + 1, pixelResolution=nm(4, 4, 4))
    (path / "1/0/0").unlink()  # x 16..31
    assert not open_volume(path).read(np.s_[:16, :16, 16:]).any()
    refused(lambda: open_volume(path, missing="error").read(), "chunk (0, 0, 1) is missing")
    block = path / "0/1/0"
    block.write_bytes(block.read_bytes()[:60])
    refused(lambda: open_volume(path).read(), "chunk (0, 1, 0) cannot be decoded")


def test_what_is_n5(tmp_path):
    "What lies in a folder decides, not what it is called."
    for folder in ("x.n5_export", "y.n5"):
        write_multiscale(tmp_path / folder / "a.zarr", values(8, 8, 8), voxel_size=8, levels=2)
        assert open_volume(tmp_path / folder / "a.zarr/s1").voxel_size == (16, 16, 16)
        assert len(open_levels(tmp_path / folder / "a.zarr").levels) == 2
    write_n5(tmp_path / "export/em", values(8, 8, 8), pixelResolution=nm(4, 4, 4))
    assert open_volume(tmp_path / "export/em").voxel_size == (4, 4, 4)
    write_n5(tmp_path / "export/labels", values(8, 8, 8), pixelResolution=nm(4, 4, 4))
    (tmp_path / "export/attributes.json").write_text('{"n5": "2.5.1"}')
    refused(lambda: open_levels(tmp_path / "export"), "open one of its arrays: em, labels")
    with pytest.raises(MissingError):
        open_volume(tmp_path / "export/none")


# ---- NIfTI: the world decides


SIZE = np.array([2.0, 3.0, 4.0])  # mm, x y z


def nifti(path, data, turn=np.eye(3), origin=(10.0, -20.0, 30.0), unit="mm"):
    "A NIfTI file of x y z data, whose axes run along the columns of `turn`."
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * SIZE, origin
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return image


TURNS = [
    nib.orientations.axcodes2ornt(codes) for codes in ("RAS", "LAS", "LPS", "RPI", "PIR", "SAR", "ILP", "ASL")
]


@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_labels_in_any_orientation_lie_where_the_room_says(tmp_path, turn):
    "nibabel turns the labels; they are the labels of the raw volume again."
    raw, labels = values(9, 8, 7), values(9, 8, 7, seed=1) // 50
    nifti(tmp_path / "raw.nii", raw)
    image = nifti(tmp_path / "labels.nii", labels)
    nib.save(image.as_reoriented(TURNS[turn]), tmp_path / "labels.nii.gz")
    assert turn == 0 or nib.load(tmp_path / "labels.nii.gz").shape != (9, 8, 7) or turn < 4
    case = open_case("turned", tmp_path / "raw.nii", tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(case.labels.read(), labels.T)
    np.testing.assert_array_equal(case.labels.read(np.s_[1:3, 2:7, 4:5]), labels.T[1:3, 2:7, 4:5])
    np.testing.assert_array_equal(case.raw.read(), raw.T)
    assert np.allclose(case.grid.origin, case.raw.origin) and case.grid.shape == case.raw.shape


def test_mirrored_labels_are_refused(tmp_path):
    "An affine that was changed without turning the voxels puts the labels elsewhere."
    nifti(tmp_path / "raw.nii", values(9, 8, 7))
    nifti(tmp_path / "labels.nii", values(9, 8, 7) // 50, np.diag([-1, 1, 1]))
    refused(lambda: open_case("m", tmp_path / "raw.nii", tmp_path / "labels.nii"), "outside the raw volume")


def test_oblique_labels(tmp_path):
    "Alike they lie on each other, askew they are refused."
    c, s = np.cos(0.2), np.sin(0.2)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    nifti(tmp_path / "raw.nii", values(9, 8, 7), turn)
    image = nifti(tmp_path / "labels.nii", values(9, 8, 7) // 50, turn)
    nib.save(image.as_reoriented(TURNS[4]), tmp_path / "turned.nii")
    for name in ("labels.nii", "turned.nii"):
        found = open_case("o", tmp_path / "raw.nii", tmp_path / name).labels.read()
        np.testing.assert_array_equal(found, (values(9, 8, 7) // 50).T)
    nifti(tmp_path / "straight.nii", values(9, 8, 7) // 50)
    message = refused(lambda: open_case("o", tmp_path / "raw.nii", tmp_path / "straight.nii"), "oblique")
    assert "resample" in message


def test_labels_stored_as_floats(tmp_path):
    nifti(tmp_path / "raw.nii", values(9, 8, 7))
    labels = values(9, 8, 7) // 50
    nifti(tmp_path / "labels.nii", labels.astype("float32"))
    case = open_case("f", tmp_path / "raw.nii", tmp_path / "labels.nii")
    assert case.labels.dtype.kind in "iu"
    np.testing.assert_array_equal(case.labels.read(), labels.T)
    for odd in (0.5, np.nan):
        wrong = labels.astype("float32")
        wrong[8, 7, 6] = odd
        nifti(tmp_path / "wrong.nii", wrong)
        refused(
            lambda: open_case("f", tmp_path / "raw.nii", tmp_path / "wrong.nii").labels.read(),
            "expected whole numbers",
        )


def test_nifti_without_a_unit_is_in_millimetres_and_says_so(tmp_path):
    nifti(tmp_path / "a.nii", values(9, 8, 7), unit="unknown")
    with pytest.warns(UserWarning, match="unit mm assumed"):
        assert open_volume(tmp_path / "a.nii").voxel_size == (4e6, 3e6, 2e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_volume(tmp_path / "a.nii", unit="um").voxel_size == (4e3, 3e3, 2e3)


# ---- TIFF


STACK = values(5, 11, 13)
LENGTHS = [
    ("micron", 1e3), ("microns", 1e3), ("um", 1e3), ("\\u00B5m", 1e3), ("nm", 1), ("mm", 1e6), ("cm", 1e7),
    ("inch", 2.54e7), ("pixel", None), ("pixels", None), ("sec", None),
]  # fmt: skip


@pytest.mark.parametrize("unit, length", LENGTHS)
def test_units_of_imagej(tmp_path, unit, length):
    resolution = (1 / 0.25, 1 / 0.5)
    meta = dict(axes="ZYX", spacing=1.5, unit=unit)
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, resolution=resolution, metadata=meta)
    if length is None:
        refused(lambda: open_volume(tmp_path / "a.tif"), f"z 1.5 {unit}", "no length", "voxel_size")
        length = 1e3
        volume = open_volume(tmp_path / "a.tif", unit="um")
    else:
        volume = open_volume(tmp_path / "a.tif")
    np.testing.assert_allclose(volume.voxel_size, np.array([1.5, 0.5, 0.25]) * length)
    np.testing.assert_array_equal(volume.read(), STACK)


def test_units_of_single_axes_and_of_tifffile(tmp_path):
    "ImageJ's zunit and yunit; the description that tifffile itself writes."
    path = tmp_path / "a.tif"
    meta = dict(axes="ZYX", spacing=40.0, unit="um", zunit="nm")
    tifffile.imwrite(path, STACK, imagej=True, resolution=(125, 125), metadata=meta)
    np.testing.assert_allclose(open_volume(path).voxel_size, (40, 8, 8))
    meta = dict(axes="ZYX", spacing=0.04, unit="um")
    tifffile.imwrite(path, STACK, resolution=(125, 125), metadata=meta)
    np.testing.assert_allclose(open_volume(path).voxel_size, (40, 8, 8))


def test_series_of_ome_tiff(tmp_path):
    "Each image has its own axes, values and voxel size."
    path = tmp_path / "a.ome.tif"
    second = values(3, 4, 7, 9, dtype="uint16")
    with tifffile.TiffWriter(path, ome=True) as tif:
        meta = dict(
            axes="ZYX", PhysicalSizeX=8, PhysicalSizeXUnit="nm", PhysicalSizeY=0.008, PhysicalSizeZ=0.04
        )
        tif.write(STACK, metadata=meta)
        meta = dict(
            axes="CZYX", PhysicalSizeX=16, PhysicalSizeXUnit="Å", PhysicalSizeY=0.002, PhysicalSizeZ=1e-5
        )
        tif.write(second, metadata=meta | dict(PhysicalSizeZUnit="mm"), photometric="minisblack")
    with pytest.warns(UserWarning, match="first of 2 images"):
        np.testing.assert_allclose(open_volume(path).voxel_size, (40, 8, 8))
    volume = open_volume(path, series=1, channel=2)
    np.testing.assert_allclose(volume.voxel_size, (10, 2, 1.6))
    np.testing.assert_array_equal(volume.read(), second[2])
    refused(lambda: open_volume(path, series=2), "no series 2", "1: czyx (3, 4, 7, 9)")
    refused(lambda: open_volume(path, series=True), "no series True")


# ---- HDF5


@pytest.fixture
def cremi(tmp_path):
    "A file in the manner of the CREMI challenge."
    path = tmp_path / "sample.hdf"
    with h5py.File(path, "w") as f:
        raw = f.create_dataset("volumes/raw", data=values(6, 20, 30), chunks=(2, 8, 8), compression="gzip")
        ids = f.create_dataset("volumes/labels/ids", data=values(2, 10, 12, dtype="uint64"))
        raw.attrs["resolution"] = ids.attrs["resolution"] = (40.0, 4.0, 4.0)
        ids.attrs["offset"] = (80.0, 20.0, 32.0)
        f.create_dataset("annotations/ids", data=np.arange(9))
    return path


def test_cremi(cremi):
    refused(lambda: open_volume(cremi), "holds 2 arrays", "dataset=NAME", "volumes/raw (6, 20, 30) uint8")
    raw, ids = open_volume(f"{cremi}/volumes/raw"), open_volume(cremi, dataset="volumes/labels")
    np.testing.assert_array_equal(raw.read(np.s_[1:3, 5:9, 2:30]), values(6, 20, 30)[1:3, 5:9, 2:30])
    assert raw.voxel_size == ids.voxel_size == (40, 4, 4) and ids.dtype == "uint64"
    assert raw.grid.corner == (0, 0, 0) and ids.grid.corner == (80, 20, 32)
    assert np.subtract(ids.origin, raw.origin).tolist() == [80, 20, 32]
    case = open_case("cremi", raw, ids)
    np.testing.assert_allclose(case.image(np.s_[0:2, 0:10, 0:12]).shape, (2, 10, 12))
    np.testing.assert_array_equal(case.raw.sample(case.grid, "nearest"), values(6, 20, 30)[2:4, 5:15, 8:20])
    assert len(pickle.dumps(raw)) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(raw)).read(), raw.read())
    for wrong in ("volumes/none", "volumes", "annotations/none"):
        refused(lambda: open_volume(cremi, dataset=wrong), "expected one of volumes")


STATED = {
    "element_size_um": (dict(element_size_um=[0.03, 0.008, 0.009]), (30, 8, 9)),
    "voxel_size": (dict(voxel_size=[30, 8, 9]), (30, 8, 9)),
    "units": (dict(resolution=[0.03, 0.008, 0.009], units=["um"] * 3), (30, 8, 9)),
    "single unit": (dict(resolution=[0.03, 0.008, 0.009], unit="micrometer"), (30, 8, 9)),
}


@pytest.mark.parametrize("words", STATED)
@pytest.mark.parametrize("place", ("array", "group", "file"))
def test_words_of_hdf5(tmp_path, words, place):
    attrs, size = STATED[words]
    with h5py.File(tmp_path / "a.h5", "w") as f:
        array = f.create_dataset("group/main", data=values(4, 5, 6))
        dict(array=array, group=f["group"], file=f)[place].attrs.update(attrs)
    volume = open_volume(tmp_path / "a.h5")
    np.testing.assert_allclose(volume.voxel_size, size)
    np.testing.assert_array_equal(volume.read(), values(4, 5, 6))
    np.testing.assert_allclose(open_volume(tmp_path / "a.h5", voxel_size=(9, 8, 7)).voxel_size, (9, 8, 7))


def test_axes_of_hdf5(tmp_path):
    "ilastik's axistags, labels of dimensions, axis_names, and what the user says."
    path, data = tmp_path / "a.h5", values(2, 4, 5, 6, 3)
    tags = [dict(key=k, typeFlags=1, resolution=0, description="") for k in "tzyxc"]
    with h5py.File(path, "w") as f:
        f.create_dataset("exported_data", data=data).attrs["axistags"] = json.dumps(dict(axes=tags))
    refused(lambda: open_volume(path, time=1, channel=2), "does not state its voxel size")
    volume = open_volume(path, time=1, channel=2, voxel_size=8)
    np.testing.assert_array_equal(volume.read(), data[1, ..., 2])
    path = tmp_path / "b.h5"
    with h5py.File(path, "w") as f:
        array = f.create_dataset("a", data=data[0, ..., 0])
        for dimension, label in zip(array.dims, "xyz"):
            dimension.label = label
    np.testing.assert_array_equal(open_volume(path, voxel_size=8).read(), data[0, ..., 0].T)
    path = tmp_path / "c.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("a", data=data[0]).attrs.update(
            dict(axis_names=["z", "y", "x", "c^"], voxel_size=[8, 4, 2])
        )
    assert open_volume(path, channel=1).voxel_size == (8, 4, 2)
    np.testing.assert_array_equal(open_volume(path, channel=1).read(), data[0, ..., 1])
    np.testing.assert_array_equal(open_volume(path, channel=1, axes="xyzc").read(), data[0, ..., 1].T)


WRONG = {
    "size": dict(resolution=[40, 4]),
    "text": dict(resolution="forty"),
    "zero": dict(resolution=[0, 4, 4]),
    "nan": dict(resolution=[np.nan, 4, 4]),
    "huge": dict(resolution=[1e300, 4, 4]),
    "offset": dict(resolution=[40, 4, 4], offset=[1]),
    "unit": dict(resolution=[40, 4, 4], units=["parrot"] * 3),
    "tags": dict(axistags="{"),
    "no axes": dict(axistags="[]"),
    "element": dict(element_size_um=3.0),
    "element text": dict(element_size_um=["a", "b", "c"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_words_of_hdf5(tmp_path, wrong):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("a", data=values(4, 5, 6)).attrs.update(WRONG[wrong])
    refused(lambda: open_volume(tmp_path / "a.h5"))


def test_files_that_are_no_hdf5(tmp_path, cremi):
    whole = cremi.read_bytes()
    for n in (0, 100, len(whole) // 2):
        (tmp_path / "cut.h5").write_bytes(whole[:n])
        refused(lambda: open_volume(tmp_path / "cut.h5", dataset="volumes/raw").read())
    with pytest.raises(MissingError):
        open_volume(tmp_path / "none.h5/raw")
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["text"] = "words"
    refused(lambda: open_volume(tmp_path / "a.h5"), "no array of numbers")


# ---- MRC


@pytest.mark.parametrize("dtype", ("int8", "int16", "uint16", "float32", "float16"))
@pytest.mark.parametrize("packed", (None, "gzip", "bzip2"))
def test_mrc(tmp_path, dtype, packed):
    data = values(5, 6, 7, dtype="float32").astype(dtype)
    path = tmp_path / ("a.mrc" + {None: "", "gzip": ".gz", "bzip2": ".bz2"}[packed])
    with mrcfile.new(path, data=data, compression=packed) as f:
        f.voxel_size = (13.1, 13.2, 26.5)  # ångström, x y z
        f.header.origin = (10, 0, -20)
    volume = open_volume(path)
    np.testing.assert_allclose(volume.voxel_size, (2.65, 1.32, 1.31), rtol=1e-5)
    np.testing.assert_allclose(volume.origin, (-2, 0, 1))
    np.testing.assert_array_equal(volume.read(), mrcfile.read(path))
    assert volume.dtype == mrcfile.read(path).dtype
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(volume)).read(np.s_[1:2, 3:5, 0:7]), data[1:2, 3:5]
    )


def test_mrc_headers(tmp_path):
    path = tmp_path / "a.map"
    mrcfile.write(path, values(5, 6, 7, dtype="int16"))
    with mrcfile.open(path, "r+") as f:
        f.voxel_size = 0
    refused(lambda: open_volume(path), "does not state its voxel size", "cell is 0")
    assert open_volume(path, voxel_size=4).voxel_size == (4, 4, 4)
    with mrcfile.open(path, "r+") as f:
        f.voxel_size = 20
        f.header.nxstart, f.header.nzstart = 3, -2
    assert open_volume(path).origin == (-4, 0, 6)
    with mrcfile.mmap(path, "r+") as f:
        f.header.maps = 5
    refused(lambda: open_volume(path), "maps, mapr, mapc")
    whole = path.read_bytes()
    for n in (0, 500, 1024, len(whole) - 10):
        path.write_bytes(whole[:n])
        refused(lambda: open_volume(path))


# ---- precomputed


SHARDS = {
    "@type": "neuroglancer_uint64_sharded_v1",
    "preshift_bits": 1,
    "minishard_bits": 1,
    "shard_bits": 1,
    "hash": "identity",
}
ENCODINGS = dict(
    raw=("image", "uint8", dict(encoding="raw")),
    png=("image", "uint8", dict(encoding="png")),
    wide=("image", "uint16", dict(encoding="raw")),
    float=("image", "float32", dict(encoding="raw")),
    segments=("segmentation", "uint64", dict(encoding="compressed_segmentation", compressed_segmentation_block_size=[8] * 3)),
    sharded=("image", "uint8", dict(encoding="raw", sharding=SHARDS | dict(data_encoding="gzip"))),
    sharded_segments=("segmentation", "uint32", dict(encoding="raw", sharding=SHARDS)),
)  # fmt: skip


def write_precomputed(path, data, size, offset=(0, 0, 0), kind="image", **scale):
    "One scale by tensorstore; data z y x or c z y x, size and offset x y z."
    data = data if data.ndim == 4 else data[None]
    scale = (
        dict(
            size=list(data.shape[:0:-1]), resolution=list(size), chunk_size=[8] * 3, voxel_offset=list(offset)
        )
        | scale
    )
    about = dict(data_type=str(data.dtype), num_channels=len(data), type=kind)
    spec = dict(driver="neuroglancer_precomputed", kvstore=dict(driver="file", path=f"{path}/"))
    spec |= dict(scale_metadata=scale, multiscale_metadata=about)
    ts.open(spec, create=True).result()[...] = data.T


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_precomputed(tmp_path, encoding):
    kind, dtype, scale = ENCODINGS[encoding]
    data = values(12, 20, 30, dtype=dtype)
    write_precomputed(tmp_path / "em", data, (4, 5, 40), (7, -3, 100), kind, **scale)
    for place in (tmp_path / "em", f"precomputed://file://{tmp_path}/em"):
        volume = open_volume(place)
        assert volume.voxel_size == (40, 5, 4) and volume.dtype == dtype
        np.testing.assert_allclose(volume.grid.corner, (4000, -15, 28))
        np.testing.assert_array_equal(volume.read(), data)
        np.testing.assert_array_equal(volume.read(np.s_[3:9, 7:9, 1:30]), data[3:9, 7:9, 1:30])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume)).read(), data)


def test_precomputed_pyramids_and_channels(tmp_path):
    data = values(2, 8, 16, 32)
    for f in (1, 2):
        write_precomputed(
            tmp_path / "em", data[:, ::f, ::f, ::f], (4 * f, 4 * f, 40 * f), (8 // f,) * 3, encoding="raw"
        )
    refused(lambda: open_levels(tmp_path / "em"), "channel=0..1")
    levels = open_levels(tmp_path / "em", channel=1).levels
    assert [v.voxel_size for v in levels] == [(40, 4, 4), (80, 8, 8)]
    assert levels[0].grid.corner == levels[1].grid.corner == (320, 32, 32)
    np.testing.assert_array_equal(levels[1].read(), data[1, ::2, ::2, ::2])


@pytest.mark.parametrize("place", ("scales", "resolution", "size", "data_type", "chunk_sizes", "encoding"))
def test_wrong_info(tmp_path, place):
    write_precomputed(tmp_path / "em", values(4, 5, 6), (4, 4, 40), encoding="raw")
    file = tmp_path / "em/info"
    whole = json.loads(file.read_text())
    for value in (None, "x", -1, [], {}, [0, 0, 0], [1e400] * 3):
        wrong = json.loads(json.dumps(whole))
        (wrong if place in wrong else wrong["scales"][0])[place] = value
        file.write_text(json.dumps(wrong))
        refused(lambda: open_levels(tmp_path / "em"))
    for text in ("", "[]", "{", "[" * 100_000):
        file.write_text(text)
        refused(lambda: open_levels(tmp_path / "em"))


# ---- WEBKNOSSOS and funlib


def test_webknossos(tmp_path):
    "The layout of its zarr layers: c x y z, one array per magnification."
    data = values(12, 20, 32)  # z y x
    mags = []
    for f in ([1, 1, 1], [2, 2, 1]):
        name = "-".join(map(str, f)) if f != [1, 1, 1] else "1"
        part = data[:: f[2], :: f[1], :: f[0]].T[None]
        array = zarr.create_array(
            tmp_path / f"color/{name}", shape=part.shape, chunks=(1, 8, 8, 8), dtype="u1"
        )
        array[:] = part
        mags.append(dict(mag=f, path=f"./color/{name}"))
    layer = dict(name="color", category="color", dataFormat="zarr3", elementClass="uint8", mags=mags)
    about = dict(id=dict(name="demo", team=""), scale=dict(factor=[11.0, 12.0, 25.0], unit="nanometer"))
    file = tmp_path / "datasource-properties.json"
    file.write_text(json.dumps(about | dict(dataLayers=[layer, layer | dict(name="segments")])))
    refused(lambda: open_levels(tmp_path), "dataset=NAME, of color, segments")
    levels = open_levels(tmp_path, dataset="color").levels
    assert [v.voxel_size for v in levels] == [(25, 12, 11), (25, 24, 22)]
    assert levels[0].grid.corner == levels[1].grid.corner == (0, 0, 0)
    np.testing.assert_array_equal(levels[0].read(), data)
    np.testing.assert_array_equal(levels[1].read(), data[:, ::2, ::2])
    file.write_text(json.dumps(about | dict(scale=[11, 12, 25], dataLayers=[layer | dict(dataFormat="wkw")])))
    refused(lambda: open_levels(tmp_path), "expected zarr or zarr3")


@pytest.mark.parametrize("zarr_format", (2, 3))
def test_funlib(tmp_path, zarr_format):
    "voxel_size or resolution, offset, axis_names; raw and labels of two sizes begin at one corner."
    data = values(3, 8, 9, 10)
    group = zarr.create_group(tmp_path / "a.zarr", zarr_format=zarr_format)
    raw = group.create_array("volumes/raw", shape=data.shape, chunks=(1, 4, 4, 4), dtype="u1")
    raw[:] = data
    raw.attrs.update(dict(voxel_size=[40, 4, 8], offset=[400, 0, 16], axis_names=["c^", "z", "y", "x"]))
    ids = group.create_array("volumes/ids", shape=(4, 4, 5), chunks=(4, 4, 4), dtype="u8")
    ids.attrs.update(dict(resolution=[80, 8, 16], offset=[400, 0, 16]))
    volume = open_volume(tmp_path / "a.zarr/volumes/raw", channel=1)
    assert volume.voxel_size == (40, 4, 8)
    np.testing.assert_array_equal(volume.read(), data[1])
    labels = open_volume(tmp_path / "a.zarr", dataset="volumes/ids")
    assert labels.voxel_size == (80, 8, 16) and labels.grid.corner == volume.grid.corner == (400, 0, 16)
    refused(lambda: open_levels(tmp_path / "a.zarr"), "open one of its groups: volumes")
    refused(lambda: open_levels(tmp_path / "a.zarr/volumes"), "open one of its arrays: ids, raw")


# ---- the same options in every job


def test_reading_says_what_recipes_call_it(tmp_path):
    "A message names the setting that exists: raw.channel for raw volumes, labels.voxel_size for labels."
    from dinolab.tasks.configs import Reading
    from dinolab.tasks.volumes import given_cases

    tifffile.imwrite(tmp_path / "raw.tif", values(2, 5, 11, 13), photometric="minisblack")
    np.save(tmp_path / "labels.npy", values(5, 11, 13) // 50)
    paths = (tmp_path / "raw.tif", tmp_path / "labels.npy")
    read = lambda **reading: given_cases(*paths, reading={k: Reading(**r) for k, r in reading.items()})
    refused(read, "raw.axes=, 4 letters")
    refused(lambda: read(raw=dict(axes="czyx")), "give raw.voxel_size in nm")
    refused(lambda: read(raw=dict(voxel_size=8, axes="czyx")), "raw.channel=0..1")
    refused(lambda: read(raw=dict(voxel_size=8, axes="czyx", channel=1)), "give labels.voxel_size in nm")
    (case,) = read(raw=dict(voxel_size=8, axes="czyx", channel=1), labels=dict(voxel_size=8))
    np.testing.assert_array_equal(case.raw.read(), values(2, 5, 11, 13)[1])
    np.testing.assert_array_equal(case.labels.read(), values(5, 11, 13) // 50)


def test_keys_of_recipes(tmp_path, capsys):
    "On the command line, for training, evaluation and prediction."
    from dinolab.cli.recipes import known_keys

    options = ("voxel_size", "origin", "unit", "channel", "time", "series", "dataset", "axes", "missing")
    for command, roles in dict(
        train=("raw", "labels", "mask"), evaluate=("raw", "labels", "mask"), predict=("raw",)
    ).items():
        assert {f"{role}.{name}" for role in roles for name in options} <= set(known_keys(command))


def test_a_photograph_is_a_slice_as_it_is_shown(tmp_path):
    "Turned as it was held, inks as colours; colours of 16 bits are not reduced without a word."
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "held.png", exif=exif)
    shown = open_volume(tmp_path / "held.png", voxel_size=5, channel=0)
    assert np.array_equal(shown.read()[0], np.rot90(pixels[..., 0], -1))
    inks = Image.fromarray(pixels).convert("CMYK")
    inks.save(tmp_path / "inks.jpg")
    shown = open_volume(tmp_path / "inks.jpg", voxel_size=5, channel=1).read()[0]
    assert np.array_equal(shown, np.asarray(Image.open(tmp_path / "inks.jpg").convert("RGB"))[..., 1])
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(pixels.astype(np.uint16) << 8))
    with pytest.raises(InputError, match="colours of 16 bits: expected 8 bits.*save it as TIFF"):
        open_volume(tmp_path / "deep.png", voxel_size=5)

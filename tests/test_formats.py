"dinolab.volumes.formats against nibabel, tifffile and NumPy, on files written here."

import itertools
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import tifffile

from dinolab.core.errors import InputError
from dinolab.volumes.formats import UNIT_NM, LazyArray, read_nifti, read_tiff, to_nm


def random_key(rng, shape):
    "Any basic index: numbers, slices with any step, an ellipsis, or fewer entries than axes."

    def one(n):
        if rng.random() < 0.3:
            return int(rng.integers(-n, n))
        ends = [None if rng.random() < 0.3 else int(rng.integers(-n - 2, n + 3)) for _ in range(2)]
        return slice(*ends, int(rng.choice([1, 1, 2, -1, -2])))

    key = [one(n) for n in shape]
    at = int(rng.integers(0, len(key) + 1))
    if rng.random() < 0.3:
        return tuple(key[:at])
    if rng.random() < 0.3:
        return (*key[:at], ..., *key[min(at + 1, len(key)) :])
    return tuple(key)


def same(array, expected, times=40):
    "`array` is sliced like the NumPy array `expected`."
    assert array.shape == expected.shape
    rng = np.random.default_rng(0)
    for key in [random_key(rng, expected.shape) for _ in range(times)] + [...]:
        got = array[key]
        np.testing.assert_array_equal(got, expected[key], err_msg=str(key))
        assert got.dtype == array.dtype and got.dtype.isnative and (not got.ndim or got.flags.writeable)


def values(shape, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 9 + 100).astype(dtype)


# units


def test_every_length_unit_of_ome_ngff():
    axis = pytest.importorskip("yaozarrs.v04").SpaceAxis
    names = re.findall("'([a-z]+)'", str(axis.model_fields["unit"].annotation))
    assert {"angstrom", "micrometer", "parsec"} <= set(names) <= set(UNIT_NM)


@pytest.mark.parametrize(
    "unit, metres",
    [
        ("angstrom", 1e-10),
        ("foot", 0.3048),
        ("yard", 0.9144),
        ("mile", 1609.344),
        ("parsec", 3.0856775814913673e16),
        ("kilometer", 1e3),
        ("picometer", 1e-12),
        ("\u212b", 1e-10),
        ("in", 0.0254),
    ],
)
def test_units_in_metres(unit, metres):
    assert to_nm(1, unit) == pytest.approx(metres * 1e9)


@pytest.mark.parametrize("unit", ["", None, "pixel", "second", "lightyear", 3])
def test_unknown_unit(unit):
    with pytest.raises(InputError, match="unknown length unit"):
        to_nm(1, unit)


# lazy arrays


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_lazy_array_is_a_transposed_array(order):
    data = values((5, 6, 7), ">f4")
    same(LazyArray(data, order), data.transpose(order), times=200)
    with pytest.raises(IndexError):
        LazyArray(data, order)[9]
    with pytest.raises(IndexError):
        LazyArray(data, order)[0, 0, 0, 0]


# NIfTI


def save_nifti(path, array, affine=np.diag([2, 3, 4, 1.0]), unit="mm", kind=nib.Nifti1Image):
    image = kind(array, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return image


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_nifti_values(tmp_path, kind, name, dtype):
    if name == "a.img":
        kind = {nib.Nifti1Image: nib.Nifti1Pair, nib.Nifti2Image: nib.Nifti2Pair}[kind]
    array = values((9, 7, 5), dtype)
    save_nifti(tmp_path / name, array, kind=kind)
    source = read_nifti(tmp_path / name)
    assert source.axes == "zyx" and source.voxel_size == (4e6, 3e6, 2e6)
    assert source.array.dtype == ("float32" if dtype == "float64" else dtype)
    same(source.array, array.T.astype(source.array.dtype), times=10)


@pytest.mark.parametrize("dtype", [">i2", ">f4", ">u2"])
def test_nifti_big_endian(tmp_path, dtype):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(dtype)
    header.set_xyzt_units("micron")
    array = values((5, 1, 3), dtype)
    nib.save(nib.Nifti1Image(array, np.eye(4), header), tmp_path / "a.nii")
    assert nib.load(tmp_path / "a.nii").header.endianness == ">"
    source = read_nifti(tmp_path / "a.nii")
    assert source.voxel_size == (1e3, 1e3, 1e3)
    same(source.array, array.T.astype(array.dtype.newbyteorder("=")))


@pytest.mark.parametrize("slope, inter", [(0.5, 0), (1, -1024), (2.5, 10)])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_scaling_is_nibabels(tmp_path, slope, inter, name):
    image = nib.Nifti1Image(values((6, 5, 4), "int16"), np.eye(4))
    image.header.set_slope_inter(slope, inter)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / name)
    source, peer = read_nifti(tmp_path / name), nib.load(tmp_path / name).get_fdata().T.astype("float32")
    assert source.array.dtype == "float32" and source.array.data.stored.dtype == "int16"
    same(source.array, peer)


@pytest.mark.parametrize(
    "shape, axes, order",
    [
        ((5, 4, 3), "zyx", (2, 1, 0)),
        ((5, 4, 3, 2), "tzyx", (3, 2, 1, 0)),
        ((5, 4, 3, 2, 6), "tczyx", (3, 4, 2, 1, 0)),
    ],
)
def test_nifti_axes(tmp_path, shape, axes, order):
    array = values(shape, "int16")
    save_nifti(tmp_path / "a.nii", array)
    source = read_nifti(tmp_path / "a.nii")
    assert source.axes == axes
    same(source.array, array.transpose(order))


def rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


signed = [
    np.eye(3)[list(p)] * s
    for p in itertools.permutations(range(3))
    for s in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("turn", signed + [rotation(s) for s in range(6)])
def test_nifti_positions_round_trip_and_crops_agree(tmp_path, turn):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [2.2, 0.7, 3], [-90.5, 126, -71.25]
    image = save_nifti(tmp_path / "a.nii", values((9, 8, 7), "int16"), affine)
    nib.save(image.slicer[2:, 3:, 1:], tmp_path / "crop.nii")
    whole, crop = read_nifti(tmp_path / "a.nii"), read_nifti(tmp_path / "crop.nii")
    np.testing.assert_allclose(whole.voxel_size, (3e6, 0.7e6, 2.2e6), rtol=1e-6)
    for voxel in itertools.product((0, 6), (0, 7), (0, 8)):  # z y x
        along = np.array(whole.origin) + np.array(whole.voxel_size) * voxel  # nm, along the file's axes
        point = turn @ along[::-1] / 1e6  # mm, in the room
        np.testing.assert_allclose(point, (image.affine @ [*voxel[::-1], 1])[:3], atol=1e-4)
    np.testing.assert_allclose(
        crop.origin, np.array(whole.origin) + np.array(whole.voxel_size) * (1, 3, 2), atol=100
    )
    np.testing.assert_array_equal(crop.array[...], whole.array[1:, 3:, 2:])


def test_nifti_axis_aligned_lengths_are_exact_decimals(tmp_path):
    affine = np.diag([-0.1, 2.2, 0.008, 1])
    affine[:3, 3] = [12.3, -4.56, 7.8]
    save_nifti(tmp_path / "a.nii", values((3, 3, 3), "u1"), affine)
    source = read_nifti(tmp_path / "a.nii")
    assert source.voxel_size == (8000.0, 2200000.0, 100000.0)
    assert source.origin == (7800000.0, -4560000.0, -12300000.0)
    assert source.note == "x y z run to LAS"


def edit_header(path, **fields):
    raw = path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for key, value in fields.items():
        header[key] = value
    path.write_bytes(header.binaryblock + raw[348:])


def test_nifti_voxel_sizes_that_contradict_or_mean_nothing(tmp_path):
    path = tmp_path / "a.nii"
    save_nifti(path, values((3, 4, 5), "u1"))
    edit_header(path, pixdim=[1, 1, 1, 1, 1, 1, 1, 1])
    source = read_nifti(path)
    assert source.voxel_size == (4e6, 3e6, 2e6) and "pixdim says [1.0, 1.0, 1.0]" in source.note
    edit_header(path, pixdim=[1, -2, 3, 4, 1, 1, 1, 1])
    assert read_nifti(path).voxel_size == (4e6, 3e6, 2e6)
    edit_header(path, pixdim=[1, 0, 3, 4, 1, 1, 1, 1])
    with pytest.raises(InputError, match="voxel size of 0"):
        read_nifti(path)
    edit_header(path, pixdim=[1, 2, 3, 4, 1, 1, 1, 1], srow_x=[np.nan, 0, 0, 0])
    with pytest.raises(InputError, match="expected positive numbers"):
        read_nifti(path)


def test_nifti_without_or_with_odd_position(tmp_path):
    image = nib.Nifti1Image(values((3, 4, 5), "u1"), None)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "a.nii")
    source = read_nifti(tmp_path / "a.nii")
    assert source.origin is None and "no position" in source.note
    shear = np.array([[2, 0.5, 0, 1], [0, 2, 0, 2], [0, 0, 2, 3], [0, 0, 0, 1]])
    image.set_sform(shear, 1)
    nib.save(image, tmp_path / "b.nii")
    source = read_nifti(tmp_path / "b.nii")
    assert source.origin is None and "sheared" in source.note


def test_nifti_units(tmp_path):
    path = tmp_path / "a.nii"
    for unit, nm in dict(mm=1e6, micron=1e3, meter=1e9).items():
        save_nifti(path, values((3, 4, 5), "u1"), np.eye(4), unit)
        assert read_nifti(path).voxel_size == (nm,) * 3
    source = read_nifti(path, unit="nm")
    assert source.voxel_size == (1.0,) * 3 and "unit nm as given, the header says meter" in source.note
    save_nifti(path, values((3, 4, 5), "u1"), np.eye(4), "unknown")
    source = read_nifti(path)
    assert source.voxel_size == (1e6,) * 3 and source.assumed == ("unit mm assumed, the header names none",)
    source = read_nifti(path, unit="um")
    assert source.voxel_size == (1e3,) * 3 and not source.assumed


def test_nifti_refusals(tmp_path):
    save_nifti(tmp_path / "a.nii", values((5, 4), "u1"))
    with pytest.raises(InputError, match="expected a 3D image"):
        read_nifti(tmp_path / "a.nii")
    save_nifti(tmp_path / "b.nii", np.zeros((3, 4, 5), "complex64"))
    with pytest.raises(InputError, match="complex64: expected integers or floats"):
        read_nifti(tmp_path / "b.nii")
    save_nifti(tmp_path / "c.nii", np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    with pytest.raises(InputError, match="expected integers or floats"):
        read_nifti(tmp_path / "c.nii")
    with pytest.raises(InputError, match="cannot be read"):
        read_nifti(tmp_path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_cut_anywhere_is_refused_or_whole(tmp_path, name):
    array, refused = values((9, 8, 7), "int16"), 0
    save_nifti(tmp_path / name, array)
    whole = (tmp_path / name).read_bytes()
    for cut in np.linspace(0, len(whole) - 1, 25).astype(int):
        (tmp_path / name).write_bytes(whole[:cut])
        try:
            np.testing.assert_array_equal(read_nifti(tmp_path / name).array[...], array.T)
        except InputError as e:
            refused += 1
            assert "cannot be read" in str(e) and "\n" not in str(e)
    assert refused >= 24  # the end of a .gz is a checksum


def test_nifti_travels_without_its_voxels(tmp_path):
    array = values((40, 40, 40), "int16")
    save_nifti(tmp_path / "a.nii.gz", array)
    packed = pickle.dumps(read_nifti(tmp_path / "a.nii.gz"))
    assert len(packed) < 1000
    np.testing.assert_array_equal(pickle.loads(packed).array[...], array.T)


# TIFF

layouts = dict(
    plain=dict(),
    unnamed=dict(metadata=None),
    zlib=dict(compression="zlib"),
    tiled=dict(tile=(16, 16)),
    zlib_tiled=dict(compression="zlib", tile=(16, 32)),
    strips=dict(rowsperstrip=7),
    big=dict(bigtiff=True),
    big_endian=dict(byteorder=">"),
    big_endian_zlib=dict(byteorder=">", compression="zlib"),
    predictor=dict(compression="zlib", predictor=2),
)


@pytest.mark.parametrize("layout", layouts)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_tiff_values(tmp_path, layout, dtype):
    if layout == "predictor" and dtype == "float32":
        pytest.skip("predictor 2 is for integers")
    array = values((5, 41, 53), dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, **layouts[layout])
    source = read_tiff(tmp_path / "a.tif")
    assert (source.axes, source.voxel_size, source.array.dtype) == ("zyx", None, dtype)
    same(source.array, array)
    same(pickle.loads(pickle.dumps(source)).array, array, times=3)


@pytest.mark.parametrize("axes", ["ZYX", "TZYX", "ZCYX", "TZCYX"])
def test_imagej_axes_and_sizes(tmp_path, axes):
    sizes = dict(T=2, Z=4, C=3, Y=11, X=13)
    array = values([sizes[a] for a in axes], "uint16")
    tifffile.imwrite(
        tmp_path / "a.tif",
        array,
        imagej=True,
        resolution=(1 / 0.25, 1 / 0.5),
        metadata=dict(axes=axes, spacing=1.5, unit="\\u00B5m"),
    )
    source = read_tiff(tmp_path / "a.tif")
    expected = "".join(a for a in "tczyx" if a.upper() in axes)
    assert source.axes == expected and source.origin is None and source.note == ""
    np.testing.assert_allclose(source.voxel_size, (1500, 500, 250))
    same(source.array, array.transpose([axes.index(a.upper()) for a in expected]))


@pytest.mark.parametrize("axes", ["ZYX", "CZYX", "ZCYX", "TCZYX"])
def test_ome_axes_and_sizes(tmp_path, axes):
    sizes = dict(T=2, Z=4, C=3, Y=11, X=13)
    array = values([sizes[a] for a in axes], "uint16")
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        array,
        photometric="minisblack",
        metadata=dict(
            axes=axes,
            PhysicalSizeX=80,
            PhysicalSizeXUnit="Å",
            PhysicalSizeY=0.012,
            PhysicalSizeZ=40,
            PhysicalSizeZUnit="nm",
        ),
    )
    source = read_tiff(tmp_path / "a.ome.tif")
    expected = "".join(a for a in "tczyx" if a.upper() in axes)
    assert source.axes == expected
    np.testing.assert_allclose(source.voxel_size, (40, 12, 8))
    same(source.array, array.transpose([axes.index(a.upper()) for a in expected]))


def test_tiff_voxel_size_is_never_half_known(tmp_path):
    stack, path = values((5, 11, 13), "u1"), tmp_path / "a.tif"
    for meta, note in [
        (dict(unit="nm"), "no voxel size for z, only y 500 nm, x 250 nm"),
        (dict(spacing=3.0), "no voxel size for z y x"),
        (
            dict(unit="pixel", spacing=3.0),
            "no voxel size for z y x; z 3 pixel, y 500 pixel, x 250 pixel: no length",
        ),
    ]:
        tifffile.imwrite(
            path, stack, imagej=True, resolution=(1 / 250, 1 / 500), metadata=dict(axes="ZYX", **meta)
        )
        source = read_tiff(path)
        assert (source.voxel_size, source.note) == (None, note)
    tifffile.imwrite(
        path, stack, imagej=True, resolution=(4, 2), metadata=dict(axes="ZYX", spacing=-2.0, unit="um")
    )
    assert read_tiff(path).voxel_size == (2000.0, 500.0, 250.0)
    tifffile.imwrite(path, stack, resolution=(1e5, 2e5), resolutionunit="centimeter", metadata=None)
    assert read_tiff(path).note == "pages taken for z; no voxel size for z, only y 50 nm, x 100 nm"


def test_tiff_samples_are_channels(tmp_path):
    rgb = values((4, 9, 8, 3), "u1")
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", compression="zlib")
    source = read_tiff(tmp_path / "a.tif")
    assert source.axes == "czyx"
    same(source.array, np.moveaxis(rgb, -1, 0))
    tifffile.imwrite(
        tmp_path / "b.tif",
        np.moveaxis(rgb, -1, 1),
        photometric="rgb",
        planarconfig="separate",
        compression="zlib",
    )
    same(read_tiff(tmp_path / "b.tif").array, np.moveaxis(rgb, -1, 0))


def test_tiff_axes_are_asked_for_not_guessed(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values((4, 9, 8), "u1"), imagej=True, metadata=dict(axes="TYX"))
    with pytest.raises(InputError, match="if t counts slices, pass axes='zyx'"):
        read_tiff(path)
    assert read_tiff(path, axes="zyx").axes == "zyx"
    array = values((2, 5, 9, 8), "u1")
    tifffile.imwrite(path, array)
    with pytest.raises(InputError, match="pass axes=, 4 letters"):
        read_tiff(path)
    same(read_tiff(path, axes="zcyx").array, array.transpose(1, 0, 2, 3))
    for wrong in ("zyx", "zzyx", "qcyx", "zcxx"):
        with pytest.raises(InputError, match="each once"):
            read_tiff(path, axes=wrong)
    tifffile.imwrite(path, values((9, 8), "u1"))
    with pytest.raises(InputError, match="one 2D image"):
        read_tiff(path)
    with pytest.raises(InputError, match="no file or folder"):
        read_tiff(tmp_path / "none.tif")


@pytest.mark.parametrize("layout", ["plain", "unnamed", "zlib", "strips", "big"])
def test_tiff_cut_anywhere_is_refused_or_whole(tmp_path, layout):
    array, path = values((6, 40, 50), "uint16"), tmp_path / "a.tif"
    tifffile.imwrite(path, array, **layouts[layout])
    whole, refused = path.read_bytes(), 0
    for cut in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:cut])
        try:
            np.testing.assert_array_equal(read_tiff(path).array[...], array)
        except InputError as e:
            refused += 1
            assert "\n" not in str(e) and ("cut short" in str(e) or "cannot be read" in str(e))
    assert refused >= 24


def test_tiff_pages_in_threads(tmp_path):
    array = values((60, 64, 64), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib")
    source = read_tiff(tmp_path / "a.tif").array
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda i: source[i], range(60)))
    np.testing.assert_array_equal(pages, array)


def test_tiff_folder(tmp_path):
    array = values((12, 21, 17), "uint16")
    for i, page in enumerate(array):
        tifffile.imwrite(
            tmp_path / f"cell2_z{i}.TIF",
            page,
            resolution=(1e6, 1e6),
            resolutionunit="centimeter",
            compression="zlib",
        )
    (tmp_path / "notes.txt").write_text("not a slice")
    (tmp_path / "._cell2_z0.tif").write_bytes(b"left by another system")
    source = read_tiff(tmp_path)
    assert (source.axes, source.voxel_size) == ("zyx", None) and "only y 10 nm, x 10 nm" in source.note
    same(source.array, array)
    same(pickle.loads(pickle.dumps(source)).array, array, times=3)


def test_tiff_folder_refusals(tmp_path):
    with pytest.raises(InputError, match="no .tif file in the folder"):
        read_tiff(tmp_path)
    tifffile.imwrite(tmp_path / "0.tif", values((6, 5, 5), "u1"))
    with pytest.raises(InputError, match="6 pages of shape"):
        read_tiff(tmp_path)
    tifffile.imwrite(tmp_path / "0.tif", values((5, 5), "u1"))
    tifffile.imwrite(tmp_path / "1.tif", values((5, 6), "u1"))
    (tmp_path / "2.tif").write_bytes(b"II*\0")
    source = read_tiff(tmp_path)
    assert source.array[0].shape == (5, 5)
    with pytest.raises(InputError, match=r"1.tif' is uint8 \(5, 6\)"):
        source.array[1]
    with pytest.raises(InputError, match="2.tif' cannot be read"):
        source.array[2]

"Volumes against other people's files and readers, and against positions written into the voxels."

import errno
import itertools
import json
import pickle
import shutil
import threading
import tracemalloc
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import ngff_zarr
import numpy as np
import ome_zarr.format
import ome_zarr.writer
import pytest
import yaozarrs
import zarr
from examples import examples
from hypothesis import given, strategies as st

import dinolab.volumes.volume
import dinolab.volumes.write
from dinolab.core.errors import InputError, MissingError
from dinolab.volumes.arrays import StoredArray
from dinolab.volumes.blocks import make_blocks
from dinolab.volumes.grid import Grid, apply_matrices, axis_matrices, majority, resample_matrix
from dinolab.volumes.ngff import ngff_attributes
from dinolab.volumes.sources import open_multiscale, open_volume, update_datapaths_with_target_scales
from dinolab.volumes.tiles import all_tiles
from dinolab.volumes.volume import Multiscale, Volume
from dinolab.volumes.write import write_multiscale

UM = 1000.0  # nm


def ramp(shape, axis, step=1.0, start=0.0):
    "Value = position of the voxel centre along an axis."
    line = start + step * np.arange(shape[axis], dtype=np.float32)
    return np.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape).copy()


def placed(volume, axis, atol):
    "Whether the voxels of a ramp hold the positions that the grid claims."
    got = np.moveaxis(volume.read(), axis, 0).reshape(volume.shape[axis], -1)[:, 0]
    np.testing.assert_allclose(
        got, volume.origin[axis] + volume.voxel_size[axis] * np.arange(volume.shape[axis]), atol=atol
    )


@pytest.mark.parametrize("version,axes", list(itertools.product(("0.4", "0.5"), ("zyx", "tczyx"))))
@pytest.mark.parametrize("axis", range(3))
def test_reads_ome_zarr_py(tmp_path, version, axes, axis):
    image = ramp((16, 24, 32), axis, step=(0.04, 0.008, 0.008)[axis])
    lead = len(axes) - 3
    fmt = {"0.4": ome_zarr.format.FormatV04, "0.5": ome_zarr.format.FormatV05}[version]()
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2 if version == "0.4" else 3)
    data = image.reshape((1,) * lead + image.shape)
    scale = {**dict(t=1.0, c=1.0), **dict(zip("zyx", (0.04, 0.008, 0.008)))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ome_zarr.writer.write_image(
            data,
            group,
            fmt=fmt,
            axes=axes,
            axes_units={a: "micrometer" for a in "zyx"},
            scale={a: scale[a] for a in axes},
            scale_factors=[dict(z=f, y=f, x=f) for f in (2, 4)],
        )
    pyramid = open_multiscale(tmp_path / "a.zarr")
    np.testing.assert_allclose(pyramid.levels[0].voxel_size, (40, 8, 8))
    assert [v.shape for v in pyramid.levels] == [(16, 24, 32), (8, 12, 16), (4, 6, 8)]
    for v in pyramid.levels:
        got = np.moveaxis(v.read(), axis, 0)[:, 0, 0] * UM
        want = v.origin[axis] + v.voxel_size[axis] * np.arange(v.shape[axis])
        np.testing.assert_allclose(
            got[1:-1], want[1:-1], rtol=1e-4, atol=0.01 * v.voxel_size[axis]
        )  # its blur bends the ends


@pytest.mark.parametrize("version", ("0.4", "0.5"))
def test_reads_ngff_zarr(tmp_path, version):
    image = ngff_zarr.to_ngff_image(
        ramp((16, 24, 32), 2, step=4.0, start=100.0),
        dims=list("zyx"),
        scale=dict(z=5.24, y=4.0, x=4.0),
        translation=dict(z=0.0, y=0.0, x=100.0),
        axes_units={a: "nanometer" for a in "zyx"},
    )
    ngff_zarr.to_ngff_zarr(
        str(tmp_path / "b.zarr"),
        ngff_zarr.to_multiscales(image, scale_factors=[2, 4], method=ngff_zarr.Methods.ITKWASM_BIN_SHRINK),
        version=version,
    )
    pyramid = open_multiscale(tmp_path / "b.zarr")
    assert pyramid.levels[0].voxel_size == (5.24, 4.0, 4.0)
    for v in pyramid.levels:
        placed(v, 2, atol=1e-2)


@pytest.mark.parametrize(
    "version,shard,shape",
    [("0.4", None, (17, 20, 33)), ("0.5", None, (17, 20, 33)), ("0.5", 32, (40, 70, 33))],
)
def test_what_we_write_is_valid_and_in_place(tmp_path, version, shard, shape):
    grid = Grid(shape, (5.24, 4, 3.24), (10, -20, 1e5))
    for axis in range(3):
        path = tmp_path / f"w{axis}.zarr"
        m = write_multiscale(
            path,
            Volume(ramp(shape, axis, grid.voxel_size[axis], grid.origin[axis]), grid),
            version=version,
            shard=shard,
            chunk=16,
            levels=3,
        )
        yaozarrs.validate_zarr_store(str(path))
        for v in m.levels:  # all but the last voxel of an odd axis, which averages what there is
            inner = v.crop(tuple(slice(0, max(1, n - 1)) for n in v.shape))
            placed(Volume(inner.read(), inner.grid), axis, atol=0.02 + abs(grid.origin[axis]) * 1e-6)
        other = ngff_zarr.from_ngff_zarr(str(path)).images
        for v, o in zip(m.levels, other):
            np.testing.assert_allclose([o.scale[a] for a in "zyx"], v.voxel_size)
            np.testing.assert_allclose([o.translation[a] for a in "zyx"], v.origin)


def test_labels_keep_the_majority_of_the_finest_level(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (32, 32, 32)).astype(np.uint16)
    m = write_multiscale(tmp_path / "l.zarr", labels, voxel_size=8, kind="labels", levels=4)
    for f, v in zip((2, 4, 8), m.levels[1:]):
        n = 32 // f
        boxes = labels.reshape(n, f, n, f, n, f).transpose(0, 2, 4, 1, 3, 5).reshape(n, n, n, -1)
        want = np.apply_along_axis(lambda x: np.bincount(x).argmax(), -1, boxes)
        np.testing.assert_array_equal(v.read(), want)
        np.testing.assert_array_equal(m.levels[0].sample(v.grid, "majority"), want)


@pytest.mark.parametrize("kind", ("image", "labels"))
@pytest.mark.parametrize("shape,shard", [((17, 5, 23), None), ((1, 19, 6), None), ((33, 40, 9), 32)])
def test_levels_of_odd_shapes_count_what_there_is(tmp_path, kind, shape, shard):
    "Each coarse voxel against the voxels in its box, cut boxes included: the mean of the level before, or the majority of the finest."
    x = np.random.default_rng(0).integers(0, 4 if kind == "labels" else 200, shape).astype(np.uint8)
    levels = [
        v.read()
        for v in write_multiscale(
            tmp_path / "o.zarr", x, voxel_size=8, kind=kind, levels=4, chunk=8, shard=shard
        ).levels
    ]
    for k, level in enumerate(levels[1:], 1):
        source, f = (x, 2**k) if kind == "labels" else (levels[k - 1], 2)
        for i in np.ndindex(level.shape):
            box = source[
                tuple(slice(a * f, a * f + f) if n > 1 else slice(0, 1) for a, n in zip(i, source.shape))
            ]
            want = np.bincount(box.ravel()).argmax() if kind == "labels" else np.rint(box.mean())
            assert level[i] == want, (k, i)


def test_coarse_labels_are_counted_in_pieces(tmp_path, monkeypatch):
    "A chunk of a coarse level stands for many voxels of the finest; they are never all in memory."
    sizes = []
    monkeypatch.setattr(dinolab.volumes.write, "majority", lambda x: (sizes.append(x.size), majority(x))[1])
    labels = np.random.default_rng(0).integers(0, 3, (1, 512, 512)).astype(np.uint8)
    m = write_multiscale(tmp_path / "l.zarr", labels, voxel_size=8, kind="labels", levels=4)
    assert max(sizes) <= 128**2
    want = np.sort(labels[0].reshape(64, 8, 64, 8).transpose(0, 2, 1, 3).reshape(64, 64, 64), -1)
    np.testing.assert_array_equal(m.levels[3].read()[0], majority(want))


def test_multiscale_level_transforms_and_order(tmp_path):
    "Dataset first (scale, then translation), the whole multiscale after them, the unit last."
    g = zarr.open_group(tmp_path / "t.zarr", mode="w", zarr_format=2)
    g.create_array("0", shape=(4, 4, 4), chunks=(4, 4, 4), dtype="u1")
    t = [dict(type="scale", scale=[1, 2, 3]), dict(type="translation", translation=[1, 1, 1])]
    g.attrs["multiscales"] = [
        dict(
            version="0.4",
            axes=[dict(name=a, type="space", unit="micrometer") for a in "zyx"],
            datasets=[dict(path="0", coordinateTransformations=t)],
            coordinateTransformations=[
                dict(type="scale", scale=[0.5] * 3),
                dict(type="translation", translation=[0, 0, 7]),
            ],
        )
    ]
    v = open_multiscale(tmp_path / "t.zarr", missing="fill").levels[0]
    assert v.voxel_size == (500.0, 1000.0, 1500.0) and v.origin == (500.0, 500.0, 7500.0)


@pytest.fixture(scope="module")
def pyramid_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("p") / "p.zarr"
    write_multiscale(
        path,
        np.random.default_rng(0).integers(1, 255, (32, 32, 32)).astype(np.uint8),
        voxel_size=8,
        chunk=16,
        levels=3,
    )
    return path


def test_reads_zip_http_and_memory(pyramid_path, tmp_path):
    want = open_multiscale(pyramid_path).levels[0].read()
    store = zarr.storage.ZipStore(tmp_path / "p.zip", mode="w")
    for f in sorted(pyramid_path.rglob("*")):
        if f.is_file():
            store._zf if store._is_open else store._sync_open()
            store._zf.write(f, f.relative_to(pyramid_path))
    store.close()
    np.testing.assert_array_equal(open_multiscale(tmp_path / "p.zip").levels[0].read(), want)

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=pyramid_path.parent)
    )
    server.RequestHandlerClass.log_message = lambda *a: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/p.zarr"
    np.testing.assert_array_equal(open_multiscale(url).levels[0].read(), want)
    np.testing.assert_array_equal(
        open_volume(url + "/s1").read(), open_multiscale(pyramid_path).levels[1].read()
    )
    server.shutdown()

    import fsspec

    fsspec.filesystem("memory").put(str(pyramid_path), "/m.zarr", recursive=True)
    np.testing.assert_array_equal(open_multiscale("memory://m.zarr").levels[0].read(), want)


def test_openorganelle_layouts(tmp_path):
    g = zarr.open_group(tmp_path / "o.zarr", mode="w", zarr_format=2)
    for i, f in enumerate((1, 2)):
        a = g.create_array(f"s{i}", shape=(16 // f,) * 3, chunks=(8,) * 3, dtype="u1")
        a[:] = 1
        a.attrs["transform"] = dict(
            axes=["z", "y", "x"],
            scale=[5.24 * f, 4.0 * f, 4.0 * f],
            translate=[2.62 * (f - 1), 2.0 * (f - 1), 2.0 * (f - 1)],
            units=["nm"] * 3,
        )
    m = open_multiscale(tmp_path / "o.zarr")
    assert m.levels[1].voxel_size == (10.48, 8.0, 8.0) and m.levels[1].origin == (2.62, 2.0, 2.0)
    np.testing.assert_allclose(m.levels[0].grid.corner, m.levels[1].grid.corner)


def test_n5_by_tensorstore(tmp_path):
    ts = pytest.importorskip("tensorstore")
    data = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)  # z y x
    array = ts.open(
        dict(
            driver="n5",
            kvstore=dict(driver="file", path=str(tmp_path / "v.n5/em/s0")),
            metadata=dict(
                dimensions=[4, 3, 2], blockSize=[4, 3, 2], dataType="uint16", compression=dict(type="gzip")
            ),
        ),
        create=True,
    ).result()
    array[...] = data.T
    f = tmp_path / "v.n5/em/s0/attributes.json"
    f.write_text(
        json.dumps(
            {**json.loads(f.read_text()), "pixelResolution": dict(dimensions=[4.0, 4.0, 5.24], unit="nm")}
        )
    )
    v = open_volume(tmp_path / "v.n5/em/s0")
    assert v.voxel_size == (5.24, 4.0, 4.0)
    np.testing.assert_array_equal(v.read(), data)
    with pytest.raises(MissingError):
        open_volume(tmp_path / "v.n5/em/s7")


def meta(path, change):
    "Change the multiscales metadata of a copy."
    group = zarr.open_group(path, mode="a")
    ome = group.attrs["ome"]
    change(ome)
    group.attrs["ome"] = ome


def bad(change):
    def edit(path):
        meta(path, change)

    return edit


def spoil(name):
    return lambda p: shutil.rmtree(p / name)


SCALE = lambda v: bad(
    lambda o: o["multiscales"][0]["datasets"][0]["coordinateTransformations"][0].__setitem__("scale", v)
)
FAULTS = {
    "negative scale": (SCALE([8, -8, 8]), "expected positive"),
    "zero scale": (SCALE([8, 0, 8]), "expected positive"),
    "absurd scale": (SCALE([8, 8, 8e12]), "are the units right?"),
    "too few scales": (SCALE([8, 8]), "2 values for 3 axes"),
    "version": (bad(lambda o: o.__setitem__("version", "0.9")), "expected 0.3, 0.4 or 0.5"),
    "unit": (
        bad(lambda o: o["multiscales"][0]["axes"][0].__setitem__("unit", "nanometre-ish")),
        "unknown length unit",
    ),
    "no unit": (bad(lambda o: o["multiscales"][0]["axes"][0].pop("unit")), "no unit for the spatial axes"),
    "no axes": (bad(lambda o: o["multiscales"][0].__setitem__("axes", [])), "multiscales"),
    "two dimensions": (bad(lambda o: o["multiscales"][0]["axes"].pop()), "axes"),
    "rotation": (
        bad(
            lambda o: o["multiscales"][0]["datasets"][0]["coordinateTransformations"].append(
                dict(type="rotation")
            )
        ),
        "transformation of type 'rotation'",
    ),
    "no scale": (
        bad(lambda o: o["multiscales"][0]["datasets"][1].pop("coordinateTransformations")),
        "no scale, so no voxel size",
    ),
    "level gone": (spoil("s1"), "listed in the metadata but absent"),
    "no metadata": (lambda p: (p / "zarr.json").unlink(), "no zarr group"),
    "zarr version": (
        lambda p: (p / "zarr.json").write_text(
            (p / "zarr.json").read_text().replace('"zarr_format": 3', '"zarr_format": 7')
        ),
        "expected",
    ),
    "junk": (lambda p: (p / "zarr.json").write_text("{not json"), "cannot be opened"),
    "no multiscales": (bad(lambda o: o.clear()), "no multiscales metadata"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_say_what_is_wrong(pyramid_path, tmp_path, fault):
    edit, message = FAULTS[fault]
    shutil.copytree(pyramid_path, tmp_path / "f.zarr")
    edit(tmp_path / "f.zarr")
    with pytest.raises(InputError) as e:
        open_multiscale(tmp_path / "f.zarr")
    assert message in str(e.value) and "\n" not in str(e.value), str(e.value)


@pytest.mark.parametrize("shard", (None, 32))
def test_truncated_and_missing_chunks(tmp_path, shard):
    path, data = tmp_path / "c.zarr", np.ones((64, 64, 64), np.uint8)
    data[32:, 32:, 32:] = 0  # a blank chunk is written like any other
    write_multiscale(path, data, voxel_size=8, chunk=16 if shard else 32, shard=shard, levels=1)
    np.testing.assert_array_equal(open_multiscale(path).levels[0].read(), data)
    chunk = path / "s0/c/1/1/1"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"chunk \(1, 1, 1\) cannot be decoded"):
        open_multiscale(path).levels[0].read()
    chunk.unlink()
    with pytest.raises(InputError, match=r"chunk \(1, 1, 1\) is missing"):
        open_multiscale(path, missing="error").levels[0].read()
    np.testing.assert_array_equal(open_multiscale(path).levels[0].read(), data)


@pytest.mark.parametrize("zarr_format,fill", [(2, None), (2, 0), (3, 7), (3, float("nan"))])
def test_missing_chunks_are_found_whatever_the_fill_value(tmp_path, zarr_format, fill):
    g = zarr.open_group(tmp_path / "f.zarr", mode="w", zarr_format=zarr_format)
    g.create_array("0", shape=(8, 8, 8), chunks=(4, 4, 4), dtype="f4", fill_value=fill)[:] = 1
    image = dict(
        axes=[dict(name=x, type="space", unit="nanometer") for x in "zyx"],
        datasets=[dict(path="0", coordinateTransformations=[dict(type="scale", scale=[8, 8, 8])])],
    )
    g.attrs.update(
        dict(multiscales=[dict(version="0.4", **image)])
        if zarr_format == 2
        else dict(ome=dict(version="0.5", multiscales=[image]))
    )
    chunk = tmp_path / "f.zarr/0" / ("0.0.1" if zarr_format == 2 else "c/0/0/1")
    chunk.unlink()
    with pytest.raises(InputError, match=r"chunk \(0, 0, 1\) is missing"):
        open_multiscale(tmp_path / "f.zarr", missing="error").levels[0].read()
    assert open_multiscale(tmp_path / "f.zarr").levels[0].read()[0, 0, 0] == 1


def test_channels_are_selected_never_guessed(tmp_path):
    g = zarr.open_group(tmp_path / "c.zarr", mode="w")
    a = g.create_array("0", shape=(2, 3, 4, 4, 4), chunks=(1, 1, 4, 4, 4), dtype="u1")
    a[:] = np.arange(6).reshape(2, 3, 1, 1, 1) + 1
    axes = [dict(name="t", type="time"), dict(name="c", type="channel")] + [
        dict(name=x, type="space", unit="nanometer") for x in "zyx"
    ]
    g.attrs["ome"] = dict(
        version="0.5",
        multiscales=[
            dict(
                axes=axes,
                datasets=[
                    dict(path="0", coordinateTransformations=[dict(type="scale", scale=[1, 1, 8, 8, 8])])
                ],
            )
        ],
    )
    assert (open_multiscale(tmp_path / "c.zarr", channel=2, time=1).levels[0].read() == 6).all()
    with pytest.raises(InputError, match="axis t has 2 entries"):
        open_multiscale(tmp_path / "c.zarr")
    with pytest.raises(InputError, match="axis c has 3 entries"):
        open_multiscale(tmp_path / "c.zarr", time=0)
    with pytest.raises(InputError, match="index 3 on axis c"):
        open_multiscale(tmp_path / "c.zarr", time=0, channel=3)


@examples(200)
@given(
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
    step=st.floats(0.1, 20),
    ratio=st.floats(0.1, 12),
    shift=st.floats(-5, 5),
)
def test_resampling_keeps_constants_and_stays_in_range(n_in, n_out, step, ratio, shift):
    m = resample_matrix(n_in, step, 0, n_out, step * ratio, shift * step)
    assert m.min() >= 0
    np.testing.assert_allclose(m.sum(1), 1, atol=1e-4)


@examples(60)
@given(n=st.integers(1, 12), ratio=st.floats(1, 6), shift=st.floats(-0.5, 0.5))
def test_coarser_samples_are_means_over_their_boxes(n, ratio, shift):
    "Against counting in steps of a thousandth of a voxel, mirrored at the ends."
    m = resample_matrix(n, 4.0, 100, max(1, int(n / ratio)), 4.0 * ratio, 100 + 4.0 * shift)
    for k, row in enumerate(m):
        at = shift + (k + (np.arange(2000) + 0.5) / 2000) * ratio
        at = np.mod(at, 2 * n)
        at = np.where(at > n, 2 * n - at, at)
        if ratio > 1.001:
            np.testing.assert_allclose(row, np.histogram(at, bins=n, range=(0, n))[0] / 2000, atol=3e-3)


@examples(40)
@given(data=st.data(), mode=st.sampled_from(("linear", "nearest", "majority")))
def test_a_part_of_a_sample_is_the_sample_of_the_part(data, mode):
    "Whatever is read around a region is enough: nothing depends on where the reading stopped."
    shape = data.draw(st.tuples(*[st.integers(3, 12)] * 3))
    v = Volume(
        np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8), Grid(shape, (5, 4, 3.24), (7, 0, -9))
    )
    grid = v.grid.with_voxel_size(
        tuple(s * data.draw(st.sampled_from((0.4, 0.5, 1.0, 1.31, 2.0, 3.3))) for s in v.voxel_size)
    )
    roi = tuple(
        slice(a := data.draw(st.integers(0, n - 1)), data.draw(st.integers(a + 1, n))) for n in grid.shape
    )
    np.testing.assert_allclose(v.sample(grid.crop(roi), mode), v.sample(grid, mode)[roi], atol=1e-4)
    if mode == "linear":
        np.testing.assert_allclose(
            v.sample(grid), apply_matrices(v.read(), axis_matrices(v.grid, grid)), atol=1e-4
        )


def test_nearest_takes_the_voxel_around_the_centre():
    x = np.arange(64, dtype=np.uint16).reshape(4, 4, 4)
    v = Volume(x, Grid((4, 4, 4), (40, 8, 8), (20, 4, 4)))
    got = v.sample(v.grid.with_voxel_size((20, 8, 24 / 5)), "nearest")
    np.testing.assert_array_equal(got, x[np.ix_([0, 0, 1, 1, 2, 2, 3, 3], range(4), [0, 0, 1, 2, 2, 3, 3])])


@examples(100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_majority(votes):
    assert majority(np.array(votes)[None])[0] == np.bincount(votes).argmax()


@examples(50)
@given(
    shape=st.tuples(*[st.integers(4, 24)] * 3),
    at=st.tuples(*[st.floats(0, 1)] * 3),
    voxel=st.tuples(*[st.floats(0.5, 3)] * 3),
    axis=st.integers(0, 2),
)
def test_crops_of_two_resolutions_show_the_same_place(shape, at, voxel, axis):
    grid = Grid(shape, (5.24, 3.24, 4), (3, -7, 1000))
    v = Volume(ramp(shape, axis, grid.voxel_size[axis], grid.origin[axis]).astype(np.float64), grid)
    size = tuple(a * b for a, b in zip(voxel, grid.voxel_size))
    fit = tuple(max(1, int(e * 0.5 / s)) for e, s in zip(grid.extent, size))
    if any(f * s > e * 0.98 for f, s, e in zip(fit, size, grid.extent)):
        return
    corner = tuple(c + a * (e - f * s) for c, a, e, f, s in zip(grid.corner, at, grid.extent, fit, size))
    target = Grid(fit, size, tuple(c + s / 2 for c, s in zip(corner, size)))
    got = np.moveaxis(v.sample(target), axis, 0)[:, 0, 0]
    want = target.origin[axis] + target.voxel_size[axis] * np.arange(fit[axis])
    inside = (want > grid.origin[axis] + size[axis]) & (
        want < grid.origin[axis] + grid.extent[axis] - grid.voxel_size[axis] - size[axis]
    )
    np.testing.assert_allclose(got[inside], want[inside], atol=grid.voxel_size[axis] / 4)


def test_regions_outside_are_refused_not_shortened(pyramid_path):
    for v in (
        open_multiscale(pyramid_path).levels[0],
        Volume(np.ones((32, 32, 32), np.uint8), Grid((32,) * 3, 8)),
    ):
        for roi in (
            np.s_[-2:4, 0:4, 0:4],
            np.s_[30:34, 0:4, 0:4],
            np.s_[4:4, 0:4, 0:4],
            np.s_[0:4, 0:4],
            np.s_[0:8:2, 0:4, 0:4],
        ):
            for read in (v.read, v.crop):
                with pytest.raises(InputError, match="expected three non-empty ranges within it"):
                    read(roi)
        np.testing.assert_array_equal(
            v.crop(np.s_[4:, :20, 2:9]).crop(np.s_[1:3, 2:5, 3:]).read(), v.read()[5:7, 2:5, 5:9]
        )
        assert v.crop(np.s_[4:, :20, 2:9]).origin == (32, 0, 16)


def test_options_without_effect_are_refused(tmp_path):
    array, volume = np.ones((4, 4, 4), np.uint8), Volume(np.ones((4, 4, 4), np.uint8), Grid((4,) * 3, 8))
    for source, options in (
        (array, dict(channel=1)),
        (volume, dict(voxel_size=4)),
        (Multiscale([volume]), dict(origin="corner")),
    ):
        with pytest.raises(InputError, match="has no effect on a source of kind"):
            open_volume(source, **options)
    with pytest.raises(InputError, match="no effect"):
        write_multiscale(tmp_path / "v.zarr", volume, voxel_size=4)
    for image in (array, np.ones((3, 4, 4, 4), np.uint8)):
        with pytest.raises(InputError, match="voxel size None"):
            write_multiscale(tmp_path / "v.zarr", image)
    with pytest.raises(InputError, match="no level -2"):
        open_volume(array, level=-2)
    assert list(tmp_path.iterdir()) == []


def test_volumes_travel_as_paths(tmp_path, pyramid_path):
    "To workers; a mapped array would take all its values along."
    np.save(tmp_path / "v.npy", np.arange(32**3, dtype=np.float32).reshape(32, 32, 32))
    shutil.make_archive(tmp_path / "p", "zip", pyramid_path)
    for v in (
        open_volume(tmp_path / "v.npy", voxel_size=8),
        open_volume(pyramid_path),
        open_volume(tmp_path / "p.zip"),
        open_volume(pyramid_path).crop(np.s_[2:9, :, :]),
    ):
        sent = pickle.dumps(v)
        assert len(sent) < 10_000
        np.testing.assert_array_equal(pickle.loads(sent).read(), v.read())


def test_file_urls_are_paths(pyramid_path):
    np.testing.assert_array_equal(
        open_volume(f"file://{pyramid_path}/s1").read(),
        open_multiscale(f"file://{pyramid_path}").levels[1].read(),
    )


def test_writing_is_whole_or_absent(tmp_path):
    class Failing(np.ndarray):
        def __getitem__(self, roi):
            raise OSError(28, "No space left on device")

    data = np.zeros((8, 8, 8), np.uint8).view(Failing)
    with pytest.raises(InputError, match="No space left on device"):
        write_multiscale(tmp_path / "x.zarr", Volume(data, Grid((8, 8, 8), 8)))
    assert list(tmp_path.iterdir()) == []
    write_multiscale(tmp_path / "x.zarr", np.zeros((8, 8, 8), np.uint8), voxel_size=8)
    with pytest.raises(InputError, match="exists"):
        write_multiscale(tmp_path / "x.zarr", np.zeros((8, 8, 8), np.uint8), voxel_size=8)


def test_target_scales_of_anisotropic_pyramids(tmp_path):
    image = np.zeros((8, 32, 32), np.uint8)
    write_multiscale(tmp_path / "raw", image, voxel_size=(40, 8, 8), levels=3)
    got = update_datapaths_with_target_scales(
        [[str(tmp_path / "raw"), str(tmp_path / "raw")]], (80, 16, 16), True, min_resolution_for_raw=8
    )
    assert got == [[f"{tmp_path}/raw/s0", f"{tmp_path}/raw/s1"]] and isinstance(got[0], list)
    with pytest.warns(UserWarning, match="no level of"):
        update_datapaths_with_target_scales([(str(tmp_path / "raw"), str(tmp_path / "raw"))], 64)


# ---- metadata that are not what they should be

GONE = object()
WRONG = (None, True, 0, -1, 1e400, 10**30, "8", "", [], {}, [[]], [{}], GONE)


def places(document, path=()):
    "Where something stands in nested metadata; of lists the first two."
    yield path
    if isinstance(document, dict):
        for key in document:
            yield from places(document[key], (*path, key))
    if isinstance(document, list):
        for i in range(min(2, len(document))):
            yield from places(document[i], (*path, i))


def with_wrong(document, path, value):
    "A copy with something else at a place."
    if not path:
        return value
    copied = json.loads(json.dumps(document))
    at = copied
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copied


def refusals(file, opened):
    "Put every wrong value at every place of a metadata file: how many are refused, how many are read; anything but one line fails."
    text, counts = file.read_text(), [0, 0]
    document = json.loads(text)
    for path, value in itertools.product(places(document), WRONG):
        if value is GONE and not path:
            continue
        file.write_text(json.dumps(with_wrong(document, path, value)))
        try:
            opened().read(np.s_[0:2, 0:2, 0:2])
            counts[1] += 1
        except InputError as e:
            assert "\n" not in str(e) and len(str(e)) < 600, (path, value)
            counts[0] += 1
        except Exception as e:
            raise AssertionError(f"{path} = {value!r}: {e!r}") from e
    file.write_text(text)
    opened().read()
    return counts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "version,group,array", (("0.5", "zarr.json", "zarr.json"), ("0.4", ".zattrs", ".zarray"))
)
def test_wrong_ome_zarr_headers_are_one_line(tmp_path, version, group, array):
    write_multiscale(tmp_path / "a.zarr", np.zeros((4, 4, 4), "u1"), voxel_size=8, levels=2, version=version)
    opened = lambda: open_volume(tmp_path / "a.zarr")
    refused, read = refusals(tmp_path / "a.zarr" / group, opened)
    assert refused > 200 and read > 20
    refused, read = refusals(tmp_path / "a.zarr/s0" / array, opened)
    assert refused > 60


@pytest.mark.filterwarnings("ignore")
def test_wrong_n5_headers_are_one_line(tmp_path):
    ts = pytest.importorskip("tensorstore")
    array = tmp_path / "v.n5/s0"
    layout = dict(dimensions=[4] * 3, blockSize=[4] * 3, dataType="uint8", compression=dict(type="gzip"))
    spec = dict(driver="n5", kvstore=dict(driver="file", path=str(array)), metadata=layout)
    ts.open(spec, create=True).result()[...] = np.ones((4, 4, 4), np.uint8)
    file, above = array / "attributes.json", array.parent / "attributes.json"
    stored = json.loads(file.read_text())
    resolution = dict(dimensions=[4.0, 4.0, 5.0], unit="nm")
    placed = dict(pixelResolution=resolution, downsamplingFactors=[1, 1, 1])
    opened = lambda: open_volume(array)

    file.write_text(json.dumps(stored | placed))
    assert refusals(file, opened)[0] > 100
    file.write_text(json.dumps(stored))
    above.write_text(json.dumps(dict(pixelResolution=resolution)))
    assert refusals(above, opened)[0] > 30
    for text in ("", "{", "[]", "null", "[" * 100_000):
        above.write_text(text)
        with pytest.raises(InputError, match="JSON object"):
            opened()


# ---- more than this machine holds, and files that are none


def test_huge_volumes_take_nothing(tmp_path):
    group = zarr.create_group(tmp_path / "huge.zarr")
    group.create_array("s0", shape=(10**9,) * 3, chunks=(64,) * 3, dtype="u1")
    grid = Grid((10**9,) * 3, 8)
    group.attrs["ome"] = ngff_attributes([grid], "huge")["ome"]
    tracemalloc.start()
    huge = open_volume(tmp_path / "huge.zarr", missing="fill")
    assert huge.read(np.s_[:2, :2, :2]).sum() == 0
    with pytest.raises(InputError, match="more than the .* GB of this machine"):
        huge.read()
    with pytest.raises(InputError, match="more than the"):
        huge.sample(grid)
    with pytest.raises(InputError, match="pieces"):
        write_multiscale(tmp_path / "copy.zarr", huge)
    with pytest.raises(InputError, match="at most"):
        make_blocks(grid.shape, (64, 64, 64))
    with pytest.raises(InputError, match="at most"):
        all_tiles(grid.shape, (64, 64, 64), 0.5)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert [p.name for p in tmp_path.iterdir()] == ["huge.zarr"]


@pytest.mark.parametrize(
    "size", (0, -8, float("nan"), float("inf"), 1e30, 1e-30, "wide", (8, 8), [[8]], None, {})
)
def test_absurd_voxel_sizes(tmp_path, size):
    with pytest.raises(InputError) as e:
        write_multiscale(tmp_path / "a.zarr", np.zeros((4, 4, 4), "u1"), voxel_size=size)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


NPY = {
    "empty": b"",
    "a word": b"hello",
    "cut": npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4, 4)}") + b"123",
    "huge": npy_header(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000000000, 1000000000)}"
    ),
    "no header": npy_header("nothing"),
    "objects": npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 4, 4)}") + b"\0" * 512,
    "complex": npy_header("{'descr': '<c8', 'fortran_order': False, 'shape': (1, 1, 1)}") + b"\0" * 8,
    "no voxel": npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 4, 4)}"),
}


@pytest.mark.parametrize("kind", NPY)
def test_npy_files_that_are_none(tmp_path, kind):
    (tmp_path / "a.npy").write_bytes(NPY[kind])
    with pytest.raises(InputError) as e:
        open_volume(tmp_path / "a.npy", voxel_size=8)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("chunk", (0, -1, 2.5, "64", True))
def test_wrong_chunks(tmp_path, chunk):
    with pytest.raises(InputError, match="expected a whole number of voxels"):
        write_multiscale(tmp_path / "a.zarr", np.zeros((4, 4, 4), "u1"), voxel_size=8, chunk=chunk)
    assert not list(tmp_path.iterdir())


def full_disk(monkeypatch, writes):
    "Let so many files of zarr be written, then none."
    left, put = [writes], zarr.storage._local._put

    def one(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(*args, **options)

    monkeypatch.setattr(zarr.storage._local, "_put", one)


@pytest.mark.parametrize("writes", (0, 1, 2, 5))
def test_full_disk_leaves_no_image(tmp_path, monkeypatch, writes):
    full_disk(monkeypatch, writes)
    with pytest.raises(InputError, match="No space left on device") as e:
        write_multiscale(tmp_path / "a.zarr", np.ones((8, 8, 8), "u1"), voxel_size=8, chunk=4)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = tmp_path / ".a.zarr.new/whole"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    write_multiscale(tmp_path / "a.zarr", np.ones((8, 8, 8), "u1"), voxel_size=8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
    (tmp_path / "a.zarr").rename(tmp_path / ".a.zarr.old")  # killed between the two moves of a swap
    with pytest.raises(InputError, match="exists"):
        write_multiscale(tmp_path / "a.zarr", np.ones((8, 8, 8), "u1"), voxel_size=8)


# ---- values that float32 would cut


@pytest.mark.parametrize(
    "kind,start", (("u1", 0), ("i2", -3000), ("f8", 2.0**31), ("u4", 2**31), ("i8", 2**40))
)
def test_offsets_are_taken_before_the_cast(kind, start):
    small = np.random.default_rng(0).integers(0, 200, (6, 6, 6))
    volume = Volume((small.astype(kind) + np.array(start, kind)).astype(kind), Grid(small.shape, 8))
    for grid in (volume.grid, volume.grid.with_voxel_size(16)):
        expected = Volume(small, volume.grid).sample(grid)
        np.testing.assert_allclose(volume.sample(grid, offset=start), expected, atol=1e-3)


# ---- identity


def kept(volume):
    "The identity as a store keeps it."
    return json.loads(json.dumps(volume.identity()))


def test_identity_of_a_level(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 8)).astype("u1")
    for name in ("a", "b"):
        write_multiscale(tmp_path / name / "em.zarr", image + (name == "b"), voxel_size=8, levels=2, chunk=4)
    first, other = (open_volume(tmp_path / name / "em.zarr") for name in "ab")
    before = kept(first)
    assert before["place"] == str(tmp_path / "a/em.zarr/s0")
    assert first.unchanged(before) and not other.unchanged(before)  # the same last name
    assert not open_volume(tmp_path / "a/em.zarr", level=1).unchanged(before)

    (tmp_path / "a/em.zarr/results").mkdir()  # written beside it
    (tmp_path / "a/em.zarr/results/new").write_text("x")
    assert kept(first) == before
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert open_volume(tmp_path / "moved/em.zarr").unchanged(before)
    write_multiscale(tmp_path / "a/em.zarr", 255 - image, voxel_size=8, levels=2, chunk=4, overwrite=True)
    assert not open_volume(tmp_path / "a/em.zarr").unchanged(before)  # replaced in its place


def test_identity_is_not_read_again_where_nothing_was_touched(tmp_path, monkeypatch):
    volume = write_multiscale(tmp_path / "a.zarr", np.ones((8, 8, 8), "u1"), voxel_size=8).levels[0]
    before = kept(volume)
    monkeypatch.setattr(dinolab.volumes.volume, "content_of", lambda path: pytest.fail("was read"))
    assert volume.unchanged(before)


def test_identity_of_a_part():
    array = np.arange(64).reshape(4, 4, 4)
    volume = Volume(array, Grid(array.shape, 8))
    assert volume.unchanged(kept(Volume(array.copy(), volume.grid, "elsewhere")))
    assert not volume.unchanged(kept(Volume(array + 1, volume.grid)))
    lazy = Volume(StoredArray(array, "zyx"), volume.grid)
    assert lazy.unchanged(kept(volume))  # the same values, read slab by slab
    assert not volume.crop(np.s_[:2, :, :]).unchanged(kept(volume))


def test_identity_of_channels_and_regions(tmp_path):
    z = zarr.create_array(tmp_path / "c.zarr", shape=(2, 4, 4, 4), chunks=(1, 4, 4, 4), dtype="u1")
    z[:] = 1
    channels = [
        Volume(StoredArray(z, "czyx", {"c": c}), Grid((4, 4, 4), 8), "c", str(tmp_path / "c.zarr"))
        for c in (0, 1)
    ]
    parts = [v.crop(roi) for v in channels for roi in (np.s_[:, :, :], np.s_[0:2, :, :], np.s_[2:4, :, :])]
    seen = [v.identity()["content"] for v in (*channels, *parts)]
    assert len(set(seen)) == len(seen)  # equal values, but other parts of the file
    for i, v in enumerate(parts):
        assert [w.unchanged(kept(v)) for w in parts] == [i == j for j in range(len(parts))]
    assert channels[0].crop(np.s_[1:4, :, :]).crop(np.s_[1:3, :, :]).unchanged(kept(parts[2]))

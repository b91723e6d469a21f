"Features: against plain computation, across blocks, through kills, and on bad input."

import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from examples import examples
from hypothesis import given, strategies as st
from scipy.ndimage import gaussian_filter

from dinolab.models.backbones import FeatureSpec, create_backbone
from dinolab.core.errors import InputError
import dinolab.features.store
import dinolab.volumes.store
from dinolab.volumes.blocks import make_blocks
from dinolab.features.extract import PatchMean, extract_block, extract_features_3d, extract_native
from dinolab.features.intensity import intensity_range
from dinolab.features.plan import PLANES, Plan, raw_region, slice_weights
from dinolab.features.store import _Extraction, extract_to_zarr, open_features
from dinolab.volumes.grid import Grid
from dinolab.volumes.sources import open_multiscale
from dinolab.volumes.volume import Volume
from dinolab.volumes.write import write_multiscale


class LocalNet(torch.nn.Module):
    "Patch means, then two 3 × 3 convolutions on the patch grid: context of two patches, nothing beyond."

    def __init__(self, stride=4, channels=8):
        super().__init__()
        torch.manual_seed(0)
        self.spec, self.stride = FeatureSpec((channels,), (stride,)), stride
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(16, channels, 3, padding=1)
        )

    def forward(self, x):
        return [self.net(F.avg_pool2d(x, self.stride))]


class Pyramid(torch.nn.Module):
    "Two maps of different stride."

    spec = FeatureSpec((3, 3), (4, 8))

    def forward(self, x):
        return [F.avg_pool2d(x, 4), F.avg_pool2d(x, 8)]


@pytest.fixture(scope="module")
def blobs():
    return gaussian_filter(np.random.default_rng(0).normal(size=(48, 48, 48)), 2).astype(np.float32)


def volume(x, voxel=8):
    return Volume(x, Grid(x.shape, voxel, (100, 0, -50)))


def test_layout_and_units(blobs):
    v = Volume(blobs[:20, :30], Grid((20, 30, 48), (20, 8, 8)))
    features, info = extract_features_3d(v, PatchMean(4), target_output_size=(10, 15, 24), slice_size=96)
    assert features.shape == (3, 10, 15, 24) and info["grid"].voxel_size == (40, 16, 16)
    assert (
        info["images"] == 20 + 30 + 48
        and info["pixel_nm"] == 4.1666666666666666
        and set(info["seconds"]) >= {"read", "xy/backbone", "yz/fuse"}
    )
    assert sum(info["seconds"].values()) <= info["total_seconds"]


def test_aspect_is_physical():
    "A ball in 20 × 10 × 10 nm voxels gives the same features in every plane."
    z, y, x = np.meshgrid(
        *[(np.arange(n) + 0.5) * v - 320 for n, v in zip((32, 64, 64), (20, 10, 10))], indexing="ij"
    )
    ball = Volume((np.sqrt(z**2 + y**2 + x**2) < 180).astype(np.float32), Grid((32, 64, 64), (20, 10, 10)))
    torch.manual_seed(0)
    net = LocalNet(8)
    maps = {
        p: extract_features_3d(
            ball, net, planes=[p], slice_size=128, target_output_size=(32, 32, 32), intensity=(0, 1)
        )[0]
        for p in PLANES
    }
    middle = dict(
        xy=maps["xy"][:, 15:17].mean(1), xz=maps["xz"][:, :, 15:17].mean(2), yz=maps["yz"][..., 15:17].mean(3)
    )
    scale = middle["xy"].std()
    assert (middle["xz"] - middle["yz"]).abs().max() / scale < 0.02
    assert (middle["xy"] - middle["xz"]).abs().max() / scale < 0.25  # z is sampled twice as coarsely


def test_intensity_is_scaled_once_per_volume(blobs):
    "Two slices that differ only in brightness have different features (each slice's own min-max would make them equal)."
    x = blobs.copy()
    x[10], x[11] = x[30], x[30] + 0.1
    f, _ = extract_features_3d(x, PatchMean(4), planes="xy", slice_size=96)
    assert (f[:, 11] - f[:, 10]).mean() > 0.05


def test_each_slice_is_forwarded_once(blobs):
    seen = Counter()

    class Count(PatchMean):
        def forward(self, x):
            for image in x:
                seen[hash(image[0].numpy().tobytes())] += 1
            return super().forward(x)

    extract_features_3d(blobs, Count(4), slice_size=96, target_output_size=(96, 96, 96))
    assert len(seen) == 3 * 48 and max(seen.values()) == 1


def test_slice_stride_saves_and_stays_centred(blobs):
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None, None], (64, 16, 16))
    for stride, images in ((2, 32), (4, 16), (8, 16)):
        f, info = extract_features_3d(
            ramp,
            PatchMean(4),
            planes="xy",
            slice_size=16,
            target_output_size=(8, 4, 4),
            slice_stride=stride,
            intensity=(0, 64),
        )
        assert info["images"] == images
        np.testing.assert_allclose(f[0, :, 1, 1] * 64, 3.5 + 8 * np.arange(8), atol=1e-3)


@examples(60)
@given(ratio=st.floats(1.01, 9), stride=st.integers(2, 5), n=st.integers(8, 60))
def test_thinned_slices_keep_the_centre_of_their_plane(ratio, stride, n):
    src = Grid((n, 1, 1), (10, 1, 1))
    dst = src.with_voxel_size((10 * ratio, 1, 1))
    full, thin = slice_weights(src, dst, 0), slice_weights(src, dst, 0, stride)
    assert thin.min() >= -1e-6 and (thin[full == 0] == 0).all()
    np.testing.assert_allclose(thin.sum(1), 1, atol=1e-5)
    many = ((thin > 0).sum(1) > 1) & (
        (1 + np.arange(len(thin))) * ratio <= n
    )  # the last plane may be mirrored
    np.testing.assert_allclose((thin @ np.arange(n))[many], (full @ np.arange(n))[many], atol=1e-3)
    assert (np.abs((thin - full) @ np.arange(n))[: n // int(np.ceil(ratio))] <= 0.5 + 1e-3).all()


def test_slices_between_the_planes_of_a_finer_target():
    "Every third slice, linear between them: a ramp stays a ramp but at its ends."
    src = Grid((31, 1, 1), (10, 1, 1), (40, 0, 0))
    dst = src.with_voxel_size((5, 1, 1))
    w = slice_weights(src, dst, 0, 3)
    assert set(np.flatnonzero(w.any(0))) == set(range(1, 31, 3))
    np.testing.assert_allclose(
        (w @ (40 + 10 * np.arange(31.0)))[4:-6], (dst.origin[0] + 5 * np.arange(62))[4:-6], atol=1e-3
    )


def test_the_range_is_looked_for_everywhere():
    "A black margin of a quarter of the volume is a quarter of the sample, on whichever side it is."
    x = np.random.default_rng(0).integers(100, 200, (128, 128, 128)).astype(np.uint8)
    for axis in range(3):
        black = x.copy()
        black[tuple(slice(0, 32) if a == axis else slice(None) for a in range(3))] = 0
        low, high = intensity_range(Volume(black, Grid(x.shape, 8)), (40, 99), voxels=2**19)
        assert low > 100 and high > 190
    assert intensity_range(Volume(x, Grid(x.shape, 8)), voxels=2**19) == intensity_range(
        Volume(x, Grid(x.shape, 8)), voxels=2**19
    )


def test_fusion(blobs):
    one = {p: extract_features_3d(blobs, LocalNet(), planes=[p], slice_size=96)[0] for p in PLANES}
    mean, _ = extract_features_3d(blobs, LocalNet(), slice_size=96)
    concat, _ = extract_features_3d(blobs, LocalNet(), slice_size=96, fusion="concat")
    torch.testing.assert_close(mean, sum(one.values()) / 3, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(concat, torch.cat(list(one.values())), atol=1e-5, rtol=1e-4)
    v = Volume(blobs, Grid(blobs.shape, (40, 8, 8)))
    anis = {
        p: extract_features_3d(v, LocalNet(), planes=[p], slice_size=48 if p == "xy" else 240)[0]
        for p in PLANES
    }
    weighted, _ = extract_features_3d(v, LocalNet(), slice_size=240, fusion="weighted")
    torch.testing.assert_close(weighted, (5 * anis["xy"] + anis["xz"] + anis["yz"]) / 7, atol=1e-5, rtol=1e-4)


def test_several_maps_are_concatenated(blobs):
    f, _ = extract_features_3d(blobs, Pyramid(), slice_size=96)
    a, _ = extract_features_3d(blobs, PatchMean(4), slice_size=96)
    assert f.shape[0] == 6
    torch.testing.assert_close(f[:3], a, atol=1e-5, rtol=1e-4)
    assert (f[3:] - f[:3]).abs().mean() > 1e-3


def test_neighbours_are_the_slices_before_and_after():
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None, None], (16, 16, 16))
    f, _ = extract_features_3d(
        ramp, PatchMean(4), planes="xy", slice_size=16, neighbours=True, intensity=(0, 16)
    )
    np.testing.assert_allclose(f[:, 5:8, 8, 8] * 16, [[4, 5, 6], [5, 6, 7], [6, 7, 8]], atol=1e-3)


def test_bf16_is_close(blobs):
    torch.manual_seed(0)
    net = create_backbone("vit_tiny_patch16_224")
    a, _ = extract_features_3d(blobs[:8], net, planes="xy", slice_size=96, precision="fp32")
    b, _ = extract_features_3d(blobs[:8], net, planes="xy", slice_size=96, precision="bf16")
    assert (a != b).any()
    assert F.cosine_similarity(a.flatten(1), b.flatten(1), dim=0).min() > 0.999


@pytest.mark.parametrize("axis", range(3))
def test_native_grids_place_patches_in_the_world(axis):
    "On a ramp of positions, each native feature is the position that its grid claims."
    grid = Grid((48, 48, 48), (20, 8, 10), (100, 0, -50))
    line = grid.origin[axis] + grid.voxel_size[axis] * np.arange(48, dtype=np.float32)
    ramp = np.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(3)]), grid.shape)
    out = extract_native(
        Volume(ramp, grid),
        PatchMean(4),
        slice_size=96,
        target_output_size=(24, 24, 24),
        intensity=(-100, 1900),
    )
    for p, (f, native) in out.items():
        got = np.moveaxis(f[0].numpy(), axis, 0)[2:-2, 2, 2] * 2000 - 100
        want = (native.origin[axis] + native.voxel_size[axis] * np.arange(native.shape[axis]))[2:-2]
        assert f.shape[1:] == native.shape and native.shape[PLANES[p]] == 24
        np.testing.assert_allclose(got, want, atol=0.1)


# --- streaming --------------------------------------------------------------------------------


def test_store_equals_memory_where_the_context_is_the_same(blobs, tmp_path):
    "One block that holds the volume sees whole slices, as the in-memory path does."
    torch.manual_seed(0)
    net = create_backbone("vit_tiny_patch16_224", layers=[2])
    v = volume(blobs[:32, :32, :40])
    want, info = extract_features_3d(v, net, slice_size=80, precision="fp32")
    got = extract_to_zarr(
        v, tmp_path / "f.zarr", net, pixel_size=info["pixel_nm"], precision="fp32", rgb=False
    ).read()
    torch.testing.assert_close(got.float(), want, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("voxel", (8, 16, (16, 8, 24)))
def test_haloed_blocks_equal_whole_slices_inside(blobs, tmp_path, voxel):
    v = volume(blobs)
    size = v.grid.with_voxel_size(voxel).shape
    whole, _ = extract_features_3d(v, LocalNet(), target_output_size=size, slice_size=96)
    got = (
        extract_to_zarr(
            v,
            tmp_path / "f.zarr",
            LocalNet(),
            voxel_size=voxel,
            pixel_size=4.0,
            block=16,
            chunk=8,
            halo=4,
            rgb=False,
        )
        .read()
        .float()
    )
    inner = (slice(None),) + tuple(slice(n // 6, -(n // 6)) for n in size)
    assert (got - whole)[inner].abs().max() <= 1e-3
    assert whole.std() > 0.05


class Everywhere(torch.nn.Module):
    "Patch means and a sum over the whole image: any pixel that differs shows in every feature."

    spec = FeatureSpec((2,), (2,))

    def forward(self, x):
        m = F.avg_pool2d(x, 2)
        place = (1.7 * torch.arange(m.shape[-2])[:, None] + 0.3 * torch.arange(m.shape[-1])).sin()
        return [
            torch.cat(
                [m[:, :1], (m[:, 1:] * place).sum((2, 3), keepdim=True).sum(1, keepdim=True) + m[:, :1]], 1
            )
        ]


@examples(60)
@given(data=st.data())
def test_the_region_that_is_read_is_all_that_matters(data):
    "A block from its raw region equals the block from the whole volume, its surroundings mirrored at the edge of the volume and nowhere else."
    pick = lambda *options: data.draw(st.sampled_from(options))
    shape = data.draw(st.tuples(*[st.integers(3, 25)] * 3))
    src = Grid(shape, tuple(pick(4.0, 5.24, 8.0, 20.0) for _ in range(3)), (13, -40, 5.5))
    dst = src.with_voxel_size(tuple(v * pick(0.5, 1.0, 1.31, 2.0, 3.3) for v in src.voxel_size))
    plan = Plan(
        src,
        dst,
        pick(("xy",), ("xz", "yz"), ("xy", "xz", "yz")),
        pick(2.0, 3.0, 4.0, 7.0),
        2,
        (0, 1),
        neighbours=pick(False, True),
        slice_stride=pick(1, 2, 3),
        halo=pick(0, 1, 3),
        block=(pick(2, 4, 5),) * 3,
    )
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    blocks = make_blocks(dst.shape, plan.block)
    for b in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
        part = dst.crop(b.write)
        roi = raw_region(plan, part)
        torch.testing.assert_close(
            extract_block(x[roi.slices], src.crop(roi), part, plan, Everywhere()),
            extract_block(x, src, part, plan, Everywhere()),
            atol=1e-4,
            rtol=1e-4,
        )


def test_features_do_not_depend_on_the_block(blobs, tmp_path):
    a = (
        extract_to_zarr(
            volume(blobs), tmp_path / "a.zarr", LocalNet(), pixel_size=4.0, block=16, halo=4, rgb=False
        )
        .read()
        .float()
    )
    b = (
        extract_to_zarr(
            volume(blobs), tmp_path / "b.zarr", LocalNet(), pixel_size=4.0, block=32, halo=3, rgb=False
        )
        .read()
        .float()
    )
    assert (a - b).abs().max() <= 2**-10


@pytest.mark.parametrize("halo", (1, 3))
def test_tiles_stay_on_the_lattice_whatever_the_block(blobs, tmp_path, halo):
    "24-voxel blocks and a pitch of 20 nm: block edges fall inside patches, the phase must not move."
    v = volume(blobs)
    whole, _ = extract_features_3d(v, PatchMean(5), slice_size=0 or None, intensity=(-1, 1))
    a = (
        extract_to_zarr(
            v,
            tmp_path / "a.zarr",
            PatchMean(5),
            pixel_size=4.0,
            block=24,
            chunk=8,
            halo=halo,
            intensity=(-1, 1),
            rgb=False,
        )
        .read()
        .float()
    )
    b = (
        extract_to_zarr(
            v,
            tmp_path / "b.zarr",
            PatchMean(5),
            pixel_size=4.0,
            block=48,
            chunk=8,
            halo=halo,
            intensity=(-1, 1),
            rgb=False,
        )
        .read()
        .float()
    )
    assert (a - b)[:, 2:-4, 2:-4, 2:-4].abs().max() <= 2**-10 and whole.shape == a.shape


def test_each_raw_chunk_is_decoded_once_per_block(tmp_path):
    write_multiscale(
        tmp_path / "raw.zarr",
        np.random.default_rng(0).integers(0, 255, (64, 64, 64)).astype(np.uint8),
        voxel_size=8,
        chunk=16,
        levels=1,
    )
    v = open_multiscale(tmp_path / "raw.zarr").levels[0]
    reads = []

    class Counting:
        shape, dtype = v.array.shape, v.array.dtype

        def __getitem__(self, roi):
            reads.append(roi)
            return v.array[roi]

    counted = Volume(Counting(), v.grid, v.name, v.path)
    extract_to_zarr(
        counted,
        tmp_path / "f.zarr",
        PatchMean(4),
        voxel_size=16,
        pixel_size=8.0,
        block=16,
        chunk=8,
        halo=2,
        intensity=(0, 255),
        rgb=False,
    )
    assert len(reads) == 8  # one region per block
    per_chunk = Counter(
        c
        for roi in reads
        for c in np.ndindex(4, 4, 4)
        if all(s.start < 16 * k + 16 and s.stop > 16 * k for s, k in zip(roi, c))
    )
    assert max(per_chunk.values()) <= 8


def test_projection_is_stored_and_applied(blobs, tmp_path):
    net = LocalNet(4, 16)
    full = extract_to_zarr(volume(blobs), tmp_path / "a.zarr", net, pixel_size=4.0, block=16, rgb=False)
    small = extract_to_zarr(
        volume(blobs), tmp_path / "b.zarr", net, pixel_size=4.0, block=16, n_components=4, rgb=False
    )
    from dinolab.core.show import Pca

    pca = Pca.from_dict(small.group.attrs["projection"])
    want = pca.transform(full.read().permute(1, 2, 3, 0).float().numpy())
    np.testing.assert_allclose(small.read().permute(1, 2, 3, 0).numpy(), want, atol=5e-3)
    assert pca.explained.sum() > 0.6


def test_the_picture_is_a_valid_image(blobs, tmp_path):
    import yaozarrs

    f = extract_to_zarr(volume(blobs), tmp_path / "f.zarr", LocalNet(), pixel_size=4.0, block=32)
    yaozarrs.validate_zarr_store(str(tmp_path / "f.zarr/rgb"))
    channels = [open_multiscale(tmp_path / "f.zarr/rgb", channel=c).levels[0] for c in range(3)]
    assert all(c.grid == f.grid for c in channels) and all(c.read().std() > 10 for c in channels)


def snapshot(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(Path(path).rglob("*")) if p.is_file()}


class SlowNet(LocalNet):
    def forward(self, x):
        time.sleep(0.002)
        return super().forward(x)


def test_killed_and_resumed_store_is_identical(blobs, tmp_path):
    "SIGKILL at twenty random moments, resumed each time."

    def run(store):
        extract_to_zarr(
            volume(blobs), store, SlowNet(), pixel_size=4.0, block=16, chunk=8, batch_size=8, n_components=4
        )

    t = time.perf_counter()
    run(tmp_path / "calm.zarr")
    whole = time.perf_counter() - t
    rng, kills = random.Random(0), 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                run(tmp_path / "killed.zarr")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, whole * 0.08))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if kills == 20:
        with pytest.raises(InputError, match="unfinished|no zarr group|no feature store|no such path"):
            open_features(tmp_path / "killed.zarr")
    run(tmp_path / "killed.zarr")
    assert kills >= 10  # a fast machine may finish before the last ones
    calm, killed = snapshot(tmp_path / "calm.zarr"), snapshot(tmp_path / "killed.zarr")
    assert calm.keys() == killed.keys() and [k for k in calm if calm[k] != killed[k]] == []


@pytest.mark.parametrize("backbone", ("means", "vit"))
def test_processes_give_the_same_store(blobs, tmp_path, backbone):
    "A network with weights, too: they must reach processes that are started anew."
    torch.manual_seed(0)
    net = PatchMean(4) if backbone == "means" else create_backbone("vit_tiny_patch16_224", layers=[0, 1])
    run = lambda n: extract_to_zarr(
        volume(blobs), tmp_path / f"{n}.zarr", net, pixel_size=4.0, block=16, n_components=3, workers=n
    )
    run(1), run(2)
    assert open_features(tmp_path / "2.zarr").group["done"].size == 27
    assert snapshot(tmp_path / "1.zarr") == snapshot(tmp_path / "2.zarr")


@pytest.mark.parametrize(
    "step", ("fill_pyramid", "_fit_projection", "create_array", "create_multiscale", "_sample_features")
)
def test_ended_between_two_steps(blobs, tmp_path, monkeypatch, step):
    "The steps that are too short for a random kill: the run ends as each begins, or when half the coarser levels are there."
    run = lambda store: extract_to_zarr(
        volume(blobs[:32, :32, :32]), store, LocalNet(), pixel_size=4.0, block=16, chunk=8, n_components=4
    )
    run(tmp_path / "calm.zarr")
    with monkeypatch.context() as m:

        def end(*args, **kw):
            raise KeyboardInterrupt

        at = dinolab.volumes.store if step == "create_array" else dinolab.features.store
        m.setattr(at, step, end)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "ended.zarr")
    left = "no such path" if step == "create_array" else "unfinished"  # nothing was begun yet
    with pytest.raises(InputError, match=left):
        open_features(tmp_path / "ended.zarr")
    run(tmp_path / "ended.zarr")
    assert snapshot(tmp_path / "calm.zarr") == snapshot(tmp_path / "ended.zarr")


HALF = "zarr.0123456789abcdef0123456789abcdef.partial"


@pytest.mark.parametrize("left", ("nothing", "file", "group", "group and file", "lock"))
def test_killed_before_the_first_settings(blobs, tmp_path, left):
    "What zarr leaves when it is killed in its very first write is no reason to refuse the folder."
    store = tmp_path / "f.zarr"
    store.mkdir()
    if "group" in left:
        zarr.open_group(store, mode="w")
    if "file" in left:
        (store / HALF).write_text('{"zarr_for')
    if "lock" in left:
        (store / ".lock").write_text("12345")
    run = lambda path: extract_to_zarr(volume(blobs[:16, :16, :16]), path, PatchMean(4), pixel_size=4.0)
    run(store)
    run(tmp_path / "calm.zarr")
    assert snapshot(store) == snapshot(tmp_path / "calm.zarr")


def test_stores_elsewhere(blobs, tmp_path):
    "Through fsspec: the same features, and the same care for what is there."
    v, url = volume(blobs[:16, :16, :20]), "memory://elsewhere/f.zarr"
    run = lambda path, **kw: extract_to_zarr(
        v, path, PatchMean(4), **{**dict(pixel_size=4.0, block=16, halo=1), **kw}
    )
    want = run(tmp_path / "f.zarr").read()
    for path in (url, f"file://{tmp_path}/g.zarr"):
        torch.testing.assert_close(run(path).read(), want, rtol=0, atol=0)
        torch.testing.assert_close(open_features(path).read(), want, rtol=0, atol=0)
        assert len(open_multiscale(f"{path}/rgb", channel=0).levels) == 4
        run(path)
        with pytest.raises(InputError, match="was begun with other settings: plan.halo .1 there, 2 now"):
            run(path, halo=2)
        with pytest.raises(InputError, match="resume=True to go on"):
            run(path, resume=False)
    assert snapshot(tmp_path / "f.zarr") == snapshot(tmp_path / "g.zarr")
    zarr.open_group("memory://elsewhere/mine.zarr", mode="w").attrs["mine"] = 1
    with pytest.raises(InputError, match="is no feature store"):
        run("memory://elsewhere/mine.zarr")


def test_other_raw_data_is_another_setting(blobs, tmp_path):
    "Another channel of the same file, or another array of the same shape, must not continue a store."
    g = zarr.open_group(tmp_path / "c.zarr", mode="w")
    g.create_array("0", shape=(2, 16, 16, 16), chunks=(1, 16, 16, 16), dtype="u1")[:] = np.random.default_rng(
        0
    ).integers(1, 255, (2, 16, 16, 16))
    axes = [dict(name="c", type="channel")] + [dict(name=x, type="space", unit="nanometer") for x in "zyx"]
    g.attrs["ome"] = dict(
        version="0.5",
        multiscales=[
            dict(
                axes=axes,
                datasets=[dict(path="0", coordinateTransformations=[dict(type="scale", scale=[1, 8, 8, 8])])],
            )
        ],
    )
    run = lambda source, store: extract_to_zarr(
        source, tmp_path / store, PatchMean(4), pixel_size=4.0, intensity=(0, 255), rgb=False
    )
    channels = [open_multiscale(tmp_path / "c.zarr", channel=c) for c in (0, 1)]
    run(channels[0], "a.zarr")
    run(channels[0], "a.zarr")
    for other in (channels[1], channels[1].levels[0].crop(np.s_[:, :, :])):
        with pytest.raises(InputError, match="source of .* is not what it was"):
            run(other, "a.zarr")
    arrays = [volume(blobs[k : k + 16, :16, :16]) for k in (0, 16)]
    run(arrays[0], "b.zarr")
    run(arrays[0], "b.zarr")
    with pytest.raises(InputError, match="source of .* is not what it was"):
        run(arrays[1], "b.zarr")


def test_the_model_stays_where_it_is(blobs):
    "What travels to workers is a copy; weights that two layers share stay shared."
    net = LocalNet()
    net.twin = net.net[0]
    task = _Extraction(volume(blobs), None, None, net, None)
    there = pickle.loads(pickle.dumps(task)).backbone
    assert there.twin.weight is there.net[0].weight and there.net[0].weight is not net.net[0].weight
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), net.state_dict().values()))


def test_two_runs_on_one_store(blobs, tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            extract_to_zarr(
                volume(blobs), tmp_path / "f.zarr", SlowNet(), pixel_size=4.0, block=16, batch_size=4
            )
        finally:
            os._exit(0)
    while not (tmp_path / "f.zarr/done").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="in use by process"):
        extract_to_zarr(volume(blobs), tmp_path / "f.zarr", SlowNet(), pixel_size=4.0, block=16, batch_size=4)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    extract_to_zarr(volume(blobs), tmp_path / "f.zarr", SlowNet(), pixel_size=4.0, block=16, batch_size=4)


# --- bad input --------------------------------------------------------------------------------


def nan(x):
    return np.where(x > 2, np.nan, x)


BAD = {
    "2D": (lambda x: dict(volume=x[0]), "expected three axes"),
    "5D": (lambda x: dict(volume=x[None, None]), "expected three axes"),
    "empty": (lambda x: dict(volume=x[:0]), "at least one voxel"),
    "constant": (lambda x: dict(volume=np.full_like(x, 3)), "is constant (3)"),
    "NaN": (lambda x: dict(volume=np.where(x > 0, np.nan, x)), "NaN or infinite"),
    "inf": (lambda x: dict(volume=np.where(x > 0, np.inf, x)), "NaN or infinite"),
    "complex": (lambda x: dict(volume=x.astype(complex)), "complex128: expected integers or floats"),
    "planes": (lambda x: dict(volume=x, planes=("xy", "yx")), "unknown plane 'yx'"),
    "planes twice": (lambda x: dict(volume=x, planes=("xy", "xy")), "at most once"),
    "target": (lambda x: dict(volume=x, target_output_size=(48, 48, 48 * 17)), "at most 16 times"),
    "target 2": (lambda x: dict(volume=x, target_output_size=(4, 4)), "target_output_size=(4, 4): expected"),
    "target 0": (lambda x: dict(volume=x, target_output_size=(4, 4, 0)), "of 1 or more"),
    "slice size": (lambda x: dict(volume=x, slice_size=97), "multiple of the patch, 4, e.g. 96"),
    "batch": (lambda x: dict(volume=x, batch_size=0), "batch_size=0: expected a whole number of 1 or more"),
    "precision": (lambda x: dict(volume=x, precision="fp8"), "expected auto, fp32 or bf16"),
    "fusion": (lambda x: dict(volume=x, fusion="max"), "expected mean, weighted or concat"),
    "intensity": (lambda x: dict(volume=x, intensity=(1, 1)), "low below high"),
    "stride": (lambda x: dict(volume=x, slice_stride=0), "of 1 or more"),
    "path": (lambda x: dict(volume="/no/such.zarr"), "no such path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(blobs, case):
    make, message = BAD[case]
    with pytest.raises(InputError) as e:
        extract_features_3d(backbone=PatchMean(4), **make(blobs))
    assert message in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_extreme_ratios_warn(blobs):
    with pytest.warns(UserWarning, match="ratios from 0.1 to 16"):
        extract_features_3d(blobs, PatchMean(4), target_output_size=(2, 2, 2), slice_size=48)


def test_bad_stores(blobs, tmp_path):
    v, net = volume(blobs[:16, :16, :16]), PatchMean(4)
    with pytest.raises(InputError, match="cannot be written"):
        extract_to_zarr(v, "/proc/f.zarr", net, pixel_size=4.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is no feature store"):
        extract_to_zarr(v, tmp_path / "mine", net, pixel_size=4.0)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    write_multiscale(
        tmp_path / "raw.zarr", np.arange(4096).reshape(16, 16, 16).astype(np.uint16), voxel_size=8
    )
    before = snapshot(tmp_path / "raw.zarr")
    with pytest.raises(InputError, match="is no feature store"):
        extract_to_zarr(v, tmp_path / "raw.zarr", net, pixel_size=4.0)
    assert snapshot(tmp_path / "raw.zarr") == before
    holes = np.asarray(blobs[:16, :16, :16]).copy()
    holes[3, 4, 5] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        extract_to_zarr(Volume(holes, v.grid), tmp_path / "nan.zarr", net, pixel_size=4.0, intensity=(0, 1))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(n_components=9), "n_components 9: expected 1 to 3"),
        (dict(n_components=0), "n_components=0: expected a whole number of 1 or more"),
        (dict(n_components=2), "at least 3 for the image of components; pass rgb=False"),
        (dict(block=20), "block 20, chunk 16"),
        (dict(chunk=0), "chunk=0: expected a whole number"),
        (dict(pixel_size=-4.0), "pixel_size=-4.0: expected a number of more than 0 nm"),
        (dict(voxel_size=(8, 8)), "voxel_size=.8, 8.: expected a number, or 3 of them"),
        (dict(voxel_size=0), "voxel_size=0: expected a number"),
        (dict(intensity=(1, 0)), "low below high"),
        (dict(planes="zz"), "unknown plane"),
        (dict(halo=-1), "halo=-1: expected a whole number of 0 or more"),
        (dict(precision="fp8"), "fp8"),
    ],
)
def test_refused_before_anything_is_written(blobs, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        extract_to_zarr(
            volume(blobs[:16, :16, :16]),
            tmp_path / "f.zarr",
            PatchMean(4),
            **{**dict(pixel_size=4.0), **options},
        )
    assert not (tmp_path / "f.zarr").exists()


WRONG = {
    "a text": "8",
    "a flag": True,
    "nan": float("nan"),
    "infinite": float("inf"),
    "negative": -1,
    "a half": 0.5,
    "five": (1, 1, 1, 1, 1),
    "none in it": (None, 1),
}
HALVES = ("pixel_size", "voxel_size", "raw_resolution")
STORED = ("voxel_size", "raw_resolution", "pixel_size", "block", "halo", "chunk", "n_components")
COMMON = ("slice_stride", "batch_size", "intensity")
IN_MEMORY = ("slice_size", "target_output_size")


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", (*STORED, *COMMON, *IN_MEMORY, "workers"))
def test_every_number_is_checked(blobs, tmp_path, name, wrong):
    "One line that names the setting, whatever is given for it, and nothing is written."
    if wrong == "a half" and name in HALVES:
        return
    small = volume(blobs[:16, :16, :16])
    with pytest.raises(InputError, match=f"^{name}=.*expected") as e:
        if name in IN_MEMORY:
            extract_features_3d(small, PatchMean(4), **{name: WRONG[wrong]})
        else:
            extract_to_zarr(small, tmp_path / "f.zarr", PatchMean(4), **{name: WRONG[wrong]})
    assert "\n" not in str(e.value) and not (tmp_path / "f.zarr").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(planes=3), "planes 3: expected names"),
        (dict(planes=()), "one at least"),
        (dict(fusion=None), "expected mean, weighted or concat"),
        (dict(precision=32), "expected auto, fp32 or bf16"),
        (dict(grid=8), "expected a Grid"),
        (dict(intensity=(0, float("inf"))), "intensity=.0, inf.: expected two numbers"),
        (dict(intensity=(float("nan"), 1)), "intensity="),
    ],
)
def test_other_settings_are_checked(blobs, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        extract_to_zarr(volume(blobs[:16, :16, :16]), tmp_path / "f.zarr", PatchMean(4), **options)
    assert not (tmp_path / "f.zarr").exists()


# --- what is kept is what it says it is ---------------------------------------------------------


def extraction(tmp_path, source, net=None, **options):
    options = {**dict(pixel_size=4.0, block=16, intensity=(0, 255), rgb=False), **options}
    return extract_to_zarr(source, tmp_path / "f.zarr", net or LocalNet(), **options)


def interrupt(monkeypatch, after):
    "Extraction stops after so many blocks."
    original, seen = dinolab.features.store._Extraction.__call__, []

    def call(self, block):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(block)
        original(self, block)

    monkeypatch.setattr(dinolab.features.store._Extraction, "__call__", call)


def other(x):
    "Values of the same size and type that differ."
    return x[::-1].copy()


@pytest.mark.parametrize("finished", (True, False))
def test_a_source_that_was_replaced_is_named(tmp_path, finished):
    "In its place, by a file of the same size: no feature of the old one may pass for one of the new; the store stays as it is."
    x = np.random.default_rng(0).integers(0, 255, (32, 16, 16)).astype(np.uint8)
    np.save(tmp_path / "raw.npy", x)
    source = lambda: Volume(np.load(tmp_path / "raw.npy", mmap_mode="r"), Grid(x.shape, 8), "raw")
    with pytest.MonkeyPatch.context() as m:
        if not finished:
            interrupt(m, 1)
            with pytest.raises(KeyboardInterrupt):
                extraction(tmp_path, source())
        else:
            extraction(tmp_path, source())
    before = snapshot(tmp_path / "f.zarr")
    np.save(tmp_path / "raw.npy", other(x))
    with pytest.raises(InputError, match="source of .*f.zarr is not what it was") as e:
        extraction(tmp_path, source())
    assert "\n" not in str(e.value) and snapshot(tmp_path / "f.zarr") == before
    np.save(tmp_path / "raw.npy", x)
    extraction(tmp_path, source())
    assert finished == (snapshot(tmp_path / "f.zarr") == before)


@pytest.mark.parametrize("kind", ("raw.zarr", "raw.nii.gz"))
def test_a_file_that_was_replaced_is_named(tmp_path, kind):
    x = np.random.default_rng(0).integers(0, 255, (16, 16, 16)).astype(np.uint8)

    def write(values):
        if kind == "raw.zarr":
            shutil.rmtree(tmp_path / kind, ignore_errors=True)
            write_multiscale(tmp_path / kind, values, voxel_size=8, levels=1)
        else:
            image = nibabel.Nifti1Image(values.T, np.diag([8e-6, 8e-6, 8e-6, 1]))
            image.header.set_xyzt_units("mm")
            nibabel.save(image, tmp_path / kind)

    write(x)
    extraction(tmp_path, tmp_path / kind)
    before = snapshot(tmp_path / "f.zarr")
    write(x)  # written again: another time, the same content
    extraction(tmp_path, tmp_path / kind)
    write(other(x))
    with pytest.raises(InputError, match="source of .*f.zarr is not what it was"):
        extraction(tmp_path, tmp_path / kind)
    assert snapshot(tmp_path / "f.zarr") == before


def test_other_weights_are_named(blobs, tmp_path):
    v, net = volume(blobs[:16, :16, :16]), LocalNet()
    extraction(tmp_path, v, net, intensity=(-1, 1))
    before = snapshot(tmp_path / "f.zarr")
    with torch.no_grad():
        net.net[0].bias[3] += 1e-3
    with pytest.raises(InputError, match="begun with other settings: weights_hash"):
        extraction(tmp_path, v, net, intensity=(-1, 1))
    assert snapshot(tmp_path / "f.zarr") == before


# --- finite -------------------------------------------------------------------------------------


class Scaled(LocalNet):
    "Features that are much too large, in one place of the image or everywhere."

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return [m * self.factor for m in super().forward(x)]


@pytest.mark.parametrize("n_components", (None, 3))
@pytest.mark.parametrize("factor", (1e7, float("nan"), float("inf")))
def test_what_is_not_finite_is_no_complete_store(blobs, tmp_path, factor, n_components):
    "1e7 is a float32, but no float16."
    with pytest.raises(InputError, match="NaN or infinite") as e:
        extraction(
            tmp_path,
            volume(blobs[:16, :16, :32]),
            Scaled(factor),
            n_components=n_components,
            intensity=(-1, 1),
        )
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="unfinished"):
        open_features(tmp_path / "f.zarr")


def test_weights_and_features_in_memory_are_finite(blobs):
    net = LocalNet()
    with torch.no_grad():
        net.net[2].weight[0, 0, 0, 0] = float("nan")
    for extract in (extract_features_3d, extract_native):
        with pytest.raises(InputError, match="net.2.weight holds 1 values that are NaN"):
            extract(blobs[:16, :16, :16], net)
        with pytest.raises(InputError, match="features are NaN or infinite"):
            extract(blobs[:16, :16, :16], Scaled(float("inf")))
    f, _ = extract_features_3d(blobs[:16, :16, :16], Scaled(1e7))
    assert torch.isfinite(f).all()  # in float32 they are fine


@pytest.mark.parametrize(
    "offset,dtype", [(2.0**31, "f8"), (-(2.0**40), "f8"), (2**31 - 300, "i8"), (2**24, "i4")]
)
def test_an_offset_keeps_the_contrast(blobs, offset, dtype):
    "Whole numbers of 0 to 200, and the same beyond what float32 can tell apart: the same features."
    x = np.round(100 + 60 * blobs[:16, :16, :16].astype("f8") / abs(blobs).max())
    plain, there = extract_features_3d(x.astype("f4"), PatchMean(4))
    shifted, here = extract_features_3d((x + offset).astype(dtype), PatchMean(4))
    assert np.subtract(here["intensity"], offset) == pytest.approx(there["intensity"], abs=1e-3)
    torch.testing.assert_close(shifted, plain, atol=1e-5, rtol=0)
    assert plain.std() > 0.05


def test_read_only_store(blobs, tmp_path):
    run = lambda: extract_to_zarr(
        volume(blobs[:16, :16, :16]), tmp_path / "ro/f.zarr", PatchMean(4), pixel_size=4.0
    )
    (tmp_path / "ro").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "ro")], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        run()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "ro")], check=True)
        with pytest.raises(InputError, match="cannot be written .Read-only"):
            run()
        assert open_features(tmp_path / "ro/f.zarr").read().std() > 0
    finally:
        subprocess.run(["umount", str(tmp_path / "ro")])


def test_full_disk(blobs, tmp_path):
    "The error says so in one line, and the run goes on when there is room."
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(InputError, match="No space left.*run again"):
            extract_to_zarr(volume(blobs), mount / "f.zarr", LocalNet(), pixel_size=4.0, block=16)
        subprocess.run(["mount", "-o", "remount,size=50m", str(mount)], check=True)
        extract_to_zarr(volume(blobs), mount / "f.zarr", LocalNet(), pixel_size=4.0, block=16)
        extract_to_zarr(volume(blobs), tmp_path / "g.zarr", LocalNet(), pixel_size=4.0, block=16)
        assert snapshot(mount / "f.zarr") == snapshot(tmp_path / "g.zarr")
    finally:
        subprocess.run(["umount", str(mount)])


@examples(15)
@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3),
    size=st.tuples(*[st.integers(1, 20)] * 3),
    planes=st.sets(st.sampled_from(sorted(PLANES)), min_size=1),
)
def test_any_shape_to_any_size(shape, size, planes):
    if any(t > 16 * s for s, t in zip(shape, size)):
        return
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if x.size < 2:
        return
    f, _ = extract_features_3d(x, PatchMean(2), planes=sorted(planes), target_output_size=size, slice_size=16)
    assert f.shape == (3, *size) and torch.isfinite(f).all() and f.min() >= -1e-4 and f.max() <= 1 + 1e-4

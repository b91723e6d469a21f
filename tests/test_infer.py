"Tiles and blocks: compared with MONAI; the same bytes whatever the blocks, the workers and the kills."

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, strategies as st
from torch import nn

from dinolab.core.errors import InputError
from dinolab.core.region import Box
from dinolab.volumes.tiles import (
    DirectConvolution,
    all_tiles,
    axis_weight,
    blend,
    open_prediction,
    predict_to_zarr,
    sliding_window,
    tile_starts,
    tile_weight,
)
from dinolab.volumes.grid import Grid
from dinolab.volumes.volume import Volume

SHAPE, TILE = (20, 24, 28), (12, 12, 16)
GRID = Grid(SHAPE, (8, 4, 4))


class Predict:
    "Probabilities that depend on the tile, not only on the voxel; dies when it is called for the n-th time."

    def __init__(self, classes=3, die_after=None):
        self.classes, self.die_after, self.calls = classes, die_after, 0

    def __call__(self, region):
        self.calls += 1
        if self.die_after is not None and self.calls > self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        z, y, x = np.meshgrid(*(np.arange(s.start, s.stop) for s in region), indexing="ij")
        start = sum((i + 1) * s.start for i, s in enumerate(region))
        logits = np.stack(
            [
                np.sin(0.3 * (c + 1) * z + 0.2 * y + c) + np.cos(0.25 * x * (c + 1) + 0.1 * start)
                for c in range(self.classes)
            ]
        )
        p = np.exp(logits)
        return p / p.sum(0) if self.classes > 1 else 1 / (1 + np.exp(-logits))


def predict(store, die_after=None, classes=3, predict=None, **options):
    "The prediction that all tests compare."
    defaults = dict(
        classes=[f"c{i}" for i in range(classes)],
        tile=TILE,
        overlap=0.5,
        chunk=8,
        block=(8, 16, 16),
        probabilities=True,
    )
    return predict_to_zarr(predict or Predict(classes, die_after), GRID, store, **defaults | options)


def content(store, part="*"):
    "Files of a store and their bytes, but for the record of blocks."
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in sorted(Path(store).rglob(part))
        if p.is_file() and "done_" not in str(p) and p.name != ".lock"
    }


# ---- the lattice

lengths = st.tuples(st.integers(1, 200), st.integers(1, 80), st.floats(0, 0.9))


@examples(200)
@given(lengths)
def test_tiles_cover_in_order_and_overlap(case):
    length, tile, overlap = case
    starts = tile_starts(length, tile, overlap)
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == max(0, length - tile) and all(isinstance(s, int) for s in starts)
    assert (steps > 0).all() and (steps <= max(1, tile * (1 - overlap))).all()
    covered = np.zeros(length, bool)
    for s in starts:
        covered[s : s + tile] = True
    assert covered.all()
    stride = max(1, int(tile * (1 - overlap)))
    assert len(starts) == (
        1 if tile >= length else 1 + math.ceil((length - tile) / stride)
    )  # as few as possible
    if len(steps):
        assert steps.max() - steps.min() <= 1  # evenly spread


@examples(100)
@given(lengths, st.integers(1, 16))
def test_tiles_start_at_multiples_of_a_step(case, step):
    length, tile, overlap = case
    if tile < min(step, length):
        with pytest.raises(InputError, match="gaps"):
            tile_starts(length, tile, overlap, step)
        return
    starts = tile_starts(length, tile, overlap, step)
    assert starts[0] == 0 and starts[-1] == max(0, length - tile) and all(s % step == 0 for s in starts[:-1])
    gaps = np.diff(starts)
    assert (gaps > 0).all() and (gaps <= max(step, tile * (1 - overlap))).all()


@examples(60)
@given(
    st.tuples(*[st.integers(1, 20)] * 3),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.data(),
)
def test_a_weighted_mean_of_equal_values_is_that_value(shape, tile, overlap, data):
    tiles = all_tiles(shape, tile, overlap)
    lo = [data.draw(st.integers(0, n - 1)) for n in shape]
    region = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(lo, shape))
    x = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    np.testing.assert_allclose(
        blend(lambda t: x[(slice(None), *t)], region, tiles, 2), x[(slice(None), *region)], rtol=1e-5
    )


def test_weight_is_separable_symmetric_and_positive():
    w = tile_weight(np.s_[1:6, 1:9, 1:17], (9, 10, 20))
    assert w.shape == (5, 8, 16) and w.min() > 0 and w.max() <= 1
    np.testing.assert_allclose(w, w[::-1, ::-1, ::-1], rtol=1e-6)
    one = lambda n: np.maximum(np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2), 1e-3)
    np.testing.assert_allclose(w, np.einsum("i,j,k->ijk", one(5), one(8), one(16)), rtol=1e-5)


def test_weight_is_one_towards_the_edges_of_the_volume():
    assert (axis_weight(slice(0, 8), 20)[:4] == 1).all() and axis_weight(slice(0, 8), 20)[-1] < 1e-2
    assert (axis_weight(slice(12, 20), 20) == axis_weight(slice(0, 8), 20)[::-1]).all()


def brute_blend(f, tiles, channels):
    total, weight = np.zeros((channels, *SHAPE)), np.zeros(SHAPE)
    for t in tiles:
        w = tile_weight(t, SHAPE).astype(float)
        total[(slice(None), *t)] += f(t) * w
        weight[t.slices] += w
    return total / weight


# ---- in memory


@pytest.mark.parametrize(
    "size, tile, overlap",
    [((20, 24), (8, 12), 0.5), ((17, 12), (9, 12), 0.0), ((14, 10, 17), (6, 6, 10), 0.25)],
)
def test_sliding_window_is_that_of_monai(size, tile, overlap):
    inferers = pytest.importorskip("monai.inferers")
    for n, t in zip(size, tile):  # where tiles are spread evenly anyway
        theirs = sorted({min(i * int(t * (1 - overlap)), n - t) for i in range(n)}) if t < n else [0]
        assert theirs == tile_starts(n, t, overlap)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    net = nn.Sequential(conv(2, 3, 3, padding=1), nn.Sigmoid(), conv(3, 3, 3, padding=1)).requires_grad_(
        False
    )  # zero padding: tiles matter
    x = torch.randn(2, 2, *size)
    expected = inferers.sliding_window_inference(x, tile, 1, net, overlap=overlap, mode="constant")
    torch.testing.assert_close(
        sliding_window(net, x, tile, overlap, "constant"), expected, atol=1e-5, rtol=1e-5
    )
    assert (expected - net(x)).abs().max() > 1e-3
    seen = []
    inside = sliding_window(lambda p: (seen.append(p.shape[2:]), net(p))[1], x, tile, overlap)
    assert set(seen) == {torch.Size(tile)} and inside.shape == expected.shape


def test_sliding_window_of_an_image_smaller_than_the_tile():
    net = nn.Conv3d(1, 2, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 1, 5, 6, 7)
    for weights in ("gaussian", "constant"):
        torch.testing.assert_close(
            sliding_window(net, x, (8, 8, 8), 0.5, weights), net(x), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(InputError, match="expected 3 sizes"):
        sliding_window(net, x, (8, 8))


# ---- one image at a time


@given(
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 0, 1), "valid"]),
    dilation=st.integers(1, 2),
    channels=st.sampled_from([(1, 4), (3, 2)]),
    bias=st.booleans(),
)
@examples(40)
def test_direct_convolution_is_that_of_torch(kernel, stride, padding, dilation, channels, bias):
    torch.manual_seed(0)
    net, x = (
        nn.Conv3d(*channels, kernel, stride, padding, dilation, bias=bias),
        torch.randn(1, channels[0], 9, 10, 11),
    )
    with torch.no_grad():
        with DirectConvolution():
            found = net(x)
        torch.testing.assert_close(found, net(x), atol=1e-5, rtol=1e-5)
        with DirectConvolution():
            torch.testing.assert_close(
                torch.conv3d(x, net.weight),
                torch.conv3d(x.double(), net.weight.double()).float(),
                atol=1e-5,
                rtol=1e-5,
            )  # its defaults


def operations(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        f()
    return {e.key for e in seen.key_averages()}


def test_direct_convolution_takes_the_fast_way():
    "Wherever torch would unfold the image; gradients, doubles and images without a batch are left to torch."
    net, x = nn.Conv3d(4, 4, 3, padding=1), torch.rand(1, 4, 8, 8, 8)
    slow = "aten::slow_conv3d"
    with torch.no_grad():
        if slow not in operations(lambda: net(x)):
            pytest.skip("this torch takes oneDNN by itself: DirectConvolution is of no use")
    assert (
        slow not in (seen := operations(lambda: sliding_window(net, x, (8, 8, 8))))
        and "aten::mkldnn_convolution" in seen
    )
    with DirectConvolution():
        net(x).sum().backward()
        with torch.no_grad():
            assert net(x[0]).shape == (4, 8, 8, 8) and net.double()(x.double()).dtype == torch.float64
    assert net.weight.grad.abs().sum() > 0


# ---- on disk


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    store = tmp_path_factory.mktemp("infer") / "a.zarr"
    predict(store)
    return store


def test_prediction_by_brute_force(reference):
    found = open_prediction(reference)
    expected = brute_blend(Predict(), all_tiles(SHAPE, TILE, 0.5), 3)
    assert np.abs(found.probabilities() - expected).max() <= 0.5 / 255 + 1e-5
    clear = np.sort(expected, 0)[-1] - np.sort(expected, 0)[-2] > 1e-5
    labels = found.labels.levels[0].read()
    np.testing.assert_array_equal(labels[clear], expected.argmax(0)[clear])


@pytest.mark.parametrize("block, workers", [((24, 24, 32), 1), ((8, 8, 8), 1), ((16, 24, 8), 2)])
def test_blocks_and_workers_leave_the_same_bytes(block, workers, reference, tmp_path):
    predict(tmp_path / "b.zarr", block=block, workers=workers)
    assert content(tmp_path / "b.zarr") == content(reference)


def test_a_killed_prediction_goes_on_to_the_same_bytes(reference, tmp_path):
    store = tmp_path / "b.zarr"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_infer; test_infer.predict({str(store)!r}, die_after=30)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="unfinished"):
        open_prediction(store)
    with pytest.raises(InputError, match="other settings"):
        predict(store, overlap=0.25)
    whole, rest = Predict(), Predict()
    predict(tmp_path / "c.zarr", predict=whole)
    predict(store, predict=rest)
    assert content(store) == content(reference) and 0 < rest.calls < whole.calls
    again = Predict()
    predict(store, predict=again)
    assert again.calls == 0 and content(store) == content(reference)


def test_a_volume_smaller_than_the_tile_is_one_tile(tmp_path):
    one = Predict()
    found = predict(tmp_path / "b.zarr", predict=one, tile=(64, 64, 64), block=(24, 24, 32))
    assert one.calls == 1
    assert (
        np.abs(found.probabilities() - Predict()(tuple(slice(0, n) for n in SHAPE))).max() <= 0.5 / 255 + 1e-5
    )


def test_one_class_is_a_threshold_and_skipped_blocks_are_0(tmp_path):
    found = predict(tmp_path / "b.zarr", classes=1, skip=lambda region: region[0].start >= 16)
    p, expected = found.probabilities(), brute_blend(Predict(1), all_tiles(SHAPE, TILE, 0.5), 1)
    labels = found.labels.levels[0].read()
    assert not p[:, 16:].any() and not labels[16:].any()
    clear = np.abs(expected[0] - 0.5) > 1e-5
    np.testing.assert_array_equal(labels[:16][clear[:16]], (expected[0] > 0.5)[:16][clear[:16]])


def test_errors(tmp_path):
    with pytest.raises(InputError, match="shape"):
        predict(tmp_path / "a.zarr", predict=lambda region: np.zeros((3, 2, 2, 2)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(InputError, match="no prediction"):
        predict(tmp_path / "other")
    assert (tmp_path / "other/file").read_text() == "mine"
    for wrong in ((10, 4, 1.0), (10, 0, 0.5), (0, 4, 0.5), (10, 4, -0.1)):
        with pytest.raises(InputError, match="expected"):
            tile_starts(*wrong)


# ---- what a prediction is made of


class Brightness:
    "Probabilities that depend on the raw volume; NaN at one place on request."

    def __init__(self, raw, spoilt=None):
        self.raw, self.spoilt = raw, spoilt

    def __call__(self, region):
        p = self.raw[region.slices].astype(np.float32) / 255
        if self.spoilt is not None and Box.sized(self.spoilt, 1).intersect(region):
            at = Box.sized(self.spoilt, 1).relative_to(region)
            p[at.slices] = np.nan
        return np.stack([1 - p, p])


def bright(store, raw, spoilt=None, **options):
    arguments = dict(classes=["dark", "bright"], tile=TILE, chunk=8, block=(8, 16, 16), probabilities=True)
    source = Volume(raw, GRID)
    return predict_to_zarr(
        Brightness(raw, spoilt), GRID, store, sources=dict(raw=source), **arguments | options
    )


def test_a_prediction_of_one_volume_is_not_returned_for_another(tmp_path):
    a, b = np.random.default_rng(0).integers(0, 255, (2, *SHAPE)).astype(np.uint8)
    first = bright(tmp_path / "p.zarr", a).labels.levels[0].read()
    before = content(tmp_path / "p.zarr")
    with pytest.raises(InputError, match="raw of .* is not what it was"):
        bright(tmp_path / "p.zarr", b)
    assert content(tmp_path / "p.zarr") == before
    np.testing.assert_array_equal(bright(tmp_path / "p.zarr", a.copy()).labels.levels[0].read(), first)
    assert (bright(tmp_path / "q.zarr", b).labels.levels[0].read() != first).any()


def test_a_finished_prediction_is_not_computed_in_other_blocks(reference, tmp_path):
    again = Predict()
    predict(tmp_path / "p.zarr")
    predict(tmp_path / "p.zarr", predict=again, block=(16, 24, 32))
    assert again.calls == 0 and content(tmp_path / "p.zarr") == content(reference)


def test_probabilities_that_are_none_are_an_error(tmp_path):
    raw = np.full(SHAPE, 200, np.uint8)
    with pytest.raises(InputError, match=r"blocks failed.*probabilities of Box\(.*NaN or infinite") as e:
        bright(tmp_path / "p.zarr", raw, spoilt=(2, 3, 4))
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="unfinished"):
        open_prediction(tmp_path / "p.zarr")
    found = bright(tmp_path / "p.zarr", raw)
    assert (found.labels.levels[0].read() == 1).all()


@pytest.mark.parametrize(
    "wrong", (dict(block=(9, 16, 16)), dict(overlap=1.5), dict(classes=0), dict(tile=(0, 8, 8)))
)
def test_wrong_requests_leave_nothing(tmp_path, wrong):
    with pytest.raises(InputError):
        predict(tmp_path / "p.zarr", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writes", (0, 1, 3, 5, 9, 20))
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, writes, reference):
    from test_volume import full_disk

    with monkeypatch.context() as patch:
        full_disk(patch, writes)
        with pytest.raises(InputError, match="No space left on device"):
            predict(tmp_path / "p.zarr")
    with pytest.raises(InputError):
        open_prediction(tmp_path / "p.zarr")
    predict(tmp_path / "p.zarr")
    assert content(tmp_path / "p.zarr") == content(reference)

"Keys, turns, affinities and descriptors by brute force; perfect affinities give perfect objects."

import hashlib
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, strategies as st
from skimage.measure import label

from dinolab.core.keys import key_seed, keyed_rng
from dinolab.data.augment import PRESETS, Augment, Orientation, find_augment
from dinolab.core.errors import InputError
from dinolab.volumes.instances import (
    affinities,
    local_shape_descriptors,
    mutex_watershed,
    seeded_watershed,
    segment_affinities,
    shifted,
)

OFFSETS = {
    2: [(-1, 0), (0, -1), (-3, 0), (0, -3), (2, -2)],
    3: [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, 3, -3), (0, -3, 0)],
}
orientations = st.builds(Orientation, st.permutations(range(3)).map(tuple), st.tuples(*[st.booleans()] * 3))


def partition(shape, kinds, seed, background=True):
    "Connected objects that touch, of two voxels or more, in random shapes."
    raw = np.random.default_rng(seed).integers(0 if background else 1, kinds + 1, shape)
    found = label(raw, background=0, connectivity=1)
    return np.where(np.bincount(found.ravel(), minlength=1)[found] > 1, found, 0)


def same_objects(a, b):
    "Whether two segmentations are equal up to their numbers, with the background the same."
    pairs = set(zip(a.ravel().tolist(), b.ravel().tolist()))
    return np.array_equal(a == 0, b == 0) and len(pairs) == len({p for p, _ in pairs}) == len(
        {q for _, q in pairs}
    )


# ---- keys and turns


def test_seeds_stay_what_they_are():
    assert key_seed(0, "a", 3) == 8565203715178055703
    assert key_seed("dinolab", 1.5, (2, 3)) == 7683341871064565052
    code = "from dinolab.core.keys import key_seed, keyed_rng; print(key_seed(0, 'a', 3), keyed_rng(1, 'x').integers(10**9))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=dict(__import__("os").environ, PYTHONHASHSEED="7"),
    ).stdout.split()
    assert out == ["8565203715178055703", str(keyed_rng(1, "x").integers(10**9))]


@examples(50)
@given(st.lists(st.tuples(st.integers(), st.text(max_size=4)), min_size=2, max_size=8, unique=True))
def test_different_keys_have_different_seeds(keys):
    seeds = [key_seed(*k) for k in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= s < 2**63 for s in seeds)
    for s in seeds[:2]:
        torch.Generator().manual_seed(s)


@examples(50)
@given(orientations, st.tuples(*[st.integers(1, 4)] * 3))
def test_turns_by_brute_force_and_back(turn, shape):
    x = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    y = turn.apply(x)
    assert y.shape[1:] == turn.permute(shape)
    for i in np.ndindex(*y.shape[1:]):
        old = [None] * 3
        for new, a in enumerate(turn.permutation):
            old[a] = y.shape[1 + new] - 1 - i[new] if turn.flips[new] else i[new]
        assert y[0][i] == x[0][tuple(old)]
    np.testing.assert_array_equal(turn.inverse().apply(y), x)
    np.testing.assert_array_equal(turn.apply(turn.inverse().apply(x)), x)
    np.testing.assert_array_equal(turn.apply(torch.from_numpy(x)).numpy(), y)
    assert turn.inverse().inverse() == turn and turn.inverse().permute(turn.permute((7, 8, 9))) == (7, 8, 9)


@examples(30)
@given(st.integers(0, 999), st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 3), (1, 2, 1)]))
def test_a_key_decides_and_image_and_labels_turn_together(seed, alike):
    x = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    before = x.copy()
    a, b = (
        Augment(intensity=1, noise_probability=0.5, blur_probability=0.5, drop_slice=0.5)(
            keyed_rng(seed, "k"), x, dict(y=x, many=np.stack([x, x])), alike
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1]["y"], b[1]["y"])
    np.testing.assert_array_equal(x, before)
    assert a[2] == b[2] and a[0].dtype == np.float32 and 0 <= a[0].min() <= a[0].max() <= 1
    assert a[2].permute(alike) == alike  # only axes that are alike change places
    np.testing.assert_array_equal(a[1]["many"][1], a[1]["y"])
    image, others, turn = PRESETS["turns"](keyed_rng(seed), x, dict(y=x), alike)
    np.testing.assert_array_equal(image, others["y"])
    np.testing.assert_array_equal(turn.inverse().apply(image), x)


def test_all_turns_are_drawn_and_probabilities_hold():
    rng, a = keyed_rng("turns"), Augment()
    drawn = [a.draw_orientation(rng) for _ in range(3000)]
    assert len(set(drawn)) == 48
    assert all(abs(np.mean([t.flips[i] for t in drawn]) - 0.5) < 0.05 for i in range(3))
    assert {a.draw_orientation(rng, (40, 4, 4)).permutation for _ in range(100)} == {(0, 1, 2), (0, 2, 1)}
    assert Augment(flip=0, rotate=0).draw_orientation(rng) == Orientation()
    assert find_augment(None) is find_augment("none") is None and find_augment(dict(flip=0.1)) == Augment(
        flip=0.1
    )
    for wrong in (dict(flp=1), dict(flip=2), "nothing", dict(noise=-1), 3, True, ["em"], {1: 2}):
        with pytest.raises(InputError, match="expected"):
            find_augment(wrong)


@pytest.mark.parametrize("name", [field.name for field in fields(Augment)])
@pytest.mark.parametrize("value", [-1, 101, float("nan"), float("inf"), "0.5", None, True, [0.1], {}])
def test_each_field_is_a_number_in_its_range(name, value):
    "Every field there is has a rule; the message is one line and names it."
    with pytest.raises(InputError, match=f"augmentation {name}=.*expected a number from 0 to 1") as e:
        Augment(**{name: value})
    assert "\n" not in str(e.value)
    assert getattr(Augment(**{name: 0}), name) == 0 and getattr(Augment(**{name: 1.0}), name) == 1


def test_the_random_numbers_stay_what_they_are():
    "Crops of 0.6.0, by their hash: a run goes on with the same ones."
    x = np.random.default_rng(0).random((6, 5, 5)).astype(np.float32)
    found = hashlib.sha256()
    for seed in range(40):
        image, others, turn = Augment(noise_probability=0.5, blur_probability=0.5, drop_slice=0.5)(
            keyed_rng(seed), x, dict(y=x), (2, 1, 1)
        )
        found.update(np.round(image * 1e4).astype("<i4").tobytes() + others["y"].tobytes())
    assert found.hexdigest() == "95c60459196ff9280d3ce1e9058f0582539f4cb15e6b431757dfc9d25cae4a5c"


# ---- targets


@examples(40)
@given(
    st.integers(2, 3).flatmap(
        lambda d: st.tuples(
            st.tuples(*[st.integers(1, 5)] * d),
            st.lists(st.tuples(*[st.integers(-6, 6)] * d).filter(any), min_size=1, max_size=4, unique=True),
        )
    ),
    st.integers(0, 999),
)
def test_affinities_by_brute_force(case, seed):
    shape, offsets = case
    y = np.random.default_rng(seed).integers(0, 3, shape)
    same, known = affinities(y, offsets)
    back, back_known = affinities(y, [tuple(-v for v in o) for o in offsets])
    for k, o in enumerate(offsets):
        for i in np.ndindex(*shape):
            j = tuple(a + b for a, b in zip(i, o))
            inside = all(0 <= v < n for v, n in zip(j, shape))
            assert known[k][i] == inside and same[k][i] == (inside and y[i] == y[j] != 0)
            if inside:
                assert back[k][j] == same[k][i] and back_known[k][j]
        assert y[shifted(o)[0]].shape == y[shifted(o)[1]].shape


def brute_descriptors(y, sigma, size):
    "Moments of the voxels of the same object under a Gaussian that ends after three standard deviations."
    n = y.ndim
    out = np.zeros((2 * n + n * (n - 1) // 2 + 1, *y.shape))
    reach = [int(3 * sigma / s + 0.5) for s in size]
    kernels = [np.exp(-0.5 * (np.arange(-r, r + 1) * s / sigma) ** 2) for r, s in zip(reach, size)]
    kernels = [k / k.sum() for k in kernels]
    for i in np.ndindex(*y.shape):
        if not y[i]:
            continue
        at = [
            j
            for j in np.ndindex(*y.shape)
            if y[j] == y[i] and all(abs(a - b) <= r for a, b, r in zip(i, j, reach))
        ]
        w = np.array([np.prod([k[b - a + r] for k, a, b, r in zip(kernels, i, j, reach)]) for j in at])
        d = (np.array(at) - i) * np.asarray(size) / sigma
        mean = (w[:, None] * d).sum(0) / w.sum()
        cov = (w[:, None, None] * d[:, :, None] * d[:, None, :]).sum(0) / w.sum() - np.outer(mean, mean)
        correlation = [
            cov[a, b] / np.sqrt(max(cov[a, a] * cov[b, b], 1e-12)) / 2 + 0.5
            for a in range(n)
            for b in range(a + 1, n)
        ]
        out[(slice(None), *i)] = np.clip([*(mean / 2 + 0.5), *np.diag(cov), *correlation, w.sum()], 0, 1)
    return out


@examples(12)
@given(
    st.sampled_from(
        [
            ((7, 6), (1.0, 1.0)),
            ((5, 8), (2.0, 1.0)),
            ((4, 5, 4), (1.0, 1.0, 1.0)),
            ((3, 5, 5), (2.0, 1.0, 1.5)),
        ]
    ),
    st.sampled_from([1.0, 1.7]),
    st.integers(0, 999),
    st.booleans(),
)
def test_descriptors_by_brute_force(case, sigma, seed, background):
    shape, size = case
    y = np.random.default_rng(seed).integers(0 if background else 1, 3, shape) * 5
    got, expected = local_shape_descriptors(y, sigma, size), brute_descriptors(y, sigma, size)
    n = y.ndim
    flat = np.zeros(got.shape, bool)  # where an object has no extent, a correlation is rounding
    flat[2 * n : -1] = expected[n : 2 * n].min(0) < 1e-4
    np.testing.assert_allclose(np.where(flat, 0, got), np.where(flat, 0, expected), atol=2e-5)
    assert got.dtype == np.float32 and not got[:, y == 0].any()


# ---- objects


@examples(40)
@given(
    st.sampled_from([(7, 8), (12, 9), (4, 5, 6), (3, 8, 8), (6, 6, 6)]),
    st.integers(1, 4),
    st.integers(0, 9999),
    st.booleans(),
    st.booleans(),
)
def test_perfect_affinities_give_perfect_objects(shape, kinds, seed, background, turned):
    pytest.importorskip("mwatershed")
    y = partition(shape, kinds, seed, background)
    offsets = [tuple(-v for v in o) for o in OFFSETS[len(shape)]] if turned else OFFSETS[len(shape)]
    same, _ = affinities(y, offsets)
    for found in (
        mutex_watershed(same.astype(np.float32), offsets),
        segment_affinities(same.astype(np.float32), offsets),
    ):
        assert same_objects(found, y)
    assert set(np.unique(found)) - {0} == set(range(1, len(np.unique(y[y > 0])) + 1))
    noisy = np.clip(same + np.random.default_rng(seed).uniform(-0.15, 0.15, same.shape), 0, 1)
    assert same_objects(segment_affinities(noisy, offsets), y)


@examples(25)
@given(st.integers(0, 9999), st.integers(2, 12), st.integers(0, 40))
def test_small_objects_and_what_is_masked_are_background(seed, kinds, least):
    pytest.importorskip("mwatershed")
    y = partition((9, 9), kinds, seed)
    mask = np.random.default_rng(seed).random(y.shape) > 0.3
    same, _ = affinities(y, OFFSETS[2])
    found = segment_affinities(same.astype(float), OFFSETS[2], min_size=least, mask=mask)
    expected = np.where(mask, y, 0)
    counts = np.bincount(expected.ravel())
    assert same_objects(found, np.where(counts[expected] >= max(1, least), expected, 0))


@pytest.mark.parametrize("sign", [1, -1])
def test_watershed_where_mwatershed_is_missing(sign, monkeypatch):
    monkeypatch.setitem(sys.modules, "mwatershed", None)
    y = np.kron(np.arange(1, 9).reshape(2, 2, 2), np.ones((7, 7, 7), int))  # eight boxes that touch
    offsets = [tuple(sign * v for v in o) for o in OFFSETS[3]]
    same, known = affinities(y, offsets)
    affs = np.where(known, same, 1).astype(np.float32)
    found = segment_affinities(affs, offsets)
    np.testing.assert_array_equal(found, segment_affinities(affs, offsets, "watershed"))
    assert same_objects(found, y) and found.dtype == np.int64
    with pytest.raises(ImportError, match="instances"):
        segment_affinities(affs, offsets, "mutex")
    with pytest.raises(InputError, match="nearest neighbours"):
        seeded_watershed(affs[:1], [(0, 0, 2)])


def test_errors():
    y = np.ones((3, 3), int)
    for wrong in ([], [(0, 0)], [(1, 0), (1, 0)], [(1, 0, 0)]):
        with pytest.raises(InputError, match="different steps"):
            affinities(y, wrong)
    with pytest.raises(InputError, match="one channel per offset"):
        segment_affinities(np.ones((2, 3, 3)), [(1, 0)])
    with pytest.raises(InputError, match="positive"):
        local_shape_descriptors(y, 0)
    with pytest.raises(InputError, match="background"):
        local_shape_descriptors(-y, 1)

"Scores compared with torchmetrics, scikit-image, MONAI and brute force; counts add up."

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from examples import examples
from hypothesis import given, strategies as st
from skimage.metrics import adapted_rand_error, variation_of_information as skimage_voi

from dinolab.core.errors import InputError
from dinolab.train.metrics import (
    BoundaryF,
    ConfusionMatrix,
    adapted_rand,
    border,
    class_scores,
    count_pairs,
    mean_of,
    per_image_mean,
    variation_of_information,
)

shapes = st.integers(1, 3).flatmap(lambda d: st.tuples(*[st.integers(1, 6)] * d))


def pair(shape, n, seed, agree=0.5):
    rng = np.random.default_rng(seed)
    t, r = rng.integers(0, n, shape), rng.integers(0, n, shape)
    return np.where(rng.random(shape) < agree, t, r), t, rng.random(shape) > 0.3


@examples(25)
@given(shapes, st.integers(2, 5), st.integers(0, 999))
def test_counts_and_scores_are_those_of_torchmetrics(shape, n, seed):
    tm = pytest.importorskip("torchmetrics.classification")
    p, t, m = pair(shape, n, seed)
    p[t == n - 1], t[t == n - 1] = 0, 0  # the last class has no labels, and often no predictions
    P, T = torch.from_numpy(p), torch.from_numpy(t)
    np.testing.assert_array_equal(
        count_pairs(p, t, n), tm.MulticlassConfusionMatrix(n)(P.flatten(), T.flatten()).numpy()
    )
    scores = class_scores(count_pairs(p, t, n))
    there = np.array([(p == c).any() or (t == c).any() for c in range(n)])
    flat = lambda metric: metric(P.flatten(), T.flatten()).numpy()
    for name, metric in dict(
        iou=tm.MulticlassJaccardIndex,
        dice=tm.MulticlassF1Score,
        precision=tm.MulticlassPrecision,
        recall=tm.MulticlassRecall,
    ).items():
        theirs = flat(metric(n, average=None))
        for c in range(n):
            if scores[name][c] is None:
                assert theirs[c] == 0 and (not there[c] or name in ("precision", "recall"))
            else:
                assert scores[name][c] == pytest.approx(theirs[c], abs=1e-6)
        assert all((scores[name][c] is None) == (not there[c]) for c in range(n)) or name in (
            "precision",
            "recall",
        )
    assert ConfusionMatrix(n).update(p, t).metrics()["accuracy"] == pytest.approx(float((p == t).mean()))


@examples(20)
@given(shapes, st.integers(2, 5), st.integers(0, 999))
def test_scores_with_ignored_pixels_and_absent_classes_are_those_of_sklearn_and_torchmetrics(shape, n, seed):
    sk = pytest.importorskip("sklearn.metrics")
    tm = pytest.importorskip("torchmetrics.classification")
    p, t, on = pair(shape, n, seed)
    p[p == n - 1], t[t == n - 1] = 0, 0  # the last class is nowhere
    on.flat[0] = True
    found = ConfusionMatrix(n).update(p, np.where(on, t, 255), on).metrics()
    true, got = t[on], p[on]
    there = sorted(set(true) | set(got))
    options = dict(labels=there, average=None, zero_division=0)
    for name, score in dict(iou=sk.jaccard_score, dice=sk.f1_score).items():
        theirs = score(true, got, **options)
        assert [found[f"{name}/{c}"] for c in there] == pytest.approx(list(theirs), abs=1e-9)
        assert found[f"mean_{name}"] == pytest.approx(theirs.mean(), abs=1e-9)
        assert all(found[f"{name}/{c}"] is None for c in range(n) if c not in there)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(true, got))
    P, T = torch.from_numpy(p).flatten(), torch.from_numpy(np.where(on, t, 255)).flatten()
    ignoring = dict(num_classes=n, ignore_index=255)
    accuracy = tm.MulticlassAccuracy(average="micro", **ignoring)(P, T)
    assert found["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    for name, metric in dict(iou=tm.MulticlassJaccardIndex, dice=tm.MulticlassF1Score).items():
        theirs = metric(average=None, **ignoring)(P, T)
        assert [found[f"{name}/{c}"] for c in there] == pytest.approx(theirs[there].tolist(), abs=1e-6)


@examples(30)
@given(shapes, st.integers(2, 5), st.integers(0, 999))
def test_masks_and_brute_force(shape, n, seed):
    p, t, m = pair(shape, n, seed)
    expected = np.zeros((n, n), int)
    for i in np.ndindex(*shape):
        expected[t[i], p[i]] += m[i]
    got = count_pairs(p, np.where(m, t, 255), n, m)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        count_pairs(torch.from_numpy(p), torch.from_numpy(t), n, torch.from_numpy(m)), expected
    )
    np.testing.assert_array_equal(count_pairs(p.astype(np.uint8), t.astype(np.uint16), n, m), expected)
    for c in range(n):
        a, b = (p == c) & m, (t == c) & m
        assert class_scores(got)["dice"][c] == (
            pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum())) if a.any() or b.any() else None
        )


@examples(20)
@given(st.integers(2, 4), st.integers(0, 999), st.integers(0, 6))
def test_merged_parts_are_the_whole(n, seed, cut):
    p, t, m = pair((6, 5, 4), n, seed)
    whole = ConfusionMatrix(n).update(p, t, m)
    parts = (
        ConfusionMatrix(n)
        .update(p[:cut], t[:cut], m[:cut])
        .merge(ConfusionMatrix(n).update(p[cut:], t[cut:], m[cut:]))
    )
    twice = ConfusionMatrix(n).update(p[:cut], t[:cut], m[:cut]).update(p[cut:], t[cut:], m[cut:])
    np.testing.assert_array_equal(parts.matrix, whole.matrix)
    assert parts.metrics() == twice.metrics() == whole.metrics()
    b = BoundaryF(n).update(p, t).update(t, p)
    np.testing.assert_array_equal(
        b.counts, BoundaryF(n).update(p, t).counts + BoundaryF(n).update(t, p).counts
    )


def test_absent_classes_are_none_and_not_in_the_mean():
    found = (
        ConfusionMatrix(["a", "b", "c", "d"]).update(np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1])).metrics()
    )
    assert found["iou/d"] is found["dice/d"] is found["precision/d"] is found["recall/d"] is None
    assert found["recall/c"] is None and found["precision/c"] == 0 and found["iou/c"] == 0
    assert found["mean_iou"] == pytest.approx((2 / 3 + 0 + 0) / 3) and found["mean_recall"] == pytest.approx(
        (2 / 3 + 0) / 2
    )
    empty = ConfusionMatrix(2).metrics()
    assert all(v is None for v in empty.values()) and per_image_mean([ConfusionMatrix(2)]) is None
    assert mean_of([None, 1, None, 0]) == 0.5
    assert (
        per_image_mean(
            [
                ConfusionMatrix(2).update([0, 1], [0, 1]),
                ConfusionMatrix(2).update([0, 0], [1, 1]),
                ConfusionMatrix(2),
            ]
        )
        == 0.5
    )
    assert BoundaryF(2).update(np.zeros((3, 3), int), np.zeros((3, 3), int)).metrics() == {
        "boundary_f/0": None,
        "boundary_f/1": None,
        "mean_boundary_f": None,
    }


def brute_boundary(p, t, tolerance, size, mask):
    "Right, all, found, all: by looking at every pair of border voxels."

    def edge(on):
        near = [tuple(s * (b == a) for b in range(on.ndim)) for a in range(on.ndim) for s in (-1, 1)]
        inside = lambda j: all(0 <= v < n for v, n in zip(j, on.shape))
        return [
            i
            for i in np.ndindex(*on.shape)
            if on[i]
            and mask[i]
            and any(inside(j) and not on[j] for j in (tuple(map(sum, zip(i, o))) for o in near))
        ]

    a, b = edge(p), edge(t)
    close = lambda i, js: any(np.linalg.norm((np.subtract(i, j)) * size) <= tolerance for j in js)
    return [sum(close(i, b) for i in a), len(a), sum(close(j, a) for j in b), len(b)]


@examples(30)
@given(
    st.integers(2, 3).flatmap(lambda d: st.tuples(*[st.integers(1, 4)] * d)),
    st.integers(0, 999),
    st.sampled_from([0.0, 1.0, 1.5, 2.3]),
    st.booleans(),
    st.booleans(),
)
def test_boundary_f_by_brute_force(shape, seed, tolerance, anisotropic, masked):
    p, t, m = pair(shape, 3, seed, 0.8)
    size = np.array([2.0, 1.0, 1.5][: len(shape)] if anisotropic else [1.0] * len(shape))
    on = m if masked else np.ones(shape, bool)
    found = BoundaryF(3, tolerance, size).update(p, t, m if masked else None)
    np.testing.assert_array_equal(
        found.counts, [brute_boundary(p == c, t == c, tolerance, size, on) for c in range(3)]
    )
    for c, (r, a, f, b) in enumerate(found.counts.tolist()):
        precision, recall = r / max(a, 1), f / max(b, 1)
        expected = (
            None
            if not a and not b
            else 2 * precision * recall / (precision + recall)
            if precision + recall
            else 0.0
        )
        assert found.metrics()[f"boundary_f/{c}"] == (None if expected is None else pytest.approx(expected))
    assert BoundaryF(3, tolerance, size).update(t, t).metrics()["mean_boundary_f"] in (None, 1.0)


def test_borders_within_a_tolerance_are_those_of_monai():
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:12, :14, :13]
    for size, tolerance in [((1.0, 1.0, 1.0), 1.5), ((2.0, 1.0, 1.0), 2.3), ((1.0, 1.0, 1.0), 0.5)]:
        c, d = rng.uniform(
            5, 7, (2, 3)
        )  # balls away from the edge of the volume, which MONAI counts as border
        p, t = (
            ((z - o[0]) ** 2 + (y - o[1]) ** 2 + (x - o[2]) ** 2 < r).astype(int)
            for o, r in [(c, 9), (d, 16)]
        )
        right, pred, found, true = BoundaryF(2, tolerance, size).update(p, t).counts[1]
        hot = lambda a: torch.nn.functional.one_hot(torch.from_numpy(a), 2).movedim(-1, 0)[None].float()
        theirs = float(metrics.compute_surface_dice(hot(p), hot(t), [tolerance], spacing=size))
        assert (right + found) / (pred + true) == pytest.approx(theirs, abs=1e-6) and 0 < theirs


def test_border_is_erosion():
    from scipy.ndimage import binary_erosion

    for shape in [(9, 8), (5, 6, 7)]:
        on = np.random.default_rng(1).random(shape) < 0.8
        np.testing.assert_array_equal(border(on), on & ~binary_erosion(on, border_value=1))


@examples(30)
@given(
    st.integers(2, 3).flatmap(lambda d: st.tuples(*[st.integers(2, 6)] * d)),
    st.integers(1, 6),
    st.integers(0, 999),
    st.booleans(),
)
def test_instances_are_scored_as_in_scikit_image(shape, n, seed, background):
    p, t, m = pair(shape, n, seed)
    t = t + (0 if background else 1)
    t.flat[:2] = 1
    p = p * 7919  # any ids
    mine = adapted_rand(p, t)
    with np.errstate(all="ignore"):
        error, precision, recall = adapted_rand_error(t, p, ignore_labels=(0,))
    pairs = lambda a: sum(k * (k - 1) for k in np.unique(a, return_counts=True)[1])
    if pairs(t[t != 0]) and pairs(p[t != 0]) and np.isfinite(error):  # theirs divides by zero without pairs
        assert (mine["error"], mine["recall"], mine["precision"]) == pytest.approx(
            (error, precision, recall)
        )  # theirs divides by the labels for what it documents as precision
    on = t != 0
    split, merge = skimage_voi(t[on], p[on])
    found = variation_of_information(p, t)
    assert (found["split"], found["merge"]) == pytest.approx((split, merge), abs=1e-9)
    if (m & on).any():
        same = variation_of_information(p, np.where(m, t, 0))
        assert variation_of_information(p, t, m) == pytest.approx(same) and adapted_rand(
            p, t, m
        ) == pytest.approx(adapted_rand(p, np.where(m, t, 0)))


def test_instances_that_agree_split_and_merge():
    t = np.repeat([1, 2, 3, 4], 4)
    assert adapted_rand(t * 9, t) == dict(error=0.0, precision=1.0, recall=1.0) and variation_of_information(
        t * 9, t
    ) == dict(split=0.0, merge=0.0)
    halves = np.repeat(np.arange(8), 2)
    assert (
        variation_of_information(halves, t) == pytest.approx(dict(split=1.0, merge=0.0))
        and adapted_rand(halves, t)["precision"] == 1 > adapted_rand(halves, t)["recall"]
    )
    joined = np.repeat([5, 6], 8)
    assert (
        variation_of_information(joined, t) == pytest.approx(dict(split=0.0, merge=1.0))
        and adapted_rand(joined, t)["recall"] == 1 > adapted_rand(joined, t)["precision"]
    )


def test_errors():
    with pytest.raises(InputError, match="argmax"):
        count_pairs(np.zeros(3), np.zeros(3, int), 2)
    with pytest.raises(InputError, match="0 to 1"):
        count_pairs(np.full(3, 2), np.zeros(3, int), 2)
    with pytest.raises(InputError, match="0 to 1"):
        count_pairs(np.full(3, -1), np.zeros(3, int), 2)
    with pytest.raises(InputError, match="no object"):
        adapted_rand(np.ones(3, int), np.zeros(3, int))
    with pytest.raises(InputError, match="expected the same"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))


@pytest.mark.parametrize(
    "shape,voxel", [((60, 45), (1.0, 1.0)), ((33, 50), (0.4, 2.0)), ((17, 20, 9), (4.0, 1.0, 1.0))]
)
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 3.7])
def test_parts_add_up_to_the_whole(shape, voxel, tolerance, monkeypatch):
    "Large images are counted part by part: the same numbers, also where what is near lies in the next part."
    rng = np.random.default_rng(3)
    p, t = (gaussian_filter(rng.normal(size=shape), 2) > 0.02 for _ in range(2))
    mask = rng.random(shape) > 0.1

    def counted():
        borders = BoundaryF(2, tolerance, voxel).update(p.astype(int), t.astype(int), mask).counts
        return borders.tolist(), count_pairs(p, t, 2, mask).tolist()

    whole = counted()
    assert whole[0][1][0] > 0
    for part in (1, 100, 701):
        monkeypatch.setattr("dinolab.train.metrics.PART", part)
        assert counted() == whole

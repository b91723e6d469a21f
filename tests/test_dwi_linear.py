"Diffusion series and linear denoising: bad input, closed forms, and that nothing leaks."

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, strategies as st
from numpy.linalg import lstsq

from dinolab.core.errors import InputError
from dinolab.dwi.data import background_sigma, brain_mask, check_gradients, check_series, read_series
from dinolab.dwi.linear import (
    NEIGHBOURS,
    order_directions,
    make_folds,
    fit_loo,
    fit_spatial,
    fit_tissue,
    list_voxels,
    nonlocal_means,
)


def unit(n, rng):
    g = rng.standard_normal((n, 3))
    return g / np.linalg.norm(g, axis=1, keepdims=True)


def make(shape=(14, 12, 10), b0s=2, dirs=12, seed=0, noise=10.0):
    "Smooth maps mixed into volumes, with noise."
    rng = np.random.default_rng(seed)
    from scipy.ndimage import gaussian_filter

    bvals = np.r_[np.zeros(b0s), np.full(dirs // 2, 1000.0), np.full(dirs - dirs // 2, 2000.0)]
    table = check_gradients(bvals, np.r_[np.zeros((b0s, 3)), unit(dirs, rng)])
    maps = np.stack([gaussian_filter(rng.standard_normal(shape), 1.5) * 6 for _ in range(4)], -1)
    clean = 2000 + 40 * maps @ rng.standard_normal((4, len(bvals)))
    mask = np.zeros(shape, bool)
    mask[1:-1, 1:-1, :] = True
    return check_series(clean + noise * rng.standard_normal(clean.shape), table, mask), clean


FITS = dict(
    loo=lambda s: fit_loo(s),
    spatial=lambda s: fit_spatial(s, rank=4),
    tissue=lambda s: fit_tissue(s, rank=4, clusters=3),
    voxel=lambda s: fit_spatial(s, rank=4, blind="voxel"),
    tissue_voxel=lambda s: fit_tissue(s, rank=4, clusters=3, blind="voxel"),
)


def test_loo_is_ordinary_least_squares():
    series, _ = make()
    found = fit_loo(series, ridge=0.0, parts=1).predict(series.data)
    y = series.data[series.mask].astype(float)
    c = y - y.mean(0)
    for v in range(y.shape[1]):
        others = np.delete(c, v, 1)
        expected = others @ lstsq(others, c[:, v], rcond=None)[0] + y.mean(0)[v]
        np.testing.assert_allclose(found[series.mask][:, v], expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["loo", "spatial", "tissue"])
def test_output_never_depends_on_its_own_noisy_volume(name):
    series, _ = make()
    fitted = FITS[name](series)
    found, rng = fitted.predict(series.data), np.random.default_rng(1)
    for v in (0, 1, 5, 13):
        other = series.data.copy()
        other[..., v] = rng.uniform(0, 1e4, other.shape[:3])
        assert np.array_equal(fitted.predict(other)[series.mask][:, v], found[series.mask][:, v])
        other[..., np.arange(14) != v] *= 0.9
        assert not np.array_equal(fitted.predict(other)[series.mask][:, v], found[series.mask][:, v])


@pytest.mark.parametrize("name, reach", [("voxel", 26), ("tissue_voxel", 56)])
def test_voxel_blind_depends_on_neighbours_but_not_on_the_voxel(name, reach):
    series, _ = make()
    fitted = FITS[name](series)
    found = fitted.predict(series.data)
    other = series.data.copy()
    other[6, 6, 5, 7] += 1000
    change = fitted.predict(other)[..., 7] - found[..., 7]
    assert change[6, 6, 5] == 0 and 26 <= (change != 0).sum() <= reach


def test_leak_is_nil_on_average():
    "Pure noise cannot be predicted: the mean slope over many draws is 0 within its error, for cross-fitted weights only."

    def slopes(parts):
        found = []
        for seed in range(6):
            series, clean = make((10, 10, 10), dirs=8, seed=seed, noise=40.0)
            out = fit_spatial(series, rank=4, parts=parts).predict(series.data)
            noise = (series.data - clean)[series.mask][:, 2:]
            found.append(((out - clean)[series.mask][:, 2:] * noise).sum() / (noise**2).sum())
        return np.array(found)

    crossed, plain = slopes(4), slopes(1)
    assert abs(crossed.mean()) < 0.01 and plain.mean() > 0.06


@pytest.mark.parametrize("name", FITS)
def test_denoises_and_keeps_the_outside(name):
    series, clean = make((20, 18, 14), noise=15.0)
    found = FITS[name](series).predict(series.data)
    rms = lambda a: np.sqrt(((a - clean)[series.mask][:, 2:] ** 2).mean())
    assert rms(found) < 0.75 * rms(series.data)
    assert np.array_equal(found[~series.mask], series.data[~series.mask])


@pytest.mark.parametrize("name", FITS)
def test_order_in_memory_does_not_matter(name):
    "nibabel gives arrays whose first axis runs fastest."
    series, _ = make()
    fitted = FITS[name](series)
    assert np.array_equal(fitted.predict(np.asfortranarray(series.data)), fitted.predict(series.data))
    assert check_series(np.asfortranarray(series.data), series.gradients, series.mask).data.flags.c_contiguous


def test_single_b0_stays_as_it_is():
    series, _ = make(b0s=1)
    for name in ("loo", "spatial", "tissue"):
        assert np.array_equal(FITS[name](series).predict(series.data)[..., 0], series.data[..., 0])


def test_scale_and_order_do_not_matter():
    "Ten times the values give ten times the result; the order of volumes changes nothing but the folds."
    series, _ = make()
    found = fit_tissue(series, rank=4, clusters=3).predict(series.data)
    tenfold = replace(series, data=series.data * 10)
    np.testing.assert_allclose(
        fit_tissue(tenfold, rank=4, clusters=3).predict(tenfold.data), found * 10, rtol=2e-3
    )
    order = np.random.default_rng(0).permutation(14)
    a = fit_loo(series).predict(series.data)
    np.testing.assert_allclose(
        fit_loo(replace(series, data=series.data[..., order], gradients=series.gradients[order])).predict(
            series.data[..., order]
        ),
        a[..., order],
        rtol=1e-4,
    )


@given(st.integers(1, 5), st.integers(6, 40), st.integers(1, 12), st.integers(0, 100))
@examples(40)
def test_folds_hold_every_volume_once(b0s, dirs, folds, seed):
    rng = np.random.default_rng(seed)
    bvals = rng.permutation(np.r_[np.zeros(b0s), rng.choice([700, 1500, 3000], dirs)])
    table = check_gradients(bvals, unit(b0s + dirs, rng))
    dealt = make_folds(table, folds)
    assert sorted(np.concatenate(dealt)) == list(range(b0s + dirs))
    weighted = [f for f in dealt if not table.is_b0[f].any()]
    assert len(weighted) == min(folds, dirs) and max(map(len, weighted)) - min(map(len, weighted)) <= 1


def test_opposite_directions_are_alike():
    g = unit(9, np.random.default_rng(0))
    assert order_directions(g) == order_directions(
        g * np.sign(np.random.default_rng(1).standard_normal((9, 1)))
    )


def test_neighbours():
    mask = np.random.default_rng(0).random((7, 6, 9)) > 0.3
    voxels, at = list_voxels(mask, 3, 2), np.argwhere(mask)
    values = np.random.default_rng(1).random(mask.shape).astype(np.float32)
    rows = torch.cat([voxels.rows(values[..., None])[:, 0], torch.zeros(1)])[voxels.near]
    padded = np.pad(np.where(mask, values, 0), 1, mode="edge")
    place = np.stack(np.unravel_index(voxels.where, mask.shape), 1)
    for p, r in zip(place, rows):
        assert np.array_equal(padded[tuple(slice(a, a + 3) for a in p)].ravel(), r.numpy())
    assert len(NEIGHBOURS) == 26 and sorted(map(tuple, place)) == sorted(map(tuple, at))


# bad input


def table(n=14, b0s=2):
    return np.r_[np.zeros(b0s), np.full(n - b0s, 1000.0)], unit(n, np.random.default_rng(0))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda b, g: (b[:-1], g), "13 b-values for an image of 14 volumes"),
        (lambda b, g: (b, g[:-1]), r"shape \(13, 3\) for 14 b-values"),
        (
            lambda b, g: (b, g * np.where(np.arange(14) == 5, 0, 1)[:, None]),
            "direction of volume 5 .* has length 0",
        ),
        (lambda b, g: (b, g * 1.3), "length 1.3"),
        (lambda b, g: (b, np.where(np.arange(14)[:, None] == 3, np.nan, g)), "direction of volume 3"),
        (lambda b, g: (np.where(np.arange(14) < 9, 0, b), g), "5 volumes with b above 50: expected 6"),
        (lambda b, g: (b + 500, g), "no volume with b of at most 50"),
        (lambda b, g: (np.where(np.arange(14) == 3, np.nan, b), g), "b-values hold nan"),
        (lambda b, g: (-b, g), "b-values hold -1000"),
    ],
)
def test_bad_tables(change, says):
    with pytest.raises(InputError, match=says):
        check_gradients(*change(*table()), 14)


def test_transposed_and_flipped_tables_are_the_same():
    b, g = table()
    assert np.array_equal(check_gradients(b[:, None], g.T).bvecs, check_gradients(b[None], g).bvecs)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: d[..., 0], "expected four axes"),
        (lambda d: np.where(np.arange(14) == 4, 7.0, d), "volume 4 has the value 7 everywhere"),
        (lambda d: np.where(d == d.max(), np.nan, d), "1 values are not finite"),
        (lambda d: np.where(d == d.max(), -np.inf, d), "1 values are not finite"),
        (lambda d: (d * 120).astype(np.int32).astype(np.int16), "overflowed"),
    ],
)
def test_bad_series(change, says):
    data = np.random.default_rng(0).uniform(0, 500, (5, 4, 3, 14))
    with pytest.raises(InputError, match=says):
        check_series(change(data), check_gradients(*table()))


def test_bad_masks():
    data, g = np.random.default_rng(0).random((5, 4, 3, 14)), check_gradients(*table())
    with pytest.raises(InputError, match="mask is empty"):
        check_series(data, g, np.zeros((5, 4, 3)))
    with pytest.raises(InputError, match="expected the same grid"):
        check_series(data, g, np.ones((5, 4, 4)))


def test_files(tmp_path):
    data, (b, g) = np.random.default_rng(0).integers(1, 900, (6, 5, 4, 14)).astype(np.int16), table()
    nib.save(nib.Nifti1Image(data, np.diag([2, 2, 3, 1.0])), tmp_path / "dwi.nii.gz")
    np.savetxt(tmp_path / "dwi.bval", b[None], fmt="%d")
    np.savetxt(tmp_path / "dwi.bvec", g.T)
    files = [tmp_path / f"dwi.{s}" for s in ("nii.gz", "bval", "bvec")]
    assert np.array_equal(read_series(*files).data, data)
    nib.save(nib.Nifti1Image(np.ones((6, 5, 4), np.uint8), np.diag([2, 2, 2, 1.0])), tmp_path / "mask.nii.gz")
    with pytest.raises(InputError, match="lies elsewhere"):
        read_series(*files, mask=tmp_path / "mask.nii.gz")
    with pytest.raises(InputError, match="no file"):
        read_series(files[0], tmp_path / "x.bval", files[2])
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(InputError, match="expected a whole NIfTI file"):
        read_series(*files)
    nib.save(nib.Nifti1Image(data[..., 0], np.eye(4)), tmp_path / "flat.nii.gz")
    with pytest.raises(InputError, match="expected four axes"):
        read_series(tmp_path / "flat.nii.gz", *files[1:])


def test_mask_and_noise_level():
    rng, shape = np.random.default_rng(0), (30, 30, 16)
    x, y, z = np.indices(shape)
    head = (x - 15) ** 2 + (y - 15) ** 2 + (2 * (z - 8)) ** 2 < 100
    b, g = table()
    clean = np.where(head, 300.0, 0)[..., None] * np.exp(-b * 0.8e-3)
    noisy = check_series(
        np.abs(clean + 12 * (rng.standard_normal((*shape, 14)) + 1j * rng.standard_normal((*shape, 14)))),
        check_gradients(b, g),
    )
    assert (brain_mask(noisy) != head).mean() < 0.01
    assert abs(background_sigma(noisy) / 12 - 1) < 0.02
    assert background_sigma(check_series(noisy.data, noisy.gradients, np.ones(shape))) is None


@pytest.mark.parametrize("length", [0.96, 1.0, 1.04])
@pytest.mark.parametrize("rows", [3, 14], ids=["3 rows", "3 columns"])
def test_directions_are_made_unit_vectors_and_zeros_where_there_is_no_weighting(length, rows):
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((14, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    bvals = np.r_[0, 20, np.full(12, 1000.0)]
    given = unit * length
    given[:2] = 7.0  # scanners write anything there
    found = check_gradients(bvals, given.T if rows == 3 else given).bvecs
    np.testing.assert_allclose(found[2:], unit[2:], atol=1e-12)
    np.testing.assert_array_equal(found[:2], 0)


@pytest.mark.parametrize("itself", [1.0, 0.0])
def test_nonlocal_means_are_the_sum_over_the_ball(itself):
    "Voxel by voxel, as the formula says: only voxels of the mask, at most 2 1/4 voxels away."
    rng = np.random.default_rng(0)
    mask = rng.random((6, 5, 4)) < 0.7
    maps, guide = rng.standard_normal((2, 6, 5, 4)), 2 * rng.standard_normal((3, 6, 5, 4))
    tensors = [torch.from_numpy(x) for x in (maps, mask[None].astype(float), guide)]
    found = nonlocal_means(*tensors, radius=2, itself=itself).numpy()
    at = np.argwhere(mask)
    maps, guide, found = maps[:, mask].T, guide[:, mask].T, found[:, mask].T
    for i in range(len(at)):
        total, weight = itself * maps[i], itself
        for j in range(len(at)):
            if i != j and ((at[i] - at[j]) ** 2).sum() <= 2.25**2:
                distance = ((guide[i] - guide[j]) ** 2).sum()
                w = np.exp(-max(distance - 6, 0) / 3)
                total, weight = total + w * maps[j], weight + w
        np.testing.assert_allclose(found[i], total / max(weight, 1e-6), atol=1e-12)

"Own PCA denoisers against dipy."

import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter, minimum_filter

from dinolab.core.errors import InputError
from dinolab.dwi.lowrank import leading_vectors, localpca, mppca

dipy_pca = pytest.importorskip("dipy.denoise.localpca")


def series(shape=(12, 10, 9), volumes=20, rank=4, sigma=20.0, seed=0):
    "Smooth low-rank signal in float32 values and a ball."
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    maps = np.stack([1 + np.cos(grid @ rng.uniform(-4, 4, 3) + rng.uniform(0, 6)) for _ in range(rank)], -1)
    clean = maps @ rng.uniform(20, 300, (rank, volumes))
    noise = sigma * (rng.standard_normal(clean.shape) + 1j * rng.standard_normal(clean.shape))
    return np.abs(clean + noise).astype(np.float32), (grid**2).sum(-1) < 0.9


def quietly(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kwargs)


def gap(a, b):
    return np.abs(a.astype(float) - b).max() / np.abs(b).max()


CASES = {
    "usual": dict(),
    "no mask": dict(mask=False),
    "radius 1": dict(patch_radius=1),
    "radius 3": dict(patch_radius=3),
    "more volumes than samples": dict(volumes=40, patch_radius=1),
    "as many volumes as samples": dict(volumes=27, patch_radius=1),
    "one more volume than samples": dict(volumes=28, patch_radius=1),
    "one slice": dict(shape=(14, 13, 1)),
    "one slice, more volumes than samples": dict(shape=(14, 13, 1), volumes=30),
    "one row": dict(shape=(40, 1, 1), patch_radius=4, mask=False, volumes=6),
    "anisotropic": dict(patch_radius=(1, 2, 3), volumes=30),
    "one patch": dict(shape=(5, 5, 5), mask=False),
    "wider than a block": dict(shape=(38, 8, 4), patch_radius=1),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_equals_dipy(case, dtype):
    options = dict(CASES[case])
    radius, masked = options.pop("patch_radius", 2), options.pop("mask", True)
    data, mask = series(**options)
    mask = mask if masked else np.ones_like(mask)
    theirs = dict(
        mask=mask, patch_radius=radius if isinstance(radius, int) else np.array(radius), suppress_warning=True
    )
    eps = 1e-9 if dtype == np.float64 else 1e-5
    truth, level = quietly(dipy_pca.mppca, data.astype(float), return_sigma=True, **theirs)
    out, sigma = mppca(data.astype(dtype), mask, radius, return_sigma=True, threads=1)
    reached = np.isfinite(truth[..., 0])
    assert reached.mean() > 0.9 and out.dtype == sigma.dtype == dtype
    assert gap(out[reached], truth[reached]) < eps and gap(sigma[reached], level[reached]) < 10 * eps
    assert gap(mppca(data.astype(dtype), mask, radius), out) == 0
    varying = np.random.default_rng(1).uniform(15, 25, mask.shape)
    for noise, factor in ((20.0, 2.3), (varying, 1.5), (20.0, None)):
        truth = quietly(dipy_pca.localpca, data.astype(float), sigma=noise, tau_factor=factor, **theirs)
        assert (
            gap(localpca(data.astype(dtype), noise, mask, radius, tau_factor=factor)[reached], truth[reached])
            < eps
        )


def test_no_worse_than_dipy_in_float32():
    data, mask = series((11, 10, 9), 64, 8)
    truth = quietly(dipy_pca.mppca, data.astype(float), mask=mask)
    assert gap(mppca(data, mask), truth) <= gap(quietly(dipy_pca.mppca, data, mask=mask), truth)


@pytest.mark.parametrize("volumes", [20, 40])
def test_zero_background_without_mask(volumes):
    "Patches of zeros have no noise and weigh as in dipy; patches of few voxels that are not zero are decided by rounding there."
    data, mask = series((16, 12, 11), volumes)
    data[~mask | (np.indices(mask.shape)[0] > 8)] = 0
    truth, level = quietly(dipy_pca.mppca, data.astype(float), return_sigma=True, patch_radius=1)
    out, sigma = mppca(data, patch_radius=1, return_sigma=True)
    clear = maximum_filter(data.any(-1), 5) == minimum_filter(data.any(-1), 5)
    assert np.isfinite(out).all() and np.isfinite(sigma).all() and gap(out, truth) < 0.02
    assert gap(out[clear], truth[clear]) < 1e-5 and gap(sigma[clear], level[clear]) < 1e-5
    assert (
        gap(
            localpca(data, 20.0, patch_radius=1),
            quietly(dipy_pca.localpca, data.astype(float), sigma=20.0, patch_radius=1),
        )
        < 1e-5
    )


def test_one_bright_voxel_stays_local():
    "What a voxel of 10⁸ spoils is within two patches of it."
    data, mask = series((24, 9, 8))
    bright = data.copy()
    bright[3, 4, 4] = 1e8
    a, b = (mppca(d.astype(float), mask)[10:] for d in (data, bright))
    assert gap(b, a) < 1e-6


@pytest.mark.parametrize("radius", [1, 2])
def test_threads_do_not_matter(radius):
    data, mask = series((20, 18, 9), 30)
    before = torch.get_num_threads()
    one, many = (mppca(data, mask, radius, threads=n, return_sigma=True) for n in (1, 3))
    assert all(np.array_equal(a, b) for a, b in zip(one, many))
    assert np.array_equal(
        localpca(data, 20.0, mask, radius, threads=1), localpca(data, 20.0, mask, radius, threads=2)
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("volumes", [20, 40])
def test_low_rank_is_unchanged(volumes):
    data, mask = series(volumes=volumes, sigma=0.0)
    radius = 1 if volumes == 40 else 2
    out, sigma = mppca(data.astype(float), mask, radius, return_sigma=True)
    assert gap(out[mask], data[mask].astype(float)) < 1e-6 and sigma.max() < 1e-3
    assert gap(localpca(data, 1e-3, mask, radius)[mask], data[mask].astype(float)) < 1e-5
    assert gap(localpca(data, 0, mask, radius)[mask], data[mask].astype(float)) < 1e-5
    assert gap(mppca(np.full((6, 6, 6, 9), 7.0), return_sigma=True)[0], np.full((6, 6, 6, 9), 7.0)) < 1e-12


def test_noise_level():
    rng = np.random.default_rng(0)
    noise = (1000 + 30 * rng.standard_normal((12, 12, 9, 40))).astype(np.float32)
    out, sigma = mppca(noise, return_sigma=True)
    assert abs(sigma.mean() / 30 - 1) < 0.03 and out.std() < 10 and abs(out.mean() - 1000) < 1


def test_denoises():
    data, mask = series((14, 14, 12), 64, 5, sigma=0.0)
    noisy = data + 20 * np.random.default_rng(0).standard_normal(data.shape).astype(np.float32)
    inner = (slice(2, -2),) * 3
    rms = [
        np.sqrt(((o - data)[inner][mask[inner]] ** 2).mean())
        for o in (noisy, mppca(noisy, mask), localpca(noisy, 20, mask))
    ]
    assert rms[1] < 0.4 * rms[0] and rms[2] < 0.4 * rms[0]


def test_layouts_and_types():
    data, mask = series()
    data = np.round(data)
    kept, out = data.copy(), mppca(data, mask)
    assert np.array_equal(mppca(np.asfortranarray(data), mask), out) and np.array_equal(data, kept)
    assert np.array_equal(mppca(torch.from_numpy(data), torch.from_numpy(mask)), out)
    assert np.array_equal(mppca(data.astype(np.int16), mask.astype(np.uint8)), out)
    assert np.array_equal(mppca(data[::-1], mask[::-1]), mppca(data[::-1].copy(), mask[::-1].copy()))
    assert out.min() >= 0 and not out[~mask].any()


def test_voxels_that_no_patch_reaches():
    data, mask = series()
    mask = np.zeros_like(mask)
    mask[5, 5, 5] = mask[0, 0, 0] = True
    out, sigma = mppca(data, mask, return_sigma=True)
    assert np.array_equal(out[0, 0, 0], data[0, 0, 0]) and sigma[0, 0, 0] == 0 and sigma[5, 5, 5] > 0
    assert np.count_nonzero(out.any(-1)) == 2


@pytest.mark.parametrize("apart", [0, 1e-15, 1e-13, 1e-10, 1e-6])
def test_eigenvalues_that_agree(apart):
    "Subspaces are right where eigenvalues are equal, or nearly so."
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((30, 12, 12)))[0]
    values = np.repeat([1.0, 4, 9], 4) + apart * np.arange(12)
    V = leading_vectors(Q * values @ Q.transpose(0, 2, 1), lambda found: np.full(30, 8))[0].reshape(30, 8, 12)
    projected = V.transpose(0, 2, 1) @ V
    assert np.abs(projected - Q[:, :, 4:] @ Q[:, :, 4:].transpose(0, 2, 1)).max() < 1e-8


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(data=np.zeros((5, 5, 5))), "expected four axes"),
        (dict(data=np.full((6, 6, 6, 7), np.nan)), "not finite, first at x y z v = (0, 0, 0, 0)"),
        (dict(patch_radius=0), "patches of one voxel"),
        (dict(patch_radius=1.5), "expected a whole number"),
        (dict(patch_radius=(1, 1)), "three of them"),
        (dict(patch_radius=-1), "expected a whole number"),
        (
            dict(patch_radius=5),
            "10 voxels along y for patches of 11: expected at least as many; give patch_radius 4",
        ),
        (dict(mask=np.ones((3, 3, 3))), "expected the same grid"),
        (dict(mask=np.zeros((12, 10, 9))), "no voxel of the mask"),
        (dict(sigma=np.ones((12, 10))), "sigma of shape (12, 10)"),
        (dict(sigma=-2.0), "sigma holds -2"),
        (dict(sigma=np.nan), "sigma holds nan"),
    ],
)
def test_errors(change, message):
    data, mask = series()
    given = dict(data=data, sigma=20.0, mask=mask, patch_radius=2) | change
    with pytest.raises(InputError) as error:
        localpca(**given)
    assert message in str(error.value) and "\n" not in str(error.value)
    if "sigma" in change:
        return
    del given["sigma"]
    with pytest.raises(InputError):
        mppca(**given)


@pytest.mark.parametrize("radius", [5, (2, 2, 5)])
def test_the_radius_that_is_proposed_works(radius):
    data, mask = series()
    with pytest.raises(InputError) as error:
        mppca(data, mask, radius)
    mppca(data, None, eval(str(error.value).split("patch_radius=")[1]))

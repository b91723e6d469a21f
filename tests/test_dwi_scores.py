"Scores of diffusion series against scipy, scikit-image and dipy, and against cases worked by hand."

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dinolab.core.errors import InputError
from dinolab.dwi.data import check_gradients, check_series
from dinolab.dwi.scores import (
    debias,
    edge_slope,
    fit_dti,
    held_out,
    leak_slope,
    low_shells,
    predict_dti,
    psnr,
    residual_autocorrelation,
    rice_mean,
    score,
    ssim3d,
)
from dinolab.dwi.phantoms import add_rician, make_phantom, make_scheme, noisy


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(1, (32, 32, 12))


@pytest.fixture(scope="module")
def seen(phantom):
    return noisy(phantom, 15, 2)


def test_rice_mean_is_that_of_scipy():
    nu, sigma = np.array([0, 0.1, 1, 3, 10, 30, 80.0]), 2.5
    np.testing.assert_allclose(rice_mean(nu, sigma), stats.rice.mean(nu / sigma, scale=sigma), rtol=1e-8)
    assert np.isfinite(rice_mean([1e8, 1e15, 1e30], 1)).all() and rice_mean(1e15, 1.0) == pytest.approx(1e15)
    np.testing.assert_allclose(rice_mean(np.full((2, 2), 5.0), np.array([[0, 1], [2, 0]]))[[0, 1], [0, 1]], 5)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 250.0])
def test_debias_inverts_scipys_mean(sigma):
    nu = np.r_[np.linspace(0.1, 35, 500), 100, 1e3, 1e5] * sigma
    back = debias(stats.rice.mean(nu[:-3] / sigma, scale=sigma), sigma)
    np.testing.assert_allclose(back / sigma, nu[:-3] / sigma, atol=1e-4)
    np.testing.assert_allclose(debias(rice_mean(nu, sigma), sigma), nu, rtol=1e-4)


def test_debias_edges(seen):
    floor = np.sqrt(np.pi / 2)
    assert (debias(np.array([-3, 0, 0.5, floor - 1e-3]), 1) == 0).all() and (
        np.diff(debias(np.linspace(floor, 40, 5000), 1)) >= 0
    ).all()
    m = np.full((2, 3, 4, 5), 10.0, np.float32)
    sigma = np.arange(24.0).reshape(2, 3, 4)
    out = debias(m, sigma)
    assert out.dtype == np.float32 and (out[0, 0, 0] == 10).all() and (out[1] == 0).all() and out.min() >= 0
    for i in np.ndindex(2, 3, 4):
        np.testing.assert_allclose(out[i], debias(m[i], sigma[i]))
    with pytest.raises(InputError, match="sigma of shape"):
        debias(m, sigma[:1])
    with pytest.raises(InputError, match="expected numbers"):
        debias(m, np.nan)


def test_debias_recovers_the_signal_from_many_repeats():
    nu = np.linspace(0.5, 8, 16, dtype=np.float32).reshape(16, 1, 1, 1) * np.ones(
        (1, 1, 1, 100_000), np.float32
    )
    np.testing.assert_allclose(
        debias(add_rician(nu, 1.0, 3).mean(-1), 1.0)[2:, 0, 0], nu[2:, 0, 0, 0], atol=0.02
    )


def test_psnr_and_ssim_are_those_of_scikit_image(phantom, seen):
    everywhere = np.ones(phantom.mask.shape, bool)
    for v in (0, 20, 50):
        t, x = phantom.clean[..., v].astype(float), seen[..., v].astype(float)
        one = lambda a: a[..., None]
        assert psnr(one(x), one(t), everywhere)[0] == pytest.approx(
            peak_signal_noise_ratio(t, x, data_range=t.max())
        )
        value, full = structural_similarity(
            t,
            x,
            data_range=t[phantom.mask].max(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        assert ssim3d(one(x), one(t), phantom.mask)[0] == pytest.approx(full[phantom.mask].mean(), abs=1e-6)


def test_edge_slope(phantom, seen):
    on = slice(4, 64, 10)
    t, mask = phantom.clean[..., on], phantom.mask
    np.testing.assert_allclose(edge_slope(t, t, mask), 1, atol=1e-6)
    np.testing.assert_allclose(edge_slope(1.1 * t, t, mask), 1.1, atol=1e-5)
    slopes = [edge_slope(gaussian_filter(t, (s, s, s, 0)), t, mask).mean() for s in (0.4, 0.7, 1)]
    assert 0.95 > slopes[0] > slopes[1] > slopes[2] > 0.1
    noise = np.random.default_rng(0).normal(0, 60, t.shape)
    assert abs(edge_slope(t + noise, t, mask).mean() - 1) < 0.05  # noise does not count as edges
    ramp = np.add.outer(np.arange(8.0) ** 2, np.zeros((6, 6)))[..., None]
    assert edge_slope(2 * ramp + 3, ramp, np.ones((8, 6, 6), bool))[0] == pytest.approx(2)


def test_tensors_are_those_of_dipy(phantom, seen):
    reconst, gradients = pytest.importorskip("dipy.reconst.dti"), pytest.importorskip("dipy.core.gradients")
    use = phantom.gradients.bvals <= 1200
    table = gradients.gradient_table(phantom.gradients.bvals[use], bvecs=phantom.gradients.bvecs[use])
    for data in (phantom.clean, seen):
        theirs = reconst.TensorModel(table, fit_method="WLS").fit(data[..., use], mask=phantom.mask)
        ours = fit_dti(data, phantom.gradients, phantom.mask, batch=1000)
        normal = phantom.mask & (data[..., use].min(-1) > 0.02 * data.max()) & (theirs.evals.min(-1) > 1e-5)
        assert normal.sum() > 0.7 * phantom.mask.sum()
        np.testing.assert_allclose(ours["fa"][normal], theirs.fa[normal], atol=2e-5)
        np.testing.assert_allclose(ours["md"][normal], theirs.md[normal] * 1000, atol=2e-5)
        np.testing.assert_allclose(ours["evals"][normal], theirs.evals[normal] * 1000, atol=5e-5)
        clear = normal & (theirs.fa > 0.3)
        np.testing.assert_allclose(
            np.abs((ours["evec"] * theirs.directions[..., 0, :]).sum(-1))[clear], 1, atol=1e-4
        )


def test_tensor_fit_limits(phantom):
    assert (
        low_shells(make_scheme("10")).all()
        and (low_shells(make_scheme("64")) == (make_scheme("64").bvals <= 1200)).all()
    )
    assert low_shells(make_scheme("multi")).sum() == 26
    few = check_gradients(
        np.r_[0, np.full(6, 3000.0), np.full(6, 2000.0)],
        np.r_[np.zeros((1, 3)), np.tile(make_scheme("10").bvecs[1:7], (2, 1))],
    )
    assert low_shells(few).sum() == 7 and few.shells[low_shells(few)].max() == 2000
    zero = fit_dti(np.zeros_like(phantom.clean), phantom.gradients, phantom.mask)
    assert all(np.isfinite(m).all() for m in zero.values()) and (zero["fa"] < 1e-6).all()
    maps = fit_dti(noisy(phantom, 3), phantom.gradients, phantom.mask)
    assert (
        0 <= maps["fa"].min()
        and maps["fa"].max() <= 1
        and (maps["md"][~phantom.mask] == 0).all()
        and maps["md"].min() >= 0
    )


def test_prediction_is_the_inverse_of_the_fit(phantom):
    fit = fit_dti(phantom.clean, phantom.gradients, phantom.mask)
    signal = predict_dti(fit, phantom.gradients)
    again = fit_dti(signal, phantom.gradients, phantom.mask)
    inside = phantom.mask & (fit["evals"].min(-1) > 0.05)
    np.testing.assert_allclose(again["tensor"][inside], fit["tensor"][inside], atol=2e-3)


def test_leaks(phantom, seen):
    sigma = phantom.sigma(15)
    mean, mask = rice_mean(phantom.clean, sigma), phantom.mask
    assert (
        leak_slope(seen, seen, mean, mask) == pytest.approx(1, abs=1e-6)
        and abs(leak_slope(phantom.clean, seen, mean, mask)) < 5e-3
    )
    assert leak_slope(0.3 * seen + 0.7 * phantom.clean, seen, mean, mask) == pytest.approx(0.3, abs=5e-3)
    assert abs(leak_slope(noisy(phantom, 15, 9), seen, mean, mask)) < 5e-3  # noise of its own is no leak


def test_residual_autocorrelation():
    white, mask = np.random.default_rng(0).standard_normal((30, 28, 26, 8)), np.ones((30, 28, 26), bool)
    mask[:, :, :3] = False
    assert abs(residual_autocorrelation(white, mask)) < 0.01
    wide = np.cumsum(np.pad(white, ((1, 0), (0, 0), (0, 0), (0, 0))), 0)
    pair = wide[2:] - wide[:-2]  # mean of two neighbours along x: correlation 1/2 along x, none along y and z
    assert residual_autocorrelation(pair, mask[:29]) == pytest.approx(0.5 / 3, abs=0.01)
    assert residual_autocorrelation(np.zeros_like(white), mask) == 0
    alone = np.zeros_like(mask)
    alone[::2, ::2, ::2] = True
    assert residual_autocorrelation(white, alone) == 0  # no voxel has a neighbour


def test_held_out_sees_only_half(phantom, seen):
    series, asked = check_series(seen, phantom.gradients, phantom.mask), []

    def denoise(s):
        asked.append(s)
        return s.data

    plain = held_out(denoise, series, phantom.sigma(15))
    assert 1 < plain < 3 and [(asked[0].gradients.shells == b).sum() for b in (0, 1000, 2000)] == [4, 15, 15]
    changed = seen.copy()
    changed[..., 5:34:2] = 12345  # what is held out
    other = check_series(
        changed + np.random.default_rng(0).random(seen.shape[:3])[..., None], phantom.gradients, phantom.mask
    )
    held_out(denoise, other, phantom.sigma(15))
    assert np.abs(asked[1].data - asked[0].data).max() < 1.1
    truth = check_series(phantom.clean, phantom.gradients, phantom.mask)
    perfect = lambda s: check_series(phantom.clean, phantom.gradients).data[
        ...,
        [
            np.flatnonzero((phantom.gradients.bvecs == g).all(1) & (phantom.gradients.bvals == b))[0]
            for g, b in zip(s.gradients.bvecs, s.gradients.bvals)
        ],
    ]
    assert held_out(perfect, series, phantom.sigma(15), debiased=True) < plain
    assert held_out(lambda s: s.data, truth, 1e3) < 0.2
    with pytest.raises(InputError, match="expected sigma="):
        held_out(denoise, truth)


def test_held_out_on_a_real_scan():
    "The noisy baseline of dipy's small scan, as dipy's own tensors give it."
    data, nifti = pytest.importorskip("dipy.data"), pytest.importorskip("nibabel")
    reconst, gradients = pytest.importorskip("dipy.reconst.dti"), pytest.importorskip("dipy.core.gradients")
    image, bval, bvec = data.get_fnames(name="small_64D")
    y, b, g = nifti.load(image).get_fdata().astype(np.float32), np.loadtxt(bval), np.loadtxt(bvec)
    g = g.T if g.shape[0] == 3 else g
    table = check_gradients(b, np.where(np.linalg.norm(g, axis=1, keepdims=True) > 0.5, g, 0), y.shape[3])
    mask = y[..., table.is_b0].mean(-1) > 0
    ours = held_out(lambda s: s.data, check_series(y, table, mask), 19.2)
    order = np.argsort(table.shells, kind="stable")
    keep, rest = np.sort(np.r_[order[0], order[1::2]]), order[2::2]
    t = lambda at: gradients.gradient_table(table.bvals[at], bvecs=table.bvecs[at])
    theirs = reconst.TensorModel(t(keep), fit_method="WLS").fit(y[..., keep])
    expected = (
        np.exp(
            -np.einsum(
                "v,vi,xyzij,vj->xyzv",
                table.bvals[rest],
                table.bvecs[rest],
                theirs.quadratic_form,
                table.bvecs[rest],
            )
        )
        * y[..., [order[0]]]
    )
    reference = float(np.sqrt(((expected - y[..., rest]) ** 2).mean()) / 19.2)
    assert 1.1 < ours < 1.6 and ours == pytest.approx(reference, rel=0.05)


def test_scores_of_the_truth_and_of_noise(phantom, seen):
    best = score(phantom.clean, phantom, seen, debiased=True)
    assert (
        best["psnr_db"] == np.inf
        and best["ssim"] == pytest.approx(1)
        and best["edge_slope"] == pytest.approx(1, abs=1e-6)
    )
    assert (
        best["fa_rmse"] == best["md_rmse_1e-3mm2/s"] == 0
        and abs(best["leak_slope"]) < 0.01
        and abs(best["residual_autocorrelation"]) < 0.02
    )
    raw, blurred = score(seen, phantom, seen), score(gaussian_filter(seen, (1, 1, 1, 0)), phantom, seen)
    assert (
        raw["leak_slope"] == pytest.approx(1)
        and raw["psnr_db"] < 25
        and raw["sigma"] == pytest.approx(phantom.sigma(15), rel=0.01)
    )
    assert (
        blurred["edge_slope"] < 0.6 < raw["edge_slope"]
        and blurred["residual_autocorrelation"] > 0.05
        and blurred["leak_slope"] < 0.2
    )
    worse = score(noisy(phantom, 8), phantom)
    assert (
        worse["psnr_db"] < raw["psnr_db"]
        and worse["fa_rmse"] > raw["fa_rmse"]
        and worse["md_rmse_1e-3mm2/s"] > raw["md_rmse_1e-3mm2/s"]
        and "leak_slope" not in worse
    )
    assert all(isinstance(v, float) for v in blurred.values())


def test_outside_the_mask_does_not_count(phantom, seen):
    other = seen.copy()
    other[~phantom.mask] = 1e6
    assert score(other, phantom) == score(seen, phantom)
    with pytest.raises(InputError, match="expected x y z v"):
        score(seen[..., :3], phantom)


def test_debias_raises_the_score_at_low_signal():
    p = make_phantom(1, (24, 24, 10), "10")
    sigma = p.sigma(10)
    mean = rice_mean(p.clean, sigma).astype(np.float32)
    assert score(debias(mean, sigma), p)["psnr_db"] > score(mean, p)["psnr_db"] + 20

"The diffusion phantom: the same again, mixtures add up, and noise has the moments it should have."

import json

import numpy as np
import pytest
from scipy import stats

from dinolab.core.errors import InputError
from dinolab.dwi.data import check_gradients, read_series
from dinolab.dwi.phantoms import (
    FAMILIES,
    SCHEMES,
    add_rician,
    even_directions,
    make_phantom,
    make_scheme,
    noisy,
    write_phantom,
)

SMALL = (24, 24, 10)


@pytest.fixture(scope="module", params=FAMILIES)
def phantom(request):
    return make_phantom(3, SMALL, family=request.param)


def test_same_arguments_same_phantom(phantom):
    again = make_phantom(3, SMALL, family=phantom.family)
    for name in ("clean", "mask", "fractions", "directions", "shares"):
        np.testing.assert_array_equal(getattr(phantom, name), getattr(again, name))
    np.testing.assert_array_equal(noisy(phantom, 10, 5), noisy(again, 10, 5))


def test_seeds_differ(phantom):
    other = make_phantom(4, SMALL, family=phantom.family)
    both = phantom.mask & other.mask
    assert np.corrcoef(phantom.clean[both][:, 20], other.clean[both][:, 20])[0, 1] < 0.8
    assert (
        abs(
            np.corrcoef(
                (noisy(phantom, 10, 0) - phantom.clean)[both][:, 20],
                (noisy(phantom, 10, 1) - phantom.clean)[both][:, 20],
            )[0, 1]
        )
        < 0.1
    )


def test_fractions_shares_and_background(phantom):
    total = phantom.fractions.sum(-1)
    np.testing.assert_allclose(total[phantom.mask], 1, atol=1e-5)
    assert (
        (total[~phantom.mask] == 0).all()
        and (phantom.clean[~phantom.mask] == 0).all()
        and np.isfinite(phantom.clean).all()
    )
    assert ((phantom.fractions > 0.01) & (phantom.fractions < 0.99)).any(-1)[
        phantom.mask
    ].mean() > 0.1  # mixtures
    assert phantom.shares.min() >= 0 and phantom.shares.sum(-1).max() <= 1 + 1e-5
    np.testing.assert_allclose(
        np.linalg.norm(phantom.directions[phantom.shares > 0.05], axis=-1), 1, atol=1e-4
    )
    assert (np.sort(phantom.shares, -1)[..., -2] > 0.2).sum() > 30  # crossings


def test_signal_falls_with_b(phantom):
    means = [phantom.clean[phantom.mask][:, phantom.gradients.shells == b].mean() for b in (0, 1000, 2000)]
    assert means[0] > 1.3 * means[1] > 1.3 * means[2] > 0
    b0, weighted = (
        phantom.clean[phantom.mask][:, phantom.gradients.is_b0],
        phantom.clean[phantom.mask][:, ~phantom.gradients.is_b0],
    )
    assert np.ptp(b0, 1).max() < 1e-2 and (weighted <= b0[:, :1] + 1e-2).all()


def test_strongest_signal_is_across_the_fibres():
    p = make_phantom(0, (32, 32, 12), ((0, 1), (3000, 45)))
    single = p.shares.max(-1) > 0.9
    n = np.take_along_axis(p.directions, p.shares.argmax(-1)[..., None, None], -2)[..., 0, :][single]
    across = np.abs(n @ p.gradients.bvecs[1:].T)
    assert (
        single.sum() > 50
        and np.mean([np.corrcoef(a, s)[0, 1] for a, s in zip(across, p.clean[single][:, 1:])]) < -0.85
    )


def test_what_a_brain_has():
    p = make_phantom(1)
    at = lambda name: p.fractions[..., p.names.index(name)]
    assert all((at(name) > 0.1).sum() > 5 for name in p.names)
    assert np.mean([(at(name) > 0.5)[p.mask].mean() for name in ("cortex", "white")]) > 0.25
    assert 0.98 < p.sigma(1) / 1000 < 1.02


@pytest.mark.parametrize("family", FAMILIES)
def test_not_a_linear_toy(family):
    p = make_phantom(1, (32, 32, 16), family=family)
    y = p.clean[p.mask].astype(float)
    found = []
    for v in range(4, 64, 12):
        x = np.c_[np.delete(y, v, 1), np.ones(len(y))]
        found.append(
            20
            * np.log10(
                y[:, v].max()
                / np.sqrt(((y[:, v] - x @ np.linalg.lstsq(x, y[:, v], rcond=1e-10)[0]) ** 2).mean())
            )
        )
    assert 45 < np.mean(found) < 80, found


def test_schemes():
    for name, shells in SCHEMES.items():
        g = make_scheme(name)
        assert len(g) == sum(n for _, n in shells) and [
            (b, (g.shells == b).sum()) for b, _ in shells
        ] == list(shells)
        np.testing.assert_allclose(np.linalg.norm(g.bvecs[~g.is_b0], axis=1), 1)
    own = check_gradients(np.r_[0, np.full(6, 800.0)], np.r_[np.zeros((1, 3)), even_directions(6)])
    assert make_phantom(0, SMALL, own).clean.shape == (*SMALL, 7)
    with pytest.raises(InputError, match="unknown scheme"):
        make_scheme("640")


@pytest.mark.parametrize("n, least", [(6, 60), (9, 40), (20, 28), (30, 24), (45, 19), (64, 15)])
def test_directions_are_spread(n, least):
    g = even_directions(n, 1)
    cosine = np.abs(g @ g.T)[~np.eye(n, dtype=bool)]
    assert np.degrees(np.arccos(cosine.max())) > least
    np.testing.assert_allclose(g.T @ g / n, np.eye(3) / 3, atol=0.02)


@pytest.mark.parametrize("signal", [0.0, 5.0, 20.0, 100.0])
def test_rician_moments(signal):
    m = add_rician(np.full((40, 40, 20, 10), signal, np.float32), 10.0, 3).astype(float)
    law = stats.rice(signal / 10, scale=10)
    assert (
        abs(m.mean() - law.mean()) < 5 * law.std() / np.sqrt(m.size) and abs(m.var() / law.var() - 1) < 0.01
    )
    assert stats.kstest(m[::4, ::4, ::2].ravel(), law.cdf).pvalue > 1e-4


def test_noise_that_varies():
    sigma = np.linspace(5, 20, 24)[:, None, None] * np.ones(SMALL)
    m = add_rician(np.full((*SMALL, 12), 1000.0, np.float32), sigma, 0)
    np.testing.assert_allclose(m.std((1, 2, 3)), sigma[:, 0, 0], rtol=0.1)
    p = make_phantom(0, SMALL, "10")
    assert (noisy(p, 10, profile=sigma / 10) - p.clean)[-4:].std() > 2 * (
        noisy(p, 10, profile=sigma / 10) - p.clean
    )[:4].std()
    with pytest.raises(InputError, match="expected numbers of 0 or more"):
        add_rician(p.clean, -1)
    with pytest.raises(InputError, match="snr=0: expected"):
        p.sigma(0)


def test_files(tmp_path):
    p = make_phantom(2, SMALL, "10", voxel_size=2.5)
    write_phantom(tmp_path / "new" / "folder", p, 15, 4)
    folder = tmp_path / "new" / "folder"
    back = read_series(
        folder / "dwi.nii.gz", folder / "dwi.bval", folder / "dwi.bvec", folder / "mask.nii.gz"
    )
    np.testing.assert_array_equal(back.data, noisy(p, 15, 4))
    np.testing.assert_array_equal(back.mask, p.mask)
    np.testing.assert_allclose(back.gradients.bvecs, p.gradients.bvecs, atol=1e-7)
    assert (
        np.linalg.det(back.image.affine[:3, :3]) < 0
        and len((folder / "dwi.bvec").read_text().splitlines()) == 3
    )
    np.testing.assert_allclose(back.image.affine @ [11.5, 11.5, 4.5, 1], [0, 0, 0, 1], atol=1e-5)
    note = json.loads((folder / "phantom.json").read_text())
    assert (
        note["sigma"] == pytest.approx(p.sigma(15))
        and note["shells"] == {"0": 1, "2500": 9}
        and note["voxel_size_mm"] == 2.5
    )


def test_cut_box_and_odd_shapes():
    assert make_phantom(0, (25, 31, 9), "10").clean.shape == (25, 31, 9, 10)
    assert (
        make_phantom(0, (24, 24, 40), "10", fine=3).mask[:, :, [0, -1]].sum() == 0
    )  # the head ends inside a high box
    with pytest.raises(InputError, match="30 mm"):
        make_phantom(shape=(8, 8, 8))

"Losses compared with torch and MONAI, their gradients, and what masks and channels must not change."

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, strategies as st
from torch.autograd import gradcheck

from dinolab.core.errors import InputError
from dinolab.train.losses import (
    LOSSES,
    affinity_loss,
    boundary_cross_entropy,
    boundary_weight,
    class_weights,
    cross_entropy,
    descriptor_loss,
    dice_loss,
    focal_loss,
    make_loss,
    ms_ssim_loss,
    output_weights,
    tversky_loss,
    SCALES,
)

shapes = st.integers(2, 3).flatmap(lambda d: st.tuples(*[st.integers(1, 5)] * d))
PLAIN = {k: LOSSES[k] for k in ("ce", "dice", "focal", "tversky")}


def case(shape, classes, seed, batch=2, drop=0.3, scale=2.0):
    "Logits, labels and a mask with at least one voxel."
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(batch, classes, *shape, generator=g)
    y = torch.randint(0, max(2, classes), (batch, *shape), generator=g)
    m = torch.rand(batch, *shape, generator=g) > drop
    m.view(-1)[0] = True
    return x, y, m


@examples(25)
@given(shapes, st.integers(2, 5), st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
def test_cross_entropy_is_that_of_torch(shape, classes, seed, smoothing, weighted):
    x, y, m = case(shape, classes, seed)
    w = torch.linspace(0.5, 2, classes) if weighted else None
    expected = F.cross_entropy(x, torch.where(m, y, -100), w, label_smoothing=smoothing, ignore_index=-100)
    torch.testing.assert_close(cross_entropy(x, y, m, w, label_smoothing=smoothing), expected)
    torch.testing.assert_close(cross_entropy(x, y, None, w), F.cross_entropy(x, y, w))
    torch.testing.assert_close(
        focal_loss(x, y, m, w, gamma=0), F.cross_entropy(x, torch.where(m, y, -100), w)
    )


@examples(25)
@given(shapes, st.integers(2, 4), st.integers(0, 999))
def test_voxel_weights(shape, classes, seed):
    x, y, m = case(shape, classes, seed)
    v = 0.1 + torch.rand(y.shape)
    torch.testing.assert_close(
        cross_entropy(x, y, m, voxel_weight=torch.ones_like(v)), cross_entropy(x, y, m)
    )
    each = F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(cross_entropy(x, y, m, voxel_weight=v), (each * v)[m].sum() / v[m].sum())


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)])
def test_dice_tversky_and_focal_are_those_of_monai(shape):
    losses = pytest.importorskip("monai.losses")
    x, y, _ = case(shape, 3, 5)
    assert len(y.unique()) == 3
    y1, small = y[:, None], dict(smooth_nr=1e-5, smooth_dr=1e-5)
    one = lambda a: a.transpose(0, 1).flatten(1)[None]  # one image of all: MONAI averages Tversky over images
    torch.testing.assert_close(
        dice_loss(x, y),
        losses.DiceLoss(softmax=True, to_onehot_y=True, batch=True, **small)(x, y1),
        atol=1e-5,
        rtol=0,
    )
    for a, b in [(0.3, 0.7), (0.5, 0.5), (1.0, 0.0)]:
        expected = losses.TverskyLoss(softmax=True, to_onehot_y=True, alpha=a, beta=b, **small)(
            one(x), one(y1)
        )
        torch.testing.assert_close(tversky_loss(x, y, alpha=a, beta=b), expected, atol=1e-5, rtol=0)
    for gamma in (0.5, 2.0, 3.0):
        expected = 3 * losses.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma)(
            x, y1
        )  # theirs is the mean over classes too
        torch.testing.assert_close(focal_loss(x, y, gamma=gamma), expected)
        w = torch.tensor([0.2, 1.0, 3.0])
        expected = (
            3
            * losses.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, weight=w)(x, y1)
            / w[y].mean()
        )
        torch.testing.assert_close(focal_loss(x, y, weight=w, gamma=gamma), expected)


def test_one_channel_dice_is_that_of_monai():
    losses = pytest.importorskip("monai.losses")
    x, y, _ = case((5, 6, 4), 1, 0)
    expected = losses.DiceLoss(sigmoid=True, batch=True)(x, y[:, None])
    torch.testing.assert_close(dice_loss(x, y), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("classes", [1, 3])
def test_gradcheck(name, classes):
    x, y, m = case((3, 2, 2), classes, 1, batch=1, scale=1.0)
    w = None if classes == 1 else [0.5, 1.0, 2.0]
    f = lambda x: LOSSES[name](x, y, m, w).double()
    assert gradcheck(
        f, x.double().requires_grad_(), eps=1e-2, atol=1e-3, rtol=1e-2
    )  # the loss itself is computed in single precision


@pytest.mark.parametrize("balanced, gamma", [(False, 0.0), (True, 0.0), (True, 2.0)])
def test_gradcheck_of_affinity_and_descriptor(balanced, gamma):
    x, y, m = torch.randn(1, 2, 3, 3, 2), torch.rand(1, 2, 3, 3, 2) > 0.4, torch.rand(1, 2, 3, 3, 2) > 0.2
    assert gradcheck(
        lambda x: affinity_loss(x, y, m, balanced=balanced, gamma=gamma).double(),
        x.double().requires_grad_(),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )
    assert gradcheck(
        lambda x: descriptor_loss(x, y, m).double(),
        x.double().requires_grad_(),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )


@examples(25)
@given(shapes, st.integers(1, 4), st.integers(0, 999), st.sampled_from([*PLAIN, "ce+dice"]))
def test_masked_voxels_change_nothing(shape, classes, seed, name):
    x, y, m = case(shape, classes, seed)
    x.requires_grad_()
    loss = make_loss(name)(x, y, m)
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad.movedim(1, -1)[~m].any() and torch.isfinite(grad).all()
    other = torch.where(m, y, 255)  # any label, any logit
    far = torch.where(m[:, None], x, torch.full_like(x, 50.0))
    torch.testing.assert_close(make_loss(name)(far, other, m), loss)


@examples(20)
@given(shapes, st.integers(0, 999), st.booleans())
def test_masked_affinities_change_nothing(shape, seed, balanced):
    g = torch.Generator().manual_seed(seed)
    x, y, m = (
        torch.randn(1, 2, *shape, generator=g, requires_grad=True),
        torch.rand(1, 2, *shape, generator=g) > 0.5,
        torch.rand(1, 2, *shape, generator=g) > 0.3,
    )
    m.view(-1)[0] = True
    for f in (lambda x, y: affinity_loss(x, y, m, balanced=balanced), lambda x, y: descriptor_loss(x, y, m)):
        loss = f(x, y)
        (grad,) = torch.autograd.grad(loss, x)
        assert not grad[~m].any()
        torch.testing.assert_close(f(x, y ^ ~m), loss)
    if not balanced:
        torch.testing.assert_close(
            affinity_loss(x, y, m, balanced=False), F.binary_cross_entropy_with_logits(x[m], y[m].float())
        )
    torch.testing.assert_close(descriptor_loss(x, y, m), F.mse_loss(x[m], y[m].float()))


def test_balanced_affinities_weigh_zeros_and_ones_alike():
    y = torch.zeros(1, 1, 10, 10)
    y[0, 0, 0, :3] = 1
    x = torch.randn(1, 1, 10, 10)
    each = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    torch.testing.assert_close(affinity_loss(x, y), (each[y > 0].mean() + each[y == 0].mean()) / 2)


@examples(20)
@given(shapes, st.integers(0, 999), st.sampled_from(["ce", "focal"]), st.booleans())
def test_one_channel_is_two(shape, seed, name, weighted):
    x, y, m = case(shape, 1, seed)
    w = [0.5, 3.0] if weighted else None
    two = torch.cat([torch.zeros_like(x), x], 1)
    torch.testing.assert_close(LOSSES[name](x, y, m, w), LOSSES[name](two, y, m, w))
    torch.testing.assert_close(LOSSES[name](-x, 1 - y, m, w and w[::-1]), LOSSES[name](x, y, m, w))
    if name == "ce" and not weighted:
        torch.testing.assert_close(
            cross_entropy(x, y, m), F.binary_cross_entropy_with_logits(x[:, 0][m], y[m].float())
        )


@examples(20)
@given(shapes, st.integers(2, 4), st.integers(0, 999), st.sampled_from(list(PLAIN)))
def test_half_precision_order_and_range(shape, classes, seed, name):
    x, y, m = case(shape, classes, seed, scale=50.0)
    loss = LOSSES[name](x.half(), y, m)
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and loss >= 0
    torch.testing.assert_close(LOSSES[name](x.flip(0, 2), y.flip(0, 1), m.flip(0, 1)), LOSSES[name](x, y, m))
    order = torch.randperm(classes)  # classes have no order
    torch.testing.assert_close(
        LOSSES[name](x[:, order], order.argsort()[y], m), LOSSES[name](x, y, m), atol=1e-5, rtol=1e-5
    )
    sure = 100 * F.one_hot(y, classes).movedim(-1, 1).float()
    assert LOSSES[name](sure, y, m) < 1e-4
    if name in ("dice", "tversky"):
        assert loss <= 1 + 1e-6


@examples(20)
@given(shapes, st.integers(0, 999), st.sampled_from([(1.0, 1.0, 1.0), (3.0, 1.0, 2.0)]))
def test_boundary_weight_by_brute_force(shape, seed, size):
    size = size[: len(shape)]
    y = np.random.default_rng(seed).integers(0, 2, shape)
    at = [
        i
        for i in np.ndindex(*shape)
        if any(
            0 <= i[a] + s < shape[a] and y[i] != y[tuple(v + s * (b == a) for b, v in enumerate(i))]
            for a in range(len(shape))
            for s in (-1, 1)
        )
    ]
    expected = np.ones(shape)
    for i in np.ndindex(*shape):
        if at:
            expected[i] += 4 * math.exp(
                -0.5 * min(sum(((p - q) * s) ** 2 for p, q, s in zip(i, j, size)) for j in at) / 2**2
            )
    np.testing.assert_allclose(boundary_weight(y, size, 2.0, 4.0), expected, rtol=1e-5)
    x = torch.randn(1, 2, *shape)
    each = F.cross_entropy(x, torch.from_numpy(y)[None], reduction="none")[0].numpy()
    np.testing.assert_allclose(
        boundary_cross_entropy(x, torch.from_numpy(y)[None], voxel_size=size, sigma=2.0),
        (each * expected).sum() / expected.sum(),
        rtol=1e-4,
    )


def test_deep_supervision_is_a_weighted_mean():
    x, y, m = case((4, 6, 8), 3, 2)
    coarse = torch.randn(2, 3, 2, 3, 4)
    near = lambda t: F.interpolate(t[:, None].float(), size=(2, 3, 4), mode="nearest-exact")[:, 0]
    expected = (2 * cross_entropy(x, y, m) + cross_entropy(coarse, near(y).long(), near(m) > 0)) / 3
    torch.testing.assert_close(make_loss("ce")([x, coarse], y, m), expected)
    torch.testing.assert_close(
        make_loss("ce")([x, coarse * 9], y, m) - make_loss("ce")([x, coarse], y, m),
        (
            cross_entropy(coarse * 9, near(y).long(), near(m) > 0)
            - cross_entropy(coarse, near(y).long(), near(m) > 0)
        )
        / 3,
    )


def test_class_weights():
    counts = np.array([1000, 10, 0, 100])
    for how, f in dict(
        none=lambda c: c**0.0, inverse=lambda c: 1 / c, inverse_sqrt=lambda c: c**-0.5
    ).items():
        w = class_weights(counts, how)
        there = counts > 0
        raw = f(counts[there].astype(float))
        np.testing.assert_allclose(w[there], raw / raw.mean(), rtol=1e-5)
        assert w[2] == 0
    beta = 1 - 1e-6
    raw = (1 - beta) / (1 - beta ** counts[counts > 0].astype(float))
    np.testing.assert_allclose(class_weights(counts, "effective")[counts > 0], raw / raw.mean(), rtol=1e-4)


def test_errors():
    x, y, _ = case((3, 3), 2, 0)
    with pytest.raises(InputError, match="0 to 1"):
        cross_entropy(x, y + 1)
    with pytest.raises(InputError, match="empty"):
        dice_loss(x, y, torch.zeros_like(y))
    with pytest.raises(InputError, match="expected the same shape"):
        dice_loss(x, y, torch.ones(2, 3, 2))
    with pytest.raises(InputError, match="no option"):
        make_loss("ce", gamma=1)


@pytest.mark.parametrize("size", [(180, 256), (177, 191)])
def test_ms_ssim_equals_monai(size):
    from monai.metrics.regression import MultiScaleSSIMMetric

    torch.manual_seed(0)
    logits = torch.randn(2, 3, *size).cumsum(2).cumsum(3) * 0.01
    target = (logits + torch.randn(2, 3, *size) * 0.3).argmax(1)
    p, t = logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1).float()
    weights = [w / sum(SCALES) for w in SCALES]
    theirs = (
        sum(
            MultiScaleSSIMMetric(2, data_range=1.0, weights=weights)(p[:, c : c + 1], t[:, c : c + 1]).mean()
            for c in range(3)
        )
        / 3
    )
    assert abs(1 - theirs - ms_ssim_loss(logits, target)) < 1e-5


def test_side_outputs_of_the_source():
    "The finest, and 0.4 of the mean over the others."
    torch.manual_seed(0)
    outputs, target = [torch.randn(1, 2, 6, 6) for _ in range(3)], torch.randint(2, (1, 6, 6))
    one = make_loss("ce")
    wanted = one(outputs[0], target) + 0.4 * (one(outputs[1], target) + one(outputs[2], target)) / 2
    assert torch.allclose(make_loss("ce", side_weight=0.4)(outputs, target), wanted)
    assert abs(sum(output_weights(4)) - 1) < 1e-12 and output_weights(1, 0.4) == [1.0]

"Upsamplers by brute force and against torch: any size per axis, in 2D and 3D, with gradients."

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, strategies as st
from torch.autograd import gradcheck

from dinolab.core.errors import InputError
from dinolab.models.neighborhood import NeighborhoodFilter
from dinolab.models.upsample import (
    LINEAR,
    UPSAMPLERS,
    GuidedUpsampler,
    Interpolate,
    JointBilateral,
    Transpose,
    cell_tables,
    choose_upsampler,
    create_upsampler,
    from_cells,
    record_voxels,
    resize,
    growth_stages,
    to_cells,
)

pairs = lambda small, large: st.integers(2, 3).flatmap(
    lambda d: st.tuples(st.tuples(*[st.integers(1, small)] * d), st.tuples(*[st.integers(1, large)] * d))
)


def rand(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def axis_matrix(n, size):
    "What `resize` does along one axis, as size rows of n weights: means of what a voxel covers, or a line between two centres."
    w = np.zeros((size, n))
    for i in range(size):
        if size <= n:
            a, b = i * n // size, -(-(i + 1) * n // size)
            w[i, a:b] = 1 / (b - a)
        else:
            at = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
            a = int(at)
            w[i, a] += 1 - (at - a)
            w[i, min(a + 1, n - 1)] += at - a
    return w


def brute_resize(x, size):
    for a, s in enumerate(size):
        x = np.moveaxis(np.tensordot(axis_matrix(x.shape[2 + a], s), x, (1, 2 + a)), 0, 2 + a)
    return x


@examples(60)
@given(pairs(6, 9), st.integers(0, 99))
def test_resize_by_brute_force(sizes, seed):
    small, size = sizes
    x = rand(seed, 2, 3, *small)
    got = resize(x, size)
    np.testing.assert_allclose(got.numpy(), brute_resize(x.numpy(), size), atol=1e-5)
    torch.testing.assert_close(Interpolate(3)(x, size), got)
    if all(s >= n for n, s in zip(*sizes)):
        torch.testing.assert_close(
            got, F.interpolate(x, size=size, mode=LINEAR[len(size)], align_corners=False)
        )
    torch.testing.assert_close(resize(torch.ones_like(x), size), torch.ones(2, 3, *size))
    assert got.min() >= x.min() - 1e-6 and got.max() <= x.max() + 1e-6


@examples(60)
@given(st.integers(1, 9), st.integers(0, 30))
def test_every_fine_voxel_is_in_one_cell(n, more):
    size = n + more
    members, place, offset, real = cell_tables(n, size)
    cell = [min(max(round((i + 0.5) * n / size - 0.5), 0), n - 1) for i in range(size)]
    assert sorted(members[real].tolist()) == list(range(size))
    for c in range(n):
        assert members[c][real[c]].tolist() == [i for i in range(size) if cell[i] == c]
    assert members.flatten()[place].tolist() == list(range(size))
    np.testing.assert_allclose(
        offset[real], [(i + 0.5) * n / size - 0.5 - cell[i] for i in range(size)], atol=1e-6
    )
    x = rand(0, 2, 3, size, size)
    torch.testing.assert_close(from_cells(to_cells(x, [members] * 2), [place] * 2), x)


def brute_bilateral(x, size, guide, spatial, intensity, window):
    "Joint bilateral upsampling, voxel by voxel."
    shrunk = tuple(min(n, s) for n, s in zip(x.shape[2:], size))
    x = brute_resize(x.astype(float), shrunk)
    if shrunk == tuple(size):
        return x
    d, out = len(size), np.zeros((*x.shape[:2], *size))
    window = [1 if n == s else window for n, s in zip(shrunk, size)]
    at = [[(i + 0.5) * n / s - 0.5 for i in range(s)] for n, s in zip(shrunk, size)]
    cell = [[min(max(round(v), 0), n - 1) for v in a] for a, n in zip(at, shrunk)]
    for b in range(len(x)):
        held = {
            c: np.mean(
                [
                    guide[(b, slice(None), *i)]
                    for i in np.ndindex(*size)
                    if tuple(cell[a][i[a]] for a in range(d)) == c
                ],
                0,
            )
            for c in np.ndindex(*shrunk)
        }
        for i in np.ndindex(*size):
            total = weight = 0
            for o in np.ndindex(*window):
                c = tuple(cell[a][i[a]] + o[a] - window[a] // 2 for a in range(d))
                if not all(0 <= v < n for v, n in zip(c, shrunk)):
                    continue
                near = sum((c[a] - at[a][i[a]]) ** 2 for a in range(d)) / spatial**2
                alike = ((guide[(b, slice(None), *i)] - held[c]) ** 2).sum() / intensity**2
                w = math.exp(-0.5 * (near + alike))
                total, weight = total + w * x[(b, slice(None), *c)], weight + w
            out[(b, slice(None), *i)] = total / weight
    return out


@examples(20)
@given(
    st.sampled_from(
        [
            ((3, 2), (7, 5)),
            ((3, 4), (6, 4)),
            ((4, 3), (2, 7)),
            ((2, 2, 2), (5, 4, 3)),
            ((1, 2, 3), (4, 2, 5)),
            ((3, 1, 2), (2, 3, 5)),
            ((3, 3), (2, 2)),
            ((3, 3), (3, 3)),
        ]
    ),
    st.integers(0, 99),
    st.integers(1, 2),
    st.sampled_from([3, 5]),
    st.sampled_from([0.3, 0.6]),
)
def test_joint_bilateral_by_brute_force(sizes, seed, channels, window, spatial):
    small, size = sizes
    x, guide = rand(seed, 2, 2, *small), rand(seed + 1, 2, channels, *size)
    got = JointBilateral(2, spatial, 0.4, window)(x, size, guide)
    np.testing.assert_allclose(
        got.numpy(),
        brute_bilateral(x.numpy(), size, guide.numpy().astype(float), spatial, 0.4, window),
        atol=1e-5,
    )


def filters(d):
    return [JointBilateral(3), NeighborhoodFilter(1, d)]


@examples(25)
@given(pairs(5, 11), st.integers(0, 99), st.booleans())
def test_guided_means(sizes, seed, learned):
    small, size = sizes
    torch.manual_seed(seed)
    up = filters(len(size))[learned].eval().requires_grad_(False)
    x, guide = rand(seed, 2, 3, *small), rand(seed + 1, 2, 1, *size)
    got = up(x, size, guide)
    assert got.shape == (2, 3, *size) and got.dtype == x.dtype
    assert got.min() >= x.min() - 1e-5 and got.max() <= x.max() + 1e-5  # weights are positive and add up to 1
    torch.testing.assert_close(up(torch.ones_like(x), size, guide), torch.ones_like(got))
    torch.testing.assert_close(up(2 * x + 1, size, guide), 2 * got + 1, atol=1e-5, rtol=1e-5)
    up.budget = 1  # one cell after the other
    torch.testing.assert_close(up(x, size, guide), got, atol=1e-5, rtol=1e-5)
    up.budget = 2**26
    torch.testing.assert_close(up(x, size, guide, up.encode(guide)), got, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(up(x.flip(0), size, guide.flip(0)), got.flip(0), atol=1e-5, rtol=1e-5)


def test_the_guide_decides_where_the_border_is():
    x = torch.tensor([0.0, 0, 1, 1]).expand(1, 1, 4, 4)
    guide = (
        (torch.arange(32) >= 18).float().expand(1, 1, 32, 32)
    )  # the border is two voxels to the right of that of the features
    got = JointBilateral(1)(x, (32, 32), guide)
    assert ((got > 0.5) == (guide > 0.5)).float().mean() > (
        (resize(x, (32, 32)) > 0.5) == (guide > 0.5)
    ).float().mean()


@pytest.mark.parametrize("small, size", [((2, 3), (5, 7)), ((3, 2), (2, 5)), ((2, 2, 1), (3, 4, 2))])
def test_gradcheck(small, size):
    x, guide = rand(0, 1, 2, *small).double().requires_grad_(), rand(1, 1, 1, *size)
    assert gradcheck(lambda x: JointBilateral(2, intensity=0.5)(x, size, guide), x)
    torch.manual_seed(0)
    up = Transpose(2, small, size).double()
    for p in up.parameters():
        torch.nn.init.normal_(p)
    assert gradcheck(lambda x, *p: up(x, size), (x, *up.parameters()), atol=1e-4)
    assert gradcheck(lambda x: resize(x, size), x)


def test_gradient_reaches_the_guide():
    x, guide = rand(0, 1, 2, 2, 3), rand(1, 1, 1, 5, 7).double().requires_grad_()
    assert gradcheck(
        lambda g: JointBilateral(2, intensity=0.5)(x, (5, 7), g).double(),
        guide,
        eps=1e-2,
        atol=2e-3,
        rtol=1e-2,
    )  # weights are computed in single precision


@examples(100)
@given(pairs(40, 90))
def test_stages(sizes):
    small, size = sizes
    plan = growth_stages(small, size)
    assert plan[-1] == size
    for before, after in zip([small, *plan], plan):
        for b, a, n, s in zip(before, after, small, size):
            assert a <= 2 * b and a <= s and (a >= b or n >= s)
    assert len(plan) == max(1, *(math.ceil(math.log2(s / n)) for n, s in zip(small, size) if s > n), 1)


@examples(25)
@given(pairs(5, 12), st.integers(0, 99))
def test_transpose_starts_as_interpolation_and_takes_other_sizes(sizes, seed):
    small, size = sizes
    up = Transpose(12, small, size).requires_grad_(False)
    x = rand(seed, 1, 12, *small)
    expected = x
    for s in growth_stages(small, size):
        expected = resize(expected, s)
    with record_voxels(up, len(size)) as found:
        torch.testing.assert_close(up(x, size), expected)
    assert found["voxels"] <= math.prod(size)
    other = tuple(s + 3 for s in size)
    assert up(x, other).shape == (1, 12, *other)


@examples(20)
@given(pairs(5, 9), st.sampled_from(sorted(UPSAMPLERS)))
def test_no_result_is_larger_than_the_target(sizes, name):
    small, size = sizes
    up = create_upsampler(name, 12, small, size).eval().requires_grad_(False)
    with record_voxels(up, len(size)) as found:
        out = up(rand(0, 1, 12, *small), size, rand(1, 1, 1, *size))
    assert out.shape == (1, 12, *size) and found["voxels"] == math.prod(size)


def test_choice_and_errors():
    assert choose_upsampler((8, 8, 8), (8, 8, 8)) == "interpolate" == choose_upsampler((8, 8), (4, 4))
    assert (
        choose_upsampler((8, 8, 8), (16, 16, 16)) == "transpose"
        and choose_upsampler((4, 4, 4), (64, 64, 64)) == "neighborhood"
    )
    assert (
        choose_upsampler((4, 4, 4), (64, 64, 64), guide=False) == "transpose"
        and choose_upsampler((2, 2, 2), (512, 512, 512), guide=False) == "interpolate"
    )
    x = rand(0, 1, 2, 2, 2)
    with pytest.raises(InputError, match="guide"):
        JointBilateral(2)(x, (4, 4))
    with pytest.raises(InputError, match="target grid"):
        JointBilateral(2)(x, (4, 4), rand(0, 1, 1, 4, 5))
    with pytest.raises(InputError, match="odd"):
        JointBilateral(2, window=4)
    with pytest.raises(InputError, match="did you mean"):
        create_upsampler("transpos", 2, (2, 2), (4, 4))
    with pytest.raises(InputError, match="as many axes"):
        create_upsampler("transpose", 2, (2, 2), (4, 4, 4))
    assert issubclass(NeighborhoodFilter, GuidedUpsampler)

"Networks and losses for diffusion data: against scipy and numpy, any size, half precision, tiles, and the order of volumes."

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, strategies as st
from scipy import ndimage
from torch.autograd import gradcheck

from dinolab.core.errors import InputError
from dinolab.dwi.nets import (
    FORMS,
    NETS,
    SPLITS,
    AdaptiveSkipConnection,
    CBAM3d,
    EdgeAwareLoss,
    GatedBlock,
    SinusoidalVolumeEncoder,
    VolumeSpecificDetailEncoder,
    box_pool,
    create_net,
    edge_loss,
    factorised_conv,
    gradient_encoding,
    upsample_by_two,
    downsample_by_two,
    low_pass,
    masked_mse,
    progressive_loss,
    sinusoids,
    sobel_gradient,
    split_bands,
)

sizes = st.tuples(*[st.integers(1, 7)] * 3)
channels = st.integers(1, 4)
seeds = st.integers(0, 999)


def rand(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(net, seed=0):
    "No parameter is zero: what the zero start would hide is seen."
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.2 * rand(seed + i, *p.shape, dtype=p.dtype))
    return net


# the gradient and the losses


@examples(25)
@given(sizes, channels, seeds)
def test_gradient_is_that_of_scipy(size, c, seed):
    x = rand(seed, 2, c, *size)
    found = sobel_gradient(x)
    fits = tuple(slice(None) if n < 3 else slice(1, -1) for n in size)
    for b in range(2):
        for i in range(c):
            for axis in range(3):
                expected = (
                    ndimage.sobel(x[b, i].numpy(), axis, mode="nearest") / 32
                )  # its taps are -1 0 1 and 1 2 1
                np.testing.assert_allclose(found[b, i, axis].numpy(), expected[fits], atol=1e-12)


def test_gradient_is_a_correlation_with_27_taps():
    x, d, s = rand(0, 1, 1, 5, 6, 7), np.array([-1, 0, 1]) / 2, np.array([1, 2, 1]) / 4
    for axis in range(3):
        taps = np.einsum("i,j,k->ijk", *(d if a == axis else s for a in range(3)))
        assert abs(taps.sum()) < 1e-15
        np.testing.assert_allclose(
            sobel_gradient(x)[0, 0, axis].numpy(),
            ndimage.correlate(x[0, 0].numpy(), taps)[1:-1, 1:-1, 1:-1],
            atol=1e-12,
        )


@examples(20)
@given(st.tuples(*[st.integers(2, 7)] * 3), st.tuples(*[st.floats(-3, 3)] * 3), st.floats(-100, 100))
def test_unit_ramps(size, slope, offset):
    "Exactly the slope where the axis is long enough for a difference of two voxels."
    at = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    found = sobel_gradient((sum(k * v for k, v in zip(slope, at)) + offset)[None, None])[0, 0]
    for a in range(3):
        if size[a] > 2:
            torch.testing.assert_close(found[a], torch.full_like(found[a], slope[a]), atol=1e-9, rtol=0)


def brute(p, t, m, form, eps):
    "The edge loss, voxel by voxel."
    total, count = 0.0, 0
    size = p.shape[2:]
    around = [range(-1, 2)] * 3
    near = lambda v, z, y, x, o: v[tuple(min(max(i + k, 0), n - 1) for i, k, n in zip((z, y, x), o, size))]
    for b in range(p.shape[0]):
        for c in range(p.shape[1]):
            for z, y, x in np.ndindex(*size):
                if any(n >= 3 and i in (0, n - 1) for i, n in zip((z, y, x), size)):
                    continue
                if not all(
                    near(m[b], z, y, x, (i, j, k)) for i in around[0] for j in around[1] for k in around[2]
                ):
                    continue
                g = np.zeros((2, 3))
                for w, v in enumerate((p[b, c], t[b, c])):
                    for o in np.ndindex(3, 3, 3):
                        for a in range(3):
                            g[w, a] += near(v, z, y, x, [k - 1 for k in o]) * np.prod(
                                [(k - 1) / 2 if q == a else (1, 2, 1)[k] / 4 for q, k in enumerate(o)]
                            )
                count += 1
                total += (
                    ((g[0] - g[1]) ** 2).sum()
                    if form == "vector"
                    else (math.sqrt((g[0] ** 2).sum() + eps**2) - math.sqrt((g[1] ** 2).sum() + eps**2)) ** 2
                )
    return total / max(1, count)


@examples(12)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(sorted(FORMS)), seeds, st.integers(0, 2))
def test_edge_loss_is_the_sum_over_voxels(size, form, seed, holes):
    p, t = rand(seed, 2, 2, *size), rand(seed + 1, 2, 2, *size)
    m = torch.ones(2, *size, dtype=torch.bool)
    m.view(-1)[: holes if m.numel() > holes else 0] = False
    torch.testing.assert_close(
        edge_loss(p, t, m, form, 0.1).item(), float(brute(p.numpy(), t.numpy(), m.numpy(), form, 0.1))
    )


@examples(20)
@given(sizes, channels, st.sampled_from(sorted(FORMS)), seeds)
def test_outside_the_mask_nothing_counts(size, c, form, seed):
    p, t = rand(seed, 2, c, *size).requires_grad_(), rand(seed + 1, 2, c, *size)
    m = rand(seed + 2, 2, *size) > -1
    m[:, 0, 0, 0] = True
    loss, junk = EdgeAwareLoss(0.3, form), torch.tensor(math.nan, dtype=torch.float64)
    expected = loss(p, t, m)
    assert torch.equal(loss(p, torch.where(m[:, None], t, junk), m[:, None]), expected)
    assert torch.equal(loss(torch.where(m[:, None], p, junk), t, m[:, None].expand_as(p)), expected)
    (g,) = torch.autograd.grad(loss(p, torch.where(m[:, None], t, junk), m), p)
    assert g.isfinite().all() and (g[~m[:, None].expand_as(p)] == 0).all()
    torch.testing.assert_close(masked_mse(p, t, m), F.mse_loss(p.movedim(1, -1)[m], t.movedim(1, -1)[m]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(3, 4, 3), (1, 2, 3), (1, 1, 1)])
def test_loss_gradients_by_finite_differences(form, size):
    p, t, m = (
        rand(0, 2, 2, *size).requires_grad_(),
        rand(1, 2, 2, *size),
        torch.ones(2, *size, dtype=torch.bool),
    )
    assert gradcheck(lambda p: EdgeAwareLoss(0.7, form, 0.05)(p, t, m), (p,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.0, 300.0])
def test_flat_volumes_have_finite_gradients(form, dtype, target):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
        p = torch.zeros(1, 2, 5, 4, 3, dtype=dtype, requires_grad=True)
        t = torch.zeros_like(p) + target * torch.arange(3)
        value = EdgeAwareLoss(0.5, form)(p, t)
        value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite() and p.grad.isfinite().all() and p.grad.dtype == dtype


def test_borders_make_no_edges_and_thin_masks_no_loss():
    const = torch.full((1, 2, 5, 4, 3), 1000.0)
    assert (
        edge_loss(const, torch.zeros_like(const)) == 0
        and edge_loss(const, torch.zeros_like(const), form="magnitude") < 1e-9
    )
    thin = torch.zeros(1, 5, 4, 3, dtype=torch.bool)
    thin[:, 2] = True
    p = rand(0, 1, 2, 5, 4, 3).requires_grad_()
    value = edge_loss(p, torch.zeros_like(p), thin)
    value.backward()
    assert value == 0 and (p.grad == 0).all()


def test_noise_of_the_target_biases_only_the_magnitude():
    "At the clean volume the mean gradient of the loss along its steepness is zero for the vector form."
    clean = 0.05 * torch.arange(24.0, dtype=torch.float64).expand(1, 1, 24, 24, 24)
    slopes = {}
    for form in FORMS:
        f = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = sum(edge_loss(f * clean, clean + 0.1 * rand(i, *clean.shape), form=form) for i in range(6)) / 6
        (slopes[form],) = torch.autograd.grad(loss, f)
    assert abs(slopes["vector"]) < 3e-5 and slopes["magnitude"] < -1e-3


@pytest.mark.parametrize(
    "p, t, m",
    [
        ((1, 1, 3, 3, 3), (1, 1, 3, 3, 2), None),
        ((3, 3, 3), (3, 3, 3), None),
        ((1, 1, 3, 3, 3), (1, 2, 3, 3, 3), None),
        ((2, 2, 3, 3, 3), (2, 2, 3, 3, 3), (1, 3, 3, 3)),
        ((1, 2, 3, 3, 3), (1, 2, 3, 3, 3), (3, 3, 3)),
    ],
)
def test_shapes_that_do_not_fit(p, t, m):
    with pytest.raises(InputError, match="expected"):
        EdgeAwareLoss()(torch.zeros(p), torch.zeros(t), None if m is None else torch.ones(m))


# parts


@examples(15)
@given(sizes, channels, channels, st.sampled_from([1, 3, 5]), seeds)
def test_factorised_kernels_are_products(size, cin, cout, k, seed):
    torch.manual_seed(seed)
    conv, x = factorised_conv(cin, cout, k).double(), rand(seed, 2, cin, *size)
    a, b, c = (m.weight.flatten(2) for m in conv)
    full = torch.einsum("oqx,qpy,pcz->oczyx", c, b, a)
    torch.testing.assert_close(conv(x), F.conv3d(x, full, conv[2].bias, padding=k // 2))
    assert sum(p.numel() for p in conv.parameters()) == k * cout * (cin + 2 * cout) + cout


@examples(20)
@given(sizes, st.sampled_from([1, 3, 5, 9]), seeds)
def test_box_pooling_is_that_of_scipy(size, window, seed):
    x = rand(seed, 1, 1, *size)
    mean, peak = box_pool(x, window)
    total, inside = (
        ndimage.correlate(v, np.ones((window,) * 3), mode="constant")
        for v in (x[0, 0].numpy(), np.ones(size))
    )
    np.testing.assert_allclose(mean[0, 0].numpy(), total / inside, atol=1e-12)
    np.testing.assert_array_equal(
        peak[0, 0].numpy(), ndimage.maximum_filter(x[0, 0].numpy(), window, mode="constant", cval=-np.inf)
    )


@examples(12)
@given(sizes, st.integers(1, 20), st.sampled_from([None, 3, 9]), seeds)
def test_gates_keep_the_shape_and_only_attenuate(size, c, window, seed):
    torch.manual_seed(seed)
    x = rand(seed, 2, c, *size, dtype=torch.float32)
    out = CBAM3d(c, window=window)(x)
    assert out.shape == x.shape and (out.abs() <= x.abs()).all() and (out * x >= 0).all()
    assert GatedBlock(c)(x).shape == x.shape


def test_a_window_over_everything_is_the_whole_patch():
    torch.manual_seed(0)
    whole, local = CBAM3d(6, 2), CBAM3d(6, 2, window=13)
    local.load_state_dict(whole.state_dict())
    x = rand(0, 1, 6, 5, 7, 4, dtype=torch.float32)
    torch.testing.assert_close(local(x), whole(x))


@pytest.mark.parametrize("start", [3, 6, 9])
def test_local_gates_agree_between_tile_and_volume(start):
    torch.manual_seed(0)
    gate, reach = shaken(CBAM3d(6, 2, kernel=3, window=5)), 2 + 1
    x = rand(0, 1, 6, 20, 6, 20, dtype=torch.float32) * torch.linspace(0.2, 3, 20)
    whole, tile = gate(x), gate(x[:, :, start : start + 10, :, 4:14])
    torch.testing.assert_close(
        tile[:, :, reach:-reach, :, reach:-reach],
        whole[:, :, start + reach : start + 10 - reach, :, 4 + reach : 14 - reach],
    )
    gate.window = None
    assert (
        gate(x)[:, :, start + reach : start + 10 - reach]
        - gate(x[:, :, start : start + 10])[:, :, reach:-reach]
    ).abs().max() > 1e-3


@examples(15)
@given(sizes, sizes, channels, channels, channels, seeds)
def test_skip_of_any_size(size, skip_size, c, s, o, seed):
    torch.manual_seed(seed)
    join, x, skip = (
        AdaptiveSkipConnection(c, s, o),
        rand(seed, 2, c, *size, dtype=torch.float32),
        rand(seed + 1, 2, s, *skip_size, dtype=torch.float32).requires_grad_(),
    )
    out = join(x, skip)
    out.sum().backward()
    assert out.shape == (2, o, *skip_size) and skip.grad.isfinite().all()


def test_gates_of_blocks_and_skips():
    "What is joined and what is let through, written out; the skip's gate depends on both maps."
    torch.manual_seed(0)
    x, skip = (rand(i, 1, 2, 3, 3, 3).requires_grad_() for i in range(2))
    block, join = GatedBlock(2).double(), AdaptiveSkipConnection(2, 2, 1).double()
    h, g = block.conv(x).split(2, 1)
    torch.testing.assert_close(block(x), x + h / (1 + torch.exp(-g)))
    gate = join.gate(torch.cat([x, skip], 1))
    assert gate.shape == (1, 1, 3, 3, 3) and all(
        g.abs().sum() > 0 for g in torch.autograd.grad(gate.sum(), (x, skip), retain_graph=True)
    )
    torch.testing.assert_close(join(x, skip), join.join(torch.cat([x, gate * skip], 1)))


def cell(x, *at):
    "Mean over the two voxels of each axis, the last of an odd one counted alone."
    for a, i in enumerate(at):
        x = x.narrow(2, 2 * i, min(2, x.shape[2] - 2 * i)).mean(2)
    return x


@examples(20)
@given(sizes, channels, seeds)
def test_half_resolution_and_back(size, c, seed):
    x = rand(seed, 2, c, *size)
    down = downsample_by_two(x)
    assert down.shape == (2, c, *(-(-n // 2) for n in size)) and low_pass(x).shape == x.shape
    for z, y, w in np.ndindex(*down.shape[2:]):
        torch.testing.assert_close(down[..., z, y, w], cell(x, z, y, w))
    even = F.interpolate(down, scale_factor=2, mode="trilinear", align_corners=False)
    assert torch.equal(upsample_by_two(down, size), even[..., : size[0], : size[1], : size[2]])


# networks


@pytest.mark.parametrize(
    "name, options",
    [
        ("multiscale", {}),
        ("progressive", {}),
        ("progressive", dict(kernel=1)),
        ("frequency", {}),
        ("frequency", dict(kind="fft", cutoff=0.9)),
    ],
)
@examples(10)
@given(size=sizes, c=channels, o=channels, f=st.integers(1, 5), seed=seeds)
def test_networks_of_any_size(name, options, size, c, o, f, seed):
    torch.manual_seed(seed)
    net, x = (
        create_net(name, c, o, base_filters=f, **options),
        rand(seed, 2, c, *size, dtype=torch.float32).requires_grad_(),
    )
    out = net(x)
    out.square().mean().backward()
    assert out.shape == (2, o, *size) and out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "residual, out, chosen", [(2, 1, [2]), (-1, 1, [3]), (slice(1, 3), 2, [1, 2]), ([3, 0], 2, [3, 0])]
)
@pytest.mark.parametrize(
    "dtype, cast",
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.float64, False),
    ],
)
def test_untrained_networks_return_their_start(name, residual, out, chosen, dtype, cast):
    net, x = (
        create_net(name, 4, out, base_filters=3, residual=residual).to(dtype),
        rand(0, 2, 4, 5, 1, 4, dtype=torch.float64).to(dtype),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found = net(x)
    assert found.dtype == dtype and torch.equal(found, x[:, chosen])
    found.float().square().mean().backward()
    assert sum(p.grad.abs().sum() for p in net.parameters()) > 0 and all(
        p.grad.isfinite().all() for p in net.parameters()
    )


@pytest.mark.parametrize("name", NETS)
def test_networks_keep_what_they_learn(name):
    torch.manual_seed(0)
    nets = [create_net(name, 3, base_filters=4, residual=0) for _ in range(2)]
    x = rand(0, 1, 3, 5, 4, 3, dtype=torch.float32)
    before = shaken(nets[0])(x)
    assert not torch.equal(before, x[:, :1])
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[1](x), before)


@pytest.mark.parametrize("name, margin", [("multiscale", 8), ("progressive", 14), ("frequency", 14)])
def test_tiles_agree_with_the_volume(name, margin):
    "A tile that begins at an even voxel, away from its borders."
    torch.manual_seed(0)
    net = shaken(create_net(name, 2, base_filters=3, residual=0)).double()
    x = rand(0, 1, 2, 6, 6, 47)
    a, b = 4, 4 + 2 * margin + 5
    torch.testing.assert_close(net(x[..., a:b])[..., margin:-margin], net(x)[..., a + margin : b - margin])


@pytest.mark.parametrize("name", NETS)
def test_networks_by_finite_differences(name):
    torch.manual_seed(0)
    net = shaken(create_net(name, 2, base_filters=2, residual=1)).double()
    assert gradcheck(lambda x: net(x), (rand(0, 1, 2, 3, 2, 1).requires_grad_(),))


def test_wrong_networks():
    for bad in (dict(residual=4), dict(residual=slice(0, 2)), dict(out_channels=0), dict(residual=-5)):
        with pytest.raises(InputError, match="expected"):
            create_net("multiscale", 4, **bad)
    with pytest.raises(InputError, match="multiscale, progressive, frequency"):
        create_net("wavelet", 4)
    with pytest.raises(InputError, match="expected b 4 z y x"):
        create_net("frequency", 4)(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(TypeError):
        create_net("multiscale", 4, filters=3)


@examples(15)
@given(sizes, channels, seeds)
def test_progressive_loss(size, o, seed):
    c, f, t = (rand(seed + i, 2, o, *size) for i in range(3))
    expected = F.mse_loss(f, t) + 0.3 * F.mse_loss(c, low_pass(t))
    torch.testing.assert_close(progressive_loss((c, f), t, 0.3), expected)
    m = rand(seed + 3, 2, *size) > -1.5
    m[:, 0, 0, 0] = True
    junk = torch.where(m[:, None], t, math.nan)
    torch.testing.assert_close(
        progressive_loss((c, f), junk, 0.3, m),
        progressive_loss((c, f), torch.where(m[:, None], t, 7.0), 0.3, m),
    )
    torch.testing.assert_close(progressive_loss((c, f), t, 0.0, m), masked_mse(f, t, m))
    assert (
        progressive_loss((low_pass(t), t), junk.nan_to_num(9.0), 1.0, m) < 1e-20
    )  # the smooth part is not made of what the mask hides


def test_coarse_stage_returns_what_is_smooth():
    "Its correction is made at half resolution, and the final result is the start and both corrections."
    torch.manual_seed(0)
    net = shaken(create_net("progressive", 3, base_filters=4, residual=1)).double()
    x = rand(0, 1, 3, 6, 8, 4)
    coarse, final = net.stages(x)
    correction = coarse - low_pass(x[:, 1:2])
    torch.testing.assert_close(correction, upsample_by_two(net.coarse(downsample_by_two(x)), x.shape[2:]))
    torch.testing.assert_close(final - x[:, 1:2] - correction, net.detail(torch.cat([x, coarse], 1)))
    assert torch.equal(net(x), final)


def test_each_path_sees_its_band():
    torch.manual_seed(0)
    for kind in SPLITS:
        net, x = (
            shaken(create_net("frequency", 2, base_filters=4, residual=0, cutoff=0.4, kind=kind)).double(),
            rand(0, 1, 2, 6, 8, 4),
        )
        low, high = split_bands(x, 0.4, kind)
        torch.testing.assert_close(
            net(x),
            x[:, :1]
            + net.fuse(
                torch.cat([upsample_by_two(net.low(downsample_by_two(low)), x.shape[2:]), net.high(high)], 1)
            ),
        )


# bands


@pytest.mark.parametrize("kind", SPLITS)
@examples(20)
@given(
    size=sizes,
    c=channels,
    cutoff=st.floats(0.1, 1),
    seed=seeds,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_bands_add_up(kind, size, c, cutoff, seed, dtype):
    x = rand(seed, 2, c, *size).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        low, high = split_bands(x, cutoff, kind)
    assert low.dtype == high.dtype == dtype and low.shape == high.shape == x.shape
    assert (low.double() + high.double() - x.double()).abs().max() <= 4 * torch.finfo(
        dtype
    ).eps * x.abs().max()
    const, _ = split_bands(torch.full((1, 1, *size), 3.0, dtype=torch.float64), cutoff, kind)
    torch.testing.assert_close(const, torch.full_like(const, 3))


@examples(20)
@given(sizes, st.floats(0.1, 1), seeds)
def test_fft_low_is_numpys(size, cutoff, seed):
    x = rand(seed, 1, 1, *size)
    f = np.meshgrid(*(2 * np.fft.fftfreq(n) for n in size), indexing="ij")
    r = np.sqrt(sum(v**2 for v in f)) / cutoff
    gain = np.where(r < 0.75, 1, np.where(r > 1, 0, 0.5 + 0.5 * np.cos(np.pi * (r - 0.75) / 0.25)))
    expected = np.fft.ifftn(np.fft.fftn(x[0, 0].numpy()) * gain)
    np.testing.assert_allclose(split_bands(x, cutoff, "fft")[0][0, 0].numpy(), expected.real, atol=1e-12)
    assert abs(expected.imag).max() < 1e-12


@pytest.mark.parametrize("cutoff", [0.3, 0.5, 0.8])
def test_gaussian_low_is_scipys(cutoff):
    x, sigma = rand(0, 1, 1, 9, 20, 13), math.sqrt(2 * math.log(20)) / (math.pi * cutoff)
    expected = ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode="nearest", radius=math.ceil(3 * sigma))
    np.testing.assert_allclose(split_bands(x, cutoff)[0][0, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind, limit", [("fft", 1e-12), ("gaussian", 0.01)])
@pytest.mark.parametrize("cutoff", [0.3, 0.5])
def test_little_energy_above_the_cutoff(kind, limit, cutoff):
    "Of the response to an impulse, which is that to white noise; the high band has less than half of the energy well below the cutoff."
    x = torch.zeros(1, 1, 41, 41, 41, dtype=torch.float64)
    x[..., 20, 20, 20] = 1
    r = np.sqrt(sum(v**2 for v in np.meshgrid(*[2 * np.fft.fftfreq(41)] * 3, indexing="ij")))
    low, high = (abs(np.fft.fftn(v[0, 0].numpy())) ** 2 for v in split_bands(x, cutoff, kind))
    assert low[r > cutoff].sum() < limit * low.sum()
    assert high[r < cutoff / 4].sum() < 0.1 * low[r < cutoff / 4].sum()


@pytest.mark.parametrize("kind", SPLITS)
def test_bands_do_not_lose_precision_to_autocast(kind):
    x = rand(0, 1, 2, 6, 7, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = split_bands(x, 0.5, kind)
    torch.testing.assert_close(low.double(), split_bands(x.double(), 0.5, kind)[0], atol=1e-6, rtol=0)


def test_gaussian_bands_of_a_tile():
    x = rand(0, 1, 1, 4, 5, 40)
    torch.testing.assert_close(split_bands(x[..., 8:32])[0][..., 5:-5], split_bands(x)[0][..., 13:27])


# volumes


@examples(20)
@given(st.integers(1, 9), seeds)
def test_gradient_encoding(n, seed):
    g, b = F.normalize(rand(seed, n, 3), dim=1), torch.arange(n) * 500.0
    e = gradient_encoding(b, g)
    assert e.shape == (n, 7) and e.dtype == torch.float32
    assert torch.equal(e, gradient_encoding(b.numpy(), -g.numpy())) and (e[0] == 0).all()
    torch.testing.assert_close((e[1:, 1:] @ e[1:, 1:].T).double(), (g[1:] @ g[1:].T) ** 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(e[:, 0], (b / max(1.0, 500.0 * (n - 1))).float())
    torch.testing.assert_close(gradient_encoding(b, g, bmax=1000)[:, 0], b / 1000)
    blank = torch.where(b[:, None] > 50, g, math.nan)
    assert torch.equal(gradient_encoding(b, blank), e)


def test_directions_that_are_none():
    for b, g in (
        (torch.ones(4) * 1000, torch.zeros(4, 3)),
        (torch.ones(4), torch.zeros(3, 4)),
        (torch.ones(3, 1), torch.zeros(3, 3)),
        (torch.zeros(0), torch.zeros(0, 3)),
        (torch.ones(2) * 1000, torch.full((2, 3), math.nan)),
    ):
        with pytest.raises(InputError, match="expected"):
            gradient_encoding(b, g)


@examples(15)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=6, unique=True), channels, sizes, seeds)
def test_index_embedding_goes_with_the_volume(ids, c, size, seed):
    torch.manual_seed(seed)
    encoder, x = SinusoidalVolumeEncoder(c, 9), rand(seed, 2, len(ids), c, *size, dtype=torch.float32)
    order = np.random.default_rng(seed).permutation(len(ids)).tolist()
    found = encoder(x, ids)
    torch.testing.assert_close(encoder(x[:, order], [ids[i] for i in order]), found[:, order])
    torch.testing.assert_close(encoder(x[0], ids), found[0])
    codes = sinusoids(torch.tensor(ids), 8)
    assert codes.abs().max() <= 1 and len(codes.mul(1e4).round().unique(dim=0)) == len(ids)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_sinusoids(dim):
    expected = [
        [(math.sin, math.cos)[k % 2](i / 1e4 ** ((k - k % 2) / dim)) for k in range(dim)] for i in (0, 3, 117)
    ]
    torch.testing.assert_close(
        sinusoids(torch.tensor([0, 3, 117]), dim), torch.tensor(expected), atol=1e-5, rtol=0
    )


def test_index_embedding_refuses_what_would_broadcast():
    encoder = SinusoidalVolumeEncoder(3)
    for shape, ids in (((1, 3, 2, 2, 2), [0, 1]), ((2, 1, 2, 2, 2), [0, 1]), ((2, 3, 2, 2), [0, 1])):
        with pytest.raises(InputError, match="expected b and b 3 z y x"):
            encoder(torch.zeros(shape), ids)


@examples(15)
@given(st.integers(1, 6), sizes, st.integers(1, 3), seeds)
def test_own_filters_go_with_the_volume(n, size, o, seed):
    torch.manual_seed(seed)
    net, x = shaken(VolumeSpecificDetailEncoder(6, o)).double(), rand(seed, 2, 6, *size)
    rng = np.random.default_rng(seed)
    ids, order = rng.permutation(6)[:n], rng.permutation(n)
    found = net(x[:, ids], ids)
    assert found.shape == (2, o, *size)
    torch.testing.assert_close(net(x[:, ids][:, order], ids[order]), found)
    torch.testing.assert_close(net(x), net(x, range(6)))
    bias = net.detail.fuse.bias.view(1, o, 1, 1, 1)
    torch.testing.assert_close(sum(net(x[:, [i]], [i]) - bias for i in range(6)) + bias, net(x))


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 6], [-1, 1, 2], [0.0, 1.0, 2.0], [[0, 1, 2]], None])
def test_indices_that_are_none(ids):
    with pytest.raises(InputError, match="expected 3 indices of 0 to 5"):
        VolumeSpecificDetailEncoder(6)(torch.zeros(1, 3, 2, 2, 2), ids)


@examples(15)
@given(st.integers(2, 6), sizes, st.integers(1, 3), seeds)
def test_conditioned_filters_in_any_order(n, size, o, seed):
    torch.manual_seed(seed)
    net, x = shaken(VolumeSpecificDetailEncoder(None, o)).double(), rand(seed, 2, n, *size)
    g, b = F.normalize(rand(seed + 1, n, 3), dim=1), 1000.0 * torch.arange(1, n + 1)
    order, e = np.random.default_rng(seed).permutation(n), gradient_encoding(b, g)
    found = net(x, e)
    assert found.shape == (2, o, *size)
    torch.testing.assert_close(net(x[:, order], e[order]), found)
    torch.testing.assert_close(net(x, gradient_encoding(b, -g)), found)
    assert (net(x, e.flip(0)) - found).abs().max() > 1e-6
    two = torch.stack([e, e.flip(0)])
    torch.testing.assert_close(net(x, two)[1], net(x, e.flip(0))[1])


@pytest.mark.parametrize(
    "net, which",
    [
        (VolumeSpecificDetailEncoder(4), None),
        (VolumeSpecificDetailEncoder(), torch.rand(4, 7)),
        (GatedBlock(4), ()),
        (CBAM3d(4), ()),
        (CBAM3d(4, window=3), ()),
        (SinusoidalVolumeEncoder(4), [3]),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("cast", [True, False])
def test_parts_in_half_precision(net, which, cast):
    x = rand(0, 1, 4, 5, 1, 3, dtype=torch.float32)
    if not cast:
        net, x = net.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out = net(x) if which == () else net(x, which)
    out.float().sum().backward()
    assert out.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    net.float()

"3D U-Nets on features: any size, half precision, learning, and weights that come back."

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, strategies as st

from dinolab.core.errors import InputError
from dinolab.train.losses import make_loss
from dinolab.models.unet3d import (
    DINOv3UNet3D,
    ContextEncoder,
    UNet3D,
    VoxelLinear,
    feature_bytes,
    pool_strides,
    standardise,
    target_size,
)
from dinolab.models.upsample import record_voxels, resize

PLANES = dict(xy=(8, 2, 2), xz=(2, 8, 2), yz=(2, 2, 8))


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planes(seed=0, batch=1, channels=6):
    return {p: rand(seed + i, batch, channels, *s) for i, (p, s) in enumerate(PLANES.items())}


def net(classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return DINOv3UNet3D(
        6,
        classes,
        (8, 8, 8),
        **dict(learn_upsampling=True, dinov3_feature_size=PLANES, base_channels=4, levels=2, guide_channels=1)
        | options,
    )


def inputs(model, seed=0, batch=1):
    "Features and guide that a model takes."
    return dict(features=planes(seed, batch), guide=torch.sigmoid(rand(seed + 9, batch, 1, 8, 8, 8)))


@examples(20)
@given(
    st.tuples(*[st.integers(2, 13)] * 3),
    st.integers(2, 4),
    st.sampled_from(["instance", "group", "batch"]),
    st.booleans(),
)
def test_unet_of_any_size(size, levels, norm, training):
    model = UNet3D(2, levels, norm=norm, size=size).train(training)
    with record_voxels(model) as found:
        maps = model(rand(0, 2, 2, *size))
    assert len(maps) == levels - 1 and maps[0].shape == (2, 2, *size) and found["voxels"] == math.prod(size)
    n = size
    for i, (m, step) in enumerate(zip(maps, pool_strides(size, levels))):
        assert m.shape[1] == model.widths[i] and tuple(m.shape[2:]) == n and torch.isfinite(m).all()
        n = tuple(-(-a // k) for a, k in zip(n, step))
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


@examples(100)
@given(st.tuples(*[st.integers(1, 300)] * 3))
def test_halving_makes_sizes_alike_and_never_grows_anisotropy(size):
    k = pool_strides(size, 2)[0]
    after = tuple(-(-n // a) for n, a in zip(size, k))
    assert all(a in (1, 2) for a in k) and all(a == 1 for n, a in zip(size, k) if n < 4)
    if max(size) >= 4:
        assert k[size.index(max(size))] == 2 and max(after) < max(size)


@examples(12)
@given(
    st.tuples(*[st.integers(1, 2)] * 3),
    st.sampled_from(["transpose", "interpolate", "joint_bilateral", "neighborhood"]),
    st.integers(1, 2),
    st.integers(1, 3),
)
def test_networks_of_any_size(scale, upsampler, batch, classes):
    model = net(classes, upsampler=upsampler).eval().requires_grad_(False)
    size = tuple(8 * k for k in scale)
    features = {p: rand(0, batch, 6, *(n * k for n, k in zip(s, scale))) for p, s in PLANES.items()}
    guide = torch.rand(batch, 1, *size)
    with record_voxels(model) as found:
        out = model(features, guide)
    assert (
        out.shape == (batch, classes, *size)
        and torch.isfinite(out).all()
        and found["voxels"] == math.prod(size)
    )
    assert target_size(features, model.sizes, model.input_size) == size
    if batch == 2:
        torch.testing.assert_close(
            model({p: f[1:] for p, f in features.items()}, guide[1:]), out[1:], atol=1e-4, rtol=1e-4
        )
    odd = tuple(n - 1 for n in size)
    assert model(features, torch.rand(batch, 1, *odd), size=odd).shape == (batch, classes, *odd)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(upsampler="neighborhood"),
        dict(upsampler="joint_bilateral", raw_channels=1),
        dict(norm="group", deep_supervision=True),
    ],
)  # PyTorch 2.15 returns NaN gradients of bf16 convolutions on 2x2x2 voxels, one in sixty
def test_half_precision_is_close_and_learns(options):
    model = net(**options)
    given = inputs(model)
    with torch.no_grad():
        expected = model.eval()(**given)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(**given)
    assert (got.float() - expected).abs().max() < 0.1 * expected.std() + 0.03 and got.shape == expected.shape
    y = torch.randint(0, 3, (1, 8, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = make_loss()(model.train()(**given), y)
    loss.backward()
    assert loss.dtype == torch.float32 and all(
        torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("classes", [2, 4, 16])
def test_the_first_loss_is_that_of_a_guess(classes):
    y = torch.randint(0, classes, (2, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for seed in range(5):
        model = net(classes, seed)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(**inputs(model, batch=2)), y).item())
    assert abs(sum(losses) / 5 - math.log(classes)) < 0.35


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(upsampler="joint_bilateral"),
        dict(deep_supervision=True, levels=3),
        dict(gradient_checkpointing=True, upsampler="neighborhood"),
    ],
)
def test_one_volume_is_learnt_by_heart(options):
    model = net(**options)
    z, y, x = torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")
    target = ((z > 3).long() + ((x + y) > 9).long())[None]
    features = {
        p: resize(
            torch.cat([F.one_hot(target, 3).movedim(-1, 1).float(), 0.3 * rand(1, 1, 3, 8, 8, 8)], 1), s
        )
        for p, s in PLANES.items()
    }
    guide = target[:, None] / 2.0
    optimizer, loss = torch.optim.Adam(model.parameters(), 0.02), make_loss("ce+dice")
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        out = loss(model(features, guide), target)
        out.backward()
        optimizer.step()
        values.append(out.item())
    assert values[-1] < 0.35 * values[0]
    assert (model.eval()(features, guide).argmax(1) == target).float().mean() > 0.95


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        model = net(gradient_checkpointing=on, upsampler="neighborhood")
        model(**inputs(model)).square().sum().backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for k in grads[0]:
        torch.testing.assert_close(grads[1][k], grads[0][k], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(upsampler="neighborhood", deep_supervision=True, levels=3),
        dict(norm="batch", raw_channels=1, dropout=0.2),
    ],
)
def test_weights_and_config_make_the_same_network(options, tmp_path):
    model = net(**options)
    given = inputs(model, batch=2)
    model(**given)  # moves running means
    torch.save(dict(config=model.config, state=model.state_dict()), tmp_path / "m.pt")
    kept = torch.load(tmp_path / "m.pt", weights_only=True)
    other = DINOv3UNet3D.from_config(kept["config"])
    assert other.config == model.config and other.state_dict().keys() == kept["state"].keys()
    other.load_state_dict(kept["state"])
    with torch.no_grad():
        assert torch.equal(other.eval()(**given), model.eval()(**given))


def test_standardising_into_the_projection_is_standardising_the_features():
    for model in (net(), VoxelLinear(6, 3, (8, 8, 8), PLANES)):
        model.eval().requires_grad_(False)
        raw = {p: 5 * f + 3 for p, f in planes(3).items()}
        mean, std = (
            {p: f(x) for p, x in raw.items()}
            for f in (lambda x: x.mean((0, 2, 3, 4)), lambda x: x.std((0, 2, 3, 4)))
        )
        per = lambda v: v.view(1, -1, 1, 1, 1)
        expected = model(
            {p: (x - per(mean[p])) / per(std[p]) for p, x in raw.items()}, torch.ones(1, 1, 8, 8, 8)
        )
        standardise(model, mean, std)
        torch.testing.assert_close(model(raw, torch.ones(1, 1, 8, 8, 8)), expected, atol=1e-4, rtol=1e-4)


def test_a_linear_probe_is_linear_and_the_mean_over_planes():
    model = VoxelLinear(6, 3, (8, 8, 8), PLANES).requires_grad_(False)
    a, b = planes(0), planes(7)
    zero = {p: torch.zeros_like(f) for p, f in a.items()}
    both = {p: 2 * a[p] - b[p] for p in a}
    torch.testing.assert_close(
        model(both) - model(zero),
        2 * (model(a) - model(zero)) - (model(b) - model(zero)),
        atol=1e-4,
        rtol=1e-4,
    )
    expected = (
        sum(
            F.interpolate(
                F.conv3d(a[p], model.project[p].weight, model.project[p].bias), (8, 8, 8), mode="trilinear"
            )
            for p in a
        )
        / 3
    )
    torch.testing.assert_close(model(a), expected)


def test_context_is_the_middle_of_the_view():
    "What the crop covers, and not a corner: far from the middle nothing of the view matters."
    torch.manual_seed(0)
    encoder = ContextEncoder(1, 2, 4, (64, 64, 64), "batch").eval()
    view = rand(0, 1, 1, 64, 64, 64)
    corners, middle = view.clone(), view.clone()
    for place in itertools.product((slice(0, 2), slice(62, 64)), repeat=3):
        corners[(..., *place)] = 9
    middle[..., 31:33, 31:33, 31:33] = 9
    with torch.no_grad():
        out, far, near = (encoder(x) for x in (view, corners, middle))
    assert out.shape == (1, 2, 8, 8, 8)
    assert torch.equal(far, out) and not torch.allclose(near, out)


def test_errors_and_memory():
    model = net(upsampler="neighborhood")
    with pytest.raises(InputError, match="raw volume"):
        model(planes())
    with pytest.raises(InputError, match="expected xy, xz, yz"):
        model({"xy": planes()["xy"]}, torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(InputError, match="one per plane"):
        model(planes()["xy"])
    with pytest.raises(InputError, match="ratios"):
        model({p: f[:, :, :1] if p == "xy" else f for p, f in planes().items()}, torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(InputError, match="b 6 z y x"):
        model(planes(channels=5), torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(InputError, match="levels"):
        UNet3D(4, 1)
    assert feature_bytes(6, PLANES) == sum(f.half().nbytes for f in planes().values())

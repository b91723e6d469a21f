"UNet3+ against a plain formulation of the paper, its orders of computation, and what networks must keep."

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given, strategies as st

from dinolab.models.backbones import FeatureSpec
from dinolab.core.errors import InputError, MissingError
from dinolab.models.heads import create_segmentation_model
from dinolab.models.unet3plus import UNet3Plus
from dinolab.models.fullscale import (
    FullDecoder,
    GuidedLogits,
    gate_logits,
    multiplications,
    presence_loss,
    set_paper_order,
    shifted_matrices,
    upsampled_conv,
)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@examples(60)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from((2, 3, 4, 8, 16)),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 2**31),
)
def test_fast_order_is_exact(h, w, ratio, cut_y, cut_x, seed):
    "Borders, cells that are partly in the image, and gradients, in double precision."
    torch.manual_seed(seed)
    x, weight, bias = rand(2, 3, h, w), rand(4, 3, 3, 3), rand(4)
    cover = (h * ratio, w * ratio)
    size = (cover[0] - cut_y % ratio, cover[1] - cut_x % ratio)
    plain = F.conv2d(
        F.interpolate(x, size=cover, mode="bilinear", align_corners=False)[..., : size[0], : size[1]],
        weight,
        bias,
        padding=1,
    )
    fast = upsampled_conv(x, weight, bias, size, cover)
    assert (plain - fast).abs().max() < 1e-11
    g = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(plain, (x, weight, bias), g), torch.autograd.grad(fast, (x, weight, bias), g)
    ):
        assert (a - b).abs().max() < 1e-9


def test_matrices_made_in_inference_mode_can_be_trained_with():
    shifted_matrices.cache_clear()
    x, weight, bias = rand(1, 2, 3, 3), rand(2, 2, 3, 3), rand(2)
    with torch.inference_mode():
        upsampled_conv(x.detach(), weight.detach(), bias.detach(), (6, 6))
    upsampled_conv(x, weight, bias, (6, 6)).sum().backward()


def test_the_cheaper_order_is_chosen():
    small, large = (
        multiplications(320, 64, (64, 64), (128, 128)),
        multiplications(320, 64, (2048, 2048), (4096, 4096)),
    )
    assert small[1] < small[0] and large[0] < large[1]


def paper_decoder(decoder, maps):
    "Equation 1 of the paper, written out for five levels, each convolution at the resolution of its node."

    def cbr(branch, x):
        x = F.conv2d(x, branch.conv.weight, branch.conv.bias, padding=1)
        return F.relu(
            F.batch_norm(x, None, None, branch.norm.weight, branch.norm.bias, True, 0.0, branch.norm.eps)
        )

    e1, e2, e3, e4, e5 = maps
    down = lambda x, n: F.max_pool2d(x, n, n, ceil_mode=True)
    up = lambda x, n: F.interpolate(x, scale_factor=n, mode="bilinear", align_corners=False)
    b, d5 = decoder.branches, e5
    d4 = cbr(
        decoder.fuse[3],
        torch.cat(
            [
                cbr(b[3][0], down(e1, 8)),
                cbr(b[3][1], down(e2, 4)),
                cbr(b[3][2], down(e3, 2)),
                cbr(b[3][3], e4),
                cbr(b[3][4], up(d5, 2)),
            ],
            1,
        ),
    )
    d3 = cbr(
        decoder.fuse[2],
        torch.cat(
            [
                cbr(b[2][0], down(e1, 4)),
                cbr(b[2][1], down(e2, 2)),
                cbr(b[2][2], e3),
                cbr(b[2][3], up(d4, 2)),
                cbr(b[2][4], up(d5, 4)),
            ],
            1,
        ),
    )
    d2 = cbr(
        decoder.fuse[1],
        torch.cat(
            [
                cbr(b[1][0], down(e1, 2)),
                cbr(b[1][1], e2),
                cbr(b[1][2], up(d3, 2)),
                cbr(b[1][3], up(d4, 4)),
                cbr(b[1][4], up(d5, 8)),
            ],
            1,
        ),
    )
    d1 = cbr(
        decoder.fuse[0],
        torch.cat(
            [
                cbr(b[0][0], e1),
                cbr(b[0][1], up(d2, 2)),
                cbr(b[0][2], up(d3, 4)),
                cbr(b[0][3], up(d4, 8)),
                cbr(b[0][4], up(d5, 16)),
            ],
            1,
        ),
    )
    return [d1, d2, d3, d4, d5]


@pytest.mark.parametrize(
    "cat_channels, widths, dtype",
    [(64, (64, 128, 256, 512, 1024), torch.float32), (6, (3, 5, 8, 7, 9), torch.float64)],
)
def test_decoder_is_that_of_the_paper(cat_channels, widths, dtype):
    torch.manual_seed(0)
    decoder = FullDecoder(FeatureSpec(widths, (1, 2, 4, 8, 16)), cat_channels).to(dtype).train()
    maps = [torch.randn(2, c, 64 // s, 32 // s, dtype=dtype) for c, s in zip(widths, (1, 2, 4, 8, 16))]
    with torch.no_grad():
        ours, plain, theirs = (
            decoder(maps),
            set_paper_order(copy.deepcopy(decoder))(maps),
            paper_decoder(decoder, maps),
        )
    for a, b, c in zip(ours, plain, theirs):
        assert (b - c).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12) * c.abs().max()
        assert (a - c).abs().max() < (2e-5 if dtype == torch.float32 else 1e-11) * c.abs().max()
    if widths[0] == 64:
        assert (
            round(sum(p.numel() for p in decoder.parameters()) / 1e6, 2) == 8.12
        )  # 26.97 M of the paper without its encoder of 18.85 M


@pytest.mark.parametrize("decoder", ["full", "simple"])
def test_orders_agree_in_training_of_a_whole_network(decoder):
    torch.manual_seed(0)
    net = UNet3Plus("resnet18", 3, cat_channels=6, decoder=decoder, deep_supervision=True).double()
    image = torch.rand(2, 3, 75, 101, dtype=torch.float64)

    def outputs(paper):
        model = set_paper_order(copy.deepcopy(net), paper)
        out = model(image)
        sum((o**2).mean() for o in out).backward()
        return out, {n: p.grad for n, p in model.named_parameters()}

    (a, ga), (b, gb) = outputs(False), outputs(True)
    for x, y in zip(a, b):
        assert x.shape == (2, 3, 75, 101) and (x - y).abs().max() < 1e-9
    for name in ga:
        assert (ga[name] - gb[name]).abs().max() < 1e-7, name


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "efficientnet_lite0", "hrnet_w18_small"])
@pytest.mark.parametrize("size", [(64, 96), (33, 70), (16, 16)])
def test_any_backbone_any_size(name, size):
    net = UNet3Plus(name, 4, cat_channels=4, deep_supervision=True, cgm=True)
    out = net(torch.rand(2, 3, *size))
    assert (
        isinstance(out, GuidedLogits)
        and [tuple(o.shape) for o in out.logits] == [(2, 4, *size)] * len(net.spec)
        and out.presence.shape == (2, 3)
    )
    with torch.no_grad():
        assert net.eval()(torch.rand(1, 3, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("decoder", ["full", "simple"])
def test_side_outputs_come_finest_first(decoder):
    "Each node made to say its number: the first is what evaluation gives, the last that of the coarsest map."
    net = UNet3Plus("resnet18", 2, cat_channels=4, deep_supervision=True, decoder=decoder)
    for i, conv in enumerate(net.head.classify):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.constant_(conv.bias, i)
    with torch.no_grad():
        said = [logits.unique().tolist() for logits in net(torch.rand(2, 3, 64, 96))]
        assert said == [[i] for i in range(len(net.spec))]
        assert net.eval()(torch.rand(1, 3, 64, 96)).unique().tolist() == [0]


def test_hrnet_gives_its_branches():
    net = UNet3Plus("hrnet_w18_small", 2, cat_channels=4)
    theirs = timm.create_model("hrnet_w18_small", features_only=True, feature_location="").eval()
    theirs.load_state_dict(net.backbone.model.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, maps = (
            net.eval().backbone(image),
            theirs(
                (image - torch.tensor(net.backbone.mean).view(-1, 1, 1))
                / torch.tensor(net.backbone.std).view(-1, 1, 1)
            ),
        )
    assert net.spec.strides == (2, 4, 8, 16, 32) and net.spec.channels == (64, 16, 32, 64, 128)
    for a, b in zip(ours, maps):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_side_outputs_cover_what_their_cells_cover():
    "A ramp in a coarse map comes out at its place although the image is no multiple of the stride."
    net = UNet3Plus("resnet18", 1, cat_channels=4, deep_supervision=True)
    with torch.no_grad():
        for f in net.head.classify:
            f.weight.zero_()
            f.bias.fill_(2.0)
        assert all((o == 2).all() for o in net(torch.rand(2, 3, 70, 45)))
    from dinolab.models.heads import fit_logits
    from dinolab.models.sizes import covered_size

    ramp = (torch.arange(3.0) * 32 + 15.5)[None, None, None].expand(
        1, 1, 3, 3
    )  # pixel positions of the middles of cells of stride 32
    assert (
        fit_logits(ramp, covered_size((3, 3), 32), (70, 70))[0, 0, 0, 16:70] - torch.arange(16.0, 70)
    ).abs().max() < 1e-4


def test_gate_and_presence():
    logits = torch.randn(2, 3, 4, 4)
    sure, absent = torch.full((2, 2), 50.0), torch.full((2, 2), -50.0)
    assert torch.allclose(gate_logits(logits, sure), logits)
    assert (gate_logits(logits, absent).argmax(1) == 0).all() and torch.equal(
        gate_logits(logits, absent)[:, 0], logits[:, 0]
    )
    target = torch.tensor([[[0, 1], [2, 0]], [[0, 0], [2, 2]]])
    p = torch.tensor([[0.3, -0.2], [1.0, 2.0]])
    wanted = F.binary_cross_entropy_with_logits(p, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert torch.allclose(presence_loss(p, target), wanted)
    hidden = presence_loss(p, target, target != 1)
    assert torch.allclose(
        hidden, F.binary_cross_entropy_with_logits(p, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    )
    p.requires_grad_()
    assert not gate_logits(logits, p).requires_grad  # no gradient flows through the gate


def test_frozen_backbone_keeps_its_statistics_and_gets_no_gradient():
    net = UNet3Plus("resnet18", 2, cat_channels=4, freeze_backbone=True).train()
    before = copy.deepcopy(net.backbone.state_dict())
    net(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.backbone.state_dict().items())
    assert all(p.grad is None for p in net.backbone.parameters()) and all(
        p.grad is not None for p in net.head.parameters()
    )


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(backbone="convnext_tinny"), "convnext_tiny"),
        (dict(backbone="vit_tiny_patch16_224"), "strides 16"),
        (dict(num_classes=0), "num_classes"),
        (dict(decoder="half"), "full"),
        (dict(cat_channels=0), "cat_channels"),
        (dict(weights="nowhere.pth"), "nowhere.pth"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises((InputError, MissingError), match=error) as e:
        UNet3Plus(**dict(backbone="resnet18") | arguments)
    assert "\n" not in str(e.value)


def test_offline_weights_say_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="timm/resnet34.a1_in1k"):
        UNet3Plus("resnet34", weights="pretrained")


@pytest.mark.parametrize("stem", [0, 4])
@pytest.mark.parametrize("decoder", ["full", "simple"])
@pytest.mark.parametrize("backbone", ["resnet10t", "convnext_atto"])
def test_the_head_by_name_is_the_same_network(backbone, decoder, stem):
    "The same names and, with the same weights, the same numbers: in training all outputs, and an odd size."
    options = dict(num_classes=3, decoder=decoder, stem=stem, deep_supervision=True, cgm=True)
    ours = UNet3Plus(backbone, cat_channels=4, **options).train()
    by_name = create_segmentation_model(backbone, head="unet3plus", hidden_size=4, norm="batch", **options)
    by_name.load_state_dict(ours.state_dict())
    by_name.to(memory_format=torch.channels_last).train()
    image = torch.rand(2, 3, 45, 70)
    torch.manual_seed(0)
    expected = ours(image)
    torch.manual_seed(0)
    found = by_name(image)
    assert len(found.logits) == len(ours.spec) and torch.equal(found.presence, expected.presence)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits))


@pytest.mark.parametrize("stem", [0, 4])
@pytest.mark.parametrize("decoder", ["full", "simple"])
@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_a_pyramid_of_a_vit(backbone, decoder, stem):
    "Every parameter gets a gradient, at a size that is no multiple of the patch."
    options = dict(head="unet3plus", hidden_size=4, decoder=decoder, deep_supervision=True)
    if stem and backbone.endswith("dinov2"):
        with pytest.raises(InputError, match="strides 1, 3.5"):
            create_segmentation_model(backbone, stem=stem, **options)
        return
    net = create_segmentation_model(backbone, stem=stem, freeze_backbone=True, **options).train()
    found = net(torch.rand(2, 3, 45, 70))
    assert {f.shape for f in found} == {(2, 1, 45, 70)} and len(found) == 4 + bool(stem)
    sum(f.square().mean() for f in found).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_options_of_another_head_are_refused():
    with pytest.raises(InputError, match="upernet head has no cgm"):
        create_segmentation_model("resnet10t", cgm=True)
    with pytest.raises(InputError, match="unet3plus head has no pool_scales"):
        create_segmentation_model("resnet10t", head="unet3plus", pool_scales=(1, 2))
    with pytest.raises(InputError, match="stem adds a level"):
        create_segmentation_model("resnet10t", head="unet3plus", upsampler="transpose")


def test_a_network_can_be_exported():
    "The graph has the plain order, whose operations any runtime knows, and the same numbers at other sizes."
    net = UNet3Plus("resnet10t", 3, cat_channels=4).eval()
    h, w = (torch.export.Dim(name, min=1, max=64) for name in ("rows", "columns"))
    sizes = ({0: torch.export.Dim("batch"), 2: 32 * h, 3: 32 * w},)
    graph = torch.export.export(net, (torch.rand(2, 3, 64, 96),), dynamic_shapes=sizes, strict=False).module()
    for shape in ((2, 3, 64, 96), (3, 3, 96, 128)):
        image = torch.rand(*shape)
        with torch.no_grad():
            assert torch.allclose(graph(image), net(image), atol=1e-5)

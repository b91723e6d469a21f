"Heads against transformers, adapters against dead ones, any size, and what stays frozen."

import copy
import itertools

import pytest
import torch
from examples import examples
from hypothesis import given, strategies as st
from torch import nn
from transformers import DPTConfig, SegformerConfig, UperNetConfig
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead
from transformers.models.upernet.modeling_upernet import UperNetHead

from dinolab.models.lora import add_lora, lora_layers, merge, silent_layers
from dinolab.models.specs import LoraSpec
from dinolab.models.backbones import FeatureSpec, create_backbone, layer_scales
from dinolab.core.errors import InputError
from dinolab.models.heads import HEADS, FeaturePyramid, Segmenter, create_head, create_segmentation_model
from dinolab.models.neighborhood import NeighborhoodFilter
from dinolab.models.unet3d import DINOv3UNet3D, VoxelLinear
from dinolab.models.unet3plus import UNet3Plus
from dinolab.models.upsample import JointBilateral, Transpose, create_upsampler
from dinolab.models.weights import load_weights, save_weights

PYRAMID, FLAT = FeatureSpec((8, 16, 32, 32), (4, 8, 16, 32)), FeatureSpec((32,) * 4, (16,) * 4)
VIT = "vit_tiny_patch16_224"


def rand(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def maps(spec, h=64, w=96, batch=2):
    return [rand(i, batch, c, *s) for i, (c, s) in enumerate(zip(spec.channels, spec.sizes(h, w)))]


def model(backbone=VIT, **options):
    torch.manual_seed(0)
    small = {} if options.get("head") == "linear" else dict(hidden_size=16)
    if options.get("head") == "mask":
        small |= dict(queries=4, decoder_layers=2)
    return create_segmentation_model(backbone, **small | options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", [PYRAMID, FLAT])
def test_upernet_is_that_of_transformers(spec, training):
    ours = create_head("upernet", spec, 3, hidden_size=16, norm="batch").train(training)
    theirs = UperNetHead(
        UperNetConfig(num_labels=3, hidden_size=16, pool_scales=[1, 2, 3, 6], use_auxiliary_head=False),
        list(spec.channels),
    ).train(training)
    theirs.load_state_dict(ours.decoder.state_dict())
    assert torch.equal(ours(maps(spec)), theirs(maps(spec)))


@pytest.mark.parametrize("spec", [PYRAMID, FLAT])
def test_segformer_is_that_of_transformers(spec):
    ours = create_head("segformer", spec, 3, hidden_size=16, norm="batch", dropout=0.0).train()
    theirs = SegformerDecodeHead(
        SegformerConfig(
            num_labels=3,
            hidden_sizes=list(spec.channels),
            decoder_hidden_size=16,
            classifier_dropout_prob=0.0,
        )
    ).train()
    theirs.load_state_dict(ours.decoder.state_dict())
    assert torch.equal(ours(maps(spec)), theirs(maps(spec)))


def test_dpt_is_that_of_transformers():
    ours = create_head("dpt", FLAT, 3, hidden_size=16, norm="batch", dropout=0.0).eval()
    config = DPTConfig(
        hidden_size=32,
        num_labels=3,
        readout_type="ignore",
        neck_hidden_sizes=[4, 8, 16, 32],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=16,
        semantic_classifier_dropout=0.0,
    )
    neck, head = DPTNeck(config).eval(), DPTSemanticSegmentationHead(config).eval()
    left = neck.load_state_dict(ours.neck.state_dict(), strict=False)
    assert all("layers.0.residual_layer1" in k for k in left.missing_keys) and not left.unexpected_keys
    head.load_state_dict(ours.decoder.state_dict())
    tokens = [
        torch.cat([rand(9, 2, 1, 32), m.flatten(2).mT], 1) for m in maps(FLAT)
    ]  # what the class token is has no effect
    assert torch.equal(ours(maps(FLAT)), head(neck(tokens, 4, 6)))


@examples(25)
@given(
    st.sampled_from(list(HEADS)),
    st.sampled_from(["auto", "none"]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([0, 4]),
)
def test_any_size_of_image(head, neck, h, w, stem):
    neck = "auto" if head == "unet3plus" else neck
    stem = 0 if head == "mask" else stem
    net = test_any_size_of_image.nets.setdefault(
        (head, neck, stem), model(head=head, neck=neck, stem=stem, num_classes=2).eval()
    )
    with torch.no_grad():
        assert net(rand(0, 1, 3, h, w)).shape == (1, 2, h, w)


test_any_size_of_image.nets = {}


@pytest.mark.parametrize(
    "name,channels",
    [
        ("vit_small_patch14_dinov2", 4),
        ("convnext_atto", 1),
        ("resnet18", 2),
        ("hrnet_w18_small", 3),
        ("efficientnet_b0", 3),
        ("vit_small_patch16_dinov3", 5),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_backbones_of_every_kind(name, channels, head):
    net = model(name, head=head, in_channels=channels, freeze_backbone=True).train()
    out = net(rand(0, 1, channels, 45, 70))
    if head == "mask":
        loss = out.loss(torch.ones(1, 45, 70, dtype=torch.long))
    else:
        assert out.shape == (1, 1, 45, 70)
        loss = out.square().mean()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("patch,name", [(14, "vit_small_patch14_dinov2"), (16, VIT)])
def test_logits_do_not_shift(patch, name):
    "Each cell says where its middle is; at every pixel between middles the logits say where the pixel is."

    class Where(nn.Module):
        def forward(self, maps):
            h, w = maps[0].shape[2:]
            return torch.stack(
                [
                    ((torch.arange(h) + 0.5) * patch)[:, None].expand(h, w),
                    ((torch.arange(w) + 0.5) * patch).expand(h, w),
                ]
            )[None]

    out = Segmenter(create_backbone(name), Where())(rand(0, 1, 3, 61, 87))[0]
    inside = slice(patch // 2, 3 * patch)
    assert torch.allclose(out[0, inside, 0], torch.arange(61)[inside] + 0.5, atol=1e-3) and torch.allclose(
        out[1, 0, inside], torch.arange(87)[inside] + 0.5, atol=1e-3
    )


def leave_traces(net):
    "Random networks whose blocks matter: layer scales of 1, biases that are not 0."
    with torch.no_grad():
        for key, p in net.named_parameters():
            if "gamma" in key:
                p.fill_(1.0)
            elif key.endswith("bias"):
                p.normal_(0, 0.1)
    return net


def shake(net):
    with torch.no_grad():
        for key, p in net.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.1)
    return net


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3_qkvb",
        "vit_small_patch16_dinov3",
        "vit_small_plus_patch16_dinov3",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        VIT,
        "eva02_tiny_patch14_224",
    ],
)
def test_adapters_act_and_merge(name):
    torch.manual_seed(0)
    net = leave_traces(create_backbone(name, layers=[1])).eval()
    image = rand(0, 1, 3, 56, 64)
    with torch.no_grad():
        plain = net(image)[0]
    add_lora(net, LoraSpec(rank=4, dropout=0.0))
    with torch.no_grad():
        assert torch.allclose(net(image)[0], plain, atol=1e-5)
    shake(net).train()(image)[0].square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for k, p in net.named_parameters() if "lora_" in k
    )
    assert not any(p.requires_grad for k, p in net.named_parameters() if "lora_" not in k)
    with torch.no_grad():
        adapted = net.eval()(image)[0]
        assert (adapted - plain).abs().max() > 1e-2
        assert torch.allclose(merge(net)(image)[0], adapted, atol=1e-5 * float(adapted.abs().max()))
    assert not lora_layers(net) and all(p.requires_grad for p in net.parameters())


def test_a_dead_adapter_is_found():
    net = create_backbone("vit_small_patch16_dinov3_qkvb", layers=[0])
    add_lora(net)
    assert not silent_layers(net)
    for m in net.modules():
        if hasattr(m, "qkv_bias_separate"):
            m.qkv_bias_separate = False
    assert silent_layers(net) == ["model.blocks.0.attn.qkv"]


def test_frozen_parts_stay_as_they_are():
    net = model("resnet18", head="upernet", freeze_backbone=True, norm="batch").train()
    before = copy.deepcopy(net.state_dict())
    net(rand(0, 2, 3, 64, 64))
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert changed and all(k.startswith("head") for k in changed)
    net = model(lora=LoraSpec(rank=2, dropout=0.5)).train()
    assert any(
        isinstance(m, nn.Dropout) and m.training for m in net.backbone.modules()
    )  # the adapters' dropout is not frozen


@pytest.mark.parametrize("head", HEADS)
def test_one_image_per_batch(head):
    out = model(head=head, norm="batch").train()(rand(0, 1, 3, 16, 16))
    assert all(torch.isfinite(x).all() for x in (out.masks if head == "mask" else [out]))


def test_the_backbone_never_runs_in_fp16():
    net, seen = model(freeze_backbone=True).eval(), []
    net.backbone.model.blocks[0].attn.qkv.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    net.head.decoder.classifier.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert torch.isfinite(net(rand(0, 1, 3, 64, 64))).all()
    assert seen == [torch.bfloat16, torch.float16]


def test_checkpoint_holds_what_was_trained(tmp_path):
    first = shake(model(lora=LoraSpec(rank=4), num_classes=3)).eval()
    save_weights(tmp_path / "a.safetensors", first)
    trained = sum(p.numel() * 4 for p in first.parameters() if p.requires_grad)
    assert (tmp_path / "a.safetensors").stat().st_size < 1.2 * trained
    second = model(lora=LoraSpec(rank=4), num_classes=3).eval()
    with torch.no_grad():
        for k, p in second.named_parameters():
            if p.requires_grad:
                p.add_(1)
        load_weights(tmp_path / "a.safetensors", second)
        assert torch.equal(first(rand(0, 1, 3, 40, 40)), second(rand(0, 1, 3, 40, 40)))
    with pytest.raises(InputError, match="of another architecture"):
        load_weights(tmp_path / "a.safetensors", model(lora=LoraSpec(rank=2), num_classes=3))


def test_lora_on_top_of_gradient_checkpointing():
    net = shake(model(lora=LoraSpec(rank=2), gradient_checkpointing=True)).train()
    net(rand(0, 1, 3, 32, 32)).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for k, p in net.named_parameters() if "lora_" in k)


def test_parameters_are_counted(capsys):
    net = model(lora=LoraSpec(rank=2))
    net.print_trainable_parameters(detailed=True)
    out = capsys.readouterr().out
    assert (
        "backbone adapters" in out
        and f"{sum(p.numel() for p in net.parameters()):,}" in out
        and f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,}" in out
    )


def test_any_layers():
    for layers, neck in itertools.product(([0, 3], [11], 3, [11, 2, 5, 5]), ("none", "pyramid")):
        assert model(layers=layers, neck=neck).eval()(rand(0, 1, 3, 32, 48)).shape == (1, 1, 32, 48)


@pytest.mark.parametrize(
    "wrong,kind,message",
    [
        (dict(backbone="visionfm", backbone_size="large"), InputError, "expected one of base"),
        (dict(backbone="dinov3", backbone_size="huge"), InputError, "expected one of small"),
        (dict(backbone="vit_tinny_patch16_224"), InputError, "did you mean"),
        (dict(head="upernt"), InputError, "did you mean 'upernet'"),
        (dict(lora_rank=4), TypeError, "has no argument 'lora_rank'"),
        (dict(lora=LoraSpec(target_modules=("query",))), InputError, "no such layer; expected some of"),
        (dict(head="linear", hidden_size=8), InputError, "the linear head has no hidden_size"),
        (dict(backbone="resnet18", neck="pyramid"), InputError, "a pyramid already"),
        (dict(head="dpt", layers=[11]), InputError, "1 maps of one stride: expected 4"),
        (dict(num_classes=True), InputError, "num_classes=True"),
    ],
)
def test_wrong_arguments(wrong, kind, message):
    with pytest.raises(kind, match=message) as e:
        create_segmentation_model(**dict(backbone=VIT) | wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("widths, taken", [((8, 12), (0, 0, 0, 1)), ((8, 12, 16, 20, 24, 28), (2, 3, 4, 5))])
def test_pyramid_takes_the_last_four_maps(widths, taken):
    "Of fewer the first several times; the third level is the map itself."
    neck = FeaturePyramid(FeatureSpec(widths, (16,) * len(widths)))
    first, second, third, fourth = (widths[i] for i in taken)
    assert neck.spec.channels == (first // 4, second // 2, third, fourth)
    given = [rand(i, 1, c, 3, 4) for i, c in enumerate(widths)]
    levels = neck(given)
    assert torch.equal(levels[2], given[taken[2]])
    assert [m.shape[1] for m in levels] == list(neck.spec.channels)


NOT_NUMBERS = (float("nan"), float("inf"), "3", True, [3, 3, 3, 3])
COUNT = (0, -1, 1.5, *NOT_NUMBERS)  # what is not a number of things
FROM_ZERO = COUNT[1:]  # nor 0 of them
POSITIVE = (0, -0.5, *NOT_NUMBERS)
PART = (-0.1, 1, *NOT_NUMBERS)
MAKERS = dict(
    backbone=lambda **k: create_backbone(VIT, **k),
    scales=lambda **k: layer_scales(None, **k),
    segmenter=lambda **k: create_segmentation_model(VIT, **k),
    linear=lambda **k: create_head("linear", FLAT, 2, **k),
    unet3plus=lambda **k: UNet3Plus("resnet18", **k),
    unet3d=lambda **k: DINOv3UNet3D(**dict(input_channels=4, num_classes=2, input_size=8) | k),
    planes=lambda **k: DINOv3UNet3D(4, 2, 8, learn_upsampling=True, **k),
    probe=lambda **k: VoxelLinear(**dict(input_channels=4, num_classes=2, input_size=8) | k),
    upsampler=lambda **k: create_upsampler("transpose", **dict(channels=4, small=(2, 2), size=(4, 4)) | k),
    transpose=lambda **k: Transpose(small=(2, 2), size=(4, 4), **k),
    bilateral=lambda **k: JointBilateral(4, **k),
    filter=lambda **k: NeighborhoodFilter(**k),
    lora=lambda **k: LoraSpec(**k),
)
WRONG = [
    ("backbone", "in_channels", (*COUNT, None)),
    ("scales", "decay", (0, 1.5, *NOT_NUMBERS)),
    ("segmenter", "num_classes", (*COUNT, None)),
    ("segmenter", "in_channels", COUNT),
    ("segmenter", "stem", FROM_ZERO),
    ("segmenter", "hidden_size", COUNT),
    ("segmenter", "pool_scales", ((), (0, 1), (1.5,), 3, "12", (float("nan"),))),
    ("linear", "dropout", PART),
    ("unet3plus", "num_classes", COUNT),
    ("unet3plus", "cat_channels", COUNT),
    ("unet3plus", "stem", FROM_ZERO),
    ("unet3plus", "in_channels", COUNT),
    ("unet3d", "input_channels", (*COUNT, None)),
    ("unet3d", "num_classes", (*COUNT, None)),
    ("unet3d", "input_size", (*COUNT, None, (8, 8), (8, 0, 8))),
    ("unet3d", "base_channels", COUNT),
    ("unet3d", "levels", (1, 9, 2.5, *NOT_NUMBERS)),
    ("unet3d", "dropout", PART),
    ("unet3d", "guide_channels", FROM_ZERO),
    ("unet3d", "raw_channels", FROM_ZERO),
    ("unet3d", "context_channels", FROM_ZERO),
    ("unet3d", "context_scale", (0, 1, *NOT_NUMBERS)),
    ("planes", "dinov3_feature_size", (*COUNT, (8, 8), dict(xy=(8, 2, 0)))),
    ("probe", "input_channels", COUNT),
    ("probe", "num_classes", COUNT),
    ("upsampler", "channels", COUNT),
    ("upsampler", "small", (0, (0, 2), (2.5, 2), (2, 2, 2))),
    ("upsampler", "size", (0, (4, -4), (4,), ("4", "4"))),
    ("transpose", "in_channels", COUNT),
    ("bilateral", "spatial", POSITIVE),
    ("bilateral", "intensity", POSITIVE),
    ("bilateral", "window", (1, 2, 4, 3.5, *NOT_NUMBERS)),
    ("bilateral", "budget", COUNT),
    ("filter", "guide_channels", COUNT),
    ("filter", "dims", (1, 4, 2.5, *NOT_NUMBERS)),
    ("filter", "dim", (3, *COUNT)),
    ("filter", "heads", (3, *COUNT)),
    ("filter", "window", (1, 4)),
    ("lora", "rank", COUNT),
    ("lora", "alpha", POSITIVE),
    ("lora", "dropout", PART),
]


@pytest.mark.parametrize("maker, setting, values", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_numbers(maker, setting, values):
    "Every numeric setting of every network: one line that names what was got, before anything is built."
    for value in values:
        with pytest.raises(InputError, match="^[^\n]*expected[^\n]*$") as e:
            MAKERS[maker](**{setting: value})
        assert setting in str(e.value) or "size" in str(e.value) or "target" in str(e.value)


def test_whole_numbers_from_yaml_are_whole():
    net = create_segmentation_model(VIT, head="upernet", num_classes=3.0, hidden_size=16.0, stem=4.0)
    assert net(rand(0, 1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert DINOv3UNet3D(4.0, 2.0, 8.0, levels=2.0).config["levels"] == 2


def test_pyramid_keeps_place():
    "A step in the maps stays at the same share of the width in every level."
    spec = FeatureSpec((8,) * 4, (16,) * 4)
    neck = FeaturePyramid(spec)
    with torch.no_grad():
        for p in neck.parameters():
            p.fill_(0.05)
    left, right = ([torch.full((1, 8, 4, 8), v) for _ in range(4)] for v in (0.0, 1.0))
    for m in left:
        m[..., 4:] = 1
    for level, (a, b) in enumerate(zip(neck(left), neck(right))):
        assert torch.equal(a[..., a.shape[3] // 2 :], b[..., b.shape[3] // 2 :]), level

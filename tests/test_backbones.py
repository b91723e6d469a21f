"Backbones against their source implementations, on awkward sizes, and with broken files."

import argparse
import json
import multiprocessing
import pickle
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dinolab.models import architectures, backbones, pretrained
from dinolab.models.architectures import FAMILIES, RESIZING, build_model
from dinolab.models.backbones import FeatureSpec, create_backbone
from dinolab.models.weights import load_weights, save_weights
from dinolab.core.errors import InputError, MissingError

TINY_VIT = "vit_tiny_patch16_224"
SIZES = [(224, 160), (96, 96)]


def random_weights(model, seed=0):
    "Random values everywhere, biases included, and LayerScale near one: with the usual 1e-5 every comparison would pass."
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        near_one = any(
            s in name for s in ("norm", "layer_scale", "gamma", "ls1", "ls2")
        ) and not name.endswith("bias")
        p.data = torch.randn(p.shape, generator=generator) * (0.1 if near_one else 0.05) + (
            1 if near_one else 0
        )
    return model.eval()


def image(height, width, channels=3, seed=0):
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(seed))


def normalised(backbone, x):
    return (x - torch.tensor(backbone.mean).view(-1, 1, 1)) / torch.tensor(backbone.std).view(-1, 1, 1)


def token_map(tokens, x, patch):
    "Patch tokens, the last of b n c, as b c h w."
    h, w = x.shape[-2] // patch, x.shape[-1] // patch
    return tokens[:, -h * w :].mT.unflatten(2, (h, w))


@torch.no_grad()
def assert_same(backbone, reference, sizes=SIZES, patch=16, tol=1e-4):
    backbone.eval()
    for height, width in sizes:
        x = image(height // patch * patch, width // patch * patch)
        ours, theirs = backbone(x)[-1], token_map(reference(normalised(backbone, x)), x, patch)
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < tol, (height, width)


# ---- transformers -------------------------------------------------------------------------------------------------


def hf_dinov3(folder=None, **kwargs):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(**(dict(num_register_tokens=4) | kwargs))
    model = random_weights(transformers.DINOv3ViTModel(config))
    if folder:
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(key_bias=True),
        dict(query_bias=False, value_bias=False),
        dict(use_gated_mlp=True, hidden_act="silu"),
    ],
)
def test_dinov3_equals_transformers(tmp_path, kwargs):
    model = hf_dinov3(tmp_path, **kwargs)
    size = "small_plus" if "use_gated_mlp" in kwargs else "small"
    backbone = create_backbone("dinov3", size, weights=tmp_path)
    assert_same(backbone, lambda x: model(x).last_hidden_state)
    assert backbone.recipe["size"] == (size if "query_bias" in kwargs else size + "_qkvb")


def test_inner_layers_equal_transformers(tmp_path):
    model = hf_dinov3(tmp_path)
    x = image(64, 96)
    for norm in (False, True):
        backbone = create_backbone("dinov3", "small", weights=tmp_path, layers=[2, 5, 8], norm=norm).eval()
        with torch.no_grad():
            hidden = model(normalised(backbone, x), output_hidden_states=True).hidden_states
            for layer, ours in zip(backbone.layers, backbone(x)):
                theirs = model.norm(hidden[layer + 1]) if norm else hidden[layer + 1]
                assert (ours - token_map(theirs, x, 16)).abs().max() < 1e-4


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_equals_transformers(tmp_path, registers):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, kind + "Config")(
        hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518
    )
    model = random_weights(getattr(transformers, kind + "Model")(config))
    model.save_pretrained(tmp_path)
    backbone = create_backbone("dinov2", "small_reg" if registers else "small", weights=tmp_path)
    assert_same(backbone, lambda x: model(x).last_hidden_state, patch=14)


def test_dinov2_giant_mlp_equals_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(
        architectures.timm,
        "create_model",
        lambda name, **kw: create(name, **kw, embed_dim=384, depth=2, num_heads=6),
    )
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=2, use_swiglu_ffn=True, image_size=224
    )
    model = random_weights(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    assert_same(
        create_backbone("dinov2", "giant", weights=tmp_path), lambda x: model(x).last_hidden_state, patch=14
    )


create = timm.create_model


# ---- the authors' files -------------------------------------------------------------------------------------------


def as_meta_dinov3(hf):
    "The state dict that Meta's code would save for this transformers model: fused qkv, masked key bias, bf16 periods."
    state = hf.state_dict()
    out = {
        "cls_token": state["embeddings.cls_token"],
        "storage_tokens": state["embeddings.register_tokens"],
        "mask_token": torch.zeros(1, 384),
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
        "local_cls_norm.weight": torch.ones(384),
        "local_cls_norm.bias": torch.ones(384),
        "rope_embed.periods": (1 / hf.rope_embeddings.inv_freq).bfloat16(),
    }
    for i, layer in enumerate(hf.model.layer):
        a = layer.attention
        names = {
            "norm1": layer.norm1,
            "norm2": layer.norm2,
            "attn.proj": a.o_proj,
            "mlp.fc1": layer.mlp.up_proj,
            "mlp.fc2": layer.mlp.down_proj,
        }
        out |= {
            f"blocks.{i}.{n}.{kind}": getattr(m, kind).data
            for n, m in names.items()
            for kind in ("weight", "bias")
        }
        out |= {
            f"blocks.{i}.ls{j}.gamma": g.lambda1.data
            for j, g in ((1, layer.layer_scale1), (2, layer.layer_scale2))
        }
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat(
            [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]
        ).data
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat(
            [a.q_proj.bias, torch.full((384,), 7.0), a.v_proj.bias]
        ).data
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat(
            [torch.ones(384), torch.zeros(384), torch.ones(384)]
        )
    return out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {
            "teacher": {f"module.backbone.{k}": v for k, v in s.items()}
            | {"module.dino_head.w": torch.ones(1)}
        },
    ],
)
def test_original_dinov3(tmp_path, wrap):
    hf = hf_dinov3()
    torch.save(wrap(as_meta_dinov3(hf)), tmp_path / "dinov3_vits16.pth")
    backbone = create_backbone("dinov3", "small", weights=str(tmp_path / "dinov3_vits16.pth"))
    hf.rope_embeddings.inv_freq.copy_(1 / (1 / hf.rope_embeddings.inv_freq).bfloat16().float())
    assert backbone.recipe["size"] == "small_qkvb"
    assert_same(backbone, lambda x: hf(x).last_hidden_state)


def test_original_dinov3_without_periods_gets_rounded_ones(tmp_path):
    state = as_meta_dinov3(hf_dinov3())
    torch.save(state, tmp_path / "with.pth")
    del state["rope_embed.periods"]
    torch.save(state, tmp_path / "without.pth")
    with_, without = (create_backbone(weights=tmp_path / f) for f in ("with.pth", "without.pth"))
    assert with_.weights_hash == without.weights_hash


def reference_vit(model, x, offset):
    "A ViT forward pass with positions resized as in the DINO code: a scale factor with an offset, no antialiasing."
    tokens = model.patch_embed.proj(x)
    h, w = tokens.shape[-2:]
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    grid = model.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    target = dict(scale_factor=((h + offset) / side, (w + offset) / side)) if offset else dict(size=(h, w))
    if (h, w) != (side, side):
        grid = F.interpolate(grid, mode="bicubic", **target)
    x = torch.cat(
        [(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), (tokens + grid).flatten(2).mT], 1
    )
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


def test_original_dinov2(tmp_path):
    model = random_weights(timm.create_model("vit_small_patch14_dinov2", num_classes=0))
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    assert_same(
        create_backbone("dinov2", weights=tmp_path / "dinov2.pth"),
        lambda x: reference_vit(model, x, 0.1),
        patch=14,
    )


def test_timm_file_equals_timm(tmp_path):
    for name in (
        "vit_small_patch14_dinov2",
        "vit_small_patch16_dinov3_qkvb",
        TINY_VIT,
        "vit_tiny_r_s16_p8_224",
    ):
        model = random_weights(create(name, num_classes=0, dynamic_img_size=True))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        backbone = create_backbone(name, weights=tmp_path)
        assert_same(backbone, model.forward_features, patch=backbone.stride)


@pytest.fixture
def small_families(monkeypatch):
    "RETFound and VisionFM with tiny models in place of 300 million parameters."
    monkeypatch.setitem(FAMILIES["retfound"], "large", TINY_VIT)
    monkeypatch.setitem(FAMILIES["retfound"], "large_dinov2", "vit_small_patch14_dinov2")
    monkeypatch.setitem(FAMILIES["visionfm"], "base", TINY_VIT)


def test_retfound_mae(tmp_path, small_families):
    model = random_weights(timm.create_model(TINY_VIT, num_classes=0))
    extra = {
        "mask_token": torch.zeros(1, 1, 192),
        "decoder_embed.weight": torch.zeros(8, 192),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
    }
    torch.save(
        dict(model=model.state_dict() | extra, optimizer={}, epoch=800, args=argparse.Namespace(lr=1e-3)),
        tmp_path / "RETFound.pth",
    )
    backbone = create_backbone("retfound", "large", weights=tmp_path / "RETFound.pth")
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert_same(backbone, lambda x: reference_vit(model, x, 0), [*SIZES, (224, 224)])


def test_retfound_dinov2_file_selects_its_architecture(tmp_path, small_families):
    model = random_weights(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224))
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    state |= {"backbone.mask_token": torch.zeros(1, 384), "dino_head.mlp.0.weight": torch.ones(2)}
    torch.save(dict(teacher=state), tmp_path / "RETFound_dinov2.pth")
    backbone = create_backbone("retfound", "large", weights=tmp_path / "RETFound_dinov2.pth")
    assert backbone.recipe["size"] == "large_dinov2" and backbone.stride == 14
    assert_same(backbone, lambda x: reference_vit(model, x, 0.1), [*SIZES, (224, 224)], patch=14)


def test_visionfm(tmp_path, small_families):
    model = random_weights(timm.create_model(TINY_VIT, num_classes=0))
    state = {f"module.backbone.{k}": v for k, v in model.state_dict().items()}
    state |= {"module.backbone.masked_embed": torch.zeros(1, 192), "module.head.w": torch.ones(1)}
    torch.save(dict(teacher=state, student={}), tmp_path / "VFM_Fundus_weights.pth")
    backbone = create_backbone("visionfm", "base", weights=tmp_path / "VFM_Fundus_weights.pth")
    assert backbone.mean[0] == pytest.approx(0.4237, abs=1e-4)
    assert_same(backbone, lambda x: reference_vit(model, x, 0.1))


def test_pyramid_file(tmp_path):
    for name in (
        "resnet18",
        "convnext_atto",
        "efficientnet_b0",
        "swin_tiny_patch4_window7_224",
        "resnest14d",
    ):
        model = create(name, num_classes=10).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.01)
        torch.save(
            dict(state_dict={f"module.{k}": v for k, v in model.state_dict().items()}), tmp_path / "model.pth"
        )
        backbone = create_backbone(name, weights=tmp_path / "model.pth").eval()
        x = image(224, 224)
        net = create(name, features_only=True).eval()
        flat = {k.replace(".", "_"): v for k, v in model.state_dict().items()}
        net.load_state_dict({k: flat[k.removeprefix("model.").replace(".", "_")] for k in net.state_dict()})
        with torch.no_grad():
            theirs = net(normalised(backbone, x))
            if "swin" in name:
                theirs = [m.permute(0, 3, 1, 2) if m.shape[1] == m.shape[2] else m for m in theirs]
            for ours, t in zip(backbone(x), theirs, strict=True):
                assert (ours - t).abs().max() < 1e-4 * t.abs().max(), name


# ---- sizes, spec, precision ---------------------------------------------------------------------------------------

MODELS = [
    "dinov3",
    "dinov2",
    TINY_VIT,
    "resnet18",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "hrnet_w18_small",
    "resnest14d",
]


@pytest.mark.parametrize("name", MODELS)
def test_any_size_and_bf16(name):
    backbone = create_backbone(name).eval()
    assert (
        list(backbone.spec.strides) == sorted(backbone.spec.strides)
        and max(backbone.spec.strides) == backbone.stride == backbone.patch
    )
    for height, width in [(237, 189), (5, 40), (224, 224), (1, 1)]:
        with torch.no_grad():
            maps = backbone(image(height, width))
        expected = [(2, c, *s) for c, s in zip(backbone.spec.channels, backbone.spec.sizes(height, width))]
        assert [tuple(m.shape) for m in maps] == expected
        assert all(m.isfinite().all() for m in maps)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = backbone(image(70, 90))
    with torch.no_grad():
        full, cast = backbone(image(70, 90)), backbone.to(torch.bfloat16)(image(70, 90))
    for maps in (low, cast):
        for a, b in zip(maps, full):
            assert F.cosine_similarity(a.float().flatten(), b.flatten(), dim=0) > 0.99


def test_padding_does_not_move_the_image():
    backbone = create_backbone("dinov3").eval()
    x = image(37, 50)
    with torch.no_grad():
        assert torch.equal(backbone(x)[0], backbone(backbones.pad_to_stride(x, 16))[0])


def test_only_what_is_wanted_is_computed():
    backbone = create_backbone("dinov3", layers=[3, 1, 3]).eval()
    assert backbone.layers == (1, 3) and len(backbone.model.blocks) == 4 and len(backbone(image(16, 16))) == 2
    assert not any(p.grad is None for p in grads(backbone))


def grads(backbone):
    "Parameters after a backward pass; distributed training waits for all of them."
    sum(m.sum() for m in backbone(image(32, 32))).backward()
    return list(backbone.parameters())


@pytest.mark.parametrize("name", ["dinov2", "resnet18", "convnext_atto"])
def test_every_parameter_gets_a_gradient(name):
    assert not any(p.grad is None for p in grads(create_backbone(name)))


def test_in_channels(tmp_path):
    save_file(random_weights(create(TINY_VIT, num_classes=0)).state_dict(), tmp_path / "model.safetensors")
    three = create_backbone(TINY_VIT, weights=tmp_path).eval()
    x = image(64, 64, channels=1)
    for channels in (1, 3, 6):
        backbone = create_backbone(TINY_VIT, weights=tmp_path, in_channels=channels).eval()
        assert len(backbone.mean) == len(backbone.std) == channels
        with torch.no_grad():
            ours, reference = backbone(x.expand(-1, channels, -1, -1))[0], three(x.expand(-1, 3, -1, -1))[0]
        assert (ours - reference).abs().max() < 1e-3  # this model has the same statistics for all channels


def test_train_and_eval_are_standard():
    backbone = create_backbone("resnet18")
    assert backbone.training and backbone.model.training
    assert not backbone.eval().model.training


# ---- identity -----------------------------------------------------------------------------------------------------


def features_in_worker(data, x, queue):
    torch.set_num_threads(1)
    backbone = pickle.loads(data)
    with torch.no_grad():
        queue.put((backbone.weights_hash, backbone(x)[0].numpy()))


def test_spawned_worker():
    backbone, context = create_backbone("dinov3", layers=[1]).eval(), multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=features_in_worker, args=(pickle.dumps(backbone), image(20, 30), queue))
    worker.start()
    digest, features = queue.get(timeout=120)
    worker.join()
    with torch.no_grad():
        assert (torch.from_numpy(features) - backbone(image(20, 30))[0]).abs().max() < 1e-5
    assert digest == backbone.weights_hash


@pytest.mark.parametrize("name", ["dinov3", "dinov2", "resnet18", "swin_tiny_patch4_window7_224"])
def test_a_state_dict_determines_the_features(tmp_path, name):
    first = create_backbone(name, layers=2).eval()
    if "rope" in dict(first.model.named_children()):
        first.model.rope.periods.mul_(1.01)
    if name == "dinov2":
        first.model.resizing = RESIZING["original"]
    torch.save(first.state_dict(), tmp_path / "first.pth")
    by_file = create_backbone(**first.recipe | dict(weights=tmp_path / "first.pth")).eval()
    by_state = create_backbone(**first.recipe).eval()
    by_state.load_state_dict(torch.load(tmp_path / "first.pth", weights_only=True))
    x = image(70, 90)
    with torch.no_grad():
        for second in (by_file, by_state):
            assert second.weights_hash == first.weights_hash
            assert all(torch.equal(a, b) for a, b in zip(first(x), second(x), strict=True))


def test_hash_notices_any_change():
    backbone = create_backbone("dinov3", layers=[0])
    seen = [backbone.weights_hash]
    assert backbone.weights_hash == seen[0]
    with torch.no_grad():
        backbone.model.cls_token += 1e-3
    seen.append(backbone.weights_hash)
    backbone.model.rope.periods *= 1.001
    seen.append(backbone.weights_hash)
    backbone.model.cls_token.data = torch.zeros_like(backbone.model.cls_token)
    seen.append(backbone.weights_hash)
    assert len(set(seen)) == 4 and all(len(h) == 64 for h in seen)


def test_recipe_is_plain():
    recipe = create_backbone("resnet18", layers=[-1]).recipe
    assert json.loads(json.dumps(recipe)) == recipe and recipe["layers"] == [4]


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(name="dinov4"), "did you mean 'dinov3'"),
        (dict(name="resnet81"), "or a timm model name; did you mean"),
        (dict(name=3), "unknown backbone 3"),
        (dict(name="visionfm", size="large"), "expected one of base"),
        (dict(name="retfound"), "unknown retfound size 'small': expected one of large"),
        (dict(name="resnet18", size="base"), "leave size out"),
        (dict(layers=13), "has 12 layers"),
        (dict(layers=[-13]), "has 12 layers"),
        (dict(layers="all"), "has 12 layers"),
        (dict(in_channels=0), "expected a whole number of 1 or more"),
        (dict(weights="no/such/file.pth"), "no file or folder"),
        (dict(weights=""), "no weights file"),
        (dict(name="retfound", size="large", weights="pretrained"), "weights=<file>"),
        (dict(name="maxvit_tiny_tf_224"), "cannot be a backbone"),
    ],
)
def test_bad_arguments(kwargs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^[^\n]*$") as e:
        create_backbone(**kwargs)
    assert message in str(e.value)
    if "no/such" in str(kwargs.get("weights")):
        assert isinstance(e.value, MissingError)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.rand(3, 32, 32), "image[None]"),
        (torch.rand(1, 1, 32, 32), "got 1 channels, expected 3"),
        (torch.rand(1, 3, 0, 32), "non-empty"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "divide by"),
        ([[1.0]], "got list"),
        (torch.rand(0, 3, 32, 32), "non-empty"),
    ],
)
def test_bad_images(x, message):
    backbone = create_backbone("resnet18", layers=[0])
    with pytest.raises(InputError) as e:
        backbone(x)
    assert message in str(e.value)


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda s, p: torch.save({k: v for k, v in s.items() if "blocks.7.attn.proj" not in k}, p),
            "2 missing (blocks.7.attn.proj.weight, blocks.7.attn.proj.bias)",
        ),
        (lambda s, p: torch.save({"foo": torch.ones(2)}, p), "1 left over (foo)"),
        (lambda s, p: torch.save({}, p), "holds no weights"),
        (lambda s, p: torch.save([1, 2], p), "holds no weights"),
        (lambda s, p: torch.save(dict(s, x=Code()), p), "may run code"),
        (lambda s, p: p.write_bytes(b"<html>404</html>"), "truncated"),
        (lambda s, p: p.write_bytes(b""), "truncated"),
        (lambda s, p: (torch.save(s, p), p.write_bytes(p.read_bytes()[:100_000])), "truncated"),
    ],
)
@pytest.mark.parametrize("name", [TINY_VIT, "dinov3", "convnext_atto"])
def test_bad_files(tmp_path, damage, message, name):
    path = tmp_path / "w.pth"
    damage(create(TINY_VIT, num_classes=0).state_dict(), path)
    with pytest.raises(InputError, match="^[^\n]*$") as e:
        create_backbone(name, weights=path)
    if name == TINY_VIT:
        assert message in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    "One value is enough; what is not loaded does not matter."
    path, state = tmp_path / "w.pth", create(TINY_VIT, num_classes=0).state_dict()
    state["blocks.7.mlp.fc1.bias"][5] = value
    torch.save(state, path)
    with pytest.raises(InputError, match="^[^\n]*w.pth[^\n]*blocks.7.mlp.fc1.bias holds 1 value[^\n]*$"):
        create_backbone(TINY_VIT, weights=path)
    with torch.no_grad():
        maps = create_backbone(TINY_VIT, weights=path, layers=[6]).eval()(image(32, 32))
    assert maps[0].isfinite().all()


def test_own_weights_that_are_not_finite(tmp_path):
    net = torch.nn.Linear(3, 2)
    before = net.weight.clone()
    broken = torch.nn.Linear(3, 2)
    broken.bias.data[1] = float("-inf")
    save_weights(tmp_path / "w.safetensors", broken)
    with pytest.raises(InputError, match="^[^\n]*w.safetensors: bias holds 1 value[^\n]*$"):
        load_weights(tmp_path / "w.safetensors", net)
    assert torch.equal(net.weight, before)  # nothing of it was taken


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(create(TINY_VIT, num_classes=0).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        create_backbone(TINY_VIT, weights=tmp_path)


def test_other_sizes_and_families_are_refused(tmp_path):
    hf_dinov3(tmp_path)
    others = ("dinov2", TINY_VIT, "resnet18", "convnext_atto")
    for name, size in (("dinov3", "base"), ("dinov3", "small_plus"), *((name, "small") for name in others)):
        with pytest.raises(InputError, match="choose the model"):
            create_backbone(name, size, weights=tmp_path)


def test_config_that_contradicts_the_model(tmp_path):
    hf_dinov3(tmp_path, num_attention_heads=12)
    with pytest.raises(InputError, match="num_attention_heads is 12, expected 6"):
        create_backbone("dinov3", weights=tmp_path)


# ---- the hub ------------------------------------------------------------------------------------------------------


def test_offline_and_nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "get_hf_file_metadata", lambda *a, **k: time.sleep(60))
    start = time.perf_counter()
    with pytest.raises(InputError, match="^[^\n]*$") as e:
        create_backbone("dinov3", "small", weights="pretrained")
    assert time.perf_counter() - start < 45  # not the minute that the network would take
    for part in (
        "timm/vit_small_patch16_dinov3.lvd1689m",
        "HF_HOME",
        "weights=<file or folder>",
        "weights=None",
    ):
        assert part in str(e.value)


def test_cached_weights_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        pretrained, "get_hf_file_metadata", lambda *a, **k: pytest.fail("the network was asked")
    )
    repo = tmp_path / "models--timm--vit_small_patch16_dinov3.lvd1689m"
    (repo / "snapshots/abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    model = random_weights(create("vit_small_patch16_dinov3"))
    save_file(model.state_dict(), repo / "snapshots/abc/model.safetensors")
    backbone = create_backbone("dinov3", "small", weights="pretrained")
    model.rope.periods = model.rope.periods.bfloat16().float()  # as published
    assert_same(backbone, model.forward_features)


def test_spec():
    assert FeatureSpec((8, 16, 16, 16), (3.5, 7, 14, 28)).sizes(28, 30)[0] == (8, 9)
    nan = float("nan")
    for channels, strides in [
        ((), ()),
        ((0,), (4,)),
        ((8,), (0,)),
        ((8.5,), (4,)),
        ((8, 8), (4,)),
        (8, (4, 8)),
        ((8,), (nan,)),
        ("ab", (1, 2)),
    ]:
        with pytest.raises(InputError):
            FeatureSpec(channels, strides)
    with pytest.raises(AttributeError):
        FeatureSpec((8,), (4,)).channels = (3,)
    assert len(build_model(TINY_VIT, init=False).feature_info) == 12

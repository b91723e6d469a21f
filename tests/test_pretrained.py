"Checkpoints as others write them: training code of DINOv2 and DINOv3, transformers, timm, wrappers; what does not fit is named."

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_backbones import as_meta_dinov3, assert_same, hf_dinov3, image, normalised, random_weights

from dinolab.core.errors import InputError
from dinolab.models import architectures
from dinolab.models.architectures import FAMILIES, build_model
from dinolab.models.backbones import create_backbone
from dinolab.models.pretrained import find_state, load_checked, match_statistics, read_weights, to_timm

SMALL = "vit_small_patch14_dinov2"


def other(state):
    "The same names with other values: what a wrong choice would load."
    return {name: value + 1 for name, value in state.items()}


def named(state, prefix):
    return {prefix + name: value for name, value in state.items()}


TRAINED = {  # how training code keeps a state dict
    "dinov3, one dictionary": lambda s: dict(
        model=named(other(s), "student.backbone.")
        | named(s, "teacher.backbone.")
        | {"teacher.dino_head.mlp.0.weight": torch.ones(3), "student.ibot_head.mlp.0.weight": torch.ones(3)},
        optimizer=dict(step=3),
    ),
    "dinov3, released teacher": lambda s: dict(teacher=named(s, "backbone.")),
    "dinov2, FSDP": lambda s: dict(
        teacher=named(
            {name.replace("blocks.", "blocks._fsdp_wrapped_module."): v for name, v in s.items()},
            "backbone._fsdp_wrapped_module.",
        )
    ),
    "compiled and checkpointed": lambda s: {
        "_orig_mod." + name.replace(".attn.", "._checkpoint_wrapped_module.attn."): v for name, v in s.items()
    },
    "teacher and student": lambda s: dict(
        student=named(other(s), "module.backbone."), teacher=named(s, "module.backbone."), epoch=3
    ),
    "student alone": lambda s: dict(student=named(s, "module.backbone."), args=3),
    "averaged by timm": lambda s: dict(state_dict=other(s), state_dict_ema=named(s, "module."), arch="x"),
    "DataParallel of several networks": lambda s: (
        named(other(s), "module.student.backbone.") | named(s, "module.teacher.backbone.")
    ),
    "nested": lambda s: dict(state_dict=named(s, "model.backbone."), epoch=1),
    "ema in a wrapper": lambda s: dict(model=dict(model_ema=named(s, "backbone."), student=other(s))),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_state_dicts_of_training_code(kind):
    state = {
        "cls_token": torch.ones(1),
        "blocks.0.attn.qkv.weight": torch.ones(2),
        "norm.weight": torch.ones(3),
    }
    found = find_state(TRAINED[kind](state), "file.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("counted", [True, False])
def test_blocks_in_chunks(tmp_path, counted):
    "DINOv2's chunks number their blocks through (0.0 0.1 0.2 1.3 ...); others begin anew in each."
    model = random_weights(build_model(SMALL))
    state = {"mask_token": torch.zeros(1, 384)}
    for name, value in model.state_dict().items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            chunk, inside = divmod(int(block), 3)
            name = f"blocks.{chunk}.{block if counted else inside}.{rest}"
        if name != "_extra_state":
            state[name] = value
    torch.save(dict(model=named(state, "teacher.backbone.")), tmp_path / "chunks.pth")
    backbone = create_backbone("dinov2", "small", weights=tmp_path / "chunks.pth", norm=False)
    for name, value in backbone.model.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(value, model.state_dict()[name]), name


def test_names_with_two_numbers_stay_where_they_are_no_chunks():
    state = {"blocks.0.0.conv_dw.weight": torch.ones(1), "blocks.1.0.conv_dw.weight": torch.ones(1)}
    assert find_state(state, "efficientnet.pth").keys() == state.keys()


def test_a_teacher_of_meta_gives_the_features_of_transformers(tmp_path):
    model = hf_dinov3()
    state = as_meta_dinov3(model)
    torch.save(TRAINED["dinov3, one dictionary"](state), tmp_path / "teacher_checkpoint.pth")
    backbone = create_backbone("dinov3", "small", weights=tmp_path / "teacher_checkpoint.pth")
    frequencies = model.rope_embeddings.inv_freq
    frequencies.copy_(1 / (1 / frequencies).bfloat16().float())  # Meta keeps periods in bfloat16
    assert_same(backbone, lambda x: model(x).last_hidden_state)


@pytest.mark.parametrize("files", ["folder", "file", "shards"])
def test_dinov3_convnext_equals_transformers(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ConvNextConfig()
    model = random_weights(transformers.DINOv3ConvNextModel(config))
    model.save_pretrained(tmp_path, max_shard_size="30MB" if files == "shards" else "5GB")
    path = tmp_path / "model.safetensors" if files == "file" else tmp_path
    backbone = create_backbone("convnext_tiny.dinov3_lvd1689m", weights=path).eval()
    for size in ((96, 64), (128, 160)):
        x = image(*size)
        with torch.no_grad():
            theirs = model(normalised(backbone, x), output_hidden_states=True).hidden_states[1:]
            for ours, expected in zip(backbone(x), theirs, strict=True):
                assert expected.std() > 1e-3
                assert (ours - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_a_convnext_of_another_size_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    transformers.DINOv3ConvNextModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the file looks like a ConvNeXt") as e:
        create_backbone("convnext_tiny.dinov3_lvd1689m", weights=tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "path, size, expected",
    [
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "large", "large_sat"),
        ("dinov3-vitl16-pretrain-sat493m/model.safetensors", "large", "large_sat"),
        (
            "models--facebook--dinov3-vit7b16-pretrain-sat493m/snapshots/a1b2/model.safetensors",
            "7b",
            "7b_sat",
        ),
        ("DINOv3_ViTL_SAT-493M.pth", "large_qkvb", "large_sat_qkvb"),
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", "large", "large"),
        ("saturday/large.pth", "large", "large"),
        ("sat493m/small.pth", "small", "small"),
    ],
)
def test_statistics_by_the_name_of_the_file(tmp_path, path, size, expected):
    assert match_statistics("dinov3", size, tmp_path / path) == ("dinov3", expected)


def test_satellite_weights_bring_their_mean_and_std(tmp_path, monkeypatch):
    "Also into the recipe, from which a trained backbone is made again."
    small = FAMILIES["dinov3"]["small"]
    monkeypatch.setitem(FAMILIES["dinov3"], "small_sat", small)
    real = architectures.timm.get_pretrained_cfg
    sat = real("vit_large_patch16_dinov3.sat493m")
    stats = lambda name, size, channels: (
        (sat.mean, sat.std) if size == "small_sat" else ((0.5,) * 3, (0.5,) * 3)
    )
    monkeypatch.setattr("dinolab.models.backbones.channel_stats", stats)
    hf_dinov3(tmp_path / "dinov3-vits16-pretrain-sat493m", query_bias=False, value_bias=False)
    backbone = create_backbone("dinov3", "small", weights=tmp_path / "dinov3-vits16-pretrain-sat493m")
    assert backbone.recipe["size"] == "small_sat"
    assert backbone.mean == sat.mean == (0.430, 0.411, 0.296) and backbone.std == sat.std
    named_by_timm = match_statistics("vit_large_patch16_dinov3", "small", tmp_path / "x-sat493m.pth")
    assert named_by_timm == ("vit_large_patch16_dinov3.sat493m", "small")


@pytest.mark.parametrize("size", ["huge_plus", "7b"])
def test_the_largest_sizes_have_the_names_of_metas_files(size):
    "Names and shapes only: nothing is allocated."
    with torch.device("meta"):
        model = build_model(FAMILIES["dinov3"][size], init=False)
    own = model.state_dict()
    state = {}
    for name, value in own.items():
        for timms, metas in (
            ("reg_token", "storage_tokens"),
            (".gamma_1", ".ls1.gamma"),
            (".gamma_2", ".ls2.gamma"),
            (".fc1_g.", ".w1."),
            (".fc1_x.", ".w2."),
            (".mlp.fc2.", ".mlp.w3."),
            ("rope.periods", "rope_embed.periods"),
        ):
            name = name.replace(timms, metas)
        state[name] = value
    state |= {"mask_token": own["cls_token"], "local_cls_norm.weight": own["norm.weight"]}
    found = to_timm(model, state, "original", 3)
    assert own.keys() <= found.keys()
    assert all(found[name].shape == own[name].shape for name in own)
    width = {"huge_plus": 1280, "7b": 4096}[size]
    with pytest.raises(InputError, match=f"looks like a ViT of width {width} .{size}. and depth"):
        load_checked(timm.create_model("vit_tiny_patch16_224", num_classes=0), found, {}, "big.pth")


STRANGERS = {
    "a CLIP model": {"visual.conv1.weight": torch.ones(2), "text_projection": torch.ones(2)},
    "a Segment Anything model": {"image_encoder.pos_embed": torch.ones(2)},
    "a language model": {"model.layers.0.self_attn.q_proj.weight": torch.ones(2)},
    "a ResNet": {"layer1.0.conv1.weight": torch.ones(2)},
    "adapters .LoRA.": {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2)},
    "a Swin transformer": {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(2)},
    "a head without its backbone": {"linear_head.weight": torch.ones(2), "linear.weight": torch.ones(2)},
    "a network of torchvision": {"features.0.0.weight": torch.ones(2)},
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_a_file_looks_like_is_said(tmp_path, kind):
    torch.save(STRANGERS[kind], tmp_path / "stranger.pth")
    with pytest.raises(InputError, match=f"the file looks like {kind}") as e:
        create_backbone("vit_tiny_patch16_224", weights=tmp_path / "stranger.pth")
    assert "\n" not in str(e.value) and "missing" in str(e.value)


def test_unknown_and_missing_names_are_both_said(tmp_path):
    state = build_model("vit_tiny_patch16_224").state_dict()
    state.pop("norm.bias")
    state["adapter.weight"] = torch.ones(3)
    save_file({k: v for k, v in state.items() if k != "_extra_state"}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError) as e:
        create_backbone("vit_tiny_patch16_224", weights=tmp_path / "odd.safetensors")
    for part in (
        "1 missing (norm.bias)",
        "1 left over (adapter.weight)",
        "ViT of width 192 (tiny) and depth 12",
    ):
        assert part in str(e.value)


def test_a_distributed_checkpoint_is_answered_with_the_command(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    with pytest.raises(InputError, match="dcp_to_torch"):
        read_weights(tmp_path / "ckpt", "dinov3")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "whole.pth")
    assert torch.equal(read_weights(tmp_path / "whole.pth", "dinov3").state["w"], torch.ones(3))

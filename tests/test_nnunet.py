"nnU-Net v2 trains, continues and predicts with a network of ours; without nnU-Net the message names the extra."

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dinolab.core.errors import InputError
from dinolab.tasks.nnunet import build_network
from dinolab.tasks.nnunet_plans import setup, trainer_folder

VIT = "vit_tiny_patch16_224"
needs = pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="needs the extra nnunet")


@pytest.fixture
def plans(tmp_path, monkeypatch):
    "What nnU-Net's planner leaves for a small 2D data set."
    folder = tmp_path / "pre/Dataset901_Small"
    folder.mkdir(parents=True)
    for name in ("raw", "pre", "results"):
        monkeypatch.setenv(
            {"raw": "nnUNet_raw", "pre": "nnUNet_preprocessed", "results": "nnUNet_results"}[name],
            str(tmp_path / name),
        )
    monkeypatch.setenv("nnUNet_extTrainer", str(trainer_folder()))
    two = dict(
        data_identifier="nnUNetPlans_2d",
        preprocessor_name="DefaultPreprocessor",
        batch_size=2,
        patch_size=[64, 64],
        median_image_size_in_voxels=[70.0, 90.0],
        spacing=[1.0, 1.0],
        normalization_schemes=["ZScoreNormalization"],
        use_mask_for_norm=[False],
        resampling_fn_data="resample_data_or_seg_to_shape",
        resampling_fn_seg="resample_data_or_seg_to_shape",
        resampling_fn_probabilities="resample_data_or_seg_to_shape",
        resampling_fn_data_kwargs=dict(is_seg=False, order=3, order_z=0, force_separate_z=None),
        resampling_fn_seg_kwargs=dict(is_seg=True, order=1, order_z=0, force_separate_z=None),
        resampling_fn_probabilities_kwargs=dict(is_seg=False, order=1, order_z=0, force_separate_z=None),
        batch_dice=True,
        architecture=dict(network_class_name="none", arch_kwargs={}, _kw_requires_import=[]),
    )
    content = dict(
        dataset_name="Dataset901_Small",
        plans_name="nnUNetPlans",
        original_median_spacing_after_transp=[999.0, 1.0, 1.0],
        original_median_shape_after_transp=[1, 70, 90],
        image_reader_writer="NaturalImage2DIO",
        transpose_forward=[0, 1, 2],
        transpose_backward=[0, 1, 2],
        configurations={"2d": two},
        experiment_planner_used="ExperimentPlanner",
        label_manager="LabelManager",
        foreground_intensity_properties_per_channel={
            "0": dict(
                mean=0.5, std=0.3, median=0.5, min=0.0, max=1.0, percentile_00_5=0.0, percentile_99_5=1.0
            )
        },
    )
    (folder / "nnUNetPlans.json").write_text(json.dumps(content))
    return folder / "nnUNetPlans.json"


def quick(*more, **options):
    return setup(
        901,
        pairs=[
            f"backbone={VIT}",
            "head=upernet",
            "hidden_size=16",
            "lora.rank=2",
            "train.epochs=2",
            "train.lr=0.01",
            "train.warmup=0",
            "crops_per_epoch=8",
            *more,
        ],
        **options,
    )


def trainer(plans, **options):
    "A trainer as the Python API makes it."
    from dinolab.tasks.nnunet import nnUNetTrainerDino

    content = json.loads(plans.read_text()) | dict(continue_training=False)
    dataset = dict(
        channel_names={"0": "grey"},
        labels={"background": 0, "disc": 1, "square": 2},
        numTraining=4,
        file_ending=".png",
    )
    made = nnUNetTrainerDino(
        plans=content,
        configuration="2d_dino",
        fold=0,
        dataset_json=dataset,
        device=torch.device("cpu"),
        **options,
    )
    made.dataset_class = None
    return made


def initialised(plans, monkeypatch):
    made = trainer(plans)
    monkeypatch.setattr(
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.infer_dataset_class", lambda folder: None
    )
    made.initialize()
    return made


def test_setup_keeps_the_plans_of_nnunet(plans):
    before = json.loads(plans.read_text())
    done = quick("crop=[96,80]", "train.batch_size=3", "manifest=eyes", "loss=dice")
    after = json.loads(plans.read_text())
    assert done["without_effect"] == ["manifest", "loss"]
    new = after["configurations"].pop("2d_dino")
    assert (
        after == before
        and new["patch_size"] == [96, 80]
        and new["batch_size"] == 3
        and new["inherits_from"] == "2d"
    )
    assert (
        new["dinolab"]["network"]["lora"]["rank"] == 2
        and new["dinolab"]["loop"]["epochs"] == 2
        and new["dinolab"]["iterations"] == [2, 1]
    )
    quick("head=segformer")
    assert (
        json.loads(plans.read_text())["configurations"]["2d_dino"]["dinolab"]["network"]["head"]
        == "segformer"
    )


@pytest.mark.parametrize(
    "pairs,message",
    [
        (["hidden=3"], "no key 'hidden'"),
        (["backbone=resnet18"], "lora target_modules"),
        (["weights=none.pth"], "no file or folder"),
        (["train.lr=0"], "lr=0"),
    ],
)
def test_wrong_recipes_leave_the_plans_alone(plans, pairs, message):
    before = plans.read_text()
    with pytest.raises(InputError, match=message):
        quick(*pairs)
    assert plans.read_text() == before


def test_without_nnunet_the_extra_is_named():
    code = "import sys; sys.modules['nnunetv2'] = None\nimport dinolab.tasks.nnunet\ntry: dinolab.tasks.nnunet.nnUNetTrainerDino\nexcept ImportError as e: print(e)"
    assert (
        "dinolab[nnunet]"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    )


@needs
def test_nnunet_finds_the_trainer(plans):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    found = recursive_find_trainer_class_by_name("nnUNetTrainerDino")
    assert issubclass(found, nnUNetTrainer) and [p.name for p in trainer_folder().glob("*.py")] == [
        "__init__.py",
        "dinolab_trainer.py",
    ]


@needs
def test_recipe_is_followed(plans, monkeypatch):
    quick("train.clip=0.5", "train.weight_decay=0.1")
    made = initialised(plans, monkeypatch)
    assert made.num_epochs == 2 and made.num_iterations_per_epoch == 2 and not made.enable_deep_supervision
    assert isinstance(made.optimizer, torch.optim.AdamW) and {
        g["weight_decay"] for g in made.optimizer.param_groups
    } == {0.0, 0.1}
    names = {id(p): n for n, p in made.network.named_parameters()}
    trained = {names[id(p)] for g in made.optimizer.param_groups for p in g["params"]}
    assert trained == {n for n, p in made.network.named_parameters() if p.requires_grad} and any(
        "lora_" in n for n in trained
    )
    made.network.train()
    assert not made.network.model.backbone.model.norm.training
    clips = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n: clips.append(n))
    batch = dict(data=torch.rand(2, 1, 64, 64), target=torch.randint(0, 3, (2, 1, 64, 64)).float())
    first = float(made.train_step(batch)["loss"])
    for epoch in range(2):
        made.lr_scheduler.step(0)
        [made.train_step(batch) for _ in range(6)]
    assert float(made.train_step(batch)["loss"]) < first and clips[0] == 0.5


@needs
@pytest.mark.parametrize("epochs,expected", [(1, [0.5]), (2, [0.854, 0.146]), (3, [0.933, 0.5, 0.067])])
def test_every_epoch_learns(plans, monkeypatch, epochs, expected):
    "The rate of an epoch is the cosine in its middle: (1 + cos(pi (e + 1/2) / n)) / 2, set where nnU-Net sets it."
    quick(f"train.epochs={epochs}", "train.schedule=cosine")
    made = initialised(plans, monkeypatch)
    rates = []
    for made.current_epoch in range(epochs):
        made.lr_scheduler.step(made.current_epoch)  # the call of on_train_epoch_start
        rates.append(made.optimizer.param_groups[0]["lr"] / 0.01)
    assert rates == pytest.approx(expected, abs=2e-3)


def test_path_and_refused_calls_load_no_torch():
    code = """
import os, sys
from dinolab.tasks.nnunet_plans import setup, trainer_folder
assert (trainer_folder() / "dinolab_trainer.py").is_file()
try: setup(901)
except ValueError as e: print(e)
assert not {"torch", "numpy", "timm"} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | dict(nnUNet_preprocessed=""),
    )
    assert done.returncode == 0 and "nnUNet_preprocessed is not set" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"configurations": []}', '{"configurations": {"2d": 3}}']
)
def test_damaged_plans_are_named(plans, content):
    plans.write_text(content)
    with pytest.raises(InputError, match="nnUNetPlans.json is damaged|unknown configuration"):
        quick()
    assert plans.read_text() == content


@needs
def test_checkpoints_come_back(plans, monkeypatch, tmp_path):
    quick()
    a, b = initialised(plans, monkeypatch), initialised(plans, monkeypatch)
    with torch.no_grad():
        for p in a.network.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    a.save_checkpoint(str(tmp_path / "c.pth"))
    b.load_checkpoint(str(tmp_path / "c.pth"))
    x = torch.rand(1, 1, 70, 50)
    with torch.no_grad():
        assert torch.equal(a.network.eval()(x), b.network.eval()(x))


@needs
def test_prediction_rebuilds_the_network(plans, monkeypatch):
    "As nnUNetv2_predict does: from the class, the plans and the weights; sliding windows, mirrored."
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    quick()
    made = initialised(plans, monkeypatch)
    weights = {k: v.clone() for k, v in made.network.state_dict().items()}
    network = type(made).build_network_architecture(
        made.plans_manager, made.configuration_manager, 1, 3, False
    )
    predictor = nnUNetPredictor(device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    predictor.manual_initialization(
        network,
        made.plans_manager,
        made.configuration_manager,
        [weights],
        made.dataset_json,
        "nnUNetTrainerDino",
        (0, 1),
    )
    found = predictor.predict_single_npy_array(
        np.random.default_rng(0).random((1, 1, 90, 100)).astype(np.float32),
        dict(spacing=(999, 1, 1)),
        None,
        None,
        False,
    )
    assert found.shape == (1, 90, 100) and set(np.unique(found)) <= {0, 1, 2}


@needs
def test_pretrained_weights_start_training_only(plans, monkeypatch, tmp_path):
    from dinolab.models.backbones import create_backbone

    torch.manual_seed(5)
    torch.save(create_backbone(VIT).model.state_dict(), tmp_path / "vit.pth")
    quick(f"weights={tmp_path / 'vit.pth'}")
    made = initialised(plans, monkeypatch)
    own = made.network.model.backbone.state_dict()["model.blocks.2.attn.qkv.base_layer.weight"]
    assert torch.equal(own, torch.load(tmp_path / "vit.pth", weights_only=True)["blocks.2.attn.qkv.weight"])
    (tmp_path / "vit.pth").unlink()  # prediction does not need them
    recipe = made.recipe
    assert build_network(recipe, ["ZScoreNormalization"], 1, 3)(torch.rand(1, 1, 64, 64)).shape == (
        1,
        3,
        64,
        64,
    )


UNET3PLUS = ["backbone=resnet10t", "head=unet3plus", "hidden_size=4", "norm=batch", "lora=null"]


@needs
def test_unet3plus_with_all_its_outputs(plans, monkeypatch):
    "Deep supervision and presence reach the loss; in prediction there is one tensor."
    quick(*UNET3PLUS, "deep_supervision=true", "cgm=true", "side_weight=0.5")
    made = initialised(plans, monkeypatch)
    seen = []
    plain = made.loss
    made.loss = lambda logits, target: seen.append(logits.shape) or plain(logits, target)
    batch = dict(data=torch.rand(2, 1, 64, 64), target=torch.randint(0, 3, (2, 1, 64, 64)).float())
    made.network.train()
    first = float(made.train_step(batch)["loss"])
    assert seen == [(2, 3, 64, 64)] * 5
    for _ in range(8):
        last = float(made.train_step(batch)["loss"])
    assert last < first
    for name in ("classify.4.weight", "presence.layers.1.weight"):
        assert made.network.model.head.get_parameter(name).grad.abs().sum() > 0, name
    with torch.no_grad():
        assert made.network.eval()(batch["data"]).shape == (2, 3, 64, 64)


def test_a_twin_from_scratch(plans, tmp_path):
    "The same recipe but for the weights, all of them trained; refused where there are none."
    from dinolab.models.backbones import create_backbone

    with pytest.raises(InputError, match="begins from scratch itself"):
        quick("head=linear", "hidden_size=null", scratch=True)
    assert set(json.loads(plans.read_text())["configurations"]) == {"2d"}
    torch.save(create_backbone(VIT).model.state_dict(), tmp_path / "vit.pth")
    quick(f"weights={tmp_path / 'vit.pth'}", "freeze_backbone=true", scratch=True)
    made = json.loads(plans.read_text())["configurations"]
    first, twin = (made[name]["dinolab"] for name in ("2d_dino", "2d_dino_scratch"))
    different = {k for k in first["network"] if first["network"][k] != twin["network"][k]}
    assert different == {"weights", "freeze_backbone", "lora"}
    assert (twin["network"]["weights"], twin["network"]["freeze_backbone"]) == (None, False)
    assert {k for k in first if first[k] != twin[k]} == {"network", "layer_decay"}

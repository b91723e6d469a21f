"From volumes on disk to scores and segmentations, by the commands, and what goes wrong on the way."

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinolab.core.errors import InputError
from dinolab.features.cache import Extraction, cache_features
from dinolab.features.cases import open_case
from dinolab.features.crops import CropDataset
from dinolab.features.targets import ClassTarget, InstanceTarget
from dinolab.train.settings import TrainArgs
from dinolab.features.extract import PatchMean
from dinolab.volumes.instances import affinities
from dinolab.models.neighborhood import NeighborhoodFilter
from dinolab.tasks.volumes import evaluate_unet3d, load_trained, predict_unet3d, train_unet3d
from dinolab.synth.em import em_volume
from dinolab.volumes.grid import Grid
from dinolab.volumes.sources import open_multiscale
from dinolab.volumes.volume import Volume
from dinolab.volumes.write import write_multiscale


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Three small anisotropic volumes on disk."
    folder = tmp_path_factory.mktemp("data")
    for s in range(3):
        em = em_volume(shape=(24, 64, 64), voxel_size=(16, 8, 8), seed=s)
        write_multiscale(folder / f"raw{s}.zarr", em.raw, voxel_size=em.voxel_size, levels=1)
        write_multiscale(
            folder / f"labels{s}.zarr", em.labels, voxel_size=em.voxel_size, levels=1, kind="labels"
        )
    return folder


def dinolab(*args, folder):
    return subprocess.run(
        [sys.executable, "-c", "from dinolab.cli.main import main; main()", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_commands_from_raw_volumes_to_a_segmentation(data, tmp_path):
    (tmp_path / "train.yaml").write_text(f"""
recipe: unet3d
raw_data: [{data}/raw0.zarr, {data}/raw1.zarr]
gt_data: [{data}/labels0.zarr, {data}/labels1.zarr]
classes: 9
backbone: vit_tiny_patch16_224
backbone_size: small
pixel_size: 8
crop: [16, 32, 32]
crops_per_epoch: 4
base_channels: 4
levels: 2
train: {{epochs: 2, device: cpu, log_every: 1}}
""")
    done = dinolab("train", "--config", "train.yaml", "upsampler=transpose", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / done.stdout.strip().splitlines()[-1]
    assert json.loads((run / "model.json").read_text())["network"]["upsampler"] == "transpose"
    assert [
        line["step"]
        for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if "loss" in line
    ] == [1, 2, 3, 4]
    done = dinolab(
        "evaluate",
        f"run={run}",
        f"raw_data={data}/raw2.zarr",
        f"gt_data={data}/labels2.zarr",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "test/mean_iou" in done.stdout and "test/mean_iou" in json.loads(
        (run / "metrics.json").read_text()
    )
    done = dinolab(
        "predict",
        f"run={run}",
        f"source={data}/raw2.zarr",
        "store=seg.zarr",
        "probabilities=true",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    labels = open_multiscale(tmp_path / "seg.zarr/labels").levels[0]
    assert labels.shape == (24, 64, 64) and labels.voxel_size == (16, 8, 8)
    again = dinolab("predict", f"run={run}", f"source={data}/raw1.zarr", "store=seg.zarr", folder=tmp_path)
    assert again.returncode == 2 and "is not what it was" in again.stderr.strip().splitlines()[-1]
    typo = dinolab("train", "--config", "train.yaml", "train.epoch=3", folder=tmp_path)
    assert typo.returncode == 2 and "epoch" in typo.stderr


def volumes(seeds=range(3), shape=(20, 28, 32)):
    found = [em_volume(shape=shape, voxel_size=(8, 8, 8), seed=s) for s in seeds]
    return [Volume(v.raw, Grid(v.raw.shape, 8), f"v{s}") for s, v in zip(seeds, found)], [
        Volume(v.labels, Grid(v.raw.shape, 8)) for v in found
    ]


def small(tmp_path, **more):
    raw, labels = volumes()
    return (
        dict(
            raw_data=raw,
            gt_data=labels,
            classes=9,
            backbone=PatchMean(4),
            pixel_size=8,
            crop=(12, 16, 16),
            crops_per_epoch=4,
            base_channels=4,
            levels=2,
            cache=tmp_path / "features",
            out=tmp_path / "runs",
            train=TrainArgs(epochs=1, device="cpu"),
        )
        | more
    )


@pytest.mark.parametrize(
    "more",
    [
        dict(learn_upsampling=False),
        dict(planes="xz"),
        dict(features="live"),
        dict(context_scale=2, raw_input=True),
        dict(deep_supervision=True, gradient_checkpointing=True),
        dict(progressive=1.0),
        dict(loss="boundary+tversky", upsampler="joint_bilateral"),
        dict(targets="instances", classes=None, lsd_sigma=0),
    ],
    ids=str,
)
def test_every_way_of_training(more, tmp_path):
    s = small(tmp_path, **more)
    done = train_unet3d(**s)
    found = predict_unet3d(
        done.run.path, s["raw_data"][2], tmp_path / "seg.zarr", backbone=s["backbone"], chunk=16
    )
    assert found.labels.levels[0].shape == (20, 28, 32)


def test_validation_is_extracted_once(tmp_path, monkeypatch):
    "A second training of the same data finds its features."
    s = small(tmp_path)
    train_unet3d(**s)
    calls = []
    monkeypatch.setattr(PatchMean, "forward", lambda self, images: calls.append(1))
    train_unet3d(**s, upsampler="transpose")
    assert not calls


def test_blocks_do_not_show(tmp_path):
    s = small(tmp_path)
    done = train_unet3d(**s)
    kinds = [
        dict(block=(16, 16, 16), chunk=16),
        dict(block=(32, 32, 16), chunk=16),
        dict(workers=2, block=(16, 16, 32), chunk=16),
    ]
    found = [
        predict_unet3d(
            done.run.path,
            s["raw_data"][2],
            tmp_path / f"{i}.zarr",
            backbone=s["backbone"],
            probabilities=True,
            **k,
        )
        for i, k in enumerate(kinds)
    ]
    for other in found[1:]:
        assert np.array_equal(found[0].probabilities(), other.probabilities())


def test_masked_labels_do_not_matter(tmp_path):
    "Labels that the mask hides change nothing, not even when no class has them."
    raw, labels = volumes([0])
    mask = np.zeros(raw[0].shape, np.uint8)
    mask[4:16, 4:24, 4:28] = 1

    def crops(fill):
        changed = Volume(np.where(mask, labels[0].array, fill).astype(np.uint8), labels[0].grid)
        case = open_case("v", raw[0], changed, mask=Volume(mask, raw[0].grid), intensity=(0, 255))
        e = Extraction(PatchMean(4), pixel_size=8)
        case = replace(
            case,
            features=cache_features(
                e,
                case.raw,
                case.grid,
                e.layout(case.raw.grid, case.grid, (12, 16, 16)),
                tmp_path / "f",
                (0, 255),
            ),
        )
        return CropDataset([case], ClassTarget(9), (12, 16, 16), 4)

    a, b = crops(0), crops(200)
    for seed in range(5):
        x, y = a.item(0, seed), b.item(0, seed)
        assert (
            x["name"] == y["name"]
            and torch.equal(x["target"], y["target"])
            and torch.equal(x["mask"], y["mask"])
        )


def test_instance_targets_follow_the_turn():
    "Affinities of a turned crop are those of the turned labels."
    labels = np.random.default_rng(0).integers(0, 3, (8, 9, 10))
    target, mask = InstanceTarget(sigma=0)(labels, np.ones(labels.shape, bool), (8, 8, 8))
    same, known = affinities(labels, InstanceTarget().offsets)
    assert np.array_equal(target, same) and np.array_equal(mask, known)


def test_bad_input_in_one_line(tmp_path):
    s = small(tmp_path)
    raw, labels = s["raw_data"], s["gt_data"]

    def fails(match, **more):
        with pytest.raises(InputError, match=match) as e:
            train_unet3d(**s | more)
        assert "\n" not in str(e.value)

    fails("smaller than a crop", crop=64)
    fails("9 classes|3 classes", classes=3)
    fails("no labelled voxel", mask_data=[Volume(np.zeros(r.shape, np.uint8), r.grid) for r in raw])
    fails(
        "labels outside the raw volume",
        gt_data=[Volume(l.array, Grid(l.shape, 8, (9e4, 0, 0))) for l in labels],
    )
    fails("expected as many", gt_data=labels[:1])
    fails("did you mean", upsampler="transpos")
    fails("expected upsampler neighborhood", upsampler="transpose", filter=NeighborhoodFilter(1, 3))
    assert not list((tmp_path / "runs").glob("*/*/checkpoints"))


def test_another_backbone_is_noticed(tmp_path):
    s = small(tmp_path)
    done = train_unet3d(**s)
    other = PatchMean(4)
    other.register_buffer("more", torch.ones(1))
    with pytest.raises(InputError, match="expected the same"):
        load_trained(done.run.path, backbone=other)
    (done.run.path / "checkpoints/best/model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(InputError, match="is damaged"):
        load_trained(done.run.path, backbone=s["backbone"])


def test_evaluation_agrees_with_counting(tmp_path):
    s = small(tmp_path)
    done = train_unet3d(**s)
    scores = evaluate_unet3d(
        done.run.path,
        s["raw_data"][2:],
        s["gt_data"][2:],
        backbone=s["backbone"],
        cache=tmp_path / "features",
    )
    pred = next((done.run.path / "predictions").glob("*.zarr"))
    labels, true = open_multiscale(pred / "labels").levels[0].read(), s["gt_data"][2].array
    assert scores["test/accuracy"] == pytest.approx((labels == true).mean())

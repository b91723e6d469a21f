"From volumes on disk to scores and segmentations, by the commands, and what goes wrong on the way."

import json
import os
import shutil
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A finished training with a window of intensities, its settings, and a third volume on disk twice."
    folder = tmp_path_factory.mktemp("trained")
    given = small(folder, intensity=(0, 255), upsampler="transpose")
    run = train_unet3d(**given).run
    for name, seed in (("a", 5), ("b", 6)):
        em = em_volume(shape=(20, 28, 32), voxel_size=(8, 8, 8), seed=seed)
        options = dict(voxel_size=em.voxel_size, levels=1)
        write_multiscale(folder / name / "em.zarr", em.raw, **options)
        write_multiscale(folder / name / "labels.zarr", em.labels, kind="labels", **options)
    return run, given, folder


def contents(folder):
    "All files below a folder, byte for byte."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_training_goes_on_with_what_it_was_begun_with(trained):
    "Another loss, other volumes, labels, backbone or window are refused by name, and no byte of the run changes."
    run, given, _ = trained
    before = contents(run.path)
    raw, labels = given["raw_data"], given["gt_data"]
    turned = [*labels[:2], Volume(labels[2].array[::-1].copy(), labels[2].grid)]
    other = PatchMean(4)
    other.register_buffer("more", torch.ones(1))
    changes = {
        "loss (ce+dice there, ce now)": dict(loss="ce"),
        "augment (em there, none now)": dict(augment="none"),
        "intensity": dict(intensity=(0, 200)),
        "train.lr": dict(train=TrainArgs(epochs=1, device="cpu", lr=1.0)),
        "gt_data: not those": dict(gt_data=turned),
        "raw_data: not those": dict(raw_data=[raw[1], raw[0], raw[2]]),
        "backbone.weights_hash": dict(backbone=other),
    }
    for message, change in changes.items():
        with pytest.raises(InputError) as e:
            train_unet3d(**given | change, run=run.path)
        assert message in str(e.value) and "\n" not in str(e.value), str(e.value)
        assert contents(run.path) == before, message
    assert train_unet3d(**given, run=run.path).run.status == "done"
    assert (
        contents(run.path)["checkpoints/last/model.safetensors"]
        == before["checkpoints/last/model.safetensors"]
    )


def test_two_volumes_of_one_name(trained):
    "a/em and b/em have two predictions: together they score what their counts say."
    run, given, folder = trained
    options = dict(backbone=given["backbone"], cache=folder / "features")
    place = lambda names, what: [folder / n / f"{what}.zarr" for n in names]
    known = len(list((run.path / "predictions").glob("*"))) if (run.path / "predictions").exists() else 0
    score = lambda names: evaluate_unet3d(run.path, place(names, "em"), place(names, "labels"), **options)
    one, two, both = (score(names)["test/accuracy"] for names in ("a", "b", "ab"))
    assert one != two and both == pytest.approx((one + two) / 2)  # of equal size
    assert len(list((run.path / "predictions").glob("em.zarr-*"))) == 2 + known


def test_a_prediction_is_of_one_volume(trained, tmp_path):
    "Another volume into its store is refused, and so is the same place with another content."
    run, given, folder = trained
    shutil.copytree(folder / "a/em.zarr", tmp_path / "em.zarr")
    options = dict(backbone=given["backbone"], chunk=16)
    predict_unet3d(run.path, tmp_path / "em.zarr", tmp_path / "seg.zarr", **options)
    before = contents(tmp_path / "seg.zarr")
    with pytest.raises(InputError, match="raw of .* is not what it was"):
        predict_unet3d(run.path, folder / "b/em.zarr", tmp_path / "seg.zarr", **options)
    predict_unet3d(run.path, folder / "a/em.zarr", tmp_path / "seg.zarr", **options)  # the same, elsewhere
    shutil.rmtree(tmp_path / "em.zarr")
    shutil.copytree(folder / "b/em.zarr", tmp_path / "em.zarr")
    with pytest.raises(InputError, match="raw of .* is not what it was"):
        predict_unet3d(run.path, tmp_path / "em.zarr", tmp_path / "seg.zarr", **options)
    assert contents(tmp_path / "seg.zarr") == before


def test_the_window_of_the_training_is_kept(trained, tmp_path):
    "Intensities that were given in training hold in prediction, unless others are given."
    run, given, folder = trained
    options = dict(backbone=given["backbone"], chunk=16, probabilities=True)
    found = {}
    for name, window in (("kept", None), ("same", (0, 255)), ("other", (0, 90))):
        done = predict_unet3d(
            run.path, folder / "a/em.zarr", tmp_path / f"{name}.zarr", intensity=window, **options
        )
        found[name] = done.probabilities()
    assert np.array_equal(found["kept"], found["same"]) and not np.array_equal(found["kept"], found["other"])


def test_numbers_that_are_none(trained, tmp_path, monkeypatch):
    "A network that gives NaN does not find class 0 everywhere."
    run, given, folder = trained

    def spoil(run, model, which):
        with torch.no_grad():
            list(model.parameters())[-1].fill_(float("nan"))

    monkeypatch.setattr("dinolab.tasks.volumes.load_checkpoint", spoil)
    with pytest.raises(InputError, match="em.zarr.*outputs of the network are no finite numbers"):
        predict_unet3d(run.path, folder / "a/em.zarr", tmp_path / "s.zarr", backbone=given["backbone"])


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"kind": "unet3d"}'])
def test_damaged_files_of_a_run_are_one_line(trained, tmp_path, text):
    shutil.copytree(trained[0].path, tmp_path / "run")
    (tmp_path / "run/model.json").write_text(text)
    with pytest.raises(InputError, match="model.json is damaged") as e:
        load_trained(tmp_path / "run")
    assert "\n" not in str(e.value)


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

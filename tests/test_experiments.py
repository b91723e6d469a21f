"The experiments run from any folder, in their quick mode."

import importlib.util
import json
import os

import pytest

from dinolab.book.experiment import run_experiment
from dinolab.features.store import open_features
from dinolab.volumes.sources import open_multiscale


def test_multires_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment(
        "multires_features", dict(smoke="true", backbone="vit_tiny_patch16_224"), figures_to="pictures"
    )
    assert run.status == "done"
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "em_features.png",
        "em_labels.png",
        "mri_features.png",
    ]
    for name, channels in (("mri", 576), ("em", 576)):
        store = open_features(run.path / f"features/{name}.zarr")
        assert store.channels == channels and store.read().float().std() > 0
        assert open_multiscale(run.path / f"features/{name}.zarr/rgb", channel=0).levels[0].grid == store.grid
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert 0 < metrics["raw_32nm/cosine_to_finest/total"] < metrics["raw_16nm/cosine_to_finest/total"] < 1
    assert "backbone" in (run.path / "timing.txt").read_text()


@pytest.mark.long
def test_learned_upsampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment("learned_upsampling", dict(smoke="true"))
    metrics = run.metrics()
    assert (
        run.status == "done"
        and 0 < metrics["test/mean_iou/traditional"] < 1
        and 0 < metrics["test/mean_iou/neighborhood"] < 1
    )
    assert metrics["memory/ratio/source"] < 0.2 and {p.name for p in (run.path / "figures").iterdir()} == {
        "features.png",
        "curves.png",
        "worst.png",
    }


@pytest.mark.long
def test_heads_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment("heads_compare", dict(smoke="true"))
    metrics = run.metrics()
    assert (
        run.status == "done"
        and metrics["checkpoint/ratio"] < 1.2
        and "gain/dice_vessel/stem/frozen" in metrics
    )
    assert {p.name for p in (run.path / "figures").iterdir()} == {
        "dice.png",
        "predictions.png",
        "worst.png",
        "photographs.png",
        "coins.png",
    }


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="needs the extra nnunet")
def test_nnunet_vit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment("nnunet_vit", dict(smoke="true"))
    assert (
        run.status == "done"
        and "test/dice/vessel" in run.metrics()
        and len(list((run.path / "predictions").glob("*.png"))) == 6
    )


@pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is None,
    reason="needs segmentation_models_pytorch",
)
@pytest.mark.parametrize(
    "name, keys, figures",
    [
        (
            "unet3plus_spacecraft",
            ("test/iou/full/objects/0", "test/iou/smp.UnetPlusPlus/objects/0"),
            {"data.png", "iou.png", "curves.png", "pictures.png"},
        ),
        ("unet3plus_cost", ("resnet34/64/1 threads/as built/step", "memory/resnet34/64"), {"steps.png"}),
    ],
)
@pytest.mark.long
def test_unet3plus(name, keys, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment(name, dict(smoke="true"))
    assert (
        run.status == "done"
        and all(run.metrics()[k] is not None for k in keys)
        and {p.name for p in (run.path / "figures").iterdir()} == figures
    )


@pytest.mark.long
def test_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment("benchmark", dict(smoke="true"))
    metrics = run.metrics()
    ratios = {
        k.removeprefix("benchmark/ratio/"): v for k, v in metrics.items() if k.startswith("benchmark/ratio/")
    }
    assert run.status == "done" and {k.split("/")[0] for k in ratios} == {
        "features",
        "inference",
        "heads",
        "upsampling",
        "engine",
        "losses",
        "metrics",
        "io",
        "diffusion",
    }
    assert all(
        v > 0 and metrics[f"benchmark/low/{k}"] <= v <= metrics[f"benchmark/high/{k}"]
        for k, v in ratios.items()
    )
    assert metrics["benchmark/limit/matmul_gflops"] > 1 and {
        p.name for p in (run.path / "figures").iterdir()
    } == {"ratios.png"}


def test_benchmark_without_peers(tmp_path, monkeypatch):
    "A peer that is not installed gets a row that says so."
    for name in ("monai", "torchmetrics"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    run = run_experiment("benchmark", dict(smoke="true", parts="['losses', 'metrics']"))
    assert run.status == "done" and not any("MONAI" in k for k in run.metrics())
    assert "not installed" in (run.path / "notebook.ipynb").read_text()


def test_dwi_denoise(tmp_path, monkeypatch):
    pytest.importorskip("dipy")
    monkeypatch.chdir(tmp_path)
    run = run_experiment("dwi_denoise", dict(smoke="true"))
    metrics = run.metrics()
    psnr = {k.split()[-1]: v for k, v in metrics.items() if k.startswith("test/psnr_db/")}
    assert (
        run.status == "done"
        and psnr["blend"] > max(psnr["mppca"], psnr["localpca"])
        and psnr["simnet"] > psnr["noisy"] + 5
    )
    assert {p.name for p in (run.path / "figures").iterdir()} == {"maps.png", "snr.png"}


def test_dwi_simnet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment("dwi_simnet", dict(smoke="true"))
    assert run.status == "done" and (run.path / "simnet.safetensors").stat().st_size < 80_000
    assert all(10 < v < 60 for k, v in run.metrics().items() if k.startswith("look/psnr_db"))


@pytest.mark.parametrize(
    "name, keys, figures",
    [
        ("dwi_speed", ("ratio/plain", "step_ms/all of the source"), {"race.png"}),
        ("dwi_detail", ("A/mean/backbone/gain", "B/mean/L1/less_backbone"), {"gain.png"}),
    ],
)
def test_dwi(name, keys, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment(name, dict(smoke="true"))
    assert (
        run.status == "done"
        and all(run.metrics()[k] is not None for k in keys)
        and {p.name for p in (run.path / "figures").iterdir()} == figures
    )

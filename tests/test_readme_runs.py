"Every block of the README runs as it is written: in its order, in one folder where the files that it speaks of are at hand."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)

READER = r"""
import contextlib, io, json, os, subprocess, time
names, printed = {"__name__": "__main__"}, ""
for number, (kind, code) in enumerate(json.load(open("blocks.json")), 1):
    began, busy = time.time(), sum(os.times()[:4])
    print(f"==== block {number}, {kind}\n{code}", flush=True)
    if kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as out: exec(compile(code, f"block {number}", "exec"), names)
        printed = out.getvalue()
        print(printed)
    elif kind == "sh": subprocess.run(["sh", "-euxc", code], check=True)
    elif kind == "text": assert printed.strip() == code.strip(), f"block {number}: the Python above it has printed\n{printed}"
    elif kind == "make":
        for line in code.splitlines(): subprocess.run(["sh", "-euxc", line.replace("make ", "make -n -C \"$ROOT\" ", 1)], check=True, stdout=subprocess.DEVNULL)
    else: raise SystemExit(f"block {number} is of the kind {kind!r}: expected python, sh or text")
    print(f"==== done in {time.time() - began:.1f} s, {sum(os.times()[:4]) - busy:.1f} s of a processor", flush=True)
"""


def kind_of(kind, code):
    "A block of make commands stands for itself: the tests cannot run the tests, nor set up a second environment; their targets must exist."
    return "make" if kind == "sh" and all(line.startswith("make ") for line in code.splitlines()) else kind


def weights_of_the_hub(home):
    "Random weights where the hub's cache would have the pretrained ones."
    import timm

    name = "vit_small_patch16_dinov3"
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=0).state_dict()
    cache = home / "hub" / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    for folder in ("refs", f"snapshots/{'0' * 40}"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    save_file(state, cache / "snapshots" / ("0" * 40) / "model.safetensors")
    return state


def as_the_authors(state):
    "The same weights under the names of the authors' file."

    def name(key):
        return re.sub(r"gamma_(\d)", r"ls\1.gamma", key).replace("reg_token", "storage_tokens")

    return {name(k): v for k, v in state.items() if not k.startswith("rope")} | {
        "mask_token": torch.zeros(1, 384)
    }


def volumes(folder):
    "A cell, and labelled pieces of it."
    from dinolab.synth.em import em_volume
    from dinolab.volumes.write import write_multiscale

    write_multiscale(
        folder / "cell.zarr/em", em_volume((32, 32, 32), voxel_size=(16, 16, 16), seed=1).raw, voxel_size=16
    )
    for seed, name in enumerate("abc"):
        em = em_volume((32, 32, 32), voxel_size=(16, 16, 16), seed=seed)
        write_multiscale(folder / f"{name}.zarr", em.raw, voxel_size=16)
        write_multiscale(folder / f"{name}_labels.zarr", em.labels, voxel_size=16, kind="labels")


def pictures(folder):
    "Photographs with masks in folders, and the same as a data set of nnU-Net."
    from dinolab.synth.retina import retina_image

    def draw(image, mask, seed, size=192):
        scene = retina_image((size, size), seed=seed)
        for path, values in ((image, scene.image), (mask, scene.labels)):
            if path is None:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / path)

    for i in range(5):
        draw(f"photos/{i}.png", f"labels/{i}.png", i)
        draw(f"raw/Dataset901_Eyes/imagesTr/{i}_0000.png", f"raw/Dataset901_Eyes/labelsTr/{i}.png", i, 96)
    draw("test/photos/9.png", "test/labels/9.png", 9)
    draw("new_photos/10.png", None, 10)
    about = dict(
        channel_names={"0": "R", "1": "G", "2": "B"},
        labels=dict(background=0, disc=1, vessel=2, exudate=3, haemorrhage=4),
        numTraining=5,
        file_ending=".png",
    )
    (folder / "raw/Dataset901_Eyes/dataset.json").write_text(json.dumps(about))


def small_manifests(folder):
    "The data sets of the repository under their names, with fewer and smaller cases; the volume that the experiment crops keeps its size."
    (folder / "data_manifests").mkdir()
    for path in (ROOT / "data_manifests").glob("*.yaml"):
        m = yaml.safe_load(path.read_text())
        if m["name"] == "em_phantom":
            small = dict(shape=[32, 32, 32], voxel_size=[16, 16, 16])
            m["cases"] = {
                name: dict(parameters=dict(seed=i) | (small if name != "valid-0" else {}))
                for i, name in enumerate(("train-0", "train-1", "test-0", "valid-0"))
            }
            m["splits"] = dict(train=["train-0"], valid=["train-1"], test=["test-0"], large=["valid-0"])
        if m["name"] == "spacecraft_phantom":
            m["splits"] = {split: cases[:4] for split, cases in m["splits"].items()}
            m["cases"] = {case: m["cases"][case] for cases in m["splits"].values() for case in cases}
        (folder / "data_manifests" / path.name).write_text(yaml.safe_dump(m))


def series(folder):
    "A small diffusion series."
    from dinolab.dwi.denoise import phantom_files

    phantom_files(str(folder / "scan"), shape="24,24,12")
    for name in ("dwi.nii.gz", "dwi.bval", "dwi.bvec"):
        (folder / "scan" / name).rename(folder / name)


def environment(folder):
    "The commands on the path, weights from our cache, nnU-Net's folders and few processes."
    nnunet = dict(
        nnUNet_raw=str(folder / "raw"),
        nnUNet_preprocessed=str(folder / "pre"),
        nnUNet_results=str(folder / "results"),
        nnUNet_n_proc_DA="1",
        nnUNet_def_n_proc="1",
    )
    ours = dict(
        ROOT=str(ROOT),
        HF_HOME=str(folder / "huggingface"),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    return (
        {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
        | nnunet
        | ours
    )


@pytest.fixture
def folder(tmp_path):
    "What a reader has: the experiments, weights, volumes, pictures, a data set of nnU-Net, a diffusion series."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/experiments").symlink_to(ROOT / "nbs/experiments")
    torch.save(as_the_authors(weights_of_the_hub(tmp_path / "huggingface")), tmp_path / "dinov3_vits16.pth")
    for prepare in (volumes, pictures, small_manifests, series):
        prepare(tmp_path)
    return tmp_path


def test_blocks_are_found():
    "Each fence of the README opens or closes a block of a known kind."
    assert len(re.findall(r"^```", TEXT, re.M)) == 2 * len(BLOCKS) and {kind for kind, _ in BLOCKS} == {
        "python",
        "sh",
        "text",
    }
    assert all(before[0] == "python" for before, (kind, _) in zip(BLOCKS, BLOCKS[1:]) if kind == "text")


@pytest.mark.slow
def test_every_block_runs(folder):
    pytest.importorskip("nnunetv2"), pytest.importorskip("dipy")
    (folder / "blocks.json").write_text(json.dumps([(kind_of(*block), block[1]) for block in BLOCKS]))
    env = environment(folder)
    subprocess.run(
        ["nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "-np", "1", "-npfp", "1"],
        env=env,
        check=True,
        capture_output=True,
    )
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(
            [sys.executable, "-c", READER], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    printed = (folder / "log.txt").read_text()
    assert code == 0, printed[-6000:]
    assert len(re.findall(r"^==== done", printed, re.M)) == len(BLOCKS)
    assert np.array(Image.open(folder / "new_masks/10.png")).shape == (192, 192)
    for made in (
        "cell_seg.zarr/zarr.json",
        "results/Dataset901_Eyes/nnUNetTrainerDino__nnUNetPlans__2d_dino/fold_0/checkpoint_final.pth",
        "submission_output_unet3plus/10_layer.npz",
        "clean_residual.nii.gz",
        "clean_eval.json",
        "brain/clean.nii.gz",
    ):
        assert (folder / made).exists(), made

"Every block of the README runs as it is written, in its order, in one folder that holds nothing but what the lines before have made."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

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


def small_manifests(folder):
    "The data sets of the repository under their names, with fewer and smaller cases."
    (folder / "data_manifests").mkdir()
    for path in (ROOT / "data_manifests").glob("*.yaml"):
        m = yaml.safe_load(path.read_text())
        if m["name"] == "em_phantom":
            small = dict(shape=[48, 48, 48], voxel_size=[16, 16, 16])
            kept = ("train-0", "train-1", "valid-0", "test-0", "test-1")
            m["cases"] = {name: dict(parameters=dict(seed=i) | small) for i, name in enumerate(kept)}
            m["cases"]["valid-0"] = dict(parameters=dict(seed=100))  # the experiment crops it
            m["splits"] = dict(
                train=["train-0"], valid=["train-1"], test=["test-0"], large=["valid-0", "test-1"]
            )
        if m["name"] in ("spacecraft_phantom", "retina_phantom"):
            few = 4 if m["name"] == "spacecraft_phantom" else 6
            m["splits"] = {split: cases[:few] for split, cases in m["splits"].items()}
            m["cases"] = {case: m["cases"][case] for cases in m["splits"].values() for case in cases}
        (folder / "data_manifests" / path.name).write_text(yaml.safe_dump(m))


@pytest.fixture
def folder(tmp_path, request):
    "An empty folder with an environment to activate; smaller data sets unless the tests are long."
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    if not request.config.getoption("--long"):
        small_manifests(tmp_path)
    return tmp_path


def test_blocks_are_found():
    "Each fence of the README opens or closes a block of a known kind."
    assert len(re.findall(r"^```", TEXT, re.M)) == 2 * len(BLOCKS) and {kind for kind, _ in BLOCKS} == {
        "python",
        "sh",
        "text",
    }
    assert all(before[0] == "python" for before, (kind, _) in zip(BLOCKS, BLOCKS[1:]) if kind == "text")


@pytest.mark.readme
def test_every_block_runs(folder):
    pytest.importorskip("dipy")
    (folder / "blocks.json").write_text(json.dumps([(kind_of(*block), block[1]) for block in BLOCKS]))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "ROOT": str(ROOT), "PATH": path}
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(
            [sys.executable, "-c", READER], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    printed = (folder / "log.txt").read_text()
    assert code == 0, printed[-6000:]
    assert len(re.findall(r"^==== done", printed, re.M)) == len(BLOCKS)
    assert np.array(Image.open(folder / "masks/image.png")).shape == (192, 192)
    assert len(list((folder / "new_masks").glob("*.png"))) == 6
    made = (
        "features.zarr/zarr.json",
        "segmented.zarr/zarr.json",
        "submission_output_unet3plus/0_layer.npz",
        "clean_residual.nii.gz",
        "clean_eval.json",
    )
    for name in made:
        assert (folder / name).exists(), name

"The command `dinolab features`: a run from end to end, and bad input in one line with nothing left behind."

import contextlib
import io
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest

from dinolab.cli.main import main
from dinolab.features.store import open_features
from dinolab.volumes.sources import open_multiscale
from dinolab.volumes.write import write_multiscale

TINY = ["--backbone", "vit_tiny_patch16_224", "--layers", "0,1", "--pixel-size", "8", "--block", "16"]


@dataclass
class Done:
    "How a command ended, and what it said."

    exit_code: int
    output: str


def dinolab(*args):
    "The command itself, in this process."
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with mock.patch("sys.argv", ["dinolab", "features", *map(str, args)]):
            try:
                main()
            except SystemExit as e:
                return Done(e.code or 0, said.getvalue())
    return Done(0, said.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    x = np.random.default_rng(0).integers(0, 255, (20, 33, 37)).astype(np.uint8)
    write_multiscale(path / "raw.zarr", x, voxel_size=(16, 8, 8), origin=(100, 0, 50), levels=2)
    np.save(path / "raw.npy", x)
    np.save(path / "bool.npy", x > 128)
    np.save(path / "text.npy", x.astype(str))
    np.save(path / "constant.npy", x * 0 + 7)
    np.save(path / "nan.npy", np.where(x > 250, np.nan, x.astype(np.float32)))
    np.save(path / "two.npy", x[0])
    return path


def test_from_file_to_store(folder, tmp_path):
    done = dinolab(
        folder / "raw.zarr",
        tmp_path / "f.zarr",
        *TINY,
        "--voxel-size",
        "16",
        "--raw-resolution",
        "16,8,8",
        "--planes",
        "xy,yz",
        "--components",
        "8",
        "--slice-stride",
        "2",
    )
    assert done.exit_code == 0, done.output
    f = open_features(tmp_path / "f.zarr")
    assert f.channels == 8 and f.grid.voxel_size == (16, 16, 16) and f.shape == (20, 17, 19)
    assert f.grid.corner == (92, -4, 46)
    assert open_multiscale(tmp_path / "f.zarr/rgb", channel=2).levels[0].grid == f.grid
    assert "backbone" in done.output and "images" in done.output


def test_boolean_masks_are_images(folder, tmp_path):
    assert (
        dinolab(
            folder / "bool.npy", tmp_path / "f.zarr", *TINY, "--source-voxel-size", "8", "--planes", "xy"
        ).exit_code
        == 0
    )


BAD = {
    "no voxel size": (["raw.npy"], "give --source-voxel-size in nm"),
    "2D": (["two.npy", "--source-voxel-size", "8"], "expected three axes"),
    "text": (["text.npy", "--source-voxel-size", "8"], "expected integers or floats"),
    "constant": (["constant.npy", "--source-voxel-size", "8"], "is constant (7)"),
    "NaN": (["nan.npy", "--source-voxel-size", "8"], "the first at z y x = (0,"),
    "two voxel sizes": (["raw.zarr", "--voxel-size", "8,8"], "expected a number, or 3 of them"),
    "voxel size 0": (["raw.zarr", "--voxel-size", "0"], "'--voxel-size': 0.0: expected"),
    "voxel size too large": (["raw.zarr", "--voxel-size", "100000"], "is the unit right?"),
    "voxel size too fine": (["raw.zarr", "--voxel-size", "0.1"], "at most 16 times"),
    "voxel size given twice": (["raw.zarr", "--source-voxel-size", "8"], "--source-voxel-size has no effect"),
    "pixel 0": (["raw.zarr", "--pixel-size", "0"], "'--pixel-size': 0.0: expected"),
    "pixel nan": (["raw.zarr", "--pixel-size", "nan"], "'--pixel-size': nan: expected"),
    "pixel huge": (["raw.zarr", "--pixel-size", "1e6"], "smaller than the volume"),
    "block 0": (["raw.zarr", "--block", "0"], "'--block': 0: expected"),
    "block 24": (["raw.zarr", "--block", "24"], "whole chunks, e.g. block 32"),
    "halo": (["raw.zarr", "--halo", "-1"], "'--halo': -1: expected a whole number of 0 or more"),
    "intensity 1": (["raw.zarr", "--intensity", "5"], "expected two numbers"),
    "intensity 3": (["raw.zarr", "--intensity", "1,2,3"], "expected two numbers"),
    "intensity order": (["raw.zarr", "--intensity", "5,1"], "low below high"),
    "components 0": (["raw.zarr", "--components", "0"], "components"),
    "components -2": (["raw.zarr", "--components", "-2", "--no-rgb"], "n_components=-2: expected"),
    "components 2": (["raw.zarr", "--components", "2"], "--no-rgb"),
    "components 500": (["raw.zarr", "--components", "500"], "expected 1 to 384"),
    "layers": (["raw.zarr", "--layers", "1.5,2.7"], "expected whole numbers"),
    "device": (["raw.zarr", "--device", "banana"], "cannot be used"),
    "precision": (["raw.zarr", "--precision", "fp16"], "expected auto, fp32 or bf16"),
    "fusion": (["raw.zarr", "--fusion", "maximum"], "expected mean, weighted or concat"),
    "planes": (["raw.zarr", "--planes", "xy,yx"], "unknown plane 'yx'"),
    "channel": (["raw.zarr", "--voxel-size", "16", "--missing", "maybe"], "'error' or 'fill'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, case):
    (source, *options), message = BAD[case]
    done = dinolab(folder / source, tmp_path / "out.zarr", *TINY, *options)
    lines = [line for line in done.output.splitlines() if "random weights" not in line]
    assert done.exit_code == 2 and len(lines) == 1, done
    assert lines[0].startswith("dinolab: ") and message in lines[0], lines[0]
    assert not (tmp_path / "out.zarr").exists()


def test_the_source_is_never_touched(folder, tmp_path):
    (folder / "raw.zarr/mine.partial").write_text("not yours")
    for out in (folder / "raw.zarr", folder / "raw.zarr/inside"):
        assert dinolab(folder / "raw.zarr", out, *TINY).exit_code == 2
    assert (folder / "raw.zarr/mine.partial").read_text() == "not yours" and not (
        folder / "raw.zarr/inside"
    ).exists()


def test_a_corrected_run_may_use_the_same_store(folder, tmp_path):
    "A refused run must not bind its store to the wrong settings."
    for wrong in (["--block", "24"], ["--components", "500"]):
        assert dinolab(folder / "raw.zarr", tmp_path / "f.zarr", *TINY, *wrong).exit_code == 2
    assert dinolab(folder / "raw.zarr", tmp_path / "f.zarr", *TINY, "--planes", "xy").exit_code == 0


def test_the_picture_needs_three_channels(folder, tmp_path):
    assert (
        dinolab(
            folder / "raw.zarr", tmp_path / "f.zarr", *TINY, "--components", "2", "--no-rgb", "--planes", "xy"
        ).exit_code
        == 0
    )
    assert open_features(tmp_path / "f.zarr").channels == 2 and not (tmp_path / "f.zarr/rgb").exists()


def test_workers(folder, tmp_path):
    "Two processes give the bytes of one, from a shell as from Python."
    files = {}
    for workers in (1, 2):
        out = tmp_path / f"{workers}.zarr"
        done = dinolab(
            folder / "raw.zarr", out, *TINY, "--planes", "xy", "--components", "8", "--workers", workers
        )
        assert done.exit_code == 0, done.output
        files[workers] = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert open_features(out).group["done"].size == 18
    assert files[1] == files[2]

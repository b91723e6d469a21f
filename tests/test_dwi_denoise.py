"Denoising of diffusion series from files: what is written, what is refused with nothing written, and what the methods keep."

import contextlib
import gzip
import inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import dinolab.dwi.learn as learn
from dinolab.cli.main import main
from dinolab.core.errors import InputError
from dinolab.core.region import Box
from dinolab.dwi.data import check_series
from dinolab.dwi.denoise import (
    METHODS,
    NEEDS_SIGMA,
    denoise,
    denoise_files,
    denoise_series,
    evaluate_files,
    phantom_files,
    score_against_truth,
)
from dinolab.dwi.linear import fit_spatial, fit_tissue
from dinolab.dwi.lowrank import localpca, mppca
from dinolab.dwi.nets import MultiScaleDetailNet
from dinolab.dwi.scores import psnr
from dinolab.dwi.phantoms import make_phantom, noisy

NAMES = [name for name in METHODS if name not in ("tissue", "spatial", "p2s")]
QUICK = [name for name in NAMES if name != "qnet"]
PARTS = [name for name in QUICK if name not in ("blend", "simnet")]  # what blend and simnet are made of
AFFINE = np.array([[-1.9, 0.2, 0.1, 31.0], [0.2, 1.8, -0.3, -27.5], [-0.1, 0.3, 2.4, 4.25], [0, 0, 0, 1]])
THIRTY = ((0, 2), (1000, 30))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    "Each test has a folder; --threads holds for one test only."
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    "Where the package has no weights, simnet gets some that are not trained."
    if (Path(learn.__file__).parent / "simnet.safetensors").exists():
        return
    torch.manual_seed(0)
    net = MultiScaleDetailNet(9, residual=0)
    torch.nn.init.normal_(net.fuse.weight, std=1e-3)
    monkeypatch.setattr(learn, "load_simnet", lambda path=None: net.eval())


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(1, (18, 18, 8), scheme=THIRTY)


@pytest.fixture(scope="module")
def noise(phantom):
    return noisy(phantom, 15.0, 1)


def table(phantom, at="in"):
    "Gradients as other programs write them: odd spaces, tabs, no or two last line ends."
    g = phantom.gradients
    Path(f"{at}.bval").write_bytes(("  ".join(f"{b:g}" for b in g.bvals) + " \t\r\n\n").encode())
    Path(f"{at}.bvec").write_bytes(
        "\n".join("\t ".join(f"{v: .7f}" for v in row) for row in g.bvecs.T).encode()
    )


def image(data, path="in.nii.gz", dtype=np.float32, slope=None):
    nii = nib.Nifti1Image(
        ((data - slope[1]) / slope[0]).round().astype(dtype) if slope else data.astype(np.float32), AFFINE
    )
    nii.header.set_xyzt_units("mm", "sec")
    nii.header.set_qform(AFFINE, 1)
    nii.header.set_sform(AFFINE, 4)
    nii.header.set_zooms((*nii.header.get_zooms()[:3], *[8.7] * (data.ndim - 3)))
    nii.header["descrip"] = b"a scanner"
    nii.header.set_data_dtype(dtype)
    if slope:
        nii.header.set_slope_inter(*slope)
    nib.save(nii, path)


@pytest.fixture
def files(phantom, noise):
    table(phantom)
    image(noise)
    image(phantom.mask, "mask.nii.gz")
    return ["in.nii.gz", "out.nii.gz", "--bval", "in.bval", "--bvec", "in.bvec", "--mask", "mask.nii.gz"]


def run(*args):
    "The command in this process."
    sys.argv = ["dinolab", "dwi", *map(str, args)]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def there():
    return sorted(str(p) for p in Path().rglob("*"))


def refused(capsys, words, *args):
    "One line on standard error, exit code 2, no new file and none that changed."
    before = {p: Path(p).read_bytes() for p in there() if Path(p).is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("dinolab: ") and said.err.count("\n") == 1 and words in said.err, said.err
    assert {p: Path(p).read_bytes() for p in there() if Path(p).is_file()} == before


def load(path):
    return np.asarray(nib.load(path).dataobj)


# what is written


def shell(*args):
    return subprocess.run(
        [sys.executable, "-c", "from dinolab.cli.main import main; main()", "dwi", *map(str, args)],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_from_a_shell():
    made = shell("phantom", "brain", "--seed", 3, "--snr", 12, "--scheme", 10, "--shape", "16,16,8")
    assert made.returncode == 0 and made.stdout == "brain\n" and made.stderr == "", made.stderr
    done = shell(
        "denoise",
        "brain/dwi.nii.gz",
        "new/folder/out.nii",
        "--bval",
        "brain/dwi.bval",
        "--bvec",
        "brain/dwi.bvec",
    )
    assert done.returncode == 0 and done.stdout.startswith("blend, ") and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert sorted(p.name for p in Path("new/folder").iterdir()) == [
        "out.bval",
        "out.bvec",
        "out.nii",
        "out_denoise.json",
    ]
    scored = shell(
        "eval", "new/folder/out.nii", "--truth", "brain/clean.nii.gz", "--mask", "brain/mask.nii.gz"
    )
    noisy_score = evaluate_files("brain/dwi.nii.gz", truth="brain/clean.nii.gz", mask="brain/mask.nii.gz")
    assert (
        scored.returncode == 0
        and "psnr_db" in scored.stdout
        and json.loads(Path("new/folder/out_eval.json").read_text())["psnr_db"] > noisy_score["psnr_db"] + 2
    )


@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii"])
def test_geometry_is_that_of_the_input(files, name):
    run("denoise", files[0], name, *files[2:], "--method", "mppca", "--noise-out", "--residual-out")
    a = nib.load("in.nii.gz")
    for path, axes in ((name, 4), ("out_residual.nii.gz", 4), ("out_sigma.nii.gz", 3)):
        b = nib.load(path)
        assert (
            b.shape == a.shape[:axes]
            and b.get_data_dtype() == np.float32
            and b.header.get_zooms() == a.header.get_zooms()[:axes]
        )
        np.testing.assert_array_equal(b.affine, a.affine)
        for get in ("get_qform", "get_sform"):
            np.testing.assert_array_equal(getattr(b.header, get)(), getattr(a.header, get)())
        assert (
            b.header.get_xyzt_units() == ("mm", "sec")
            and (int(b.header["qform_code"]), int(b.header["sform_code"])) == (1, 4)
            and b.header["descrip"] == a.header["descrip"]
        )
    assert Path(name).read_bytes()[:2] == (b"\x1f\x8b" if name.endswith("gz") else b"\\\x01")


def test_gradients_are_copied_byte_for_byte(files):
    run("denoise", *files, "--method", "loo_linear")
    for s in ("bval", "bvec"):
        assert Path(f"out.{s}").read_bytes() == Path(f"in.{s}").read_bytes()
    Path("out.nii.gz").unlink(), Path("out_denoise.json").unlink()
    run(
        "denoise",
        files[0],
        "out.nii.gz",
        "--bval",
        "out.bval",
        "--bvec",
        "out.bvec",
        "--method",
        "loo_linear",
    )  # gradients of the result's own name
    assert Path("out.bval").read_bytes() == Path("in.bval").read_bytes()


def test_scaled_integers(files, noise):
    image(noise, "short.nii.gz", np.int16, (0.25, 10.0))
    stored, meant = nib.load("short.nii.gz"), load("short.nii.gz")
    assert stored.get_data_dtype() == np.int16 and np.abs(meant - noise).max() < 0.2
    run("denoise", "short.nii.gz", *files[1:], "--method", "mppca")
    run("denoise", "in.nii.gz", "float.nii.gz", *files[2:], "--method", "mppca")
    out = nib.load("out.nii.gz")
    assert out.get_data_dtype() == np.float32 and (out.dataobj.slope, out.dataobj.inter) == (1, 0)
    assert np.abs(load("out.nii.gz") - load("float.nii.gz")).max() < 5


def test_noise_and_residual(files, noise, phantom):
    run("denoise", *files, "--method", "localpca", "--noise-out", "--residual-out", "--rician", "koay")
    out, residual, level = load("out.nii.gz"), load("out_residual.nii.gz"), load("out_sigma.nii.gz")
    np.testing.assert_allclose(out + residual, noise, atol=1e-3)
    assert (residual[~phantom.mask] == 0).all() and (level[~phantom.mask] == 0).all()
    about = json.loads(Path("out_denoise.json").read_text())
    np.testing.assert_allclose(level[phantom.mask], about["sigma"], rtol=1e-6)
    assert abs(about["sigma"] / phantom.sigma(15) - 1) < 0.1


def test_a_map_of_noise_can_be_given_back(files, phantom):
    run("denoise", *files, "--method", "localpca", "--noise-out")
    run(
        "denoise", files[0], "again.nii.gz", *files[2:], "--method", "localpca", "--sigma", "out_sigma.nii.gz"
    )
    np.testing.assert_allclose(load("again.nii.gz"), load("out.nii.gz"), atol=0.1)
    found = json.loads(Path("again_denoise.json").read_text())
    assert Path(found["sigma_given"]) == Path("out_sigma.nii.gz").absolute()


def test_report(files, phantom):
    run(
        "denoise",
        *files,
        "--method",
        "tissue",
        "--sigma",
        "60",
        "--rician",
        "koay",
        "--b0-threshold",
        "40",
        "--folds",
        "5",
        "--blind",
        "voxel",
        "--seed",
        "7",
    )
    about = json.loads(Path("out_denoise.json").read_text())
    import dinolab

    wanted = dict(
        output="out.nii.gz",
        version=dinolab.__version__,
        method="tissue",
        sigma=60.0,
        sigma_given="60",
        rician="koay",
        noise_floor_removed=True,
        b0_threshold=40.0,
        folds=5,
        blind="voxel",
        seed=7,
        voxels=int(phantom.mask.sum()),
        shells={"0": 2, "1000": 30},
        sees_own_noise=False,
    )
    assert {k: about[k] for k in wanted} == wanted
    assert (
        all(
            Path(about[k]).is_absolute() and Path(about[k]).exists()
            for k in ("input", "bval", "bvec", "mask")
        )
        and about["seconds"] >= 0
    )


def test_notes_reach_the_user(capsys):
    p = make_phantom(2, (18, 18, 8), scheme=((0, 1), (2500, 9)))
    table(p), image(noisy(p, 20.0, 2)), image(p.mask, "mask.nii.gz")
    run(
        "denoise",
        "in.nii.gz",
        "out.nii.gz",
        "--bval",
        "in.bval",
        "--bvec",
        "in.bvec",
        "--mask",
        "mask.nii.gz",
        "--method",
        "tissue",
    )
    said = capsys.readouterr()
    assert "note: 9 weighted volumes are few" in said.err and "stays as it is" in said.err
    np.testing.assert_array_equal(load("out.nii.gz")[..., 0], load("in.nii.gz")[..., 0])
    assert (load("out.nii.gz")[p.mask][:, 1:] != load("in.nii.gz")[p.mask][:, 1:]).any(0).all()


def test_transposed_directions_are_accepted(files):
    run("denoise", *files, "--method", "tissue")
    np.savetxt("rows.bvec", np.loadtxt("in.bvec").T, "%.7f")
    run(
        "denoise",
        files[0],
        "rows.nii.gz",
        "--bval",
        "in.bval",
        "--bvec",
        "rows.bvec",
        *files[6:],
        "--method",
        "tissue",
    )
    np.testing.assert_array_equal(load("rows.nii.gz"), load("out.nii.gz"))


# bad input: exit code 2, one line, nothing written


def change(path, find, put):
    Path(path).write_text(Path(path).read_text().replace(find, put, 1))


def columns(path, keep):
    np.savetxt(path, np.atleast_2d(np.loadtxt(path))[:, keep], "%.7f")


def broken_image(data, value):
    data = data.copy()
    data[5, 6, 3, 4] = value
    image(data)


def cut(path, share=0.6):
    Path(path).write_bytes(Path(path).read_bytes()[: int(share * Path(path).stat().st_size)])


def elsewhere():
    mask = nib.load("mask.nii.gz")
    nib.save(
        nib.Nifti1Image(np.asarray(mask.dataobj), mask.affine + np.eye(4)[:, [3, 0, 1, 2]] * 7), "mask.nii.gz"
    )


def not_a_table(path):
    Path(path).write_bytes(gzip.compress(bytes(range(256)) * 3))


def wrapped(data):
    nib.save(nib.Nifti1Image((data * 40).astype(np.int64).astype(np.int16), AFFINE), "in.nii.gz")


BAD = dict(
    bval_count=(lambda x: columns("in.bval", slice(31)), "31 b-values for an image of 32 volumes"),
    bvec_count=(lambda x: columns("in.bvec", slice(31)), "expected 3 x 32"),
    bvec_shape=(lambda x: np.savetxt("in.bvec", np.loadtxt("in.bvec")[:2]), "expected 3 x 32"),
    bvec_ragged=(lambda x: change("in.bvec", "\n", " 0.5\n"), "rows of equal length"),
    bval_words=(lambda x: change("in.bval", "1000", "high"), "expected numbers"),
    bval_nan=(lambda x: change("in.bval", "1000", "nan"), "b-values hold nan"),
    bval_empty=(lambda x: Path("in.bval").write_text("\n"), "is empty"),
    bval_binary=(lambda x: not_a_table("in.bval"), "in.bval"),
    bval_missing=(lambda x: Path("in.bval").unlink(), "no file"),
    not_unit=(lambda x: np.savetxt("in.bvec", np.loadtxt("in.bvec") * 2), "expected unit vectors"),
    zero_vector=(
        lambda x: np.savetxt("in.bvec", np.loadtxt("in.bvec") * (np.arange(32) != 9)),
        "direction of volume 9",
    ),
    nan_vector=(
        lambda x: np.savetxt("in.bvec", np.loadtxt("in.bvec") + np.where(np.arange(32) == 9, np.nan, 0)),
        "direction of volume 9",
    ),
    few_weighted=(
        lambda x: np.savetxt("in.bval", np.where(np.arange(32) < 27, 0, 1000)[None], "%d"),
        "expected 6 or more",
    ),
    no_b0=(lambda x: np.savetxt("in.bval", np.full((1, 32), 1000), "%d"), "no volume with b of at most 50"),
    three_axes=(lambda x: image(x[..., 0]), "expected four axes"),
    not_a_number=(
        lambda x: broken_image(x, np.nan),
        "1 values are not finite, the first at x y z v = (5, 6, 3, 4)",
    ),
    infinite=(lambda x: broken_image(x, np.inf), "not finite"),
    overflow=(wrapped, "overflowed"),
    flat_volume=(lambda x: image(np.where(np.arange(32) == 8, 7, x)), "volume 8 has the value 7 everywhere"),
    empty_mask=(lambda x: image(0 * x[..., 0], "mask.nii.gz"), "the mask is empty"),
    mask_shape=(lambda x: image(x[:-1, ..., 0], "mask.nii.gz"), "expected the same grid"),
    mask_elsewhere=(lambda x: elsewhere(), "expected a mask on the same grid"),
    mask_of_few=(
        lambda x: image(np.pad(np.ones((2, 2, 2)), ((8, 8), (8, 8), (3, 3))), "mask.nii.gz"),
        "8 voxels",
    ),
    truncated=(lambda x: cut("in.nii.gz"), "in.nii.gz"),
    truncated_mask=(lambda x: cut("mask.nii.gz"), "mask.nii.gz"),
    no_image=(lambda x: Path("in.nii.gz").write_text("hello"), "in.nii.gz"),
    missing=(lambda x: Path("in.nii.gz").unlink(), "in.nii.gz"),
)


@pytest.mark.parametrize("case", BAD)
def test_bad_files(files, noise, capsys, case):
    spoil, words = BAD[case]
    spoil(noise)
    refused(capsys, words, "denoise", *files, "--method", "tissue")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--method", "wavelets"], "wavelets"),
        (["--rician", "yes"], "rician"),
        (["--blind", "no"], "blind"),
        (["--folds", "1"], "folds"),
        (["--folds", "x"], "folds"),
        (["--threads", "-1"], "threads"),
        (["--sigma", "0"], "sigma"),
        (["--sigma", "-3"], "sigma"),
        (["--sigma", "nan"], "sigma"),
        (["--sigma", "much"], "sigma 'much'"),
        (["--sigma", "in.bval"], "in.bval"),
        (["--sigma", "half.nii.gz"], "same grid"),
        (["--b0-threshold", "2000"], "expected 6 or more"),
        (["--residual"], "--residual-out"),
        (["--seed", "one"], "seed"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_options(files, noise, capsys, args, words):
    image(noise[:10, ..., 0], "half.nii.gz")
    refused(capsys, words, "denoise", *files, *args)


TAKES_NUMBERS = dict(
    denoise_files=lambda **k: denoise_files("none.nii", "out.nii", bval="none", bvec="none", **k),
    denoise_series=lambda **k: denoise_series(None, **k),
    denoise=lambda **k: denoise(None, None, None, **k),
    phantom_files=lambda **k: phantom_files("new/folder", **k),
    make_phantom=lambda **k: make_phantom(**(dict(shape=None) | k)),
    evaluate_files=lambda **k: evaluate_files("none.nii", truth="none.nii", **k),
    fit_tissue=lambda **k: fit_tissue(None, **k),
    fit_spatial=lambda **k: fit_spatial(None, **k),
    qnet=lambda **k: learn.qnet(None, None, **k),
    train_simnet=lambda **k: learn.train_simnet(curriculum=None, **k),
)
FUNCTIONS = (denoise_files, denoise_series, denoise, phantom_files, make_phantom, evaluate_files)
FUNCTIONS += (fit_tissue, fit_spatial, learn.qnet, learn.train_simnet)


def numbers():
    "Every setting that is annotated as a number, of every function that people call."
    for function in FUNCTIONS:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.annotation in (int, float) and name != "level":
                yield pytest.param(
                    function.__name__, name, parameter.annotation, id=f"{function.__name__}-{name}"
                )


@pytest.mark.parametrize("function, name, kind", list(numbers()))
def test_wrong_numbers_are_refused_before_anything_is_done(function, name, kind):
    "The other arguments would fail at once if they were looked at."
    wrong = [float("nan"), float("inf"), -float("inf"), -1, -1e9, True, "three", [1, 2], {}]
    wrong += [0.5, 2.5] if kind is int else [1e30]
    if name in ("ridge", "cluster_ridge"):
        wrong.remove(1e30)  # a large penalty is one
    if name not in ("seed", "threads", "b0_threshold", "bmax", "ridge", "cluster_ridge"):
        wrong.append(0)
    for value in wrong:
        with pytest.raises(InputError) as said:
            TAKES_NUMBERS[function](**{name: value})
        assert str(said.value).startswith(f"{name}=") and "\n" not in str(said.value), value
    assert there() == []


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf"), 1e31, True, "much", {}])
def test_wrong_levels_are_refused(phantom, noise, sigma):
    g = phantom.gradients
    with pytest.raises(InputError, match="sigma"):
        denoise(noise, g.bvals, g.bvecs, "mppca", phantom.mask, sigma=sigma)


@pytest.mark.parametrize("shape", ["0,0,0", "-16,16,16", "1e3,9,9", "100000,100000,100000", "16,16,8,4", ""])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(InputError, match="shape"):
        phantom_files("new", shape=shape)
    assert there() == []


@pytest.mark.parametrize("radius", [0, -1, 1.5, float("nan"), "two", None, (1, 2), (1, 1, "x"), 10**9, [[1]]])
@pytest.mark.parametrize("method", [mppca, lambda x, **k: localpca(x, 1.0, **k)], ids=["mppca", "localpca"])
def test_wrong_patches_are_refused(noise, method, radius):
    with pytest.raises(InputError, match="patch"):
        method(noise[:8, :8, :8], patch_radius=radius)


def test_missing_options(files, capsys):
    refused(capsys, "--bval", "denoise", "in.nii.gz", "out.nii.gz")
    refused(capsys, "OUTPUT", "denoise", "in.nii.gz")
    refused(capsys, "expected a name that ends in .nii.gz", "denoise", files[0], "out.mif", *files[2:])


@pytest.mark.parametrize("there_already", ["out.nii.gz", "out.bval", "out_denoise.json", "out_sigma.nii.gz"])
def test_results_are_not_written_over(files, capsys, there_already):
    Path(there_already).write_text("mine")
    refused(
        capsys,
        f"{there_already} is there already",
        "denoise",
        *files,
        "--noise-out",
        "--method",
        "loo_linear",
    )
    run("denoise", *files, "--noise-out", "--method", "loo_linear", "--force")
    assert Path(there_already).read_bytes() != b"mine" and Path("out.nii.gz").exists()


def test_the_input_is_never_written_over(files, capsys):
    refused(capsys, "is the input", "denoise", files[0], "./in.nii.gz", *files[2:], "--force")
    Path("in.nii.gz").rename("new_residual.nii.gz")
    refused(
        capsys,
        "is the input",
        "denoise",
        "new_residual.nii.gz",
        "new.nii.gz",
        *files[2:],
        "--residual-out",
        "--force",
    )


def test_a_file_where_a_folder_should_be(files, capsys):
    Path("taken").write_text("a file")
    for out in ("taken/out.nii.gz", "taken/deep/out.nii.gz"):
        refused(capsys, "nothing can be written", "denoise", files[0], out, *files[2:])
    refused(capsys, "nothing can be written", "phantom", "taken")
    Path("folder.nii.gz").mkdir()
    refused(capsys, "folder", "denoise", files[0], "folder.nii.gz", *files[2:], "--force")


# disks


@contextlib.contextmanager
def full_disk(size):
    "No file may grow beyond some bytes: writing fails as it does on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_full_disk_is_one_line_and_leaves_nothing(files, capsys, size):
    with full_disk(size):
        refused(capsys, "File too large", "denoise", *files, "--method", "mppca", "--residual-out")
        refused(capsys, "File too large", "phantom", "new/folder", "--shape", "16,16,8", "--scheme", "10")


def test_a_full_disk_leaves_what_was_there(files, capsys):
    run("denoise", *files, "--method", "loo_linear")
    run("phantom", "scan", "--shape", "16,16,8", "--scheme", "10")
    with full_disk(100):
        refused(capsys, "File too large", "denoise", *files, "--method", "mppca", "--force")
        refused(capsys, "File too large", "phantom", "scan", "--shape", "18,18,8", "--force")
    with full_disk(20):
        refused(capsys, "File too large", "eval", "out.nii.gz", "--truth", "in.nii.gz")


def test_a_folder_that_takes_no_files(files, capsys):
    refused(capsys, "nothing can be written to /proc", "denoise", files[0], "/proc/out.nii.gz", *files[2:])
    refused(capsys, "nothing can be written to /proc", "phantom", "/proc/new")
    long = "a" * 300 + ".nii.gz"
    refused(capsys, "File name too long", "denoise", files[0], long, *files[2:])


@pytest.mark.parametrize("mask, mode", [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_are_for_whom_the_umask_says(files, mask, mode):
    before = os.umask(mask)
    try:
        run("phantom", "scan", "--shape", "16,16,8", "--scheme", "10")
        run("denoise", *files, "--method", "loo_linear", "--noise-out", "--residual-out")
        run("eval", "out.nii.gz", "--truth", "in.nii.gz")
    finally:
        os.umask(before)
    made = [p for p in Path().rglob("*") if p.is_file() and ("out" in p.name or p.parent.name == "scan")]
    assert len(made) == 13 and {p.stat().st_mode & 0o777 for p in made} == {mode}
    assert Path("scan").stat().st_mode & 0o777 == mode | (mode >> 2) & 0o111


# what methods keep


def few_steps(monkeypatch, steps):
    "qnet with a short training."
    train = inspect.unwrap(learn.qnet)
    monkeypatch.setattr(train, "__defaults__", tuple(steps if d == 500 else d for d in train.__defaults__))


@pytest.mark.parametrize("name", NAMES)
def test_scale(phantom, noise, name, monkeypatch):
    if name == "qnet":
        few_steps(monkeypatch, 6)
    a, b = (
        denoise(noise * np.float32(k), phantom.gradients.bvals, phantom.gradients.bvecs, name, phantom.mask)
        for k in (1, 1000)
    )
    np.testing.assert_allclose(b.data / 1000, a.data, atol=2e-3 * 1000)
    assert a.data.dtype == np.float32 and np.isfinite(a.data).all() and a.data.min() >= 0
    if name in NEEDS_SIGMA:
        assert abs(b.sigma / a.sigma / 1000 - 1) < 1e-4
    np.testing.assert_array_equal(a.data[~phantom.mask], noise[~phantom.mask])


@pytest.mark.parametrize("name", NAMES)
def test_less_noise_than_before(phantom, noise, name):
    if name == "qnet":
        pytest.skip("see test_qnet_does_no_harm")
    done, on = (
        denoise(noise, phantom.gradients.bvals, phantom.gradients.bvecs, name, phantom.mask),
        ~phantom.gradients.is_b0,
    )
    gain = psnr(done.data, phantom.clean, phantom.mask)[on] - psnr(noise, phantom.clean, phantom.mask)[on]
    assert gain.mean() > 0.5


@pytest.mark.parametrize("name", ["spatial_linear", "mppca", "simnet"])
def test_koay_takes_the_floor_off(phantom, name):
    x = noisy(phantom, 4.0, 5)
    off, koay = (
        denoise(
            x,
            phantom.gradients.bvals,
            phantom.gradients.bvecs,
            name,
            phantom.mask,
            rician=r,
            sigma=phantom.sigma(4),
        )
        for r in ("off", "koay")
    )
    low = phantom.mask[..., None] & (phantom.clean < phantom.sigma(4)) & ~phantom.gradients.is_b0
    if name == "simnet":
        return np.testing.assert_array_equal(off.data, koay.data)  # its floor is off already
    assert koay.data[low].mean() < off.data[low].mean() and (koay.data <= off.data + 1e-3).all()
    assert abs(koay.data[low].mean() - phantom.clean[low].mean()) < abs(
        off.data[low].mean() - phantom.clean[low].mean()
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_qnet_does_no_harm(seed):
    p = make_phantom(seed, (24, 24, 12), scheme=THIRTY)
    x, on = noisy(p, 15.0, seed), ~p.gradients.is_b0
    series = check_series(x, p.gradients, p.mask)
    start = fit_tissue(series).fitted
    out, share = learn.qnet(series, start, steps=120, seed=seed)
    assert 0 <= share <= 1
    assert psnr(out, p.clean, p.mask)[on].mean() > psnr(start, p.clean, p.mask)[on].mean() - 0.1


def test_a_useless_net_is_left_out(phantom, noise, monkeypatch):
    series = check_series(noise, phantom.gradients, phantom.mask)
    start = fit_tissue(series).fitted
    monkeypatch.setattr(learn, "train_net", lambda model, *args, **kw: model)
    away = lambda k: (
        lambda model, channels, volumes, start: (
            start + k * (start - np.asarray(series.data / learn.signal_scale(series)))
        )
    )
    for k, expected in ((1.0, 0.0), (-0.25, 1.0)):
        monkeypatch.setattr(learn, "predict_volumes", away(k))
        out, share = learn.qnet(series, start)
        assert share == expected
        if not share:
            np.testing.assert_allclose(out, start, rtol=1e-5, atol=1e-3)


def test_a_net_with_frozen_weights_does_not_see_its_volume(phantom, noise):
    torch.manual_seed(0)
    net = MultiScaleDetailNet(10, residual=0)
    torch.nn.init.normal_(net.fuse.weight, std=0.1)
    series, folds = (
        check_series(noise, phantom.gradients, phantom.mask),
        learn.make_folds(phantom.gradients, 8),
    )
    start, v, changed = fit_tissue(series).fitted, 9, noise.copy()
    changed[..., v] = noise[..., v] + 300 * np.random.default_rng(0).random(noise.shape[:3], np.float32)
    say = lambda data: learn.predict_volumes(
        net.eval(),
        learn.qnet_channels(check_series(data, phantom.gradients, phantom.mask), start, folds, 1000.0),
        [v],
        start / 1000,
    )[..., v]
    np.testing.assert_array_equal(say(changed), say(noise))
    assert np.abs(say(noise) - start[..., v] / 1000).max() > 1e-3


# what networks are trained on


def test_crops_of_image_target_and_weight_lie_on_each_other():
    "Channel 0 is the target and the weight is made of it, so a crop that is turned or moved alone shows."
    rng = np.random.default_rng(0)
    stack = rng.random((9, 12, 7, 3), np.float32)
    weight = (stack[..., 0] > 0.7).astype(np.float32)
    case = learn.Case(learn.Channels([learn.volume_channel(stack)]), stack, weight, np.array([0]))
    seen = set()
    for seed in range(40):
        crop = learn.CropDataset([case], size=5).item(0, seed)
        assert torch.equal(crop["x"], crop["y"]) and torch.equal(crop["weight"], (crop["y"] > 0.7).float())
        assert crop["x"].shape == (1, 5, 5, 5)
        seen.add(crop_is_in(stack[..., 0], crop["x"][0].numpy()))
    assert seen == {False, True}  # some are mirrored, some are not


def crop_is_in(image, crop):
    windows = np.lib.stride_tricks.sliding_window_view(image, crop.shape)
    return (windows == crop).all((-3, -2, -1)).any()


def test_a_box_is_drawn_around_a_voxel_that_has_a_weight():
    weight = np.zeros((20, 9, 30))
    weight[11, 4, 17] = 1
    assert learn.draw_box(np.random.default_rng(0), weight, (5, 5, 5)) == Box((9, 2, 15), (14, 7, 20))
    weight[:] = 0
    weight[19, 0, 1] = 1  # at the border it is moved into the image
    assert learn.draw_box(np.random.default_rng(0), weight, (5, 5, 5)) == Box((15, 0, 0), (20, 5, 5))


def test_the_kept_share_of_a_correction_is_the_best_one():
    rng = np.random.default_rng(0)
    change = rng.standard_normal((50, 3))
    for share in (-0.5, 0.0, 0.3, 1.0, 1.7):
        left = share * change + 1e-3 * rng.standard_normal(change.shape)
        assert learn.useful_share(change, left) == pytest.approx(np.clip(share, 0, 1), abs=1e-3)
    assert learn.useful_share(0 * change, change) == 0


def test_qnet_is_judged_where_it_was_not_trained(phantom, noise, monkeypatch):
    series, seen = check_series(noise, phantom.gradients, phantom.mask), {}

    def train(model, cases, *args, **kwargs):
        seen["weight"] = cases[0].weight > 0
        return model

    def judge(change, left):
        seen["judged"] = len(change)
        return 0.0

    monkeypatch.setattr(learn, "train_net", train)
    monkeypatch.setattr(learn, "useful_share", judge)
    learn.qnet(series, series.data)
    trained = seen["weight"]
    assert not (trained & ~phantom.mask).any()
    assert trained.sum() + seen["judged"] == phantom.mask.sum() and seen["judged"] > 0.2 * phantom.mask.sum()


def test_a_blend_of_equal_estimates_is_that_estimate(phantom, noise):
    "The weights sum to one."
    series = check_series(noise, phantom.gradients, phantom.mask)
    same = np.random.default_rng(0).uniform(10, 900, noise.shape).astype(np.float32)
    out = learn.blend(dict.fromkeys(learn.SHARES, same), series)
    np.testing.assert_allclose(out[phantom.mask], same[phantom.mask], rtol=1e-6)
    np.testing.assert_array_equal(out[~phantom.mask], noise[~phantom.mask])


def test_few_volumes_are_predicted_from_their_own_neighbours_too(monkeypatch):
    p, asked = make_phantom(1, (16, 16, 8), scheme="10"), []
    fit = learn.fit_tissue
    monkeypatch.setattr(learn, "fit_tissue", lambda s, **k: asked.append(k["blind"]) or fit(s, **k))
    learn.estimates(check_series(noisy(p, 20), p.gradients, p.mask), p.sigma(20))
    assert asked == ["voxel"]


def test_magnitudes_stay_magnitudes(phantom, monkeypatch):
    "A method that goes below zero is cut there, unless the series itself does."
    below = lambda series, options: series.data - 1e4
    monkeypatch.setitem(METHODS, "below", below)
    x = noisy(phantom, 15.0, 1)
    for data, least in ((x, 0.0), (x - x.max(), None)):
        series = check_series(data, phantom.gradients, phantom.mask)
        out = denoise_series(series, "below").data[phantom.mask]
        assert out.min() == (data[phantom.mask].min() - 1e4 if least is None else least)


@pytest.mark.parametrize("name", ["blend", "qnet"])
def test_the_same_seed_gives_the_same_bytes(files, name, monkeypatch):
    if name == "qnet":
        few_steps(monkeypatch, 10)
    for out in ("out.nii.gz", "again.nii.gz"):
        run("denoise", files[0], out, *files[2:], "--method", name, "--seed", 4)
    assert Path("out.nii.gz").read_bytes() == Path("again.nii.gz").read_bytes()


@pytest.mark.parametrize("name", QUICK)
def test_files_give_what_arrays_give(files, phantom, noise, name):
    "Arrays of nibabel lie in memory the other way round."
    a = denoise(noise, phantom.gradients.bvals, phantom.gradients.bvecs, name, phantom.mask, sigma=60.0)
    b = denoise(
        np.asfortranarray(noise),
        phantom.gradients.bvals,
        phantom.gradients.bvecs,
        name,
        np.asfortranarray(phantom.mask),
        sigma=60.0,
    )
    run("denoise", *files, "--method", name, "--sigma", 60)
    np.testing.assert_allclose(b.data, a.data, atol=1)
    np.testing.assert_allclose(load("out.nii.gz"), a.data, atol=1)
    assert (np.abs(a.data - noise)[phantom.mask].mean(0) > 10).all()


@pytest.mark.parametrize("name", ["mppca", "spatial_linear", "tissue_linear"])
def test_threads(files, name, phantom, noise):
    for n in (1, 2):
        run("denoise", files[0], f"out{n}.nii.gz", *files[2:], "--method", name, "--threads", n)
    difference = load("out1.nii.gz") - load("out2.nii.gz")
    if name == "tissue_linear":  # rounding moves voxels between kinds of tissue
        assert np.sqrt((difference[phantom.mask] ** 2).mean()) < 0.4 * phantom.sigma(15)
    else:
        assert np.abs(difference).max() < 1e-4 * noise.max()


@pytest.mark.parametrize("name", PARTS)
def test_volumes_without_weighting_in_the_middle(phantom, noise, name):
    g, order = phantom.gradients, np.r_[5:20, 0, 2:5, 1, 20:32]
    a = denoise(noise, g.bvals, g.bvecs, name, phantom.mask)
    b = denoise(noise[..., order], g.bvals[order], g.bvecs[order], name, phantom.mask)
    assert b.about["shells"] == a.about["shells"]
    error = lambda d, at: psnr(d.data, phantom.clean[..., at], phantom.mask).mean()
    assert abs(error(a, np.arange(32)) - error(b, order)) < 0.3


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("name", ["blend", *PARTS])
def test_few_slices(phantom, noise, name, slices):
    at = (slice(None), slice(None), slice(3, 3 + slices))
    done, on = (
        denoise(noise[at], phantom.gradients.bvals, phantom.gradients.bvecs, name, phantom.mask[at]),
        ~phantom.gradients.is_b0,
    )
    assert np.isfinite(done.data).all()
    if name in ("mppca", "blend"):
        assert (
            psnr(done.data, phantom.clean[at], phantom.mask[at])[on].mean()
            > psnr(noise[at], phantom.clean[at], phantom.mask[at])[on].mean()
        )


@pytest.mark.parametrize("name", QUICK)
def test_a_mask_of_one_block(phantom, noise, name):
    mask = np.zeros_like(phantom.mask)
    mask[9:15, 8:14, 1:7] = phantom.mask[9:15, 8:14, 1:7]
    assert np.isfinite(
        denoise(noise, phantom.gradients.bvals, phantom.gradients.bvecs, name, mask).data
    ).all()


@pytest.mark.parametrize("name", PARTS)
def test_a_mask_that_is_mostly_background(phantom, noise, name):
    big = np.zeros((30, 30, 8, 32), np.float32)
    big[6:24, 6:24] = np.where(phantom.mask[..., None], noise, 0)
    assert np.isfinite(
        denoise(big, phantom.gradients.bvals, phantom.gradients.bvecs, name, np.ones(big.shape[:3])).data
    ).all()


def test_arrays_are_checked_too(phantom, noise):
    g = phantom.gradients
    with pytest.raises(InputError, match="four axes"):
        denoise(noise[..., 0], g.bvals, g.bvecs)
    with pytest.raises(InputError, match="four axes"):
        denoise(3.0, g.bvals, g.bvecs)
    with pytest.raises(InputError, match="same grid"):
        denoise(noise, g.bvals, g.bvecs, mask=phantom.mask[1:])
    with pytest.raises(InputError, match="mppca"):
        denoise(noise, g.bvals, g.bvecs, "mpca")
    done = denoise(noise, g.bvals, g.bvecs.T, "mppca")  # a mask is found
    share = (done.series.mask & phantom.mask).sum() / phantom.mask.sum()
    assert share > 0.7


# scores


def test_the_truth_is_perfect(phantom):
    table(phantom, "clean"), image(phantom.clean, "clean.nii.gz"), image(phantom.mask, "mask.nii.gz")
    run("eval", "clean.nii.gz", "--truth", "clean.nii.gz", "--mask", "mask.nii.gz")
    found = json.loads(Path("clean_eval.json").read_text())
    assert (
        found["psnr_db"] in (float("inf"), None, "inf")
        and found["fa_rmse"] == 0
        and abs(found["ssim"] - 1) < 1e-6
        and abs(found["edge_slope"] - 1) < 1e-6
    )


def test_the_better_result_scores_better(phantom, noise):
    g = phantom.gradients
    worse, better = (
        score_against_truth(check_series(d, g, phantom.mask), phantom.clean)
        for d in (noise, denoise(noise, g.bvals, g.bvecs, "mppca", phantom.mask).data)
    )
    assert (
        better["psnr_db"] > worse["psnr_db"]
        and better["ssim"] > worse["ssim"]
        and better["fa_rmse"] < worse["fa_rmse"]
    )


def test_mask_and_threshold_come_from_the_report(files, phantom):
    change("in.bval", "0", "60")
    run("denoise", *files, "--method", "loo_linear", "--b0-threshold", 100)
    image(phantom.clean, "clean.nii.gz")
    run("eval", "out.nii.gz", "--truth", "clean.nii.gz", "--out", "from_report.json")
    run("eval", "out.nii.gz", "--truth", "clean.nii.gz", "--mask", "mask.nii.gz", "--out", "given.json")
    assert Path("from_report.json").read_bytes() == Path("given.json").read_bytes()


def test_heldout(files, phantom, tmp_path, monkeypatch):
    image(np.where(phantom.mask, phantom.sigma(15), 0), "level.nii.gz")
    run("denoise", *files, "--method", "tissue", "--sigma", "level.nii.gz")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")  # the report knows its files
    run("eval", "../out.nii.gz", "--heldout")
    found = json.loads(Path("../out_eval.json").read_text())
    assert (
        0.8 < found["heldout_rmse_over_sigma"] < found["heldout_rmse_over_sigma_noisy"] < 2
        and abs(found["sigma"] / phantom.sigma(15) - 1) < 1e-3
    )


def test_bad_evaluation(files, capsys, noise):
    run("denoise", *files, "--method", "loo_linear")
    refused(capsys, "--truth", "eval", "out.nii.gz")
    refused(capsys, "--truth", "eval", "out.nii.gz", "--truth", "in.nii.gz", "--heldout")
    refused(capsys, "no file", "eval", "out.nii.gz", "--truth", "none.nii.gz")
    refused(capsys, "report", "eval", "in.nii.gz", "--heldout")
    image(noise[:-1], "small.nii.gz")
    refused(capsys, "expected the same series", "eval", "out.nii.gz", "--truth", "small.nii.gz")
    Path("taken").write_text("a file")
    refused(
        capsys,
        "nothing can be written",
        "eval",
        "out.nii.gz",
        "--truth",
        "in.nii.gz",
        "--out",
        "taken/scores.json",
    )
    for damaged in ("{", "{}", "[1]", "null", '{"input": 1}'):
        Path("out_denoise.json").write_text(damaged)
        refused(capsys, "out_denoise.json is not a report", "eval", "out.nii.gz", "--heldout")


# phantoms


def test_phantom_files(capsys):
    run("phantom", "a", "--seed", 5, "--snr", 10, "--scheme", "10", "--shape", "16,16,8")
    run("phantom", "b", "--seed", 5, "--snr", 10, "--scheme", "10", "--shape", "16,16,8")
    assert sorted(p.name for p in Path("a").iterdir()) == [
        "clean.nii.gz",
        "dwi.bval",
        "dwi.bvec",
        "dwi.nii.gz",
        "mask.nii.gz",
        "phantom.json",
    ]
    for p in Path("a").iterdir():
        assert p.read_bytes() == (Path("b") / p.name).read_bytes()
    assert (
        load("a/dwi.nii.gz").shape == (16, 16, 8, 10)
        and json.loads(Path("a/phantom.json").read_text())["snr"] == 10
    )
    refused(capsys, "is there already", "phantom", "a", "--shape", "16,16,8")
    Path("c").mkdir(), Path("c/mask.nii.gz").write_text("mine")
    refused(capsys, "mask.nii.gz is there already", "phantom", "c", "--shape", "16,16,8")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--scheme", "99"], "99"),
        (["--shape", "16,16"], "shape"),
        (["--shape", "a,b,c"], "shape"),
        (["--shape", "4,4,4"], "expected x y z of 8"),
        (["--snr", "0"], "snr"),
        (["--snr", "-2"], "snr"),
        (["--snr", "nan"], "snr"),
        (["--family", "fish"], "fish"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_phantom(capsys, args, words):
    refused(
        capsys, words, "phantom", "new", *(["--shape", "16,16,8"] if "--shape" not in args else []), *args
    )

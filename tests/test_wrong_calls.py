"""A catalogue of wrong calls over all commands, derived from signatures: each is refused in one line with exit code 2, loads no
torch where it can be seen beforehand, and changes nothing in the working folder."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinolab.cli.main import run_command
from dinolab.core.signatures import expected_type, signature_of
from dinolab.tasks.recipes import RECIPES

HEAVY = ("torch", "transformers", "peft", "timm", "accelerate", "zarr")
NOT_NUMBERS = ("-1", "nan", "inf", "-inf", "many", "")
FUNCTIONS = {
    ("unet3plus", "train"): "dinolab.tasks.spark:train_unet3plus",
    ("unet3plus", "eval"): "dinolab.tasks.spark:evaluate_unet3plus",
    ("unet3plus", "infer"): "dinolab.tasks.spark:infer_unet3plus",
    ("dwi", "denoise"): "dinolab.dwi.denoise:denoise_files",
    ("dwi", "phantom"): "dinolab.dwi.denoise:phantom_files",
    ("dwi", "eval"): "dinolab.dwi.denoise:evaluate_files",
    ("features",): "dinolab.cli.extract:features_of_source",
}
NEEDED = {
    ("unet3plus", "infer"): ("--model_path", "here", "--data_path", "here"),
    ("dwi", "denoise"): ("here", "out.nii.gz", "--bval", "here", "--bvec", "here"),
    ("dwi", "phantom"): ("brain",),
    ("dwi", "eval"): ("here", "--heldout"),
    ("features",): ("here", "out.zarr"),
}
ANY_SIGN = {"channel", "time", "ignore", "lsd_sigma", "b0_threshold"}  # -1 may have a meaning


def is_number(setting):
    "Whether a setting is a number, by type or by rule."
    return expected_type(setting) in (int, float) or setting.rule is not None


def flag_calls():
    "Every numeric flag of the commands that call one function, with everything that is no such number."
    for command, place in FUNCTIONS.items():
        dash = "_" if command[0] == "unet3plus" else "-"
        for setting in signature_of(place).settings:
            if not setting.named or not is_number(setting):
                continue
            flag = f"--{setting.name.replace('_', dash)}"
            for value in NOT_NUMBERS:
                if value == "-1" and setting.name in ANY_SIGN:
                    continue
                yield (*command, *NEEDED.get(command, ()), f"{flag}={value}")


def key_calls():
    "Every numeric key of the recipes, also with a list and a text, and every key that holds settings."
    for command, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            start = (command, f"recipe={name}", *(("run=here",) if command != "train" else ()))
            if command == "predict":
                start = (*start, "source=here", "store=out")
            for setting in signature_of(recipe.settings).settings:
                if setting.nested:
                    yield (*start, f"{setting.name}=5")
                    yield (*start, f"{setting.name}.no_such_key=1")
                    for inner in setting.nested.settings:
                        if expected_type(inner) in (int, float):
                            for value in ("-1", "nan", "many", "[1,2]"):
                                yield (*start, f"{setting.name}.{inner.name}={value}")
                elif isinstance(setting.default, (int, float)) and not isinstance(setting.default, bool):
                    for value in ("nan", "inf", "many", "{a: 1}", "[1,2,3,4,5]", "true"):
                        yield (*start, f"{setting.name}={value}")
                    if setting.name not in ANY_SIGN:
                        yield (*start, f"{setting.name}=-1")
                elif isinstance(setting.default, bool):
                    yield (*start, f"{setting.name}=5")
                    yield (*start, f"{setting.name}=maybe")


def other_calls():
    "Unknown commands, flags and keys, missing files, folders for files, odd names."
    for command in FUNCTIONS:
        yield (*command, *NEEDED.get(command, ()), "--no-such-flag", "3")
        yield (*command, "--no-such-flag")
    for command in RECIPES:
        yield (command,)
        yield (command, "nosuchkey=1")
        yield (command, "recipe=none")
        yield (command, "--config", "none.yaml")
        yield (command, "--config", "here")
        yield (command, "--config", "bad.yaml", "x=1")
        yield (command, "--config", "list.yaml", "x=1")
        yield (command, "crop: 3")
        yield (command, "=3")
        yield (command, "run=none")
        yield (command, "run=here")
        yield (command, "run=damaged", "recipe=unet3d")
        yield (command, "manifest=none")
        yield (command, "manifest=bad.yaml")
        yield (command, "--no-such-flag", "3")
    for key in ("raw_data", "gt_data", "mask_data"):
        yield ("train", f"{key}=none.zarr")
        yield ("train", f"{key}=[none.zarr, other.zarr]")
    for key in ("images", "masks", "table"):
        yield ("train", "recipe=segmenter", f"{key}=none")
    yield ("train", "weights=none.pth", "raw_data=here", "gt_data=here")
    yield ("predict", "one_path")
    yield ("predict", "none.png", "out", "run=here")
    yield ("predict", "--workers", "0", "a", "b")
    yield ("predict", "--cluster", "moon", "a", "b")
    yield ("predict", "--job", "queue=x", "a", "b")
    yield ("features",)
    yield ("features", "none.zarr", "out.zarr")
    yield ("features", "none/deeper.npy", "out.zarr")
    yield ("features", "here", "out.zarr", "--weights", "none.pth")
    yield ("features", "here", "out.zarr", "--layers", "1.5")
    yield ("features", "here", "out.zarr", "--intensity", "5")
    yield ("features", "here", "out.zarr", "--intensity", "5,1")
    yield ("features", "here", "out.zarr", "--cluster", "moon")
    yield ("features", "here", "out.zarr", "--job-script")
    yield ("features", "here", "out.zarr", "more")
    yield ("unet3plus", "train", "--data_root", "none")
    yield ("unet3plus", "train", "--backbone_weights", "none.pth")
    yield ("unet3plus", "train", "more")
    yield ("unet3plus", "train", "pretrained=maybe")
    yield ("unet3plus", "train", "--decoder", "none")
    yield ("unet3plus", "train", "--device", "tpu")
    yield ("unet3plus", "eval", "--model_path", "none")
    yield ("unet3plus", "eval", "--val_csv", "none.csv")
    yield ("unet3plus", "infer")
    yield ("unet3plus", "infer", "--model_path", "none", "--data_path", "here")
    yield ("unet3plus", "infer", "--model_path", "here", "--data_path", "none")
    yield ("dwi", "denoise")
    yield ("dwi", "denoise", "none.nii.gz", "out.nii.gz", "--bval", "here", "--bvec", "here")
    yield ("dwi", "denoise", "here", "out.nii.gz", "--bval", "none", "--bvec", "here")
    yield ("dwi", "denoise", "here", "out.nii.gz", "--bval", "here", "--bvec", "none")
    yield ("dwi", "denoise", "here", "out.nii.gz", "--bval", "here", "--bvec", "here", "--mask", "none")
    yield ("dwi", "eval", "none.nii.gz", "--heldout")
    yield (
        "dwi",
        "phantom",
    )
    for name in ("setup", "setup x", "setup 1", "setup 1 crop=0", "setup 1 nosuchkey=1", "setup 1 --no-such"):
        yield ("nnunet", *name.split())
    for name in ("", "none", "../x", "bad.yaml", "here", "a b", "null", "1e3", "2024_01"):
        yield ("data", "check", name)
        yield ("data", "get", name)
        yield ("run", f"{name or 'no'}x")
        yield ("gather", f"no{name}")
    yield ("data", "list", "--folder", "none")
    yield ("data", "list", "--folder", "empty")
    yield ("run", "none.ipynb")
    yield ("run", "bad.yaml.ipynb")
    yield ("run", "toy.ipynb", "-p", "steps")
    yield ("run", "toy.ipynb", "-p", "stepz", "3")
    yield ("run", "toy.ipynb", "-p", "steps", "many")
    yield ("run", "toy.ipynb", "--outt", "x")
    yield ("keep", "none")
    yield ("keep", "here")
    yield ("gather", "runs", "--format", "none")
    yield ("gather", "--experiment")
    yield ("gather", "a", "b")
    yield ("nosuchcommand",)
    yield ("--no-such-option",)
    yield ("unet3plus", "none")
    yield ("dwi", "none")
    yield ("info", "more")


CALLS = list(dict.fromkeys([*other_calls(), *flag_calls(), *key_calls()]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A working folder with things that are not what a call takes them for."
    root = tmp_path_factory.mktemp("wrong")
    (root / "here").mkdir()
    (root / "here/note.txt").write_text("nothing")
    (root / "empty").mkdir()
    (root / "damaged").mkdir()
    (root / "damaged/run.json").write_text("{")
    (root / "runs").mkdir()
    (root / "bad.yaml").write_text("a: [1,\n")
    (root / "list.yaml").write_text("- 1\n- 2\n")
    (root / "bad.yaml.ipynb").write_text("{")
    toy = Path(__file__).parent / "notebooks/toy.ipynb"
    (root / "toy.ipynb").write_text(toy.read_text())
    return root


def content(root):
    "Every file with its bytes, every folder."
    paths = sorted(Path(root).rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


def call(args):
    "Exit code and standard error of a call, made in this process."
    err, out = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = run_command(list(args))
    os.environ.clear()
    os.environ.update(before)
    return code, err.getvalue()


def faults(args, root):
    "What is not as it should be with a refusal."
    before, loaded = content(root), {m for m in HEAVY if m in sys.modules}
    try:
        code, said = call(args)
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    if code != 2:
        return f"exit code {code}: {said!r}"
    if not re.fullmatch(r"dinolab: [^\n]+\n", said):
        return f"not one line: {said!r}"
    if "No such command" in said and not {"none", "nosuchcommand"} & set(args):
        return said
    if content(root) != before:
        return "the folder changed"
    new = {m for m in HEAVY if m in sys.modules} - loaded
    return f"loaded {new}" if new else ""


def test_the_catalogue_is_large():
    "And its commands are there: a right call of each group is answered."
    assert len(CALLS) >= 400
    assert call(("nnunet", "path"))[0] == 0 and call(("train", "--keys"))[0] == 0


@pytest.mark.parametrize("args", CALLS, ids=lambda args: " ".join(args)[:80])
def test_all_are_refused(args, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert faults(args, folder) == ""


def test_refusals_load_nothing_heavy(folder):
    "In a process of its own, since tests have loaded torch before."
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_wrong_calls as t\n"
        "found = {' '.join(a): t.faults(a, '.') for a in t.CALLS[::9]}\n"
        "sys.exit(str({a: f for a, f in found.items() if f}) if any(found.values()) else 0)"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr

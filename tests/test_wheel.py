"A wheel holds all that a clone can do, and nothing that only builds the site."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (
    "settings.ini",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
FOLDERS = ("dinolab", "nbs/experiments", "data_manifests")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with what is in the wheel."
    source, wheels, site = (tmp_path_factory.mktemp(n) for n in ("source", "wheels", "site"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(wheels),
    ]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    shutil.unpack_archive(next(wheels.glob("*.whl")), site, "zip")
    return site


def test_what_is_in_it(site):
    assert not (site / "dinolab/site").exists()
    for name in (
        "py.typed",
        "dwi/simnet.safetensors",
        "_data/manifests/em_phantom.yaml",
        "_data/configs/upernet.yaml",
    ):
        assert (site / "dinolab" / name).is_file(), name
    experiments = {p.name for p in (ROOT / "nbs/experiments").glob("*.ipynb")}
    assert {p.name for p in (site / "dinolab/_data/experiments").glob("*.ipynb")} == experiments
    launch = {p.name for p in (ROOT / "nbs/experiments/launch").iterdir()}
    assert {p.name for p in (site / "dinolab/_data/launch").iterdir()} == launch
    about = next(site.glob("*.dist-info/METADATA")).read_text()
    assert "Typing :: Typed" in about
    assert "](nbs/" not in about and "](https://github.com/dinolab/dinolab/blob/main/nbs/" in about


def test_commands_find_what_they_need(site, tmp_path):
    "From an empty folder, without the clone."
    env = {**os.environ, "PYTHONPATH": str(site)}

    def said(*args):
        command = [sys.executable, "-c", "from dinolab.cli.main import main; main()", *args]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import dinolab; print(dinolab.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site))
    assert "multires_features" in said("run")
    assert "em_phantom" in said("data", "list")
    assert "crops_per_epoch" in said("train", "--config", "upernet.yaml", "--keys")
    assert Path(said("nnunet", "path").strip()).is_dir()

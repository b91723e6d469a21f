"The two layer rules, and what may be imported."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GATEWAYS = dict(
    pydantic="data.manifest",
    matplotlib="core.show",
    nibabel="volumes.formats",
    tifffile="volumes.formats",
    zarr="volumes.arrays",
    h5py="volumes.hdf5",
    mrcfile="volumes.mrc",
    tensorstore="volumes.precomputed",
    dask="volumes.cluster",
    distributed="volumes.cluster",
    dask_jobqueue="volumes.cluster",
    cloudpickle="volumes.cluster",
    timm="models.architectures",
    huggingface_hub="models.pretrained",
    skimage="volumes.instances",
    mwatershed="volumes.instances",
    peft="models.lora",
    transformers="models.heads",
    accelerate="train.loop",
    omegaconf="tasks.recipes",
    deepspeed="train.distributed",
    papermill="book.experiment",
    nbformat="book.experiment",
    jupyter_client="book.experiment",
    nnunetv2="tasks.nnunet",
    typer="cli",
    onnx="tasks.export",
    onnxruntime="tasks.export",
)
NOTEBOOKS = sorted((ROOT / "nbs/api").rglob("*.ipynb"))


def pages(items):
    "Paths below nbs of a part of the sidebar, in order."
    return [
        page for item in items for page in (pages(item["contents"]) if isinstance(item, dict) else [item])
    ]


SIDEBAR = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
LISTED = pages(SIDEBAR)
LIBRARY = [page for page in LISTED if page.startswith("api/")]
PACKAGE = "api/names.ipynb"  # makes dinolab/__init__.py, which stands above all rooms
ROOMS = list(dict.fromkeys(page.split("/")[1] for page in LIBRARY if page != PACKAGE))


def exported_imports(path):
    "Module name of a notebook, and the modules that its exported cells import."
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    name = next(re.search(r"#\|\s*default_exp\s+(\S+)", c)[1] for c in cells if "default_exp" in c)
    trees = [ast.parse(c) for c in cells if re.match(r"#\|\s*export", c)]
    nodes = [n for t in trees for n in ast.walk(t)]
    return name, {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module
    }


FOUND = {str(p.relative_to(ROOT / "nbs")): exported_imports(p) for p in NOTEBOOKS}
MODULES = dict(FOUND.values())
ORDER = {FOUND[page][0]: place for place, page in enumerate(LIBRARY)}


@pytest.mark.parametrize("name", MODULES)
def test_layers(name):
    "The sidebar of the site states the order: a notebook imports only what stands above it, and heavy packages through one module each."
    for imported in MODULES[name]:
        if imported.startswith("dinolab."):
            lower = imported.removeprefix("dinolab.")
            assert ORDER[lower] < ORDER[name], f"{name} imports {lower}, which stands below it in _quarto.yml"
        gateway = GATEWAYS.get(imported.split(".")[0], name)
        assert name == gateway or name.startswith(f"{gateway}."), (
            f"{name} imports {imported}, which enters through {gateway}"
        )


def test_rooms():
    "Few arrows between rooms, and a notebook lies in the room of its module."
    assert LIBRARY[-1] == PACKAGE and FOUND[PACKAGE][0] == "__init__"
    assert all(page.split("/")[1] == FOUND[page][0].split(".")[0] for page in LIBRARY if page != PACKAGE)
    arrows = {
        (name.split(".")[0], imported.split(".")[1])
        for name, found in MODULES.items()
        for imported in found
        if imported.startswith("dinolab.") and name != "__init__"
    }
    arrows = {(a, b) for a, b in arrows if a != b}
    assert all(ROOMS.index(b) < ROOMS.index(a) for a, b in arrows)
    assert len(arrows) <= 60, sorted(arrows)


def test_rules_are_checked():
    "The rules would see a violation: volumes stand on the core, and zarr is imported somewhere."
    assert (
        "dinolab.core.errors" in MODULES["volumes.volume"] and ORDER["core.errors"] < ORDER["volumes.volume"]
    )
    assert any("zarr" in m for m in MODULES["volumes.arrays"])


def test_light_import():
    "`import dinolab` loads nothing of weight."
    code = "import sys, dinolab; print([m for m in ('torch', 'numpy', 'zarr', 'timm', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_runtime_requirements_only():
    "Every module imports with none of the development tools and extras at hand."
    banned = [
        "nbdev",
        "fastcore",
        "execnb",
        "pytest",
        "hypothesis",
        "dask",
        "distributed",
        "dask_jobqueue",
        "tensorstore",
        "ome_zarr",
        "ngff_zarr",
        "yaozarrs",
        "nnunetv2",
        "dipy",
        "torchmetrics",
        "monai",
        "tensorboard",
        "mwatershed",
        "onnx",
        "onnxruntime",
        "onnxscript",
    ]
    code = f"import sys, importlib\nfor m in {banned}: sys.modules[m] = None\nfor m in {sorted(set(MODULES) - {'__init__'})}: importlib.import_module('dinolab.' + m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_settings_and_site_agree():
    "settings.ini and _quarto.yml say the same of the site."
    import configparser

    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    cfg, site = cfg["DEFAULT"], yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert site["website"]["title"] == cfg["title"] and site["website"]["repo-url"] == cfg["git_url"]
    assert (
        site["website"]["site-url"] == cfg["doc_host"] + cfg["doc_baseurl"]
        and site["project"]["output-dir"] == cfg["doc_path"]
    )


def test_sidebar_lists_every_notebook():
    "No page is missing from the site, and none is listed that does not exist."
    there = [
        str(p.relative_to(ROOT / "nbs"))
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in str(p)
    ]
    assert sorted(LISTED) == sorted(there)


def test_parameters_survive_cleaning():
    "Every experiment keeps the tag without which papermill would silently use the defaults."
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, path.name
        names = {
            n.id
            for t in ast.parse("".join(tagged[0]["source"])).body
            for n in ast.walk(t)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        assert {"seed", "smoke", "manifest", "out", "launcher"} <= names, path.name

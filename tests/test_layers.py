"The two layer rules, and what may be imported."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GATEWAYS = dict(pydantic="manifest", matplotlib="show", nibabel="formats", tifffile="formats", zarr="volume", dask="cluster", distributed="cluster", dask_jobqueue="cluster", cloudpickle="cluster", timm="backbones",
                huggingface_hub="backbones", skimage="instances", mwatershed="instances", peft="adapt", transformers="heads", accelerate="engine", omegaconf="recipes",
                deepspeed="spread", papermill="experiment", nbformat="experiment", jupyter_client="experiment", nnunetv2="nnunet", typer="cli", click="cli")
NOTEBOOKS = sorted((ROOT/"nbs/api").glob("*.ipynb"))


def exported_imports(path):
    "Module name of a notebook, and the modules that its exported cells import."
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    name = next(re.search(r"#\|\s*default_exp\s+(\S+)", c)[1] for c in cells if "default_exp" in c)
    trees = [ast.parse(c) for c in cells if re.match(r"#\|\s*export", c)]
    nodes = [n for t in trees for n in ast.walk(t)]
    return name, {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}


MODULES = dict(exported_imports(p) for p in NOTEBOOKS)
ORDER = {exported_imports(p)[0]: p.name for p in NOTEBOOKS}


@pytest.mark.parametrize("name", MODULES)
def test_layers(name):
    for imported in MODULES[name]:
        if imported.startswith("dinolab."):
            lower = imported.removeprefix("dinolab.")
            assert ORDER[lower] < ORDER[name], f"{ORDER[name]} imports the higher {ORDER[lower]}"
        gateway = GATEWAYS.get(imported.split(".")[0], name)
        assert name == gateway, f"{ORDER[name]} imports {imported}, which enters through {gateway}"


def test_rules_are_checked():
    "The rules would see a violation: volume is above core, and zarr is imported somewhere."
    assert "dinolab.core" in MODULES["volume"] and ORDER["core"] < ORDER["volume"]
    assert any("zarr" in m for m in MODULES["volume"])


def test_light_import():
    "`import dinolab` loads nothing of weight."
    code = "import sys, dinolab; print([m for m in ('torch', 'numpy', 'zarr', 'timm', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_runtime_requirements_only():
    "Every module imports with none of the development tools and extras at hand."
    banned = ["nbdev", "fastcore", "execnb", "pytest", "hypothesis", "dask", "distributed", "dask_jobqueue", "tensorstore", "ome_zarr", "ngff_zarr", "yaozarrs", "nnunetv2", "dipy", "torchmetrics", "monai", "tensorboard", "mwatershed"]
    code = f"import sys, importlib\nfor m in {banned}: sys.modules[m] = None\nfor m in {sorted(MODULES)}: importlib.import_module('dinolab.' + m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_settings_and_site_agree():
    "settings.ini and _quarto.yml say the same of the site."
    import configparser
    import yaml
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini")
    cfg, site = cfg["DEFAULT"], yaml.safe_load((ROOT/"_quarto.yml").read_text())
    assert site["website"]["title"] == cfg["title"] and site["website"]["repo-url"] == cfg["git_url"]
    assert site["website"]["site-url"] == cfg["doc_host"] + cfg["doc_baseurl"] and site["project"]["output-dir"] == cfg["doc_path"]


def test_sidebar_lists_every_notebook():
    "No page is missing from the site, and none is listed that does not exist."
    import yaml
    def files(items): return [f for i in items for f in (files(i["contents"]) if isinstance(i, dict) else [i])]
    listed = files(yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    there = [str(p.relative_to(ROOT/"nbs")) for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in str(p)]
    assert sorted(listed) == sorted(there)


def test_parameters_survive_cleaning():
    "Every experiment keeps the tag without which papermill would silently use the defaults."
    for path in (ROOT/"nbs/experiments").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, path.name
        names = {n.id for t in ast.parse("".join(tagged[0]["source"])).body for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert {"seed", "smoke", "manifest", "out", "launcher"} <= names, path.name

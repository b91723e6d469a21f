"Names that dinolab promises, and the paths of the last release."

import ast
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import dinolab
from dinolab.core import names

OLD = json.loads((Path(__file__).parent / "names_0_6_0.json").read_text())
NO_LONGER_THINGS = {"cli.main"}  # the path of a module now, which holds the function of that name


def test_light():
    "The package and its old paths load nothing of weight before a name is used."
    code = (
        "import sys, dinolab, dinolab.volume, dinolab.features\n"
        "assert 'create_backbone' in dir(dinolab) and 'create_backbone' in dinolab.__all__\n"
        "assert not [m for m in ('torch', 'numpy', 'zarr', 'omegaconf', 'tqdm') if m in sys.modules]\n"
        "from dinolab import Box, InputError\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", names.PROMISED)
def test_promised(name):
    "A promised name is the thing of that name in its module, which exports it."
    module = names.PROMISED[name]
    assert module in names.exported().get(name, ()), (
        f"{name} is not in {module}: tell nbs/api/core/names.ipynb and nbs/api/names.ipynb where it went"
    )
    assert getattr(dinolab, name) is getattr(importlib.import_module(f"dinolab.{module}"), name)


def test_type_checkers_see_the_same():
    "The imports that editors read are the table that Python reads."
    body = ast.parse(Path(dinolab.__file__).read_text()).body
    (block,) = [node for node in body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("dinolab.")
        for node in block.body
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == names.PROMISED


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        dinolab.no_such_name
    with pytest.raises(ImportError):
        from dinolab import no_such_name  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dinolab.no_such_module")


def test_every_old_module_is_known():
    assert set(OLD) <= set(names.OLD)
    for module in names.OLD.values():
        importlib.import_module(f"dinolab.{module}") if "nnunet_trainers" not in module else None


@pytest.mark.parametrize("old", OLD)
def test_old_paths(old):
    "Every public name of 0.6.0 is found by its old path, and the way is told, once."
    module = importlib.import_module(f"dinolab.{old}")
    for name in OLD[old]:
        if f"{old}.{name}" in NO_LONGER_THINGS or f"{old}.{name}" in names.GONE:
            continue
        module.__dict__.pop(name, None) if isinstance(module.__loader__, names.GoneModule) else None
        there = name in vars(module)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = getattr(module, name)
        assert found is getattr(module, name)
        mine = [str(w.message) for w in told if str(w.message).startswith(f"dinolab.{old}.{name} is now ")]
        assert len(mine) == (0 if there else 1), name


def test_what_is_gone_says_so():
    for path, advice in names.GONE.items():
        old, _, name = path.rpartition(".")
        with pytest.raises(AttributeError, match="is gone"):
            getattr(importlib.import_module(f"dinolab.{old}"), name)
        assert advice and name in OLD[old]


def test_renames_lead_somewhere():
    for path, place in names.RENAMED.items():
        old, _, name = path.rpartition(".")
        module, _, now = place.rpartition(".")
        assert name in OLD[old] and module in names.exported()[now], path


def test_warning_names_both_roads():
    module = importlib.import_module("dinolab.engine")
    module.__dict__.pop("fit", None)
    with pytest.warns(DeprecationWarning) as told:
        from dinolab.engine import fit
    assert fit is dinolab.fit and fit.__module__ == f"dinolab.{names.PROMISED['fit']}"
    expected = f"dinolab.engine.fit is now dinolab.{names.PROMISED['fit']}.fit, or dinolab.fit;"
    (mine,) = [w for w in told if "engine.fit" in str(w.message)]
    assert str(mine.message).startswith(expected) and mine.filename == __file__


def test_pickles_of_old_paths():
    "What was pickled by 0.6.0 under its path is found."
    import pickle

    made = b"cdinolab.run\nRun\n."
    assert pickle.loads(made) is dinolab.Run


def test_export_repeats_itself():
    "nbdev keeps the version where it is, above what the notebook exports."
    lines = Path(dinolab.__file__).read_text().splitlines()
    assert lines[0] == f'__version__ = "{dinolab.__version__}"'
    assert any("nbs/api/names.ipynb" in line for line in lines[:5])

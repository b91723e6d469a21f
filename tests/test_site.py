"The front page and the README."

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, page", dict({"README.md": "index", "CONTRIBUTING.md": "contribute"}).items())
def test_files_of_the_root_are_pages(name, page):
    from dinolab.site.docs import readme

    assert (ROOT / name).read_text(encoding="utf-8") == readme(ROOT / f"nbs/{page}.ipynb"), "run make readme"


def test_results_are_those_of_the_summaries(tmp_path, monkeypatch):
    "The committed page is what make results writes, plots included."
    from dinolab.site.docs import write_results

    page = ROOT / "nbs/results.ipynb"
    shutil.copy(page, tmp_path / "results.ipynb")
    monkeypatch.chdir(ROOT)
    write_results("nbs/results", tmp_path / "results.ipynb")
    assert (tmp_path / "results.ipynb").read_text() == page.read_text(), "run make results"
    experiments = {p.stem for p in (ROOT / "nbs/experiments").glob("*.ipynb")}
    kept = {p.stem for p in (ROOT / "nbs/results").glob("*.json")}
    assert experiments <= kept <= experiments | {"gpu_check"}, (
        f"without a kept run: {experiments - kept}; without an experiment: {kept - experiments}"
    )


def test_formulas_can_be_drawn():
    "Each formula becomes MathML; commands have one backslash (two break the line and print the name)."
    from latex2mathml.converter import convert

    found = [
        m
        for p in (ROOT / "nbs").rglob("*.ipynb")
        for c in json.loads(p.read_text())["cells"]
        if c["cell_type"] == "markdown"
        for m in re.findall(
            r"\$\$?([^$\n]+)\$\$?", re.sub(r"```.*?```|`[^`]*`", "", "".join(c["source"]), flags=re.S)
        )
    ]
    assert len(found) > 50
    for formula in found:
        assert not re.search(r"\\\\[A-Za-z]", formula), formula
        assert "<math" in convert(formula)


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_shell_lines_of_the_readme_name_real_commands():
    "Every `dinolab` command of the README parses: its help exists and knows the options used."
    lines = re.findall(r"^dinolab (.+?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) >= 4
    for line in lines:
        words = line.split()
        command = words[:2] if words[0] in ("data", "dwi", "nnunet", "unet3plus") else words[:1]
        done = subprocess.run(
            [sys.executable, "-c", "from dinolab.cli.main import main; main()", *command, "--help"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, line
        for option in (w for w in words if w.startswith("--")):
            assert option in done.stdout, f"{option} of: {line}"


def test_make_says_what_is_missing(tmp_path):
    "One line for a missing or old Python."
    for name in ("settings.ini", "setup.py"):
        (tmp_path / name).touch()
    for python in ("/no/python3", "false"):
        done = subprocess.run(
            ["make", "-f", str(ROOT / "Makefile"), "-C", str(tmp_path), "setup", f"PYTHON={python}"],
            capture_output=True,
            text=True,
        )
        said = [l for l in (done.stdout + done.stderr).splitlines() if not l.startswith("make")]
        assert done.returncode == 2 and len(said) == 1 and "Python >= 3.10 is needed" in said[0], (
            done.stdout + done.stderr
        )

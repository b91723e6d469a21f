"The front page and the README."
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_is_the_front_page():
    from dinolab.docs import readme
    assert (ROOT/"README.md").read_text(encoding="utf-8") == readme(ROOT/"nbs/index.ipynb"), "run make readme"


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", (ROOT/"README.md").read_text()): assert (ROOT/target).exists(), target


def test_shell_lines_of_the_readme_name_real_commands():
    "Every `dinolab` command of the README parses: its help exists and knows the options used."
    lines = re.findall(r"^dinolab (.+?)(?:\s+#.*)?$", (ROOT/"README.md").read_text(), re.M)
    assert len(lines) >= 4
    for line in lines:
        words = line.split()
        command = words[:2] if words[0] in ("data", "dwi", "nnunet", "unet3plus") else words[:1]
        done = subprocess.run([sys.executable, "-c", "from dinolab.cli import main; main()", *command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, line
        for option in (w for w in words if w.startswith("--")): assert option in done.stdout, f"{option} of: {line}"


def test_make_says_what_is_missing(tmp_path):
    "One line for a missing or old Python."
    for name in ("settings.ini", "setup.py"): (tmp_path/name).touch()
    for python in ("/no/python3", "false"):
        done = subprocess.run(["make", "-f", str(ROOT/"Makefile"), "-C", str(tmp_path), "setup", f"PYTHON={python}"], capture_output=True, text=True)
        said = [l for l in (done.stdout + done.stderr).splitlines() if not l.startswith("make")]
        assert done.returncode == 2 and len(said) == 1 and "Python >= 3.10 is needed" in said[0], done.stdout + done.stderr

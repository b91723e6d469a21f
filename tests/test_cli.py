"The command line as a shell sees it: exit codes, streams and help."

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dinolab.cli.main import app
from dinolab.train.runs import Run

TOY = str(Path(__file__).parent / "notebooks/toy.ipynb")
MAIN = "from dinolab.cli.main import main; main()"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dinolab(*args, code=MAIN):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


def test_bad_input_is_one_line():
    done = dinolab("run", TOY, "-p", "stepz", "3")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("dinolab: unknown parameter 'stepz': did you mean 'steps'?")
        and done.stderr.count("\n") == 1
    )
    assert not list(Path().iterdir())


def test_failing_cell_is_one_line():
    done = dinolab("run", TOY, "-p", "end", "raise")
    said = [line for line in done.stderr.splitlines() if line.startswith("dinolab:")]
    assert done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr
    assert said[0].startswith("dinolab: toy failed in cell [") and "notebook.ipynb" in said[0]


def test_our_own_failure_is_a_traceback():
    done = dinolab(
        "gather", code="import dinolab.train.runs; dinolab.train.runs.gather = lambda *a: 1/0; " + MAIN
    )
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("runs", [1, 300])  # output that waits in the buffer, and output that fills the pipe
def test_closed_pipe_is_quiet(runs):
    for seed in range(runs):
        Run.create("toy", dict(seed=seed, note="x" * 200 * (runs > 1)))
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    gather = subprocess.Popen(
        [sys.executable, "-c", MAIN, "gather", "--format", "csv"],
        env=buffered,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    gather.stdout.close()
    assert gather.stderr.read() == "" and gather.wait() == 1


def test_help_needs_no_heavy_import():
    code = "import sys\ntry:\n main()\nfinally: print([m for m in ('torch', 'numpy', 'zarr', 'papermill', 'rich', 'pydantic') if m in sys.modules])"
    done = dinolab("--help", code="from dinolab.cli.main import main\n" + code)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(
    "path, command",
    list(commands(typer.main.get_command(app))),
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "",
)
def test_every_option_is_explained(path, command):
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0 and command.help
    assert all(p.help for p in command.params), [p.name for p in command.params if not p.help]


@pytest.mark.parametrize(
    "args, code",
    [
        ((), (0, 2)),
        (("--version",), (0,)),
        (("-h",), (0,)),
        (("rn",), (2,)),
        (("gather", "--formt", "csv"), (2,)),
        (("run", TOY, "-p", "steps"), (2,)),
        (("run", TOY, "--params"), (0,)),
    ],
)
def test_usage(args, code):
    done = dinolab(*args)
    assert done.returncode in code and "Traceback" not in done.stderr


def test_data_list_check_get():
    pytest.importorskip("dinolab.data.fetch")
    folder = str(Path(__file__).parents[1] / "data_manifests")
    listed = CliRunner().invoke(app, ["data", "list", "--folder", folder])
    assert listed.exit_code == 0 and "em_phantom" in listed.stdout
    missing = dinolab("data", "check", "no_such_data", "--folder", folder)
    assert (
        missing.returncode == 2 and missing.stderr.startswith("dinolab: ") and missing.stderr.count("\n") == 1
    )

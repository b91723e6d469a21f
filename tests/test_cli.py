"The command line as a shell sees it: exit codes, streams and help."

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dinolab.cli.main import app, run_command
from dinolab.core.errors import InputError
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


def run_here(*args):
    "Exit code of a call in this process."
    return run_command(list(args))


def test_deepspeed_rank_comes_first(capsys, monkeypatch):
    "The launcher puts its rank before everything; it goes to the environment, the rest is parsed as ever."
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run_here("--local_rank=3", "unet3plus", "train", "--deepspeed", "--epochs", "0") == 2
    assert os.environ.pop("LOCAL_RANK") == "3"
    assert capsys.readouterr().err == "dinolab: epochs=0: expected a whole number of 1 or more\n"


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "Permission denied '/root/x'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2, "Is a directory 'x'"),
        (InputError("two\nlines"), 2, "two lines"),
    ],
)
def test_what_goes_wrong_outside_is_one_line(raised, code, line, capsys, monkeypatch):
    import dinolab.train.runs

    def gather(*args):
        raise raised

    monkeypatch.setattr(dinolab.train.runs, "gather", gather)
    assert run_here("gather") == code
    said = capsys.readouterr().err
    assert said.startswith("dinolab: ") and line in said and said.count("\n") == 1


def test_full_standard_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, "nnunet", "path"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.startswith("dinolab: No space left on device")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line, expected",
    [
        ("dinolab unet3plus tr", "train"),
        ("dinolab unet3plus train --batch", "--batch_size"),
        ("dinolab train train.max_st", "train.max_steps="),
        ("dinolab train --config uper", "upernet.yaml"),
        ("dinolab run multires", "multires_features"),
        ("dinolab data get em_", "em_phantom"),
    ],
)
def test_shell_completion(line, expected, monkeypatch, capsys):
    "What bash asks on TAB, in this process; nothing heavy is loaded for it."
    loaded = set(sys.modules)
    words = line.split()
    monkeypatch.setenv("_DINOLAB_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        app([], prog_name="dinolab")
    assert expected in capsys.readouterr().out.split()
    assert not {"transformers", "peft", "timm", "zarr"} & (set(sys.modules) - loaded)


def test_completion_can_be_installed():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "--install-completion" in shown and "--show-completion" in shown


def test_info(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:secret@packages.example/simple")
    shown = CliRunner().invoke(app, ["info"])
    assert shown.exit_code == 0 and "secret" not in shown.stdout
    for wanted in ("dinolab", "torch", "bf16", "nnunet", "packages.example/simple", "cpu"):
        assert wanted in shown.stdout


@pytest.mark.parametrize(
    "source, store", [("2024_01", "1e3"), ("null", "true"), ("1e3", "null"), ("0x10", "a=b"), ("a=b", "~")]
)
def test_paths_of_predict_are_texts(source, store, monkeypatch):
    "Whatever a folder is called, the recipe gets its name."
    import dinolab.tasks.images

    got = {}
    monkeypatch.setattr(dinolab.tasks.images, "predict_images", lambda **given: got.update(given))
    Path(source).mkdir()
    run = Run.create("segmenter", {})
    assert run_here("predict", source, store, f"run={run.path}") == 0
    assert (got["source"], got["store"]) == (source, store)


def test_flags_are_keys(monkeypatch, capsys):
    "--crop 96 is crop=96."
    assert run_here("train", "recipe=segmenter", "--crop", "-4") == 2
    assert capsys.readouterr().err.startswith("dinolab: crop=-4: expected a whole number")
    assert run_here("train", "--train.epochs=0") == 2
    assert "epochs" in capsys.readouterr().err

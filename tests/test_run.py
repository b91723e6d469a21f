"Runs with real kernels and real signals: what a notebook cannot show well."

import csv
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dinolab.core.errors import InputError
from dinolab.book.experiment import ExperimentError, experiment_parameters, run_experiment
from dinolab.core.files import write_json
from dinolab.core.machine import process_start
from dinolab.train.runs import Run, gather, gather_table

ROOT = Path(__file__).parents[1]
TOY = str(ROOT / "tests/notebooks/toy.ipynb")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def only_run(root="runs"):
    (path,) = Path(root).glob("*/*/run.json")
    return Run.open(path.parent)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "name, value, hint",
    [
        ("stepz", "3", "did you mean 'steps'"),
        ("size", "64", "expected tuple"),
        ("rate", "high", "expected float"),
        ("smoke", "1", "expected bool"),
        ("seed", "None", "expected int"),
    ],
)
def test_refused_before_anything_is_made(name, value, hint):
    with pytest.raises(InputError, match=hint):
        run_experiment(TOY, {name: value})
    assert not list(Path().iterdir())


def test_typed_values_this_python_and_a_clean_copy(tmp_path, monkeypatch):
    "Neither PATH nor a kernel that the user once installed under the same name decides which Python runs."
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(dict(argv=["/bin/false"], display_name="other", language="python"))
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    run = run_experiment(
        TOY, dict(size="(8, 9)", planes="[yz]", weights="12", rate="1"), figures_to="pictures"
    )
    assert (run.path / "seen.txt").read_text().splitlines() == [
        sys.executable,
        str(tmp_path),
        "(8, 9) ['yz'] '12'",
    ]
    assert run.status == "done" and run.path.parts[:2] == ("runs", "toy")
    assert (
        run.params["rate"] == 1.0
        and run.params["out"] == "runs"
        and list(run.params) == list(experiment_parameters(TOY))
    )
    assert run.info["command"] and run.info["machine"]["cores"] >= 1 and run.info["versions"]["python"]
    assert [r["step"] for r in run.history()] == [0, 1, 2] and run.metrics() == {"train/loss": 1.0}
    assert Path("pictures/curve.png").read_bytes() == b"figure"
    copy = (run.path / "notebook.ipynb").read_text()
    assert "50 of 50" in copy and "49 of 50" not in copy
    assert "DINOLAB_RUN" not in os.environ


def test_failing_cell():
    with pytest.raises(
        ExperimentError,
        match=r"toy failed in cell \[\d\], RuntimeError: the loss is high; see .*notebook.ipynb",
    ):
        run_experiment(TOY, dict(end="raise"), figures_to="pictures")
    run = only_run()
    assert run.status == "failed" and run.info["error"] == "RuntimeError: the loss is high"
    assert (
        'raise RuntimeError("the loss is high")' in run.info["traceback"]
        and "papermill" not in run.info["traceback"]
    )
    assert "the loss is high" in (run.path / "notebook.ipynb").read_text()
    assert not Path("pictures").exists()


def test_bad_input_in_a_cell_stays_bad_input():
    with pytest.raises(InputError, match="got a dog: expected a cat"):
        run_experiment(TOY, dict(end="input"))
    assert only_run().status == "failed"


def test_dead_kernel():
    with pytest.raises(ExperimentError, match="died without an error"):
        run_experiment(TOY, dict(end="die"))
    assert only_run().status == "failed"


def start_waiting():
    "A launched experiment that is in the middle of a cell; the launcher and the number of its kernel."
    code = "from dinolab.cli.main import main; main()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, "run", TOY, "-p", "end", "wait"], stderr=subprocess.PIPE, text=True
    )
    started = lambda: [p for p in Path("runs").glob("*/*/kernel.pid") if p.read_text().endswith("\n")]
    wait_for(lambda: started() or launcher.poll() is not None)
    return launcher, int(started()[0].read_text())


@pytest.mark.parametrize(
    "number, codes, error",
    [(signal.SIGINT, (130, 1), "KeyboardInterrupt"), (signal.SIGTERM, (143,), "SystemExit: 143")],
)
def test_stopped_in_the_middle(number, codes, error):
    launcher, kernel = start_waiting()
    launcher.send_signal(number)
    _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode in codes and "Traceback" not in stderr
    run = only_run()
    assert (
        run.info["status"] == "stopped"
        and run.info["error"] == error
        and "Traceback" in run.info["traceback"]
    )
    assert (run.path / "cleaned.txt").exists(), "the cell could not clean up"
    assert process_start(kernel) is None, "the kernel was left behind"


def test_killed():
    launcher, kernel = start_waiting()
    assert [r["status"] for r in gather()] == ["running"]
    launcher.kill()
    wait_for(lambda: gather()[0]["status"] == "died", 5)  # not yet waited for: a zombie is dead too
    launcher.communicate()
    wait_for(lambda: process_start(kernel) is None, 10)
    assert only_run().info["status"] == "running" and len(only_run().history()) == 3


def test_gone_on_with_it_runs_again():
    "A run whose process has died is running once another goes on with it, and dies with that one."
    dead = subprocess.Popen(["sleep", "60"])
    run = Run.create("toy", {})
    process = dict(host=platform.node(), pid=dead.pid, start=process_start(dead.pid))
    write_json(run.path / "run.json", run.info | dict(process=process))
    dead.kill()
    dead.wait()
    assert [row["status"] for row in gather()] == ["died"]
    run.restart()
    assert [row["status"] for row in gather()] == ["running"] and run.is_ours


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\0b", None, 7])
def test_names_that_are_no_plain_folder_names(name):
    with pytest.raises(InputError, match="expected a plain folder name"):
        Run.create(name, {})
    assert not list(Path().iterdir())


def test_folders_never_collide():
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda i: Run.create("toy", dict(seed=0)), range(64)))
    assert len({r.path for r in runs}) == 64


def test_metrics_are_whole_or_not_at_all():
    run = Run.create("toy", {})
    run.metrics({"test/dice": 0.5})
    with pytest.raises(InputError):
        run.metrics({"test/dice": 0.7, "test/name": "mito"})
    assert run.metrics() == {"test/dice": 0.5} and sorted(p.name for p in run.path.iterdir()) == [
        "metrics.json",
        "params.yaml",
        "run.json",
    ]


ODD = {
    "params.yaml": ["- a\n- b\n", "a: [", "7", "\xff", "!!python/object:os.system {}"],
    "metrics.json": ["[1]", "{", "null", "7"],
    "run.json": ["{", "[]", "{}", '{"status": "done"}', "null", "[" * 100_000],
}


@pytest.mark.parametrize("name, text", [(name, text) for name in ODD for text in ODD[name]])
def test_one_odd_file_never_stops_the_table(name, text):
    for seed in range(2):
        with Run.create("toy", dict(seed=seed)) as run:
            run.metrics({"test/dice": 0.5})
    (run.path / name).write_text(text, encoding="latin-1")
    good, odd = sorted(gather(), key=lambda row: row["run"] == run.path.name)
    assert good["status"] == "done" and good["params/seed"] == 0 and "unreadable" not in good
    assert odd["status"] == "unreadable" if name == "run.json" else odd["unreadable"] == name
    for form in ("text", "csv", "markdown"):
        assert run.path.name in gather_table(gather(), form)
    read = dict(
        [("params.yaml", lambda: run.params), ("metrics.json", run.metrics), ("run.json", lambda: run.status)]
    )
    with pytest.raises(InputError) as e:
        read[name]()
    assert "\n" not in str(e.value) and name in str(e.value)


def test_gather_csv():
    for seed in (0, 1):
        with Run.create("toy", dict(seed=seed, name="a, b")) as run:
            run.metrics({"test": {"dice": {"mito": 0.5 + seed, "er": None}}})
    with pytest.raises(ValueError):
        with Run.create("toy", dict(seed=2, name="a, b")):
            raise ValueError("no")
    rows = sorted(csv.DictReader(io.StringIO(gather_table(gather(), "csv"))), key=lambda r: r["params/seed"])
    assert [r["status"] for r in rows] == ["done", "done", "failed"]
    assert [r["test/dice/mito"] for r in rows] == ["0.5", "1.5", ""] and {
        r["test/dice/er"] for r in rows
    } == {""}
    assert {r["params/name"] for r in rows} == {"a, b"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs/experiments").glob("*.ipynb")) + [Path(TOY)], ids=lambda p: p.stem
)
def test_every_experiment_has_the_common_parameters(path):
    assert {"seed", "smoke", "manifest", "out", "launcher"} <= set(experiment_parameters(path))


def test_a_run_in_a_folder_of_its_own(tmp_path):
    run = Run.create("unet", dict(a=1), path=tmp_path / "models/first")
    assert run.path == tmp_path / "models/first" and run.params == dict(a=1)
    with pytest.raises(InputError, match="holds a run: expected another folder"):
        Run.create("unet", {}, path=run.path)

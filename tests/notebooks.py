"""Run the checks inside notebooks: each in a process of its own, two at a time.

    python tests/notebooks.py nbs/api nbs/learn nbs/index.ipynb

Cells marked `#| slow`, which measure time and memory, run with --long.

nbdev's own command runs many notebooks in one process. A notebook defines its classes anew, in `__main__`, and where it
registers them in a table of the package, the notebooks after it would meet those instead of the package's.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch  # loaded once, here: every notebook's process is a fork of this one
from nbdev.config import get_config
from nbdev.test import test_nb

WORKERS = 2
SLOWEST = 10
LONG = "--long" in sys.argv


def notebooks(paths) -> list:
    "The notebooks under `paths`, large files first: they tend to take longest, and none should be left to the end."
    found = [file for path in map(Path, paths) for file in ([path] if path.suffix else path.rglob("*.ipynb"))]
    kept = {file.absolute() for file in found if ".ipynb_checkpoints" not in file.parts}
    return sorted(kept, key=lambda file: (-file.stat().st_size, file))


def check(notebook: Path, said: str, folder: str):
    "Run one notebook; what it prints goes to the file `said`, what it writes into `folder`."
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    torch.set_num_threads(1)  # they run beside each other
    config = get_config()
    skip = set(config.tst_flags.split()) - ({"slow"} if LONG else set())
    passed, _ = test_nb(notebook, skip_flags=skip, basepath=config.config_path)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if passed else 1)


def main(paths) -> int:
    "Run all; print the slowest and what failed. The exit code: 0 or 1."
    waiting, running, seconds, failed = notebooks(paths), {}, {}, []
    count, fork = len(waiting), multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < WORKERS:
            folder = tempfile.TemporaryDirectory()
            job = fork.Process(target=check, args=(waiting[0], folder.name + ".txt", folder.name))
            job.start()
            running[job.sentinel] = job, waiting.pop(0), folder, time.monotonic()
        for sentinel in wait(list(running)):
            job, notebook, folder, start = running.pop(sentinel)
            job.join()
            seconds[notebook] = time.monotonic() - start
            said = Path(folder.name + ".txt")
            if job.exitcode:
                failed.append(notebook)
                print(
                    f"FAILED {notebook} (exit code {job.exitcode})\n{said.read_text(errors='replace')}",
                    flush=True,
                )
            said.unlink()
            folder.cleanup()
    for notebook in sorted(seconds, key=seconds.get, reverse=True)[:SLOWEST]:
        print(f"{seconds[notebook]:6.1f}s {notebook.parent.name}/{notebook.name}")
    print(
        f"{count - len(failed)} of {count} notebooks passed"
        + "".join(f"\n  failed: {name}" for name in failed)
    )
    return int(bool(failed) or not count)


if __name__ == "__main__":
    sys.exit(main(name for name in sys.argv[1:] if name != "--long"))

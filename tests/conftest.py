"What the tests share."

import os
import signal

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs ignore it, and so would the commands that the tests interrupt


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="also what takes minutes: kills, whole experiments, every wrong call",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    config.addinivalue_line("markers", "long: runs with --long only")
    os.environ["DINOLAB_LONG_TESTS"] = "1" if config.getoption("--long") else ""
    if config.getoption("--long"):
        os.environ.setdefault("DINOLAB_KILLS", "20")  # of each kind of training


LONGEST = ("test_readme_runs", "test_experiments", "test_spark", "test_book")


def pytest_collection_modifyitems(config, items):
    "Files that take minutes come first, so that no process ends with one of them while the other waits."
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="runs with --long (make test-long)")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _one_thread():
    "Tests run beside each other on small machines."
    import torch

    torch.set_num_threads(1)

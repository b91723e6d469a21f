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
        help="also what takes minutes: kills and whole experiments",
    )
    parser.addoption("--readme", action="store_true", help="also type the README, as a newcomer would")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    config.addinivalue_line("markers", "long: runs with --long only")
    config.addinivalue_line("markers", "readme: runs with --readme or --long")
    os.environ["DINOLAB_LONG_TESTS"] = "1" if config.getoption("--long") else ""
    kills = "20" if config.getoption("--long") else "1"
    os.environ.setdefault("DINOLAB_KILLS", kills)  # of each kind of training


LONGEST = ("test_readme_runs", "test_experiments", "test_spark", "test_book")


def pytest_collection_modifyitems(config, items):
    "Files that take minutes come first, so that no process ends with one of them while the other waits."
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if config.getoption("--long"):
        return
    skipped = {"long": "runs with --long (make test-long)", "readme": "runs with --readme (make test-readme)"}
    if config.getoption("--readme"):
        del skipped["readme"]
    for marker, reason in skipped.items():
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _one_thread():
    "Tests run beside each other on small machines."
    import torch

    torch.set_num_threads(1)

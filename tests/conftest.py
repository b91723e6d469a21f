"What the tests share."
import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


@pytest.fixture(autouse=True)
def _one_thread():
    "Tests run beside each other on small machines."
    import torch
    torch.set_num_threads(1)

"Every code cell of the library, of Learn and of the front page runs, with the checks in them."

import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("api", "learn")
PAGES = [
    "index.ipynb",
    *sorted(str(p.relative_to(ROOT / "nbs")) for f in FOLDERS for p in (ROOT / "nbs" / f).rglob("*.ipynb")),
]
SKIPPED = {"notest", "slow", "gpu"}  # cells that begin with such a directive


@pytest.mark.parametrize("page", PAGES)
def test_notebook_runs(page, monkeypatch, tmp_path):
    from nbdev.test import test_nb

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(ROOT / "nbs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        passed, _ = test_nb(ROOT / "nbs" / page, SKIPPED, basepath=ROOT)
    assert passed


def test_a_failing_cell_is_seen(tmp_path, capsys):
    from nbdev.test import test_nb

    page = (ROOT / "nbs/api/core/keys.ipynb").read_text()
    wrong = page.replace(
        "test_eq(key_seed(np.int64(3)), key_seed(3))", "test_eq(key_seed(np.int64(3)), key_seed(4))"
    )
    assert wrong != page
    (tmp_path / "keys.ipynb").write_text(wrong)
    assert not test_nb(tmp_path / "keys.ipynb", SKIPPED, basepath=ROOT)[0]
    assert "key_seed(4)" in capsys.readouterr().err

"""Properties of `synth:em` over many small requests, which the notebook cannot show one by one."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from dinolab.core.errors import InputError
from dinolab.synth.em import EM_CLASSES, LABELS, em_volume

COUNTABLE = {LABELS[name] for name in ("nucleus", "mitochondrion", "vesicle", "lipid droplet", "lysosome")}
sizes = st.tuples(*[st.integers(1, 24)] * 3)
voxels = st.tuples(*[st.sampled_from([1, 4, 5.5, 8, 16, 40, 200])] * 3)
seeds = st.integers(0, 2**40)


@examples(30)
@given(sizes, voxels, seeds)
def test_any_small_request(shape, voxel_size, seed):
    v = em_volume(shape, seed=seed, voxel_size=voxel_size)
    assert v.raw.dtype == np.uint8 and v.labels.dtype == np.uint8 and v.instances.dtype == np.uint16
    assert v.raw.shape == v.labels.shape == v.instances.shape == shape
    assert v.voxel_size == tuple(map(float, voxel_size))
    assert set(np.unique(v.labels)) <= set(EM_CLASSES)
    ids = np.unique(v.instances)
    assert ids[ids > 0].tolist() == list(range(1, v.instances.max() + 1))
    for i in ids:
        found = set(np.unique(v.labels[v.instances == i]))
        assert (len(found) == 1 and found <= COUNTABLE) if i else not found & COUNTABLE
    again = em_volume(shape, seed=seed, voxel_size=voxel_size)
    assert all(np.array_equal(a, b) for a, b in zip(v[:3], again[:3]))


@pytest.mark.parametrize("seed", range(5))
def test_a_tiny_volume_shows_something(seed):
    v = em_volume((32, 32, 32), seed=seed)
    assert len(np.unique(v.labels)) >= 3
    assert len(np.unique(v.raw)) > 50


@pytest.mark.parametrize("seed", range(3))
def test_bodies_are_in_one_piece(seed):
    v = em_volume((64, 64, 64), seed=seed)
    whole = 0
    for i in range(1, v.instances.max() + 1):
        pieces, _ = ndimage.label(v.instances == i, np.ones((3, 3, 3)))
        whole += np.bincount(pieces.ravel())[1:].max() > 0.9 * (pieces > 0).sum()
    assert whole >= 0.9 * v.instances.max()  # the border of the box may cut a bent one in two


@pytest.mark.parametrize("f", [2, 3])
def test_coarser_labels_are_the_majority_of_finer_ones(f):
    fine = em_volume((24, 36, 30), seed=5, voxel_size=(8, 8, 8))
    coarse = em_volume((24, 36, 30 // f), seed=5, voxel_size=(8, 8, 8 * f))
    votes = [(fine.labels.reshape(24, 36, 30 // f, f) == k).sum(-1) for k in EM_CLASSES]
    np.testing.assert_array_equal(coarse.labels, np.argmax(votes, 0))


def test_microscope_changes_the_picture_only():
    a, b = em_volume((16, 40, 40), seed=1), em_volume((16, 40, 40), seed=1, blur=0, electrons=20, drift=0.1)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.instances, b.instances)
    assert (a.raw != b.raw).mean() > 0.5


def test_seeds_differ():
    a, b = em_volume((24, 24, 24), seed=0), em_volume((24, 24, 24), seed=1)
    assert (a.labels != b.labels).mean() > 0.1


def test_same_bytes_in_another_process_with_other_threads():
    code = (
        "import hashlib; from dinolab.synth.em import em_volume; v = em_volume((20, 30, 30), seed=9);"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in v[:3])).hexdigest())"
    )
    env = dict(os.environ, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2", PYTHONHASHSEED="77")
    there = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    here = hashlib.sha256(b"".join(a.tobytes() for a in em_volume((20, 30, 30), seed=9)[:3])).hexdigest()
    assert there == here


@pytest.mark.parametrize(
    "bad",
    [
        dict(shape=(8, 0, 8)),
        dict(shape=(2048, 2048, 2048)),
        dict(seed=-1),
        dict(voxel_size=(8, 8, 1e6)),
        dict(drift=-1),
        dict(blur=-1),
        dict(electrons=float("nan")),
        dict(electrons="many"),
        dict(blur=None),
    ],
)
def test_bad_requests_are_one_line(bad):
    with pytest.raises(InputError, match="expected") as e:
        em_volume(**bad)
    assert "\n" not in str(e.value)

"""Properties of `synth:spacecraft` over many satellites and seeds, which the notebook cannot show one by one."""

import csv
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinolab.core.errors import InputError
from dinolab.data.fetch import GENERATORS, make_spacecraft
from dinolab.data.manifest import load_manifest
from dinolab.synth.spacecraft import (
    LABEL_OF,
    MATERIALS,
    SATELLITES,
    SHAPES,
    Camera,
    Mesh,
    Part,
    build,
    in_sun,
    labels_of,
    mask_colours,
    normals_of,
    points_of,
    pose,
    rasterise,
    spacecraft_image,
    write_spark,
)


def faces_of(*boxes):
    "Faces of boxes, six each, from (middle, size)."
    return np.concatenate([np.stack(SHAPES["box"]) * size + middle for middle, size in boxes]).astype(
        np.float32
    )


def test_same_bytes_in_another_process_with_other_threads():
    code = (
        "import hashlib; from dinolab.synth.spacecraft import spacecraft_image; s = spacecraft_image((64, 80), seed=9);"
        "print(hashlib.sha256(s.image.tobytes() + s.labels.tobytes() + s.satellite.encode()).hexdigest())"
    )
    env = dict(os.environ, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2", PYTHONHASHSEED="77")
    there = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    s = spacecraft_image((64, 80), seed=9)
    assert there == hashlib.sha256(s.image.tobytes() + s.labels.tobytes() + s.satellite.encode()).hexdigest()
    assert (
        s.image.shape == (64, 80, 3)
        and s.labels.shape == (64, 80)
        and s.image.dtype == s.labels.dtype == np.uint8
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_same_scene_at_any_size(seed):
    small, large = spacecraft_image((128, 128), seed), spacecraft_image((256, 256), seed)
    agree = [(small.labels == large.labels[i::2, j::2]).mean() for i in (0, 1) for j in (0, 1)]
    assert small.satellite == large.satellite and np.mean(agree) > 0.97
    on = (small.labels > 0) & (large.labels[::2, ::2] > 0)
    assert (small.labels == large.labels[::2, ::2])[on].mean() > 0.9
    means = large.image.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(means - small.image).mean() < 12


def test_seeds_differ():
    a, b = spacecraft_image((96, 96), 0, "bus"), spacecraft_image((96, 96), 1, "bus")
    assert (a.labels != b.labels).mean() > 0.01 and (a.image != b.image).mean() > 0.3


@pytest.mark.parametrize("order", [0, 1])
def test_a_box_hides_another(order):
    "Whatever the order of the list, the nearer box is seen, and only what is beside it of the farther."
    near, far = ((0.1, 0, 3), 0.8), ((0, 0, 6), 2.4)
    boxes = (near, far)[::-1] if order else (near, far)
    face, _ = rasterise(faces_of(*boxes), Camera(2), (90, 90))
    alone = rasterise(faces_of(near), Camera(2), (90, 90))[0] >= 0
    alone_far = rasterise(faces_of(far), Camera(2), (90, 90))[0] >= 0
    which = np.where(face < 0, -1, face // 6 if not order else 1 - face // 6)
    np.testing.assert_array_equal(which == 0, alone)
    np.testing.assert_array_equal(which == 1, alone_far & ~alone)
    assert alone.sum() > 500 and (alone_far & ~alone).sum() > 500


def test_nearest_face_against_rays():
    "The depth buffer against the definition: each ray meets each half-space of each convex part."
    rng = np.random.default_rng(5)
    parts = [
        Part("box", "white", rng.uniform(-1, 1, 3), rng.uniform(0.3, 1.2, 3), tuple(rng.uniform(0, 360, 3)))
        for _ in range(6)
    ]
    mesh = build(parts)
    corners = mesh.corners + np.float32([0, 0, 3])
    face, nearness = rasterise(corners, Camera(2.4), (40, 40))
    normals = normals_of(corners)
    offsets = (normals * corners[:, 0]).sum(1)
    axis = (2 * np.arange(40) + 1 - 40) / 40 / 2.4
    rays = np.stack([*np.meshgrid(axis, axis), np.ones((40, 40))], -1)
    along = rays @ normals.T
    depth = np.full((6, 40, 40), np.inf)
    for i in range(6):
        k = slice(6 * i, 6 * i + 6)
        with np.errstate(divide="ignore"):
            t = offsets[k] / along[..., k]
        enter, leave = (
            np.where(along[..., k] < 0, t, -np.inf).max(-1),
            np.where(along[..., k] > 0, t, np.inf).min(-1),
        )
        depth[i][enter <= leave] = enter[enter <= leave]
    truth = np.where(np.isfinite(depth.min(0)), depth.argmin(0), -1)
    assert (truth == np.where(face < 0, -1, face // 6)).mean() > 0.995
    both = (face >= 0) & (truth >= 0)
    assert np.median(np.abs(1 / nearness[both] - depth.min(0)[both])) < 1e-5


def test_a_wing_throws_its_shadow():
    mesh = Mesh(faces_of(((0, 0, 0.3), (1, 1, 0.02)), ((0, 0, -0.3), (0.4, 0.4, 0.02))), np.zeros(12, int))
    far = Mesh(mesh.corners + np.float32([0, 0, 5]), mesh.material, (0, 0, 5))
    points, face = points_of(*rasterise(far.corners, Camera(3), (80, 80)), Camera(3))
    away = np.array([0.0, 0.3, -1]) / np.hypot(0.3, 1)
    lit = in_sun(far, points, face, away)
    behind = points[:, 2] > 5.2
    shadow = (np.abs(points[:, 0]) < 0.18) & (np.abs(points[:, 1] + 0.6 * 0.3) < 0.17) & behind
    clear = (np.abs(points[:, 0]) > 0.22) & behind
    assert (
        shadow.any()
        and clear.any()
        and not lit[shadow].any()
        and lit[clear].all()
        and lit[points[:, 2] < 4.72].all()
    )


@pytest.mark.parametrize("name", SATELLITES)
def test_every_satellite_is_seen(name):
    mesh = build(SATELLITES[name])
    assert set(LABEL_OF[mesh.material]) == {1, 2}
    for seed in range(20):
        turned, camera = pose(np.random.default_rng(seed), mesh)
        labels = labels_of(turned, rasterise(turned.corners, camera, (128, 128))[0])
        rows, columns = np.nonzero(labels)
        extent = (max(np.ptp(rows), np.ptp(columns)) + 1) / 128
        assert (labels == 1).any() and (labels > 0).mean() > 0.01 and 0.1 <= extent <= 0.9
    rng = np.random.default_rng(1)
    assert any(
        (labels_of(t, rasterise(t.corners, c, (64, 64))[0]) == 2).mean() > 0.01
        for t, c in (pose(rng, mesh) for _ in range(4))
    )


def test_materials_and_shapes_exist():
    for parts in SATELLITES.values():
        for part in parts:
            assert part.shape in SHAPES and part.material in MATERIALS and min(part.size) > 0


def test_masks_decode_back():
    labels = spacecraft_image((64, 64), 3).labels
    colours = mask_colours(labels)
    assert set(map(tuple, colours.reshape(-1, 3).tolist())) <= {(0, 0, 0), (255, 0, 0), (0, 0, 255)}
    np.testing.assert_array_equal((colours[..., 0] > 0) + 2 * (colours[..., 2] > 0), labels)


def test_a_threshold_does_not_do():
    "Mean IoU of the best interval of brightness per class, found on one half and scored on the other."
    many = [spacecraft_image((64, 64), s) for s in range(800, 840)]
    grey, truth = (
        np.stack(v).reshape(2, -1) for v in ([s.image.max(-1) for s in many], [s.labels for s in many])
    )
    ious = []
    for k in range(3):

        def iou(half, low, high):
            on, true = (grey[half] >= low) & (grey[half] < high), truth[half] == k
            return (on & true).sum() / (on | true).sum()

        ends = max(
            ((a, b) for a in range(0, 256, 16) for b in range(a + 16, 257, 16)), key=lambda e: iou(0, *e)
        )
        ious.append(iou(1, *ends))
    assert np.mean(ious) < 0.5 and max(ious[1:]) < 0.4


@pytest.mark.parametrize("mask_format", ["png", "jpg"])
def test_layout_of_the_challenge(tmp_path, mask_format):
    tables = write_spark(
        tmp_path / "s",
        dict(train=[0, 1, 2], val=[7]),
        (48, 64),
        dict(train=["bus", "probe"], val=None),
        mask_format,
    )
    assert list(tables) == ["train", "val"] and {p.name for p in (tmp_path / "s").iterdir()} == {
        "images",
        "mask",
        "train.csv",
        "val.csv",
    }
    for split, seeds in dict(train=[0, 1, 2], val=[7]).items():
        rows = list(csv.DictReader(tables[split].open()))
        assert list(rows[0]) == ["Class", "Image name", "Mask name"] and len(rows) == len(seeds)
        for row, seed, name in zip(rows, seeds, ["bus", "probe", "bus"] if split == "train" else [None]):
            scene = spacecraft_image((48, 64), seed, name)
            assert (
                row["Class"] == scene.satellite
                and row["Mask name"] == row["Image name"][:-4] + f"_layer.{mask_format}"
            )
            image, mask = (
                np.array(Image.open(tmp_path / "s" / kind / row["Class"] / split / row[column]))
                for kind, column in (("images", "Image name"), ("mask", "Mask name"))
            )
            assert np.abs(image.astype(int) - scene.image).mean() < 8
            nearest = np.abs(mask[:, :, None].astype(int) - mask_colours(np.arange(3))).sum(-1).argmin(-1)
            assert (nearest == scene.labels).mean() > (0.98 if mask_format == "jpg" else 0.9999)
    with pytest.raises(InputError, match="is not empty: expected") as e:
        write_spark(tmp_path / "s", dict(train=[0]))
    assert "\n" not in str(e.value)


def test_case_and_manifest(tmp_path):
    files = make_spacecraft(tmp_path, shape=[48, 48], seed=4, satellite="relay")
    assert files == dict(image="image.jpg", mask="mask.png") and GENERATORS["spacecraft"] is make_spacecraft
    np.testing.assert_array_equal(
        np.array(Image.open(tmp_path / "mask.png")), spacecraft_image((48, 48), 4, "relay").labels
    )
    with pytest.raises(InputError, match="parameter of synth:spacecraft"):
        make_spacecraft(tmp_path, seeds=4)
    m = load_manifest("spacecraft_phantom")
    shown = {split: {m.parameters_of(c)["satellite"] for c in names} for split, names in m.splits.items()}
    assert {s: len(n) for s, n in m.splits.items()} == dict(train=48, valid=12, test=16)
    assert sorted(name for some in shown.values() for name in some) == sorted(SATELLITES)  # each in one split


@pytest.mark.parametrize(
    "bad",
    [
        dict(shape=(8, 64)),
        dict(shape=(64,)),
        dict(shape=(64, 1e3)),
        dict(shape=(9999, 64)),
        dict(seed=-1),
        dict(seed=0.5),
        dict(satellite="buss"),
    ],
)
def test_bad_requests_are_one_line(bad):
    with pytest.raises(InputError, match="expected") as e:
        spacecraft_image(**bad)
    assert "\n" not in str(e.value)

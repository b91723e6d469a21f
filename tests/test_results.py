"What a prediction of images leaves behind, and that it belongs to one network."

import csv
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from dinolab.core.errors import InputError
from dinolab.data.classes import Classes
from dinolab.tasks.images import (
    View,
    evaluate_segmenter,
    predict_image,
    predict_images,
    train_segmenter,
)
from dinolab.tasks.results import class_colours, draw_overlay, write_mask
from dinolab.train.settings import TrainArgs


def squares(folder, n=2, seed=0):
    "Bright squares, and their masks."
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        mask = np.zeros((40, 56), np.uint8)
        mask[8:30, 6 + i : 40] = 1
        image = (60 + 120 * mask + rng.integers(0, 40, mask.shape)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run, and the data that it was trained on."
    folder = tmp_path_factory.mktemp("results")
    data = squares(folder / "data")
    args = TrainArgs(epochs=1, batch_size=2, lr=1e-2, monitor="mean_iou", mode="max", device="cpu")
    options = dict(backbone="resnet10t", head="linear", crop=32, scale=(1, 1), crops_per_epoch=4, train=args)
    with redirect_stderr(io.StringIO()):
        done = train_segmenter(
            data / "images", data / "masks", classes=["ground", "square"], out=folder / "runs", **options
        )
    return done.run.path, data


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_a_folder_that_explains_itself(run, tmp_path):
    "Masks with a palette, overlays, classes, a table, and probabilities that other programs open."
    path, data = run
    out = tmp_path / "out"
    predict_images(path, data / "images", out, probabilities=True, probability_format="tiff16")
    with Image.open(out / "0.png") as mask:
        labels = np.asarray(mask)
        assert mask.mode == "P" and mask.getpalette()[3:6] == [0xE6, 0x9F, 0x00]
    known = json.loads((out / "classes.json").read_text())["classes"]
    assert [(c["name"], c["value"]) for c in known] == [("ground", 0), ("square", 1)]
    p = tifffile.imread(out / "0_probabilities.tif")
    assert p.shape == (2, 40, 56) and p.dtype == np.uint16
    assert np.array_equal(p.argmax(0)[p[0] != p[1]], labels[p[0] != p[1]])
    table = rows(out / "summary.csv")
    assert [r["image"] for r in table] == ["0.png", "1.png"]
    assert int(table[0]["pixels/square"]) == (labels == 1).sum()
    assert abs(float(table[0]["share/square"]) - (labels == 1).mean()) < 1e-6
    with Image.open(out / "overlays/0.jpg") as overlay:
        assert overlay.height > 40 and overlay.width >= 56


def test_nothing_of_another_run_stays(run, tmp_path):
    "Other settings, other classes and unknown files are refused by name, also where no name is the same."
    path, data = run
    out = tmp_path / "out"
    predict_images(path, data / "images/0.png", out)
    for change, message in (
        (dict(overlap=0.25), "overlap (0.5 there, 0.25 now)"),
        (dict(tta="flips"), "tta (none there, flips now)"),
        (dict(probabilities=True), "probabilities"),
        (dict(overlays=False), "overlays"),
    ):
        with pytest.raises(InputError) as e:
            predict_images(path, data / "images/1.png", out, **change)
        assert message in str(e.value) and "\n" not in str(e.value)
    assert not (out / "1.png").exists()
    predict_images(path, data / "images/1.png", out, tta="flips", overwrite=True)
    assert not (out / "0.png").exists() and not (out / "overlays/0.jpg").exists()
    assert [r["mask"] for r in rows(out / "summary.csv")] == ["1.png"]


def test_results_are_completed(run, tmp_path):
    "What is missing of an image is made again, the rest stays; images that are gone are named."
    path, data = run
    moved = squares(tmp_path / "data")
    out = tmp_path / "out"
    predict_images(path, moved / "images", out)
    before = (out / "0.png").stat().st_mtime_ns
    (out / "overlays/1.jpg").unlink()
    (moved / "images/0.png").unlink()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as m:
        m.setattr("builtins.print", lambda *a, **k: said.write(" ".join(map(str, a))))
        predict_images(path, moved / "images", out)
    assert (out / "overlays/1.jpg").exists() and (out / "0.png").stat().st_mtime_ns == before
    assert "1 masks stay whose images are gone, such as 0.png" in said.getvalue()
    assert [r["image"] for r in rows(out / "summary.csv")] == ["1.png"]


def test_same_names_in_folders(run, tmp_path):
    "Folders stay where names need them."
    path, data = run
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        Image.open(data / "images/0.png").save(tmp_path / name / "a.png")
    found = predict_images(path, [tmp_path / "north", tmp_path / "south"], tmp_path / "out")
    assert sorted(found.values()) == [str(tmp_path / f"out/{n}/a.png") for n in ("north", "south")]
    assert (tmp_path / "out/overlays/south/a.jpg").exists()


@pytest.mark.parametrize("tta,count", [("flips", 4), ("turns", 8)])
def test_augmentation_is_the_mean_of_flipped_predictions(tta, count):
    "Tiles and all: what the flipped image gives, flipped back, and averaged."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
    image = np.random.default_rng(0).random((1, 45, 70), np.float32)
    options = dict(probabilities=True, white=2**32 - 1)

    def predicted(x, **more):
        return predict_image(model, np.ascontiguousarray(x), (32, 24), **options, **more)[1] / (2**32 - 1)

    views = [View(s, d, a) for s in (False, True) for d in (False, True) for a in (False, True)][:count]
    expected = []
    for view in views:
        expected.append(view.back(predicted(view.turn(image))))
    assert np.abs(predicted(image, tta=tta) - np.mean(expected, 0)).max() < 1e-6


def test_scores_of_each_image(run):
    "One row per image; their counts are those of the whole."
    path, data = run
    scores = evaluate_segmenter(path, data / "images", data / "masks", split="seen")
    table = rows(path / "seen_scores.csv")
    assert [r["image"] for r in table] == ["0.png", "1.png"] and set(table[0]) >= {
        *("accuracy", "valid_share", "iou/square", "dice/ground", "mean_boundary_f", "classes"),
    }
    mean = np.mean([float(r["accuracy"]) for r in table])  # images of one size
    assert abs(scores["seen/accuracy"] - mean) < 1e-9
    assert abs(scores["seen/mean_iou_per_image"] - np.mean([float(r["mean_iou"]) for r in table])) < 1e-9


def test_one_class_says_so(run, tmp_path, capsys):
    "A mean over one class is no score of a segmentation."
    path, data = run
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((40, 56), np.uint8)).save(tmp_path / name / "a.png")
    scores = evaluate_segmenter(path, tmp_path / "images", tmp_path / "masks")
    said = capsys.readouterr().out
    assert ("the scores are over one class" in said) == (scores["test/mean_iou"] == 1)


@pytest.mark.parametrize("count", (2, 9, 300))
def test_palettes(count, tmp_path):
    "Values come back, and colours are distinct."
    values = tuple(range(0, 255 * count, 255)) if count == 2 else tuple(range(count))
    classes = Classes([f"class {i}" for i in range(count)], values=values, ignore=255)
    labels = np.arange(count).reshape(1, -1).astype(np.min_scalar_type(count - 1))
    write_mask(tmp_path / "m.png", labels, classes)
    with Image.open(tmp_path / "m.png") as mask:
        assert np.array_equal(np.asarray(mask)[0], values)
    assert len(set(class_colours(classes))) == count
    assert draw_overlay(np.zeros((1, 1, count), np.float32), labels, classes).shape[0] > 1


MEMORY = """
import resource, sys
import numpy as np, torch
from dinolab.tasks.images import predict_image
from dinolab.tasks.results import ResultWriter
from dinolab.data.classes import Classes
from pathlib import Path

class Lazy:
    shape = (3, 20000, 20000)
    def __getitem__(self, key):
        _, rows, columns = key
        size = [len(range(*s.indices(n))) for s, n in zip((rows, columns), self.shape[1:])]
        return np.full((3, *size), 0.5, np.float32)

model = torch.nn.Conv2d(3, 3, 1)
labels, _ = predict_image(model, Lazy(), (1024, 1024), overlap=0.1)
ResultWriter(Path(sys.argv[1]), Classes(["a", "b", "c"], values=(0, 100, 200))).write("x", Lazy(), labels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.long
def test_memory_of_a_large_image(tmp_path):
    "20,000 x 20,000 pixels in at most 2 GB, with mask and overlay."
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2.0
    assert (tmp_path / "x.png").exists()

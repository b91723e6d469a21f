"From folders of pictures to scores and masks, by the commands, and what goes wrong on the way."

import json
import os
import subprocess
import shutil
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinolab.models.backbones import create_backbone
from dinolab.models.specs import LoraSpec
from dinolab.train.runs import Run
from dinolab.core.errors import InputError
from dinolab.train.settings import TrainArgs
from dinolab.data.pixels import read_image
from dinolab.tasks.configs import JOBS, PredictImages, TrainSegmenter, numbers_of
from dinolab.tasks.recipes import Given, make_settings, run_recipe, with_overrides
from dinolab.volumes.tiles import all_tiles, blend
from dinolab.tasks.images import (
    View,
    ViewPredictor,
    evaluate_segmenter,
    load_segmenter,
    predict_images,
    predict_image,
    train_segmenter,
)

VIT = "vit_tiny_patch16_224"
QUICK = TrainArgs(epochs=1, batch_size=2, monitor="mean_iou", mode="max", lr=3e-3, device="cpu")


def shapes(folder, n, seed, size=(70, 90)):
    "Bright discs on dark ground, and their masks."
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    yy, xx = np.mgrid[: size[0], : size[1]]
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        mask = np.hypot(yy - rng.uniform(20, 50), xx - rng.uniform(20, 70)) < rng.uniform(12, 20)
        image = (0.3 + 0.4 * mask + rng.normal(0, 0.05, size)).clip(0, 1)
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"masks/{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return shapes(folder / "train", 5, 0), shapes(folder / "test", 2, 1)


def small(data, out, **options):
    return train_segmenter(
        data[0] / "images",
        data[0] / "masks",
        out=out,
        **dict(
            backbone=VIT,
            head="upernet",
            hidden_size=16,
            stem=4,
            crop=64,
            scale=(1, 1),
            crops_per_epoch=8,
            train=QUICK,
        )
        | options,
    )


def dinolab(*args, folder):
    return subprocess.run(
        [sys.executable, "-c", "from dinolab.cli.main import main; main()", *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_commands_from_folders_to_masks(data, tmp_path):
    train, test = data
    (tmp_path / "upernet.yaml").write_text(f"""
recipe: segmenter
images: {train}/images
masks: {train}/masks
classes: [ground, disc]
backbone: {VIT}
head: upernet
hidden_size: 16
stem: 4
lora: {{rank: 8}}
crop: 64
scale: [1, 1]
crops_per_epoch: 48
train: {{epochs: 2, batch_size: 4, lr: 5e-3, device: cpu, monitor: mean_iou, mode: max}}
""")
    done = dinolab("train", "--config", "upernet.yaml", "lora.rank=4", "train.epochs=3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = done.stdout.split()[-1]
    about = json.loads((tmp_path / run / "model.json").read_text())
    assert about["lora"]["rank"] == 4 and about["network"]["head"] == "upernet"
    scored = dinolab(
        "evaluate", f"run={run}", f"images={test}/images", f"masks={test}/masks", folder=tmp_path
    )
    assert scored.returncode == 0, scored.stderr
    metrics = json.loads((tmp_path / run / "metrics.json").read_text())
    assert (
        metrics["test/iou/disc"] > 0.8
        and (tmp_path / run / "confusion.csv").exists()
        and (tmp_path / run / "figures/test_worst.png").exists()
    )
    found = dinolab("predict", f"{test}/images", "masks", f"run={run}", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    got = np.asarray(Image.open(tmp_path / "masks/0.png"))
    true = np.asarray(Image.open(test / "masks/0.png"))
    assert got.shape == true.shape and 2 * (got & true).sum() / (got.sum() + true.sum()) > 0.85
    one = dinolab(
        "predict",
        f"{test}/images/0.png",
        f"{test}/images/1.png",
        "two",
        f"run={run}",
        "probabilities=true",
        folder=tmp_path,
    )
    assert (
        one.returncode == 0
        and (
            np.load(tmp_path / "two/1.npz")["probabilities"].argmax(0)
            == np.asarray(Image.open(tmp_path / "two/1.png"))
        ).mean()
        > 0.999
    )


@pytest.mark.parametrize(
    "wrong,message",
    [
        ("lora.rnk=4", "did you mean lora.rank?"),
        ("heads=upernet", "did you mean head?"),
        ("train.epoch=3", "did you mean train.epochs?"),
        ("head=upernext", "did you mean 'upernet'"),
        ("backbone=dinov4", "unknown backbone 'dinov4'"),
        ("masks=nowhere", "no file or folder 'nowhere'"),
        ("classes={0: ground, 1: disc}", "values without a class: 3"),
        ("crop=0", "crop=0: expected a whole number"),
        ("train.batch_size=0", "train.batch_size=0: expected"),
        ("balance=.nan", "balance=nan: expected"),
        ("weights=none.pth", "no file or folder"),
        ("layers=[99]", "12 layers"),
        ("pool_scales=[1]", "the linear head has no pool_scales"),
    ],
)
def test_wrong_settings_are_one_line(data, tmp_path, wrong, message):
    labels = data[0] / "masks"
    if wrong.startswith("classes"):
        labels = tmp_path / "masks"
        labels.mkdir()
        for p in (data[0] / "masks").iterdir():
            Image.fromarray(np.asarray(Image.open(p)) * 3).save(labels / p.name)
    pairs = ["recipe=segmenter", f"images={data[0]}/images", f"masks={labels}", f"backbone={VIT}"]
    pairs += ["head=linear", "train.device=cpu", f"out={tmp_path}/runs", wrong]
    with pytest.raises(InputError) as e:
        run_recipe("train", pairs=pairs)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("runs/*/*/checkpoints"))


def contents(folder):
    "All files below a folder, byte for byte."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Two files of weights of one backbone."
    folder = tmp_path_factory.mktemp("weights")
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(create_backbone(VIT).model.state_dict(), folder / f"{seed}.pth")
    return folder


@pytest.fixture(scope="module")
def trained(data, weights, tmp_path_factory):
    "A finished training of adapters, with the settings that it was begun with."
    given = dict(
        images=data[0] / "images",
        masks=data[0] / "masks",
        backbone=VIT,
        weights=str(weights / "1.pth"),
        lora=LoraSpec(rank=2),
        head="linear",
        crop=64,
        scale=(1, 1),
        crops_per_epoch=4,
        train=QUICK,
    )
    done = train_segmenter(**given, out=tmp_path_factory.mktemp("runs"))
    return done.run, given


def test_a_training_goes_on_with_what_it_was_begun_with(data, weights, trained, tmp_path):
    "Another loss, other data, other weights are refused by name, and no byte of the run changes."
    run, given = trained
    shapes(tmp_path / "other", 5, 7)
    before = contents(run.path)
    changes = dict(
        loss=("loss (ce+dice there, ce now)", dict(loss="ce")),
        augment=("augment (photo there, turns now)", dict(augment="turns")),
        rate=("train.lr", dict(train=replace(QUICK, lr=1.0))),
        adapters=("lora.rank (2 there, 4 now)", dict(lora=LoraSpec(rank=4))),
        images=("images: not those", dict(images=tmp_path / "other/images")),
        masks=("masks: not those", dict(masks=tmp_path / "other/masks")),
        weights=("backbone.weights_hash", dict(weights=str(weights / "2.pth"))),
    )
    for name, (message, change) in changes.items():
        with pytest.raises(InputError) as e:
            train_segmenter(**given | change, run=run.path)
        assert message in str(e.value) and "\n" not in str(e.value), (name, str(e.value))
        assert contents(run.path) == before, name
    assert run.status == "done"


def test_two_trainings_of_one_run(trained):
    "The second is refused while the first is at work."
    run, given = trained
    before = contents(run.path)
    with Run.open(run.path).lock():
        with pytest.raises(InputError) as e:
            train_segmenter(**given, run=run.path)
    assert "\n" not in str(e.value)
    assert {k: v for k, v in contents(run.path).items() if k != ".lock"} == before


def test_data_that_moved_are_the_same(data, trained, tmp_path):
    "Content decides, and a finished run stays finished."
    run, given = trained
    shutil.copytree(data[0], tmp_path / "moved")
    moved = dict(images=tmp_path / "moved/images", masks=tmp_path / "moved/masks")
    last = (run.path / "checkpoints/last/model.safetensors").read_bytes()
    again = train_segmenter(**given | moved, run=run.path)
    assert again.run.status == "done"
    assert (run.path / "checkpoints/last/model.safetensors").read_bytes() == last


def test_weights_are_found_again(data, weights, trained, tmp_path, monkeypatch):
    "A run keeps the whole path of its weights; where the file has moved, weights= says so, and the hash is compared."
    run, given = trained
    about = json.loads((run.path / "model.json").read_text())
    assert Path(about["backbone"]["recipe"]["weights"]).is_absolute()
    monkeypatch.chdir(tmp_path)
    load_segmenter(run.path)
    away = weights / "1.pth"
    moved = away.rename(tmp_path / "moved.pth")
    try:
        with pytest.raises(InputError, match="weights= says where the weights of"):
            load_segmenter(run.path)
        assert predict_images(run.path, data[1] / "images", tmp_path / "out", weights="moved.pth")
        with pytest.raises(InputError, match="expected the same"):
            predict_images(run.path, data[1] / "images", tmp_path / "o", weights=str(weights / "2.pth"))
    finally:
        moved.rename(away)


def test_a_folder_of_masks_is_of_one_network(data, trained, tmp_path):
    "Another run, other settings or another image of the same name are refused; an image that changed is done again."
    run, given = trained
    shutil.copytree(data[1], tmp_path / "in")
    predict_images(run.path, tmp_path / "in/images", tmp_path / "out")
    before = contents(tmp_path / "out")
    other = train_segmenter(**given | dict(train=replace(QUICK, seed=1)), out=tmp_path / "runs").run
    for message, change in (
        ("network (", dict(run=other.path)),
        ("probabilities (False there, True now)", dict(probabilities=True)),
        ("tile", dict(tile=32)),
        ("was made from", dict(source=[data[0] / "images/0.png"])),
    ):
        call = dict(run=run.path, source=tmp_path / "in/images", store=tmp_path / "out") | change
        with pytest.raises(InputError) as e:
            predict_images(**call)
        assert message in str(e.value) and "overwrite=true" in str(e.value), str(e.value)
        assert contents(tmp_path / "out") == before
    Image.fromarray(np.zeros((50, 60), np.uint8)).save(tmp_path / "in/images/0.png")
    predict_images(run.path, tmp_path / "in/images", tmp_path / "out")
    after = contents(tmp_path / "out")
    assert after["0.png"] != before["0.png"] and after["1.png"] == before["1.png"]
    predict_images(other.path, tmp_path / "in/images", tmp_path / "out", overwrite=True)
    predict_images(other.path, tmp_path / "in/images", tmp_path / "out")


def test_numbers_that_are_none(data, trained, monkeypatch, tmp_path):
    "A network that gives NaN does not find background everywhere."
    run, _ = trained
    model = load_segmenter(run.path).model
    monkeypatch.setattr("dinolab.tasks.images.load_checkpoint", lambda run, model, which: spoil(model))

    def spoil(model):
        with torch.no_grad():
            list(model.head.parameters())[-1].fill_(float("nan"))

    with pytest.raises(InputError, match=r"0\.png: \d+ of \d+ outputs of the network are no finite numbers"):
        predict_images(run.path, data[1] / "images", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png")) and model is not None


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"kind": "segmenter"}', "null", "\x00"])
@pytest.mark.parametrize("name", ["model.json"])
def test_damaged_files_of_a_run_are_one_line(trained, tmp_path, name, text):
    shutil.copytree(trained[0].path, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(InputError) as e:
        load_segmenter(tmp_path / "run")
    assert name in str(e.value) and "is damaged" in str(e.value) and "\n" not in str(e.value)


BAD = (float("nan"), float("inf"), "x", True, {}, [], [float("nan")])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_every_number_of_every_job_is_checked(job):
    "Before anything is opened: a dataclass that cannot be made starts nothing."
    needed = {f.name: "x" for f in fields(job) if f.default is MISSING}
    assert not [n for n in numbers_of(job) if n not in job.rules()], "numbers without a rule"
    for name in numbers_of(job):
        for bad in BAD:
            with pytest.raises(InputError) as e:
                job(**needed | {name: bad})
            assert str(e.value).startswith(f"{name}=") and "\n" not in str(e.value)
        low = getattr(job.rules()[name], "low", None)
        if low is not None and low > float("-inf"):
            with pytest.raises(InputError, match=f"^{name}="):
                job(**needed | {name: low - 1})


def test_other_settings_are_checked():
    "Texts, choices, true and false."
    for job, wrong in ((TrainSegmenter, dict(root=3)), (TrainSegmenter, dict(norm="layer"))):
        with pytest.raises(InputError):
            job(**wrong)
    with pytest.raises(InputError, match="freeze_backbone='no': expected true or false"):
        TrainSegmenter(freeze_backbone="no")
    with pytest.raises(TypeError, match="train_segmenter: got an unexpected keyword argument 'heads'"):
        train_segmenter(heads="upernet")


@pytest.mark.parametrize("name", ["2024_01", "1e3", "yes", "null", "0x10", "1:30", "~", "a,b", "[x"])
def test_names_are_never_read_as_numbers(name):
    "A folder may be called whatever YAML takes for something else."
    pairs = [f"source={name}", f"store={name}", "run=r"] if name[0] != "[" else ["run=r"]
    objects = {} if name[0] != "[" else dict(source=name, store=name)
    given = with_overrides(Given(), pairs)
    made = make_settings(PredictImages, given, **objects)
    assert (made.source, made.store) == (name, name)


@pytest.mark.parametrize("options", [dict(lora=LoraSpec(rank=2)), dict(freeze_backbone=True), dict()])
def test_a_run_gives_back_its_network(data, tmp_path, options):
    done = small(data, tmp_path, **options)
    again = load_segmenter(done.run.path)
    x = torch.rand(1, 3, 50, 60)
    with torch.no_grad():
        assert torch.equal(done.model(x), again.model(x))
    size, trained = (
        (done.run.path / "checkpoints/best/model.safetensors").stat().st_size,
        sum(p.numel() * 4 for p in done.model.parameters() if p.requires_grad),
    )
    assert bool(options) == (trained < 2e6 * 4) and size < 1.2 * trained


def test_another_backbone_is_noticed(data, tmp_path):
    "The adapters of a run belong to one set of weights."
    done = small(data, tmp_path, lora=LoraSpec(rank=2))
    about = json.loads((done.run.path / "model.json").read_text())
    about["backbone"]["seed"] += 1
    (done.run.path / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="expected the same"):
        load_segmenter(done.run.path)


def test_an_interrupted_training_goes_on(data, tmp_path):
    whole = small(data, tmp_path / "a", lora=LoraSpec(rank=2), train=replace(QUICK, epochs=3))
    part = small(
        data, tmp_path / "b", lora=LoraSpec(rank=2), train=replace(QUICK, epochs=3, max_seconds=1e-9)
    )
    assert part.run.history()[-1]["step"] < whole.run.history()[-1]["step"]
    done = small(
        data, tmp_path / "b", lora=LoraSpec(rank=2), train=replace(QUICK, epochs=3), run=part.run.path
    )
    assert (done.run.path / "checkpoints/last/model.safetensors").read_bytes() == (
        whole.run.path / "checkpoints/last/model.safetensors"
    ).read_bytes()


def test_one_class(data, tmp_path):
    "One name stands for a class against the background."
    done = small(data, tmp_path, classes=["disc"])
    assert done.classes.names == ("background", "disc")
    assert "test/iou/disc" in evaluate_segmenter(done.run.path, data[1] / "images", data[1] / "masks")


def test_tables_and_splits(data, tmp_path):
    rows = [
        "image,mask,split",
        *(
            f"{data[0]}/images/{i}.png,{data[0]}/masks/{i}.png,{'train' if i < 4 else 'valid'}"
            for i in range(5)
        ),
        *(f"{data[1]}/images/{i}.png,{data[1]}/masks/{i}.png,test" for i in range(2)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    done = train_segmenter(
        table=tmp_path / "t.csv",
        backbone=VIT,
        head="linear",
        crop=64,
        freeze_backbone=True,
        train=QUICK,
        out=tmp_path,
    )
    assert evaluate_segmenter(done.run.path, table=tmp_path / "t.csv")["test/mean_iou"] > 0
    assert evaluate_segmenter(done.run.path)["valid/mean_iou"] > 0  # on what the training held out
    (done.run.path / "pairs.csv").unlink()
    with pytest.raises(InputError, match="no data to score on"):
        evaluate_segmenter(done.run.path)
    with pytest.raises(InputError, match="no row of split 'other'"):
        evaluate_segmenter(done.run.path, table=tmp_path / "t.csv", split="other")
    with pytest.raises(InputError, match="expected one of manifest, images"):
        train_segmenter(data[0] / "images", table=tmp_path / "t.csv")


@pytest.mark.parametrize("budget, strips", [(1, 4), (2**27, 1)])
def test_parts_do_not_show(data, tmp_path, monkeypatch, budget, strips):
    "Each pixel is what it would be in one part, and a tile is predicted once in each strip that it touches."
    done = small(data, tmp_path, freeze_backbone=True)
    image = np.random.default_rng(0).random((3, 150, 250)).astype(np.float32)
    monkeypatch.setattr("dinolab.tasks.images.BUDGET", budget)
    tiles = all_tiles((1, 150, 250), (1, 32, 32), 0.5)
    predict, seen = ViewPredictor(done.model, image, View(), "the image"), []

    class Counted(ViewPredictor):
        def __call__(self, region):
            seen.append(region)
            return super().__call__(region)

    monkeypatch.setattr("dinolab.tasks.images.ViewPredictor", Counted)
    labels, p = predict_image(done.model, image, (32, 32), probabilities=True)
    whole = blend(predict, np.s_[0:1, 0:150, 0:250], tiles, 2)[:, 0]
    assert np.abs(p / 255 - whole).max() <= 0.5 / 255 + 1e-6 and (labels == whole.argmax(0)).all()
    touched = sum(len({x // 64 for x in range(t.start[2], t.stop[2])}) for t in tiles)
    assert len(seen) - 1 == (len(tiles) if strips == 1 else touched)  # less the probe of the corner


def test_prediction_goes_on_and_loses_nothing(data, tmp_path):
    done = small(data, tmp_path / "runs", freeze_backbone=True)
    out = tmp_path / "out"
    out.mkdir()
    predict_images(done.run.path, data[1] / "images", out)
    first = (out / "1.png").read_bytes()
    (out / "1.png").unlink()
    Image.fromarray(np.full((70, 90), 1, np.uint8)).save(out / "0.png")
    predict_images(done.run.path, data[1] / "images", out)
    assert (np.asarray(Image.open(out / "0.png")) == 1).all() and (out / "1.png").read_bytes() == first
    predict_images(done.run.path, data[1] / "images", out, overwrite=True)
    assert not (np.asarray(Image.open(out / "0.png")) == 1).all()
    both = predict_images(done.run.path, [data[0] / "images", data[1] / "images"], tmp_path / "both")
    assert len(set(both.values())) == len(both) == 7 and all(Path(p).exists() for p in both.values())
    with pytest.raises(InputError, match="has 3 channels: expected 1; set in_channels=3"):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "x.png")
        wide = small(data, tmp_path / "runs", freeze_backbone=True, in_channels=1)
        predict_images(wide.run.path, tmp_path / "x.png", tmp_path / "o")


def test_shipped_recipes_are_valid():
    from dinolab.models.heads import create_segmentation_model
    from dinolab.tasks.recipes import arguments, recipe_of

    for path in (Path(__file__).parents[1] / "nbs/experiments/configs").glob("*.yaml"):
        recipe, keys = recipe_of("train", path)
        given = arguments(recipe, keys)
        if recipe.name == "train_segmenter":
            keys = ("head", "hidden_size", "pool_scales", "neck", "stem", "norm", "lora", "freeze_backbone")
            assert create_segmentation_model(VIT, **{k: given[k] for k in keys}).eval()(
                torch.rand(1, 3, 32, 32)
            ).shape == (1, 1, 32, 32)


def test_a_picture_as_it_was_read(data):
    assert read_image(data[0] / "images/0.png", 3).shape == (3, 70, 90)

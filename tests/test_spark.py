"UNet3+ on the files of the challenge: the commands, bad input, kills, and several processes."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dinolab.core.errors import InputError, MissingError
from dinolab.data.images import ImageDataset
from dinolab.data.tables import spark_pairs
from dinolab.train.losses import make_loss
from dinolab.train.metrics import ConfusionMatrix
from dinolab.train.runs import Run
from dinolab.tasks.configs import TrainUNet3Plus
from dinolab.synth.spacecraft import spacecraft_image, write_spark
from dinolab.tasks.spark import (
    SPARK,
    WholeValidation,
    evaluate_unet3plus,
    infer_unet3plus,
    layer_names,
    load_unet3plus,
    mean_of_mirrored,
    scores_of,
    train_args,
    train_unet3plus,
)
from dinolab.models.unet3plus import UNet3Plus

TINY = [
    "--backbone",
    "resnet10t",
    "--no_pretrained",
    "--cat_channels",
    "4",
    "--batch_size",
    "2",
    "--target_size",
    "32",
    "--num_workers",
    "0",
    "--validate_every",
    "1",
    "--device",
    "cpu",
]
SRUN = """#!/bin/bash
# as many processes as the job has tasks; options are given as --name=value
while [[ $1 == --* ]]; do echo "$1" >>"${0%/*}/srun.log"; shift; done
code=0
for ((i = 0; i < ${SLURM_NTASKS:-1}; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
for ((i = 0; i < ${SLURM_NTASKS:-1}; i++)); do wait -n || code=$?; done
exit $code
"""
SCRIPT = "import sys; from dinolab.cli.main import main; sys.argv[0] = 'dinolab'; main()"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spark")
    write_spark(folder, dict(train=range(6), val=range(10, 13)), shape=(40, 48))
    return folder


def command(*args, processes=1, **env):
    "Start `dinolab unet3plus ARGS`, by torchrun where there are several processes."
    launch = [sys.executable, "-c", SCRIPT]
    if processes > 1:
        file = Path(os.environ.get("TMPDIR", "/tmp")) / "dinolab_main.py"
        file.write_text(SCRIPT)
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(random.Random().randint(20000, 50000)),
            str(file),
        ]
    return subprocess.Popen(
        [*launch, "unet3plus", *map(str, args)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | env,
    )


def run(*args, processes=1, **env):
    done = command(*args, processes=processes, **env)
    return done.communicate()[0], done.returncode


def weights(folder, name="unet3plus_final"):
    return (folder / name / "unet3plus_model.safetensors").read_bytes()


def test_commands_and_their_files(data, tmp_path):
    out, code = run(
        "train",
        *TINY,
        "--data_root",
        data,
        "--save_path",
        tmp_path / "m",
        "--epochs",
        2,
        "--save_every",
        1,
        "--deep_supervision",
        "--cgm",
    )
    assert code == 0, out
    assert {p.name for p in (tmp_path / "m").glob("unet3plus_*")} == {
        "unet3plus_best",
        "unet3plus_final",
        "unet3plus_epoch_1",
        "unet3plus_epoch_2",
    } and (tmp_path / "m/training_plots.png").stat().st_size > 5000
    config = json.loads((tmp_path / "m/unet3plus_best/config.json").read_text())
    assert (
        config["backbone"] == "resnet10t"
        and config["target_size"] == 32
        and config["network"]["deep_supervision"]
        and config["network"]["cgm"]
    )
    out, code = run(
        "eval",
        "--model_path",
        tmp_path / "m/unet3plus_best",
        "--val_csv",
        data / "val.csv",
        "--image_root",
        data / "images",
        "--mask_root",
        data / "mask",
        "--output_path",
        tmp_path / "e",
        "--save_examples",
        "--num_examples",
        2,
    )
    assert code == 0, out
    assert sorted(str(p.relative_to(tmp_path / "e")) for p in (tmp_path / "e").rglob("*.*")) == [
        "confusion_matrix.png",
        "evaluation_report.txt",
        "examples/example_0.png",
        "examples/example_1.png",
        "metrics.json",
    ]
    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    assert set(metrics) == {"overall", "per_satellite", "mean_iou_per_image"} and set(
        metrics["overall"]["per_class"]
    ) == set(SPARK.names)
    assert (
        sum(c["support"] for c in metrics["overall"]["per_class"].values()) == 3 * 40 * 48
    )  # at the size of the pictures
    (tmp_path / "in").mkdir()
    for i in range(5):
        Image.fromarray(spacecraft_image((30, 50), i).image).save(tmp_path / f"in/test_{i:05}_img.jpg")
    out, code = run(
        "infer",
        "--model_path",
        tmp_path / "m/unet3plus_best",
        "--data_path",
        tmp_path / "in",
        "--output_dir",
        tmp_path / "o",
        "--num_workers",
        0,
        "--save_visualizations",
        processes=2,
    )
    assert code == 0, out
    assert sorted(p.name for p in (tmp_path / "o").glob("[!.]*")) == sorted(
        f"test_{i:05}_{k}" for i in range(5) for k in ("layer.npz", "vis.png")
    )
    layer = np.load(tmp_path / "o/test_00003_layer.npz")["data"]
    assert layer.shape == (30, 50, 3) and layer.dtype == bool and not layer[..., 1].any()
    colours = np.asarray(Image.open(tmp_path / "o/test_00003_vis.png"))
    assert ((colours > 127) == layer).all()
    assert (
        infer_unet3plus(
            model_path=tmp_path / "m/unet3plus_best",
            data_path=tmp_path / "in",
            output_dir=tmp_path / "o",
            num_workers=0,
            npz_dtype="uint8",
            overwrite=True,
        )
        == 5
    )
    assert (np.load(tmp_path / "o/test_00003_layer.npz")["data"] == layer * np.uint8(255)).all()


def test_report_agrees_with_torchmetrics(data, tmp_path):
    from torchmetrics.classification import MulticlassJaccardIndex
    from torchmetrics.segmentation import DiceScore

    pred, true = torch.randint(3, (4, 20, 30)), torch.randint(2, (4, 20, 30))  # class 2 is never true
    scores = scores_of(ConfusionMatrix(list(SPARK.names)).update(pred, true))
    iou, dice = (
        MulticlassJaccardIndex(3, average=None)(pred, true),
        DiceScore(3, average=None, aggregation_level="global", input_format="index")(pred, true),
    )
    for i, c in enumerate(SPARK.names):
        assert (
            abs(scores["per_class"][c]["iou"] - iou[i]) < 1e-6
            and abs(scores["per_class"][c]["dice"] - dice[i]) < 1e-6
        )
    none = scores_of(ConfusionMatrix(list(SPARK.names)).update(true, true))
    assert (
        none["per_class"]["solar panels"]["iou"] is None and none["mean_iou"] == none["mean_iou_no_bg"] == 1.0
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_trainings_end_with_the_same_bytes(processes, data, tmp_path):
    args = [
        "train",
        *TINY,
        "--data_root",
        data,
        "--epochs",
        10,
        "--save_every",
        3,
        "--deep_supervision",
        "--no_check",
    ]
    began = time.time()
    out, code = run(*args, "--save_path", tmp_path / "whole", processes=processes)
    assert code == 0, out
    length, rng, kills = (
        time.time() - began,
        random.Random(processes),
        int(os.environ["DINOLAB_KILLS"]),
    )
    for n in range(kills):
        going = command(*args, "--save_path", tmp_path / "killed", "--resume", processes=processes)
        try:
            going.communicate(timeout=length * rng.uniform(0.5, 1))
        except subprocess.TimeoutExpired:
            os.killpg(going.pid, signal.SIGKILL)
            going.communicate()
    out, code = run(*args, "--save_path", tmp_path / "killed", "--resume", processes=processes)
    assert code == 0, out
    for name in ("unet3plus_final", "unet3plus_best", "unet3plus_epoch_3", "unet3plus_epoch_9"):
        assert weights(tmp_path / "whole", name) == weights(tmp_path / "killed", name), name
    lines = lambda p: [
        {k: v for k, v in json.loads(l).items() if k != "seconds"}
        for l in (p / "log.jsonl").read_text().splitlines()
    ]
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_validation_counts_each_picture_once(data):
    pictures = spark_pairs(data / "train.csv", data / "images", data / "mask")
    torch.manual_seed(0)
    net, whole = (
        UNet3Plus("resnet10t", 3, cat_channels=4).eval(),
        ImageDataset(pictures, SPARK, (32, 32), channels=3, augment=None, whole=True),
    )
    with torch.no_grad():
        scores = [WholeValidation(whole, make_loss("ce"), n)(net) for n in (1, 4, 6)]
    for s in scores[1:]:
        assert abs(s["loss"] - scores[0]["loss"]) < 1e-5 and s["mean_iou"] == scores[0]["mean_iou"]


@pytest.mark.parametrize(
    "change, error",
    [
        (
            lambda d: (d / "train.csv").write_text("Class,Image\na,b\n"),
            "expected Class, Image name, Mask name; Image name is missing",
        ),
        (lambda d: (d / "train.csv").write_text("Class,Image name,Mask name\n"), "no rows"),
        (lambda d: next((d / "images").rglob("train/*.jpg")).unlink(), "1 files are not there, such as"),
        (
            lambda d: next((d / "images").rglob("train/*.jpg")).write_bytes(b"\xff\xd8\xff junk"),
            "1 of 4 images cannot be used",
        ),
        (
            lambda d: (
                (p := next((d / "mask").rglob("train/*.jpg"))) and Image.open(p).resize((10, 10)).save(p)
            ),
            "expected the same size",
        ),
        (
            lambda d: (
                (p := next((d / "images").rglob("train/*.jpg"))) and p.write_bytes(p.read_bytes()[:600])
            ),
            "1 of 4 images cannot be used",
        ),
    ],
)
def test_bad_data_is_one_line(change, error, tmp_path):
    write_spark(tmp_path / "d", dict(train=range(4), val=range(4, 6)), shape=(40, 48))
    change(tmp_path / "d")
    with pytest.raises((InputError, MissingError)) as e:
        train_unet3plus(
            backbone="resnet10t",
            pretrained=False,
            data_root=str(tmp_path / "d"),
            save_path=str(tmp_path / "m"),
        )
    assert error in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "m/run.json").exists()


def test_unreadable_pictures_can_be_left_out(tmp_path, capsys):
    write_spark(tmp_path / "d", dict(train=range(5), val=range(5, 7)), shape=(40, 48))
    bad = next((tmp_path / "d/images").rglob("train/*.jpg"))
    bad.write_bytes(bad.read_bytes()[:600])
    small = dict(
        backbone="resnet10t",
        pretrained=False,
        cat_channels=4,
        epochs=1,
        batch_size=2,
        target_size=32,
        num_workers=0,
        data_root=str(tmp_path / "d"),
        device="cpu",
    )
    train_unet3plus(**small, save_path=str(tmp_path / "m"), skip_unreadable=True)
    assert f"left out 1 of 5 images: {bad}" in capsys.readouterr().out
    with pytest.raises(InputError, match="skip_unreadable goes on without it"):
        infer_unet3plus(
            model_path=tmp_path / "m/unet3plus_final",
            data_path=bad.parent,
            output_dir=tmp_path / "o",
            num_workers=0,
        )
    infer_unet3plus(
        model_path=tmp_path / "m/unet3plus_final",
        data_path=bad.parent,
        output_dir=tmp_path / "o",
        num_workers=0,
        skip_unreadable=True,
    )
    assert "left out 1 of" in capsys.readouterr().out and not (tmp_path / f"o/{bad.stem}_layer.npz").exists()


def test_flags_are_checked(data, tmp_path):
    for args, error in [
        (["train", "--epoch", 3], "no flag --epoch, did you mean --epochs"),
        (["train", "--epochs", "many"], "'many': expected a whole number"),
        (["infer", "--data_path", data], "Missing option '--model_path'"),
        (["eval", "--model_path", tmp_path], "no model in"),
        (
            [
                "train",
                "--backbone",
                "resnet3400",
                "--no_pretrained",
                "--data_root",
                data,
                "--save_path",
                tmp_path / "x",
            ],
            "resnet34",
        ),
    ]:
        out, code = run(*args)
        assert code == 2 and error in out and out.startswith("dinolab: ") and out.count("\n") == 1, out


def test_a_model_of_another_architecture(data, tmp_path):
    small = dict(
        backbone="resnet10t",
        pretrained=False,
        cat_channels=4,
        epochs=1,
        batch_size=2,
        target_size=32,
        num_workers=0,
        data_root=str(data),
        device="cpu",
        save_path=str(tmp_path / "m"),
    )
    train_unet3plus(**small)
    file = tmp_path / "m/unet3plus_final/config.json"
    file.write_text(file.read_text().replace('"cat_channels": 4', '"cat_channels": 5'))
    with pytest.raises(InputError, match="another architecture"):
        load_unet3plus(tmp_path / "m/unet3plus_final")


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    "Two trainings of one epoch."
    folder = tmp_path_factory.mktemp("models")
    small = dict(
        backbone="resnet10t",
        pretrained=False,
        cat_channels=4,
        epochs=1,
        batch_size=2,
        target_size=32,
        num_workers=0,
        save_every=1,
        validate_every=1,
        data_root=str(data),
        device="cpu",
    )
    for seed in (0, 1):
        train_unet3plus(**small, seed=seed, save_path=str(folder / str(seed)))
    return folder, small


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_models_come_after_a_kill(models, tmp_path):
    "A kill between the last checkpoint and the folders of its models: going on brings them, byte for byte."
    folder, small = models
    shutil.copytree(folder / "0", tmp_path / "m")
    for name in ("unet3plus_final", "unet3plus_epoch_1"):
        shutil.rmtree(tmp_path / "m" / name)
    train_unet3plus(**small, seed=0, save_path=str(tmp_path / "m"), resume=True)
    for name in ("unet3plus_final", "unet3plus_epoch_1", "unet3plus_best"):
        assert weights(tmp_path / "m", name) == weights(folder / "0", name), name


def test_a_refused_resume_changes_nothing(models, data, tmp_path):
    folder, small = models
    shutil.copytree(folder / "0", tmp_path / "m")
    shutil.copytree(data, tmp_path / "data")
    before = everything(tmp_path / "m")
    mask = next((tmp_path / "data/mask").rglob("train/*.jpg"))
    Image.open(mask).rotate(180).save(mask)
    for message, change in (
        ("lr (0.001 there, 1.0 now)", dict(lr=1.0)),
        ("loss", dict(loss="ce")),
        ("masks: not those", dict(data_root=str(tmp_path / "data"))),
        ("seed", dict(seed=3)),
    ):
        with pytest.raises(InputError) as e:
            train_unet3plus(**small | change, save_path=str(tmp_path / "m"), resume=True)
        assert message in str(e.value) and "\n" not in str(e.value)
        assert everything(tmp_path / "m") == before
    with pytest.raises(InputError, match="holds a training: --resume"):
        train_unet3plus(**small, save_path=str(tmp_path / "m"))


def test_a_training_stops_in_time_and_goes_on(models, tmp_path):
    "With checkpoints between the epochs; there is no final model until it is done."
    folder, small = models
    part = small | dict(save_path=str(tmp_path / "m"), seed=0, checkpoint_every=1)
    train_unet3plus(**part, max_seconds=1e-9)
    assert not (tmp_path / "m/unet3plus_final").exists()
    train_unet3plus(**part, resume=True)
    assert weights(tmp_path / "m") == weights(folder / "0")


def test_results_are_of_one_model(models, data, tmp_path):
    "infer refuses a folder of another model; examples of an earlier evaluation go."
    folder, _ = models
    call = dict(data_path=str(next((data / "images").rglob("val"))), num_workers=0)
    call |= dict(output_dir=str(tmp_path / "o"))
    assert infer_unet3plus(model_path=str(folder / "0/unet3plus_final"), **call) > 0
    before = everything(tmp_path / "o")
    assert infer_unet3plus(model_path=str(folder / "0/unet3plus_final"), **call) == 0
    for change in (dict(model_path=str(folder / "1/unet3plus_final")), dict(npz_dtype="uint8")):
        with pytest.raises(InputError, match="there, .* now"):
            infer_unet3plus(**dict(model_path=str(folder / "0/unet3plus_final")) | call | change)
        assert everything(tmp_path / "o") == before
    tables = dict(val_csv=str(data / "val.csv"), image_root=str(data / "images"))
    tables |= dict(mask_root=str(data / "mask"), output_path=str(tmp_path / "e"), save_examples=True)
    for model, count in (("0", 2), ("1", 1)):
        path = str(folder / model / "unet3plus_final")
        evaluate_unet3plus(model_path=path, num_examples=count, **tables)
        assert len(list((tmp_path / "e/examples").iterdir())) == count


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "unet3plus"}'])
def test_a_damaged_model_is_one_line(models, tmp_path, text):
    shutil.copytree(models[0] / "0/unet3plus_final", tmp_path / "m")
    (tmp_path / "m/config.json").write_text(text)
    with pytest.raises(InputError, match="config.json is damaged") as e:
        load_unet3plus(tmp_path / "m")
    assert "\n" not in str(e.value)


def test_names_keep_the_whole_stem():
    assert layer_names(["a/test_00000.jpg", "a/b.c_d.png", "a/e_img.jpg"]) == {
        "a/test_00000.jpg": "test_00000",
        "a/b.c_d.png": "b.c_d",
        "a/e_img.jpg": "e",
    }
    with pytest.raises(InputError, match="would both write x_layer.npz"):
        layer_names(["a/x.jpg", "a/x_img.jpg"])


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, data, tmp_path):
    "Two processes under ZeRO, where DeepSpeed is installed: stopped by a signal in the middle, the same weights in the end."
    pytest.importorskip("deepspeed")
    args = ["train", *TINY, "--data_root", data, "--epochs", 8, "--deepspeed", "--zero_stage", stage]
    out, code = run(*args, "--save_path", tmp_path / "whole", processes=2, DS_ACCELERATOR="cpu")
    assert code == 0, out[-2000:]
    going = command(*args, "--save_path", tmp_path / "cut", processes=2, DS_ACCELERATOR="cpu")
    state = tmp_path / "cut/checkpoints/last/state.json"
    while going.poll() is None and not state.exists():
        time.sleep(0.05)
    os.killpg(going.pid, signal.SIGTERM)
    out = going.communicate(timeout=100)[0]
    assert json.loads((tmp_path / "cut/run.json").read_text())["status"] == "stopped", out[-2000:]
    assert json.loads(state.read_text())["epoch"] < 8
    out, code = run(*args, "--resume", "--save_path", tmp_path / "cut", processes=2, DS_ACCELERATOR="cpu")
    assert code == 0, out[-2000:]
    whole, cut = (
        tmp_path / name / "unet3plus_final/unet3plus_model.safetensors" for name in ("whole", "cut")
    )
    assert whole.read_bytes() == cut.read_bytes()
    trained = load_unet3plus(whole.parent)
    assert all(p.isfinite().all() and p.numel() for p in trained.model.parameters())


def test_slurm_scripts(data, tmp_path):
    "The scripts as they are, with one node of two processes in the place of the cluster: train, then eval and infer."
    launch, tools = Path(__file__).parents[1] / "nbs/experiments/launch", tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tools / "dinolab").write_text(f"#!{sys.executable}\n{SCRIPT}\n")
    for f in tools.iterdir():
        f.chmod(0o755)
    env = dict(
        os.environ,
        PATH=f"{tools}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST="localhost",
        SLURM_NNODES="1",
        SLURM_NTASKS="2",
        SLURM_JOB_ID="7",
        SLURM_CPUS_PER_TASK="1",
        PORT=str(random.Random().randint(20000, 50000)),
        OMP_NUM_THREADS="1",
    )

    def job(name, *args, tasks=2):
        env["SLURM_NTASKS"] = str(tasks)
        done = subprocess.run(
            ["bash", launch / f"unet3plus_{name}.slurm", *map(str, args)],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    job("train", *TINY, "--data_root", data, "--epochs", 1, "--save_path", tmp_path / "m")
    job(
        "eval",
        "--model_path",
        tmp_path / "m/unet3plus_best",
        "--val_csv",
        data / "val.csv",
        "--image_root",
        data / "images",
        "--mask_root",
        data / "mask",
        "--output_path",
        tmp_path / "e",
        tasks=1,
    )
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(spacecraft_image((30, 50), i).image).save(tmp_path / f"in/{i}.jpg")
    job(
        "infer",
        "--model_path",
        tmp_path / "m/unet3plus_best",
        "--data_path",
        tmp_path / "in",
        "--output_dir",
        tmp_path / "o",
        "--num_workers",
        0,
    )
    assert (tmp_path / "e/metrics.json").exists() and len(list((tmp_path / "o").glob("*.npz"))) == 3
    for script in launch.iterdir():
        assert not any(word in script.read_text() for word in ("/project/", "/scratch", "--account=p"))


def test_averaged_weights_are_whole(models, data, tmp_path):
    "With an average the best model has all its weights; flags of the loop reach it."
    _, small = models
    more = dict(ema=0.5, accumulate=2, clip=0.5, epochs=2, save_path=str(tmp_path / "m"))
    train_unet3plus(**small | more)
    best = safetensors.torch.load_file(tmp_path / "m/checkpoints/best/model.safetensors")
    model = load_unet3plus(tmp_path / "m/unet3plus_best").model
    assert set(best) == set(model.state_dict())
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    steps = [line["step"] for line in Run.open(tmp_path / "m").history()]
    assert max(steps) == 4  # 6 images in batches of 2, two batches a step


def test_start_from_a_trained_model(models, data, tmp_path, capfd):
    "Other epochs, size and decoder: what fits is taken over, from a model, a run or a file; the rest is named."
    folder, small = models
    trained = load_unet3plus(folder / "0/unet3plus_best").model.state_dict()
    begun = []

    def look(model, *args, **options):
        begun.append({name: value.clone() for name, value in model.state_dict().items()})
        raise InputError("enough")

    places = ("0", "0/unet3plus_best", "0/unet3plus_best/unet3plus_model.safetensors")
    for place, more in zip(places, (dict(target_size=48), dict(epochs=3), dict(cat_channels=5))):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="enough"):
            patch.setattr("dinolab.train.loop._fit", look)
            change = dict(seed=5, init=str(folder / place), save_path=str(tmp_path / str(len(begun))))
            train_unet3plus(**small | change | more)
        state = begun[-1]
        same = [n for n in state if n in trained and state[n].shape == trained[n].shape]
        assert all(torch.equal(state[name], trained[name]) for name in same)
        said = capfd.readouterr().err
        assert f"init: {len(same)} of {len(state)} tensors are those of {folder / '0'}" in said
    assert len(same) < len(state) and "(4 there, 5 here)" in said
    for wrong, error in (("nowhere", "no weights in"), (str(data), "no weights in")):
        with pytest.raises(InputError, match=error):
            train_unet3plus(**small | dict(init=wrong, save_path=str(tmp_path / "x")))


def test_a_resumed_training_does_not_begin_anew(models, tmp_path):
    "init counts once: a run that goes on needs it no more."
    folder, small = models
    shutil.copytree(folder / "1/unet3plus_best", tmp_path / "first")
    part = small | dict(epochs=3, seed=2, init=str(tmp_path / "first"))
    train_unet3plus(**part, save_path=str(tmp_path / "whole"))
    train_unet3plus(**part, save_path=str(tmp_path / "cut"), checkpoint_every=1, max_seconds=1e-9)
    shutil.rmtree(tmp_path / "first")
    train_unet3plus(**part, save_path=str(tmp_path / "cut"), resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_mirrored_predictions(models, data):
    "A network that is blind to mirroring says the same; any other what numpy averages."
    trained = load_unet3plus(models[0] / "0/unet3plus_final", fp16=False)
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        found = mean_of_mirrored(trained.model, images)
        views = [images, images.flip(3), images.flip(2), images.flip(2, 3)]
        said = [trained.model(view).softmax(1).numpy() for view in views]
    back = [said[0], said[1][..., ::-1], said[2][:, :, ::-1], said[3][:, :, ::-1, ::-1]]
    assert np.allclose(found.exp().numpy(), np.mean(back, 0), atol=1e-6)
    with torch.no_grad():
        mirrored = mean_of_mirrored(trained.model, images.flip(3))
    assert torch.allclose(mirrored.flip(3), found, atol=1e-5)


def test_patience_counts_epochs():
    "15 epochs with a validation every 2 are 8 validations; as long as the training, it is never."
    flags = dict(manifest="spacecraft_phantom")
    for given, validations in (
        (dict(patience=15, validate_every=2, epochs=30), 8),
        (dict(patience=4, validate_every=2, epochs=30), 2),
        (dict(patience=15, epochs=15), 0),
        (dict(patience=0), 0),
    ):
        assert train_args(TrainUNet3Plus(**flags | given)).patience == validations


def test_log_files_get_a_line_per_epoch(data, tmp_path):
    "Loss, validation and rate, seconds and the time that is left, where standard error is no terminal."
    out, code = run("train", *TINY, "--data_root", data, "--save_path", tmp_path / "m", "--epochs", 3)
    assert code == 0, out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {n} of 3" for n in (1, 2, 3)]
    for line in lines:
        assert all(name in line for name in (" loss ", "valid loss ", "valid mean_iou ", "lr ")), line
    assert lines[0].endswith(" left") and lines[-1].endswith("done")


def test_pictures_of_results_can_be_asked_for_later(models, data, tmp_path):
    call = dict(data_path=str(next((data / "images").rglob("val"))), num_workers=0)
    call |= dict(output_dir=str(tmp_path), model_path=str(models[0] / "0/unet3plus_final"))
    count = infer_unet3plus(**call)
    assert infer_unet3plus(**call, save_visualizations=True) == count
    assert len(list(tmp_path.glob("*_vis.png"))) == count
    assert infer_unet3plus(**call, save_visualizations=True) == 0


def test_a_model_of_the_earlier_program(tmp_path):
    (tmp_path / "unet3plus_model.pt").write_bytes(b"")
    with pytest.raises(InputError, match="unet3plus_model.pt of another program"):
        load_unet3plus(tmp_path)


def test_masks_of_other_colours_are_refused(models, data, tmp_path):
    "Channels that were swapped are not mapped to the nearest colour."
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/mask").rglob("*.jpg"):
        red, green, blue = Image.open(path).convert("RGB").split()
        Image.merge("RGB", (blue, red, green)).save(path, quality=95)
    change = dict(data_root=str(tmp_path / "data"), save_path=str(tmp_path / "m"))
    with pytest.raises(InputError, match="none of the colours #000000, #ff0000, #0000ff"):
        train_unet3plus(**models[1] | change)
    assert not (tmp_path / "m").exists()

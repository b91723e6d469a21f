"Networks that travel: exports without run and backbone, ONNX of any size, the hub."

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinolab.core.errors import InputError
from dinolab.models.backbones import create_backbone
from dinolab.models.heads import create_segmentation_model
from dinolab.models.pretrained import push_folder
from dinolab.models.specs import LoraSpec
from dinolab.models.unet3plus import UNet3Plus
from dinolab.synth.spacecraft import write_spark
from dinolab.tasks.export import SIZES, export_onnx, export_run, weights_origin
from dinolab.tasks.images import as_planes, load_exported, predict_image, train_segmenter
from dinolab.tasks.recipes import run_recipe
from dinolab.tasks.spark import load_unet3plus, train_unet3plus
from dinolab.train.settings import TrainArgs

VIT = "vit_tiny_patch16_224"


def network(backbone, head, **options):
    "A small network in evaluation mode."
    with redirect_stderr(io.StringIO()):
        return create_segmentation_model(backbone, head=head, num_classes=3, **options).eval()


def shapes(folder, channels, n=3):
    "Bright squares on dark ground, and their masks of 0 and 255."
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        mask = np.zeros((70, 90), np.uint8)
        mask[20 + i : 50, 10 * i + 5 : 60] = 1
        image = (60 + 120 * mask[..., None] + rng.integers(0, 40, (70, 90, channels))).astype(np.uint8)
        if channels <= 3:
            Image.fromarray(image[..., 0] if channels == 1 else image).save(folder / f"images/{i}.png")
        else:
            import tifffile

            tifffile.imwrite(folder / f"images/{i}.tif", image, photometric="minisblack")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    return folder


def trained(folder, channels=3, **options):
    "A run of one epoch."
    given = dict(backbone=VIT, layers=(0, 1), head="linear", crop=64, scale=(1, 1), crops_per_epoch=4)
    args = TrainArgs(epochs=1, batch_size=2, lr=3e-3, monitor="mean_iou", mode="max", device="cpu")
    data = shapes(folder / f"data{channels}", channels)
    with redirect_stderr(io.StringIO()):
        return train_segmenter(
            data / "images",
            data / "masks",
            classes=["ground", "square"],
            in_channels=channels,
            out=folder / "runs",
            train=args,
            **given | options,
        )


RUNS = dict(
    adapters=dict(lora=LoraSpec(rank=2), stem=4),
    rotary=dict(backbone="vit_small_patch16_dinov3", freeze_backbone=True),
    positions=dict(weights="positions.pth", freeze_backbone=True),
    grey=dict(channels=1, backbone="resnet18", layers=None, head="segformer", hidden_size=8),
    bands=dict(channels=5, backbone="convnext_atto", layers=None, head="upernet", hidden_size=8),
    mask=dict(backbone="resnet10t", layers=None, head="mask", hidden_size=16, queries=5, decoder_layers=1),
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in ("rotary", "grey") else n for n in RUNS]
)
def test_an_export_needs_nothing_else(name, tmp_path):
    "Without the run and the file of the backbone, the network gives the same logits, and the same masks."
    options = dict(RUNS[name])
    if "weights" in options:  # positions of another grid than timm's
        vit = create_backbone(VIT)
        state = vit.model.state_dict()
        state["pos_embed"] = torch.randn(1, 1 + 9 * 9, 192)
        options["weights"] = str(tmp_path / options["weights"])
        torch.save(state, options["weights"])
    done = trained(tmp_path, **options)
    if name == "mask":
        assert (len(done.model.head.decoder.decoder.layers), done.about["network"]["queries"]) == (1, 5)
    channels = done.about["in_channels"]
    image = torch.rand(2, channels, 50, 61)
    with torch.no_grad():
        expected = done.model(image)
    labels = predict_image(done.model, image[0].numpy(), (64, 64))[0]
    out = export_run(str(done.run.path), str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "positions.pth").unlink(missing_ok=True)
    with redirect_stderr(io.StringIO()) as said:
        loaded = load_exported(out)
    assert said.getvalue() == ""
    with torch.no_grad():
        assert (loaded.model(image) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
    found, p = loaded.predict(image[0].numpy())
    assert (found == labels).mean() > 0.999 and p.shape == (2, 50, 61)
    assert np.allclose(p.sum(0), 1, atol=1e-4)
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in (out / file).read_text()


def test_who_may_use_it():
    "The origin of the weights is said, and random ones are said to be random."
    assert "random weights, seed 4" in weights_origin(dict(name="resnet18", weights=None), 4)["note"]
    assert (
        weights_origin(dict(name="dinov3", size="small", weights="pretrained"))["licence"] == "DINOv3 License"
    )
    file = weights_origin(dict(name="resnet18", size=None, weights="/secret/place/w.pth"))
    assert file["file"] == "w.pth" and "/secret" not in json.dumps(file)


def dinolab(*args, folder):
    return subprocess.run(
        [sys.executable, "-c", "from dinolab.cli.main import main; main()", *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "An export, its data, and its run."
    folder = tmp_path_factory.mktemp("exported")
    done = trained(folder)
    return export_run(str(done.run.path), str(folder / "model")), folder / "data3", done.run.path


def test_commands(exported, tmp_path):
    "An export stands where a run does, and a second one is refused."
    out, data, run = exported
    found = dinolab("predict", out, data / "images", "masks", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert sorted(p.name for p in (tmp_path / "masks").glob("*.png")) == ["0.png", "1.png", "2.png"]
    scores = run_recipe("evaluate", pairs=[f"run={out}", f"images={data}/images", f"masks={data}/masks"])
    assert "test/mean_iou" in scores and "test/mean_iou" in json.loads((out / "metrics.json").read_text())
    again = dinolab("export", run, out, folder=tmp_path)
    assert (
        again.returncode == 2 and "expected a new folder" in again.stderr and "\n" not in again.stderr.strip()
    )


@pytest.mark.parametrize(
    "image,message",
    [
        (np.zeros((9, 9, 5), np.uint8), "image of 5 channels, read as h w c: expected 3"),
        (np.zeros((9, 9, 3), np.float32), "image of 9 channels, read as c h w: expected 3"),
        (np.full((3, 9, 9), 255.0), "image from 255 to 255: expected numbers from 0 to 1"),
        (np.full((3, 9, 9), np.nan), "expected numbers from 0 to 1"),
        (np.zeros((2, 3, 9, 9)), "expected h w or h w c"),
        (np.zeros((0, 9)), "expected h w or h w c"),
        (np.zeros((9, 9), np.int64), "expected h w or h w c"),
    ],
)
def test_arrays_that_are_no_images(image, message):
    with pytest.raises(InputError) as e:
        as_planes(image, 3)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_arrays():
    "8 and 16 bits, rows first or channels first, are one image."
    x = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    planes = x.transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(as_planes(x, 3), planes)
    assert np.allclose(as_planes(x.astype(np.uint16) * 257, 3), planes)
    assert np.array_equal(as_planes(torch.from_numpy(planes), 3), planes)
    assert as_planes(x[..., 0], 3).shape == (3, 9, 7)


def test_an_export_of_unet3plus(tmp_path):
    "Run folder and model folder lead to the same logits at the size of the training, and to masks at any size."
    write_spark(tmp_path / "spark", dict(train=range(2), val=range(2, 4)), shape=(40, 48))
    small = dict(backbone="resnet10t", pretrained=False, cat_channels=4, target_size=32, cgm=True)
    args = dict(epochs=1, batch_size=2, num_workers=0, device="cpu", data_root=str(tmp_path / "spark"))
    with redirect_stderr(io.StringIO()):
        run = train_unet3plus(**small, **args, save_path=str(tmp_path / "model"), deep_supervision=True)
    image, large = torch.rand(2, 3, 32, 32), torch.rand(1, 3, 41, 57)
    shrunk = F.interpolate(large, size=(32, 32), mode="bilinear", antialias=True)
    outs = []
    with torch.no_grad():
        trained = load_unet3plus(run / "unet3plus_best", fp16=False).model.cpu()
        expected = trained(image)
        back = F.interpolate(trained(shrunk), size=(41, 57), mode="bilinear")
    for place, name in ((run, "out"), (run / "unet3plus_best", "again")):
        outs.append(export_run(str(place), str(tmp_path / name)))
    shutil.rmtree(run)
    with torch.no_grad():
        for out in outs:
            loaded = load_exported(out)
            assert (loaded.model(image) - expected).abs().max() <= 1e-5
            assert (loaded.model(large) - back).abs().max() <= 1e-5
    labels, p = loaded.predict(large[0].numpy())
    assert (labels == back[0].argmax(0).numpy()).mean() > 0.999 and len(p) == len(loaded.classes)


NETWORKS = dict(
    linear=lambda: network(VIT, "linear", layers=(0,)),
    rotary=lambda: network("vit_small_patch16_dinov3", "linear", layers=(0,), in_channels=1),
    upernet=lambda: network("resnet10t", "upernet", hidden_size=8),
    dpt=lambda: network("convnext_atto", "dpt", hidden_size=8),
    stem=lambda: network(
        "resnet10t", "segformer", hidden_size=8, stem=4, upsampler="transpose", in_channels=5
    ),
    mask=lambda: network("resnet10t", "mask", hidden_size=16, queries=4, decoder_layers=1),
    unet3plus=lambda: UNet3Plus("resnet10t", cat_channels=8, decoder="simple", cgm=True).eval(),
)


@pytest.mark.parametrize(
    "name", [name if name == "linear" else pytest.param(name, marks=pytest.mark.long) for name in NETWORKS]
)
def test_onnx_of_any_size(name, tmp_path):
    "onnxruntime computes what the network does at ten sizes, of which few are multiples of the stride."
    pytest.importorskip("onnxruntime")
    with redirect_stderr(io.StringIO()):
        model = NETWORKS[name]()
    channels = len(model.backbone.mean)
    about = export_onnx(model, tmp_path / "m.onnx", channels)
    assert about["largest_difference"] <= 1e-4 and len(SIZES) == 10
    assert about["opset"] >= 18 and (about["input"], about["output"]) == ("image", "logits")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name", ("dpt14", *(pytest.param(f"{h}14", marks=pytest.mark.long) for h in ("upernet", "mask")))
)
def test_torch_export_of_any_size(name):
    "A patch of 14 gives strides of 3.5 and 7/8 pixels; what is traced at one size is right at others."
    head = name.removesuffix("14")
    model = network("vit_small_patch14_dinov2", head, layers=(0, 1, 2, 3), hidden_size=8).requires_grad_(
        False
    )
    free = torch.export.Dim.DYNAMIC
    dynamic = dict(image={0: free, 2: free, 3: free})
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(2, 3, 70, 90),), dynamic_shapes=dynamic).module()
        for shape in ((1, 3, 64, 64), (3, 3, 37, 113), (2, 3, 129, 50)):
            image = torch.rand(shape)
            assert (program(image) - model(image)).abs().max() < 1e-5


@pytest.mark.long
def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    "A graph that computes something else is refused, and so is a network that cannot be traced."
    pytest.importorskip("onnxruntime")
    model = network("resnet10t", "linear")
    monkeypatch.setattr("dinolab.tasks.export._difference", lambda *_: 0.5)
    with pytest.raises(InputError, match="differs from the network by 5.0e-01"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    guided = network("resnet10t", "linear", upsampler="joint_bilateral")
    with pytest.raises(InputError) as e:
        export_onnx(guided, tmp_path / "m.onnx")
    assert "cannot be written as ONNX" in str(e.value) and "\n" not in str(e.value)


class Shelf:
    "A hub that is a folder."

    def __init__(self, folder, broken=False):
        self.folder, self.broken, self.private = folder, broken, None

    def create_repo(self, repo, private, exist_ok):
        self.private = private
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.broken:
            raise ConnectionError("no route\nto host")
        shutil.copytree(folder_path, self.folder / repo_id)


def test_push(exported, tmp_path):
    "What arrives loads; private unless told otherwise; without a network one line."
    out, _, _ = exported
    shelf = Shelf(tmp_path)
    assert push_folder(out, "me/model", api=shelf) == "https://hub/me/model" and shelf.private
    assert (
        load_exported(tmp_path / "me/model").about["weights_hash"] == load_exported(out).about["weights_hash"]
    )
    with pytest.raises(InputError) as e:
        push_folder(out, "me/model", api=Shelf(tmp_path, broken=True))
    assert "cannot be pushed to me/model" in str(e.value) and "\n" not in str(e.value)


def test_push_offline(exported, tmp_path, monkeypatch):
    "The hub's own client, with no hub in reach."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    out, _, _ = exported
    with pytest.raises(InputError) as e:
        push_folder(out, "me/model")
    assert "\n" not in str(e.value)


def test_a_damaged_export(exported, tmp_path):
    "One line for what is not whole."
    out, _, run = exported
    with pytest.raises(InputError, match="no export in"):
        load_exported(tmp_path)
    broken = shutil.copytree(out, tmp_path / "broken")
    (broken / "config.json").write_text('{"kind": "segmenter"')
    with pytest.raises(InputError, match="is damaged"):
        load_exported(broken)
    cut = shutil.copytree(out, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is damaged"):
        load_exported(cut)
    other = shutil.copytree(run, tmp_path / "volume")
    about = json.loads((other / "model.json").read_text()) | dict(kind="unet3d")
    (other / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="is a run of unet3d: expected one of train_segmenter"):
        export_run(str(other), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()

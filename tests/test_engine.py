"Killed at random moments, on one process and on two, training ends with the same bytes; faults leave what was there."

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from dinolab.core.errors import InputError
from dinolab.train.settings import TrainArgs
from dinolab.train.loop import fit
from dinolab.train.checkpoints import load_checkpoint, save_checkpoint
from dinolab.train.runs import Run

KILLS = int(os.environ.get("DINOLAB_KILLS", 3))  # per variant; 20 for the full test
SCRIPT = """
import sys, time, json, torch
from torch import nn
from dinolab.train.settings import TrainArgs
from dinolab.train.loop import fit
from dinolab.train.runs import Run
torch.set_num_threads(1)

class Items:
    def __len__(self): return 26
    def item(self, index, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.rand(2, 8, 8, generator=g)
        return dict(x=x, y=(x.sum(0) > 1).long())

def step(model, batch):
    time.sleep(float(sys.argv[3]))
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"]), {}

if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 2, 1))
    fit(model, step, Items(), None, TrainArgs(**json.loads(sys.argv[2])), Run.open(sys.argv[1]))
"""
VARIANTS = {
    "plain": (1, {}),
    "workers": (1, dict(workers=2)),
    "accumulate": (1, dict(accumulate=2, ema=0.9)),
    "bf16": (1, dict(precision="bf16")),
    "two processes": (2, dict(accumulate=2)),
}


def start(script, run, args, processes, pause):
    "A training in a group of processes of its own."
    launch = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(random.Random().randint(20000, 50000)),
        ]
    )
    return subprocess.Popen(
        [*launch, str(script), str(run.path), json.dumps(args), str(pause)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    out = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, out[-2000:]


def result(run):
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run.history()]
    return {
        p.name: p.read_bytes()
        for p in (run.path / "checkpoints/last").iterdir()
        if p.suffix == ".safetensors"
    }, lines


def checkpoint_step(run):
    try:
        return json.loads((run.path / "checkpoints/last/state.json").read_text())["step"]
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("name", VARIANTS)
def test_killed_runs_end_with_the_same_bytes(name, tmp_path):
    processes, extra = VARIANTS[name]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    args = dict(epochs=10, batch_size=2, save_every=2, log_every=1, lr=0.01, device="cpu") | extra
    whole, cut = (Run.create(n, {}, tmp_path) for n in ("whole", "cut"))
    finish(start(script, whole, args, processes, 0))
    rng, kills = random.Random(name), 0
    for _ in range(KILLS if processes == 1 else max(1, KILLS // 2 if KILLS < 20 else KILLS)):
        process, before = start(script, cut, args, processes, 0.01), checkpoint_step(cut)
        while process.poll() is None and checkpoint_step(cut) <= before:
            time.sleep(0.01)  # it has begun to work
        time.sleep(rng.random() * 0.3)
        if process.poll() is None:
            kills += 1
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()
    finish(start(script, cut, args, processes, 0))
    assert kills, "no run was killed"
    assert result(cut) == result(whole)


class Items:
    def __init__(self, n=8):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return dict(x=torch.tensor([float(i)]), y=torch.tensor([2.0 * i]), name=str(i))


def step(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"]), {}


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    net = nn.Linear(1, 1)
    save_checkpoint(tmp_path / "checkpoints/last", net, dict(step=1))
    monkeypatch.setattr(
        "dinolab.train.checkpoints.save_weights",
        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(InputError, match="No space left on device.*is intact"):
        save_checkpoint(tmp_path / "checkpoints/last", net, dict(step=2))
    assert load_checkpoint(tmp_path, net)["step"] == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last"]


class Dying(Items):
    def __getitem__(self, i):
        if i == 5 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_killed_worker_is_reported(tmp_path):
    with pytest.raises(InputError, match="loading worker died"):
        fit(
            nn.Linear(1, 1),
            step,
            Dying(),
            None,
            TrainArgs(epochs=2, workers=1),
            Run.create("x", {}, tmp_path),
        )


def test_patience_time_and_steps(tmp_path):
    worse = iter(range(100))
    assert (
        fit(
            nn.Linear(1, 1), step, Items(), lambda m: dict(loss=next(worse)), TrainArgs(epochs=50, patience=3)
        ).stopped
        == "patience"
    )
    assert fit(nn.Linear(1, 1), step, Items(), None, TrainArgs(max_steps=7)).step == 7
    run = Run.create("x", {}, tmp_path)
    args = TrainArgs(epochs=3, max_seconds=1e-6)
    assert fit(nn.Linear(1, 1), step, Items(), None, args, run).step == 1
    assert (
        fit(nn.Linear(1, 1), step, Items(), None, TrainArgs(epochs=3), run).stopped == "done"
    )  # more time: goes on


def test_best_is_kept_and_loaded(tmp_path):
    values = iter([3, 1, 2])
    kept = []

    def valid(model):
        kept.append(model.weight.item())
        return dict(loss=next(values))

    run = Run.create("x", {}, tmp_path)
    fit(nn.Linear(1, 1), step, Items(), valid, TrainArgs(epochs=3), run)
    net = nn.Linear(1, 1)
    assert load_checkpoint(run, net)["best"] == 1 and net.weight.item() == kept[1]


def test_accumulation_equals_a_large_batch():
    nets = [nn.Linear(1, 1) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, args in zip(
        nets, (TrainArgs(epochs=2, batch_size=8), TrainArgs(epochs=2, batch_size=2, accumulate=4))
    ):
        fit(net, step, Items(), None, args)
    assert torch.allclose(nets[0].weight, nets[1].weight, atol=1e-5)


def test_tensorboard(tmp_path):
    run = Run.create("x", {}, tmp_path)
    fit(nn.Linear(1, 1), step, Items(), None, TrainArgs(epochs=1, tracker="tensorboard"), run)
    assert any("tfevents" in p.name for p in (run.path / "tensorboard").iterdir())


def test_frozen_parts_stay():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    fit(net, step, Items(), None, TrainArgs(epochs=1))
    assert torch.equal(net[0].weight, before)
    with pytest.raises(InputError, match="no parameter"):
        fit(net.requires_grad_(False), step, Items())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    "A finite loss with a gradient of NaN: the run stops, and the weights kept are those before."

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    run, net = Run.create("broken", {}, tmp_path), torch.nn.Linear(2, 1)
    before = net.weight.detach().clone()
    with pytest.raises(InputError, match="gradient nan at step 1 while the loss is finite"):
        fit(
            net,
            lambda model, batch: (Broken.apply(model(batch)).mean(), {}),
            list(torch.ones(4, 2)),
            None,
            TrainArgs(epochs=1, device="cpu"),
            run,
        )
    assert torch.equal(net.weight, before) and (run.path / "checkpoints/nan/model.safetensors").exists()

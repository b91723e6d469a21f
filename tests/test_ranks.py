"Two processes on one machine: what only shows when there are several."

import os
import random
import subprocess
import sys

import pytest
import torch

NORMS = """
import sys, torch
from torch import nn
from timm.layers import BatchNormAct2d
import torch.distributed as dist
from dinolab.train.distributed import place, sync_norms

dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), BatchNormAct2d(4)).double()
if place()[0] == 0:
    torch.save(net.state_dict(), sys.argv[1] + "/begun.pt")
rank = place()[0]
x = torch.rand(4, 3, 6, 5, dtype=torch.float64)
mine = x[rank * 2 : rank * 2 + 2]
out = sync_norms(net).train()(mine)
(out * torch.arange(out.shape[3])).mean().backward()
grads = []
for p in net.parameters():
    dist.all_reduce(p.grad)
    grads.append(p.grad / 2)  # as DDP does
torch.save(dict(x=x, out=out.detach(), grads=grads, state=net.state_dict()), f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""

BREAKS = """
import sys, torch
from dinolab.core.errors import InputError
from dinolab.train.distributed import from_first, place
from dinolab.train.loop import fit_run
from dinolab.train.runs import Run
from dinolab.train.settings import TrainArgs

where, stage, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]


class Data:
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return dict(x=torch.full((4,), float(i)), name=str(i))


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def step(model, batch):
    loss = model(batch["x"]).square().mean()
    step.count += 1
    if step.count == 4 and place()[0] == 1:
        loss = loss * float("nan") if kind == "loss" else Breaks.apply(loss)
    return loss, {}


step.count = 0
run = Run.open(from_first(lambda: str(Run.create("t", {}, path=where).path)))
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
try:
    fit_run(run, model, step, Data(), None, TrainArgs(epochs=4, batch_size=2, zero=stage, device="cpu"))
except InputError as e:
    sys.stderr.write(f"rank {place()[0]}: {e}\\n")
    sys.exit(2)
"""


def two(script, folder, *args, seconds=60):
    "Run a script in two processes; what they said. They may not take longer."
    file = folder / "script.py"
    file.write_text(script)
    port = str(random.Random().randint(20000, 50000))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return subprocess.run(
        [*launch, str(file), *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.mark.long
def test_batch_norms_of_two_processes(tmp_path):
    "Outputs, gradients and running statistics are those of one process with the whole batch."
    from timm.layers import BatchNormAct2d
    from torch import nn

    done = two(NORMS, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), BatchNormAct2d(4)).double()
    net.load_state_dict(torch.load(tmp_path / "begun.pt"))
    out = net.train()(parts[0]["x"])
    (out * torch.arange(out.shape[3])).mean().backward()
    assert torch.allclose(torch.cat([p["out"] for p in parts]), out, atol=1e-6)
    for part in parts:
        for ours, p in zip(part["grads"], net.parameters()):
            assert torch.allclose(ours, p.grad, atol=1e-6)
        for name, value in net.state_dict().items():
            assert torch.allclose(part["state"][name], value, atol=1e-6), name


@pytest.mark.long
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_number_that_is_none_ends_all_processes(stage, kind, tmp_path):
    "On one process only: both stop at once with the same reason, and the weights before it are kept, finite."
    from safetensors.torch import load_file

    if stage:
        pytest.importorskip("deepspeed")
    done = two(BREAKS, tmp_path, tmp_path / "run", stage, kind, seconds=300)
    said = sorted(line for line in done.stderr.splitlines() if line.startswith("rank "))
    assert done.returncode and said, done.stderr[-2000:]
    assert all(f"{kind} " in line and "at step 4" in line for line in said)
    kept = load_file(tmp_path / "run/checkpoints/nan/model.safetensors")
    assert kept and all(value.isfinite().all() for value in kept.values())

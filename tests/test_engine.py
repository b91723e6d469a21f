"Killed at random moments, on one process and on two, training ends with the same bytes; faults leave what was there."

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from dinolab.core.errors import InputError
from dinolab.core.machine import process_start
from dinolab.train.checkpoints import TrainState, load_checkpoint, save_checkpoint
from dinolab.train.loop import fit, fit_run, keyed_batches, keyed_loader
from dinolab.train.runs import Run
from dinolab.train.settings import TrainArgs

torch.set_num_threads(1)
KILLS = int(os.environ["DINOLAB_KILLS"])  # per variant
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

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 2, 1))

if __name__ == "__main__":
    fit(network(), step, Items(), None, TrainArgs(**json.loads(sys.argv[2])), Run.open(sys.argv[1]))
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


PAIR = """
import json, sys, torch
from torch import nn
from dinolab.core.errors import InputError
from dinolab.train.distributed import gather_all, place
from dinolab.train.loop import fit
from dinolab.train.runs import Run, Stopped
from dinolab.train.settings import TrainArgs
import dinolab.train.loop as loop
torch.set_num_threads(1)

class Items(list):
    def __getitem__(self, i):
        x = torch.tensor([float(i), 1.0])
        return dict(x=x, y=x.sum()[None], name=f"item {i}")

def items(n):
    return Items(range(n))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

def step(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"]), {}

def broken(model, batch):
    loss, logs = step(model, batch)
    return loss * (float("nan") if place()[0] == 1 and batch["progress"] > 0 else 1), logs

def told(model, batch):
    if place()[0] == 1 and batch["progress"] >= 0.5:
        signal.raise_signal(signal.SIGUSR1)
    return step(model, batch)

import signal
rank, folder, found = int(sys.argv[1]), sys.argv[2], {}
args = TrainArgs(epochs=2, batch_size=2, lr=0.01, device="cpu", ema=0.9)
plain = TrainArgs(epochs=2, batch_size=2, lr=0.01, device="cpu")  # DDP sends statistics round in each pass
done = fit(net(), step, items(8), items(1), plain, Run.open(folder + "/small"))
found["validated"] = done.best
averages = []
EMA = loop.EMA
class Kept(EMA):
    def __init__(self, *a):
        super().__init__(*a)
        averages.append(self)
loop.EMA = Kept
fit(net(), step, items(8), items(3), args, Run.open(folder + "/uneven"))
found["mean"] = averages[0].model[1].running_mean.tolist()
try:
    fit(net(), broken, items(8), None, TrainArgs(epochs=2, batch_size=2, device="cpu"), Run.open(folder + "/nan"))
except InputError as e:
    found["nan"] = str(e)
try:
    fit(net(), told, items(8), None, TrainArgs(epochs=4, batch_size=2, device="cpu"), Run.open(folder + "/told"))
except Stopped as e:
    found["told"] = str(e)
json.dump(found, open(f"{folder}/{rank}.json", "w"))
"""


def in_two_processes(code, folder, seconds=240):
    "Run a script as rank 0 and 1 of a pair; a pair that hangs is ended and fails."
    script = folder / "pair.py"
    script.write_text(code)
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    env["MASTER_PORT"] = str(random.Random().randint(20000, 50000))
    pair = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outs = [process.communicate(timeout=seconds)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert all(process.returncode == 0 for process in pair), "\n".join(outs)[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_agree(tmp_path):
    """One validation item for two processes, averages with batch statistics, a loss that is no number on the second
    process only, a signal to the second process only: nobody waits for ever, and both know the same."""
    for name in ("small", "uneven", "nan", "told"):
        Run.create(name, {}, path=tmp_path / name)
    first, second = in_two_processes(PAIR, tmp_path)
    assert first["validated"] == second["validated"] > 0
    saved = safetensors.torch.load_file(tmp_path / "uneven/checkpoints/last/ema.safetensors")
    assert first["mean"] == second["mean"] == saved["1.running_mean"].tolist()
    folder = tmp_path / "nan/checkpoints/nan"
    assert first["nan"] == second["nan"] and str(folder) in first["nan"] and folder.is_dir()
    assert first["nan"].startswith("loss nan at step 2, batch item ")
    assert first["told"] == "stopped by a signal to another process after step 5"
    assert second["told"] == "stopped by SIGUSR1 after step 5"
    assert checkpoint_step(Run(tmp_path / "told")) == 5 and Run(tmp_path / "told").status == "stopped"


def content(run):
    return {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def in_this_process(run, args, monkeypatch):
    "The training of the script without another Python."
    made = {"__name__": "script"}
    exec(SCRIPT, made)
    monkeypatch.setattr(sys, "argv", ["", "", "", "0"])
    fit(made["network"](), made["step"], made["Items"](), None, TrainArgs(**args), run)


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGUSR1, 0)])
def test_a_signal_stops_and_the_run_goes_on(number, workers, tmp_path, monkeypatch):
    "The signal reaches all processes of the training, its workers too; what is left ends with the same bytes."
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    args = dict(epochs=6, batch_size=2, log_every=1, lr=0.01, device="cpu")
    whole, cut = (Run.create(n, {}, tmp_path) for n in ("whole", "cut"))
    process = start(script, cut, args | dict(workers=workers), 1, 0.05)
    in_this_process(whole, args, monkeypatch)
    while process.poll() is None and not cut.history():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 75 and "Traceback" not in out, out[-2000:]
    assert cut.status == "stopped" and number.name in cut.info["error"]
    assert 0 < checkpoint_step(cut) == cut.history()[-1]["step"] < 78
    in_this_process(cut, args, monkeypatch)
    assert result(cut) == result(whole)


def small_run(tmp_path, name="run", **changes):
    "A run of eight steps with averages, checkpoints after each two."
    run = Run.create(name, dict(lr=0.1), path=tmp_path / name)
    args = TrainArgs(**dict(epochs=2, batch_size=2, save_every=2, ema=0.9, lr=0.1, device="cpu") | changes)
    return run, args


def seeded():
    torch.manual_seed(0)
    return nn.Linear(1, 1)


PARTS = ("model.safetensors", "ema.safetensors", "optimizer.pt", "state.json")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_the_checkpoint_before_is_used(part, damage, tmp_path, capsys):
    whole, args = small_run(tmp_path, "whole")
    fit(seeded(), step, Items(), None, args, whole)
    run, _ = small_run(tmp_path)
    calls = []

    def breaks(model, batch):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(model, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(seeded(), breaks, Items(), None, args, run)
    file = run.path / "checkpoints/last" / part
    raw = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(
        raw[: len(raw) // 2] if damage == "cut" else b""
    )
    fit(seeded(), step, Items(), None, args, run)
    said = [line for line in capsys.readouterr().err.splitlines() if "going on from" in line]
    assert len(said) == 1 and str(file.parent) in said[0]
    assert result(run)[0] == result(whole)[0]


def test_two_damaged_checkpoints_are_one_line(tmp_path):
    run, args = small_run(tmp_path)
    fit(seeded(), step, Items(), None, args, run)
    for name in ("last", "previous"):
        (run.path / "checkpoints" / name / "optimizer.pt").write_bytes(b"PK not a file")
    before = content(run)
    with pytest.raises(InputError, match="cannot go on: .*last/optimizer.pt is damaged.*previous/") as e:
        fit(seeded(), step, Items(), None, args, run)
    assert "\n" not in str(e.value) and content(run) == before


@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_a_refused_call_changes_no_byte(end, tmp_path):
    "Other settings, other data, another network, another number of items: refused; the run stays what it was."
    data, other = tmp_path / "data", tmp_path / "other"
    data.write_text("1")
    other.write_text("2")
    run, args = small_run(tmp_path, max_seconds=1e-9 if end == "stopped" else 0)
    begun = dict(settings=dict(lr=0.1), identities=dict(images=data))
    if end == "failed":
        with pytest.raises(ZeroDivisionError):
            fit_run(run, seeded(), lambda *a: 1 / 0, Items(), None, args, **begun)
    else:
        fit_run(run, seeded(), step, Items(), None, args, **begun)
    assert run.status == end
    before = content(run)
    calls = {
        "lr": (seeded(), Items(), args, begun | dict(settings=dict(lr=0.2))),
        "images": (seeded(), Items(), args, begun | dict(identities=dict(images=other))),
    }
    if end != "failed":  # it has a checkpoint
        calls |= {
            "epochs": (seeded(), Items(), replace(args, epochs=5), begun),
            "items": (seeded(), Items(9), args, begun),
            "parameters": (nn.Linear(1, 1, bias=False), Items(), args, begun),
        }
    for name, (net, items, changed, settings) in calls.items():
        with pytest.raises(InputError, match=name):
            fit_run(run, net, step, items, None, changed, **settings)
        assert content(run) == before, name
    data.rename(tmp_path / "moved")
    moved = begun | dict(identities=dict(images=tmp_path / "moved"))
    if end == "done":
        assert fit_run(run, seeded(), step, Items(), None, args, **moved).step == 8 and content(run) == before
    else:
        fit_run(run, seeded(), step, Items(), None, replace(args, max_seconds=0), **moved)
        assert run.status == "done"


def test_two_trainings_in_one_folder(tmp_path):
    "The second is refused while the first works, and after a kill of the first there is nothing in the way."
    run, args = small_run(tmp_path)
    seen = []

    def second(model, batch):
        if not seen:
            before = content(run)
            with pytest.raises(InputError, match="is in use by process") as e:
                fit(seeded(), step, Items(), None, args, Run.open(run.path))
            seen.append(str(e.value))
            assert content(run) == before
        return step(model, batch)

    fit(seeded(), second, Items(), None, args, run)
    assert len(seen) == 1 and not (run.path / ".lock").exists()


def dies_holding(path):
    "Locks a run, starts a worker, and is gone without a word."
    with Run.open(path).lock():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        (path / "worker").write_text(str(worker.pid))
        os._exit(0)


def test_forked_workers_hold_no_lock(tmp_path):
    "A worker that outlives its killed training keeps nobody out."
    run, _ = small_run(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=dies_holding, args=(run.path,))
    process.start()
    process.join(60)
    worker = int((run.path / "worker").read_text())
    try:
        assert process_start(worker) is not None and (run.path / ".lock").exists()
        with Run.open(run.path).lock():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_what_follows_the_last_checkpoint_is_done_again(tmp_path):
    "Killed between the last checkpoint and what is made of it: the run that goes on makes it."
    run, args = small_run(tmp_path)

    def killed(name, at, weights):
        if name == "last" and at.stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_run(run, seeded(), step, Items(), None, args, saved=killed)
    assert run.status == "stopped" and TrainState.read(run.path / "checkpoints/last").stopped == "done"
    made = []
    fit_run(run, seeded(), step, Items(), None, args, saved=lambda *a: made.append(a[:2]))
    assert [(name, at.step) for name, at in made] == [("last", 8)] and run.status == "done"
    fit_run(run, seeded(), step, Items(), None, args, saved=lambda *a: made.append(a))
    assert len(made) == 1


class Numbers:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


def test_batches_are_made_as_they_are_needed():
    "A thousand epochs of 5,000 items: the first batch costs one permutation, not a thousand."
    seen = []
    order = keyed_batches(5000, 8, 0)

    def counted():
        for batch in order:
            seen.append(batch)
            yield batch

    tracemalloc.start()
    loader = keyed_loader(Numbers(5000), TrainArgs(batch_size=8, max_steps=1000), 1000)
    next(iter(loader))
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    first = list(itertools.islice(counted(), 626))
    assert len(seen) == 626 and first[:625] == list(keyed_batches(5000, 8, 0, 1))
    assert first[625] == list(keyed_batches(5000, 8, 0, 2, start=(1, 0)))[0]


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

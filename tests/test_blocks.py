"Blocks: workers that are killed, runs that are killed, work that is interrupted."

import os
import pickle
import signal
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import zarr
from examples import examples
from hypothesis import given, strategies as st

from dinolab.volumes.blocks import Done, _processes, check_aligned, make_blocks, run_blocks
from dinolab.core.errors import InputError
from dinolab.core.files import lock_folder
from dinolab.volumes.sources import open_volume
from dinolab.volumes.store import build_store, check_finite, kept_attributes, open_store
from dinolab.volumes.volume import Volume
from dinolab.volumes.write import write_multiscale


class Fill:
    "Writes one more than the number of its block, slowly, and notes who did it."

    def __init__(self, array, log, seconds=0.0):
        self.array, self.log, self.seconds = array, str(log), seconds

    def __call__(self, block):
        with open(self.log, "a") as f:
            f.write(f"{os.getpid()} {block.index}\n")
        time.sleep(self.seconds)
        self.array[block.write.slices] = 1 + np.ravel_multi_index(block.index, (4, 4))


class Die(Fill):
    def __call__(self, block):
        os._exit(1)


def job(tmp_path, kind=Fill, seconds=0.02):
    "A task of 16 blocks, the blocks, and their record."
    blocks = make_blocks((16, 16), (4, 4), (0, 0))
    array = zarr.create_array(tmp_path / "out.zarr", shape=(16, 16), chunks=(4, 4), dtype="u1")
    return (
        kind(array, tmp_path / "log", seconds),
        blocks,
        Done.create(zarr.open_group(tmp_path / "done.zarr", mode="w"), blocks),
    )


def calls(tmp_path):
    "Lines of the log: (process, block)."
    if not (tmp_path / "log").exists():
        return []
    return [
        (int(line.split()[0]), line.split(" ", 1)[1]) for line in (tmp_path / "log").read_text().splitlines()
    ]


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def whole(task, done):
    np.testing.assert_array_equal(task.array[:], np.kron(1 + np.arange(16).reshape(4, 4), np.ones((4, 4))))
    assert done.all().all()


def kill_a_worker(tmp_path, after=4):
    "SIGKILL for the process that did the last block, once some are done."

    def run():
        wait(lambda: len(calls(tmp_path)) >= after)
        os.kill(calls(tmp_path)[-1][0], signal.SIGKILL)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@examples(50)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    size=st.tuples(*[st.integers(1, 5)] * 3),
    halo=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_blocks_write_each_voxel_once_and_read_a_halo(shape, size, halo):
    count = np.zeros(shape, int)
    for b in make_blocks(shape, size, halo):
        count[b.write.slices] += 1
        assert all(
            r.start == w.start - h and r.stop - r.start == s + 2 * h and r.stop >= w.stop + h
            for r, w, s, h in zip(b.read, b.write, size, halo)
        )
    assert (count == 1).all()


@pytest.mark.parametrize(
    "shards,bad,good",
    [(None, (6, 4, 4), (8, 4, 4)), ((8, 8, 8), (4, 8, 8), (8, 16, 8)), ((8, 8, 8), (8, 8, 4), (24, 8, 8))],
)
def test_blocks_of_parts_of_chunks_are_refused(shards, bad, good):
    array = zarr.create_array({}, shape=(20, 20, 20), chunks=(4, 4, 4), shards=shards, dtype="u1")
    check_aligned(array, good)
    with pytest.raises(InputError, match="expected whole chunks"):
        check_aligned(array, bad)


def test_a_killed_worker_costs_at_most_the_blocks_at_hand(tmp_path):
    task, blocks, done = job(tmp_path, seconds=0.1)
    thread = kill_a_worker(tmp_path)
    assert run_blocks(task, blocks, done, workers=2) == dict(done=16, skipped=0)
    thread.join()
    whole(task, done)
    times = Counter(block for _, block in calls(tmp_path))
    assert len(times) == 16 and sum(times.values()) <= 16 + 2 and len({p for p, _ in calls(tmp_path)}) >= 3


def test_a_task_that_kills_its_workers_is_an_error(tmp_path):
    task, blocks, done = job(tmp_path, Die)
    results = list(_processes(task, blocks, done, 2, restarts=0))
    assert (
        len(results) == 16
        and all("killed again and again" in str(e) for _, e in results)
        and not done.all().any()
    )


def test_interrupted_work_drops_what_is_not_begun(tmp_path):
    task, blocks, done = job(tmp_path, seconds=0.3)
    results = _processes(task, blocks, done, 2)
    next(results)
    results.close()
    assert 1 <= done.all().sum() == len(calls(tmp_path)) < 10


def _run(task, blocks, done):
    run_blocks(task, blocks, done, workers=2)


def test_workers_end_with_the_run(tmp_path):
    "SIGKILL for the process that gives out the work; another run finishes it."
    task, blocks, done = job(tmp_path, seconds=0.2)
    run = get_context("spawn").Process(target=_run, args=(task, blocks, done))
    run.start()
    wait(lambda: done.all().sum() > 2 and len({p for p, _ in calls(tmp_path)}) == 2)
    run.kill()
    run.join()
    workers = {p for p, _ in calls(tmp_path)}
    wait(lambda: not any(alive(p) for p in workers), 5)
    assert not done.all().all()
    before = len(calls(tmp_path))
    task.seconds = 0
    run_blocks(task, blocks, done)
    whole(task, done)
    assert len(calls(tmp_path)) - before < 16


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_dask_with_a_killed_worker(tmp_path):
    distributed = pytest.importorskip("distributed")
    task, blocks, done = job(tmp_path, seconds=0.1)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        thread = kill_a_worker(tmp_path)
        assert run_blocks(task, blocks, done, client=client) == dict(done=16, skipped=0)
        thread.join()
        whole(task, done)
        times = Counter(block for _, block in calls(tmp_path))
        assert len(times) == 16 and sum(times.values()) <= 16 + 2
        assert run_blocks(task, blocks, done, client=client) == dict(done=0, skipped=16)


def test_dask_reports_failed_blocks(tmp_path):
    distributed = pytest.importorskip("distributed")
    task, blocks, done = job(tmp_path)
    task.array = None  # TypeError in every block
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as client:
        with pytest.raises(RuntimeError, match="16 of 16 blocks failed, the first at"):
            run_blocks(task, blocks, done, client=client)
    assert not done.all().any()


def test_the_lock_is_gone_with_its_process(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_folder(tmp_path):
            os.write(write, b"locked")
            time.sleep(60)
    os.read(read, 6)
    with pytest.raises(InputError, match=f"in use by process {pid}"):
        with lock_folder(tmp_path):
            pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock_folder(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_tasks_are_small_enough_to_travel(tmp_path):
    task, _, done = job(tmp_path)
    assert len(pickle.dumps((task, done))) < 10_000


# ---- stores

RAW = np.random.default_rng(0).integers(0, 9, (4, 4, 4)).astype(np.uint8)


class Power:
    "Powers of voxels; stops before block number `stop`, and notes what it did."

    def __init__(self, raw, out, stop=None, spoil=None):
        self.raw, self.out, self.stop, self.spoil, self.did = raw, out, stop, spoil, []

    def __call__(self, block):
        if len(self.did) == self.stop:
            raise KeyboardInterrupt
        x = self.raw[block.write.slices].astype(np.float32) ** 2
        if block.index == self.spoil:
            x[0, 0, 0] = np.inf
        check_finite(x, f"powers of {block.write}")
        self.out[block.write.slices] = x
        self.did.append(block.index)


def powers(path, source=RAW, *, power=2, resume=True, stop=None, spoil=None, about=None, extra=None):
    "Build the store that all tests build; the blocks that were computed."
    settings = dict(power=power, nested=dict(sizes=(4, 4), name="a"), **(extra or {}))
    raw = source.read() if isinstance(source, Volume) else source
    with build_store(
        path, "dinolab powers", settings, sources=dict(raw=source), about=about, resume=resume, what="powers"
    ) as store:
        task = Power(raw, store.array("powers", raw.shape, "f4", (2, 2, 4)), stop, spoil)
        store.keep("mean", lambda: raw.mean())
        store.run(task, make_blocks(raw.shape, (2, 2, 4)))
        store.finish()
    return task.did


def bytes_below(folder):
    "Every file and what is in it."
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_store_goes_on_where_it_stopped(tmp_path):
    assert len(powers(tmp_path / "whole.zarr")) == 4
    with pytest.raises(KeyboardInterrupt):
        powers(tmp_path / "s.zarr", stop=2)
    with pytest.raises(InputError, match="is unfinished"):
        open_store(tmp_path / "s.zarr", "dinolab powers")
    assert kept_attributes(tmp_path / "s.zarr")["mean"] == RAW.mean()
    with build_store(tmp_path / "b.zarr", "dinolab powers", {}) as store:
        assert [store.keep("draw", lambda: n) for n in (1, 2)] == [1, 1]  # once, whatever comes later
    (tmp_path / "s.zarr" / ("zarr.json." + "0a" * 16 + ".partial")).write_text("{")  # zarr was writing it
    assert powers(tmp_path / "s.zarr") == [(1, 0, 0), (1, 1, 0)]
    found = [bytes_below(tmp_path / name) for name in ("whole.zarr", "s.zarr")]
    assert list(found[0].values()) == list(found[1].values())
    before = found[1], (tmp_path / "s.zarr").stat().st_size
    assert powers(tmp_path / "s.zarr", RAW.copy()) == []
    assert (bytes_below(tmp_path / "s.zarr"), (tmp_path / "s.zarr").stat().st_size) == before
    np.testing.assert_array_equal(open_store(tmp_path / "s.zarr", "dinolab powers")["powers"][:], RAW**2.0)


REFUSED = {
    "other settings": (dict(power=3), r"begun with other settings: power \(2 there, 3 now\)"),
    "a new setting": (dict(extra=dict(more=1)), r"more \(None there, 1 now\)"),
    "other values": (dict(source=RAW + 1), "raw of .* is not what it was"),
    "another type": (dict(source=RAW.astype(np.int16)), "raw of .* is not what it was"),
    "no resume": (dict(resume=False), "exists: give a new path"),
}


@pytest.mark.parametrize("stop", (1, None))
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_changes_no_byte(tmp_path, case, stop):
    try:
        powers(tmp_path / "s.zarr", stop=stop)
    except KeyboardInterrupt:
        pass
    before = bytes_below(tmp_path)
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as e:
        powers(tmp_path / "s.zarr", **options)
    assert "\n" not in str(e.value) and bytes_below(tmp_path) == before
    assert len(powers(tmp_path / "s.zarr")) == (3 if stop else 0)  # and it can still go on


def test_what_is_no_store_is_left_alone(tmp_path):
    powers(tmp_path / "s.zarr")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear").write_text("you")
    (tmp_path / "file").write_text("x")
    zarr.create_group(tmp_path / "other.zarr", attributes=dict(kind="dinolab others", settings={}))
    zarr.create_array(tmp_path / "array.zarr", shape=(2,), dtype="u1")
    before = bytes_below(tmp_path)
    for name in ("letters", "file", "other.zarr", "array.zarr"):
        with pytest.raises(InputError, match="exists and is no powers"):
            powers(tmp_path / name)
    with pytest.raises(InputError, match="lies inside another zarr group"):
        powers(tmp_path / "s.zarr/more/inside")
    with pytest.raises(InputError, match="cannot be written"):
        powers("/proc/no/store")
    with pytest.raises(InputError, match="is no others"):
        open_store(tmp_path / "s.zarr", "dinolab others", what="others")
    assert bytes_below(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert len(powers(tmp_path / "empty")) == 4


def test_a_store_is_held_while_it_is_built(tmp_path):
    with build_store(tmp_path / "s.zarr", "dinolab powers", {}):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            with build_store(tmp_path / "s.zarr", "dinolab powers", {}):
                pass
    assert kept_attributes(tmp_path / "s.zarr")["status"] == "running"


def test_a_replaced_source_is_another_source(tmp_path):
    source = write_multiscale(tmp_path / "raw.zarr", RAW, voxel_size=8, chunk=2).levels[0]
    with pytest.raises(KeyboardInterrupt):
        powers(tmp_path / "s.zarr", source, stop=1)
    write_multiscale(tmp_path / "raw.zarr", 9 - RAW, voxel_size=8, chunk=2, overwrite=True)
    with pytest.raises(InputError, match="raw of .* is not what it was"):
        powers(tmp_path / "s.zarr", open_volume(tmp_path / "raw.zarr"))
    write_multiscale(tmp_path / "moved.zarr", RAW, voxel_size=8, chunk=2)
    assert len(powers(tmp_path / "s.zarr", open_volume(tmp_path / "moved.zarr"))) == 3


def test_a_block_with_infinities_is_never_done(tmp_path):
    with pytest.raises(
        InputError, match=r"powers of Box\(2:4, 0:2, 0:4\): 1 of 16 values are NaN or infinite"
    ) as e:
        powers(tmp_path / "s.zarr", spoil=(1, 0, 0))
    assert "65504" in str(e.value) and "\n" not in str(e.value)
    assert kept_attributes(tmp_path / "s.zarr")["status"] == "running"
    assert powers(tmp_path / "s.zarr") == [(1, 0, 0)]


@pytest.mark.parametrize("writes", (0, 1, 2, 3, 4, 6, 9))
def test_a_full_disk_is_one_line_and_the_store_goes_on(tmp_path, monkeypatch, writes):
    from test_volume import full_disk

    powers(tmp_path / "whole.zarr")
    with monkeypatch.context() as patch:
        full_disk(patch, writes)
        with pytest.raises(InputError, match="No space left on device") as e:
            powers(tmp_path / "s.zarr")
    assert "\n" not in str(e.value)
    assert kept_attributes(tmp_path / "s.zarr").get("status") != "complete"
    powers(tmp_path / "s.zarr")
    assert list(bytes_below(tmp_path / "s.zarr").values()) == list(
        bytes_below(tmp_path / "whole.zarr").values()
    )

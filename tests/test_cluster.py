"Work on clusters: local processes that are killed, jobs of a queue that is played by two scripts, job scripts, launch templates."

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from typer.testing import CliRunner

pytest.importorskip("distributed")
if not find_spec("dask_jobqueue"):
    pytest.skip(
        "needs the extra cluster", allow_module_level=True
    )  # workers import this file, and dask_jobqueue wants the main thread
import dask  # noqa: E402

from dinolab.volumes.blocks import Done, make_blocks, run_blocks  # noqa: E402
from dinolab.cli.main import app  # noqa: E402
from dinolab.volumes.cluster import Cluster, job_script, open_cluster, spread_work, use_client  # noqa: E402
from dinolab.core.errors import InputError  # noqa: E402
from dinolab.core.files import write_json  # noqa: E402
from dinolab.volumes.write import write_multiscale  # noqa: E402

LAUNCH = Path(__file__).parents[1] / "nbs/experiments/launch"
SCRIPT = "import sys; from dinolab.cli.main import main; sys.argv[0] = 'dinolab'; main()"
TINY = [
    "--backbone",
    "vit_tiny_patch16_224",
    "--layers",
    "0,1",
    "--pixel-size",
    "8",
    "--block",
    "16",
    "--precision",
    "fp32",
]


def dinolab(*args):
    done = CliRunner().invoke(app, list(map(str, args)), prog_name="dinolab")
    if isinstance(done.exception, (InputError, ImportError)):
        raise done.exception
    return done


def wait(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cluster")
    x = np.random.default_rng(0).integers(0, 255, (20, 33, 37)).astype(np.uint8)
    write_multiscale(path / "raw.zarr", x, voxel_size=(16, 8, 8), levels=1)
    return path


# --- processes of this machine


def worker_pids(parent):
    "Processes that dask has started below `parent`."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            stat, line = (p / "stat").read_text().rpartition(")")[2].split(), (p / "cmdline").read_text()
        except OSError:
            continue
        if (
            int(stat[1]) == parent
            and stat[0] != "Z"
            and "multiprocessing" in line
            and "resource_tracker" not in line
        ):
            found.append(int(p.name))
    return sorted(found)


def same_arrays(a, b, names):
    for name in names:
        np.testing.assert_array_equal(
            zarr.open(f"{a}/{name}", mode="r")[:], zarr.open(f"{b}/{name}", mode="r")[:]
        )


def test_features_on_a_local_cluster_with_a_killed_worker(folder, tmp_path):
    "The command, two workers, SIGKILL for one of them after the first block: the same numbers as one process, and a second run has nothing to do."
    assert (
        dinolab("features", folder / "raw.zarr", tmp_path / "one.zarr", *TINY, "--components", "8").exit_code
        == 0
    )
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        "features",
        folder / "raw.zarr",
        tmp_path / "two.zarr",
        *TINY,
        "--components",
        "8",
        "--cluster",
        "local",
        "--workers",
        "2",
    ]
    run = subprocess.Popen(
        list(map(str, command)),
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    written = lambda: sum(p.is_file() for p in (tmp_path / "two.zarr/done/c").rglob("*"))
    try:
        wait(lambda: written() or run.poll() is not None)
        before = worker_pids(run.pid)
        assert run.poll() is None and len(before) == 2, (before, run.poll())
        os.kill(before[0], signal.SIGKILL)
        at = written()
        out = run.communicate(timeout=240)[0]
    finally:
        run.kill()
    assert run.returncode == 0, out[-2000:]
    assert at < 18, "the worker died when the work was done"
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
    same_arrays(tmp_path / "one.zarr", tmp_path / "two.zarr", ["features", "done", "rgb/s0"])
    assert "features" in str(
        dinolab(
            "features",
            folder / "raw.zarr",
            tmp_path / "two.zarr",
            *TINY,
            "--components",
            "8",
            "--cluster",
            "local",
            "--job",
            "wait=1s",
        ).output
    )


def test_predict_on_a_local_cluster(folder, tmp_path):
    "As one process does, with weights that travel once to each worker."
    from dinolab.tasks.volumes import train_unet3d
    from dinolab.train.settings import TrainArgs

    labels = np.random.default_rng(1).integers(0, 2, (32, 32, 32)).astype(np.uint8)
    raw = labels * 150 + np.random.default_rng(2).integers(0, 90, labels.shape).astype(np.uint8)
    for i in range(2):
        (
            write_multiscale(tmp_path / f"r{i}.zarr", raw, voxel_size=8, levels=1),
            write_multiscale(tmp_path / f"l{i}.zarr", labels, voxel_size=8, levels=1, kind="labels"),
        )
    done = train_unet3d(
        [tmp_path / "r0.zarr"],
        [tmp_path / "l0.zarr"],
        backbone="vit_tiny_patch16_224",
        layers=[0],
        pixel_size=8,
        crop=16,
        levels=2,
        base_channels=4,
        crops_per_epoch=2,
        holdout=0,
        train=TrainArgs(epochs=1, device="cpu"),
        out=tmp_path / "runs",
        cache=tmp_path / "cache",
    )
    common = [
        "predict",
        tmp_path / "r1.zarr",
        f"run={done.run.path}",
        "chunk=16",
        "block=[16,16,16]",
        "overlap=0",
        "probabilities=true",
    ]
    assert dinolab(*common[:2], tmp_path / "one.zarr", *common[2:]).exit_code == 0
    os.environ["OMP_NUM_THREADS"], old = "1", os.environ.get("OMP_NUM_THREADS")
    try:
        assert (
            dinolab(
                *common[:2], tmp_path / "two.zarr", *common[2:], "--cluster", "local", "--workers", "2"
            ).exit_code
            == 0
        )
    finally:
        os.environ.pop("OMP_NUM_THREADS") if old is None else os.environ.update(OMP_NUM_THREADS=old)
    same_arrays(tmp_path / "one.zarr", tmp_path / "two.zarr", ["labels/s0", "probabilities"])
    with pytest.raises(InputError, match="expected --workers"):
        dinolab(*common[:2], tmp_path / "two.zarr", *common[2:], "workers=2", "--cluster", "local")


class Shared:
    "Notes in which process it was made."

    def __init__(self, log):
        self.log, self.weights = str(log), np.ones(2**20, np.uint8)

    def __setstate__(self, state):
        self.__dict__.update(state)
        with open(self.log, "a") as f:
            f.write(f"{os.getpid()}\n")


def pid(item, shared):
    time.sleep(0.02)
    return os.getpid()


def test_weights_travel_once_to_each_worker(tmp_path):
    "Many items, few bytes: the object is made once per worker, and what the scheduler gets for an item is small."
    with open_cluster("local", 2) as client:
        sent = lambda: client.run_on_scheduler(
            lambda dask_scheduler: sum(len(str(t.run_spec)) for t in dask_scheduler.tasks.values())
        )
        found = [
            (i, p)
            for i, p, error in spread_work(client, pid, list(range(40)), Shared(tmp_path / "log"), ahead=8)
        ]
        assert sent() < 10**6
        assert (
            client.run_on_scheduler(
                lambda dask_scheduler: max(w.nthreads for w in dask_scheduler.workers.values())
            )
            == 1
        )
    made = (tmp_path / "log").read_text().split()
    assert (
        sorted(i for i, _ in found) == list(range(40))
        and len(made) == len(set(made)) <= 2
        and {str(p) for _, p in found} <= set(made)
    )


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with open_cluster("local", 2) as client:
        assert sorted(client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values()) == ["3", "5"]


# --- a queue in two scripts


class Fill:
    "Writes one more than the number of its block, slowly, and notes who did it."

    def __init__(self, array, log, seconds):
        self.array, self.log, self.seconds = array, str(log), seconds

    def __call__(self, block):
        with open(self.log, "a") as f:
            f.write(f"{os.getppid()} {os.getpid()}\n")
        time.sleep(self.seconds)
        self.array[block.write.slices] = 1 + np.ravel_multi_index(block.index, (4, 4))


@pytest.fixture
def queue(tmp_path, monkeypatch):
    "sbatch and bsub that start a job at once on this machine; the folder of what was submitted."
    tools, jobs = tmp_path / "bin", tmp_path / "jobs"
    tools.mkdir(), jobs.mkdir()
    start = f'n=$(ls {jobs} | wc -l); cp "$script" {jobs}/$n.sh; setsid bash {jobs}/$n.sh > {tmp_path}/$n.log 2>&1 & echo "Submitted batch job $!"\n'
    (tools / "sbatch").write_text("#!/bin/bash\nscript=$1\n" + start)
    (tools / "bsub").write_text(
        f"#!/bin/bash\nscript={tmp_path}/stdin.sh; cat > $script\n"
        + start.replace("Submitted batch job $!", "Job <$!> is submitted to queue <short>.")
    )
    for name in ("scancel", "bkill"):
        (tools / name).write_text('#!/bin/bash\nkill -9 -- "-$1" 2> /dev/null; true\n')
    for f in tools.iterdir():
        f.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}")
    monkeypatch.chdir(tmp_path)
    return jobs


def test_a_job_that_ends_is_submitted_again(queue, tmp_path):
    "One job, killed with all its processes in the middle: nobody is left that holds the task, and the next job does the rest."
    blocks = make_blocks((16, 16), (4, 4))
    array = zarr.create_array(tmp_path / "out.zarr", shape=(16, 16), chunks=(4, 4), dtype="u1")
    task, done, log = (
        Fill(array, tmp_path / "log", 0.1),
        Done.create(zarr.open_group(tmp_path / "done.zarr", mode="w"), blocks),
        tmp_path / "log",
    )

    def kill():
        wait(lambda: log.exists() and len(log.read_text().splitlines()) >= 4)
        os.killpg(os.getpgid(int(log.read_text().split()[0])), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        run_blocks(task, blocks, done, client=Cluster("slurm", 1, cores=1))
    thread.join()
    assert (
        done.all().all()
        and len(list(queue.iterdir())) == 2
        and len({line.split()[0] for line in log.read_text().splitlines()}) == 2
    )
    np.testing.assert_array_equal(array[:], np.kron(1 + np.arange(16).reshape(4, 4), np.ones((4, 4))))
    assert (
        run_blocks(task, blocks, done, client=Cluster("slurm", 1)) == dict(done=0, skipped=16)
        and len(list(queue.iterdir())) == 2
    )  # nothing to do: no job


def test_jobs_of_lsf_start_workers(queue):
    with open_cluster("lsf", 1, cores=3) as client:
        assert set(
            client.run(
                lambda: (os.environ["OMP_NUM_THREADS"], dask.config.get("distributed.worker.memory.pause"))
            ).values()
        ) == {("3", False)}
        pids = list(client.run(os.getpid).values())
    wait(lambda: not any(Path(f"/proc/{p}").exists() for p in pids))


def test_refused_jobs_are_one_line(queue, tmp_path, capfd):
    (tmp_path / "bin/sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n"
    )
    with pytest.raises(
        InputError, match="slurm refused the jobs: sbatch: error: invalid partition specified: gpuu"
    ) as e:
        with open_cluster("slurm", 2, queue="gpuu"):
            pass
    assert "\n" not in str(e.value) and "Traceback" not in capfd.readouterr().err


def test_nobody_comes(queue, tmp_path):
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\necho Submitted batch job 123456789\n")
    with pytest.raises(InputError, match="no worker after 1s: expected a job to start; see .*dask-logs"):
        with open_cluster("slurm", 1, wait="1s"):
            pass


# --- job scripts


def test_slurm_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = job_script(
        "slurm",
        workers=8,
        queue="gpu",
        account="neuro",
        cores=8,
        memory="32GiB",
        gpus=1,
        walltime="1-02:00:00",
        setup=("module load cuda",),
        logs="logs",
        interface="ib0",
        extra=("--constraint=a100",),
    )
    header, body = text.partition("module load cuda")[::2]
    assert {
        "#SBATCH -p gpu",
        "#SBATCH -A neuro",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=32G",
        "#SBATCH -t 26:00:00",
        "#SBATCH --gres=gpu:1",
        "#SBATCH --constraint=a100",
        f"#SBATCH --output={tmp_path}/logs/%x-%j.log",
    } <= set(header.splitlines())
    assert "export OMP_NUM_THREADS=8" in body and re.search(
        rf"{sys.executable} -m distributed.cli.dask_worker tcp://\S+ .*--nthreads 1 --memory-limit 32.00GiB .*--lifetime 93000s --lifetime-stagger 300s --interface ib0",
        body,
    )
    assert (
        not list(tmp_path.iterdir()) and subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    )


def test_lsf_script(tmp_path, monkeypatch):
    (tmp_path / "lsf.conf").write_text("LSF_UNIT_FOR_LIMITS=MB\n")
    monkeypatch.setenv("LSF_ENVDIR", str(tmp_path))
    text = job_script(
        "lsf",
        queue="gpu",
        account="neuro",
        cores=8,
        memory="32GB",
        gpus=1,
        walltime="90m",
        logs="/logs",
        extra=('-R "select[a100]"',),
    )
    assert {
        "#BSUB -q gpu",
        '#BSUB -P "neuro"',
        "#BSUB -n 8",
        '#BSUB -R "span[hosts=1]"',
        "#BSUB -M 32000",
        "#BSUB -W 01:30",
        "#BSUB -gpu num=1",
        '#BSUB -R "select[a100]"',
        "#BSUB -o /logs/%J.log",
    } <= set(text.splitlines())
    assert "--nthreads 1" in text and "export OMP_NUM_THREADS=8" in text


def test_defaults_of_the_site_hold(monkeypatch):
    with dask.config.set(
        {
            "jobqueue.slurm.queue": "site",
            "jobqueue.slurm.job-script-prologue": ["source site.sh"],
            "jobqueue.slurm.job-extra-directives": ["--qos=site"],
        }
    ):
        text = job_script("slurm")
    assert (
        "#SBATCH -p site" in text
        and "source site.sh" in text
        and "#SBATCH --qos=site" in text
        and "--gres" not in text
        and "#SBATCH -t 04:00:00" in text
    )


def test_the_command_prints_the_script(folder, tmp_path):
    for command in (["features", folder / "raw.zarr", tmp_path / "f.zarr"], ["predict"]):
        done = dinolab(
            *command,
            "--cluster",
            "slurm",
            "--workers",
            4,
            "--job",
            "queue=gpu",
            "--job",
            "setup=module load cuda",
            "--job",
            "setup=conda activate x",
            "--job-script",
        )
        assert (
            done.exit_code == 0
            and "#SBATCH -p gpu\n" in done.output
            and "module load cuda\nconda activate x\n" in done.output
        )
    assert not (tmp_path / "f.zarr").exists()


# --- bad input

BAD = {
    "kind": (["--cluster", "slrm"], "did you mean 'slurm'?"),
    "memory": (["--cluster", "slurm", "--job", "memory=much"], "such as 16GB"),
    "walltime": (["--cluster", "slurm", "--job", "walltime=4:00"], "such as 4:00:00 or 90m"),
    "short walltime": (["--cluster", "lsf", "--job", "walltime=30s"], "expected 5m or more"),
    "gpus": (["--cluster", "lsf", "--job", "gpus=2"], "ask for more workers"),
    "cores": (["--cluster", "slurm", "--job", "cores=0"], "expected a whole number of 1 or more"),
    "number": (["--cluster", "slurm", "--job", "cores=two"], "expected a whole number"),
    "name": (["--cluster", "slurm", "--job", "qeue=gpu"], "did you mean 'queue'?"),
    "pair": (["--cluster", "slurm", "--job", "queue"], "expected name=value"),
    "local": (["--cluster", "local", "--job", "queue=gpu"], "queue on cluster local"),
    "no cluster": (["--job", "queue=gpu"], "without --cluster"),
    "no sbatch": (["--cluster", "slurm"], "no command sbatch here"),
    "local script": (["--cluster", "local", "--job-script"], "expected one of slurm, lsf"),
    "device": (["--cluster", "local", "--device", "banana"], "expected auto, cpu, or cuda"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, case):
    options, message = BAD[case]
    with pytest.raises(InputError) as e:
        dinolab("features", folder / "raw.zarr", tmp_path / "out.zarr", *TINY, *options)
    assert message in str(e.value) and "\n" not in str(e.value), str(e.value)
    assert not (tmp_path / "out.zarr").exists()
    if case not in ("no sbatch", "device"):
        with pytest.raises(InputError):
            dinolab("predict", "in.zarr", "out.zarr", *options)


def test_no_workers(folder, tmp_path):
    assert (
        dinolab(
            "features", folder / "raw.zarr", tmp_path / "out.zarr", "--cluster", "local", "--workers", "0"
        ).exit_code
        == 2
    )
    with pytest.raises(InputError, match="workers 0"):
        Cluster(workers=0)


def test_a_missing_extra_is_named(monkeypatch):
    for module, kind in (("distributed", "local"), ("dask_jobqueue", "slurm")):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r"pip install 'dinolab\[cluster\]'"):
                Cluster(kind)


def test_an_open_client_stays_open():
    client = object()
    with use_client(client) as same:
        assert same is client
    with use_client(None) as none:
        assert none is None


# --- launch templates

TEMPLATES = sorted(LAUNCH.iterdir())
SRUN = """#!/bin/bash
# as many processes as the job has tasks; options are given as --name=value
while [[ $1 == --* ]]; do echo "$1" >>"${0%/*}/srun.log"; shift; done
code=0
for ((i = 0; i < ${SLURM_NTASKS:-1}; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
for ((i = 0; i < ${SLURM_NTASKS:-1}; i++)); do wait -n || code=$?; done
exit $code
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    "The commands that the templates call, on one node."
    bin = tmp_path_factory.mktemp("bin")
    (bin / "srun").write_text(SRUN)
    (bin / "scontrol").write_text('#!/bin/sh\necho "$@" >>"${0%/*}/scontrol.log"\necho localhost\n')
    (bin / "dinolab").write_text(f"#!{sys.executable}\n{SCRIPT}\n")
    for f in bin.iterdir():
        f.chmod(0o755)
    return dict(
        os.environ,
        PATH=f"{bin}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST="localhost",
        SLURM_NNODES="1",
        SLURM_NTASKS="2",
        SLURM_JOB_ID="8",
        PORT=str(random.Random().randint(20000, 50000)),
        OMP_NUM_THREADS="1",
    )


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.name)
def test_template(path):
    "Parses, says how it is used, and names only commands and files that exist."
    text = path.read_text()
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert len(comments) >= 3, "a header that says how to use it"
    if path.suffix == ".yaml":
        assert isinstance(yaml.safe_load(text), dict)
    else:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert re.search(r"^#SBATCH --time=|^#BSUB -W ", text, re.M) and "set -euo pipefail" in text
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        for command in re.findall(
            r"dinolab ((?:unet3plus )?(?:features|train|eval|infer|predict)\b[^`]*)", line
        ):
            words = command.split()
            name = words[:2] if words[0] == "unet3plus" else words[:1]
            known = dinolab(*name, "--help").output
            for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", command):
                assert flag in known or flag in ("--config",), f"{flag} of dinolab {' '.join(name)}"
    for other in re.findall(r"[\w.]+\.(?:slurm|lsf)\b|(?:accelerate|deepspeed)_\w+\.yaml", text):
        assert (LAUNCH / other).exists(), other


def test_accelerate_reads_its_template():
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    found = load_config_from_file(str(LAUNCH / "accelerate_gpus.yaml"))
    assert (
        isinstance(found, ClusterConfig)
        and found.distributed_type == "MULTI_GPU"
        and found.num_processes == 4
    )


def test_deepspeed_template_is_a_recipe():
    "Its lines are arguments of the training, and become DeepSpeed's configuration."
    from dinolab.tasks.recipes import arguments, recipe_of
    from dinolab.train.distributed import zero_config

    function, config = recipe_of("train", LAUNCH / "deepspeed_zero.yaml", [])
    args = arguments(function, config)["train"]
    made = zero_config(args.zero, args.batch_size, 4, args.clip, args.precision)
    assert (
        made["zero_optimization"]["stage"] == 2
        and made["train_batch_size"] == 16
        and made["torch_autocast"]["enabled"]
    )


@pytest.mark.parametrize("name,source", [("features.slurm", ["RAW.zarr", "OUT.zarr"]), ("features.lsf", [])])
def test_features_template(tools, name, source):
    "The script, up to the job script that it would submit."
    env = tools | dict(RAW="RAW.zarr", OUT="OUT.zarr", QUEUE="gpu", ACCOUNT="neuro", PROJECT="neuro")
    text = subprocess.run(
        ["bash", LAUNCH / name, *source, "--job-script"], env=env, capture_output=True, text=True, check=True
    ).stdout
    wanted = (
        ["#SBATCH -p gpu", "#SBATCH -A neuro", "#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=8"]
        if name.endswith("slurm")
        else ["#BSUB -q gpu", '#BSUB -P "neuro"', "#BSUB -gpu num=1", "#BSUB -n 8"]
    )
    assert set(wanted) <= set(text.splitlines())


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (75, True), (138, True)])
@pytest.mark.parametrize("name", ["dinolab_train.slurm", "unet3plus_train.slurm"])
def test_train_templates_go_on(name, code, requeued, tools, tmp_path):
    "Each process knows its place, cores and port; a job that a signal has stopped is queued again, with its own run."
    bin = tmp_path / "bin"
    bin.mkdir()
    for file in Path(tools["PATH"].split(":")[0]).glob("s*"):
        shutil.copy(file, bin)
    say = '#!/bin/bash\necho "$RANK of $WORLD_SIZE on $LOCAL_RANK at $MASTER_ADDR:$MASTER_PORT: $*"\n'
    (bin / "dinolab").write_text(f"{say}exit {code}\n")
    (bin / "dinolab").chmod(0o755)
    record = tmp_path / "runs/segmenter/first/run.json"
    record.parent.mkdir(parents=True)
    write_json(record, dict(job="40008"))
    env = tools | dict(PATH=f"{bin}:{os.environ['PATH']}", SLURM_JOB_ID="40008", SLURM_CPUS_PER_TASK="5")
    del env["PORT"]
    done = subprocess.run(
        ["bash", LAUNCH / name, "train.epochs=7"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code
    said = sorted(line for line in done.stdout.splitlines() if " of 2 on " in line)
    place = "{0} of 2 on {0} at localhost:20008: "
    what = "train train.epochs=7 run=runs/segmenter/first"
    if name.startswith("unet3plus"):
        what = "unet3plus train --resume train.epochs=7"
    assert said == [place.format(rank) + what for rank in range(2)]
    assert ("requeue 40008" in (bin / "scontrol.log").read_text()) == requeued
    assert "--cpus-per-task=5" in (bin / "srun.log").read_text()


def test_train_template(tools, tmp_path):
    "The script as it is, one node of two processes in the place of the cluster: one run, trained by both."
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(6):
        mask = (rng.random((8, 8)) > 0.6).repeat(4, 0).repeat(4, 1)
        for name, x in dict(images=mask * 150 + rng.integers(0, 90, mask.shape), masks=mask).items():
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(x.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    pairs = [
        f"images={tmp_path}/images",
        f"masks={tmp_path}/masks",
        "recipe=segmenter",
        "backbone=resnet10t",
        "head=linear",
        "crop=32",
        "train.epochs=1",
        "train.batch_size=2",
        "train.device=cpu",
        f"out={tmp_path}/runs",
    ]
    done = subprocess.run(
        ["bash", LAUNCH / "dinolab_train.slurm", *pairs], env=tools, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = list((tmp_path / "runs/segmenter").iterdir())
    assert (
        len(runs) == 1
        and done.stdout.strip().splitlines()[-1].endswith(runs[0].name)
        and done.stdout.count(runs[0].name) == 1
    )
    assert (runs[0] / "checkpoints/best/model.safetensors").exists() and '"world": 2' in (
        runs[0] / "checkpoints/last/state.json"
    ).read_text()

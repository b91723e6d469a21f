"""Getting data: whole or absent, verified, never fetched twice."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from examples import examples
from hypothesis import given, strategies as st

import dinolab.data.fetch as data
import dinolab.data.transfer as transfer
from dinolab.core.errors import InputError, MissingError
from dinolab.data.fetch import GENERATORS, check_data, choose, file_state, get_data, list_data
from dinolab.data.manifest import File, load_manifest, parse_manifest

SHIPPED = Path(__file__).parent.parent / "data_manifests"
BYTES = random.Random(0).randbytes(3 * 2**20 + 17)  # the same in every process that collects the tests
SHA = hashlib.sha256(BYTES).hexdigest()


def manifest(source, sha256=SHA, size=len(BYTES), more=""):
    return parse_manifest(f"""
name: m
kind: volume
licence: x
citation: x
source: {source}
cases:
  a: {{files: {{raw: {{path: deep/a.bin, sha256: {sha256}, size: {size}}}}}}}
{more}""")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.0)


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture
def server():
    fs = fsspec.filesystem("memory")
    fs.pipe("/server/deep/a.bin", BYTES)
    yield "memory://server"
    fs.store.clear()


class Half(io.BytesIO):
    "Gives the first 2 MiB, then the error of the server."

    def read(self, n=-1):
        if self.tell() >= 2**21:
            raise Cut.error
        return super().read(n)


class Cut(fsspec.AbstractFileSystem):
    "A server that breaks off, with an error of the test's choice."

    protocol = "cut"

    def open(self, path, mode="rb", **kwargs):
        return Half(BYTES)


fsspec.register_implementation("cut", Cut, clobber=True)


def test_download_then_nothing_to_do(tmp_path, server, monkeypatch):
    got = get_data(manifest(server), tmp_path)
    path = Path(got.files["a"]["raw"])
    assert path.read_bytes() == BYTES and path == tmp_path / "m/deep/a.bin"
    before = path.stat()
    monkeypatch.setattr(data, "fetch", None)
    assert get_data(manifest(server), tmp_path) == got
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    "sha256, size, said",
    [("f" * 64, len(BYTES), f"got sha256 {SHA}, expected {'f' * 64}"), (SHA, 12, "expected 12")],
)
def test_wrong_bytes_leave_nothing(tmp_path, server, sha256, size, said):
    with pytest.raises(InputError, match=said):
        get_data(manifest(server, sha256, size), tmp_path)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("connection lost"),
        TimeoutError("too slow"),
        RuntimeError("odd server"),
        KeyboardInterrupt("Ctrl-C"),
    ],
)
def test_interrupted_download_is_gone_on_with(tmp_path, server, error, monkeypatch):
    Cut.error = error
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(expected, match=str(error)):
        get_data(manifest("cut://server"), tmp_path)
    (part,) = (tmp_path / "m/deep").iterdir()
    assert part.name[0] == "." and part.read_bytes() == BYTES[: 2**21]
    asked, open_source = [], transfer.open_source
    monkeypatch.setattr(transfer, "open_source", lambda w, n=0: asked.append(n) or open_source(w, n))
    path = Path(get_data(manifest(server), tmp_path).files["a"]["raw"])
    assert asked[0] == 2**21 and path.read_bytes() == BYTES
    assert everything(tmp_path) == ["m/deep/a.bin"]


def test_complete_files_are_kept_when_a_later_one_fails(tmp_path, server, monkeypatch):
    two = f"  b: {{files: {{raw: {{path: b.bin, sha256: {SHA}}}}}}}"
    with pytest.raises(MissingError, match="no file memory://server/b.bin"):
        get_data(manifest(server, more=two), tmp_path)
    assert everything(tmp_path) == ["m/deep/a.bin"]
    before = (tmp_path / "m/deep/a.bin").stat().st_mtime_ns
    fsspec.filesystem("memory").pipe("/server/b.bin", BYTES)
    get_data(manifest(server, more=two), tmp_path)
    assert (
        everything(tmp_path) == ["m/b.bin", "m/deep/a.bin"]
        and (tmp_path / "m/deep/a.bin").stat().st_mtime_ns == before
    )


def test_changed_file_is_neither_returned_nor_replaced(tmp_path, server):
    path = Path(get_data(manifest(server), tmp_path).files["a"]["raw"])
    path.write_bytes(BYTES[:-1] + bytes([BYTES[-1] ^ 1]))
    changed = path.read_bytes()
    with pytest.raises(InputError, match="move or delete it"):
        get_data(manifest(server), tmp_path)
    assert path.read_bytes() == changed
    (row,) = check_data(manifest(server), tmp_path)
    assert (
        row["state"] == "wrong"
        and f"expected {SHA}" in row["detail"]
        and hashlib.sha256(changed).hexdigest() in row["detail"]
    )


def test_unwritable_root_is_one_line(tmp_path, server):
    (tmp_path / "m").write_text("in the way")
    with pytest.raises(InputError, match="choose another root") as e:
        get_data(manifest(server), tmp_path)
    assert "\n" not in str(e.value)


def test_missing_protocol_package_names_the_extra(tmp_path, monkeypatch):
    def no_s3(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", no_s3)
    with pytest.raises(ImportError, match=r"dinolab\[remote\]"):
        get_data(manifest("s3://bucket"), tmp_path)


def test_public_buckets_are_opened_without_an_account(tmp_path, monkeypatch):
    asked = {}

    def note(where, mode, **options):
        asked.update(options, where=where)
        raise FileNotFoundError

    monkeypatch.setattr(fsspec, "open", note)
    with pytest.raises(MissingError):
        get_data(manifest("s3://bucket/"), tmp_path)
    assert asked == dict(where="s3://bucket/deep/a.bin", anon=True)


def test_local_files_stay_in_place(tmp_path):
    (tmp_path / "here/deep").mkdir(parents=True)
    (tmp_path / "here/deep/a.bin").write_bytes(BYTES)
    m = manifest(tmp_path / "here")
    assert get_data(m, tmp_path / "data").files["a"]["raw"] == str(tmp_path / "here/deep/a.bin")
    assert not (tmp_path / "data").exists()
    (tmp_path / "here/deep/a.bin").unlink()
    with pytest.raises(MissingError, match="put it there"):
        get_data(m, tmp_path / "data")


def test_check_reports_all_problems(tmp_path, server):
    more = "".join(f"\n  {c}: {{files: {{raw: {{path: {c}.bin, sha256: {SHA}}}}}}}" for c in "bcd")
    m = manifest(server, more=more)
    for name, content in (("m/b.bin", BYTES), ("m/c.bin", b"other")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert {row["case"]: row["state"] for row in check_data(m, tmp_path)} == dict(
        a="missing", b="ok", c="wrong", d="missing"
    )


@examples(30)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_file_is_ok_exactly_when_its_bytes_are(tmp_path_factory, expected, there):
    path = tmp_path_factory.mktemp("f") / "x"
    path.write_bytes(there)
    state, _ = file_state(path, File(path="x", sha256=hashlib.sha256(expected).hexdigest()))
    assert (state == "ok") == (expected == there)


SYNTH = """
name: toys
kind: volume
licence: x
citation: x
source: synth:toy
parameters: {size: 4}
cases:
  a: {parameters: {seed: 1}}
  b: {parameters: {seed: 2}}
splits: {train: [a], test: [b]}
"""


@pytest.fixture
def toy(monkeypatch):
    made = []

    def make(folder, size, seed):
        made.append(seed)
        (folder / "raw").write_text(str([seed] * size))
        return dict(raw="raw")

    monkeypatch.setitem(GENERATORS, "toy", make)
    return made


def test_generated_once_and_only_what_is_asked(tmp_path, toy):
    m = parse_manifest(SYNTH)
    got = get_data(m, tmp_path, only="test")
    assert list(got.files) == ["b"] and toy == [2]
    assert Path(got.files["b"]["raw"]).read_text() == "[2, 2, 2, 2]"
    assert list(get_data(m, tmp_path).split("train")) == ["a"] and toy == [2, 1]
    get_data(m, tmp_path)
    assert toy == [2, 1]


def test_other_parameters_are_not_mixed(tmp_path, toy):
    get_data(parse_manifest(SYNTH), tmp_path)
    other = parse_manifest(SYNTH.replace("size: 4", "size: 5"))
    assert {row["state"] for row in check_data(other, tmp_path)} == {"wrong"}
    with pytest.raises(InputError, match="'size': 4"):
        get_data(other, tmp_path)
    assert toy == [1, 2]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, toy):
    (tmp_path / "toys/a.zarr").mkdir(parents=True)
    (tmp_path / "toys/a.zarr/raw").write_text("mine")
    with pytest.raises(InputError, match="not generated"):
        get_data(parse_manifest(SYNTH), tmp_path)
    assert (
        everything(tmp_path) == ["toys/a.zarr/raw"]
        and (tmp_path / "toys/a.zarr/raw").read_text() == "mine"
        and toy == []
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_failed_generator_leaves_nothing(tmp_path, monkeypatch, error):
    def make(folder, size, seed):
        (folder / "raw").write_text("half")
        raise error

    monkeypatch.setitem(GENERATORS, "toy", make)
    with pytest.raises(error):
        get_data(parse_manifest(SYNTH), tmp_path)
    assert everything(tmp_path) == []


def test_two_processes_may_make_the_same(tmp_path, toy, monkeypatch):
    inner = GENERATORS["toy"]

    def slow(folder, size, seed):  # while it works, another one finishes the same case
        files = inner(folder, size, seed)
        if len(toy) == 1:
            get_data(parse_manifest(SYNTH), tmp_path, only="a")
        return files

    monkeypatch.setitem(GENERATORS, "toy", slow)
    get_data(parse_manifest(SYNTH), tmp_path, only="a")
    assert toy == [1, 1] and everything(tmp_path) == ["toys/a.zarr/raw", "toys/a.zarr/zarr.json"]
    assert data.read_note(tmp_path / "toys/a.zarr")["parameters"] == dict(size=4, seed=1)


def test_unknown_generator_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'em'"):
        get_data(parse_manifest(SYNTH.replace("synth:toy", "synth:emm")), tmp_path)
    assert everything(tmp_path) == []


def test_example4d_is_the_file_in_nibabel(tmp_path):
    import nibabel

    m = load_manifest("example4d", SHIPPED)
    image = nibabel.load(get_data(m, tmp_path).files["example4d"]["raw"])
    assert image.shape == (128, 96, 24, 2) and image.get_data_dtype() == "int16"
    assert m.read_as("example4d") == dict(time=0)


@pytest.mark.parametrize("name", ["jrc_hela-2", "jrc_mus-liver", "jrc_cos7-1a"])
def test_openorganelle_stays_remote(tmp_path, name):
    m = load_manifest(name, SHIPPED)
    assert (
        get_data(m, tmp_path).files[name]["raw"]
        == f"s3://janelia-cosem-datasets/{name}/{name}.zarr/recon-1/em/fibsem-uint8"
    )
    assert [row["state"] for row in check_data(m, tmp_path)] == ["remote"] and everything(tmp_path) == []


def test_choose():
    m = load_manifest("em_phantom", SHIPPED)
    assert choose(m) == m.names() and choose(m, ["valid", "train-0", "train"])[:2] == ["valid-0", "train-0"]
    with pytest.raises(InputError, match="did you mean 'train'"):
        choose(m, "trian")


def test_list_survives_a_bad_manifest(tmp_path):
    (tmp_path / "good.yaml").write_text(SYNTH.replace("toys", "good"))
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    (tmp_path / "away.yaml").write_text(
        SYNTH.replace("toys", "away")
        .replace("synth:toy", "package:no_such_package")
        .replace("parameters: {size: 4}", "")
        .replace("parameters: {seed: 1}", "files: {raw: {path: a, sha256: %s}}" % SHA)
        .replace("parameters: {seed: 2}", "files: {raw: {path: b, sha256: %s}}" % SHA[::-1])
    )
    rows = {row["name"]: row for row in list_data(tmp_path, tmp_path / "data")}
    assert "bad.yaml:1: missing key" in rows["bad"]["problem"]
    assert rows["good"]["here"] == rows["away"]["here"] == "no" and rows["good"]["splits"] == "train:1 test:1"


def test_list_counts_what_is_here(tmp_path, toy):
    (tmp_path / "toys.yaml").write_text(SYNTH)
    get_data(parse_manifest(SYNTH), tmp_path, only="a")
    assert list_data(tmp_path, tmp_path)[0]["here"] == "1 of 2"
    get_data(parse_manifest(SYNTH), tmp_path)
    assert list_data(tmp_path, tmp_path)[0]["here"] == "yes"


def test_settings_reach_the_reader(tmp_path):
    from dinolab.data.fetch import open_volumes

    ((case, images),) = open_volumes(load_manifest("example4d", SHIPPED), "test", tmp_path)
    (level,) = images["raw"].levels
    assert level.shape == (24, 96, 128) and level.voxel_size == pytest.approx((2.2e6, 2e6, 2e6), rel=1e-5)
    without = load_manifest("example4d", SHIPPED).model_copy(
        update=dict(read=data.Manifest.model_fields["read"].default)
    )
    with pytest.raises(InputError, match="axis t has 2 entries"):
        list(open_volumes(without, "test", tmp_path))


def test_manifest_can_correct_the_origins_of_levels(tmp_path):
    import numpy as np
    from dinolab.data.fetch import open_volumes
    from dinolab.volumes.write import write_multiscale

    folder = tmp_path / "em" / "a.zarr"
    write_multiscale(folder, np.arange(8**3, dtype="uint16").reshape(8, 8, 8), voxel_size=8, levels=3)
    meta = json.loads((folder / "zarr.json").read_text())
    for level in meta["attributes"]["ome"]["multiscales"][0]["datasets"]:
        level["coordinateTransformations"] = level["coordinateTransformations"][:1]
    (folder / "zarr.json").write_text(json.dumps(meta))
    text = f"{{name: m, kind: volume, licence: x, citation: x, source: {tmp_path}/em, cases: {{a: {{files: {{raw: a.zarr}}, read: {{origin: corner}}}}}}}}"
    ((_, images),) = open_volumes(parse_manifest(text), root=tmp_path)
    assert [v.origin for v in images["raw"].levels] == [(0, 0, 0), (4, 4, 4), (12, 12, 12)]
    assert [v.grid.corner for v in images["raw"].levels] == [(-4, -4, -4)] * 3


def test_phantom_manifest_says_what_the_generator_makes(tmp_path):
    import numpy as np
    from dinolab.data.fetch import open_volumes
    from dinolab.synth.em import EM_CLASSES, em_volume

    m = load_manifest("em_phantom", SHIPPED)
    assert {c.value: (c.name, c.colour) for c in m.classes} == EM_CLASSES
    assert {split: len(names) for split, names in m.splits.items()} == dict(
        train=3, valid=1, test=2, anisotropic=1
    )
    small = m.model_copy(update=dict(parameters=dict(shape=[24, 24, 24], voxel_size=[8, 8, 8])))
    ((case, images),) = open_volumes(small, "valid-0", tmp_path)
    assert {role: [v.shape for v in image.levels] for role, image in images.items()} == {
        role: [(n, n, n) for n in (24, 12, 6, 3)] for role in ("raw", "labels", "instances")
    }
    assert [v.voxel_size for v in images["raw"].levels] == [(n, n, n) for n in (8, 16, 32, 64)]
    truth = em_volume((24, 24, 24), voxel_size=(8, 8, 8), seed=m.parameters_of("valid-0")["seed"])
    for role in images:
        np.testing.assert_array_equal(images[role].levels[0].read(), getattr(truth, role))


class Web:
    "A server of this process: `behaviour(request, offset)` answers, what was asked is noted."

    def __init__(self, behaviour):
        self.asked, self.lock = [], threading.Lock()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                said = self.headers.get("Range")
                offset = int(said[6:-1]) if said else None
                with web.lock:
                    web.asked.append(offset)
                with contextlib.suppress(OSError):
                    behaviour(self, offset, len(web.asked))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web():
    made = []

    def make(behaviour):
        made.append(Web(behaviour))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(request, offset, body=BYTES, end=None, length=None, total=None):
    "A right answer, up to `end`; with other lengths than it has, where they are given."
    start = offset or 0
    request.send_response(200 if offset is None else 206)
    if offset is not None:
        request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{total or len(body)}")
    if length != "none":
        request.send_header("Content-Length", str(length or len(body) - start))
    request.end_headers()
    request.wfile.write(body[start:end])


def test_web_download(tmp_path, web):
    one = web(lambda request, offset, n: answer(request, offset))
    path = Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"])
    assert path.read_bytes() == BYTES and one.asked == [None] and everything(tmp_path) == ["m/deep/a.bin"]


def test_a_broken_transfer_goes_on_where_it_broke(tmp_path, web):
    "Each answer breaks off after 1 MiB + 5; no byte is sent twice."
    step = 2**20 + 5
    one = web(lambda request, offset, n: answer(request, offset, end=(offset or 0) + step))
    path = Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"])
    assert path.read_bytes() == BYTES and one.asked == [None, step, 2 * step, 3 * step]


def test_a_server_without_ranges_begins_again(tmp_path, web):
    def once_half(request, offset, n):
        answer(request, None, end=2**20 if n == 1 else None)

    one = web(once_half)
    path = Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"])
    assert path.read_bytes() == BYTES and one.asked == [None, 2**20]


def test_a_killed_download_goes_on_and_other_leftovers_go(tmp_path, web):
    folder = tmp_path / "m/deep"
    folder.mkdir(parents=True)
    (folder / f".a.bin.{SHA[:8]}.part").write_bytes(BYTES[:100])
    (folder / ".a.bin.00000000.part").write_bytes(b"of another version")
    (folder / ".a.bin.1234abcd").write_bytes(b"of an older release")
    (folder / ".b.bin.1234abcd").write_bytes(b"not ours")
    one = web(lambda request, offset, n: answer(request, offset))
    path = Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"])
    assert path.read_bytes() == BYTES and one.asked == [100]
    assert everything(tmp_path) == ["m/deep/.b.bin.1234abcd", "m/deep/a.bin"]


def test_a_leftover_of_other_bytes_is_begun_again(tmp_path, web):
    folder = tmp_path / "m/deep"
    folder.mkdir(parents=True)
    (folder / f".a.bin.{SHA[:8]}.part").write_bytes(b"x" * 100)
    one = web(lambda request, offset, n: answer(request, offset))
    path = Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"])
    assert path.read_bytes() == BYTES and one.asked == [100, None]


@pytest.mark.parametrize("there", [len(BYTES), len(BYTES) + 3])
def test_a_leftover_that_is_complete_or_too_long(tmp_path, web, there):
    folder = tmp_path / "m/deep"
    folder.mkdir(parents=True)
    (folder / f".a.bin.{SHA[:8]}.part").write_bytes((BYTES + b"xyz")[:there])
    one = web(lambda request, offset, n: answer(request, offset))
    path = Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"])
    assert path.read_bytes() == BYTES and one.asked == ([] if there == len(BYTES) else [None])


@pytest.mark.parametrize("length", [None, "none"])
def test_a_body_without_end_is_left_at_the_stated_size(tmp_path, web, length):
    sent = []

    def endless(request, offset, n):
        request.send_response(200)
        if length is None:
            request.send_header("Content-Length", str(len(BYTES)))
        request.end_headers()
        for _ in range(400):
            request.wfile.write(bytes(2**20))
            sent.append(2**20)

    one = web(endless)
    with pytest.raises(InputError, match="got (more than|sha256)") as e:
        get_data(manifest(one.url), tmp_path)
    assert "\n" not in str(e.value) and everything(tmp_path) == [] and sum(sent) < 200 * 2**20


def test_another_stated_size_is_refused_before_a_byte_is_kept(tmp_path, web):
    one = web(lambda request, offset, n: answer(request, offset, body=BYTES * 2))
    with pytest.raises(InputError, match=f"got a file of {2 * len(BYTES)} bytes, expected {len(BYTES)}"):
        get_data(manifest(one.url), tmp_path)
    assert everything(tmp_path) == [] and len(one.asked) == 1


@pytest.mark.parametrize("drip", [False, True])
def test_a_stalled_server_is_left_after_a_time(tmp_path, web, monkeypatch, drip):
    monkeypatch.setattr(transfer, "PATIENCE", 0.2)
    monkeypatch.setattr(transfer, "ATTEMPTS", 2)
    done = threading.Event()

    def stall(request, offset, n):
        answer(request, offset, end=(offset or 0) + 10)
        while not done.wait(0.02):
            if drip:
                request.wfile.write(b"x")
                request.wfile.flush()

    one, limits, urlopen = web(stall), [], transfer.urlopen
    monkeypatch.setattr(
        transfer,
        "urlopen",
        lambda request, timeout: limits.append(timeout) or urlopen(request, timeout=timeout),
    )
    try:
        with pytest.raises(InputError, match="nothing came for 0.2 s|fewer than 1000 bytes per second") as e:
            get_data(manifest(one.url), tmp_path)
    finally:
        done.set()
    assert "\n" not in str(e.value) and one.url in str(e.value) and len(one.asked) == 2
    assert limits == [0.2, 0.2]


@pytest.mark.parametrize(
    "code,error,said,times",
    [
        (404, MissingError, "no file http", 1),
        (403, InputError, "HTTP Error 403", 1),
        (503, InputError, "HTTP Error 503", 4),
        (429, InputError, "HTTP Error 429", 4),
    ],
)
def test_answers_that_are_errors(tmp_path, web, code, error, said, times):
    one = web(lambda request, offset, n: request.send_error(code))
    with pytest.raises(error, match=said) as e:
        get_data(manifest(one.url), tmp_path)
    assert "\n" not in str(e.value) and everything(tmp_path) == [] and len(one.asked) == times


def test_a_busy_server_is_asked_again(tmp_path, web):
    one = web(lambda request, offset, n: request.send_error(503) if n < 3 else answer(request, offset))
    assert Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"]).read_bytes() == BYTES


@pytest.mark.parametrize("lie", ["Content-Length: -5", "Content-Length: many", "Content-Range: bytes x-y/z"])
def test_headers_without_sense(tmp_path, web, lie):
    def odd(request, offset, n):
        request.send_response(200)
        request.send_header(*lie.split(": "))
        request.end_headers()
        request.wfile.write(BYTES)

    one = web(odd)
    with contextlib.suppress(InputError):  # what http.client makes of it: the file, or one line
        assert Path(get_data(manifest(one.url), tmp_path).files["a"]["raw"]).read_bytes() == BYTES
    assert [name for name in everything(tmp_path) if not name.startswith("m/deep/.")] in (
        [],
        ["m/deep/a.bin"],
    )


def test_wrong_bytes_of_the_web_leave_nothing(tmp_path, web):
    one = web(lambda request, offset, n: answer(request, offset, body=BYTES[:-1] + b"!"))
    with pytest.raises(InputError, match="got sha256"):
        get_data(manifest(one.url), tmp_path)
    assert everything(tmp_path) == []


def test_many_want_the_same_file_and_one_fetches_it(tmp_path, web):
    one = web(lambda request, offset, n: time.sleep(0.1) or answer(request, offset))
    m = manifest(one.url)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: get_data(m, tmp_path).files["a"]["raw"], range(4)))
    assert {Path(path).read_bytes() == BYTES for path in found} == {True}
    assert one.asked == [None] and everything(tmp_path) == ["m/deep/a.bin"]


def test_a_full_disk_is_one_line_and_leaves_nothing_under_the_name(tmp_path, server, monkeypatch):
    write = transfer._Part.write

    def full(self, data):
        if self.size >= 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(transfer._Part, "write", full)
    with pytest.raises(InputError, match="No space left on device.*make room") as e:
        get_data(manifest(server), tmp_path)
    assert "\n" not in str(e.value) and everything(tmp_path) == []


def test_a_file_larger_than_the_disk_is_refused_at_once(tmp_path, web):
    one = web(lambda request, offset, n: answer(request, offset))
    with pytest.raises(InputError, match="GB needed, .* GB free"):
        get_data(manifest(one.url, size=10**16), tmp_path)
    assert one.asked == [] and everything(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path, server):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied.*another root"):
        get_data(manifest(server), tmp_path)


def test_a_generator_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def make(folder, size, seed):
        (folder / "raw").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(GENERATORS, "toy", make)
    with pytest.raises(InputError, match="No space left on device"):
        get_data(parse_manifest(SYNTH), tmp_path)
    assert everything(tmp_path) == []


def test_what_a_killed_generator_left_is_removed(tmp_path, toy):
    "By a process that was killed while it made the case; what a living one makes stays."
    dead, alive = tmp_path / "toys/.a.zarr.dead1234", tmp_path / "toys/.a.zarr.live1234"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "raw").write_text("half")
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    get_data(parse_manifest(SYNTH), tmp_path, only="a")
    os.close(handle)
    assert not dead.exists() and alive.exists() and (tmp_path / "toys/a.zarr/raw").exists()
    get_data(parse_manifest(SYNTH), tmp_path, only="b")
    assert alive.exists()  # of another case


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_holds(tmp_path, toy, server, umask):
    old = os.umask(umask)
    try:
        got = Path(get_data(manifest(server), tmp_path).files["a"]["raw"])
        made = Path(get_data(parse_manifest(SYNTH), tmp_path).files["a"]["raw"]).parent
    finally:
        os.umask(old)
    assert got.stat().st_mode & 0o777 == 0o666 & ~umask and made.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"attributes": 3}', '{"attributes": {"files": 3}}'])
def test_a_damaged_note_is_named(tmp_path, toy, content):
    folder = Path(get_data(parse_manifest(SYNTH), tmp_path).files["a"]["raw"]).parent
    (folder / "zarr.json").write_text(content)
    with pytest.raises(InputError, match="not generated: move or delete it"):
        get_data(parse_manifest(SYNTH), tmp_path)


@pytest.mark.parametrize("only", [3, True, ["a", None], [["a"]], "c"])
def test_cases_are_named_by_text(only):
    with pytest.raises(InputError, match="split or case"):
        choose(parse_manifest(SYNTH), only)


@pytest.mark.parametrize(
    "source,parameters",
    [
        ("em", "shape: 3"),
        ("retina", "shape: [a, b]"),
        ("spacecraft", "seed: [1"),
        ("em", "voxel_size: {}"),
        ("retina", "seed: 1.5"),
    ],
)
def test_parameters_that_a_generator_cannot_use(tmp_path, source, parameters):
    text = SYNTH.replace("synth:toy", f"synth:{source}").replace("{size: 4}", "{%s}" % parameters)
    text = text.replace("seed: 1", "{}").replace("seed: 2", "{}") if "seed" in parameters else text
    with pytest.raises(InputError):
        get_data(parse_manifest(text), tmp_path, only="a")
    assert everything(tmp_path) == []


def test_a_generated_case_that_lost_a_file_is_not_whole(tmp_path):
    "The note alone says what was made, not what is there."
    manifest = load_manifest("retina_phantom")
    get_data(manifest, tmp_path)
    assert {row["state"] for row in check_data(manifest, tmp_path)} == {"ok"}
    next(tmp_path.rglob("mask.png")).unlink()
    states = [row["state"] for row in check_data(manifest, tmp_path)]
    assert states.count("wrong") == 1 and set(states) == {"ok", "wrong"}
    with pytest.raises(InputError, match="without mask.png: move or delete it"):
        get_data(manifest, tmp_path)

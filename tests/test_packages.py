"One file out of a wheel or source archive of a package index, and everything that an index can do wrong."

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinolab.data.packages as packages
import dinolab.data.transfer as transfer
from dinolab.core.errors import InputError
from dinolab.data.fetch import get_data
from dinolab.data.indexes import Client, IndexSettings, Release, find_archives, index_settings
from dinolab.data.manifest import parse_manifest
from dinolab.data.packages import package_file

WHEEL, SDIST = "em_data-1.0-py3-none-any.whl", "em_data-1.0.tar.gz"
METADATA = (
    "Metadata-Version: 2.4\nName: em-data\nVersion: 1.0\nLicense-Expression: CC-BY-4.0\nAuthor: A. Nyone\n"
)
IMAGE = np.random.default_rng(0).integers(0, 256, (700, 900), np.uint8)  # does not compress: half a megabyte
FILLER = np.random.default_rng(1).bytes(6 * 2**20)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def wheel_of(files):
    "A wheel as its bytes."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as f:
        for name, data in files.items():
            f.writestr(name, data)
    return out.getvalue()


def sdist_of(files, links=()):
    "A source archive as its bytes, with a setup.py that would run if anybody ran it."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as f:
        for name, data in files.items():
            info = tarfile.TarInfo(f"em_data-1.0/{name}")
            info.size = len(data)
            f.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(f"em_data-1.0/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, target
            f.addfile(info)
    return out.getvalue()


@pytest.fixture(scope="module")
def png():
    out = io.BytesIO()
    Image.fromarray(IMAGE).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def wheel(png):
    licence = "em_data-1.0.dist-info/licenses/LICENSE"
    files = {"em/big.bin": FILLER, "em/a.png": png, "em_data-1.0.dist-info/METADATA": METADATA}
    return wheel_of(files | {licence: "Attribution 4.0 International\n"})


class Index(ThreadingHTTPServer):
    "A package index that counts what it sends, and misbehaves as it is told."

    def __init__(self):
        self.files, self.sent, self.asked = {}, 0, []
        self.ranges, self.form, self.stall, self.cut = True, "json", False, None
        self.password, self.wrong_sha, self.state_sha = None, False, True
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/simple"

    def page(self):
        "The page of em-data."
        shas = {name: 64 * "0" if self.wrong_sha else sha(data) for name, data in self.files.items()}
        if self.form == "html":
            ends = {name: f"#sha256={shas[name]}" if self.state_sha else "" for name in self.files}
            links = [f'<a href="../../files/{name}{ends[name]}">{name}</a>' for name in self.files]
            return "text/html", f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>"
        listed = [
            dict(
                filename=n,
                url=f"../../files/{n}",
                hashes=dict(sha256=shas[n]) if self.state_sha else {},
                size=len(d),
            )
            for n, d in self.files.items()
        ]
        return "application/vnd.pypi.simple.v1+json", json.dumps(dict(name="em-data", files=listed))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        index = self.server
        index.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if index.password and self.headers.get("Authorization") != index.password:
            return self.send_error(401)
        if self.path == "/simple/em-data/":
            kind, text = index.page()
            return self.answer(200, text.encode(), {"Content-Type": kind})
        data = index.files.get(self.path.removeprefix("/files/"))
        if data is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        if not (index.ranges and wanted):
            return self.answer(200, data)
        start, _, stop = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(start), min(int(stop) + 1 if stop else len(data), len(data))
        self.answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.stall and self.path.startswith("/files/"):
            return time.sleep(3)
        if self.server.cut and self.path.startswith("/files/") and len(data) > self.server.cut:
            data, self.server.cut = data[: self.server.cut], None
        self.server.sent += len(data)
        self.wfile.write(data)


@pytest.fixture
def index(monkeypatch, tmp_path, wheel):
    packages._SAID.clear()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "UV_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    server = Index()
    server.files = {WHEEL: wheel}
    monkeypatch.setenv("DINOLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    monkeypatch.setattr(packages, "PAUSE", 0.01)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(index):
    return IndexSettings(indexes=(index.address,))


def kept(tmp_path):
    "Names of all files in the cache."
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def image_of(png):
    return f"pypi:em-data==1.0!em/a.png#sha256={sha(png)}"


@pytest.mark.parametrize("form", ["json", "html"])
def test_a_part_of_a_wheel(index, settings, png, tmp_path, capsys, form):
    "With a checksum only the wanted member comes, with its licence; the second time nothing is asked."
    index.form = form
    path = package_file(image_of(png), settings=settings)
    assert path.read_bytes() == png and path.parent.name == sha(png)
    assert index.sent < len(png) + 3 * 2**20 < len(index.files[WHEEL]) / 1.5
    note = (path.parent / "a.png.licence.txt").read_text()
    assert "licence: CC-BY-4.0" in note and "A. Nyone" in note and "Attribution 4.0 International" in note
    assert "a.png from em-data==1.0: CC-BY-4.0; A. Nyone" in capsys.readouterr().err
    assert kept(tmp_path) == ["a.png", "a.png.licence.txt"]
    asked = len(index.asked)
    assert package_file(image_of(png), settings=settings) == path and len(index.asked) == asked
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pinned", [True, False])
def test_a_whole_wheel(index, settings, png, tmp_path, pinned):
    "A server without ranges, and a file without checksum: the archive comes whole, and only the file stays."
    index.ranges = not pinned
    where = image_of(png) if pinned else "pypi:em-data==1.0!em/a.png"
    assert package_file(where, settings=settings).read_bytes() == png
    assert index.sent > len(index.files[WHEEL]) and kept(tmp_path) == ["a.png", "a.png.licence.txt"]
    assert package_file(where, settings=IndexSettings(indexes=())).read_bytes() == png


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_lines(index, settings, png, ranges):
    "A line that breaks once does not matter."
    index.ranges, index.cut = ranges, 2**18
    assert package_file(image_of(png), settings=settings).read_bytes() == png


def test_goes_on_after_a_stop(index, settings, png, tmp_path, monkeypatch):
    "What came before a process was stopped is not sent again."
    seen = []

    def stop(self, number, ask=packages.RangeFile._ask):
        seen.append(number)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return ask(self, number)

    with monkeypatch.context() as m:
        m.setattr(packages.RangeFile, "_ask", stop)
        with pytest.raises(KeyboardInterrupt):
            package_file(f"pypi:em-data==1.0!em/big.bin#sha256={sha(FILLER)}", settings=settings)
    index.sent = 0
    package_file(f"pypi:em-data==1.0!em/big.bin#sha256={sha(FILLER)}", settings=settings)
    assert index.sent < len(index.files[WHEEL]) - 2**18 and kept(tmp_path) == [
        "big.bin",
        "big.bin.licence.txt",
    ]


def test_source_archive(index, settings, png, tmp_path):
    "A package that has only a source archive is read as an archive; its setup.py stays text."
    bad = f"open({str(tmp_path / 'ran')!r}, 'w')"
    index.files = {
        SDIST: sdist_of({"setup.py": bad.encode(), "PKG-INFO": METADATA.encode(), "em/a.png": png})
    }
    assert package_file(image_of(png), settings=settings).read_bytes() == png
    assert not (tmp_path / "ran").exists()


def test_links_and_dots_are_not_followed(index, settings, tmp_path):
    "A link in an archive is as if it were not there, and a path with .. is none."
    (tmp_path / "secret").write_text("secret")
    index.files = {SDIST: sdist_of({"PKG-INFO": METADATA.encode()}, [("em/a.png", str(tmp_path / "secret"))])}
    with pytest.raises(InputError, match="no such file"):
        package_file("pypi:em-data==1.0!em/a.png", settings=settings)
    with pytest.raises(InputError, match="expected pypi:NAME==VERSION"):
        package_file("pypi:em-data==1.0!../secret", settings=settings)
    assert kept(tmp_path) == []


def without_licence(files):
    return wheel_of(files | {"em_data-1.0.dist-info/METADATA": "Name: em-data\nVersion: 1.0\n"})


WRONG = {
    "path": ("pypi:em-data==1.0!em/b.png", dict(), r"no such file; did you mean em/a.png"),
    "version": (
        "pypi:em-data==1.1!em/a.png",
        dict(),
        "no wheel or source archive of this version; expected one such as 1.0",
    ),
    "package": ("pypi:em-dat==1.0!em/a.png", dict(), "no package 'em-dat'"),
    "pin": ("pypi:em-data>=1.0!em/a.png", dict(), "expected pypi:NAME==VERSION!path"),
    "sha of the file": (f"pypi:em-data==1.0!em/a.png#sha256={64 * '1'}", dict(), "got sha256"),
    "sha of the archive": ("pypi:em-data==1.0!em/a.png", dict(wrong_sha=True), "got sha256"),
    "no sha at all": ("pypi:em-data==1.0!em/a.png", dict(state_sha=False), "append #sha256"),
    "stalled": ("pypi:em-data==1.0!em/a.png", dict(stall=True), "nothing came for 0.3 s"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_and_nothing_kept(index, settings, tmp_path, monkeypatch, case):
    "Whatever is wrong is said in one line, soon, and nothing stays."
    monkeypatch.setattr(transfer, "PATIENCE", 0.3)
    where, behaviour, message = WRONG[case]
    vars(index).update(behaviour)
    start = time.time()
    with pytest.raises(InputError, match=message) as e:
        package_file(where, settings=settings)
    assert "\n" not in str(e.value) and time.time() - start < 6
    assert kept(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "licence", "large", "bomb"])
def test_wrong_archives(index, settings, png, wheel, tmp_path, monkeypatch, damage):
    "Archives that are damaged, state no licence, or are too large, before and after unpacking."
    where, message = image_of(png), ""
    if damage == "cut":
        index.files[WHEEL], message = wheel[: len(wheel) // 2], "not a readable archive"
    if damage == "licence":
        index.files[WHEEL], message = without_licence({"em/a.png": png}), "states no licence"
    if damage == "large":
        monkeypatch.setattr(packages, "LARGEST", 2**20)
        message = "expected at most 1"
    if damage == "bomb":
        zeros = bytes(8 * 2**20)
        index.files[WHEEL] = wheel_of({"em/zeros": zeros, "em_data-1.0.dist-info/METADATA": METADATA})
        monkeypatch.setattr(packages, "LARGEST", 2**20)
        where, message = f"pypi:em-data==1.0!em/zeros#sha256={sha(zeros)}", "has 8 MiB, expected at most 1"
    with pytest.raises(InputError, match=message) as e:
        package_file(where, settings=settings)
    assert "\n" not in str(e.value) and kept(tmp_path) == []


def test_licence_of_the_manifest(index, settings, png):
    "A licence that is stated for the file comes before that of the package."
    index.files[WHEEL] = without_licence({"em/a.png": png})
    path = package_file(image_of(png), licence="CC0-1.0", citation="B. Other", settings=settings)
    assert "licence: CC0-1.0\nattribution: B. Other" in (path.parent / "a.png.licence.txt").read_text()


def test_damaged_cache(index, settings, png):
    "A file of the cache that was changed is fetched again."
    path = package_file(image_of(png), settings=settings)
    path.write_bytes(b"other")
    assert package_file(image_of(png), settings=settings).read_bytes() == png


def test_no_index(index, tmp_path):
    "An index that is not there is said, unless another one has the package; a password is never said."
    nowhere = "http://me:secret@127.0.0.1:9/simple"
    with pytest.raises(InputError, match="index-url") as e:
        package_file("pypi:em-data==1.0!em/a.png", settings=IndexSettings(indexes=(nowhere,)))
    assert "secret" not in str(e.value) and "\n" not in str(e.value)
    both = IndexSettings(indexes=(nowhere, index.address))
    assert find_archives(Release("em-data", "1.0"), both)[0].filename == WHEEL


def test_passwords(index, png, monkeypatch, tmp_path):
    "User and password of an index, from its address or .netrc, go to its files too."
    index.password = "Basic bWU6cEBzcw=="  # me:p@ss
    address = index.address.replace("http://", "http://me:p%40ss@")
    assert package_file(image_of(png), settings=IndexSettings(indexes=(address,))).read_bytes() == png
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password p@ss\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = find_archives(Release("em-data", "1.0"), IndexSettings(indexes=(index.address,)))
    assert found[0].filename == WHEEL


def test_settings_of_pip(index, png, monkeypatch, tmp_path):
    "The index of pip's file is used, that of the environment before it, and a folder of archives."
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://nowhere.invalid/simple\nextra-index-url =\n    file:///a\n    file:///b\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert index_settings().indexes[0] == "https://nowhere.invalid/simple"
    assert {"file:///a", "file:///b"} <= set(index_settings().indexes)
    monkeypatch.setenv("PIP_INDEX_URL", index.address)
    assert index_settings().indexes[0] == index.address
    assert package_file(image_of(png)).read_bytes() == png
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEEL).write_bytes(index.files[WHEEL])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("DINOLAB_CACHE", str(tmp_path / "other"))
    assert package_file(image_of(png)).read_bytes() == png


def test_wrong_certificates():
    "A file of certificates that is not there is named."
    with pytest.raises(InputError, match="setting cert"):
        Client(IndexSettings(cert="/nowhere/ca.pem"))


MANIFEST = """
name: em
kind: image
licence: CC-BY-4.0
citation: A. Nyone 2026
source: pypi:em-data==1.0{folder}
cases:
  a: {{files: {{image: {{path: {path}, sha256: {sha}}}}}}}
"""


@pytest.mark.parametrize(("folder", "path"), [("", "em/a.png"), ("!em", "a.png")])
def test_manifest(index, png, tmp_path, monkeypatch, folder, path):
    "A data set whose files lie in a package; the terms lie beside its files."
    monkeypatch.setenv("PIP_INDEX_URL", index.address)
    manifest = parse_manifest(MANIFEST.format(folder=folder, path=path, sha=sha(png)))
    found = get_data(manifest, tmp_path / "data").files["a"]["image"]
    assert Path(found).read_bytes() == png
    assert "attribution: A. Nyone 2026" in Path(f"{found}.licence.txt").read_text()


def test_a_manifest_needs_version_and_checksum():
    "A data set of a package names one version, and the checksum of each file."
    with pytest.raises(InputError, match="exact version"):
        parse_manifest(MANIFEST.format(folder="", path="a", sha=64 * "1").replace("==1.0", ">=1.0"))
    with pytest.raises(InputError, match="missing sha256"):
        parse_manifest(MANIFEST.format(folder="", path="a", sha="null"))


def test_real_index(tmp_path, monkeypatch):
    "The small image of a published package, by the index of this machine; skipped where there is none."
    monkeypatch.setenv("DINOLAB_CACHE", str(tmp_path))
    where = "pypi:stardist==0.9.2!stardist/data/images/mask3d.tif"
    checksum = "a2ff51b712941a90cf3a5628b11f04f5d7fa3f29c808c065d3be6ff938b215a1"
    monkeypatch.setattr(transfer, "PATIENCE", 5)
    monkeypatch.setattr(packages, "ATTEMPTS", 1)
    try:
        archives = find_archives(Release("stardist", "0.9.2"))
    except InputError as e:
        pytest.skip(f"no package index: {e}")
    assert archives[0].is_wheel
    path = package_file(f"{where}#sha256={checksum}")
    assert (
        sha(path.read_bytes()) == checksum and "BSD" in path.with_name("mask3d.tif.licence.txt").read_text()
    )


def test_command_line(index, tmp_path):
    "A package that is not there is one line and exit code 2."
    manifest = tmp_path / "em.yaml"
    manifest.write_text(MANIFEST.format(folder="!em", path="b.png", sha=64 * "1"))
    command = [
        sys.executable,
        "-c",
        "from dinolab.cli.main import main; main()",
        "data",
        "get",
        str(manifest),
        "--root",
        str(tmp_path / "data"),
    ]
    env = {**os.environ, "PIP_INDEX_URL": index.address}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "did you mean em/a.png" in done.stderr, done.stderr
    assert not (tmp_path / "data/em/b.png").exists()

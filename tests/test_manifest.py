"""Manifests: every mistake is found, at its line, all at once."""

import string
import textwrap
from pathlib import Path

import pytest
import yaml
from examples import examples
from hypothesis import given, strategies as st

from dinolab.core.errors import InputError, MissingError
from dinolab.data.manifest import Manifest, find_manifests, load_manifest, parse_manifest

SHIPPED = Path(__file__).parent.parent / "data_manifests"

GOOD = """\
# a comment, so that the first key is not on line 1
name: good
kind: volume
licence: CC-BY-4.0
citation: somebody
source: https://example.org/em

read: {unit: nanometer, channel: 0}
cases:
  one:
    files:
      raw: {path: one.tif, sha256: %s, size: 12}
      labels:
        path: one_labels.tif
        sha256: %s
  two:
    group: mouse 2
    files: {raw: {path: two.tif, sha256: %s}}
splits:
  train: [one]
  test:
    - two
classes:
  - {value: 0, name: background, colour: "#000000"}
  - value: 1
    name: nucleus
    colour: "#1f77b4"
""" % ("a" * 64, "b" * 64, "c" * 64)


def problems(text):
    "Lines and messages of the error; the file is called m.yaml."
    with pytest.raises(InputError) as e:
        parse_manifest(text, "m.yaml")
    found = [line.split(":", 2) for line in str(e.value).splitlines()]
    assert all(name == "m.yaml" for name, *_ in found)
    return [(int(line), message.strip()) for _, line, message in found]


def swapped(old, new):
    assert GOOD.count(old) >= 1
    return GOOD.replace(old, new, 1)


def test_good_has_no_problem():
    m = parse_manifest(GOOD)
    assert m.names("train") == ["one"] and m.names() == ["one", "two"]
    assert m.read_as("two") == {"unit": "nanometer", "channel": 0}


@pytest.mark.parametrize(
    "old, new, line, said",
    [
        ("licence:", "lisence:", 4, "unknown key 'lisence'"),
        ("licence:", "lisence:", 4, "did you mean 'licence'?"),
        ("licence:", "lisence:", 2, "missing key 'licence'"),
        ("kind: volume", "kind: volumes", 3, "expected 'volume', 'image' or 'diffusion'"),
        ("kind: volume", "kind: diffusion", 11, "missing dwi, bval, bvec"),
        ("name: good", "name: a/b", 2, "letters, digits"),
        ("name: good", "name: [42]", 2, "got [42], expected a valid string"),
        ("citation: somebody", "citation: ''", 5, "some text"),
        ("source: https://example.org/em", "source: packge:nibabel", 6, "did you mean package:nibabel?"),
        ("channel: 0", "channel: '0'", 8, "got '0', expected a valid integer"),
        ("channel: 0", "channel: -1", 8, "greater than or equal to 0"),
        ("channel: 0", "voxel_size: [8, 0, 8]", 8, "read.voxel_size.1: got 0, expected greater than 0"),
        ("channel: 0", "voxel_size: [8, .nan, 8]", 8, "read.voxel_size.1"),
        ("channel: 0", "voxel_size: [8]", 8, "at least 2 items"),
        ("channel: 0", "origin: centre", 8, "expected 'file' or 'corner'"),
        ("path: one.tif", "path: /one.tif", 12, "below the source"),
        ("path: one.tif", "path: ../one.tif", 12, "below the source"),
        ("a" * 64, "a" * 63, 12, "64 hexadecimal digits"),
        (", sha256: " + "a" * 64, "", 12, "missing sha256"),
        ("size: 12", "size: 12 MB", 12, "cases.one.files.raw.size: got '12 MB', expected a valid integer"),
        ("path: one_labels.tif", "pth: one_labels.tif", 14, "did you mean 'path'?"),
        ("path: one_labels.tif", "pth: one_labels.tif", 13, "missing key 'path'"),
        ("      labels:", "      lables:", 13, "did you mean 'labels'?"),
        ("path: two.tif", "path: two.zarr/raw", 18, "set remote: true"),
        ("group: mouse 2", "parameters: {seed: 1}", 17, "nothing reads them"),
        ("  two:\n", "  one:\n", 16, "key 'one' is on line 10 already"),
        ("- two", "- too", 22, "unknown case 'too'"),
        ("- two", "- too", 16, "case 'two' is in no split"),
        ("- two", "- two\n    - one", 23, "case 'one' is in split 'train' already"),
        ("path: two.tif", "path: one.tif", 16, "path 'one.tif' of case 'two' (test) is in 'one' (train) too"),
        ("c" * 64, "b" * 64, 16, "sha256"),
        ("value: 1", "value: 0", 25, "class value 0 is taken"),
        ("value: 1", "value: true", 25, "got True, expected a valid integer"),
        ("name: nucleus", "name: background", 26, "class name 'background' is taken"),
        ('colour: "#1f77b4"', "colour: blue", 27, 'a colour such as "#1f77b4"'),
        ('colour: "#1f77b4"', "colour: #1f77b4", 27, "in quotes"),
        ("splits:", "remote: 1\nsplits:", 19, "got 1, expected a valid boolean"),
        ("https://example.org/em", "/data/em\nremote: true", 7, "with an address"),
        ("https://example.org/em", "synth:em", 11, "expected parameters only"),
        ("  train: [one]", "  train: one", 20, "expected a valid list"),
    ],
)
def test_each_mistake_at_its_line(old, new, line, said):
    assert any(where == line and said in message for where, message in problems(swapped(old, new)))


def test_all_mistakes_at_once_in_order():
    text = (
        swapped("licence:", "lisence:")
        .replace("size: 12", "size: x")
        .replace("- two", "- one")
        .replace("value: 1", "value: 0")
    )
    lines = [line for line, _ in problems(text)]
    assert lines == sorted(lines) and {2, 4, 12, 25} <= set(lines)
    text = swapped("licence:", "lisence:").replace("- two", "- one").replace("value: 1", "value: 0")
    assert {2, 4, 16, 22, 25} <= {line for line, _ in problems(text)}


@pytest.mark.parametrize(
    "text, line, said",
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("\n\n- a\n- b\n", 3, "got a list"),
        ("just text\n", 1, "got a str"),
        ("name: x\nkind: [volume\nlicence: y\n", 3, "not YAML"),
        ("name: x\n\tkind: y\n", 2, "not YAML"),
        ("name: x\n---\nname: y\n", 2, "not YAML"),
        ("name: !!python/object:os.system x\n", 1, "not YAML"),
        ("a: 1\nb: \x00\n", 2, "not a text file"),
        ("name: 2020-13-45\n", 1, "missing key 'kind'"),
        ("name: &x {b: *x}\n", 1, "aliases stand for more than 2,000,000 values, or for themselves"),
        ("[" * 10000, 1, "nested too deeply"),
        ("cases: " + "{a: " * 10000, 1, "nested too deeply"),
        ("name: " + "9" * 5000, 1, "missing key 'kind'"),
        ("read: {time: " + "9" * 5000 + "}\n", 1, "a number that cannot be read"),
        ("read: {time: !!int x}\n", 1, "a number that cannot be read"),
        ("1: 2\n", 1, "unknown key '1'"),
    ],
)
def test_files_that_are_no_manifest(text, line, said):
    assert any(where == line and said in message for where, message in problems(text))


def test_generated_cases_with_the_same_seed_are_the_same_case():
    text = textwrap.dedent("""\
        name: g
        kind: volume
        licence: x
        citation: x
        source: synth:em
        parameters: {seed: 1}
        cases:
          a: {}
          b: {parameters: {seed: %d, noise: 3}}
        splits: {train: [a], test: [b]}
        """)
    assert parse_manifest(text % 2).parameters_of("b") == {"seed": 2, "noise": 3}
    assert problems(text % 1) == [
        (9, "seed 1 of case 'b' (test) is in 'a' (train) too: expected in one split only")
    ]


def test_group_is_not_divided():
    text = swapped("  one:\n", "  one:\n    group: mouse 2\n")
    assert [line for line, _ in problems(text)] == [17]


def test_load_by_name_and_path(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    assert load_manifest("good", tmp_path) == load_manifest(tmp_path / "good.yaml") == parse_manifest(GOOD)
    with pytest.raises(InputError, match="did you mean 'good'"):
        load_manifest("goood", tmp_path)
    with pytest.raises(MissingError, match="no manifests in"):
        load_manifest("good", tmp_path / "none")
    with pytest.raises(MissingError, match="no file"):
        load_manifest(tmp_path / "bad.yaml")
    (tmp_path / "copy.yaml").write_text(GOOD)
    with pytest.raises(InputError, match="copy.yaml:2: name: got 'good', expected 'copy'"):
        load_manifest("copy", tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: x\ncitation: Müller".encode("latin-1"))
    with pytest.raises(InputError, match="latin.yaml:2: not a text file"):
        load_manifest("latin", tmp_path)


def test_local_source_is_relative_to_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "good.yaml").write_text(GOOD.replace("https://example.org/em", "../em"))
    monkeypatch.chdir("/")
    assert load_manifest("good", tmp_path).source == str(tmp_path.resolve().parent / "em")


@pytest.mark.parametrize("name", sorted(find_manifests(SHIPPED)))
def test_shipped_manifests_are_valid_and_so_is_the_copy_of_a_run(name, tmp_path):
    m = load_manifest(name, SHIPPED)
    assert m.description and parse_manifest(yaml.safe_dump(m.model_dump(exclude_unset=True))) == m
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(m.model_dump(mode="json")))
    assert load_manifest(tmp_path / "manifest.yaml") == m


names = st.text(string.ascii_letters + string.digits, max_size=6).map("n".__add__)  # no name is also a key
sizes = st.floats(0.1, 1e6, allow_nan=False) | st.integers(1, 1000)


@st.composite
def manifests(draw):
    cases = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    cut = draw(st.integers(0, len(cases)))
    return dict(
        name=draw(names),
        kind="volume",
        licence=draw(names),
        citation=draw(names),
        source="/" + draw(names),
        read=dict(voxel_size=draw(st.lists(sizes, min_size=3, max_size=3)), unit=draw(names)),
        cases={
            c: dict(files=dict(raw=dict(path=f"{c}.tif", size=draw(st.integers(0, 10**12))))) for c in cases
        },
        splits={split: part for split, part in (("train", cases[:cut]), ("test", cases[cut:])) if part},
        classes=[
            dict(value=i, name=f"c{i}", colour=f"#{draw(st.integers(0, 2**24 - 1)):06x}")
            for i in range(draw(st.integers(0, 3)))
        ],
    )


@examples(60)
@given(manifests())
def test_round_trip(data):
    m = parse_manifest(yaml.safe_dump(data, sort_keys=False))
    assert m == Manifest.model_validate(data)
    assert parse_manifest(yaml.safe_dump(m.model_dump(exclude_unset=True), sort_keys=False)) == m


@examples(60)
@given(manifests(), st.data())
def test_a_typo_anywhere_is_found_at_its_line(data, draw):
    lines = yaml.safe_dump(data, sort_keys=False).splitlines()
    keys = [
        i
        for i, line in enumerate(lines)
        if line.strip(" -").split(":")[0] in ("path", "size", "unit", "colour", "kind", "splits")
    ]
    i = draw.draw(st.sampled_from(keys))
    lines[i] = lines[i].replace(":", "q:", 1)
    assert any(where == i + 1 and "unknown key" in message for where, message in problems("\n".join(lines)))


def toy(**changes):
    "A small manifest as YAML text; what is changed is written plainly, as a person would."
    parts = (
        dict(name="toy", case="a", other="b", split="train", path="a.tif", group="g", citation="me") | changes
    )
    return """\
name: {name}
kind: volume
licence: CC0-1.0
citation: {citation}
source: /data
cases:
  {case}: {{files: {{raw: {path}}}, group: {group}}}
  {other}: {{files: {{raw: {{path: b.tif}}}}}}
splits:
  {split}: [{case}]
  rest:
    - {other}
""".format(**parts)


CHANGED = [
    "2024_01",
    "010",
    "1e3",
    "1.5",
    "0x1f",
    "yes",
    "no",
    "on",
    "True",
    "null",
    "1_000",
    "12:30:45",
    "2020-01-02",
    ".5",
]


@pytest.mark.parametrize("word", CHANGED)
def test_names_stay_as_they_are_written(word):
    "YAML would make numbers, truth values and dates of them."
    m = parse_manifest(
        toy(path=f"{word}", group=word if word != "null" else "g", citation=word if word != "null" else "x")
    )
    assert m.cases["a"].files["raw"].path == word
    if word[0] == "." or ":" in word:
        return  # that is no name
    m = parse_manifest(toy(name=word if word != "null" else "x", case=word, split=word))
    assert list(m.cases) == [word, "b"] and m.splits == {word: [word], "rest": ["b"]}
    assert m.name == (word if word != "null" else "x")
    copy = yaml.safe_dump(m.model_dump(mode="json"), sort_keys=False)
    assert parse_manifest(copy) == m


def test_values_that_are_no_names_stay_numbers():
    text = (
        toy()
        .replace("source: /data", "source: synth:em\nparameters: {seed: 010, on: [yes, 1e3]}")
        .replace("files: {raw: a.tif}, ", "parameters: {seed: 3}, ")
        .replace("files: {raw: {path: b.tif}}", "parameters: {seed: 4}")
    )
    m = parse_manifest(text)
    assert m.parameters == {"seed": 8, "on": [True, "1e3"]} and m.cases["b"].parameters == {"seed": 4}


def test_nothing_is_no_name():
    assert parse_manifest(toy(group="")).cases["a"].group is None
    assert any("got nothing" in message for _, message in problems(toy(citation="")))
    assert any("got nothing" in message for _, message in problems(toy(path="~")))


def test_an_alias_is_a_name_here_and_a_number_there():
    text = toy(group="&one 1").replace("{path: b.tif}", "{path: b.tif, size: *one}")
    m = parse_manifest(text)
    assert m.cases["a"].group == "1" and m.cases["b"].files["raw"].size == 1


def bomb(kind, width=10, height=12):
    "Aliases of aliases: width ** height values."
    lines = ["a0: &a0 [x, y]" if kind == "list" else "a0: &a0 {k: v}"]
    for i in range(1, height):
        inside = ", ".join([f"*a{i - 1}"] * width)
        lines.append(f"a{i}: &a{i} [{inside}]" if kind == "list" else f"a{i}: &a{i} {{<<: [{inside}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["list", "merge"])
@pytest.mark.parametrize("place", ["", "parameters: {all: *a11}\n"])
def test_bombs_are_refused_before_they_unfold(kind, place):
    found = problems(bomb(kind) + "\n" + place + toy())
    assert len(found) == 1 and "aliases stand for more than" in found[0][1]


def test_aliases_may_be_used():
    text = (
        toy()
        .replace(
            "{files: {raw: a.tif}, group: g}", "&first {group: g, read: {channel: 0}, files: {raw: a.tif}}"
        )
        .replace("{files: {raw: {path: b.tif}}}", "{<<: *first, group: h, files: {raw: b.tif}}")
    )
    assert parse_manifest(text).read_as("b") == {"channel": 0}


def test_thousands_of_mistakes_are_a_short_answer():
    cases = "\n".join(f"  c{i}: {{fils: x}}" for i in range(3000))
    head, tail = toy().split("cases:\n")
    with pytest.raises(InputError) as e:
        parse_manifest(f"{head}cases:\n{cases}\n", "m.yaml")
    lines = str(e.value).splitlines()
    assert len(lines) == 101 and lines[-1] == "m.yaml: and 2900 more" and lines[0].startswith("m.yaml:7: ")


@pytest.mark.parametrize("thing", [202401, True, None, "", 1.5, ["a"], {}])
def test_a_manifest_is_asked_for_by_text(thing):
    with pytest.raises(InputError, match="expected a name or a path, as text"):
        load_manifest(thing)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "big.yaml").open("wb") as f:
        f.truncate(2**31)  # sparse
    with pytest.raises(InputError, match="has 2048 MiB: expected at most 32"):
        load_manifest(tmp_path / "big.yaml")


def test_manifests_of_the_working_folder_come_before_those_of_the_package(tmp_path, monkeypatch):
    below = tmp_path / "a/b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    shipped = find_manifests()
    assert (
        set(shipped) >= {"em_phantom", "spacecraft_phantom"} and tmp_path not in shipped["em_phantom"].parents
    )
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests/em_phantom.yaml").write_text(toy(name="em_phantom"))
    (tmp_path / "data_manifests/mine.yaml").write_text(toy(name="mine"))
    assert load_manifest("em_phantom").citation == "me" and load_manifest("mine").name == "mine"
    assert set(find_manifests()) == {*shipped, "mine"}
    (tmp_path / "sets").mkdir()
    assert find_manifests("sets") == {} and find_manifests("nowhere") == {}

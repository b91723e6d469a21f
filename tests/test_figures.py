"Every figure of the documents says in words what it shows, and is small."

import base64
import json
import re
from pathlib import Path

import yaml

NBS = Path(__file__).parents[1] / "nbs"
NOTEBOOKS = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def figures(cells):
    "Source of each cell whose outputs hold images, and their bytes."
    for c in cells:
        images = [
            (kind, "".join(data))
            for o in c.get("outputs", [])
            for kind, data in o.get("data", {}).items()
            if kind.startswith("image/")
        ]
        if images:
            yield (
                "".join(c["source"]),
                [
                    len(data.encode()) if kind.endswith("xml") else len(base64.b64decode(data))
                    for kind, data in images
                ],
            )


def faults(source, sizes):
    "What is wrong with the figures of a cell."
    directives = re.match(r"(#\|.*\n)*", source)[0]
    alt = re.search(r"^#\| fig-alt: (.*)$", directives, re.M)
    if not alt:
        yield "no #| fig-alt at the top of the cell"
    elif not isinstance(text := yaml.safe_load(f"fig-alt: {alt[1]}")["fig-alt"], str) or len(text) < 20:
        yield f"fig-alt {alt[1]}: expected one or two sentences in double quotes"
    yield from (f"an image of {n / 1000:.0f} kB: expected at most 100" for n in sizes if n > 100_000)


def test_figures_have_words_and_are_small():
    found = [
        (p, source, sizes)
        for p in NOTEBOOKS
        for source, sizes in figures(json.loads(p.read_text(encoding="utf-8"))["cells"])
    ]
    assert not [
        f"{p.relative_to(NBS)}, {source.splitlines()[0][:60]}: {fault}"
        for p, source, sizes in found
        for fault in faults(source, sizes)
    ]
    assert len(found) > 60


def test_faults_are_found():
    cell = dict(
        source=["x = 1\n", '#| fig-alt: "A text at the wrong place in the cell."'],
        outputs=[dict(data={"image/png": base64.b64encode(bytes(100_001)).decode(), "text/plain": "x"})],
    )
    ((source, sizes),) = figures(
        [cell, dict(source="no outputs"), dict(source="x", outputs=[dict(text="x")])]
    )
    assert [f.split(":")[0] for f in faults(source, sizes)] == [
        "no #| fig-alt at the top of the cell",
        "an image of 100 kB",
    ]
    assert list(faults('#| fig-alt: "Short."\nx', [])) and not list(
        faults('#| hide_input\n#| fig-alt: "A picture: it shows three grey slices."\nx', [10])
    )

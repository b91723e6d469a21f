"""The published book: built once, then read in Chromium as a reader would.

DINOLAB_BOOK=_docs takes a site that `make docs` has built instead of building one; DINOLAB_AXE=all asks axe about every page, which takes a quarter of an hour."""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
pytestmark = pytest.mark.slow
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def sidebar():
    "Notebooks of the sidebar, in order."

    def walk(items):
        for i in items:
            yield from [i] if isinstance(i, str) else walk(i["contents"])

    return list(walk(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]))


def page_of(notebook):
    return str(Path(notebook).with_suffix(".html"))


PAGES = [page_of(n) for n in sidebar()]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    if "DINOLAB_BOOK" in os.environ:
        return (ROOT / os.environ["DINOLAB_BOOK"]).resolve()
    place = tmp_path_factory.mktemp("book") / "site"
    code = "import sys; from dinolab.site.build import build; build(sys.argv[1])"  # it runs cells: in a process of its own
    subprocess.run([sys.executable, "-c", code, str(place)], cwd=ROOT, check=True)
    return place


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(book):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(book))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        found = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield found
        found.close()


class Page(HTMLParser):
    "Links, pictures and anchors of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.images, self.ids = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"):
            self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "img":
            self.images.append(attrs)


def test_links_pictures_and_anchors(book):
    "Every internal link has a page and every fragment an anchor; every picture a file and words for who cannot see it."
    pages = {p: Page(p) for p in book.rglob("*.html") if "_static" not in p.parts}
    assert len(pages) > len(PAGES)
    broken, wordless, anchors = [], [], 0
    for path, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc:
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            if not target.exists():
                broken.append((path.name, link))
                continue
            if to.fragment and target in pages:
                anchors += 1
                if unquote(to.fragment) not in pages[target].ids:
                    broken.append((path.name, link))
        for image in page.images:
            if not image["src"].startswith("data:") and not (path.parent / unquote(image["src"])).exists():
                broken.append((path.name, image["src"]))
            if not image.get("alt") or re.search(r"\.(png|svg)$", image["alt"]):
                wordless.append((path.name, image["src"]))
    assert not broken, broken[:20]
    assert not wordless, wordless[:20]
    assert anchors > 1000


def test_experiments_show_figures(book):
    for page in (p for p in PAGES if p.startswith("experiments/")):
        assert any("_images" in i["src"] for i in Page(book / page).images), f"{page} shows no figure"


def test_every_symbol_has_its_anchor(book):
    "What nbdev's index says about where a symbol is documented is true."
    from dinolab._modidx import d

    ids, missing = {}, []
    where = {
        place
        for known in d["syms"].values()
        for name, (place, _) in known.items()
        if not any(part.startswith("_") for part in name.split("."))
    }
    for place in where:
        page, anchor = place.split("#")
        if "." in anchor:
            continue
        if page not in ids:
            ids[page] = Page(book / page).ids
        if anchor not in ids[page]:
            missing.append(place)
    assert len(where) > 500 and not missing, missing[:20]


@in_browser
def test_pages_open(address, browser):
    "No page of the sidebar writes an error, misses a file, or asks another host; none is wider than a phone."
    page = browser.new_page(viewport=dict(width=390, height=800))
    wrong = []
    page.on("console", lambda m: m.type == "error" and wrong.append((page.url, m.text)))
    page.on("pageerror", lambda e: wrong.append((page.url, str(e))))
    page.on(
        "request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append((page.url, r.url))
    )
    page.on("response", lambda r: r.status >= 400 and wrong.append((page.url, r.url, r.status)))
    for name in PAGES:
        page.goto(address + name, wait_until="load")
        assert page.locator("article h1").count() == 1, name
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > 391:
            wrong.append((name, f"{width} pixels wide on a phone"))
    page.close()
    assert not wrong, wrong[:20]


@in_browser
@pytest.mark.parametrize(
    "symbol, page",
    [
        ("create_backbone", "api/models/backbones.html"),
        ("extract_to_zarr", "api/features/store.html"),
        ("EdgeAwareLoss", "api/dwi/nets.html"),
    ],
)
def test_search_finds_symbols(address, browser, symbol, page):
    tab = browser.new_page()
    tab.goto(f"{address}search.html?q={symbol}")
    link = tab.locator("ul.search li a").first
    link.wait_for()
    found = [a.get_attribute("href") for a in tab.locator("ul.search li a").all()]
    assert any(f.split("#")[0].split("?")[0].endswith(page) for f in found[:3]), found[:5]
    tab.close()


@in_browser
def test_a_symbol_link_lands_on_its_heading(address, browser):
    tab = browser.new_page()
    tab.goto(address + "api/volumes/write.html")
    link = tab.locator("article a.symbol").first
    anchor = link.get_attribute("href").split("#")[1]
    link.click()
    tab.wait_for_url(f"**#{anchor}")
    assert tab.evaluate(
        "Math.abs(document.querySelector(':target').getBoundingClientRect().top) < innerHeight"
    )
    tab.close()


@in_browser
def test_the_keyboard_is_enough(address, browser):
    "The first stop of the tabulator leads past the navigation; the search opens and takes a word."
    tab = browser.new_page()
    tab.goto(address + "index.html")
    tab.keyboard.press("Tab")
    assert "skip" in tab.evaluate("document.activeElement.textContent").lower()
    tab.keyboard.press("Control+k")
    tab.keyboard.type("backbone")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=backbone")
    tab.close()


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(address, browser, scheme):
    "axe has no serious finding on one page of each kind; on any page, where it is asked to look at all."
    from axe_playwright_python.sync_playwright import Axe

    tab, axe, bad = browser.new_page(color_scheme=scheme), Axe(), []
    kinds = {name.split("/")[0]: name for name in reversed(PAGES)}
    for name in PAGES if os.environ.get("DINOLAB_AXE") == "all" else kinds.values():
        tab.goto(address + name, wait_until="load")
        for v in axe.run(tab, options=dict(resultTypes=["violations"])).response["violations"]:
            if v["impact"] in ("serious", "critical"):
                bad.append((name, v["id"], len(v["nodes"]), v["nodes"][0]["html"][:120]))
    tab.close()
    assert not bad, "\n".join(map(str, bad[:30]))

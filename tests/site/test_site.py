"""The site of `make docs` in a browser: every page fits a phone, nothing fails, the search finds."""

import functools
import http.server
import re
import threading
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, browser

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "site"
# The theme fetches the program that draws diagrams from another server; tests ask none.
DIAGRAMS = "window.mermaid = {initialize() {}, render: async () => ({svg: '<svg></svg>'})}"
# The theme's search stands in a tree of its own.
SEARCH = "[...document.querySelectorAll('div')].find((one) => one.shadowRoot)?.shadowRoot"

pytestmark = [
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no site in build/site: run make docs"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A browser's tab, and the address that the site is served at."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with browser(tmp_path_factory.mktemp("profile")) as one:
        one.address = f"http://127.0.0.1:{server.server_port}/"
        one.own += (one.address,)
        one.tell("Page.addScriptToEvaluateOnNewDocument", source=DIAGRAMS)
        yield one
    server.shutdown()
    server.server_close()


def test_every_page_fits_a_phone_and_nothing_fails(tab):
    pages = sorted(path.parent.relative_to(SITE) for path in SITE.rglob("index.html"))
    assert len(pages) > 100
    wide = []
    for page in pages:
        tab.open(f"{tab.address}{page}/".replace("./", ""), width=380, height=800, phone=True)
        if (width := tab.run("document.documentElement.scrollWidth")) > 380:
            wide.append(f"{page}: {width}")
        assert not tab.problems, page
    assert not wide


def test_the_search_finds_a_method(tab):
    tab.open(tab.address)
    tab.click(".md-search__button")
    tab.until(f"{SEARCH}?.querySelector('input')")
    tab.tell("Input.insertText", text="VaSSO")
    tab.until(f"[...{SEARCH}.querySelectorAll('a')].some((a) => a.href.includes('/methods/vasso/'))")
    assert not tab.problems


@pytest.mark.parametrize("dark", [False, True])
def test_the_site_is_light_or_dark_as_the_reader_s_system(tab, dark):
    tab.open(tab.address, dark=dark)
    tab.run("localStorage.clear()")  # what a reader chose on an earlier visit comes first
    tab.open(tab.address, dark=dark)
    colour = tab.run("getComputedStyle(document.body).backgroundColor")
    red, *_ = map(float, re.findall(r"[\d.]+", colour))
    assert (red < 60) == dark, colour


def test_every_page_of_the_navigation_is_there():
    nav = (ROOT / "build" / "zensical.toml").read_text(encoding="utf-8").partition("nav = [")[2].partition("\n]\n")[0]
    pages = [Path(name) for name in re.findall(r'"([\w/-]+\.md)"', nav)]
    assert len(pages) > 80
    for page in pages:
        folder = page.parent if page.name == "index.md" else page.with_suffix("")
        assert (SITE / folder / "index.html").exists(), page

"""The built site as tests read it: its files without a browser, and its pages in Chromium from a server on 127.0.0.1."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
VOID = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr", "path",
    "circle", "line", "polyline", "rect", "use",
}  # fmt: skip
LOADING = {"src", "srcset", "poster", "data", "background", "xlink:href"}  # attributes that load, on any element
# Text that is on the screen and no code: a delimiter of a formula in it was not read as one.
VISIBLE_TEXT = """() => {
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!parent.closest("pre, code, script, style, table.dpo")) texts.push(walker.currentNode.data);
  }
  return texts.join("\\n");
}"""

# What lies beyond the column of text and cannot be scrolled to.
BEYOND = """() => {
  const article = document.querySelector("article");
  const scrolls = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const edge = article.getBoundingClientRect().right + 1;
  const isBeyond = element => {
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.right < edge) return false;
    for (let above = element.parentElement; above !== article; above = above.parentElement)
      if (scrolls(above) && above.getBoundingClientRect().right < edge) return false;
    return true;
  };
  return [...article.querySelectorAll("*")].filter(isBeyond).map(e => e.outerHTML.slice(0, 100));
}"""


def make_site(folder: Path, notebooks: Path = NOTEBOOKS) -> subprocess.CompletedProcess[str]:
    """What `make site` runs, into another folder."""
    command = [sys.executable, ROOT / "docs/build_site.py", "--folder", folder, "--notebooks", notebooks]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


class Html(HTMLParser):
    """A page's ids, links and images, without running anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []  # where a click goes
        self.loads: list[str] = []  # what the page asks for by itself
        self.figures: list[dict[str, str | None]] = []  # img elements of the article
        self.crossed: list[str] = []  # elements of the article that close while one inside of them is still open
        self.summaries: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        for name, value in attributes:
            if value and (name in LOADING or (tag == "link" and name == "href")):
                self.loads.append(value)
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag == "img" and "article" in self._open:
            self.figures.append(found)
        if tag == "summary":
            self.summaries.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if "article" in self._open and self._open[-1] != tag:
            self.crossed.append(f"</{tag}> at line {self.getpos()[0]} inside of <{'><'.join(self._open[-3:])}>")
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if "summary" in self._open:
            self.summaries[-1] += data
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)


def is_outside(address: str) -> bool:
    """Of another site: with a scheme that is loaded over a network, or with a host."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def broken_links(site: Path, pages: dict[str, Html]) -> list[str]:
    """Links between the site's files of which the file, or the id on its page, is missing."""
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            if is_outside(link) or link.startswith("data:"):
                continue
            parts = urlsplit(link)
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            where = str(target.resolve().relative_to(site))
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[where].ids):
                broken.append(f"{name}: {link}")
    return broken


def images(notebook: Path) -> int:
    """Image outputs of a notebook; those of a widget do not count."""
    cells = nbformat.read(notebook, as_version=4).cells
    bundles = [output.get("data", {}) for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return sum(any(kind.startswith("image/") for kind in bundle) for bundle in bundles if WIDGET not in bundle)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a server of the folder, on this machine only."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Reader:
    """A browser window on the site; what it asked for elsewhere, what was missing, and what its scripts complained of."""

    page: Any
    base: str
    outside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, name: str) -> Any:
        """Playwright's page, loaded, and its formulas drawn if it has any."""
        self.page.goto(self.base + name)
        if self.page.locator(".math").count():
            self.page.wait_for_function(
                "window.MathJax && MathJax.Hub && MathJax.isReady && MathJax.Hub.getAllJax().length"
                " && !MathJax.Hub.queue.running && !MathJax.Hub.queue.pending",
                timeout=60_000,
            )
        return self.page

    def assert_quiet(self) -> None:
        assert self.outside == [], "asked for outside of the site"
        assert self.missing == [], "not in the site"
        assert self.errors == [], "scripts failed"


@contextlib.contextmanager
def reading(browser: Any, base: str, width: int = 1280) -> Iterator[Reader]:
    """A window on the site at `base` (http or file) that reaches no other address."""
    context = browser.new_context(viewport={"width": width, "height": 900}, service_workers="block")
    try:
        reader = Reader(context.new_page(), base)

        def route(asked: Any) -> None:
            address = asked.request.url
            if address.startswith((base, "data:")):
                asked.continue_()
            else:
                reader.outside.append(address)
                asked.abort()

        context.route("**/*", route)

        def answered(asked: Any, fine: bool) -> None:
            if not fine and asked.url.startswith(base) and not asked.url.endswith("/favicon.ico"):
                reader.missing.append(asked.url)

        reader.page.on("response", lambda answer: answered(answer, answer.ok or answer.status == 304))
        # a page that is left lets go of what it had asked for
        reader.page.on("requestfailed", lambda request: answered(request, "ERR_ABORTED" in (request.failure or "")))
        reader.page.on("pageerror", lambda error: reader.errors.append(str(error)))
        yield reader
    finally:
        context.close()

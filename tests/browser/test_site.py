"""The static site: what its files hold, and what a reader sees of them in Chromium, with nothing but the site at hand."""

import hashlib
import re
from importlib.util import find_spec

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from site_pages import (
    BEYOND,
    NOTEBOOKS,
    ROOT,
    VISIBLE_TEXT,
    WIDGET,
    Html,
    broken_links,
    images,
    is_outside,
    make_site,
    reading,
    served,
)

from dpo_helpers.show.tables import html_table

NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "jupyter_server_mathjax")
LACKING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"the site needs {', '.join(LACKING)}: pip install '.[dev,site]'")

SEVEN = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
OPTIONAL = sorted(NOTEBOOKS.glob("beyond/[a-z]_*.ipynb"))
LESSONS = {path.relative_to(NOTEBOOKS).with_suffix(".html").as_posix(): path for path in (*SEVEN, *OPTIONAL)}
DOCS = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}  # the landing page among them
DERIVATION = "04_dpo_loss_derivation"
LOADS = re.compile(r"""(url\(\s*|@import\s*)["']?(https?:)?//""")  # what a style sheet loads from another site
FORMULA = r"$$\mathcal{L} = -\log\sigma(\hat m)$$"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/x)"
)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HOSTILE = {"price": "$5 $6", "formula": r"\(x^2\) $$y$$ \[z\]", "script": "<img src=x onerror=alert(1)>"}
WIDE = {f"column_{i}": i for i in range(40)}
FOLDED = f"""<details><summary>Hint</summary>

Inside it is $\\ln 2$:

{FORMULA}

```python
inside = 0.6931
```

| symbol | meaning |
|---|---|
| $a \\,\\|\\, b$ | a bar twice |

</details>"""


def small_course(folder, *more):
    """A notebook with all that the site must cope with, and `more` cells."""
    widget = new_output("display_data", {WIDGET: {"model_id": "m"}, "text/plain": "a slider"})
    table = new_output("display_data", {"text/html": html_table([HOSTILE]), "text/plain": "a table"})
    wide = new_output("display_data", {"text/html": html_table([WIDE]), "text/plain": "a wide table"})
    figure = new_output("display_data", {"image/png": PIXEL, "text/plain": "a figure"})
    said = new_output("stream", text=f'It falls from 3 to 2, "see" <b>{HOSTILE["price"]}</b>\n')
    cells = [
        new_markdown_cell(f"# 1 · A small course\n\n{BADGE}\n\nOutside of the fold:\n\n{FORMULA}"),
        new_code_cell("import os  # set-up\n%pip list", metadata={"tags": ["setup"]}),
        new_markdown_cell(FOLDED),
        new_code_cell("show()", outputs=[table, figure, said, widget]),
        new_code_cell("long = " + " + ".join(WIDE), outputs=[wide]),
        new_markdown_cell("$" + " + ".join(["y"] * 60) + "$ in a line"),
        new_code_cell("answer = 42", metadata={"tags": ["solution", "hide-input"]}),
        new_markdown_cell("## The end\n\n[notebook 2](02_next.ipynb), [its end](02_next.ipynb#its-end)"),
        *more,
    ]
    write(folder / "01_small.ipynb", cells)
    write(folder / "02_next.ipynb", [new_markdown_cell("# 2 · Next\n\n## Its end")])
    back = "[its end](../02_next.ipynb#its-end), [notes](../../docs/trust.md), [the code](../../dpo_helpers/cli.py)"
    write(folder / "beyond/a_more.ipynb", [new_markdown_cell(f"# A · More\n\n{back}")])
    write(folder / "_template.ipynb", [new_markdown_cell("# 0 · Template")])
    write(folder / "exercises/01_small.ipynb", [new_markdown_cell("# 1 · Exercises")])


def write(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel, "widgets": {"state": {}}}), path)


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.ipynb"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    before = digests(NOTEBOOKS)
    made = make_site(folder)
    assert made.returncode == 0, made.stderr[-3000:]
    assert digests(NOTEBOOKS) == before, "the build changed notebooks"
    return folder / "site"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_course(folder / "notebooks")
    made = make_site(folder, folder / "notebooks")
    assert made.returncode == 0, made.stderr[-3000:]
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {name: Html((site / name).read_text(encoding="utf-8")) for name in names_of_pages(site)}


def names_of_pages(site):
    """Of the pages in a site's folder, without those that MathJax brings."""
    return sorted(path.relative_to(site).as_posix() for part in ("", "beyond/") for path in site.glob(f"{part}*.html"))


@pytest.fixture(scope="module")
def server(site):
    with served(site) as base:
        yield base


@pytest.fixture(scope="module")
def small_server(small):
    with served(small) as base:
        yield base


# ---- without a browser ----


def test_the_notebooks_the_docs_and_a_landing_page_that_links_to_them(pages):
    assert len(SEVEN) == 7
    assert len(OPTIONAL) >= 2
    assert "index.html" in DOCS
    assert set(pages) == {*LESSONS, *DOCS, "search.html"}
    assert {*LESSONS, *DOCS} - {"index.html"} <= set(pages["index.html"].links)


def test_every_link_within_the_site_leads_somewhere(site, pages):
    assert broken_links(site, pages) == []
    assert sum(len(page.links) for page in pages.values()) > 100, "links were found at all"
    sources = re.compile(r"\.(md|ipynb|py)(#|$)")  # of the course: on the site these are pages, or no links
    inside = {link for page in pages.values() for link in page.links if not is_outside(link)}
    assert [link for link in inside if sources.search(link) and "_sources/" not in link] == []


def test_a_missing_file_and_a_missing_id_are_found(site, pages):
    page = Html('<a href="no.html">1</a><img src="no.png"><a href="index.html#no">2</a><a href="#no">3</a><p id="x">')
    found = broken_links(site, pages | {"page.html": page})
    assert found == [f"page.html: {link}" for link in ("no.html", "index.html#no", "#no", "no.png")]


def test_no_page_loads_anything_of_another_site(site, pages):
    for name, page in pages.items():
        assert [address for address in page.loads if is_outside(address)] == [], name
        assert [script for script in page.scripts if "http://" in script or "https://" in script] == [], name
    for style in site.glob("_static/**/*.css"):
        assert not LOADS.search(style.read_text(encoding="utf-8")), style
    assert all(map(LOADS.search, ('@import "//x"', "url( 'https://x')", "@import url(http://x)")))
    assert not LOADS.search('@import url("basic.css"); a{b:url(data:image/svg+xml;xmlns=http://w3)}')
    assert is_outside("//fonts.example/x.css")
    assert is_outside("https://cdn.example/x.js")
    assert not is_outside("_static/x.js?v=1")


def test_every_figure_of_a_notebook_is_on_its_page_with_a_sentence(pages):
    for name, path in LESSONS.items():
        figures = pages[name].figures
        assert len(figures) == images(path), path.name
        assert [figure for figure in figures if "_images" in (figure["alt"] or "_images")] == [], path.name
    assert sum(map(images, LESSONS.values())) >= 10


def test_the_html_is_well_nested_and_summaries_are_plain(pages):
    """A heading inside of a <details> would close it; `code` and $math$ in a <summary> stay as they are."""
    for name, page in pages.items():
        assert page.crossed == [], name
        assert [text for text in page.summaries if "`" in text or "$" in text] == [], name
    assert Html("<article><details><section></details></section></article>").crossed


def test_the_download_is_the_committed_notebook(site, pages):
    for name, path in LESSONS.items():
        place = path.relative_to(NOTEBOOKS).as_posix()
        assert "../" * name.count("/") + f"_sources/{place}" in pages[name].links
        assert (site / "_sources" / place).read_bytes() == path.read_bytes()


def test_a_small_course_without_widgets_badges_and_rendered_text(small):
    assert set(names_of_pages(small)) == {*DOCS, "search.html", "01_small.html", "02_next.html", "beyond/a_more.html"}
    text = (small / "01_small.html").read_text(encoding="utf-8")
    page = Html(text)
    assert "a slider" not in text
    assert "widget" not in text
    assert not [address for address in page.loads + page.links if "colab" in address]
    assert {"02_next.html", "02_next.html#its-end"} <= set(page.links)
    assert [figure["alt"] for figure in page.figures] == ['It falls from 3 to 2, "see" <b>$5 $6</b>']
    more = Html((small / "beyond/a_more.html").read_text(encoding="utf-8")).links
    assert {"../02_next.html#its-end", "../trust.html"} <= set(more)
    assert not [link for link in more if "cli.py" in link], "a file that is not on the site is named, not linked to"
    folded = " ".join(page.summaries)
    assert all(text in folded for text in ("Hint", "Show the set-up cell", "Show the solution"))


def test_a_broken_link_between_notebooks_fails_the_build(tmp_path):
    links = "[1](03_gone.ipynb) [2](02_next.ipynb#no-such-part) [3](#not-here)"
    small_course(tmp_path / "notebooks", new_markdown_cell(links))
    made = make_site(tmp_path, tmp_path / "notebooks")
    assert made.returncode != 0
    warnings = [line for line in made.stderr.split("\n") if "WARNING" in line]
    assert len(warnings) == 3
    assert all(any(name in line for line in warnings) for name in ("03_gone.ipynb", "no-such-part", "not-here"))
    assert not (tmp_path / "site").exists()


# ---- with a browser ----


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_formulas_are_drawn(browser, site, server, scheme):
    with reading(browser, server if scheme == "http" else f"{site.as_uri()}/") as reader:
        page = reader.open(f"{DERIVATION}.html")
        assert page.locator(".math .MathJax").count() > 20
        assert page.locator(".merror, .mjx-merror, [class*=noError]").count() == 0
        boxes = [formula.bounding_box() for formula in page.locator("div.math .MathJax_Display .MathJax").all()]
        assert len(boxes) > 8
        assert min(box["height"] for box in boxes) > 10
        assert min(box["width"] for box in boxes) > 40
        fonts = page.evaluate("[...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)")
        assert any("STIXMathJax_Main" in font for font in fonts), "in the font that the site brings"
        reader.assert_quiet()


def test_no_delimiter_of_a_formula_is_left_on_any_page(browser, server):
    with reading(browser, server) as reader:
        for name in LESSONS:
            text = reader.open(name).evaluate(VISIBLE_TEXT)
            assert len(text) > 2000
            assert [mark for mark in ("$$", "\\(", "\\)", "\\[", "\\]") if mark in text] == [], name
        reader.assert_quiet()


def test_figures_are_loaded_and_no_page_is_wider_than_a_phone(browser, server):
    with reading(browser, server, width=400) as reader:
        for name in (*DOCS, *LESSONS):
            page = reader.open(name)
            page.wait_for_load_state("load")
            widths = page.evaluate(
                "[...document.querySelectorAll('article img')].map(i => i.complete && i.naturalWidth)"
            )
            assert all(width > 100 for width in widths), name
            assert page.evaluate(BEYOND) == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
        reader.assert_quiet()


@pytest.mark.parametrize("width", [400, 1280])
def test_wide_tables_code_and_formulas_stay_in_their_column(browser, small_server, width):
    with reading(browser, small_server, width) as reader:
        page = reader.open("01_small.html")
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.locator("table.dpo").last.bounding_box()["width"] > 1280, "the table is wide"
        assert page.evaluate(BEYOND) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_outputs_are_left_as_text(browser, small_server):
    with reading(browser, small_server) as reader:
        asked = []
        reader.page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        page = reader.open("01_small.html")
        cells = page.locator("table.dpo").first.locator("td")
        assert cells.all_inner_texts() == list(HOSTILE.values())
        assert cells.locator("*").count() == 0
        assert page.locator(".output.stream").inner_text().strip().endswith("<b>$5 $6</b>")
        assert page.locator(".output .MathJax").count() == 0
        assert asked == []
        reader.assert_quiet()


def test_what_is_folded_opens_and_closes_with_its_formulas(browser, small_server):
    with reading(browser, small_server) as reader:
        page = reader.open("01_small.html")
        hint = page.locator("details", has_text="Inside it is")
        summary, code = hint.locator("summary"), hint.locator("pre")
        inside = hint.locator(".MathJax_Display .MathJax")
        assert summary.is_visible()
        assert not code.is_visible()
        summary.click()
        assert code.is_visible()
        assert page.locator("details .math .MathJax").count() == 3
        outside = page.locator("section > div.math .MathJax_Display .MathJax").bounding_box()
        for side in ("width", "height"):
            assert inside.bounding_box()[side] == pytest.approx(outside[side], rel=0.02), (
                "drawn like outside of the fold"
            )
        assert "\u2016" in hint.locator("td .math > .MathJax").inner_text(), "a double bar"
        summary.click()
        assert not code.is_visible()
        reader.assert_quiet()


def test_solutions_and_the_set_up_are_folded(browser, small_server):
    with reading(browser, small_server) as reader:
        page = reader.open("01_small.html")
        for name, text in (("the solution", "answer = 42"), ("the set-up cell", "import os")):
            code = page.locator("pre", has_text=text)
            assert not code.is_visible()
            page.get_by_text(f"Show {name}").click()
            assert code.is_visible()
            page.get_by_text(f"Hide {name}").click()
            assert not code.is_visible()


def test_a_link_between_notebooks_leads_to_the_place(browser, small_server):
    with reading(browser, small_server) as reader:
        page = reader.open("01_small.html")
        page.get_by_role("link", name="its end").click()
        page.wait_for_url("**/02_next.html#its-end")
        assert page.locator("#its-end h2").is_visible()


def test_the_search_finds_a_word(browser, server, site):
    assert (site / "searchindex.js").stat().st_size > 10_000
    with reading(browser, server) as reader:
        page = reader.open("index.html")
        page.get_by_role("button", name="Search").first.click()
        page.keyboard.type("Bradley")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=Bradley*")
        found = page.locator("ul.search li a", has_text="From preferences to the DPO loss")
        found.first.wait_for()
        found.first.click()
        page.wait_for_url(f"**/{DERIVATION}.html*")
        reader.assert_quiet()

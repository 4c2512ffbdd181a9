"""The report and a notebook's output, with hostile text wherever text can be, opened in headless Chromium: nothing runs.

A payload that runs leaves a mark on <html> (payloads.py), which the page that Chromium gives back would show.
"""

import html
import re
import shutil
import subprocess

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from payloads import ACTIVE, ALL, ROWS, SCRIPTS, Page

from conftest import ROOT, SMALL
from dpo_helpers.generation import Response
from dpo_helpers.run import report
from dpo_helpers.run.artefacts import write_jsonl
from dpo_helpers.settings import load_settings
from dpo_helpers.untrusted import visible
from dpo_helpers.worlds.embedded import preference_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
MODELS = ("reference", "sft", "dpo")
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# what a careless reader does: click on, point at and go to everything
READER = """<script>addEventListener("load", () => document.querySelectorAll("body *").forEach(e => {
  for (const kind of ["mouseover", "mousedown", "focus"]) e.dispatchEvent(new MouseEvent(kind, {bubbles: true}));
  e.focus?.(); e.click?.(); e.toggleAttribute?.("data-was-read") }))</script>"""


READ = 'data-was-read=""'


def chromium(page, folder, *options):
    """What a page has become after it was opened, as HTML."""
    result = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=3000", *(options or ["--dump-dom"]), page.as_uri(),
        ],
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout.decode()


def marks(page):
    """The payloads that ran."""
    return set(re.findall(r"data-ran-(\w+)", re.search(r"<html[^>]*>", page)[0]))


def hostile_rows():
    """Pairs whose prompts and responses are payloads."""
    rows = preference_rows("train", SMALL["max_pairs"] + SMALL["held_out_pairs"])
    for row, text in zip(rows, [*ROWS.values()] * 2, strict=False):
        for side in ("chosen", "rejected"):
            row[side] = row[side].replace("\n\nAssistant:", f" {text}\n\nAssistant:").rstrip() + f" {text}"
    return rows


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    """The report of a real run: a model and a data set of hostile names, hostile pairs, and what is measured of them.

    On the way into the report every other text, such as the device's or a figure's, gets all payloads too.
    """
    folder = tmp_path_factory.mktemp("hostile")
    name = SCRIPTS["img"] + "{{7*7}}`$x$\x1b[31m\u202e\n"
    shutil.copytree(ROOT / "dpo_helpers/worlds/mini/model", folder / name)
    write_jsonl(folder / f"{SCRIPTS['svg']}\x9b{{{{7*7}}}}.jsonl", hostile_rows())
    small = load_settings(
        "mini", runs_dir=str(folder / "runs"), model=str(folder / name),
        dataset=str(folder / f"{SCRIPTS['svg']}\x9b{{{{7*7}}}}.jsonl"), **SMALL,
    )  # fmt: skip
    everything = " ".join(ALL.values())
    responses = [Response(text, [1], text, True) for text in ALL.values()]
    with pytest.MonkeyPatch.context() as patch:

        def wrap(function, change):
            original = getattr(report, function)
            patch.setattr(report, function, lambda settings: change(original(settings)))

        wrap("get_generations", lambda _: dict.fromkeys(MODELS, responses))
        wrap("draw_figures", lambda found: {name: summary + everything for name, summary in found.items()})
        wrap("accuracy_baselines", lambda found: found | dict.fromkeys(ALL.values(), 0.5))
        wrap("get_differences", lambda found: found | dict.fromkeys(ALL.values(), next(iter(found.values()))))
        wrap("get_frontier", lambda found: found | dict.fromkeys(ALL.values(), next(iter(found.values()))))
        wrap("about", lambda found: found | {
            "device": everything, "versions": found["versions"] | {text: text for text in ALL.values()},
            "settings": found["settings"] | {text: text for text in ALL.values()},
        })  # fmt: skip
        path = report.make_report(small)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tight layout")
def test_the_report_shows_every_payload_as_text(hostile_report, survived):
    """Without a browser: no element, attribute or link comes from a payload, and nothing that acts unseen."""
    page = hostile_report.read_text(encoding="utf-8")
    found = Page(page)
    assert not ACTIVE.search(page)
    assert set(found.elements) == {
        "html lang", "head", "meta charset", "meta name content", "meta http-equiv content", "title", "style", "body",
        "h1", "h2", "h3", "p", "p class", "div class", "table", "thead", "tbody", "tr", "th", "td", "td class", "code",
        "figure", "img alt src", "figcaption",
    }  # fmt: skip
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    shown = [html.escape(visible(text.strip()), quote=False) for text in ALL.values()]
    count = {text: html.unescape(page).count(visible(text.strip())) for text in ALL.values()}
    # 4 cells per generation, its row of differences, a setting and a version each twice, baselines, device, captions
    assert min(count.values()) >= 11
    assert all(text.replace('"', "&#34;").replace("'", "&#39;") in page for text in shown)
    names = [SCRIPTS["img"], SCRIPTS["svg"]]
    assert all(visible(name) in found.text for name in names), "the model's and the data set's"
    survived(f"{len(ALL)} hostile texts as text in the report", len(shown), len(ALL))


@pytest.mark.slow
def test_the_files_beside_the_report_hold_escapes_only(hostile_report):
    for name in ("results.json", "generations.json"):
        assert hostile_report.with_name(name).read_bytes().isascii()
    card = (hostile_report.parent / "dpo_gpt2_model_final/README.md").read_text(encoding="utf-8")
    assert not ACTIVE.search(card)
    assert "`<img src=x onerror=" in card


@pytest.mark.slow
@needs_chromium
def test_no_script_of_the_reports_texts_runs(hostile_report, tmp_path, survived):
    """As it is; and without its Content-Security-Policy and with a reader who clicks everything."""
    page = hostile_report.read_text(encoding="utf-8")
    assert len(CSP.findall(page)) == 1
    bare = tmp_path / "bare.html"
    bare.write_text(CSP.sub("", page) + READER, encoding="utf-8")
    ran = {}
    for name, path in (("as it is", hostile_report), ("without its policy", bare)):
        dom = chromium(path, tmp_path)
        assert "Settings, versions, hashes" in dom
        assert (READ in dom) == (path == bare), "the reader was there"
        assert not [e for e in Page(dom).elements if e.split()[0] in ("svg", "iframe", "a", "input", "form", "button")]
        ran[name] = marks(dom)
    assert ran == {"as it is": set(), "without its policy": set()}
    survived(f"{len(SCRIPTS)} scripts in the report, with and without its policy", 2 * len(SCRIPTS), 2 * len(SCRIPTS))


def unescaped():
    """A page of the scripts as they are, in text and in an attribute."""
    texts = "\n".join(f'<p>{text}</p><img src=x alt="{text}">' for text in SCRIPTS.values())
    return f"<!doctype html><html><head><meta charset=utf-8></head><body>{texts}</body></html>"


@needs_chromium
def test_unescaped_every_script_runs_and_the_reports_policy_alone_stops_them(tmp_path):
    """So that the tests here can fail."""
    (tmp_path / "raw.html").write_text(unescaped() + READER, encoding="utf-8")
    assert marks(chromium(tmp_path / "raw.html", tmp_path)) == set(SCRIPTS)
    policy = CSP.search((ROOT / "dpo_helpers/run/report.html.jinja").read_text(encoding="utf-8"))[0]
    (tmp_path / "policy.html").write_text(unescaped().replace("<head>", f"<head>{policy}") + READER, encoding="utf-8")
    assert marks(chromium(tmp_path / "policy.html", tmp_path)) == set()


NOTEBOOK = """
import sys
sys.path.insert(0, {here!r})
from payloads import ALL
from dpo_helpers.errors import DataError
from dpo_helpers.generation import Response
from dpo_helpers.hh import parse_row
from dpo_helpers.show.figures import plot_lengths
from dpo_helpers.show.tables import show_masks, show_side_by_side, show_table, show_text
from dpo_helpers.tokens import EncodedPair

texts = [*ALL.values()]
class Tokenizer:
    def decode(self, ids):
        return texts[ids[0]]

show_table([{{text: text for text in texts}}])
show_side_by_side(texts, {{text: [Response("", [], answer, False) for answer in texts] for text in texts[:3]}})
show_masks(EncodedPair(list(range(len(texts))), [0], [0]), Tokenizer())
for text in texts:
    show_text(text, text)
    print(parse_row({{"chosen": text, "rejected": text}}))
plot_lengths({{text: [1, 2] for text in texts[:5]}});
"""
ERROR = "raise DataError(' '.join(texts))"


@pytest.fixture(scope="module")
def hostile_notebook(tmp_path_factory):
    """A notebook that shows all payloads in every way, executed, as the HTML that nbconvert makes of it."""
    here = str(ROOT / "tests/faults")
    cells = [nbformat.v4.new_code_cell(source) for source in (NOTEBOOK.format(here=here), ERROR)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "x"}})
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(
        notebook, timeout=300, allow_errors=True, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    path = folder / "notebook.html"
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return notebook, path


@pytest.mark.slow
def test_a_notebooks_outputs_hold_no_acting_text(hostile_notebook):
    """Of the traceback only the error's own line: IPython colours the rest with escapes of its own."""
    notebook, _ = hostile_notebook
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [o.output_type for o in outputs].count("error") == 1
    for output in outputs:
        if output.output_type == "stream":
            assert not ACTIVE.search(output.text)
        elif output.output_type == "error":
            message = output.traceback[-1].partition(": ")[2]
            assert output.evalue in message
            assert not ACTIVE.search(message)
            assert not ACTIVE.search(output.evalue)
            assert "\\x1b[31mred" in message
        else:
            assert not ACTIVE.search("".join(map(str, output.data.values())))


@pytest.mark.slow
@needs_chromium
def test_no_script_of_a_notebooks_outputs_runs(hostile_notebook, tmp_path, survived):
    _, path = hostile_notebook
    read = tmp_path / "read.html"
    read.write_text(path.read_text(encoding="utf-8") + READER, encoding="utf-8")
    dom = chromium(read, tmp_path)
    assert READ in dom
    assert "data-commandlinker-command=" not in re.sub(r">[^<]*", ">", dom)
    assert marks(dom) == set()
    survived(f"{len(SCRIPTS)} scripts in a notebook's outputs", len(SCRIPTS), len(SCRIPTS))

"""The notebooks in JupyterLab, handled as a person does: Run All, look at the figures, move the sliders, save."""

import urllib.error
import urllib.request

import nbformat
import pytest
from lab_page import opened, without_bars

from conftest import ROOT
from dpo_helpers.tools.skeleton import COLAB

SECONDS = {"04_dpo_loss_derivation": 600, "05_dpo_training": 1200}  # a tenth on an idle machine; both train a model
BADGE = f"{COLAB}/assets/colab-badge.svg"  # the one thing that a notebook shows of another site
SLIDER = """
import ipywidgets
import matplotlib.pyplot as plt

def draw(margin):
    {draw}

slider = ipywidgets.FloatSlider(value=0, min=-6, max=6, step=0.5)
display(ipywidgets.VBox([slider, ipywidgets.interactive_output(draw, dict(margin=slider))]))
"""
DRAWS = "plt.plot([0, margin]); plt.show()"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def assert_executed(notebook):
    """A saved notebook: all code cells, from the first to the last, and nothing on stderr and no error."""
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        errors = [o for o in cell.outputs if o.output_type == "error"]
        stderr = without_bars("".join(o.text for o in cell.outputs if o.get("name") == "stderr"))
        assert not errors, f"{cell.source}\n→ {errors}"
        assert not stderr, f"{cell.source}\n→ {stderr}"


def make(folder, name, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata = {"jupyter": {"source_hidden": True}}  # folded, as the solutions are
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")
    return f"{name}.ipynb"


@pytest.mark.parametrize("name", SECONDS)
def test_run_all(name, lab, browser, tmp_path):
    committed = code(nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4))
    expected = [images(cell) for cell in committed]
    assert sum(expected) >= 1
    with opened(lab, browser, f"{name}.ipynb", tmp_path) as notebook:
        notebook.run_all(SECONDS[name])
        shown = [[image["width"] > 0 for image in cell] for cell in notebook.look()["images"]]
        if not all(len(there) >= count and all(there) for there, count in zip(shown, expected, strict=True)):
            raise notebook.fail(f"figures expected a cell: {expected}; seen: {shown}")
        assert notebook.page.locator("mjx-container").count() > 0, "formulas are typeset"
        assert notebook.page.locator("mjx-merror, [data-mml-node=merror]").count() == 0
        saved = notebook.save()
        assert_executed(saved)
        assert [images(cell) for cell in code(saved)] == expected
        if any("explore_loss" in cell.source for cell in committed):
            assert len(notebook.sliders()) == 2, "margin and β"
        for slider in notebook.sliders():
            notebook.move(slider, "ArrowRight")
            notebook.move(slider, "ArrowLeft")
        assert set(notebook.outside) <= {BADGE}, "all else is on this machine"


def test_a_slider_redraws_its_figure(lab, browser, tmp_path):
    with opened(lab, browser, make(lab.folder, "slider", SLIDER.format(draw=DRAWS)), tmp_path) as notebook:
        notebook.run_all(60)
        (slider,) = notebook.sliders()
        for key in ("ArrowRight", "ArrowLeft", "PageUp"):
            notebook.move(slider, key)
        assert_executed(notebook.save())
        assert notebook.outside == []


BROKEN = {
    "raises": ("raise ValueError('no')", "code cell 2 shows an error:\nraise ValueError('no')"),
    "stderr": ("import sys; print('oh', file=sys.stderr)", "code cell 2 shows an error:\nimport sys"),
    "dies": ("import os; os._exit(1)", "JupyterLab asks: Kernel Restarting"),
    "hangs": ("import time; time.sleep(300)", "waited 5 s for all cells\n1 of 3 code cells were executed"),
    "slider raises": (SLIDER.format(draw=f"assert not margin\n    {DRAWS}"), "code cell 2 shows an error:\n\nimport ipyw"),
    "slider is idle": (SLIDER.format(draw=DRAWS.replace("margin", "1")), "waited 5 s for another figure"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_goes_wrong_is_reported_with_its_cell(kind, lab, browser, tmp_path):
    """So that the tests above can fail: a notebook of three cells whose second one is broken."""
    source, message = BROKEN[kind]
    name = make(lab.folder, kind.replace(" ", "_"), "1", source, "3")
    with opened(lab, browser, name, tmp_path) as notebook:
        with pytest.raises(AssertionError) as failed:
            notebook.run_all(5 if kind == "hangs" else 30)
            notebook.move(*notebook.sliders(), "ArrowRight", seconds=5)
    assert message in str(failed.value)
    assert str(tmp_path) in str(failed.value)
    assert [path.stat().st_size > 10_000 for path in tmp_path.glob("*.png")] == [True], "the screenshot"


def test_a_saved_notebook_with_an_error_or_out_of_order_is_reported():
    def saved(outputs, *counts):
        cells = [nbformat.v4.new_code_cell("x", execution_count=n, outputs=outputs) for n in counts]
        return nbformat.v4.new_notebook(cells=cells)

    assert_executed(saved([nbformat.v4.new_output("stream", text="1")], 1, 2, 3))
    for wrong in (
        saved([], 2, 1), saved([], 1, None), saved([nbformat.v4.new_output("error")], 1),
        saved([nbformat.v4.new_output("stream", name="stderr", text="!")], 1),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_executed(wrong)


def test_a_progress_bar_is_no_error_and_nothing_else_passes_for_one():
    bars = (
        "\rdpo:   0%|          | 0/250 [00:00<?, ?update/s]\rdpo: 100%|████| 250/250 [00:05<00:00, 4.5update/s]\n\x1b[A"
    )
    assert without_bars(bars) == ""
    assert without_bars(f"{bars}UserWarning: 5% of | rows | 1/2\n{bars}") == "UserWarning: 5% of | rows | 1/2"


def test_nobody_without_the_token_is_let_in(lab):
    address = f"http://127.0.0.1:{lab.port}/api/contents"
    with urllib.request.urlopen(f"{address}?token={lab.token}") as answer:
        assert answer.status == 200
    for token in ("", lab.token[:-1] + "x"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}?token={token}")

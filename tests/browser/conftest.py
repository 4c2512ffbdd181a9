"""Fixtures of the tests with a browser: headless Chromium, and JupyterLab on a copy of the notebooks."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from lab_page import Server

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run",
    "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium. It resolves no name, so that nothing outside this machine is reached."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks without their outputs: all that is seen then was made by this run."""
    home = tmp_path_factory.mktemp("jupyterlab")
    (home / "notebooks").mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, home / "notebooks" / path.name)
    made = ROOT / "build/nbval-runs"  # by `make notebooks`: with it nothing is trained here again
    if made.is_dir():
        shutil.copytree(made, home / "runs")
    server = Server(home / "notebooks", home)
    yield server
    processes = server.processes()
    server.stop()
    shutil.rmtree(home / "runs", ignore_errors=True)  # a hundred megabytes; pytest keeps its folders for a while
    assert not [process for process in processes if process.is_running()]

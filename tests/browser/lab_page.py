"""A JupyterLab server on this machine, and one of its notebooks as a person sees and handles it in Chromium.

What goes wrong raises AssertionError, whose message holds how far the notebook came, what the page said, and where a
screenshot is.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import psutil

# JupyterLab's own default lets the browser skip the cells that are not on the screen. With "none" all of them are in
# the page, drawn, so that one look finds every output.
# News and updates are looked up on the internet, and Lab asks about them in a pop-up that would lie over the page.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# Set by tests/conftest.py or by a caller's shell; a person's JupyterLab has none of them.
NOT_A_PERSONS = ("MPLBACKEND", "TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type*="stderr"]'
# The course's progress bars are written to stderr, as tqdm does. That is all that may be there.
BAR = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*\| \d+/\d+ \[[^\r\n]*\]|\x1b\[A")
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
LOOK = """([panel, errors]) => {
  const cells = [...document.querySelectorAll(panel + " .jp-CodeCell")];
  return {
    prompts: cells.map(cell => cell.querySelector(".jp-InputPrompt").textContent.replace(/[^0-9*]/g, "")),
    images: cells.map(cell => [...cell.querySelectorAll(".jp-OutputArea-output img")]
                              .map(image => ({src: image.src, width: image.naturalWidth}))),
    errors: cells.map(cell => [...cell.querySelectorAll(errors)].map(output => output.textContent)),
    kernel: document.querySelector(panel + " .jp-Toolbar-kernelName")?.textContent ?? "",
    status: document.querySelector(panel + " .jp-Notebook-ExecutionIndicator")?.dataset.status ?? "",
    dialog: document.querySelector(".jp-Dialog")?.textContent ?? "",
  };
}"""


def without_bars(stderr: str) -> str:
    """What is left of a text on stderr without progress bars and the blanks between them."""
    return BAR.sub("", stderr).strip()


def end_with_parent() -> None:
    """Has the system end this process when the tests are ended in a way that leaves them no time to (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


class Server:
    """JupyterLab on 127.0.0.1 with a random token, on the notebooks of `folder`, all its own files in `home`."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.log, self.token = folder, home / "jupyter.log", secrets.token_hex(24)
        runtime, settings = home / "runtime", home / "settings"
        for plugin, values in SETTINGS.items():
            path = settings / f"@jupyterlab/{plugin}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        dropped = ("JUPYTER", "DPO_", *NOT_A_PERSONS)
        given = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        own = {
            "JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data", "JUPYTER_RUNTIME_DIR": runtime,
            "JUPYTERLAB_SETTINGS_DIR": settings, "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
            "IPYTHONDIR": home / "ipython", "DPO_RUNS_DIR": home / "runs", "JUPYTER_TOKEN": self.token,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
                f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly",
            ],
            env=given | {name: str(value) for name, value in own.items()},
            stdin=subprocess.DEVNULL, stdout=self.log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        try:
            self.port = self._wait_for_port(runtime / f"jpserver-{self.process.pid}.json")
        except BaseException:
            self.stop()
            raise

    def _wait_for_port(self, path: Path, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            # the file may be there before its text is
            with contextlib.suppress(OSError, ValueError):
                return int(json.loads(path.read_text(encoding="utf-8"))["port"])
            time.sleep(0.1)
        raise AssertionError(f"JupyterLab did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def address(self, path: str) -> str:
        """Of a notebook in JupyterLab. Each has a workspace of its own: else Lab would open the earlier ones too."""
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{Path(path).stem}/tree/{path}?token={self.token}"

    def processes(self) -> list[psutil.Process]:
        """The server and its kernels, which have sessions of their own."""
        try:
            server = psutil.Process(self.process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """Ends the server and every kernel. Asked first: the server then ends its kernels itself."""
        all_of_them = self.processes()
        self.process.terminate()
        _, alive = psutil.wait_procs(all_of_them, timeout=15)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=15)
        self.process.wait(timeout=15)


@dataclass
class Notebook:
    """An open notebook: `page` is Playwright's, `path` the file that the server reads and writes."""

    page: Any
    path: Path
    log: Path
    shots: Path
    outside: list[str] = field(default_factory=list)  # addresses that the page asked for, not on this machine
    console: list[str] = field(default_factory=list)  # errors of the page's scripts
    started: float = field(default_factory=time.monotonic)

    def sources(self) -> list[str]:
        """Of the code cells. From the file: the page's editor holds only the lines that are on the screen."""
        return [cell.source for cell in nbformat.read(self.path, as_version=4).cells if cell.cell_type == "code"]

    def look(self) -> dict[str, Any]:
        """What the page shows now: of each code cell the prompt, the images and what is on stderr; of the kernel."""
        seen = self.page.evaluate(LOOK, [PANEL, ERRORS])
        seen["errors"] = [[text for text in cell if without_bars(text)] for cell in seen["errors"]]
        return seen

    def fail(self, why: str, number: int | None = None) -> AssertionError:
        """To raise: `why`, and all that helps to see it. `number`: the code cell to have in the screenshot, from 1."""
        shot = self.shots / f"{self.path.stem}.png"
        with contextlib.suppress(Exception):  # a page that has died shows nothing; `why` is said all the same
            if number:
                self.page.locator(f"{PANEL} .jp-CodeCell").nth(number - 1).scroll_into_view_if_needed(timeout=5000)
            self.page.screenshot(path=shot)
            numbers = [prompt.isdigit() for prompt in self.look()["prompts"]]
            why += f"\n{sum(numbers)} of {len(numbers)} code cells were executed"
        said = "".join(f"\nconsole: {line[:300]}" for line in self.console[-5:])
        server = self.log.read_text(encoding="utf-8", errors="replace")[-500:]
        seconds = time.monotonic() - self.started
        return AssertionError(
            f"{self.path.name}, after {seconds:.0f} s: {why}\nscreenshot: {shot}{said}\nserver: {server}"
        )

    def wait(self, what: str, holds: Callable[[], Any], seconds: float) -> Any:
        """The first true value of `holds`, asked ten times a second."""
        end = time.monotonic() + seconds
        while not (value := holds()):
            if time.monotonic() > end:
                raise self.fail(f"waited {seconds:g} s for {what}")
            self.page.wait_for_timeout(100)
        return value

    def assert_no_error(self) -> None:
        """No output of a cell is an error or was written to stderr; Lab asks nothing."""
        seen = self.look()
        for number, (source, errors) in enumerate(zip(self.sources(), seen["errors"], strict=True), 1):
            if errors:
                raise self.fail(f"code cell {number} shows an error:\n{source}\n→ {errors[0].strip()[-1500:]}", number)
        if seen["dialog"]:
            self.page.wait_for_timeout(500)  # its text is drawn before its title
            raise self.fail(f"JupyterLab asks: {self.look()['dialog'] or seen['dialog']}")

    def menu(self, name: str, entry: str) -> None:
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.get_by_role("menuitem", name=entry, exact=True).click()

    def run_all(self, seconds: float) -> None:
        """Menu Run, "Run All Cells"; returns when every code cell has its number and the kernel is idle."""

        def ready() -> bool:  # before there is a kernel the page calls it idle, and Run would ask for one
            seen = self.look()
            return seen["kernel"].startswith("Python") and seen["status"] == "idle"

        self.wait("an idle kernel", ready, 60)
        self.menu("View", "Expand All Code")  # a folded cell, such as a solution, has no number to see
        self.menu("Run", "Run All Cells")
        # until the kernel has said that it is busy it still looks idle, and the cells that wait have a star
        self.wait("a cell that runs", lambda: any(self.look()["prompts"]), 30)

        def done() -> bool:
            seen = self.look()
            if any(seen["errors"]) or seen["dialog"]:
                self.assert_no_error()
            if seen["status"] != "idle" or "*" in seen["prompts"]:
                return False
            return all(seen["prompts"])

        self.wait("all cells", done, seconds)
        self.assert_no_error()

    def save(self) -> nbformat.NotebookNode:
        """Ctrl+S, and the notebook that is in the file then."""
        with self.page.expect_response(lambda r: r.request.method == "PUT" and "/api/contents/" in r.url) as saved:
            self.page.keyboard.press("Control+s")
        if not saved.value.ok:
            raise self.fail(f"saving was answered with {saved.value.status}")
        return nbformat.read(self.path, as_version=4)

    def sliders(self) -> list[Any]:
        return self.page.locator(f"{PANEL} .jp-OutputArea-output [role=slider]").all()

    def move(self, slider: Any, key: str, seconds: float = 30) -> None:
        """Presses a key on a slider: its readout and the figure of its cell change, without an error."""
        slider.scroll_into_view_if_needed()
        cell = slider.locator("xpath=ancestor::div[contains(@class, 'jp-CodeCell')]")
        index = "(cell, all) => [...document.querySelectorAll(all)].indexOf(cell)"
        number = cell.evaluate(index, f"{PANEL} .jp-CodeCell")
        readout = slider.locator("xpath=ancestor::div[contains(@class, 'widget-slider')]").locator(".widget-readout")
        images = [image["src"] for image in self.look()["images"][number]]
        value = readout.inner_text()
        slider.focus()
        slider.press(key)

        def redrawn() -> bool:
            self.assert_no_error()
            now = self.look()["images"][number]
            return len(now) == len(images) and [i["src"] for i in now] != images and all(i["width"] for i in now)

        self.wait(f"another readout than {value} after {key}", lambda: readout.inner_text() != value, seconds)
        self.wait(f"another figure after {key} on the slider at {readout.inner_text()}", redrawn, seconds)


@contextlib.contextmanager
def opened(server: Server, browser: Any, name: str, shots: Path) -> Iterator[Notebook]:
    """The notebook `name` of the server in a new browser window, where no address but the server's is reached."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, service_workers="block")
    try:
        page = context.new_page()
        notebook = Notebook(page, server.folder / name, server.log, shots)

        def route(request: Any) -> None:
            address = urlsplit(request.request.url)
            if (address.hostname, address.port) == ("127.0.0.1", server.port):
                request.continue_()
            else:
                notebook.outside.append(request.request.url)
                request.abort()

        page.route("**/*", route)
        page.on("console", lambda said: said.type == "error" and notebook.console.append(said.text))
        page.on("pageerror", lambda error: notebook.console.append(str(error)))
        page.goto(server.address(name))
        page.locator(f"{PANEL} .jp-Cell").first.wait_for(timeout=90_000)
        yield notebook
    finally:
        context.close()

"""Execute the notebooks in order, each in a kernel of its own: `python -m dpo_helpers course`."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbclient.output_widget import OutputWidget
from tqdm import tqdm

from ..errors import CourseError
from ..settings import EMBEDDED, Settings
from ..untrusted import visible
from .disk import holding, write_text
from .outputs import FINAL_MODEL
from .report import make_report
from .signals import Interrupted

WIDGET = "application/vnd.jupyter.widget-view+json"
QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
BEGIN = ["02", "01", "04", "06", "03"]  # side by side: first what others wait for, then the longest


def notebooks_dir() -> Path:
    """The course's notebooks/, here or in a folder above; raises CourseError if there is none."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks" / "01_data.ipynb").is_file():
            return folder / "notebooks"
    raise CourseError("no notebooks/ here or above: run this in a clone of the course")


def notebooks_in(folder: Path, *, beyond: bool) -> list[Path]:
    """The notebooks of the course in a folder, in reading order: the seven, then the optional ones in beyond/."""
    optional = sorted(folder.glob("beyond/[a-z]_*.ipynb")) if beyond else []
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *optional]


class _SilentOutput(OutputWidget):  # type: ignore[misc]  # nbclient has no types
    """The output under a slider, of which the kernel is not told.

    nbclient would tell it through the socket on which it awaits the cell's reply, and a reply that comes at that moment
    wakes nobody: now and then notebook 4 hung for ever (nbclient#312). Sliders are dropped afterwards anyway.
    """

    def sync_state(self) -> None:
        """Send nothing."""


def execute(source: Path, target: Path, profile: str, keys: Path | None = None) -> float:
    """Execute one notebook and save the result as `target`, also after an error; returns the seconds it took.

    keys: a folder for the file with the kernel's address and key; the system's temporary folder if not given. Raises
    CourseError naming the notebook, the cell and the error, and Interrupted after Ctrl-C or SIGTERM, which the running
    cell gets as JupyterLab's stop button gives it: a training ends its update and saves.
    """
    ((_, seconds),) = _executed({source: target}, profile, keys, side_by_side=1)
    return seconds


def _executed(
    targets: dict[Path, Path], profile: str, keys: Path | None, side_by_side: int
) -> Iterator[tuple[Path, float]]:
    """Execute notebooks, begun in this order, so many at a time; yields each that is done, with its seconds.

    Each runs in a thread, which waits for its kernel, while this one meets the signals. After an error in one of them
    the others are interrupted, and the error is raised once they have ended.
    """
    running: dict[NotebookClient, asyncio.AbstractEventLoop] = {}
    stopped: list[int] = []  # by these signals; 0 is an error in another notebook

    def _stop(number: int, _: object = None) -> None:
        stopped.append(number)
        for client, loop in list(running.items()):
            asyncio.run_coroutine_threadsafe(client.km.interrupt_kernel(), loop)

    def _one(source: Path, target: Path) -> float:
        try:
            return _run(source, target, env, keys, running, stopped)
        except BaseException as error:  # here, before this thread takes the next notebook
            errors.append(error)
            if not stopped:
                _stop(0)
            raise

    errors: list[BaseException] = []
    threads = max(1, torch.get_num_threads() // side_by_side)
    env = {"OMP_NUM_THREADS": str(threads)} if side_by_side > 1 else {}
    env |= {**os.environ, **QUIET, "DPO_PROFILE": profile}
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python lets nobody handle signals
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    try:
        with ThreadPoolExecutor(side_by_side) as pool:
            done = {pool.submit(_one, source, target): source for source, target in targets.items()}
            for future in as_completed(done):
                if future.exception() is None:
                    yield done[future], future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if errors:
        raise errors[0]


def _run(
    source: Path, target: Path, env: dict[str, str], keys: Path | None, running: dict[Any, Any], stopped: list[int]
) -> float:
    """Execute one notebook, as `execute` says. running: gets its client, for as long as its cells run."""
    notebook = nbformat.read(source, as_version=4)
    code = sum(cell.cell_type == "code" for cell in notebook.cells)
    begun: list[int] = []
    started = time.perf_counter()
    with tqdm(total=code, desc=source.stem, unit="cell", leave=False) as bar:
        client = NotebookClient(
            notebook, timeout=None, kernel_name="python3", record_timing=False, extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(source.parent)}},
            on_cell_execute=lambda **_: begun.append(1), on_cell_executed=lambda **_: bar.update(),
        )  # fmt: skip
        client.on_notebook_start = lambda **_: running.update({client: asyncio.get_running_loop()})
        if keys:
            client.create_kernel_manager().connection_file = str(keys / f"{source.stem}.json")
        client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = _SilentOutput
        go_on = "run the same again to go on; finished stages are kept"
        if stopped:
            raise Interrupted(f"{source.name}: {go_on}", stopped[0])
        try:
            client.execute(env=env)
        except (CellExecutionError, DeadKernelError) as error:
            if stopped:
                why = getattr(error, "evalue", "") or go_on
                raise Interrupted(f"{source.name}, code cell {len(begun)}: {why}", stopped[0]) from None
            last = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
            raise CourseError(f"{source.name}, code cell {len(begun)}: {last}; see {target}") from error
        finally:
            running.pop(client, None)
            notebook.metadata.pop("language_info", None)
            drop_widgets(notebook)
            join_prints(notebook)
            write_text(target, nbformat.writes(notebook) + "\n")
    return time.perf_counter() - started


def drop_widgets(notebook: dict[str, Any]) -> None:
    """Drop sliders from a notebook: without a kernel they show nothing, and each run gives them another id."""
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if WIDGET not in output.get("data", {})]


def join_prints(notebook: dict[str, Any]) -> None:
    """Make one output of prints that follow each other: the kernel cuts them where its clock happens to tick."""
    for cell in notebook["cells"]:
        joined: list[dict[str, Any]] = []
        for output in cell.get("outputs", []):
            if joined and "name" in output and output["name"] == joined[-1].get("name"):
                joined[-1]["text"] += output["text"]
            else:
                joined.append(output)
        if cell["cell_type"] == "code":
            cell["outputs"] = joined


@contextmanager
def _private(folder: Path) -> Iterator[Path]:
    """A folder for this user alone, gone at the end; what a killed course left there goes at the start of the next.

    Raises ArtefactError, saying which process it is, while another course uses it.
    """
    with holding(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run_course(settings: Settings, *, in_place: bool = False, beyond: bool = False) -> None:
    """Execute the notebooks and write the report; executed copies go to <run>/notebooks/.

    The embedded model is too small for two cores, so its notebooks run two at a time, where nothing is there yet: one
    that sets an earlier artefact aside needs the run for itself. One that needs what another is making waits for it.
    in_place: also put the outputs into the committed notebooks, which is how they are regenerated. beyond: those in
    notebooks/beyond/ too.
    """
    sources = notebooks_in(notebooks_dir(), beyond=beyond)
    is_small_and_new = settings.model == EMBEDDED and not settings.run_dir.exists()
    side_by_side = min(2, torch.get_num_threads()) if is_small_and_new else 1
    if side_by_side > 1:
        sources.sort(key=lambda source: [*BEGIN, source.stem[:2]].index(source.stem[:2]))
    os.environ |= {"DPO_RUNS_DIR": str(settings.run_dir.parent.resolve()), "DPO_WAIT_SECONDS": "3600"}
    targets = {source: source if in_place else settings.run_dir / "notebooks" / source.name for source in sources}
    with _private(settings.run_dir.parent.resolve() / f"{settings.profile}.kernel") as keys:
        done = _executed(targets, settings.profile, keys, side_by_side)
        for number, (source, seconds) in enumerate(done, start=1):
            print(f"{number}/{len(sources)}  {source.stem:22s} done in {seconds:5.0f} s", flush=True)
    report = make_report(settings)
    run = settings.run_dir
    print(visible(f"\nreport       {report}\nfigures      {run / 'figures'}\nresults      {run / 'results.json'}"))
    print(visible(f"notebooks    {run / 'notebooks'}\nfinal model  {run / FINAL_MODEL}"))

"""The committed notebooks: executed, checked, alike at their start, free of machine traces; their execution."""

import json
import os
import re
import signal
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT
from dpo_helpers.run.course import _executed, execute, join_prints, notebooks_in

NAMES = (
    "01_data", "02_reference", "03_sft", "04_dpo_loss_derivation", "05_dpo_training", "06_beta_sweep", "07_generations",
)  # fmt: skip
SEVEN = [ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES]
PATHS = notebooks_in(ROOT / "notebooks", beyond=True)
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_seven_are_there_and_no_other():
    found = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    assert found == [*(p.name for p in SEVEN), "_template.ipynb"]
    assert notebooks_in(ROOT / "notebooks", beyond=False) == SEVEN


def test_the_course_runs_the_optional_ones_last_and_only_when_asked(tmp_path):
    for name in (
        "beyond/b_two.ipynb",
        "02_two.ipynb",
        "beyond/a_one.ipynb",
        "01_one.ipynb",
        "_template.ipynb",
        "x.ipynb",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    seven = ["01_one.ipynb", "02_two.ipynb"]
    for beyond, expected in ((False, seven), (True, [*seven, "beyond/a_one.ipynb", "beyond/b_two.ipynb"])):
        found = notebooks_in(tmp_path, beyond=beyond)
        assert [path.relative_to(tmp_path).as_posix() for path in found] == expected


@each
def test_every_code_cell_was_executed_in_order_without_error(path):
    assert [cell.execution_count for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    for cell in cells(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text[:200]


@each
def test_at_least_70_percent_of_outputs_are_checked_and_the_rest_say_why(path):
    with_output = [cell for cell in cells(path) if cell.outputs]
    skipped = [cell for cell in with_output if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert len(skipped) <= 0.3 * len(with_output), f"{len(skipped)} of {len(with_output)} are not checked"
    for cell in cells(path):
        tags = cell.metadata.get("tags", [])
        assert "nbval-skip" not in tags
        if "nbval-ignore-output" in tags:
            assert len(cell.metadata.get("reason", "")) > 20, cell.source


@each
def test_set_up_cells_are_the_same_everywhere(path):
    first, profile = cells(path)[:2]
    expected_first, expected_profile = cells(PATHS[0])[:2]
    assert (first.source, profile.source) == (expected_first.source, expected_profile.source)
    assert "setup" in first.metadata.tags
    assert "parameters" in profile.metadata.tags
    assert profile.source.startswith('PROFILE = "mini"')


@each
def test_cells_are_short_and_prose_surrounds_them(path):
    code, prose = cells(path), cells(path, "markdown")
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert len(prose) >= 0.7 * len(code)
    assert {"**Do:**", "**Learn:**", "**Need:**"} <= set(re.findall(r"\*\*\w+:\*\*", prose[0].source))
    assert any("## What you have done" in cell.source for cell in prose)


@pytest.mark.parametrize("path", SEVEN, ids=NAMES)
def test_each_of_the_seven_has_3300_words_at_most(path):
    assert sum(len(cell.source.split()) for cell in cells(path, "markdown")) <= 3300


@each
def test_no_trace_of_a_machine_or_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"/(?:home|root|Users|tmp)/", text)
    assert not re.findall(r"hf_[A-Za-z0-9]{20,}", text)
    assert str(ROOT) not in text


def test_profiles_differ_by_nothing_but_the_constant():
    """No cell asks which profile runs."""
    for path in PATHS:
        for cell in cells(path)[2:]:
            assert "PROFILE ==" not in cell.source
            assert ".profile" not in cell.source


CTRL_C = """
import nbformat, sys
from pathlib import Path
from dpo_helpers.run.course import execute
from dpo_helpers.run.signals import Interrupted
# in short sleeps: a signal that comes just before a sleep begins does not wake it
cell = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); [time.sleep(0.1) for _ in range(600)]"
notebook = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell(cell)],
    metadata={"kernelspec": {"name": "python3", "display_name": "x"}},
)
nbformat.write(notebook, "slow.ipynb")
try:
    execute(Path("slow.ipynb"), Path("out.ipynb"), "mini")
except Interrupted as stop:
    print(stop.signal, stop)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal handlers in an event loop")
def test_a_signal_reaches_the_running_cell_and_ends_the_course_with_a_word(tmp_path):
    """The cell asks for it itself: it terminates the process that executes the notebook."""
    result = subprocess.run([sys.executable, "-c", CTRL_C], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert result.stdout == "15 slow.ipynb, code cell 2: run the same again to go on; finished stages are kept\n", (
        result
    )
    assert (tmp_path / "out.ipynb").is_file(), "what was executed is kept"


KILLED = """
from pathlib import Path
from dpo_helpers.run import course
from dpo_helpers.settings import load_settings
course.make_report = lambda settings: Path("report.html")
course.run_course(load_settings("mini", runs_dir="runs"))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_course_leaves_no_kernels_key_in_the_temporary_folder_and_the_next_one_removes_it(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    (tmp_path / "notebooks").mkdir()
    key = tmp_path / "runs/mini.kernel/01_data.json"

    def course(cell):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        nbformat.write(notebook, tmp_path / "notebooks/01_data.ipynb")
        done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=env, capture_output=True, timeout=100)
        return done.returncode

    assert course("import os, signal; os.kill(os.getppid(), signal.SIGKILL)") == -signal.SIGKILL
    assert not [file.name for file in (tmp_path / "temporary").rglob("*.json")]
    assert "key" in json.loads(key.read_text())
    assert [path.stat().st_mode & 0o777 for path in (key, key.parent)] == [0o600, 0o700]
    assert course("import os; assert os.path.exists('../runs/mini.kernel/01_data.json')") == 0
    assert not key.parent.exists()
    assert not [file.name for file in (tmp_path / "temporary").rglob("*.json")]


def test_a_failing_notebook_is_named_with_its_cell(tmp_path):
    from dpo_helpers.errors import CourseError

    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("1", execution_count=1),
            nbformat.v4.new_code_cell("raise ValueError('no')", execution_count=2),
            nbformat.v4.new_code_cell("3", execution_count=3),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "x"}},
    )
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(CourseError, match=r"bad\.ipynb, code cell 2: ValueError: no; see .*out\.ipynb"):
        execute(tmp_path / "bad.ipynb", tmp_path / "out.ipynb", "mini")
    assert (tmp_path / "out.ipynb").is_file(), "what was executed is kept to look at"


def written(folder, **cells):
    """A notebook of one cell for each name; returns where each goes."""
    for name, cell in cells.items():
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell)],
            metadata={"kernelspec": {"name": "python3", "display_name": "x"}},
        )
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return {folder / f"{name}.ipynb": folder / f"{name}.out.ipynb" for name in cells}


WAIT = "import time\nfrom pathlib import Path\nPath('{}').touch()\nwhile not Path('{}').exists():\n    time.sleep(0.1)"


@pytest.mark.slow
def test_two_notebooks_run_side_by_side(tmp_path):
    """Each waits for a file that the other one makes."""
    targets = written(tmp_path, first=WAIT.format("a", "b"), second=WAIT.format("b", "a"), third="1")
    done = dict(_executed(targets, "mini", None, side_by_side=2))
    assert set(done) == set(targets)
    assert all(target.is_file() for target in targets.values())


@pytest.mark.slow
def test_after_an_error_the_other_notebook_is_interrupted_and_no_more_begin(tmp_path):
    """The second one would wait for ever; it ends at the first one's error, which is the one that is told."""
    from dpo_helpers.errors import CourseError

    bad = WAIT.format("a", "b") + "\nraise ValueError('no')"
    targets = written(tmp_path, bad=bad, waits=WAIT.format("b", "never"), third="1")
    with pytest.raises(CourseError, match=r"bad\.ipynb, code cell 1: ValueError: no"):
        list(_executed(targets, "mini", None, side_by_side=2))
    said = nbformat.read(tmp_path / "waits.out.ipynb", as_version=4).cells[0].outputs[0]
    assert said.ename == "KeyboardInterrupt"
    assert not (tmp_path / "third.out.ipynb").exists()


def test_prints_that_follow_each_other_become_one_output_and_no_other_moves():
    def printed(text, name="stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    shown = nbformat.v4.new_output("display_data", data={"text/plain": "a table"})
    outputs = [printed("a"), printed("b"), shown, printed("c"), printed("d", "stderr"), printed("e", "stderr")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=outputs)])
    join_prints(notebook)
    assert notebook.cells[0].outputs == [printed("ab"), shown, printed("c"), printed("de", "stderr")]


def test_a_slider_cannot_stop_the_course(tmp_path):
    """nbclient loses a reply that comes while it writes a slider's output back to the kernel: it must not write back."""
    pytest.importorskip("ipywidgets", reason="the slider needs ipywidgets")
    draw = "from ipywidgets import Output\nfrom IPython.display import display\nunder = Output()\ndisplay(under)"
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(draw + "\nwith under:\n    print('a figure')"),
            nbformat.v4.new_code_cell("print(len(under.outputs))"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "x"}},
    )
    nbformat.write(notebook, tmp_path / "slider.ipynb")
    execute(tmp_path / "slider.ipynb", tmp_path / "out.ipynb", "mini")
    first, second = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert second.outputs[0].text == "0\n", "the kernel was told"
    assert first.outputs == [], "what the slider showed went into the cell"

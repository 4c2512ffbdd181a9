"""The skeleton of the notebooks, what they share, and the version without solutions."""

import ast
import re

import nbformat
import pytest

from conftest import ROOT
from dpo_helpers.errors import CourseError
from dpo_helpers.lesson import exercises
from dpo_helpers.run.course import notebooks_in
from dpo_helpers.tools import skeleton

NOTEBOOKS = ROOT / "notebooks"
PATHS = notebooks_in(NOTEBOOKS, beyond=True)
each = pytest.mark.parametrize("path", PATHS, ids=[p.stem for p in PATHS])


def read(path):
    return nbformat.read(path, as_version=4)


def name_of(path):
    """Such as "01_data.ipynb", or "beyond/a_fast_step.ipynb"."""
    return path.relative_to(NOTEBOOKS).as_posix()


@each
def test_the_skeleton_is_whole(path):
    assert skeleton.problems(read(path)) == []


@each
def test_the_exercise_version_is_the_lesson_without_its_solutions(path):
    """Not a byte of difference: `python -m dpo_helpers lesson` writes it."""
    expected = nbformat.writes(skeleton.without_solutions(read(path), path.name)) + "\n"
    assert (NOTEBOOKS / "exercises" / path.name).read_text(encoding="utf-8") == expected


@each
def test_shared_cells_and_badge_are_those_of_the_template(path):
    notebook = read(path)
    assert skeleton.stamp(notebook, name_of(path), read(NOTEBOOKS / skeleton.TEMPLATE)) == notebook


def test_there_is_no_exercise_version_of_anything_else():
    assert sorted(p.name for p in (NOTEBOOKS / "exercises").iterdir() if p.suffix) == sorted(p.name for p in PATHS)


@each
def test_no_solution_is_left_in_the_exercise_version_and_it_runs(path, capsys):
    """Its solution cells say "not answered yet", whatever stood before them in the lesson."""
    bare, whole = read(NOTEBOOKS / "exercises" / path.name), read(path)
    solved = [c for c in whole.cells if "solution" in skeleton.tags(c)]
    empty = [c for c in bare.cells if "exercise" in skeleton.tags(c)]
    assert len(empty) == len(solved) >= (2 if path.parent == NOTEBOOKS else 1)
    assert not any(c.get("outputs") for c in bare.cells)
    for before, after in zip(solved, empty, strict=True):
        assert skeleton.YOURS in after.source
        assert "# solution" not in after.source
        assert len(after.source) < len(before.source)
        exec(compile(after.source, path.stem, "exec"), {"exercises": exercises})  # may use nothing else of the lesson
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert all("not answered yet" in line for line in lines), lines


@each
def test_no_later_cell_needs_what_a_learner_has_not_written_yet(path):
    """The exercise version runs from top to bottom unsolved: what solutions define is used in their own cells only."""
    cells = [c for c in read(path).cells if c.cell_type == "code" and "setup" not in skeleton.tags(c)]
    for i, cell in enumerate(cells):
        if "solution" in skeleton.tags(cell):
            named = names(cell.source, ast.Store)
            assert named, "a solution defines something"
            defined = set()
            for later in cells[i + 1 :]:
                missing = (names(later.source, ast.Load) & named) - names(later.source, ast.Store) - defined
                assert not missing, (missing, later.source)
                defined |= names(later.source, ast.Store)


def names(source, use):
    """The names that a cell uses in this way; for ast.Store also the functions that it defines, for their own names."""
    tree = ast.parse(source)
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for s in f.body for node in ast.walk(s)}
    found = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, use)
        if use is ast.Load or id(n) not in inner
    }  # fmt: skip
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    return found | functions if use is ast.Store else found


def test_the_address_stands_in_one_place():
    """Every badge and set-up cell has it from tools/skeleton.py; no other file of the project names it."""
    named = [
        p.relative_to(ROOT).as_posix()
        for folder in ("dpo_helpers", "tests", "docs", "benchmarks")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".md", ".toml", ".jinja") and skeleton.REPOSITORY in p.read_text(encoding="utf-8")
    ]
    assert named == ["dpo_helpers/tools/skeleton.py"]
    for path in PATHS:
        name = skeleton.REPOSITORY.removeprefix("https://github.com/")
        assert (
            f"colab.research.google.com/github/{name}/blob/main/notebooks/{name_of(path)}" in read(path).cells[0].source
        )


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


def code(source, *tags):
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}, execution_count=1)


def test_what_is_taken_out_of_a_solution():
    source = "def f(x):\n    '''Twice.'''\n    # solution\n    y = 2 * x\n    return y\n    # end of solution\n\n\na, b = 1, 2  # solution\nprint(f)"
    bare = skeleton.without_solutions(notebook(nbformat.v4.new_markdown_cell("# 1"), code(source, "solution")), "x")
    assert bare.cells[1].source == (
        "def f(x):\n    '''Twice.'''\n    ...  # your turn\n\n\na, b = ...  # your turn\nprint(f)"
    )
    assert bare.cells[1].execution_count is None


@pytest.mark.parametrize("source", ["print(1)", "# solution\nx = 1"])
def test_a_solution_that_is_not_marked_or_not_closed_is_an_error(source):
    with pytest.raises(CourseError, match="no closed '# solution' part"):
        skeleton.without_solutions(notebook(nbformat.v4.new_markdown_cell("# 1"), code(source, "solution")), "x")


def without(text, by=""):
    return lambda cells: [c.update(source=c.source.replace(text, by)) for c in cells]


def drop(tag):
    return lambda cells: cells.remove(next(c for c in cells if tag in skeleton.tags(c)))


BROKEN = {
    "title": (without("# 4 · ", "# Four: "), "the title"),
    "goals": (without("**Learn:**"), r"no \*\*Learn:\*\*"),
    "time": (without("CPU"), "time on CPU and GPU"),
    "the reader's time": (without("minutes to read"), "the reader's own minutes"),
    "time on a GPU": (without("on a GPU as long", "on a GPU: not measured"), "time on CPU and GPU"),
    "shared cells": (drop("symbols"), "the shared cells are"),
    "picture": (without("explore_loss(", "print("), "the idea has no picture"),
    "headings": (without("## Quiz", "## Questions"), "in this order"),
    "sections": (without("## 2. ", "## 3. "), "numbered sections are"),
    "recap": (without("next notebook", "rest"), "what comes next"),
    "references": (without("- ", "* "), "two references"),
    "predictions": (without("**Predict", "**Guess"), "0 predictions"),
    "first a word": (without('predict("4.2", "")', "pass"), r'does not begin with predict\("4\.2", ""\)'),
    "spoiled": (without('check("ratio", (ends[0] / ends[1]).item())', 'check("ratio", 1, 20.1, 0.1)'), "stands in its source"),
    "practice": (without("> **In practice", "> **Note"), "0 boxes"),
    "quiz": (without("<summary>Answer</summary>"), "the quiz has 0 answers"),
    "exercise": (without("Exercise 4.2"), r"exercise 4\.2 is not announced"),
    "hint": (without("<summary>Hint</summary>"), r"exercise 4\.1 has no hint"),
    "solution": (drop("solution"), r"exercise 4\.1 is not followed"),
    "check": (without('check("4.1", '), r"exercise 4\.1 is not checked"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_missing_part_is_named(name):
    change, expected = BROKEN[name]
    broken = read(NOTEBOOKS / "04_dpo_loss_derivation.ipynb")
    change(broken.cells)
    found = skeleton.problems(broken)
    assert any(re.search(expected, line) for line in found), found


def test_stamping_writes_what_is_missing_and_then_nothing(tmp_path):
    for path in (NOTEBOOKS / skeleton.TEMPLATE, PATHS[0]):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = read(tmp_path / PATHS[0].name)
    first.cells[1].source = "print('mine')"
    nbformat.write(first, tmp_path / PATHS[0].name)
    assert [p.relative_to(tmp_path).as_posix() for p in skeleton.write_lessons(tmp_path)] == [
        PATHS[0].name, f"exercises/{PATHS[0].name}",
    ]  # fmt: skip
    assert (tmp_path / PATHS[0].name).read_bytes() == PATHS[0].read_bytes()
    assert skeleton.write_lessons(tmp_path) == []

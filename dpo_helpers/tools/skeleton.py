"""How a notebook of the course is built: its skeleton, what all of them share, and the version without solutions.

`notebooks/_template.ipynb` is the annotated skeleton. Three of its cells (set-up, profile, symbols) are the same in
every notebook, of the seven and of `notebooks/beyond/`; `python -m dpo_helpers lesson` copies them, sets the badge, and
writes `notebooks/exercises/`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat

from ..errors import CourseError
from ..lesson.exercises import EXERCISES
from ..run.course import notebooks_in
from ..run.disk import write_text

# The course's address, for badges and for Colab's set-up cell. Whoever publishes the course puts theirs here and runs
# `python -m dpo_helpers lesson`; nothing else holds it. GitHub allows no name with "_", so nobody can own this one.
REPOSITORY = "https://github.com/your_account/dpo-course"
COLAB = "https://colab.research.google.com"
TEMPLATE = "_template.ipynb"
SHARED = ("setup", "parameters", "symbols")  # tags of the cells that all notebooks have in common
YOURS = "...  # your turn"
NAMED = re.compile(r"^(\s*)([\w, ]+) = .*  # solution$")

Notebook = Any


def badge(name: str, folder: str = "notebooks") -> str:
    """The line with Colab's badge for a notebook of the course."""
    where = REPOSITORY.removeprefix("https://github.com/")
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{where}/blob/main/{folder}/{name})"


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def stamp(notebook: Notebook, name: str, template: Notebook) -> Notebook:
    """A notebook with the shared cells of the template and its own badge below the title; raises CourseError."""
    stamped = deepcopy(notebook)
    for tag in SHARED:
        (source,) = (cell.source for cell in template.cells if tag in tags(cell))
        mine = [cell for cell in stamped.cells if tag in tags(cell)]
        if len(mine) != 1:
            raise CourseError(f"{name} has {len(mine)} cells with the tag {tag!r}, but needs one; see {TEMPLATE}")
        mine[0].source = source.replace("REPOSITORY", REPOSITORY)
    lines = stamped.cells[0].source.split("\n")
    rest = "\n".join(line for line in lines[1:] if "colab-badge.svg" not in line).strip("\n")
    stamped.cells[0].source = f"{lines[0]}\n\n{badge(name)}\n\n{rest}"
    return stamped


def without_solutions(notebook: Notebook, name: str) -> Notebook:
    """The same lesson to work in: no outputs, and in cells with the tag "solution" only what the learner starts from.

    The lines from "# solution" to "# end of solution", and the value of a line that ends with "# solution", go.
    """
    bare = deepcopy(notebook)
    for cell in bare.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "solution" in tags(cell):
                cell.source = "\n".join(_without_solution(cell.source.split("\n"), name))
                cell.metadata = nbformat.from_dict({"tags": ["exercise"]})
    lines = bare.cells[0].source.split("\n")
    bare.cells[0].source = "\n".join(badge(name, "notebooks/exercises") if "colab-badge" in x else x for x in lines)
    return bare


def _without_solution(lines: list[str], name: str) -> Iterator[str]:
    inside = found = False
    for line in lines:
        if line.strip() == "# solution":
            inside = found = True
            yield line[: len(line) - len(line.lstrip())] + YOURS
        elif line.strip() == "# end of solution":
            inside = False
        elif match := NAMED.match(line):
            found = True
            yield f"{match[1]}{match[2]} = {YOURS}"
        elif not inside:
            yield line
    if inside or not found:
        raise CourseError(f"{name}: a solution cell has no closed '# solution' part: {lines[0]!r}")


def problems(notebook: Notebook) -> list[str]:
    """What of the skeleton a notebook lacks, a line each; empty if it is whole."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    text = "\n\n".join(prose)
    return [*_opening(notebook), *_order(text), *_counts(text), *_predictions(notebook), *_exercises(notebook)]


def _opening(notebook: Notebook) -> Iterator[str]:
    first = notebook.cells[0].source
    if not re.match(r"# [1-9a-d] · \S", first):
        yield "the title is not '# N · …'"
    for word in ("Do", "Learn", "Need"):
        if f"**{word}:**" not in first:
            yield f"the opening has no **{word}:**"
    if not re.search(r"\d+ minutes to read, \d+ for the exercise", first):
        yield "the opening does not say the reader's own minutes"
    if not re.search(r"(minute|second)s?[^\n]*CPU[^\n]*on a GPU (as long|[^\n;]*(\d|N) (minute|second)s)", first):
        yield "the opening does not say the time on CPU and GPU"
    found = [tag for cell in notebook.cells for tag in tags(cell) if tag in SHARED]
    if found != list(SHARED):
        yield f"the shared cells are {found}, not {list(SHARED)}"
    idea = _section(notebook, "## The idea")
    if not any(cell.cell_type == "code" and re.search(r"\b(plot|explore)_\w+\(", cell.source) for cell in idea):
        yield "the idea has no picture: a cell that calls a plot_… of dpo_helpers.show.figures"


def _section(notebook: Notebook, heading: str) -> list[Any]:
    """The cells from the one with a heading to the next one with a heading of the second level."""
    inside, found = False, []
    for cell in notebook.cells:
        headings = [line for line in cell.source.split("\n") if cell.cell_type == "markdown" and line.startswith("## ")]
        if heading in headings:
            inside = True
        elif headings:
            inside = False
        if inside:
            found.append(cell)
    return found


def _order(text: str) -> Iterator[str]:
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    fixed = ["The idea", "Quiz", "What you have done", "References"]
    if [h for h in headings if h in fixed] != fixed:
        yield f"the headings {fixed} do not all stand there in this order"
    numbers = [int(h.split(".")[0]) for h in headings if re.match(r"\d+\. ", h)]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        yield f"the numbered sections are {numbers}"
    done = text.rpartition("## What you have done")[2].partition("## References")[0]
    if not re.search(r"(next|last) notebook|\*\*Next:\*\*", done):
        yield "the recap does not say what comes next"
    if len(re.findall(r"^- .*(section|eq\.|figure|appendix|lines?|file|page)", text.rpartition("## References")[2],
                      flags=re.MULTILINE)) < 2:  # fmt: skip
        yield "fewer than two references say where to look in them"


def _counts(text: str) -> Iterator[str]:
    if (count := text.count("**Predict")) < 4:
        yield f"{count} predictions, four are asked for"
    if (count := text.count("> **In practice")) < 2:
        yield f"{count} boxes 'In practice', two are asked for"
    quiz = text.rpartition("## Quiz")[2].partition("## What you have done")[0]
    if (count := quiz.count("<summary>Answer</summary>")) != 5:
        yield f"the quiz has {count} answers that fold out, not five"


def _predictions(notebook: Notebook) -> Iterator[str]:
    """Each **Predict is followed by a cell that lets the learner commit first, and whose source gives no answer."""
    number, count = notebook.cells[0].source[2:3], 0
    for cell, result in pairwise(notebook.cells):
        if cell.cell_type != "markdown" or "**Predict" not in cell.source or "solution" in tags(result):
            continue
        count += 1
        wanted = f'predict("{number}.{count}", "")'
        if result.source.split("\n")[0] != wanted:
            yield f"the cell below a prediction does not begin with {wanted}"
        calls = [node for node in ast.walk(ast.parse(result.source)) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func) == "check" and len(call.args) > 2 and ast.unparse(call.args[2]) != "0.0":
                yield f"the answer to prediction {number}.{count} stands in its source: {ast.unparse(call)}"


def _exercises(notebook: Notebook) -> Iterator[str]:
    number = notebook.cells[0].source[2:3]
    mine = [e for e in EXERCISES.values() if e.number.startswith(f"{number}.")]
    wanted = 2 if number.isdigit() else 1
    if len(mine) < wanted:
        yield f"{len(mine)} exercises, {wanted} asked for"
    cells = notebook.cells
    for exercise in mine:
        at = [i for i, cell in enumerate(cells) if exercise.heading() in cell.source]
        if len(at) != 1:
            yield f"exercise {exercise.number} is not announced once as {exercise.heading()!r}"
        elif "<summary>Hint</summary>" not in cells[at[0]].source:
            yield f"exercise {exercise.number} has no hint that folds out"
        elif not {"solution", "hide-input"} <= set(tags(cells[at[0] + 1])):
            yield f"exercise {exercise.number} is not followed by a cell with the tags solution and hide-input"
        elif f'exercises.check("{exercise.number}", ' not in cells[at[0] + 1].source:
            yield f"the solution of exercise {exercise.number} is not checked"


def write_lessons(folder: Path) -> list[Path]:
    """Copy the shared cells of the template into all notebooks of a folder and write its exercises/; what changed."""
    template = nbformat.read(folder / TEMPLATE, as_version=4)
    changed = []
    for path in notebooks_in(folder, beyond=True):
        stamped = stamp(nbformat.read(path, as_version=4), path.relative_to(folder).as_posix(), template)
        (folder / "exercises").mkdir(exist_ok=True)
        for target, notebook in ((path, stamped), (folder / "exercises" / path.name, None)):
            text = nbformat.writes(notebook or without_solutions(stamped, path.name)) + "\n"
            if not target.is_file() or target.read_text(encoding="utf-8") != text:
                write_text(target, text)
                changed.append(target)
    return changed

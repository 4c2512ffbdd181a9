"""Each exercise accepts its solution and names each known mistake; messages say what was expected and got."""

import time
from collections import Counter

import pytest
import torch

from dpo_helpers.lesson import exercises
from dpo_helpers.errors import CourseError
from dpo_helpers.lesson.exercises import EXERCISES, Exercise, Mistake
from dpo_helpers.lesson.exercises.core import same

MISTAKES = [pytest.param(e, m, id=f"{e.number} {m.name}") for e in EXERCISES.values() for m in e.mistakes]
each = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES.keys())


def test_there_are_24_and_three_at_least_for_each_notebook():
    assert len(EXERCISES) == 24
    by_notebook = Counter(number.split(".")[0] for number in EXERCISES)
    assert sorted(by_notebook) == list("1234567")
    assert min(by_notebook.values()) >= 3
    for notebook, count in by_notebook.items():
        assert [n for n in EXERCISES if n[0] == notebook] == [f"{notebook}.{i + 1}" for i in range(count)]


@each
def test_the_solution_is_right_and_quickly_judged(exercise, capsys):
    started = time.perf_counter()
    exercises.check(exercise.number, exercise.solution)
    assert capsys.readouterr().out == f"exercise {exercise.number}: right\n"
    assert time.perf_counter() - started < 2, "the issue allows two seconds"


@each
def test_three_mistakes_at_least_have_different_names_and_reasons(exercise):
    assert len(exercise.mistakes) >= 3
    assert (
        len({m.name for m in exercise.mistakes}) == len({m.reason for m in exercise.mistakes}) == len(exercise.mistakes)
    )
    assert exercise.difficulty in (1, 2, 3)
    assert 1 <= exercise.minutes <= 30


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES)
def test_each_mistake_is_named_with_its_reason_and_both_values(exercise, mistake):
    lines = exercise.judge(mistake.answer).split("\n  ")
    assert lines[0] == "not yet"
    assert lines[1] == f"{mistake.name}: {mistake.reason}"
    assert lines[2].startswith("expected ")
    assert lines[3].startswith("got ")
    assert lines[2].removeprefix("expected ") != lines[3].removeprefix("got").strip(), "what is shown must differ"


@each
def test_an_empty_answer_is_no_mistake(exercise):
    assert exercise.judge(...) == "not answered yet"
    if exercise.cases:
        assert exercise.judge(lambda *_: ...) == "not answered yet: your function returns nothing"


def square(x):
    return x * x


SQUARE = Exercise(
    "9.1", "Square", 1, 1, square,
    (Mistake("You doubled", "a square is x times x", lambda x: 2 * x),), cases=lambda: [(2.0,), (3.0,)],
)  # fmt: skip
LINES = {
    "doubled": (lambda x: 2 * x, "not yet\n  You doubled: a square is x times x\n  expected 9\n  got      6\n  for      3"),
    "sign": (lambda x: -x * x, "not yet\n  The sign is the other way round\n  expected 4\n  got      -4\n  for      2"),
    "type": (lambda x: "4", "not yet\n  The type should be float, and is str\n  expected 4\n  got      '4'\n  for      2"),
    "no function": (4.0, "expected a function, got 4; give the function itself, without calling it"),
    "an error": (lambda x: x.nothing, "your function raised AttributeError: 'float' object has no attribute 'nothing'"),
    "other": (lambda x: x + 1, "not yet\n  expected 4\n  got      3\n  for      2"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_messages_word_for_word(name):
    """2 doubled is 4, which is right for the first case: the second one is shown."""
    answer, text = LINES[name]
    assert SQUARE.judge(answer) == text


def test_a_function_that_changes_its_arguments_changes_no_case():
    case = torch.ones(2)
    exercise = Exercise("9.2", "Sum", 1, 1, lambda x: x.sum(), (), cases=lambda: [(case,)])
    assert exercise.judge(lambda x: x.zero_().sum()).startswith("not yet")
    assert exercise.judge(lambda x: x.sum()) == "right"


def test_a_tensor_of_another_shape_is_told_its_shape():
    exercise = Exercise("9.3", "Row", 1, 1, lambda x: x, (), cases=lambda: [(torch.ones(2),)])
    assert "The shape should be [2], and is [1, 2]" in exercise.judge(lambda x: x[None])


def test_an_answer_cannot_draw_in_the_output():
    exercise = Exercise("9.4", "Word", 1, 1, "yes", ())
    verdict = exercise.judge("\x1b[2Jno\nexercise 9.4: right")
    assert "\x1b" not in verdict
    assert verdict.count("\n") == 3 - 1


EQUAL = [(1.0, 1.00005, True), (1.0, 1.01, False), (0.0, 5e-5, True), (1, True, False), ("a", "a", True), ((1, 2), [1, 2], True),
         ([1], [1, 2], False), ({"a": 1.0}, {"a": 1.00001}, True), ({"a": 1.0}, {"b": 1.0}, False), (torch.ones(2), [1.0, 1.0], True),
         (torch.ones(2), torch.ones(2, 1), False), (torch.tensor(float("nan")), torch.tensor(0.0), False), (1.0, "1.0", False)]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "equal"), EQUAL)
def test_what_counts_as_the_same(a, b, equal):
    assert same(a, b) is equal
    assert same(b, a) is equal


def test_an_unknown_number_is_an_error_that_lists_the_others():
    with pytest.raises(CourseError, match=r"there is no exercise '9\.9'; there are 1\.1, "):
        exercises.check("9.9", 0)

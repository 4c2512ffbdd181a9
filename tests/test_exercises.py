"""Each exercise accepts its solution and names each known mistake; messages say what was expected and got."""

import time
from collections import Counter

import pytest
import torch

from dpo_helpers.errors import CourseError
from dpo_helpers.lesson import exercises
from dpo_helpers.lesson.exercises import EXERCISES, Exercise, Mistake, Verdict
from dpo_helpers.lesson.exercises.values import same

MISTAKES = [pytest.param(e, m, id=f"{e.number} {m.name}") for e in EXERCISES.values() for m in e.mistakes]
each = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES.keys())


def test_their_numbers_go_through_the_notebooks_in_order():
    by_notebook = Counter(number.split(".")[0] for number in EXERCISES)
    assert list(by_notebook) == [*"1234567", *"abcd"]
    assert list(EXERCISES) == [f"{notebook}.{i + 1}" for notebook, count in by_notebook.items() for i in range(count)]
    assert min(by_notebook[notebook] for notebook in "1234567") >= 2


@each
def test_the_solution_is_right_and_quickly_judged(exercise, capsys):
    """In the second call, as in a notebook: the first one may have to load transformers."""
    assert exercise.judge(exercise.solution) == Verdict("right", "right")
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
    for answer in (mistake.answer, *mistake.variants):
        verdict = exercise.judge(answer)
        assert (verdict.kind, verdict.mistake) == ("wrong", mistake.name)
        lines = verdict.text.split("\n  ")
        assert lines[0] == "not yet"
        assert lines[1] == f"{mistake.name}: {mistake.reason}"
        assert lines[2].startswith("expected ")
        assert lines[3].startswith("got ")
        assert lines[2].removeprefix("expected ") != lines[3].removeprefix("got").strip(), "what is shown must differ"


@each
def test_an_empty_answer_is_no_mistake(exercise):
    for nothing in (None, ..., NotImplemented):
        assert exercise.judge(nothing) == Verdict("unanswered", "not answered yet")
    if exercise.cases:
        returns_nothing = Verdict("unanswered", "not answered yet: your function returns nothing")
        assert exercise.judge(lambda *_: ...) == exercise.judge(lambda *_: None) == returns_nothing
        assert exercise.judge(not_written) == Verdict("unanswered", "not answered yet")


def not_written(*_):
    raise NotImplementedError


def square(x):
    return x * x


SQUARE = Exercise(
    "9.1", "Square", 1, 1, square,
    (Mistake("You doubled", "a square is x times x", lambda x: 2 * x),), cases=lambda: [(2.0,), (3.0,)],
)  # fmt: skip
LINES = {
    "doubled": (lambda x: 2 * x, "not yet\n  You doubled: a square is x times x\n  expected 9\n  got      6\n  for      3"),
    "minus doubled": (lambda x: -2 * x, "not yet\n  You doubled: a square is x times x; and the sign is the other way round\n  expected 4\n  got      -4\n  for      2"),
    "sign": (lambda x: -x * x, "not yet\n  The sign is the other way round\n  expected 4\n  got      -4\n  for      2"),
    "type": (lambda x: "4", "not yet\n  The type should be float, and is str\n  expected 4\n  got      '4'\n  for      2"),
    "no function": (4.0, "expected a function, got 4; give the function itself, without calling it"),
    "other": (lambda x: x + 1, "not yet\n  expected 4\n  got      3\n  for      2"),
    "nearly": (lambda x: x * x + 0.004, "not yet\n  Close, but not close enough: did you round?\n  expected 4\n  got      4.004\n  for      2"),
    "one way without return": (lambda x: x * x if x < 3 else None, "not yet\n  Here your function returns nothing: does every way through it end in a return?\n  expected 9\n  got      nothing\n  for      3"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_messages_word_for_word(name):
    """2 doubled is 4, which is right for the first case: the second one is shown."""
    answer, text = LINES[name]
    verdict = SQUARE.judge(answer)
    assert verdict.text == text
    assert verdict.kind == "wrong"
    assert verdict.mistake == ("You doubled" if "You doubled" in text else None)


def test_an_error_is_told_with_the_learners_own_line():
    def learners(x):
        y = x + 1
        return sorted([y], key=lambda z: z.nothing)

    verdict = SQUARE.judge(learners)
    assert verdict.kind == "error"
    assert verdict.text == (
        "your function raised AttributeError: 'float' object has no attribute 'nothing'\n"
        "  in       return sorted([y], key=lambda z: z.nothing)"
    )


def test_a_mistake_that_raises_is_recognised_by_its_error():
    half = Mistake("You divided", "0 has no inverse", lambda x: x / 0)
    exercise = Exercise("9.5", "Zero", 1, 1, lambda x: 0.0, (half,), cases=lambda: [(2.0,)])
    verdict = exercise.judge(lambda x: 1 / (x - x))
    assert (verdict.kind, verdict.mistake) == ("wrong", "You divided")
    assert "got      ZeroDivisionError: " in verdict.text
    assert exercise.judge(lambda x: [][0]).kind == "error"


def test_a_function_that_changes_its_arguments_changes_no_case_and_is_told():
    case = torch.ones(2)
    exercise = Exercise("9.2", "Sum", 1, 1, lambda x: x.sum(), (), cases=lambda: [(case,)])
    assert exercise.judge(lambda x: x.zero_().sum()).kind == "wrong"
    assert exercise.judge(lambda x: x.sum()).text == "right"
    told = exercise.judge(lambda x: x.cumsum_(0)[-1])
    assert told.kind == "right"
    assert "but your function changes what it is given" in told.text


ROW = Exercise("9.3", "Row", 1, 1, lambda x: x, (), cases=lambda: [(torch.tensor([1.0, 3.0]),)])
SHAPES = {
    "one more dimension": (lambda x: x[None], "The values are right, but the shape should be [2], and is [1, 2]"),
    "one value too few": (lambda x: x[:1], "The shape should be [2], and is [1]"),
    "a sum": (lambda x: x.sum(), "That is the sum of what is asked for"),
    "the other way": (lambda x: x.flip(0), "The right values, the last one first"),
    "bool": (lambda x: x > 1, "Asked for are numbers, and yours are True and False"),
    "16 bits": (lambda x: (x + 0.004).half(), "Those are numbers of 16 bits"),
    "nan": (lambda x: x - x / 0 * 0, "There is a NaN in it"),
    "infinite": (lambda x: x / 0, "There is an infinite number in it"),
    "text": (lambda x: "1 3", "The type should be tensor, and is str"),
    "two tensors": (lambda x: (x, x), "One tensor is asked for, and you return 2 values"),
    "generator": (lambda x: (i for i in x), "The type should be tensor, and is generator; list(…) makes a list of it"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_said_of_a_wrong_tensor(name):
    answer, text = SHAPES[name]
    assert text in ROW.judge(answer).text


PARTS = Exercise("9.6", "Parts", 1, 1, lambda x: (x, x * x, "x"), (), cases=lambda: [(0.25,), (0.5,), (0.75,)])
HINTS = {
    "percent in one": (lambda x: (x, 100 * x * x, "x"), "Value 2 of 3 is wrong. That is in percent"),
    "one unlike": (lambda x: (x, x + 0.03, "x"), "Value 2 of 3 is wrong"),
    "too few": (lambda x: (x, x * x), "There should be 3 values, and there are 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_what_is_said_of_a_wrong_tuple(name):
    answer, text = HINTS[name]
    assert text in PARTS.judge(answer).text


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda x: 0.3 * x, "That is always 0.3 times what is asked for"),
        (lambda x: x + 7, "That is always 7 too large"),
        (lambda x: x - 0.25, "That is always 0.25 too small"),
        (lambda x: x + 1, "It is 1 too large"),
    ],
)
def test_a_constant_factor_or_offset_is_seen_in_three_values(answer, text):
    exercise = Exercise("9.7", "Itself", 1, 1, lambda x: x, (), cases=lambda: [(2.0,), (5.0,), (-3.0,)])
    assert text in exercise.judge(answer).text


def test_an_observed_exercise_shows_the_first_thing_that_differs():
    def watch(function, n):
        seen = []
        return {"what it returns": function(seen, n), "what it appends": list(seen)}

    def right(seen, n):
        seen.append(n)
        return n

    exercise = Exercise("9.8", "Append", 1, 1, right, (), cases=lambda: [(3,)], observe=watch)
    assert exercise.judge(right).kind == "right"
    assert exercise.judge(lambda seen, n: n).text.endswith("expected [3]\n  got      []\n  for      what it appends")
    assert exercise.judge(lambda seen, n: None).kind == "unanswered"


def test_an_answer_cannot_draw_in_the_output():
    exercise = Exercise("9.4", "Word", 1, 1, "yes", ())
    for text in (
        exercise.judge("\x1b[2Jno\nexercise 9.4: right").text,
        SQUARE.judge("\x1b[2J\n").text,
        SQUARE.judge(lambda x: int("\x1b[2J\nexercise 9.1: right")).text,
    ):
        assert "\x1b" not in text
        assert "\nexercise" not in text


EQUAL = [(1.0, 1.00005, True), (1.0, 1.01, False), (0.0, 5e-5, True), (1, True, False), ("a", "a", True), ((1, 2), [1, 2], True),
         ([1], [1, 2], False), ({"a": 1.0}, {"a": 1.00001}, True), ({"a": 1.0}, {"b": 1.0}, False), (torch.ones(2), [1.0, 1.0], True),
         (torch.ones(2), torch.ones(2, 1), False), (torch.tensor(float("nan")), torch.tensor(0.0), False), (1.0, "1.0", False),
         (torch.tensor([True, False]), torch.tensor([1.0, 0.0]), False), (torch.tensor([True]), [True], True), (True, torch.tensor(1), False),
         (torch.ones(2), [torch.tensor(1.0), torch.tensor(1.0)], True), (torch.ones(2), [1.0, [1.0]], False), (1.0, torch.tensor(1.0), True),
         (torch.ones(1), 1.0, False), (torch.ones(2), ["1", "1"], False), (float("inf"), float("inf"), True), (float("nan"), float("nan"), True),
         (None, None, True), (None, 0, False), (torch.ones(2).half(), torch.ones(2), True), (torch.ones(2).int(), torch.ones(2), True)]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "equal"), EQUAL)
def test_what_counts_as_the_same(a, b, equal):
    assert same(a, b) is equal
    assert same(b, a) is equal


def test_an_unknown_number_is_an_error_that_lists_the_others():
    with pytest.raises(CourseError, match=r"there is no exercise '9\.9'; there are 1\.1, "):
        exercises.check("9.9", 0)

import json
from pathlib import Path

import pytest

from dpo_helpers.errors import CourseError
from dpo_helpers.settings import load_settings
from dpo_helpers.show.checks import EXPECTED, check, check_that


def test_prints_the_expectation_not_the_value(capsys):
    check("loss", 0.69314, 0.693, 2e-3)
    assert capsys.readouterr().out == "loss: 0.693 ok (tolerance 0.002)\n"


@pytest.mark.parametrize("got", [0.7, float("nan"), float("inf")])
def test_a_wrong_value_raises_and_names_it(got):
    with pytest.raises(AssertionError, match="loss: got .*, want 0.693 ± 0.002"):
        check("loss", got, 0.693, 2e-3)


def test_claims():
    check_that("a", True)
    with pytest.raises(AssertionError, match="a: does not hold"):
        check_that("a", False)


def test_numbers_of_the_mini_profile_are_not_claimed_of_others(capsys):
    other = load_settings("mini", beta=1.0)
    check("loss", 5.0, 0.693, 2e-3, only=other)
    check_that("a", False, only=other)
    assert capsys.readouterr().out == (
        "loss: 5 (no expectation: it was measured on the mini profile as it is)\n"
        "a: does not hold here (claimed of the mini profile as it is)\n"
    )
    with pytest.raises(AssertionError):
        check("loss", 5.0, 0.693, 2e-3, only=load_settings("mini"))


@pytest.mark.parametrize(
    ("change", "is_claimed"),
    [
        ({"runs_dir": "x", "device": "cpu"}, True), ({"trunk_gb": 1.0, "save_every": 7, "resume": False}, True),
        ({"seed": 1}, False), ({"precision": "bf16"}, False), ({"freeze_embeddings": False}, False),
    ],
)  # fmt: skip
def test_where_and_on_what_a_run_is_made_does_not_change_what_is_claimed_but_how_precisely_does(change, is_claimed):
    settings = load_settings("mini", **change)
    if is_claimed:
        with pytest.raises(AssertionError, match="a: does not hold"):
            check_that("a", False, only=settings)
    else:
        check_that("a", False, only=settings)


def test_a_value_that_is_to_be_predicted_is_looked_up_by_name(capsys):
    check("megabytes", 178.45)
    assert capsys.readouterr().out == "megabytes: 178.5 ok (tolerance 0.1)\n"
    with pytest.raises(AssertionError, match=r"megabytes: got 180, want 178\.5 ± 0\.1"):
        check("megabytes", 180.0)
    with pytest.raises(CourseError, match="expected.json has no value for 'gigabytes'"):
        check("gigabytes", 1.0)


def test_every_recorded_value_is_shown_by_a_notebook():
    folder = Path(__file__).parent.parent / "notebooks"
    shown = set()
    for path in [*folder.glob("0*.ipynb"), *folder.glob("beyond/*.ipynb")]:
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                shown |= {
                    line.split(": ")[0] if line.count(": ") == 1 else line.rpartition(": ")[0]
                    for line in output.get("text", [])
                }
    recorded = json.loads(EXPECTED.read_text())
    assert recorded.keys() <= shown, recorded.keys() - shown

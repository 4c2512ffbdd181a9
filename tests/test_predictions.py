import pytest

from dpo_helpers.errors import CourseError
from dpo_helpers.lesson.predictions import Predictions
from dpo_helpers.settings import load_settings


@pytest.fixture
def predict(tmp_path):
    return Predictions(load_settings("mini", runs_dir=str(tmp_path)))


def said(capsys):
    return capsys.readouterr().out


def test_nothing_said_prints_and_keeps_nothing(predict, capsys):
    predict("1.1", "")
    predict("1.1", "   ")
    assert (said(capsys), predict.folder.exists()) == ("", False)


def test_the_first_prediction_stays_beside_a_later_one_and_outlives_the_kernel(predict, capsys, tmp_path):
    predict("1.1", 0.5)
    predict("1.1", 0.5)  # the cell was run again
    predict("1.10", "another one")
    assert said(capsys) == "You predicted: 0.5\nYou predicted: 0.5\nYou predicted: another one\n"
    again = Predictions(load_settings("mini", runs_dir=str(tmp_path)))
    again("1.1", "")
    again("1.1", "about a third")
    again("1.1")
    changed = "You predicted: about a third (first: 0.5)\n"
    assert said(capsys) == "You predicted: 0.5\n" + changed + changed
    assert (again.folder / "1.1.txt").read_text() == "0.5\nabout a third\n"


def test_what_was_said_stays_one_line_and_cannot_act(predict, capsys):
    predict("1.1", "up\ndown\x1b[2J")
    (predict.folder / "1.2.txt").write_bytes(b"\xff\x1b[2J\n")
    predict("1.2")
    assert said(capsys) == "You predicted: up down\\x1b[2J\nYou predicted: \ufffd\\x1b[2J\n"


def test_a_folder_that_cannot_be_written_is_named(predict):
    predict.folder.parent.mkdir(parents=True)
    predict.folder.write_text("in the way")
    with pytest.raises(CourseError, match="predictions.*1.1.txt: the prediction cannot be kept"):
        predict("1.1", "up")

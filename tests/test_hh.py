import pytest

from dpo_helpers.errors import DataError
from dpo_helpers.hh import Finding, Pair, parse_row, single_turn, split_prompt
from dpo_helpers.run.pairs import RowsError, parse_rows
from dpo_helpers.run.rows import Unreadable

GOOD = "\n\nHuman: Hi\n\nAssistant: I can help."
OTHER = "\n\nHuman: Hi\n\nAssistant: I cannot."


def test_prompt_ends_with_the_last_assistant_marker_and_keeps_the_leading_space():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    assert split_prompt(text) == ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d")


def test_words_that_both_responses_start_with_stay_in_the_response():
    # the longest common prefix of GOOD and OTHER ends inside "I can", which a prefix cut would eat
    assert parse_row({"chosen": GOOD, "rejected": OTHER}, 7) == Pair(
        "\n\nHuman: Hi\n\nAssistant:", " I can help.", " I cannot.", 7
    )


def test_a_dialogue_without_an_assistant_is_an_error():
    with pytest.raises(DataError, match="no Assistant turn"):
        split_prompt("\n\nHuman: Hi")


def test_single_turn():
    assert single_turn("Why?") == "\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rejected": GOOD}, "no 'chosen': every row needs 'chosen' and 'rejected' texts"),
        ({"chosen": None, "rejected": GOOD}, "no 'chosen': every row needs 'chosen' and 'rejected' texts"),
        ({"chosen": GOOD}, "no 'rejected': every row needs 'chosen' and 'rejected' texts"),
        ({"chosen": 5, "rejected": GOOD}, "'chosen' is int, not text"),
        (["chosen"], "it is list, not an object with 'chosen' and 'rejected'"),
        (None, "it is NoneType, not an object with 'chosen' and 'rejected'"),
    ],
)
def test_malformed_rows_are_findings_that_name_the_row(row, message):
    assert parse_row(row, 3) == Finding(3, message, "dropped")


EMPTY = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (EMPTY, GOOD, "chosen response is empty"),
        (GOOD, EMPTY + " \n ", "rejected response is empty"),
        (EMPTY, EMPTY, "chosen response is empty"),
        (GOOD, GOOD, "responses are identical"),
        (GOOD, GOOD.replace("Hi", "Hello"), "prompts differ"),
        (GOOD, "Hi", "rejected has no Assistant turn"),
        ("", GOOD, "chosen has no Assistant turn"),
        (GOOD + "\n\nHuman: Thanks", OTHER, "chosen goes on with a Human turn after its last Assistant turn"),
        (GOOD, OTHER + "\n\nHuman:", "rejected goes on with a Human turn after its last Assistant turn"),
        (GOOD + "\ud800", OTHER, "chosen holds a NUL or a lone surrogate"),
        (GOOD, OTHER + "\0", "rejected holds a NUL or a lone surrogate"),
    ],
)
def test_useless_rows_are_dropped_with_index_and_reason(chosen, rejected, reason):
    assert parse_row({"chosen": chosen, "rejected": rejected}, 11) == Finding(11, reason)


def test_a_line_that_could_not_be_read_is_a_finding_with_its_reason():
    rows = [{"chosen": GOOD, "rejected": OTHER}] * 3 + [Unreadable("line 4 cannot be read as JSON")]
    pairs, findings = parse_rows(rows, allow_dropped=True)
    assert findings == [Finding(3, "line 4 cannot be read as JSON", "dropped")]
    assert len(pairs) == 3


def test_html_is_data_like_any_other():
    row = {"chosen": GOOD + "<img src=x onerror=alert(1)>", "rejected": OTHER}
    assert isinstance(parse_row(row), Pair)


def test_more_than_five_percent_dropped_is_an_error_unless_allowed():
    rows = [{"chosen": GOOD, "rejected": OTHER}] * 18 + [{"chosen": GOOD, "rejected": GOOD}] * 2
    with pytest.raises(RowsError, match=r"2 of 20 rows cannot be used .*identical; 2 rows, first row 18") as caught:
        parse_rows(rows)
    assert "--allow-dropped" in str(caught.value)
    assert [d.index for d in caught.value.findings] == [18, 19]
    assert len(parse_rows([*rows[:18] * 2, *rows[18:]][:-1])[0]) == 36, "1 of 37 is 2.7 %"
    pairs, dropped = parse_rows(rows, allow_dropped=True)
    assert (len(pairs), [d.index for d in dropped]) == (18, [18, 19])


@pytest.mark.parametrize("allow_dropped", [False, True])
def test_where_no_row_can_be_used_going_on_without_them_is_not_advised(allow_dropped):
    with pytest.raises(RowsError, match=r"^2 of 2 rows cannot be used .*first row 0\); check the file$"):
        parse_rows([{"chosen": GOOD, "rejected": GOOD}] * 2, allow_dropped=allow_dropped)


def test_an_empty_data_set_is_an_error():
    with pytest.raises(DataError, match="the data set is empty"):
        parse_rows([])


def test_clean_rows_raise_no_alarm():
    from dpo_helpers.worlds.embedded import preference_rows

    pairs, dropped = parse_rows(preference_rows("train", 1000))
    assert (len(pairs), dropped) == (1000, [])


def test_real_slice(hh_slice):
    """The numbers of a plain count over the file: 1,542 rows, none unusable but the few that the rule names."""
    import gzip
    import json

    with gzip.open(hh_slice, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs, dropped = parse_rows(rows)
    assert len(pairs) == 1538
    assert [f.index for f in dropped if f.action == "kept"] == [205, 1068], "<pre> and <long answer>"
    assert len(pairs) + sum(f.action == "dropped" for f in dropped) == 1542
    for pair in pairs:
        assert pair.prompt.endswith("\n\nAssistant:")
        assert rows[pair.index]["chosen"] == pair.prompt + pair.chosen
        assert rows[pair.index]["rejected"] == pair.prompt + pair.rejected
        assert "\n\nAssistant:" not in pair.chosen

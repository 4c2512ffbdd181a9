import pytest

from dpo_helpers.errors import DataError
from dpo_helpers.hh import Dropped, Pair, count_turns, parse_row, parse_rows, single_turn, split_prompt

GOOD = "\n\nHuman: Hi\n\nAssistant: I can help."
OTHER = "\n\nHuman: Hi\n\nAssistant: I cannot."


def test_prompt_ends_with_the_last_assistant_marker_and_keeps_the_leading_space():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    assert split_prompt(text) == ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d")
    assert count_turns(split_prompt(text)[0]) == 2


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
        ({"rejected": GOOD}, "row 3 has no 'chosen'"),
        ({"chosen": None, "rejected": GOOD}, "row 3 has no 'chosen'"),
        ({"chosen": GOOD}, "row 3 has no 'rejected'"),
        ({"chosen": 5, "rejected": GOOD}, "row 3: 'chosen' is int, not text"),
    ],
)
def test_malformed_rows_are_errors_that_name_the_row(row, message):
    with pytest.raises(DataError, match=message):
        parse_row(row, 3)


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
        (GOOD + "\ud800", OTHER, "chosen holds a NUL or a lone surrogate"),
        (GOOD, OTHER + "\0", "rejected holds a NUL or a lone surrogate"),
    ],
)
def test_useless_rows_are_dropped_with_index_and_reason(chosen, rejected, reason):
    assert parse_row({"chosen": chosen, "rejected": rejected}, 11) == Dropped(11, reason)


def test_html_is_data_like_any_other():
    row = {"chosen": GOOD + "<img src=x onerror=alert(1)>", "rejected": OTHER}
    assert isinstance(parse_row(row), Pair)


def test_more_than_five_percent_dropped_is_an_error_unless_allowed():
    rows = [{"chosen": GOOD, "rejected": OTHER}] * 18 + [{"chosen": GOOD, "rejected": GOOD}] * 2
    with pytest.raises(DataError, match=r"2 of 20 rows cannot be used .*identical, 2 rows, first row 18"):
        parse_rows(rows)
    pairs, dropped = parse_rows(rows, max_dropped=0.1)
    assert (len(pairs), [d.index for d in dropped]) == (18, [18, 19])


def test_an_empty_data_set_is_an_error():
    with pytest.raises(DataError, match="the data set is empty"):
        parse_rows([])


def test_clean_rows_raise_no_alarm():
    from dpo_helpers.mini import preference_rows

    pairs, dropped = parse_rows(preference_rows("train", 1000))
    assert (len(pairs), dropped) == (1000, [])


def test_real_slice(hh_slice):
    """The numbers of a plain count over the file: 1,542 rows, none unusable but the few that the rule names."""
    import gzip
    import json

    with gzip.open(hh_slice, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs, dropped = parse_rows(rows)
    assert len(pairs) + len(dropped) == 1542
    for pair in pairs:
        assert pair.prompt.endswith("\n\nAssistant:")
        assert rows[pair.index]["chosen"] == pair.prompt + pair.chosen
        assert rows[pair.index]["rejected"] == pair.prompt + pair.rejected
        assert "\n\nAssistant:" not in pair.chosen
